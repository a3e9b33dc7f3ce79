"""Block attention beside dense attention and other block-sparse kernels: right first, then fast.

Every implementation is first compared with the reference in float64 on 1,000 or so tokens; where it
errs, no time is printed. Plans are made beforehand and their time is told apart; everything that a
call itself does is in its time: pooling, quantising, launches. E = density x dense time / own time,
with the fastest dense kernel of torch in the same run; 1 is perfect.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from math import isfinite
from typing import Any, cast

import torch

from ...kernels.attention import block_attention
from ...kernels.backends import refuses
from ...kernels.plan import BlockPlan, Tail, Tile
from ...kernels.precision import INPUT, Precision
from ...kernels.problem import Problem
from ...pipelines.errors import RequestError
from .cases import PATTERNS, RECORDED, Case, Shape, by_means, first
from .peers import PEERS, Absent, Call

LARGEST_ERROR = {INPUT: 5e-3, Precision("int4"): 0.5, Precision("int4", "int4"): 0.5}
"""Relative, of the whole output, against float64; other precisions lose up to 0.06."""
_ELSE = 0.06
COMPARED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is timed: all combinations."""

    shapes: Sequence[Shape]
    tiles: Sequence[Tile]
    densities: Sequence[float]
    patterns: Sequence[str] = ("random",)
    tails: Sequence[Tail] = ("none",)
    precisions: Sequence[Precision] = (INPUT,)
    backends: Sequence[str] = ()
    peers: Sequence[str] = ()
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a time, or why there is none.

    Times in ms, medians; `error` relative to float64; `peak_bytes` beyond inputs and output.
    """

    name: str
    shape: str
    tile: str
    pattern: str
    tail: str
    precision: str
    density: float
    refused: str = ""
    ms: float | None = None
    dense_ms: float | None = None
    e: float | None = None
    tflops_on_kept: float | None = None
    error: float | None = None
    peak_bytes: int | None = None
    plan_ms: float | None = None
    machine: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        begin = (
            f"{self.shape:14} {self.name:14} {self.tile:8} {self.pattern:9} {self.tail:10} "
            f"{self.precision:14}"
        )
        if self.refused:
            return f"{begin} no time: {self.refused}"
        plan = "" if self.plan_ms is None else f" {self.plan_ms:9.3f}"
        return (
            f"{begin} {self.density:7.3f} {self.ms:10.3f} {self.e:6.3f} "
            f"{self.tflops_on_kept:8.2f} {self.error:8.1e}{plan}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, without those that are not known or, as JSON has none, not finite."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value not in (None, "") and not (isinstance(value, float) and not isfinite(value))
        }


HEADING = (
    f"{'shape':14} {'kernel':14} {'tile':8} {'pattern':9} {'tail':10} {'QK x PV':14} "
    f"{'density':>7} {'ms':>10} {'E':>6} {'TFLOP/s':>8} {'error':>8} {'plan ms':>9}"
)
"""What the columns of a `Row` in words are."""


def machine(device: str) -> dict[str, str]:
    """What the times are of."""
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu"
    told = {"machine": name, "torch": torch.__version__}
    for library in ("triton", "sageattention", "xformers", "fastvideo-kernel", "flash-attn-4"):
        try:
            told[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return told if cuda else told | {"threads": str(torch.get_num_threads())}


def medians_ms(calls: Sequence[Callable[[], object]], device: str, repeats: int) -> list[float]:
    """Of each call: on a GPU of as many as go into a tenth of a second, else of `repeats` turns."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        bench = partial(cast(Any, do_bench), warmup=25, rep=100, return_mode="median")
        return [float(bench(call)) for call in calls]
    turns: list[list[float]] = []
    for _ in range(repeats + 1):
        turn: list[float] = []
        for call in calls:
            began = time.perf_counter()
            call()
            turn.append(1e3 * (time.perf_counter() - began))
        turns.append(turn)
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def rows(wanted: Wanted) -> Iterator[Row]:
    """The table, line by line as it is measured."""
    for shape in wanted.shapes:
        torch.manual_seed(0)
        yield from _of_shape(shape, wanted)


