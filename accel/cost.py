"""Predicts what an acceleration gains, from shapes and measured efficiencies.

The composition rule: with a share `a` of a denoiser call spent in self-attention and attention
at `rho` of its dense time, a call takes (1 - a) + a rho of its dense time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels import merging
from ..kernels.backends import choose, efficiency, workspace
from ..kernels.plan import Tail, Tile, tiles_of
from ..kernels.precision import INPUT, Precision
from ..kernels.problem import Problem
from .grid import TokenGrid
from .method import AttentionMethod
from .site import Site


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer with self-attention, as its cost sees it.

    `linear`: multiplications for a token beside those of self-attention. `text` tokens stand
    beside the picture's, whose grid is halved `halvings` times.
    """

    heads: int
    head_dim: int
    linear: int
    text: int = 0
    halvings: int = 0

    def tokens(self, grid: TokenGrid) -> int:
        """Tokens in self-attention."""
        return grid.halved(self.halvings).tokens + self.text

    def attention(self, grid: TokenGrid) -> int:
        """Multiplications of self-attention: every pair of tokens, for logits and for values."""
        return 2 * self.tokens(grid) ** 2 * self.heads * self.head_dim


def transformer_layer(
    heads: int, head_dim: int, middle: int, *, text: int = 0, cross_attention: bool = False
) -> LayerShape:
    """A layer of a transformer of width d = `heads` x `head_dim`, its feed-forward `middle` wide.

    Per token: projections 4 d² (with cross-attention 6 d², its text being short), feed-forward
    2 d `middle`.
    """
    width = heads * head_dim
    projections = (6 if cross_attention else 4) * width
    return LayerShape(heads, head_dim, width * (projections + 2 * middle), text)


