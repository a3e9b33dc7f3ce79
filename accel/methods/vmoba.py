"""`vmoba`: each query takes blocks of the clip, which layers cut along time, space or both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from ...kernels import bits
from ...kernels.masks import of_groups
from ...kernels.plan import BlockPlan, Tail, Tile, tile_lengths, tiles_of
from ..grid import TokenGrid
from ..method import AttentionMethod
from ..options import option
from ..partition import (
    CHUNK,
    block_scores,
    blocks_of,
    by_choice,
    chosen_blocks,
    own_share,
    partition,
)
from ..site import Site
from ..tiles import kept_of, likely_share, tile_of


class VMoBA(AttentionMethod):
    """Each query attends to its own block of the clip and to those whose mean key fits it best.

    Layers take turns: the first cuts the frames into `temporal` parts, the second the height and
    width, of all frames together, into `spatial_height` x `spatial_width`, the third all three,
    into `cube_frames` x `cube_height` x `cube_width`; the fourth is as the first. An axis of fewer
    tokens has a part for each. The score of a query and a block is the product of the query with
    the mean of the block's keys. Pairs of them are taken, best first, from the pool that `scope`
    says: by each query for itself, or by all queries of a head, or of all heads, so that some take
    more blocks than others. Rule `top` takes as many as are `keep` of the blocks for each query;
    `similarity` and `softmax` take the fewest that hold `mass` of the pool's weights: scores, moved
    and scaled to go from 0 to 1, or each query's softmax over the blocks. A query's own block
    counts first and is always taken. Text is attended to by all and attends to all.

    A kernel goes over tiles, all that any query of a tile has taken something of. So that queries
    of a tile have much in common, they are sorted, in each head, by what they take. With `shared`
    they attend to all of those tiles: faster, nothing that is computed is left out, and the
    density is that of the tiles. Without, each attends to what it has taken itself, by masks, as
    weights trained with it want: the density is less, in the same tiles. Of 9,216 tokens of
    `kinora-tiny` and a density of 0.29, 0.25 and 0.25 in the three kinds of layers the tiles held
    0.31, 0.54 and 0.74, less where blocks are larger; the error of the output was 0.95 times as
    large with `shared` in the first kind of layer, about half as large in the others. Masks take a
    bit for each pair in those tiles, in each head: at 33,000 tokens up to 130 MB a head.

    Source: VMoBA (arXiv 2506.23858); its setting without training on Wan2.1 at 480 x 832 is `keep =
    0.25`, 2, 6 and 18 of 7, 24 and 72 blocks for each query, behind a dense quarter of the steps
    (`from_step = 0.25`); the default keeps more. As trained: `rule = "similarity"`, `scope =
    "head"`. Differs from the paper: any grid, where blocks differ by a token along an axis that
    they do not divide; scores are of keys less their mean, which changes nothing within a query;
    where its own blocks hold `mass`, a pool takes no other; `softmax` is ours, since one extreme
    score moves all weights of `similarity`; queries are not gathered for each block, and with
    `shared`, the default, take what the others of their tile take. Differs from the authors' code:
    where nothing is taken that one runs dense; its scope of the queries of one block is not here.
    """

    name: ClassVar[str] = "vmoba"
    paper: ClassVar[str] = "arXiv 2506.23858"
    licence: ClassVar[str] = "the repository has no licence file"
    use_when: ClassVar[str] = (
        "weights were trained with it, or long clips shall be cut along time and space in turn. "
        "It computes more than its density says: compare its speed, not its density, with methods "
        "that choose by tiles. Weights trained with it want `shared` off, whose masks take "
        "gigabytes above some 40,000 tokens."
    )

    rule: Literal["top", "similarity", "softmax"] = option(
        "top", "How many blocks are taken: a share of them, or as many as hold a share of weights"
    )
    scope: Literal["query", "head", "global"] = option(
        "query", "The pool of pairs of queries and blocks: of a query, of a head, or of all heads"
    )
    keep: float = option(
        0.5, "Of rule top: share of the blocks, a query's own among them", above=0, most=1
    )
    mass: float = option(
        0.25, "Of rules similarity and softmax: share of the pool's weights", above=0, most=1
    )
    temporal: int = option(
        7, "Of layers 1, 4, 7 …: parts of the frames", least=1, most=1024, unit="blocks"
    )
    spatial_height: int = option(
        6, "Of layers 2, 5, 8 …: parts of the height", least=1, most=1024, unit="blocks"
    )
    spatial_width: int = option(
        4, "Of layers 2, 5, 8 …: parts of the width", least=1, most=1024, unit="blocks"
    )
    cube_frames: int = option(
        3, "Of layers 3, 6, 9 …: parts of the frames", least=1, most=1024, unit="blocks"
    )
    cube_height: int = option(
        6, "Of layers 3, 6, 9 …: parts of the height", least=1, most=1024, unit="blocks"
    )
    cube_width: int = option(
        4, "Of layers 3, 6, 9 …: parts of the width", least=1, most=1024, unit="blocks"
    )
    shared: bool = option(
        True, "Whether queries attend to all that any query of their tile takes, without masks"
    )
    tile: Literal["64x64", "128x64", "128x128", "256x128"] = option(
        "128x64",
        "Queries by keys in a tile; small ones hold less that was not taken, and are slower",
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        if self._whole(site):
            return None
        chosen = self.choose(q.detach(), k.detach(), site)
        return planned(chosen, self._layout(q.device, site), shared=self.shared)

    def choose(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> torch.Tensor:
        """The blocks that each query of the picture takes, `[B, H, N, C]` bool, in raster order."""
        found = self._layout(q.device, site)
        start = site.text if site.text_first else 0
        q, k = (x[:, :, start : start + site.grid.tokens] for x in (q, k))
        batch, heads, queries, _ = q.shape
        pairs = queries * len(found.sizes)
        many = heads if self.scope == "global" else max(1, CHUNK // pairs)
        taken = torch.empty(
            batch, heads, queries, len(found.sizes), dtype=torch.bool, device=q.device
        )
        for item in range(batch):
            for head in range(0, heads, many):
                part = slice(item, item + 1), slice(head, head + many)
                taken[part] = chosen_blocks(
                    block_scores(q[part], k[part], found.owner, found.sizes),
                    found.owner,
                    found.sizes,
                    rule=self.rule,
                    scope=self.scope,
                    share=self.keep if self.rule == "top" else self.mass,
                    scale=q.shape[-1] ** -0.5,
                )
        return taken

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        return tile_of(self.tile), "none"

    def masks(self, heads: int) -> int:
        """See `AttentionMethod`; each head has its own."""
        return heads

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`; exact for rule top where the blocks are of one size, else a guess.

        Of `similarity` 0.77 of `mass` is taken, as the paper measured; of `softmax` see
        `likely_share`. With `shared` it is `computed`.
        """
        return 1.0 if self._whole(site) else self._density(site, spread=self.shared)

    def computed(self, site: Site) -> float:
        """See `AttentionMethod`; a guess from what was measured on `kinora-tiny`."""
        return 1.0 if self._whole(site) else self._density(site, spread=True)

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        blocks = blocks_of(site.grid, self.parts(site))
        if blocks.tokens == 1:
            return f"because the clip of {site.grid} tokens is one block in layers like this one"
        return f"because all of {blocks.tokens} blocks are taken"

    def parts(self, site: Site) -> TokenGrid:
        """Blocks along frames, height and width in a layer, before the grid limits them."""
        return (
            TokenGrid(self.temporal, 1, 1),
            TokenGrid(1, self.spatial_height, self.spatial_width),
            TokenGrid(self.cube_frames, self.cube_height, self.cube_width),
        )[site.layer % 3]

    def _layout(self, device: torch.device, site: Site) -> Layout:
        parts, (tile, _) = self.parts(site), self.tiling()
        return layout(device, parts, site.grid, site.text, site.text_first, tile)

    def _whole(self, site: Site) -> bool:
        """Whether everything is taken, whatever the scores are."""
        count = blocks_of(site.grid, self.parts(site)).tokens
        return count == 1 or self._share(count) == 1

    def _share(self, count: int) -> float:
        """Of `count` blocks that a query takes, about."""
        if self.rule == "top":
            return kept_of(self.keep, count) / count
        if self.mass == 1:
            return 1.0
        likely = 0.77 * self.mass if self.rule == "similarity" else likely_share(self.mass)
        # Not all, which would keep every call dense, where most of them may take less.
        return min(max(likely, 1 / count), 1 - 1 / count)

    def _density(self, site: Site, *, spread: bool) -> float:
        """Of pairs of tokens; `spread`: of the tiles they are in."""
        parts, tokens = self.parts(site), site.grid.tokens
        count = blocks_of(site.grid, parts).tokens
        # Own blocks, and of the others as many as are taken besides.
        own = own_share(site.grid, parts)
        others = (self._share(count) * count - 1) / (count - 1)
        share = own + others * (1 - own)
        if spread:
            share = union_of(share, count, tokens / count / self.tiling()[0].query)
        beside = 1 - (tokens / site.tokens) ** 2
        return beside + share * (1 - beside)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A partition on a device, with text beside it as one more block, which comes last.

    Attributes:
        owner: `[N]` int64, the block of each token of the picture in raster order.
        sizes: `[C]` int64, tokens of each block.
        order: `[L]` int64, the token at each place, of all: block by block.
        text: tokens of text.
        start: what the first token of the picture is among all.
        tile: what the rest is of.
        holds: `[C + 1, K]` float32, 1 where a tile of keys has tokens of a block.
        blocks: `[most, K]` int64, the blocks of each tile; what fills up has no tokens of it.
        bits: `[most, K, words]` int32, which tokens of a tile are of each of its blocks.
    """

    owner: torch.Tensor
    sizes: torch.Tensor
    order: torch.Tensor
    text: int
    start: int
    tile: Tile
    holds: torch.Tensor
    blocks: torch.Tensor
    bits: torch.Tensor


@lru_cache(maxsize=32)
def layout(
    device: torch.device, parts: TokenGrid, grid: TokenGrid, text: int, text_first: bool, tile: Tile
) -> Layout:
    """The blocks of a grid, on a device; copied there once."""
    with torch.inference_mode(False):
        found = partition(grid, parts)
        count, tokens = len(found.sizes), grid.tokens + text
        start = text if text_first else 0
        words = torch.arange(text) + (0 if text_first else grid.tokens)
        owner = torch.cat([found.owner[found.places], torch.full_like(words, count)])
        columns = tiles_of(tokens, tile.key)
        here = torch.zeros(count + 1, columns * tile.key, dtype=torch.bool)
        here[owner, torch.arange(tokens)] = True
        here = here.unflatten(1, (columns, tile.key))  # which tokens of a tile are of a block
        holds = here.any(-1)
        most = int(holds.sum(0).max())
        blocks = holds.to(torch.uint8).argsort(dim=0, descending=True, stable=True)[:most]
        own = bits.pack(here.gather(0, blocks[..., None].expand(-1, -1, tile.key)))
        return Layout(
            found.owner.to(device),
            found.sizes.to(device),
            torch.cat([found.places + start, words]).to(device),
            text,
            start,
            tile,
            holds.float().to(device),
            blocks.to(device),
            own.to(device),
        )


def planned(chosen: torch.Tensor, found: Layout, *, shared: bool) -> BlockPlan:
    """The plan in which queries attend to the blocks they have chosen, and to text.

    Keys stand block by block, queries of each head sorted by what they have chosen; text is last in
    both and attends to everything. Of each row the tiles that all its queries take whole are last.

    Args:
        chosen: `[B, H, N, C]` bool, of the picture in raster order.
        shared: whether a tile of queries attends to every tile that any of them has chosen from.
    """
    batch, heads, queries, _ = chosen.shape
    tile, tokens = found.tile, queries + found.text
    order = by_choice(chosen, found.order[:queries] - found.start)
    taken = chosen.gather(2, order[..., None].expand_as(chosen))
    # Text is one more block, which all take, and behind the picture queries that take all.
    taken = torch.nn.functional.pad(taken, (0, 1, 0, found.text), value=True)
    taken = torch.nn.functional.pad(taken, (0, 0, 0, -tokens % tile.query))
    taken = taken.unflatten(2, (-1, tile.query))  # [B, H, Q, tile.query, C + 1]
    takers = taken.sum(3)
    full = takers == tile_lengths(tokens, tile.query, chosen.device)[:, None]
    mask = (takers > 0).float() @ found.holds > 0
    split = mask & ((~full).float() @ found.holds > 0)
    plan = BlockPlan.from_mask(
        mask,
        tile=tile,
        queries=tokens,
        keys=tokens,
        order=torch.cat(
            [order + found.start, found.order[queries:].expand(batch, heads, -1)], dim=-1
        ),
        key_order=found.order,
        first=None if shared else split,
    )
    most = 0 if shared else int(split.sum(-1).max())
    if not most:
        return plan
    return replace(
        plan, within=of_groups(taken.mT, plan.indices[..., :most], found.blocks, found.bits)
    )


def union_of(share: float, count: int, tiles: float) -> float:
    """Share of the pairs that are in tiles of which any query has taken something; a guess.

    Within 0.09 of what was measured of rule top on `kinora-tiny`, for all kinds of layers and tiles
    of 128x64. With few blocks many queries take the same, large ones fill tiles.

    Args:
        share: of the pairs that queries have taken.
        count: blocks.
        tiles: of queries in a block.
    """
    return share ** (tiles / (tiles + min(4, count / 6)))
