"""Means of tiles, and lists of some of them, as the tests of `lists` compare them."""

from __future__ import annotations

import torch

from kinora.kernels.lists_launch import Backend
from kinora.kernels.plan import BlockPlan, Tile

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
Lists = tuple[torch.Tensor, torch.Tensor]


def means_of(rows: int, columns: int, dim: int = 20, *, whole: bool = True) -> Lists:
    """Means of two heads; `whole`: small whole numbers, whose scores are exact and often equal."""
    generator = torch.Generator().manual_seed(rows + columns)

    def made(tiles: int) -> torch.Tensor:
        if whole:
            return torch.randint(-2, 3, (1, 2, tiles, dim), generator=generator).float()
        return torch.randn(1, 2, tiles, dim, generator=generator)

    return made(rows), made(columns)


def forced_of(rows: int, columns: int) -> torch.Tensor:
    """A fifth of the tiles, of the first row all, of the last none."""
    forced = torch.rand(rows, columns, generator=torch.Generator().manual_seed(5)) < 0.2
    forced[0], forced[-1] = True, False
    return forced


def same(first: Lists, second: Lists) -> None:
    assert torch.equal(first[1], second[1]) and torch.equal(first[0], second[0])


def mask_of(made: Lists, columns: int) -> torch.Tensor:
    rows = made[0].shape[2]
    return BlockPlan(*made, tile=Tile(1, 1), queries=rows, keys=columns).mask()
