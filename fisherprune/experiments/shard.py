"""The part of the runs that one of several machines does, without asking the others."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fisherprune.errors import FisherpruneError, shown


@dataclass(frozen=True)
class Shard:
    """Every run whose identity, modulo ``count``, is ``number - 1``."""

    number: int = 1
    count: int = 1

    @classmethod
    def read(cls, text: str) -> Shard:
        """Read ``NUMBER/COUNT``.

        Raises:
            FisherpruneError: where it is something else.
        """
        if match := re.fullmatch("([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text):
            number, count = map(int, match.groups())
            if number <= count:
                return cls(number, count)
        raise FisherpruneError(
            "must be I/N, two whole numbers with 1 <= I <= N and fewer than ten "
            f"digits, got {shown(text)}"
        )

    def takes(self, identity: str) -> bool:
        """Return whether a run falls to this part."""
        return int(identity, 16) % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALL = Shard()
