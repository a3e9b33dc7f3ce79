"""`vmoba` in one pass over tiles, beside the paper's two passes over blocks and dense attention.

    python benchmarks/vmoba_two_pass.py [--grid 21x30x52] [--heads 12] [--head-dim 128] [--random]
        [--json FILE]

In the first of the two passes every query attends to its own block; in the second, for each block
and head, the queries that chose it are gathered and attend to its keys. Both are attention of
sequences of many lengths in one launch (torch's flash attention on CUDA, a loop on a CPU), and the
outputs of a query are joined by their log-sum-exp. Ours is the plan and `block_attention`, with
masks and `shared`. All choose alike, by `VMoBA.choose`, and each is first checked against masked
dense attention.

A row tells the time of choosing (with ours all of the plan), that of the whole call, its most
memory beyond queries, keys and values (on CUDA) and how many times as fast as cuDNN's dense
attention it is. Inputs are those of `method_speed.py`; with `--random` random numbers, smooth over
the clip, which need no model.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from method_speed import Shape, Tensors, median_ms, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import VMoBA
from kinora.accel.methods.vmoba import Layout, layout
from kinora.accel.site import Site
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan

KINDS = ("time", "space", "time and space")
CHECKED = 256
"""Queries of each head whose output is compared with masked dense attention."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Most relative error of the norm."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way in one kind of layer; times in milliseconds."""

    layer: str
    way: str
    density: float
    computed: float
    choose_ms: float
    ms: float
    peak_mb: float | None
    speedup: float
    error: float


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    longest: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of sequences that lie one behind the other.

    Args:
        q, k, v: `[T, H, D]`.
        q_ends, k_ends: int32, where the first sequence starts and where each ends.
        longest: queries and keys of the longest sequences.

    Returns:
        The output, `[T, H, D]`, and the log-sum-exp, `[H, T]` float32.
    """
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, q_ends, k_ends, *longest, 0.0, False, False, scale=q.shape[-1] ** -0.5
        )
        if lse.shape != (q.shape[1], q.shape[0]):
            raise SystemExit(f"log-sum-exp {tuple(lse.shape)} of torch {torch.__version__}")
        return out, lse
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    spans = [it.tolist() for it in (q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:])]
    for first, last, start, end in zip(*spans, strict=True):
        own = q[first:last].transpose(0, 1)
        logits = own @ k[start:end].permute(1, 2, 0) * q.shape[-1] ** -0.5
        lse[:, first:last] = logits.logsumexp(-1)
        out[first:last] = (logits.softmax(-1) @ v[start:end].transpose(0, 1)).transpose(0, 1)
    return out, lse


def ends(sizes: torch.Tensor) -> torch.Tensor:
    """Where sequences end, for `varlen`."""
    return pad(sizes.cumsum(0), (1, 0)).to(torch.int32)


def two_pass(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, found: Layout
) -> torch.Tensor:
    """Attention of each query to the blocks it has chosen, `[1, H, N, D]`.

    Args:
        q, k, v: `[1, H, N, D]`.
        chosen: `[1, H, N, C]` bool, a query's own block among them.
    """
    _, heads, tokens, width = q.shape
    places, sizes = found.order, found.sizes
    owner, largest = found.owner[places], int(sizes.max())
    q, k, v = (x[0].transpose(0, 1)[places] for x in (q, k, v))  # [N, H, D], block by block
    own, own_lse = varlen(q, k, v, ends(sizes), ends(sizes), (largest, largest))
    sums, lse = own.transpose(0, 1).reshape(-1, width).float(), own_lse.reshape(-1)

    blocks = torch.arange(len(sizes), device=q.device)
    others = (chosen[0][:, places] & (owner[:, None] != blocks)).transpose(1, 2)  # [H, C, N]
    counts = others.sum(-1).flatten()
    head, _, query = others.nonzero(as_tuple=True)
    if len(head):
        at = head * tokens + query
        flat_q, flat_k, flat_v = (x.transpose(0, 1).reshape(-1, 1, width) for x in (q, k, v))
        more, more_lse = varlen(
            flat_q[at], flat_k, flat_v, ends(counts), ends(sizes.repeat(heads)),
            (int(counts.max()), largest),
        )  # fmt: skip
        more_lse = more_lse[0]
        top = lse.scatter_reduce(0, at, more_lse, "amax")
        weight, more_weight = (lse - top).exp(), (more_lse - top[at]).exp()
        sums *= weight[:, None]
        sums.index_add_(0, at, more[:, 0].float() * more_weight[:, None])
        sums /= weight.index_add(0, at, more_weight)[:, None]
    out = torch.empty(heads, tokens, width, dtype=q.dtype, device=q.device)
    out[:, places] = sums.to(q.dtype).view(heads, tokens, width)
    return out[None]


