"""`blade`: tiles of keys that hold most of the attention of a few tokens drawn from each tile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator

from ...kernels.plan import BlockPlan, Tail, Tile, tile_lengths, tiles_of
from ...kernels.scores import heaviest_tiles, tile_scores
from ..errors import RecipeError
from ..options import option
from ..site import Site
from ..tiles import Layout, TileMethod, density_of, longest, tile_of


class Blade(TileMethod):
    """Each tile of queries keeps the fewest tiles of keys that reach `mass` of its sampled scores.

    Of each tile `samples` tokens are drawn, at places that are the same in all tiles of a head and
    differ between heads, queries and keys. A pair of tiles scores the largest weight that a sampled
    query gives to a sampled key, where the best key of that query weighs 1; scores of a row then
    sum to 1. The best tiles are kept until their scores reach `mass`, between `keep_least` and
    `keep` of all tiles. The tile itself and text are taken first and count as kept, and
    queries of text attend to everything. The same seed, layer and step draw the same places.

    With `tail = "complement"`, the global branch, every tile left out is one more key and value,
    its mean, in the same softmax. `tail = "double"` is the authors' global branch: means of every
    `pool` tokens, of those in kept tiles too, which so count twice; for weights trained with it.

    Source: ASA and ASA_G of Video-BLADE (arXiv 2508.10774), without its training.
    Differs from the paper: nothing is forced there on models without text beside the picture; means
    are of tiles and stand only for tiles that are left out, but with `double`; where all tiles are
    kept it is dense attention, with `double` too. Differs from the authors' code: it stops one tile
    short of `mass`, where the paper and this one reach it; it draws from the global generator, pads
    the last tile and the last mean with copies of its last token, and puts text behind the picture.
    """

    name: ClassVar[str] = "blade"
    paper: ClassVar[str] = "arXiv 2508.10774"
    licence: ClassVar[str] = (
        "the repository has no licence file; only trained weights, which are not used, are "
        "Apache-2.0"
    )
    use_when: ClassVar[str] = (
        "quality comes first: of what was measured on `kinora-tiny` it errs least at every "
        "density, and no other keeps as many videos correct with as few tiles. Choosing takes more "
        "time than from means."
    )

    keep: float = option(
        0.25, "Share of the key tiles that each query tile keeps at most", above=0, most=1
    )
    keep_least: float = option(
        0.05, "Share of the key tiles that each query tile keeps at least", least=0, most=1
    )
    mass: float = option(
        0.95, "Share of a row's scores that the tiles it keeps reach", above=0, most=1
    )
    samples: int = option(
        16,
        "Tokens drawn from each tile to score it, all of them where it has no more",
        least=1,
        most=256,
        unit="tokens",
    )
    tail: Literal["none", "complement", "double"] = option(  # pyright: ignore[reportIncompatibleVariableOverride] # one more than others
        "complement",
        "What stands for the tiles that are left out: nothing, their means, or means of everything",
    )
    pool: int = option(30, "Of tail double: tokens of a mean", least=1, most=1024, unit="tokens")

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `AttentionMethod`."""
        least, most = (
            values.get(it, cls.model_fields[it].default) for it in ("keep_least", "keep")
        )
        if least > most:
            raise RecipeError(
                f"attention.keep_least {least:g} must not be above attention.keep {most:g}: "
                f"lower the one or raise the other"
            )

    @model_validator(mode="after")
    def _checked(self) -> Blade:
        self.check_options(self.model_dump())
        return self

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        return None if self._whole(site) else self.sparse(q, k, site)

    def sparse(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan:
        """The plan, also where it keeps everything."""
        layout = self.layout(site, q.device)
        least, most = self._bounds(site)
        indices, counts = heaviest_tiles(
            scores(q.detach(), k.detach(), site, layout, self.samples).float(),
            self.mass, layout.always,
            least=least, most=most, width=max(most, longest(self.at(site))),
        )  # fmt: skip
        found = self.listed(indices, counts, site, layout)
        return replace(found, means=self.pool) if self.tail == "double" else found

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`; means of everything are no tail of a plan."""
        return tile_of(self.tile), "none" if self.tail == "double" else self.tail

    def beside(self) -> float:
        """See `AttentionMethod`."""
        return 1 / self.pool if self.tail == "double" else 0.0

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`; an estimate, for scores that are all alike.

        Of peaked scores fewer tiles reach `mass`, of none more, but for forced tiles of low score
        and ragged ones. Where `keep` is a small share the estimate nearly always holds.
        """
        if self._whole(site):
            return 1.0
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        least, most = self._bounds(site)
        kept = most
        if self.mass < 1:
            even = math.ceil(round(self.mass * columns, 6))
            # Not 1, which would keep every call dense, where most of them may keep less.
            kept = max(least, min(most, even, columns - 1), 1)
        return density_of(kept / columns, self.at(site))

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        if self.forces_all(site):
            return self.why_forced(site)
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        return f"because all of {columns} tiles are kept"

    def _bounds(self, site: Site) -> tuple[int, int]:
        """The fewest and the most tiles of a row; rounded down, as in the paper, but at least 1."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        least, most = (
            max(1, math.floor(round(share * columns, 6))) for share in (self.keep_least, self.keep)
        )
        return least, most

    def _whole(self, site: Site) -> bool:
        """Whether everything is kept, whatever the scores are."""
        least, most = self._bounds(site)
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        return self.forces_all(site) or (most == columns and (self.mass == 1 or least == columns))


