"""`kv-merge`: keys of neighbours that are alike become one, and so do their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch

from ...kernels.merging import KeyMerge
from ..errors import RecipeError
from ..grid import TokenGrid
from ..method import AttentionMethod
from ..options import option
from ..site import Site


class KvMerge(AttentionMethod):
    """The keys and values of neighbours whose keys are most alike become one, their mean.

    Experimental. The picture is cut into cells of the grid, frames by height by width, smaller at
    its borders. In each head the keys that are most like the one in the middle of their cell join
    it (the first of those in the middle), until `keep` of all are left; the others keep one of
    their own. A merged key weighs as many tokens as it stands for, so that identical tokens lose
    nothing. Queries are untouched: all tokens get an output. Text never joins. Positions are in the
    keys already, so that a mean is of neighbouring positions too.

    It is computed by torch's own attention, in the precision of the input, to fewer keys; density
    is the share of the keys that are left.

    Source: merging by likeness to one token of each cell, ToMe for SD (arXiv 2303.17604), weighed
    by size as in ToMe (arXiv 2210.09461).
    Differs from them: keys and values alone are merged, behind norms and rotary embedding, so that
    nothing has to be undone; within cells, not over the whole picture, which would cost as much as
    attention does; by the keys, not by the input of the block; deterministic; in space and time.
    """

    name: ClassVar[str] = "kv-merge"
    paper: ClassVar[str] = "arXiv 2303.17604, 2210.09461"
    licence: ClassVar[str] = "tomesd is MIT; ToMe is CC-BY-NC-4.0"
    use_when: ClassVar[str] = (
        "merging itself is to be tried out; it is experimental. At the same density, and on a CPU "
        "in the same time, `top-blocks` errs less on `kinora-tiny`; on an H200 a "
        "quarter of the keys is 1.0 to 3.4 times as fast as dense, a fifth of the tiles by "
        "`top-blocks` 4.0 to 5.6 times."
    )
    quantises: ClassVar[bool] = False

    keep: float = option(
        0.5, "Share of the picture's keys that are left; each cell keeps one", above=0, most=1
    )
    cell: Literal["1x2x2", "2x2x2", "1x3x3", "2x4x4"] = option(
        "1x2x2", "Frames by height by width within which keys may become one"
    )
    likeness: Literal["cosine", "distance"] = option(
        "distance", "Of two keys: the angle between them, or how far they are apart"
    )
    heads: Literal["own", "shared"] = option(
        "own", "Whether each head chooses for itself, or all choose together"
    )

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        keep = values.get("keep", cls.model_fields["keep"].default)
        cell = values.get("cell", cls.model_fields["cell"].default)
        least = 1 / math.prod(sides_of(cell))
        if keep < least - 1e-6:
            raise RecipeError(
                f"attention.keep {keep:g} is less than one key of each cell of {cell}, "
                f"{least:.4g}: keep more, or take a larger attention.cell"
            )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> KeyMerge | None:
        """See `AttentionMethod`."""
        del q
        merged = self.merges(site)
        return self.with_likeness(self.scores(k.detach(), site), site) if merged else None

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return 1 - self.merges(site) / site.tokens

    def tiling(self) -> None:
        """See `AttentionMethod`."""

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        return f"because keep {self.keep:g} in cells of {self.cell} is all of {site.grid} keys"

    def merges(self, site: Site) -> int:
        """Keys of the picture that join another one there."""
        picture = site.grid.tokens
        asked = math.ceil(round(self.keep * picture, 6))
        return picture - max(asked, len(cells_of(site.grid, self.cell)))

    def scores(self, k: torch.Tensor, site: Site) -> torch.Tensor:
        """How like the first of its cell each other key is, `[B, H, C, width - 1]` float32.

        Args:
            k: `[B, H, L, D]`.
        """
        cells = self._cells(site, k.device)
        wide = torch.promote_types(k.dtype, torch.float32)
        first = k[:, :, cells[:, 0]].to(wide)
        found: list[torch.Tensor] = []
        for other in cells.T[1:]:
            x = k[:, :, other].to(wide)
            if self.likeness == "distance":
                found.append(-(x - first).square().sum(-1))
            else:
                found.append(torch.nn.functional.cosine_similarity(x, first, dim=-1))
        scores = torch.stack(found, dim=-1)
        return scores if self.heads == "own" else scores.mean(1, keepdim=True)

    def with_likeness(self, scores: torch.Tensor, site: Site) -> KeyMerge:
        """The merge of those with the largest scores, of equal ones the first; see `scores`."""
        cells = self._cells(site, scores.device)
        merged, others = self.merges(site), site.grid.tokens - len(cells)
        # What fills up a cell repeats its first. What is no number joins last.
        filler = cells[:, 1:] == cells[:, :1]
        least = torch.finfo(scores.dtype).min
        ranks = scores.nan_to_num(least, -least, least).masked_fill(filler, -torch.inf)
        best = ranks.flatten(2).argsort(dim=-1, descending=True, stable=True)
        joins = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best[..., :merged], True)
        alone = cells[:, 1:].flatten()[best[..., merged:others]].sort(-1).values
        text = torch.arange(site.text, device=scores.device)
        text = text if site.text_first else text + site.grid.tokens
        return KeyMerge(
            cells=cells,
            joins=joins.view_as(scores),
            alone=torch.cat([alone, text.expand(*alone.shape[:2], -1)], dim=-1),
            keys=site.tokens,
        )

    def _cells(self, site: Site, device: torch.device) -> torch.Tensor:
        return _on(device, site.grid, self.cell, site.text if site.text_first else 0)


def sides_of(cell: str) -> tuple[int, int, int]:
    """Frames, height and width of a cell that an option names, as in `1x2x2`."""
    frames, height, width = map(int, cell.split("x"))
    return frames, height, width


@lru_cache(maxsize=64)
def cells_of(grid: TokenGrid, cell: str) -> torch.Tensor:
    """Tokens of each cell, `[C, width]` int64, the one nearest to its middle first.

    Cells at the borders have fewer and are filled up with their first.
    """
    with torch.inference_mode(False):
        sides = torch.tensor(sides_of(cell))
        shape = torch.tensor((grid.frames, grid.height, grid.width))
        axes = [torch.arange(it) for it in shape.tolist()]
        places = torch.cartesian_prod(*axes)
        corner = places // sides * sides
        # Twice the distance, to stay in whole numbers.
        twice = 2 * places - corner - (torch.minimum(corner + sides, shape) - 1)
        order = twice.square().sum(-1).argsort(stable=True)
        counts = -(-shape // sides)
        number = corner // sides @ torch.tensor((int(counts[1] * counts[2]), int(counts[2]), 1))
        order = order[number[order].argsort(stable=True)]
        cells, sizes = number[order].unique_consecutive(return_counts=True)
        start = sizes.cumsum(0) - sizes
        slot = torch.arange(int(sizes.max())).expand(len(cells), -1)
        return order[start[:, None] + torch.where(slot < sizes[:, None], slot, 0)]


@lru_cache(maxsize=16)
def _on(device: torch.device, grid: TokenGrid, cell: str, first: int) -> torch.Tensor:
    """The same on a device, copied there once, of tokens of which the picture's begin at `first`"""
    with torch.inference_mode(False):
        return (cells_of(grid, cell) + first).to(device)