def smooth(shape: Shape, device: str, dtype: torch.dtype) -> Tensors:
    """Random queries, keys and values, `[1, H, L, D]`; queries are like keys that are near."""
    generator = torch.Generator().manual_seed(0)
    sides = shape.grid.frames, shape.grid.height, shape.grid.width
    coarse = [-(-side // 4) for side in sides]

    def field() -> torch.Tensor:
        drawn = torch.randn(shape.heads, shape.head_dim, *coarse, generator=generator)
        spread = interpolate(drawn, size=sides, mode="trilinear").flatten(2).mT
        return spread + 0.5 * torch.randn(spread.shape, generator=generator)

    places = field()
    q, k, v = ((x[None]).to(device, dtype) for x in (places + field(), places + field(), field()))
    return q, k, v


def exact(qkv: Tensors, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Masked dense attention of some queries, `[H, R, D]` float32.

    Args:
        tokens: `[H, R]` int64, which queries.
        mask: `[H, R, N]` bool, which keys they attend to.
    """
    q, k, v = (x[0].float() for x in qkv)
    some = q.gather(1, tokens[..., None].expand(-1, -1, q.shape[-1]))
    logits = (some @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v


def error_of(out: torch.Tensor, tokens: torch.Tensor, expected: torch.Tensor, way: str) -> float:
    """Relative error at the queries that were looked at.

    Raises:
        SystemExit: it is too large.
    """
    found = out[0].float().gather(1, tokens[..., None].expand(-1, -1, out.shape[-1]))
    error = float((found - expected).norm() / expected.norm())
    if not error < TOLERANCE[out.dtype]:
        raise SystemExit(f"{way} is off by {error:.3g} of masked dense attention: nothing is timed")
    return error


def peak_mb(call: Callable[[], object], device: str) -> float | None:
    """Most memory that a call takes beyond what is there before it, its result included, in MB."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def plan_of(method: VMoBA, qkv: Tensors, site: Site) -> BlockPlan:
    plan = method.plan(*qkv[:2], site)
    if plan is None:
        raise SystemExit(f"{method.words()} is dense {method.why_dense(site)}: take a larger grid")
    return plan


def measured(qkv: Tensors, grid: TokenGrid, device: str) -> Iterator[Row]:
    """Rows of each kind of layer."""
    q, k, v = qkv
    heads, tokens = q.shape[1], grid.tokens
    cuda = device == "cuda"
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:CHECKED].to(device)

    def dense(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    def cudnn() -> torch.Tensor:
        return dense(SDPBackend.CUDNN_ATTENTION if cuda else SDPBackend.FLASH_ATTENTION)

    def flash() -> torch.Tensor:
        return dense(SDPBackend.FLASH_ATTENTION)

    for layer, kind in enumerate(KINDS):
        # The paper's share of the blocks.
        own, shared = VMoBA(keep=0.25, shared=False), VMoBA(keep=0.25)
        site = Site(grid, layer, 3, 1, 2)
        parts, tile = own.parts(site), own.tiling()[0]
        found = layout(q.device, parts, grid, 0, False, tile)
        plan, wide = (plan_of(it, qkv, site) for it in (own, shared))
        chosen = own.choose(q, k, site)
        computed = float(wide.density().mean())

        def chosen_by(it: VMoBA = own, site: Site = site) -> torch.Tensor:
            return it.choose(q, k, site)

        def planned_by(it: VMoBA, site: Site = site) -> Callable[[], BlockPlan]:
            return lambda: plan_of(it, qkv, site)

        def tiles(it: VMoBA, site: Site = site) -> Callable[[], torch.Tensor]:
            return lambda: block_attention(q, k, v, plan_of(it, qkv, site))[0]

        def passes(
            found: Layout = found, choose: Callable[[], torch.Tensor] = chosen_by
        ) -> torch.Tensor:
            return two_pass(q, k, v, choose(), found)

        at = drawn.expand(heads, -1)
        kept = chosen[0][:, drawn][..., found.owner]
        by_choice = at, exact(qkv, at, kept)
        key_order, order = wide.key_order, wide.order
        assert key_order is not None and order is not None
        by_tile = (
            order[0][:, drawn],
            exact(qkv, order[0][:, drawn], wide.token_mask(drawn)[0][..., key_order.argsort()]),
        )
        everything = at, exact(qkv, at, torch.ones_like(kept))
        density = float(plan.density().mean())
        del plan, wide, chosen, kept
        ways = [
            ("dense, cuDNN" if cuda else "dense, SDPA", 1.0, None, cudnn, everything),
            ("two passes", density, chosen_by, passes, by_choice),
            ("vmoba", density, planned_by(own), tiles(own), by_choice),
            ("vmoba, shared", computed, planned_by(shared), tiles(shared), by_tile),
            ("dense, flash", 1.0, None, flash, everything),
        ]
        rows: list[Row] = []
        for way, share, choose, call, expected in ways:
            began = time.perf_counter()
            error = error_of(call(), *expected, way)
            rows.append(
                Row(
                    layer=kind,
                    way=way,
                    density=share,
                    computed=computed if way == "vmoba" else share,
                    choose_ms=median_ms(choose, device) if choose else 0.0,
                    ms=median_ms(call, device),
                    peak_mb=peak_mb(call, device),
                    speedup=0.0,
                    error=error,
                )
            )
            print(f"# {kind}: {way}, {time.perf_counter() - began:.1f} s", flush=True)
        # Dense attention again, so that a clock that has changed meanwhile shows in its time.
        dense_ms = (rows[0].ms + median_ms(cudnn, device)) / 2
        yield from (replace(row, speedup=dense_ms / row.ms) for row in rows)


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "layer           way            density  tiles   choose      all  ms     MB  times  error"
    for it in rows:
        peak = "-" if it.peak_mb is None else f"{it.peak_mb:.0f}"
        yield (
            f"{it.layer:15} {it.way:14} {it.density:7.3f}  {it.computed:.3f} {it.choose_ms:8.3f} "
            f"{it.ms:8.3f} {peak:>9} {it.speedup:6.2f}  {it.error:.4f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    cuda = torch.cuda.is_available()
    parser.add_argument("--grid", default="21x30x52" if cuda else "4x12x16")
    parser.add_argument("--heads", type=int, default=12 if cuda else 2)
    parser.add_argument("--head-dim", type=int, default=128, help="64 times a number, or --random")
    parser.add_argument("--random", action="store_true", help="random inputs, not recorded ones")
    parser.add_argument("--json", type=Path, help="a JSON line for each row, with the machine")
    options = parser.parse_args(arguments)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    grid = TokenGrid(*map(int, options.grid.split("x")))
    shape = Shape(grid, options.heads, options.head_dim)
    machine = {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
    }
    print(f"# {machine['machine']}, torch {machine['torch']}, {shape}", flush=True)
    with torch.inference_mode():
        made = smooth if options.random else tensors
        q, k, v = (x.contiguous() for x in made(shape, device, dtype))
        rows = list(measured((q, k, v), grid, device))
    print(*table(rows), sep="\n", flush=True)
    if options.json:
        given = {"grid": str(options.grid), "heads": options.heads, "head_dim": options.head_dim}
        lines = (json.dumps({**asdict(row), **given, **machine}) + "\n" for row in rows)
        options.json.write_text("".join(lines))


if __name__ == "__main__":
    main()