def default_device() -> tuple[str, torch.dtype]:
    """Where it is timed, and in which precision."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def _of_shape(shape: Shape, wanted: Wanted) -> Iterator[Row]:
    about = machine(wanted.device)
    whole = Tile(128, 128)
    every = PATTERNS["random"](shape, whole, 0.1, wanted.device, wanted.dtype)
    begin = Row("", str(shape), "all", "dense", "none", str(INPUT), 1.0, machine=about)
    # On a CPU the backends of torch other than flash write down all logits.
    kinds = [it for it, peer in PEERS.items() if peer.dense]
    if not wanted.device.startswith("cuda"):
        kinds = ["sdpa-flash", *(it for it in kinds if it in wanted.peers)]
    found = [
        _timed(dataclasses.replace(begin, name=name), every, PEERS[name].prepare, wanted)
        for name in dict.fromkeys(kinds)
    ]
    dense = {it.name: it.ms for it in found if it.ms is not None and it.name.startswith("sdpa")}
    if not dense:
        yield from found
        return
    fastest = min(dense, key=lambda it: dense[it])
    for row in found:
        if row.ms is not None:
            row = dataclasses.replace(row, dense_ms=dense[fastest], e=dense[fastest] / row.ms)
        yield row
    combinations = itertools.product(wanted.patterns, wanted.tiles, wanted.densities, wanted.tails)
    for pattern, tile, density, tail in combinations:
        if pattern == "recorded" and shape != RECORDED:
            told = f"recorded queries and keys have the shape {RECORDED}"
            yield Row(
                "all", str(shape), str(tile), pattern, tail, str(INPUT), density,
                refused=told, machine=about,
            )  # fmt: skip
            continue
        made = PATTERNS[pattern](shape, tile, density, wanted.device, wanted.dtype)
        case = Case(made.tensors, dataclasses.replace(made.plan, tail=tail))
        given = Row(
            "", str(shape), str(tile), pattern, tail, str(INPUT),
            float(case.plan.density().mean()), machine=about,
        )  # fmt: skip
        beside = PEERS[fastest].prepare(case)
        for backend, precision in itertools.product(wanted.backends, wanted.precisions):
            row = dataclasses.replace(given, name=backend, precision=str(precision))
            yield _own(row, case, precision, beside, wanted)
        for name in wanted.peers:
            if not PEERS[name].dense:
                row = dataclasses.replace(given, name=name)
                yield _timed(row, case, PEERS[name].prepare, wanted, beside)


def _own(row: Row, case: Case, precision: Precision, beside: Call, wanted: Wanted) -> Row:
    """One of our backends."""
    reason = refuses(Problem.of(*case.tensors, case.plan, precision), row.name)
    if reason:
        return dataclasses.replace(row, refused=reason)

    def prepare(case: Case) -> Call:
        return lambda: block_attention(
            *case.tensors, case.plan, precision=precision, backend=row.name
        )[0]

    done = _timed(row, case, prepare, wanted, beside, LARGEST_ERROR.get(precision, _ELSE))
    q, k, _ = case.tensors
    plan = partial(by_means, q, k, case.plan.tile, row.density)
    (plan_ms,) = medians_ms([plan], wanted.device, wanted.repeats)
    return dataclasses.replace(done, plan_ms=plan_ms)


def _timed(
    row: Row,
    case: Case,
    prepare: Callable[[Case], Call],
    wanted: Wanted,
    beside: Call | None = None,
    most: float = 2e-2,
) -> Row:
    """`row` with its error and its time, beside the dense kernel; or with the reason for none."""
    try:
        error = _error(row, case, prepare)
        if not error <= most:
            return dataclasses.replace(row, refused=f"it errs by {error:.2g}", error=error)
        call = prepare(case)
        call()
    except Absent as reason:
        return dataclasses.replace(row, refused=str(reason))
    except Exception as reason:  # whatever a foreign library raises is the answer
        told = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        _still_there(row.name, told, wanted.device)
        return dataclasses.replace(row, refused=told[:160])
    peak = _peak_bytes(call, wanted.device)
    calls = [call] if beside is None else [call, beside]
    ms, *others = medians_ms(calls, wanted.device, wanted.repeats)
    dense = others[0] if others else ms
    q = case.tensors[0]
    operations = 4 * row.density * q.shape[1] * q.shape[2] ** 2 * q.shape[3]
    return dataclasses.replace(
        row, ms=ms, dense_ms=dense, e=row.density * dense / ms, error=error, peak_bytes=peak,
        tflops_on_kept=1e-9 * operations / ms,
    )  # fmt: skip


def _still_there(name: str, told: str, device: str) -> None:
    """Raises `RequestError` where a kernel broke the device for all that comes behind it."""
    if device.startswith("cuda"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise RequestError(
                f"{name} broke the device ({told}); what was timed before it is kept, leave it out "
                "by naming others with --peer or --backend"
            ) from None


def _error(row: Row, case: Case, prepare: Callable[[Case], Call]) -> float:
    """Against the reference in float64, on the first tokens and two heads."""
    small = first(case, min(COMPARED_TOKENS, case.plan.queries))
    plan = small.plan
    if row.pattern == "dense":
        tokens, device = plan.queries, plan.indices.device
        plan = BlockPlan.dense(tile=plan.tile, queries=tokens, keys=tokens, device=device)
    out = prepare(Case(small.tensors, plan))()
    q, k, v = (x.double() for x in small.tensors)
    exact, _ = block_attention(q, k, v, plan, backend="reference")
    return float((out.double() - exact).norm() / exact.norm())


def _peak_bytes(call: Call, device: str) -> int | None:
    """What a call allocates at the most, its output left out."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    return torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()


def known_backends(device: str) -> tuple[str, ...]:
    """Those that are worth timing there."""
    return ("hopper", "triton") if device.startswith("cuda") else ("cpu",)
