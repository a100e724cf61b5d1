"""Structure "blocks:RxC": R outputs times C inputs are kept or pruned together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from fisherprune.errors import FieldError
from fisherprune.masks.structures.layout import cube
from fisherprune.masks.structures.registry import register_structure
from fisherprune.masks.structures.units import Units


@register_structure(
    "blocks:RxC",
    "blocks of R outputs times C inputs, as blocks:4x4",
    r"blocks:(\d+)x(\d+)",
)
@dataclass(frozen=True)
class Blocks(Units):
    """Tiles of the matrix [out, in]; of a convolution's at each tap of its kernel.

    That is how block-sparse kernels read weights: a convolution is a matrix product
    [out, in] for each tap, or one of [out, taps * in], whose blocks of inputs are the
    same ones. The last blocks of a row or column are smaller where R or C do not divide
    its length.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Refuse empty blocks."""
        if not self.rows or not self.columns:
            text = f"blocks:{self.rows}x{self.columns}"
            raise FieldError("structure", "blocks of at least 1x1", repr(text))

    def unit(self, shape: Sequence[int], transposed: bool) -> int:
        """Return the number of weights of the first block: none is larger."""
        out, inputs, taps = cube(shape, transposed)
        return min(self.rows, out) * min(self.columns, inputs) * min(1, taps)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of each block: [out / R, in / C, taps], rounded up."""
        out, inputs, taps = values.shape
        rows, columns = self._size(out, inputs)
        more = -out % rows, -inputs % columns
        if any(more):
            values = pad(values, (0, 0, 0, more[1], 0, more[0]))
        tall, wide = (out + more[0]) // rows, (inputs + more[1]) // columns
        return values.reshape(tall, rows, wide, columns, taps).sum((1, 3))

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Give each weight of a block what its block has."""
        tall, wide, taps = units.shape
        rows, columns = self._size(*shape[:2])
        each = units[:, None, :, None].expand(-1, rows, -1, columns, -1)
        whole = each.reshape(tall * rows, wide * columns, taps)
        return whole[: shape[0], : shape[1]]

    def _size(self, out: int, inputs: int) -> tuple[int, int]:
        """Return the rows and columns of the largest block of a layer."""
        return min(self.rows, max(out, 1)), min(self.columns, max(inputs, 1))