def scores(
    q: torch.Tensor, k: torch.Tensor, site: Site, layout: Layout, samples: int
) -> torch.Tensor:
    """How much a sampled query of a tile attends to a sampled key of another, `[B, H, Q, K]`.

    Of each sampled query r, R(r, j) is the largest logit of the sampled keys in tile j; the score
    of I and j is the largest R(r, j) - max over j of R(r, j) of the sampled queries r in I: the
    logarithm of the paper's, but for what all of a row have in common. In float32, or float64 for
    tensors of that.

    Args:
        q, k: `[B, H, L, D]` as they come.
    """
    layouts = ((q, layout.tile.query), (k, layout.tile.key))
    queries, keys = (
        sampled(x, layout.places, size, samples, seed_of(site) + of)
        for of, (x, size) in enumerate(layouts)
    )
    sizes = queries.shape[3], keys.shape[3]
    queries, keys = queries.flatten(2, 3), keys.flatten(2, 3)
    return tile_scores(queries, keys, sizes, "largest", q.shape[-1] ** -0.5)


def sampled(
    x: torch.Tensor, places: torch.Tensor, size: int, samples: int, seed: int
) -> torch.Tensor:
    """Tokens at places drawn for each head, `[B, H, tiles, samples, D]`, fewer if `size` is.

    What lies behind the end of a last, ragged tile is counted again from its beginning.
    """
    batch, heads, tokens, _ = x.shape
    shape = batch, heads, min(size, tokens)
    drawn = draws(shape, seed, x.device).argsort(dim=-1, stable=True)[..., None, :samples]
    lengths = tile_lengths(tokens, size, x.device)[:, None]
    start = torch.arange(len(lengths), device=x.device)[:, None] * size
    token = places[start + drawn % lengths]
    index = token.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, index).unflatten(2, token.shape[2:])


def draws(shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """Whole numbers at random, int64: the same for a seed on every device, none waited for.

    Numbers of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014), whose shifts to the right here bring the sign along.
    """
    x = torch.arange(1, math.prod(shape) + 1, device=device) * -0x61C8864680B583EB + seed
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)).view(shape)


def seed_of(site: Site) -> int:
    """One even number for each seed, layer and step."""
    return 2 * ((site.seed * 1_000_003 + site.layer) * 1_000_003 + site.step) % 2**62
