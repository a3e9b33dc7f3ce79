"""`paro`'s measure of a head, and the counts of tiles that its authors' masks have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kinora.accel.attach.families import FAMILIES
from kinora.accel.calibration import Tally, always, places, tile_mass
from kinora.accel.grid import TokenGrid
from kinora.accel.site import Site
from kinora.kernels.plan import Tile, tile_lengths, tiles_of

GRID = TokenGrid(4, 8, 10)  # 320 tokens: whole tiles of 64 only
SITE = Site(GRID, layer=0, layers=1, step=0, steps=8)
TILES = [Tile(64, 64), Tile(128, 64), Tile(64, 128)]


def tensors(tokens: int, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, tokens, dim, generator=generator) for _ in "qk")
    return q, k


def measured(
    q: torch.Tensor, k: torch.Tensor, tile: Tile, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    every = torch.arange(q.shape[2])
    mass, peak = tile_mass(q, k, (every if order is None else order).expand(3, -1), every, tile)
    assert (mass > 0).all()
    return mass.flatten(0, 1), peak.flatten(0, 1)


def incoherence(q: torch.Tensor, k: torch.Tensor, site: Site, tile: Tile) -> torch.Tensor:
    """Of each head, in raster order."""
    tally = Tally(keep=0.3, tile=tile, balance=0, sample=1)
    tally.observe(q, k, site)
    return tally.incoherence[0][:, 0]


def alike(tokens: int, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k of which all tokens of a tile are the same, so that its attention is even."""
    found = zip(tensors(tokens), (tile.query, tile.key), strict=True)
    q, k = (x[:, :, torch.arange(tokens) // size * size] for x, size in found)
    return q, k


def weights_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


# --- scale ---


@pytest.mark.parametrize("order", ["FHW", "WFH"])
@pytest.mark.parametrize("share", [0.5, 0.01])
@pytest.mark.parametrize("tile", TILES)
def test_mass_and_peak_scale_with_attention_and_incoherence_stays(
    tile: Tile, share: float, order: str
):
    """A tile of keys behind the others takes all but `share` of each query's attention."""
    q, k = tensors(GRID.tokens)
    sink = k.new_zeros(2, 3, tile.key * 2, 8)
    # So many keys of a logit make up log(1 / share - 1) more than all others together.
    others = (q @ k.mT / math.sqrt(8)).logsumexp(-1)
    logit = others + math.log(1 / share - 1) - math.log(sink.shape[2])
    here = torch.cat([places(SITE, order), torch.arange(sink.shape[2]) + GRID.tokens])
    # One more dimension, which the others' keys have not; of the same scale 1 / sqrt(8) in all.
    stronger = math.sqrt(9 / 8)
    last = (logit * math.sqrt(8))[..., None]
    q_more = torch.cat([torch.cat([q, last], -1), q.new_zeros(2, 3, sink.shape[2], 9)], 2)
    k_more = torch.nn.functional.pad(k, (0, 1))
    k_more = torch.cat([k_more, torch.nn.functional.pad(sink, (0, 1), value=1)], 2)
    mass, peak = measured(q, k, tile, places(SITE, order))
    less, lower = measured(q_more * stronger, k_more, tile, here)
    rows, columns = GRID.tokens // tile.query, GRID.tokens // tile.key
    assert rows >= 2 and columns >= 2 and less.shape[2] > columns
    part = slice(None), slice(rows), slice(columns)
    torch.testing.assert_close(less[part], share * mass[part], rtol=1e-5, atol=0)
    torch.testing.assert_close(lower[part], share * peak[part], rtol=1e-5, atol=0)
    torch.testing.assert_close((lower / less)[part], (peak / mass)[part], rtol=1e-5, atol=0)
    assert (peak / mass > 1.5).any()  # or the ratio would say nothing


@pytest.mark.parametrize("times", [2, 3])
def test_the_measure_of_a_head_stays_where_all_attention_is_a_share_of_what_it_was(times: int):
    """Each token comes `times` times and tiles are as much larger: so is each weight smaller."""
    q, k = tensors(GRID.tokens)
    wide = Site(TokenGrid(4, 8, 10 * times), layer=0, layers=1, step=0, steps=8)
    many_q, many_k = (x.repeat_interleave(times, 2) for x in (q, k))
    found = incoherence(many_q, many_k, wide, Tile(64 * times, 64 * times))
    expected = incoherence(q, k, SITE, Tile(64, 64))
    assert (expected > 1.5).all() and expected.unique().numel() == 3
    torch.testing.assert_close(found, expected)


# --- 1 ---


@pytest.mark.parametrize("tile", TILES)
def test_incoherence_is_1_where_attention_is_even_in_each_tile(tile: Tile):
    q, k = alike(GRID.tokens, tile)
    mass, _ = measured(q, k, tile)
    assert mass.amax() > 2 * mass.amin()  # even in each, not everywhere
    torch.testing.assert_close(incoherence(q, k, SITE, tile), torch.ones(3))


def test_the_measure_of_a_batch_is_the_mean_of_its_items():
    """Whatever the attention of one item weighs beside that of another in a tile."""
    q, k = tensors(GRID.tokens)
    q[0] *= 5
    tile = Tile(64, 64)
    alone = torch.stack([incoherence(q[i : i + 1], k[i : i + 1], SITE, tile) for i in range(2)])
    assert (alone[0] > 2 * alone[1]).all()
    torch.testing.assert_close(incoherence(q, k, SITE, tile), alone.mean(0))


def test_tiles_of_which_no_query_was_looked_at_say_nothing():
    """A quarter of 1,025 queries leaves out the one of the last tile in some orders."""
    grid = TokenGrid(4, 16, 16)
    site = Site(grid, layer=0, layers=1, step=0, steps=8, text=1)
    tally = Tally(keep=0.3, tile=Tile(128, 64), balance=0)
    looked = tally._queries(site)  # pyright: ignore[reportPrivateUsage]
    assert not (looked >= 1024).any()
    even = torch.zeros(1, 2, site.tokens, 4)
    tally.observe(even, even, site)
    torch.testing.assert_close(tally.incoherence[0], torch.ones(2, 2))


@pytest.mark.parametrize("whose", ["query", "key"])
@pytest.mark.parametrize("tile", TILES)
def test_incoherence_is_1_nowhere_else(tile: Tile, whose: str):
    """One token that is unlike the rest of its tile makes that row, or column, uneven."""
    q, k = (x[:1] for x in alike(GRID.tokens, tile))
    (q if whose == "query" else k)[:, :, 100] *= -1
    mass, peak = measured(q, k, tile)
    expected = torch.ones_like(mass)
    for i, rows in enumerate(weights_of(q, k).split(tile.query, 2)):
        for j, block in enumerate(rows.split(tile.key, 3)):
            expected[:, i, j] = (block.amax((2, 3)) / block.mean((2, 3)))[0]
    uneven = expected > 1 + 1e-5
    here = torch.zeros_like(uneven)
    if whose == "query":
        here[:, 100 // tile.query] = True
    else:
        here[:, :, 100 // tile.key] = True
    assert not uneven[~here].any() and uneven.any(2).any(1).all()
    torch.testing.assert_close(peak / mass, expected, rtol=1e-5, atol=0)
    found = incoherence(q, k, SITE, tile)
    torch.testing.assert_close(found, expected.mean((1, 2)), rtol=1e-5, atol=0)
    assert (found > 1.01).all()


@pytest.mark.parametrize("tile", TILES)
def test_incoherence_is_never_below_1(tile: Tile):
    for grid in (GRID, TokenGrid(3, 7, 9)):
        q, k = tensors(grid.tokens)
        site = Site(grid, layer=0, layers=1, step=0, steps=8)
        for size in (0, 0.3, 3):
            assert (incoherence(size * q, k, site, tile) >= 1 - 1e-5).all()


# --- counts ---

COGVIDEOX: dict[str, Any] = {"patch_size": 2, "patch_size_t": None}
WAN: dict[str, Any] = {"patch_size": (1, 2, 2)}


@pytest.mark.parametrize(
    ("denoiser", "config", "latents", "text", "tiles"),
    [
        ("CogVideoXTransformer3DModel", COGVIDEOX, (1, 13, 16, 60, 90), 226, 278),
        ("WanTransformer3DModel", WAN, (1, 16, 21, 90, 160), 0, 1182),
    ],
    ids=["cogvideox-5b", "wan-14b-720p"],
)
def test_real_models_have_as_many_tiles_as_the_authors_masks(
    denoiser: str, config: dict[str, Any], latents: tuple[int, ...], text: int, tiles: int
):
    """Masks of 278 x 278 and 1182 x 1182 tiles of 64; in ours of 128 half as many rows."""
    family = FAMILIES[denoiser]
    grid = family.grid(config, {"hidden_states": torch.empty(latents, device="meta")})
    tokens = grid.tokens + text
    assert tiles_of(tokens, 64) == tiles and tokens % 64  # the last one is ragged
    assert len(tile_lengths(tokens, 64)) == tiles and tile_lengths(tokens, 64).sum() == tokens
    kept = always(tokens, text, family.text_first, Tile(64, 64))
    assert kept.shape == (tiles, tiles)
    # The authors pad masks of the picture by the tiles that text reaches, or keep the last one.
    whole = [*range(tiles_of(text, 64)), tiles - 1]
    assert kept.all(1).nonzero()[:, 0].tolist() == kept.all(0).nonzero()[:, 0].tolist() == whole
    assert tiles - tiles_of(text, 64) == {226: 274, 0: 1182}[text]
    wide = always(tokens, text, family.text_first, Tile(128, 64))
    assert wide.shape == (tiles // 2, tiles)
