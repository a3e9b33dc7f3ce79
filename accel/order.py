"""Orders of tokens, as values.

Attention does not care how its tokens are numbered; tiles do. An order that keeps neighbours in
space and time together makes tiles whose tokens attend to the same things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

import torch

from .grid import TokenGrid

# A cuboid to be walked: the axis along which the walk gets from one end to the other, and the
# positions the cuboid covers along each axis.
_Part = tuple[int, tuple[range, range, range]]


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


AXES = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
"""Orders of the axes, slowest first: frames, height, width."""


def axes(grid: TokenGrid, order: str) -> TokenOrder:
    """Along the axes in another order, one of `AXES`; `FHW` is raster order.

    Source: PAROAttention (arXiv 2506.16054), whose numbers 0 to 5 are the places in `AXES`.
    """
    sizes = {"F": grid.frames, "H": grid.height, "W": grid.width}
    places = torch.arange(grid.tokens).view(*sizes.values())
    return TokenOrder(places.permute(*("FHW".index(axis) for axis in order)).flatten())


def first_frame_apart(order: Callable[[TokenGrid], TokenOrder], grid: TokenGrid) -> TokenOrder:
    """The first frame, then the others, each in an order of its own."""
    if grid.frames == 1:
        return order(grid)
    first = TokenGrid(1, grid.height, grid.width)
    rest = TokenGrid(grid.frames - 1, grid.height, grid.width)
    return TokenOrder(torch.cat([order(first).places, order(rest).places + first.tokens]))


def boxes(grid: TokenGrid, box: TokenGrid) -> TokenOrder:
    """Box by box, each a neighbour of the one before; those at the far ends are cut.

    The tokens of a box stand together, in raster order, so a box of as many tokens as a tile is one
    tile where the box divides the grid; elsewhere a tile holds parts of boxes side by side.
    """
    sizes = (box.frames, box.height, box.width)
    line = torch.zeros(grid.tokens, dtype=torch.int64)  # of boxes before this axis
    inside = torch.zeros_like(line)
    for position, size in zip(_coordinates(grid), sizes, strict=True):
        at, last = position // size, int(position.max()) // size
        line = line * (last + 1) + torch.where(line % 2 == 1, last - at, at)  # there and back
        inside = inside * size + position % size
    return TokenOrder((line * (sizes[0] * sizes[1] * sizes[2]) + inside).argsort(stable=True))


def morton(grid: TokenGrid) -> TokenOrder:
    """Along the Z-order curve: the bits of frame, row and column in turn."""
    frame, row, column = _coordinates(grid)
    key = torch.zeros(grid.tokens, dtype=torch.int64)
    for bit in range(max(grid.frames, grid.height, grid.width).bit_length()):
        for place, position in enumerate((column, row, frame)):
            key |= ((position >> bit) & 1) << (3 * bit + place)
    return TokenOrder(key.argsort(stable=True))


@lru_cache(maxsize=32)
def gilbert(grid: TokenGrid) -> TokenOrder:
    """Along a generalised Hilbert curve: each token is a neighbour of the one before.

    Hilbert's curve (Hilbert 1891, "Über die stetige Abbildung einer Linie auf ein Flächenstück")
    fills a square of 2^n cells a side, the generalised ones a cuboid of any size. This one is an
    own construction: a cuboid is walked from a corner to the other end of one of its edges, in two
    halves along that edge or in a U-turn of three or five parts, whichever are nearest to cubes.

    Guaranteed for every grid: two tokens in a row differ by 1 in exactly one of frame, row and
    column. The walk begins at token 0 and ends at the other end of the longest edge from there that
    parity allows: one of even length or, where frames, height and width are all odd, any.

    The result is shared between calls: do not write to its tensor.
    """
    sizes = (grid.frames, grid.height, grid.width)
    travel = max((a for a in range(3) if _can_travel(a, sizes)), key=lambda a: sizes[a])
    frame, row, column = _joined([(travel, (range(sizes[0]), range(sizes[1]), range(sizes[2])))])
    return TokenOrder((frame * grid.height + row) * grid.width + column)


def _can_travel(axis: int, sizes: tuple[int, ...]) -> bool:
    """Whether a walk by single steps through all cells may join the ends of an edge along `axis`.

    As on a chessboard, each step changes the colour of the cell, so a walk of an even number of
    cells ends on the other colour and one of an odd number on the first.
    """
    cells = prod(sizes)
    return sizes[axis] % 2 == 0 or cells == 1 or (cells % 2 == 1 and sizes[axis] > 1)


@lru_cache(maxsize=256)
def _walk(a: int, b: int, c: int) -> torch.Tensor:
    """The cells of an `a` × `b` × `c` cuboid from (0, 0, 0) to (a - 1, 0, 0), `[3, a * b * c]`.

    There always is a way whose parts can be walked. Where b or c is 3 or more: a U-turn of three
    with arms of even length; what they leave is as long as the whole, and all odd if that is. Else
    two even halves of a, down to 2 × 2 × 2 (a U-turn of five) and 2 × 2 × 1 (one of three).
    """
    if b == c == 1:
        along, beside = torch.arange(a), torch.zeros(a, dtype=torch.int64)
        return torch.stack([along, beside, beside])
    mirrored = [[((0, 2, 1)[t], (x, z, y)) for t, (x, y, z) in way] for way in _ways(a, c, b)]
    ways = [
        way
        for way in [*_ways(a, b, c), *mirrored]
        if all(_can_travel(travel, tuple(map(len, spans))) for travel, spans in way)
    ]
    return _joined(min(ways, key=lambda way: _roughness(way, (b, c).count(1))))


def _ways(a: int, b: int, c: int) -> Iterator[list[_Part]]:
    """Ways to part a cuboid about its middle, each part beginning beside the end of the last."""
    x, y, z = range(a), range(b), range(c)
    for i in _about_half(a):
        yield [(0, (x[:i], y, z)), (0, (x[i:], y, z))]
        for j in _about_half(b):
            yield [(1, (x[:i], y[:j], z)), (0, (x, y[j:], z)), (1, (x[i:], y[:j], z))]
            for k in _about_half(c):
                up, over = (1, (x[:i], y[:j], z[:k])), (2, (x[:i], y[j:], z))
                back, down = (2, (x[i:], y[j:], z)), (1, (x[i:], y[:j], z[:k]))
                yield [up, over, (0, (x, y[:j], z[k:])), back, down]


def _about_half(size: int) -> range:
    """Where to cut a side: within two cells of its middle."""
    return range(max(1, size // 2 - 2), min(size - 1, size // 2 + 2) + 1)


def _roughness(way: list[_Part], flat: int) -> float:
    """How far the parts are from cubes that halve well: their surface for their volume.

    From squares where one axis is `flat`. Sides that are no multiples of four count as rougher,
    since their halves or quarters are odd.
    """
    total = 0.0
    for _, spans in way:
        sides = [len(span) for span in spans]
        cells = prod(sides)
        surface = cells * (sum(1 / side for side in sides) - flat)
        total += surface * cells ** (1 / (3 - flat)) * (1 + 0.1 * sum(1 / gcd(n, 4) for n in sides))
    return total


def _joined(way: list[_Part]) -> torch.Tensor:
    """The walks of the parts in a row, each begun in the corner nearest to the end of the last."""
    cells: list[torch.Tensor] = []
    at = [0, 0, 0]
    for travel, spans in way:
        axes = [travel, *(axis for axis in range(3) if axis != travel)]
        walk = _walk(*(len(spans[axis]) for axis in axes))
        turned = [s if p <= s[0] else s[::-1] for p, s in zip(at, spans, strict=True)]
        along = [s[0] + s.step * walk[axes.index(axis)] for axis, s in enumerate(turned)]
        cells.append(torch.stack(along))
        at = cells[-1][:, -1].tolist()
    return torch.cat(cells, dim=1)


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
    "gilbert": gilbert,
}
"""By name, those that need nothing but the grid."""
