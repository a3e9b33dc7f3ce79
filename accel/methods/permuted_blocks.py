"""`permuted-blocks`: keys sorted by how much they are attended to, then the best tiles of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from ...kernels.lists import mass_tiles, tile_means, top_tiles, widest
from ...kernels.plan import BlockPlan, tiles_of
from ...kernels.scores import mean_attention
from ..options import option
from ..site import Site
from ..spans import At, Spans
from ..tiles import (
    TileMethod,
    kept_of,
    likely_share,
    tile_of,
    token_order,
)


class PermutedBlocks(TileMethod):
    """Keys that are attended to most come first, so that few tiles hold them; the best are kept.

    The keys of each head are permuted anew at each call: of `samples` queries the attention to
    every key is computed, and within each segment the keys are sorted by its mean, largest first.
    Only then keys are cut into tiles; queries stay in `order`. Of each row the tiles whose mean has
    the largest product with the row's are kept: the share `keep`, or as many of these as hold
    `mass` of the softmax over all tiles. Text keys stay together and are always kept, and queries
    of text attend to everything.

    A segment is a run of tokens in `order`, the tokens of a frame, or the whole clip. Long segments
    gather what all queries want and scatter neighbours, short ones the other way round. Of runs, a
    row's own are always kept.

    It costs, for each head, `samples` / L of dense attention's first product, a softmax over those
    rows, a sort of L numbers, and one more reading of the keys; a plan holds an order of all keys
    for each head, 8 L bytes.

    Source: PBS-Attn (arXiv 2510.21270), in a bidirectional form. With a causal mask keys may only
    move within segments, behind which queries see all of them, and the last queries judge, since
    only they see all keys. Without one any permutation is exact: segments are a choice of how far
    keys move, and queries from all over the clip judge.
    Differs from the paper: the above; tokens are in `order` first, and ties keep it; a tile weighs
    as many keys as it has; no first tile is kept for its own sake. The paper's choice of tiles is
    `keep = 1, mass = 0.9`; by default a share is kept, so that the density is known before.
    """

    name: ClassVar[str] = "permuted-blocks"
    paper: ClassVar[str] = "arXiv 2510.21270"
    licence: ClassVar[str] = "no licence file was found in the repository"
    use_when: ClassVar[str] = (
        "many queries want the same few keys that lie scattered over the clip; where attention is "
        "local, methods that keep neighbours in a tile choose better."
    )

    keep: float = option(
        0.4, "Share of the key tiles that each query tile keeps at most", above=0, most=1
    )
    mass: float = option(
        1.0,
        "Share of a row's softmax over tile means at which it stops before that; 1 never does",
        above=0,
        most=1,
    )
    segment: Literal["256", "512", "1024", "frame", "clip"] = option(
        "256", "Within what keys are sorted: so many tokens of the order, a frame, or the clip"
    )
    samples: int = option(
        128, "Queries whose attention sorts the keys", least=1, most=4096, unit="queries"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        if self._whole(site):
            return None
        q, k, tile = q.detach(), k.detach(), tile_of(self.tile)
        fixed = _on(q.device, self.samples, self.segment, self.at(site))
        tokens, columns = site.tokens, tiles_of(site.tokens, tile.key)
        kept, scale = kept_of(self.keep, columns), q.shape[-1] ** -0.5
        key_order = hottest_first(mean_attention(q[:, :, fixed.queries], k, scale), fixed)
        means = tile_means(q, tile.query, fixed.places), tile_means(k, tile.key, key_order)
        width = max(kept, fixed.longest)
        if self.mass < 1:
            last = (tokens - (columns - 1) * tile.key) / tile.key
            indices, counts = mass_tiles(
                *means, self.mass, scale, fixed.always, kept, last=last, width=width
            )
        else:
            indices, counts = top_tiles(*means, kept, fixed.always, width=width)
        return BlockPlan(
            indices=indices,
            counts=counts,
            tile=tile,
            queries=tokens,
            keys=tokens,
            tail=self.tail,
            order=fixed.places,
            key_order=key_order,
        )

    def orders(self, heads: int) -> int:
        """See `AttentionMethod`; of keys."""
        return heads

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`; with a `mass` an estimate, see `likely_share`."""
        if self._whole(site):
            return 1.0
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        kept = kept_of(self.keep, columns)
        if self.mass < 1:
            # Not all, which would keep every call dense, where most of them may keep less.
            kept = min(kept, kept_of(likely_share(self.mass), columns), columns - 1)
        return _spans(self.segment, self.at(site)).density(kept)

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        if self.forces_all(site):
            return self.why_forced(site, "of the row's own segment")
        return f"because keep {self.keep:g} is all of {columns} tiles"

    def forces_all(self, site: Site) -> bool:
        """See `TileMethod`."""
        return _spans(self.segment, self.at(site)).forces_all()

    def _whole(self, site: Site) -> bool:
        """Whether everything is kept, whatever the numbers are."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        all_kept = kept_of(self.keep, columns) == columns
        return self.forces_all(site) or (all_kept and (self.mass == 1 or columns == 1))


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """What of a plan depends on no numbers.

    Attributes:
        places: `[L]` int64, the token at each place of the order.
        segments: `[segments, most]` int64, the tokens of each in that order, then some token.
        missing: like it, bool, where it has no more tokens.
        there: `[L]` int64, where it has some, of both axes flat.
        queries: `[samples]` int64, tokens of the picture, from all over it.
        always: `[Q, K]` bool, tiles that are kept whatever the scores, or None if there are none.
        longest: the most of these in a row.
    """

    places: torch.Tensor
    segments: torch.Tensor
    missing: torch.Tensor
    there: torch.Tensor
    queries: torch.Tensor
    always: torch.Tensor | None
    longest: int


def hottest_first(weights: torch.Tensor, fixed: Fixed) -> torch.Tensor:
    """Keys by segment and, in each, by falling weight; of equal ones the first in the order first.

    Args:
        weights: `[B, H, L]`, none below 0, of keys as they come.

    Returns:
        `[B, H, L]` int64, a permutation for each head, whatever the weights are: those that are no
        number come first.
    """
    ranks = weights[..., fixed.segments].masked_fill(fixed.missing, -1)
    best = ranks.argsort(dim=-1, descending=True, stable=True)
    tokens = fixed.segments.expand_as(best).gather(-1, best)
    return tokens.flatten(-2)[..., fixed.there]


@lru_cache(maxsize=16)
def _on(device: torch.device, samples: int, segment: str, at: At) -> Fixed:
    """All that stays the same, on a device; copied there once."""
    # Kept for later runs, which may not be in inference mode.
    with torch.inference_mode(False):
        grid, places = at.grid, token_order(*at[1:]).places
        if segment == "frame":
            before = at.text if at.text_first else 0
            segments = (places - before) // (grid.height * grid.width)
        else:
            segments = torch.arange(at.tokens) // (_run(segment) or at.tokens)
        if at.first_frame:
            # It stays together, before all others.
            segments = segments + 1
            segments[at.frame.start : at.frame.stop] = 0
        # Text stays at its end of the sequence.
        segments[at.words.start : at.words.stop] = -1 if at.text_first else at.tokens + 1
        curve = token_order("gilbert", grid, at.text, at.text_first).places
        curve = curve[at.text :] if at.text_first else curve[: grid.tokens]
        # One drawn of each of equal stretches: even steps can meet the same frames again and again.
        count = min(samples, grid.tokens)
        cuts = torch.arange(count + 1) * grid.tokens // count
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        queries = curve[cuts[:-1] + (drawn * cuts.diff()).long()]
        always = _always(segment, at)
        lengths = segments.unique(return_counts=True)[1]
        missing = torch.arange(int(lengths.max())) >= lengths[:, None]
        tokens = torch.zeros(missing.shape, dtype=torch.int64)
        tokens[~missing] = places[segments.argsort(stable=True)]
        return Fixed(
            places=places.to(device),
            segments=tokens.to(device),
            missing=missing.to(device),
            there=missing.logical_not().flatten().nonzero()[:, 0].to(device),
            queries=queries.to(device),
            always=always.to(device) if bool(always.any()) else None,
            longest=widest(always, 0),
        )


def _run(segment: str) -> int | None:
    """Tokens of a segment, where it is a run of the order."""
    return int(segment) if segment.isdecimal() else None


def _spans(segment: str, at: At) -> Spans:
    """A row's own segments, where these are runs, and what is kept everywhere.

    The same in every order, since text stays at its end and the first frame before all others.
    """
    return replace(Spans.of(at), run=_run(segment) or 0)


def _always(segment: str, at: At) -> torch.Tensor:
    """`_spans` as tiles, `[Q, K]` bool."""
    spans, tile = _spans(segment, at), at.tile
    rows, columns = (torch.arange(tiles_of(at.tokens, size)) for size in (tile.query, tile.key))
    kept = spans.holds(rows[:, None], columns)
    kept[spans.whole_rows().start : spans.whole_rows().stop] = True
    return kept
