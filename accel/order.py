"""Orders of tokens, as values.

Attention does not care how its tokens are numbered; tiles do. An order that keeps neighbours in
space and time together makes tiles whose tokens attend to the same things.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .grid import TokenGrid


@dataclass(frozen=True, slots=True, eq=False)
class TokenOrder:
    """A permutation of `L` tokens: place `i` of the new order holds token `places[i]`.

    Raises:
        ValueError: `places` is no permutation of 0 to L - 1.
    """

    places: torch.Tensor
    """`[L]` int64."""

    def __post_init__(self) -> None:
        places = self.places
        if places.ndim != 1 or not torch.equal(
            places.sort().values, torch.arange(len(places), device=places.device)
        ):
            raise ValueError(f"{tuple(places.shape)} places that are no permutation of the tokens")

    def __len__(self) -> int:
        return len(self.places)

    def on(self, device: torch.device | str) -> torch.Tensor:
        """`places` on a device."""
        return self.places.to(device)

    def apply(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """`x` with its tokens, along `dim`, in this order."""
        return x.index_select(dim, self.places.to(x.device))

    def undo(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The reverse of `apply`."""
        return x.index_select(dim, self.inverse.places.to(x.device))

    @property
    def inverse(self) -> TokenOrder:
        """The order that undoes this one."""
        return TokenOrder(self.places.argsort())

    def then(self, other: TokenOrder) -> TokenOrder:
        """The order of applying this one first and `other` to the result."""
        if len(self) != len(other):
            raise ValueError(f"orders of {len(self)} and of {len(other)} tokens do not compose")
        return TokenOrder(self.places[other.places])

    def beside_text(self, tokens: int, *, first: bool = False) -> TokenOrder:
        """With `tokens` of text, kept as they are, behind the picture's tokens or before them."""
        text = torch.arange(tokens)
        if first:
            return TokenOrder(torch.cat([text, self.places + tokens]))
        return TokenOrder(torch.cat([self.places, text + len(self)]))


def raster(grid: TokenGrid) -> TokenOrder:
    """As models number their tokens: frame by frame, row by row."""
    return TokenOrder(torch.arange(grid.tokens))


def boxes(grid: TokenGrid, box: TokenGrid) -> TokenOrder:
    """Box by box, boxes and the tokens in them in raster order; those at the far ends are cut.

    The tokens of a box stand together, so a box of as many tokens as a tile is one tile where the
    box divides the grid.
    """
    sizes = (box.frames, box.height, box.width)
    positions = list(zip(_coordinates(grid), sizes, strict=True))
    key = torch.zeros(grid.tokens, dtype=torch.int64)
    for position, size in positions:  # which box
        key = key * (int(position.max()) // size + 1) + position // size
    for position, size in positions:  # where in it
        key = key * size + position % size
    return TokenOrder(key.argsort(stable=True))


def morton(grid: TokenGrid) -> TokenOrder:
    """Along the Z-order curve: the bits of frame, row and column in turn."""
    frame, row, column = _coordinates(grid)
    key = torch.zeros(grid.tokens, dtype=torch.int64)
    for bit in range(max(grid.frames, grid.height, grid.width).bit_length()):
        for place, position in enumerate((column, row, frame)):
            key |= ((position >> bit) & 1) << (3 * bit + place)
    return TokenOrder(key.argsort(stable=True))


def _coordinates(grid: TokenGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frame, row and column of each token in raster order, `[L]` each."""
    token = torch.arange(grid.tokens)
    return (
        token // (grid.height * grid.width),
        token // grid.width % grid.height,
        token % grid.width,
    )


ORDERS: dict[str, Callable[[TokenGrid], TokenOrder]] = {
    "raster": raster,
    "morton": morton,
    "gilbert": morton,
}
"""By name, those that need nothing but the grid."""
