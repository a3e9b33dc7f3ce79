"""Which key tiles each query tile attends to.

Shapes here and everywhere in Kinora: `B` batch, `H` heads, `L` tokens, `D` head dimension; `Q` and
`K` are numbers of query and key tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from . import bits
from .listing import entries

Tail = Literal["none", "complement"]


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens of a tile of queries and of one of keys."""

    query: int = 128
    key: int = 64

    def __post_init__(self) -> None:
        if self.query < 1 or self.key < 1:
            raise ValueError(f"a tile needs at least one query and one key, not {self}")

    def __str__(self) -> str:
        return f"{self.query}x{self.key}"


def tiles_of(tokens: int, size: int) -> int:
    """Tiles of `size` that cover `tokens`; the last one may be ragged."""
    return -(-tokens // size)


def tile_lengths(tokens: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Valid tokens of each tile, `[tiles]` int64."""
    starts = torch.arange(tiles_of(tokens, size), device=device) * size
    return (tokens - starts).clamp(max=size)


def pairs_in(mask: torch.Tensor, *, tile: Tile, queries: int, keys: int) -> torch.Tensor:
    """Pairs of valid tokens in true tiles of each row, `[..., Q, K]` bool to `[..., Q]` int64."""
    columns = (mask * tile_lengths(keys, tile.key, mask.device)).sum(-1)
    return columns * tile_lengths(queries, tile.query, mask.device)


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlan:
    """The key tiles that each query tile attends to, for one attention call.

    Args:
        indices: `[B or 1, H or 1, Q, width]` int32; of each row the first `counts` entries are
            different key tiles, what follows is ignored.
        counts: `[B or 1, H or 1, Q]` int32, 0 to `width`.
        tile: what the numbers of tiles refer to.
        queries, keys: true lengths in tokens; the last tiles may be ragged.
        tail: what stands for the tiles that are left out. `none`: nothing. `complement`: one token
            each, the mean of its keys and of its values, weighing as much as its number of tokens.
        order: permutation int64 in which queries and keys were cut into tiles, `[L]` or, where
            heads have their own, `[B or 1, H or 1, L]`: tile 0 holds tokens `order[:tile]`. None:
            as they come. Needs `queries == keys`, or a `key_order`.
        key_order: permutation int64 in which keys alone are cut into tiles, `[keys]` or `[B or 1,
            H or 1, keys]`; `order` is then of queries alone. None: `order` is of both.
        bias: `[B or 1, H or 1, Q, width]` float32, added to the logits of a kept tile.
        means: tokens of a mean; above 0, one token for every so many, in the plan's order, is
            attended to by all queries, weighing as much as its number of tokens. Tokens of kept
            tiles are in them too and so count twice; hence not beside a tail. 0: none.
        within: `[B or 1, H or 1, Q, most, tile.query, tile.key / 32 rounded up]` int32, with the
            first dimensions of `indices` and 1 to `width` as `most`: a mask of the tokens of the
            tile of each of a row's first `most` entries; those behind are attended to whole. Bit
            c % 32 of word c // 32 says that a query attends to key c of the tile; bits of tokens
            behind the last are ignored. None: no tile has a mask. Not beside a tail or means.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit together.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    tile: Tile
    queries: int
    keys: int
    tail: Tail = "none"
    order: torch.Tensor | None = None
    key_order: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    means: int = 0
    within: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows = tiles_of(self.queries, self.tile.query)
        if self.indices.ndim != 4 or self.indices.shape[2] != rows:
            raise ValueError(
                f"indices {tuple(self.indices.shape)} for {self.queries} queries in tiles of "
                f"{self.tile.query}; [B or 1, H or 1, {rows}, width] is needed"
            )
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise ValueError(
                f"indices {self.indices.dtype}, counts {self.counts.dtype}; both must be int32"
            )
        if self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                f"counts {tuple(self.counts.shape)} do not fit indices {tuple(self.indices.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.indices.shape:
            raise ValueError(
                f"bias {tuple(self.bias.shape)} does not fit indices {tuple(self.indices.shape)}"
            )
        if self.bias is not None and not self.bias.dtype.is_floating_point:
            raise ValueError(f"bias {self.bias.dtype}; a floating dtype is needed")
        if self.tail not in ("none", "complement"):
            raise ValueError(f"tail {self.tail!r}; it can be none or complement")
        if self.means < 0 or (self.means and self.tail != "none"):
            raise ValueError(
                f"means of {self.means} tokens with tail {self.tail}; they need 1 or more and none"
            )
        if self.within is not None:
            self._check_within(self.within)
        shared = self.key_order is None
        if self.order is not None and (
            (shared and self.queries != self.keys) or not _permutes(self.order, self.queries)
        ):
            raise ValueError(
                f"an order of {tuple(self.order.shape)} tokens for {self.queries} queries and "
                f"{self.keys} keys; it must be one permutation of "
                + ("both, or there must be a key_order" if shared else "the queries")
                + f", int64, not {self.order.dtype}"
            )
        if self.key_order is not None and not _permutes(self.key_order, self.keys):
            raise ValueError(
                f"a key_order of {tuple(self.key_order.shape)} tokens for {self.keys} keys; it "
                f"must be one permutation of them, int64, not {self.key_order.dtype}"
            )

    def _check_within(self, within: torch.Tensor) -> None:
        words, most = bits.words_of(self.tile.key), within.shape[3] if within.ndim == 6 else 0
        shape = (*self.indices.shape[:3], most, self.tile.query, words)
        width = self.indices.shape[3]
        if within.shape != shape or not 1 <= most <= width or within.dtype != torch.int32:
            shown = ", ".join(map(str, (*self.indices.shape[:3], f"1 to {width}", *shape[4:])))
            raise ValueError(
                f"within {tuple(within.shape)} of {within.dtype}; [{shown}] of torch.int32 is "
                f"needed: {self.tile.query} queries by {words} words for the first entries of "
                "each row"
            )
        if self.tail != "none" or self.means:
            raise ValueError(
                f"within, a mask of tokens, with tail {self.tail} and means of {self.means}; "
                "it needs tail none and means 0, since a tile kept in part has no mean of its own"
            )

    @property
    def orders(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """In which queries and keys are cut into tiles."""
        return self.order, self.order if self.key_order is None else self.key_order

    @property
    def rows(self) -> int:
        """Tiles of queries."""
        return tiles_of(self.queries, self.tile.query)

    @property
    def columns(self) -> int:
        """Tiles of keys."""
        return tiles_of(self.keys, self.tile.key)

    @property
    def kept(self) -> torch.Tensor:
        """Whether an entry of `indices` counts, bool of the same shape."""
        places = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return places < self.counts[..., None]

    def mask(self) -> torch.Tensor:
        """`[B or 1, H or 1, Q, K]` bool, true where a tile is kept, in whole or in part."""
        shape = (*self.indices.shape[:3], self.columns + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        # What does not count goes into one column too many.
        places = torch.where(self.kept, self.indices, self.columns).long()
        return mask.scatter_(-1, places, True)[..., :-1]

    def token_mask(self, queries: torch.Tensor | None = None) -> torch.Tensor:
        """`[B or 1, H or 1, queries, keys]` bool, true where a query attends to a key.

        Args:
            queries: `[N]` int64, places in the plan's order; the mask is of these. None: of all.
        """
        if queries is None:
            queries = torch.arange(self.queries, device=self.indices.device)
        row, size = queries // self.tile.query, self.tile.key
        if self.within is None:
            return self.mask()[:, :, row].repeat_interleave(size, dim=-1)[..., : self.keys]
        # [B, H, N, width, words], then words where their tile is; see `mask`.
        words = self.within[:, :, row, :, queries % self.tile.query].movedim(0, 2)
        whole = self.indices.shape[3] - words.shape[3]
        words = torch.nn.functional.pad(words, (0, 0, 0, whole), value=-1)
        places = torch.where(self.kept, self.indices, self.columns)[:, :, row].long()
        found = words.new_zeros(*places.shape[:3], self.columns + 1, words.shape[-1])
        found.scatter_(3, places[..., None].expand_as(words), words)
        return bits.unpack(found[..., :-1, :], size).flatten(-2)[..., : self.keys]

    def tile_bias(self) -> torch.Tensor | None:
        """`bias` by tile, `[B or 1, H or 1, Q, K]`, 0 where a tile is left out."""
        if self.bias is None:
            return None
        shape = (*self.indices.shape[:3], self.columns + 1)
        places = torch.where(self.kept, self.indices, self.columns).long()
        return self.bias.new_zeros(shape).scatter_(-1, places, self.bias)[..., :-1]

    def density(self) -> torch.Tensor:
        """Share of the pairs of valid tokens that are attended to, `[B or 1, H or 1]` float32.

        Pooled tokens of the tail, and means, do not count.
        """
        # Counted in whole numbers: exact, and MPS has no float64.
        pairs = self.pairs().sum(-1)
        return pairs.to(torch.float32) / (self.queries * self.keys)

    def pairs(self) -> torch.Tensor:
        """Pairs of valid tokens that each row attends to, `[B or 1, H or 1, Q]` int64."""
        if self.within is not None:
            return self._attended(self.within).sum(-1)
        return pairs_in(self.mask(), tile=self.tile, queries=self.queries, keys=self.keys)

    def tiles_as_many(self) -> torch.Tensor:
        """Tiles of each row that have as many pairs as it attends to, rounded up; like `counts`."""
        if self.within is None:
            return self.counts
        height = tile_lengths(self.queries, self.tile.query, self.indices.device)
        tiles = -(-self.pairs() // (height * self.tile.key))
        return tiles.to(torch.int32)

    def _attended(self, within: torch.Tensor) -> torch.Tensor:
        """Keys of each query, `[B or 1, H or 1, Q, tile.query]` int64; 0 behind the last one."""
        device, most = within.device, within.shape[3]
        lengths = tile_lengths(self.keys, self.tile.key, device)
        places = torch.where(self.kept, self.indices, 0).long()
        held = torch.where(self.kept, lengths[places], 0)
        valid = bits.first(held[..., :most], within.shape[-1])[..., None, :]
        attended = bits.ones(within & valid).sum((3, 5)) + held[..., most:].sum(-1)[..., None]
        here = torch.arange(self.tile.query, device=device)
        return attended * (here < tile_lengths(self.queries, self.tile.query, device)[:, None])

    def check(self) -> None:
        """Look at the numbers, which waits for the device; construction looks at shapes alone.

        Raises:
            ValueError: counts below 0 or above the width; a kept entry that is no tile of keys or
                is on its list twice; an order that is no permutation; a row that keeps nothing and
                has no tail, or a query whose mask does, which would get output 0.
        """
        width, columns, kept = self.indices.shape[-1], self.columns, self.kept
        low, high = int(self.counts.min()), int(self.counts.max())
        if low < 0 or high > width:
            raise ValueError(f"counts {low} to {high}; lists of {width} have 0 to {width} entries")
        if low == 0 and self.tail == "none" and not self.means:
            empty = int((self.counts == 0).sum())
            raise ValueError(
                f"counts 0 in {empty} rows; their queries would attend to nothing: keep a tile in "
                "each, or take the tail complement"
            )
        off = kept & ((self.indices < 0) | (self.indices >= columns))
        if bool(off.any()):
            raise ValueError(
                f"indices hold {int(self.indices[off][0])}; {self.keys} keys in tiles of "
                f"{self.tile.key} are tiles 0 to {columns - 1}"
            )
        if bool((self.mask().sum(-1) != self.counts).any()):
            raise ValueError("indices hold a tile twice in one row; each may be kept once")
        if self.within is not None:
            attended = self._attended(self.within).flatten(2)[..., : self.queries]
            if bool((attended == 0).any()):
                empty = int((attended == 0).sum())
                raise ValueError(
                    f"within leaves {empty} queries without a key; they would attend to nothing"
                )
        for name, order in (("order", self.order), ("key_order", self.key_order)):
            if order is not None and not torch.equal(
                order.sort().values,
                torch.arange(order.shape[-1], device=order.device).expand_as(order),
            ):
                raise ValueError(f"{name} is no permutation of 0 to {order.shape[-1] - 1}")

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan elsewhere."""
        return self._each(lambda x: x.to(device))

    def repeated(self, times: int) -> BlockPlan:
        """The plan of a batch that holds this one's items `times` times, one behind the other."""

        def several(x: torch.Tensor) -> torch.Tensor:
            return x if x.ndim == 1 or x.shape[0] == 1 else x.repeat(times, *[1] * (x.ndim - 1))

        return self._each(several)

    def of_heads(self, heads: slice) -> BlockPlan:
        """The plan of these heads alone."""

        def some(x: torch.Tensor) -> torch.Tensor:
            return x if x.ndim == 1 or x.shape[1] == 1 else x[:, heads].contiguous()

        return self._each(some)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BlockPlan:
        fields = ("indices", "counts", "order", "key_order", "bias", "within")
        held: dict[str, Any] = {name: getattr(self, name) for name in fields}
        return replace(self, **{key: it if it is None else change(it) for key, it in held.items()})

    @classmethod
    def from_mask(
        cls,
        mask: torch.Tensor,
        *,
        tile: Tile,
        queries: int,
        keys: int,
        tail: Tail = "none",
        order: torch.Tensor | None = None,
        key_order: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
    ) -> BlockPlan:
        """The plan that keeps the tiles that are true in `mask`, `[B or 1, H or 1, Q, K]` bool.

        Args:
            first: `[B or 1, H or 1, Q, K]` bool, kept tiles that stand first in the list of their
                row, as those with a mask of tokens must. None: in rising order all.
        """
        shape = (tiles_of(queries, tile.query), tiles_of(keys, tile.key))
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[2:] != shape:
            raise ValueError(
                f"a mask {tuple(mask.shape)} of {mask.dtype}; [B or 1, H or 1, {shape[0]}, "
                f"{shape[1]}] of torch.bool is needed"
            )
        indices, counts = entries(mask, first=first)
        return cls(indices, counts, tile, queries, keys, tail, order, key_order)

    @classmethod
    def from_tokens(
        cls,
        mask: torch.Tensor,
        *,
        tile: Tile,
        order: torch.Tensor | None = None,
        key_order: torch.Tensor | None = None,
    ) -> BlockPlan:
        """The plan of a mask of tokens that is written down, which large grids have no memory for.

        Args:
            mask: `[B or 1, H or 1, queries, keys]` bool, in the orders of the plan.

        Returns:
            The tiles in which any query attends to any key, `within` where they are not whole.
        """
        if mask.dtype != torch.bool or mask.ndim != 4:
            raise ValueError(
                f"a mask {tuple(mask.shape)} of {mask.dtype}; [B or 1, H or 1, queries, keys] of "
                "torch.bool is needed"
            )
        queries, keys = mask.shape[2:]
        padded = torch.nn.functional.pad(mask, (0, -keys % tile.key, 0, -queries % tile.query))
        tiles = padded.unflatten(3, (-1, tile.key)).unflatten(2, (-1, tile.query)).transpose(3, 4)
        some = tiles.any(-1).any(-1)
        heights, widths = tile_lengths(queries, tile.query), tile_lengths(keys, tile.key)
        whole = tiles.sum((-2, -1)) == (heights[:, None] * widths).to(mask.device)
        part = some & ~whole
        plan = cls.from_mask(
            some, tile=tile, queries=queries, keys=keys, order=order, key_order=key_order,
            first=part,
        )  # fmt: skip
        most = int(part.sum(-1).max())
        if not most:
            return plan
        words = bits.pack(tiles)
        places = plan.indices[..., :most].long()[..., None, None]
        return replace(
            plan, within=words.gather(3, places.expand(-1, -1, -1, -1, *words.shape[4:]))
        )

    @classmethod
    def dense(
        cls, *, tile: Tile, queries: int, keys: int, device: torch.device | str = "cpu"
    ) -> BlockPlan:
        """The plan that keeps everything."""
        rows, columns = tiles_of(queries, tile.query), tiles_of(keys, tile.key)
        every = torch.arange(columns, dtype=torch.int32, device=device)
        counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
        indices = every.expand(1, 1, rows, -1).contiguous()
        return cls(indices=indices, counts=counts, tile=tile, queries=queries, keys=keys)


def _permutes(order: torch.Tensor, tokens: int) -> bool:
    """Whether it looks like a permutation of `tokens`, or like one for each head."""
    return order.ndim in (1, 3) and order.shape[-1] == tokens and order.dtype == torch.int64
