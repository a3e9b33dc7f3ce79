"""Calibrations of `paro` of random queries and keys, for its tests."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch

from kinora.accel.calibration import Calibration, Tally, observed_steps
from kinora.accel.grid import TokenGrid
from kinora.accel.site import Site
from kinora.kernels.plan import Tile

GRID = TokenGrid(4, 6, 7)  # 168 tokens: ragged
SITE = Site(GRID, layer=0, layers=1, step=0, steps=8)
TILES = [Tile(64, 64), Tile(128, 64), Tile(128, 128), Tile(256, 128)]


def tensors(site: Site, heads: int = 3, dim: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, site.tokens, dim, generator=generator) for _ in range(3)]


def calibrated(
    site: Site, keep: float, heads: int = 3, balance: float = 0.5, tile: Tile = TILES[0]
) -> Calibration:
    tally = Tally(keep=keep, tile=tile, balance=balance, sample=1)
    for layer, step in itertools.product(range(site.layers), observed_steps(site.steps)):
        q, k, _ = tensors(site, heads, seed=10 * layer + step)
        tally.observe(q, k, dataclasses.replace(site, layer=layer, step=step))
    return tally.finish("tiny", site)


def saved(calibration: Calibration, folder: Path) -> str:
    path = folder / "paro.npz"
    path.write_bytes(calibration.to_bytes())
    return str(path)