@dataclass(frozen=True, slots=True)
class Shape:
    """A denoiser, as its cost sees it.

    `layers` in the order in which they run; `rest`: multiplications for a token beside them, by
    how often the grid is halved there.
    """

    layers: tuple[LayerShape, ...]
    text_first: bool = False
    rest: tuple[tuple[int, int], ...] = ()

    def attention_share(self, grid: TokenGrid) -> float:
        """Share of the multiplications of a call that self-attention does."""
        attention = sum(it.attention(grid) for it in self.layers)
        linear = sum(it.linear * it.tokens(grid) for it in self.layers)
        rest = sum(count * grid.halved(halvings).tokens for halvings, count in self.rest)
        return attention / (attention + linear + rest)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What attention by a method is expected to do in a run.

    Attributes:
        share: of a denoiser call that self-attention takes when dense.
        density: share of the pairs of tokens of all calls that are computed.
        speedup: of the denoising; the text encoder and decoding are not in it.
        by_step: time of each step, of a dense one.
        precision: of the calls that are not dense, "" where it is the input's.
        kernel: of the sparse calls, several joined by "and".
        dense: why calls that the method wanted sparse will run dense; empty where none will.
        why_dense: why the method itself keeps calls dense, each reason once.
        workspace: bytes that the kernel needs beside its inputs and output, and those of the plans
            that are kept between steps; 0 where all is dense.
    """

    share: float
    density: float
    speedup: float
    kernel: str
    precision: str
    dense: str
    why_dense: str
    workspace: int
    by_step: tuple[float, ...] = ()


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
    sizes = {it: (batch, it.heads, it.tokens(grid), it.head_dim) for it in shape.layers}
    precision, beside = method.precision(), method.beside()
    # By whether plans mask tokens within tiles, which not every kernel can.
    problems = {
        (it, masked): problem_of(
            method.tiling(), device, dtype, sizes[it], precision=precision, masked=masked
        )
        for it in sizes
        for masked in (False, True)
    }
    works = {key: work_of(it) for key, it in problems.items()}
    pairs = kept = dense_cost = 0.0
    # The most that is computed of each kind of layer that is sparse.
    sparse: dict[tuple[LayerShape, bool], float] = {}
    dense, own = dict[str, None](), dict[str, None]()
    share, costs = shape.attention_share(grid), list[float]()
    for step in range(steps):
        costs.append(0.0)
        for number, layer in enumerate(shape.layers):
            site = Site(
                grid.halved(layer.halvings),
                number,
                len(shape.layers),
                step,
                steps,
                text=layer.text,
                text_first=shape.text_first,
            )
            density = method.predict(site)
            computed = method.computed(site)
            key = layer, computed > density
            if density >= 1:
                own[method.why_dense(site)] = None
            reason = None if always or density >= 1 else slower(problems[key], computed, beside)
            if reason:
                dense[reason], density = None, 1.0
            ratio = 1.0
            if density < 1:
                sparse[key] = max(computed, sparse.get(key, 0.0))
                ratio = (computed + beside) / works[key].efficiency
            pairs += site.tokens**2
            kept += density * site.tokens**2
            dense_cost += layer.attention(grid)
            costs[-1] += ratio * layer.attention(grid)
    cost, dense_step = sum(costs), dense_cost / steps
    used = dict.fromkeys(works[key].kernel for key in sparse or ((it, False) for it in sizes))
    needed = plans = 0
    for (layer, masked), computed in sparse.items():
        problem = problems[layer, masked]
        listed = method.longest(computed, layer.text)
        one = plan_bytes(problem, listed) + 8 * method.orders(layer.heads) * problem.keys
        kept_plans = shape.layers.count(layer) * method.kept_plans(batch)
        plans += kept_plans * one
        if masked:  # a bit for each pair of tokens in the tiles of a list
            masks = max(batch, kept_plans) * method.masks(layer.heads) or 1
            plans += round(masks * listed * problem.queries * problem.keys / 8)
        # With means a second output, and both once more while they are merged.
        again = 3 * problem.tensor_bytes(problem.keys) if beside else 0
        needed = max(needed, works[layer, masked].workspace + again)
    return Prediction(
        share=share,
        density=kept / pairs,
        speedup=1 / ((1 - share) + share * cost / dense_cost),
        kernel=" and ".join(used),
        precision="" if precision == INPUT else str(precision),
        dense=" or ".join(dense),
        why_dense=" or ".join(own),
        workspace=needed + plans,
        by_step=tuple((1 - share) + share * it / dense_step for it in costs),
    )


def together(by_step: Sequence[float], evaluated: float, window: range) -> float:
    """How much faster denoising is where steps are skipped besides.

    Args:
        by_step: time of each step, of a dense one.
        evaluated: how many steps are.
        window: of the steps that may be skipped; the cost is taken to be the same for all of these.
    """
    steps = len(by_step)
    each = sum(by_step[it] for it in window) / max(1, len(window))
    return steps / (sum(by_step) - (steps - evaluated) * each)


def problem_of(
    tiling: tuple[Tile, Tail] | None,
    device: str,
    dtype: torch.dtype,
    size: Sequence[int],
    *,
    precision: Precision = INPUT,
    requires_grad: bool = False,
    masked: bool = False,
) -> Problem:
    """Self-attention over tensors of `size` `[B, H, L, D]` by plans of `tiling`."""
    (batch, heads, tokens, head_dim), (tile, tail) = size, tiling or (Tile(1, 1), "none")
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
        masked=masked,
        merged=tiling is None,
    )


@dataclass(frozen=True, slots=True)
class Work:
    """What computes a call that is not dense, and what that takes.

    Attributes:
        efficiency: density x dense time / time.
        workspace: bytes beside inputs and output.
    """

    kernel: str
    efficiency: float
    workspace: int


def work_of(problem: Problem) -> Work:
    """By the fastest kernel that takes it."""
    if problem.merged:
        return Work(merging.KERNEL, merging.efficiency(problem), merging.workspace(problem))
    kernel = choose(problem)
    return Work(kernel, efficiency(problem, kernel), workspace(problem, kernel))


def plan_bytes(problem: Problem, share: float) -> int:
    """Bytes of the lists of one item of a batch, where the longest holds `share` of the tiles."""
    if problem.merged:
        return merging.merge_bytes(problem, share)
    rows = tiles_of(problem.queries, problem.tile.query)
    width = math.ceil(round(share * tiles_of(problem.keys, problem.tile.key), 6))
    return 4 * problem.heads * rows * (width + 1)


def slower(problem: Problem, density: float, beside: float = 0.0) -> str | None:
    """Why attention at `density` is predicted to lose, in words that follow "dense …", or None.

    `density`: of all pairs that are computed, masked or not; `beside`: see `AttentionMethod`.
    """
    work = work_of(problem)
    ratio = (density + beside) / work.efficiency
    if ratio < 1:
        return _too_short(problem, work.kernel)
    longer = f"{ratio:.2f} times as long" if ratio >= 1.005 else "as long"
    return (
        f"because at {problem.keys:,} tokens the {work.kernel} kernel is predicted to take "
        f"{longer}, computing {density:.0%} of their pairs"
    )


_HOST_S = 1e-3
"""What Python takes longer over a sparse call than over a dense one, to make a plan and start its
kernels: .4 to 1.8 ms by method, beside an H200. Where the GPU has less to do it waits."""
_DENSE_FLOPS = {"hopper": 575e12}
"""Of dense attention by cuDNN on an H200; other GPUs are taken to be a third of it."""
_OTHER_FLOPS = 200e12


def _too_short(problem: Problem, kernel: str) -> str | None:
    """Why a call takes a GPU too little time for a sparse one to gain any, as in `slower`."""
    pairs = problem.batch * problem.heads * problem.queries * problem.keys
    dense_s = 4 * pairs * problem.head_dim / _DENSE_FLOPS.get(kernel, _OTHER_FLOPS)
    if problem.device != "cuda" or dense_s >= _HOST_S:
        return None
    return (
        f"because at {problem.keys:,} tokens it takes the GPU about {1e3 * dense_s:.2g} ms, and "
        f"starting a sparse one takes Python {1e3 * _HOST_S:g} ms"
    )
