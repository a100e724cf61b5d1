"""Progress bars on stderr: rate and time left, gone when done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SizedIterable(Protocol[T_co]):
    """What can be passed over again and has a length."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...


def bar(
    items: Iterable[T] | None, what: str, *, quiet: bool, total: int | None = None
) -> tqdm:
    """Wrap ``items`` in a bar titled ``what``.

    Nothing is shown with ``quiet`` or where stderr is not a terminal.
    """
    from tqdm import tqdm

    disable = True if quiet else None  # None: tqdm looks whether stderr is a terminal
    return tqdm(
        items, what, total, leave=False, disable=disable, dynamic_ncols=True, unit=""
    )


def shown_bar(items: Iterable[T], what: str) -> Iterable[T]:
    """Wrap ``items`` in a bar titled ``what``, a widget where this is a notebook."""
    from tqdm.auto import tqdm

    return tqdm(items, what, leave=False, dynamic_ncols=True, unit="batch")


class WithBar(Generic[T]):
    """An iterable that shows a bar each time it is passed over."""

    def __init__(self, items: SizedIterable[T], what: str, *, quiet: bool) -> None:
        """Show ``items``, which have a length, under the title ``what``."""
        self.items, self.what, self.quiet = items, what, quiet

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.items)

    def __iter__(self) -> Iterator[T]:
        """Pass over the items once."""
        return iter(bar(self.items, self.what, quiet=self.quiet))
