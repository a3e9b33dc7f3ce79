"""The benchmarks of VBench's family: what each is called, imports, names and asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...pipelines.errors import nearest
from ..clips import EvalError
from . import totals
from .spec import DIMENSIONS, DIMENSIONS_2, I2V_DIMENSIONS, Dimension
from .totals import Totals

_REPOSITORY = "https://raw.githubusercontent.com/Vchitect/VBench/master"


@dataclass(frozen=True, slots=True)
class Suite:
    """One benchmark.

    `samples` videos of each prompt are asked for, by `samples_of` another number in a dimension.
    They are named `PROMPT-0`, `PROMPT-1` …, after the first `name_length` characters of the prompt;
    `kinds` are the files that it reads as videos. `listed` is its list of prompts in the package or
    at the address `list_url`. `caches` is the variable that names the folder of weights, and the
    folder without it. `supplied`: only in an environment that the user supplies. `whole`: it ends
    at the first video that is not there, so that prompts are given with all of theirs or not at
    all.
    """

    name: str
    title: str
    version: str
    package: str
    listed: str
    list_url: str
    dimensions: Mapping[str, Dimension]
    totals: Callable[[Mapping[str, float | None]], Totals]
    samples: int
    kinds: tuple[str, ...]
    caches: tuple[str, str]
    samples_of: Mapping[str, int] = field(default_factory=dict[str, int])
    name_length: int | None = None
    supplied: bool = False
    whole: bool = False

    def samples_in(self, dimension: str) -> int:
        """Videos of each of a dimension's prompts."""
        return self.samples_of.get(dimension, self.samples)


_CACHES = ("VBENCH_CACHE_DIR", "~/.cache/vbench")
_KINDS = (".mp4", ".gif")

VBENCH = Suite(
    "vbench", "VBench", "0.1.5", "vbench", "VBench_full_info.json",
    f"{_REPOSITORY}/vbench/VBench_full_info.json", DIMENSIONS, totals.t2v, 5, _KINDS, _CACHES,
)  # fmt: skip
VBENCH_I2V = Suite(
    "vbench-i2v", "VBench-I2V", "0.1.5", "vbench2_beta_i2v", "vbench2_i2v_full_info.json",
    f"{_REPOSITORY}/vbench2_beta_i2v/vbench2_i2v_full_info.json", I2V_DIMENSIONS, totals.i2v, 5,
    _KINDS, _CACHES,
)  # fmt: skip
VBENCH2 = Suite(
    "vbench2", "VBench-2.0", "0.1.1", "vbench2", "VBench2_full_info.json",
    f"{_REPOSITORY}/VBench-2.0/vbench2/VBench2_full_info.json", DIMENSIONS_2, totals.vbench2, 3,
    (".mp4",), ("VBENCH2_CACHE_DIR", "~/.cache/vbench2"), samples_of={"Diversity": 20},
    name_length=180, supplied=True, whole=True,
)  # fmt: skip
VBENCHES: dict[str, Suite] = {it.name: it for it in (VBENCH, VBENCH_I2V, VBENCH2)}


def find_suite(name: str) -> Suite:
    """The benchmark called so. Raises `EvalError`."""
    if name not in VBENCHES:
        close = nearest(name, VBENCHES, 1)
        told = f"did you mean {close[0]}?" if close else f"known are {', '.join(VBENCHES)}"
        raise EvalError(f"there are no prompts of {name!r}: {told}")
    return VBENCHES[name]
