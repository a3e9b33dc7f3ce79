"""Predicts what an acceleration gains, from shapes and measured efficiencies.

The composition rule: with a share `a` of a denoiser call spent in self-attention and attention
at `rho` of its dense time, a call takes (1 - a) + a rho of its dense time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.backends import choose, efficiency, workspace
from ..kernels.plan import Tail, Tile, tiles_of
from ..kernels.precision import INPUT, Precision
from ..kernels.problem import Problem
from .grid import TokenGrid
from .method import AttentionMethod
from .site import Site


@dataclass(frozen=True, slots=True)
class Shape:
    """A denoiser, as its cost sees it.

    `width` of the tokens, `middle` width of the feed-forward, `text` tokens beside those of the
    picture in self-attention.
    """

    layers: int
    heads: int
    head_dim: int
    middle: int
    text: int
    text_first: bool
    cross_attention: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def attention_share(self, tokens: int) -> float:
        """Share of the multiplications of a call that self-attention does.

        Per token and layer: attention 4 L d, projections 8 d² (with cross-attention 12 d², its text
        being short), feed-forward 4 d m.
        """
        projections = (12 if self.cross_attention else 8) * self.width
        return tokens / (tokens + projections / 4 + self.middle)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What attention by a method is expected to do in a run.

    Attributes:
        share: of a denoiser call that self-attention takes when dense.
        density: executed, over all layers and steps; dense calls count as 1.
        speedup: of the denoising; the text encoder and decoding are not in it.
        precision: of the calls that are not dense, "" where it is the input's.
        dense: why calls that the method wanted sparse will run dense, if some will.
        why_dense: why the method itself keeps calls dense, each reason once.
        workspace: bytes that the kernel needs beside its inputs and output, and those of the plans
            that are kept between steps; 0 where all is dense.
    """

    share: float
    density: float
    speedup: float
    kernel: str
    precision: str
    dense: str | None
    why_dense: str
    workspace: int


def predict(
    method: AttentionMethod,
    shape: Shape,
    grid: TokenGrid,
    *,
    device: str,
    dtype: torch.dtype,
    steps: int,
    always: bool,
    batch: int = 2,
) -> Prediction:
    """What `method` is expected to gain on a denoiser of `shape` in `steps` steps.

    `batch` of a call: with guidance, two in all pipelines that do not call twice.
    """
    tokens = grid.tokens + shape.text
    size = (batch, shape.heads, tokens, shape.head_dim)
    problem = problem_of(method.tiling(), device, dtype, size, precision=method.precision())
    kernel = choose(problem)
    densities: list[float] = []
    ratios: list[float] = []
    dense, own = None, dict[str, None]()
    for step in range(steps):
        for layer in range(shape.layers):
            site = Site(
                grid,
                layer,
                shape.layers,
                step,
                steps,
                text=shape.text,
                text_first=shape.text_first,
            )
            density = method.predict(site)
            if density >= 1:
                own[method.why_dense(site)] = None
            reason = None if always or density >= 1 else slower(problem, density, method.beside())
            if reason:
                dense, density = reason, 1.0
            densities.append(density)
            pairs = density + method.beside()
            ratios.append(pairs / efficiency(problem, kernel) if density < 1 else 1.0)
    share, rho = shape.attention_share(tokens), sum(ratios) / len(ratios)
    needed, sparse = 0, [density for density in densities if density < 1]
    if sparse:
        # Of text every tile of keys is listed, and all lists are as long as the longest.
        one = plan_bytes(problem, 1.0 if shape.text else max(sparse))
        needed = workspace(problem, kernel) + shape.layers * method.kept_plans(batch) * one
        if method.beside():  # a second output, and both once more while they are merged
            needed += 3 * problem.tensor_bytes(tokens)
    return Prediction(
        share=share,
        density=sum(densities) / len(densities),
        speedup=1 / ((1 - share) + share * rho),
        kernel=kernel,
        precision="" if problem.precision == INPUT else str(problem.precision),
        dense=dense,
        why_dense="; ".join(own),
        workspace=needed,
    )


def problem_of(
    tiling: tuple[Tile, Tail],
    device: str,
    dtype: torch.dtype,
    size: Sequence[int],
    *,
    precision: Precision = INPUT,
    requires_grad: bool = False,
) -> Problem:
    """Self-attention over tensors of `size` `[B, H, L, D]` by plans of `tiling`."""
    (batch, heads, tokens, head_dim), (tile, tail) = size, tiling
    return Problem(
        device=torch.device(device).type,
        dtype=dtype,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        queries=tokens,
        keys=tokens,
        tile=tile,
        tail=tail,
        biased=False,
        requires_grad=requires_grad,
        precision=precision,
    )


def plan_bytes(problem: Problem, share: float) -> int:
    """Bytes of the lists of one item of a batch, where the longest holds `share` of the tiles."""
    rows = tiles_of(problem.queries, problem.tile.query)
    width = math.ceil(round(share * tiles_of(problem.keys, problem.tile.key), 6))
    return 4 * problem.heads * rows * (width + 1)


def slower(problem: Problem, density: float, beside: float = 0.0) -> str | None:
    """Why attention at `density` is predicted to lose, in words that follow "dense …", or None.

    `beside`: see `AttentionMethod`.
    """
    kernel = choose(problem)
    ratio = (density + beside) / efficiency(problem, kernel)
    if ratio < 1:
        return None
    return (
        f"because the {kernel} kernel is predicted to take {ratio:.1f} times as long at "
        f"{problem.keys:,} tokens and density {density:.2f}"
    )
