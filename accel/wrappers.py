"""What changes when or how another attention method runs; each is a method too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator

from ..kernels.precision import Precision
from .errors import RecipeError, hint
from .method import AttentionMethod, Plan, Planner, Wrapper
from .options import checked, option, options_of
from .site import Site


class ByLayer(Wrapper):
    """Another method one of whose options changes from the first layer to the last.

    `by_layer = "keep 0.5 0.2 0.4"`: `keep` is 0.5 in the first layer, 0.2 in the middle and 0.4 in
    the last, and on straight lines in between. As many values as layers are one each; what the
    option itself says is then without effect. Layers are those of one denoiser.

    Source: ours; it says what papers have in tables of their own, a budget for each layer.
    """

    name: ClassVar[str] = "by-layer"
    use_when: ClassVar[str] = "some layers of a model attend to little and others to much."

    by_layer: str = option(
        "", "An option and its values from the first layer to the last, as in keep 0.5 0.2 0.4"
    )

    @classmethod
    def check(cls, method: type[AttentionMethod], values: Mapping[str, Any]) -> None:
        """See `Wrapper`."""
        name, curve = curve_of(method, values.get("by_layer", ""))
        for value in curve:
            method.check_options({**values, name: value})

    @model_validator(mode="after")
    def _checked(self) -> ByLayer:
        self.check(type(self.method), {**self.method.model_dump(), "by_layer": self.by_layer})
        return self

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan | None:
        """See `AttentionMethod`."""
        return self.at(site).plan(q, k, site)

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.at(site).predict(site)

    def computed(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.at(site).computed(site)

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        planners: dict[tuple[int, int], Planner] = {}

        def plan(q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan | None:
            key = site.layer, site.layers
            if key not in planners:
                planners[key] = self.at(site).start()
            return planners[key](q, k, site)

        return plan

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        return self.at(site).why_dense(site)

    def at(self, site: Site) -> AttentionMethod:
        """The method of a layer."""
        name, values = curve_of(type(self.method), self.by_layer)
        if not values:
            return self.method
        place = site.layer / max(1, site.layers - 1) * (len(values) - 1)
        before = min(int(place), len(values) - 1)
        after = values[min(before + 1, len(values) - 1)]
        # Rounded, so that a value that stands on a layer is there as it was written.
        value = round(values[before] + (place - before) * (after - values[before]), 9)
        return self.method.model_copy(update={name: value})

    def words(self) -> str:
        """See `AttentionMethod`."""
        name, values = curve_of(type(self.method), self.by_layer)
        if not values:
            return self.method.words()
        told = " to ".join(f"{value:g}" for value in values)
        return f"{self.method.words()}, {name.replace('_', ' ')} {told} from layer to layer"


@lru_cache(maxsize=64)  # asked at every call
def curve_of(method: type[AttentionMethod], text: str) -> tuple[str, tuple[float, ...]]:
    """The option and its values that a `by_layer` names; of an empty one no values.

    Raises:
        RecipeError: it is no option of `method` that is a number, or a value is out of its range.
    """
    if not text:
        return "", ()
    name, *values = text.replace(",", " ").split() or [""]
    known = {it.name: it for it in options_of(method) if it.kind is float}
    if name not in known:
        raise RecipeError(
            f"attention.by_layer is {text[:60]!r}{hint(name, known)}; it begins with an option of "
            f"{method.name} that is a number ({', '.join(known) or 'none is'}), then its values"
        )
    if not values:
        raise RecipeError(f"attention.by_layer is {text[:60]!r}: it gives {name} no value")
    return name, tuple(checked(known[name], it, f"attention.by_layer: {name}") for it in values)


def innermost(method: AttentionMethod) -> type[AttentionMethod]:
    """The class of the method that wrappers are around."""
    while isinstance(method, Wrapper):
        method = method.method
    return type(method)


class Quantised(Wrapper):
    """Another method whose products are multiplied in fewer bits.

    Which tiles are kept is chosen from the numbers as they come, and calls that run dense stay in
    the model's own precision. Backpropagation, and what no kernel of the device multiplies so, is
    left to the reference, which rounds alike and is slow; where it is predicted to lose, a recipe
    for `faster` runs dense and says so. `kernels.precision` says how each is rounded.

    Hopper GPUs have a kernel of their own for `int8` queries and keys and for `fp8` values; no
    other device has one for `fp8`. `int4`, and values in whole numbers, run in the portable kernel
    of GPUs, on an H200 2.5 to 5 times as long as 16 bits in Hopper's own: they are there to be
    judged, not for speed. On a CPU queries and keys have a fast kernel, and values are left to the
    reference.

    Source: SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958); `pv` in whole
    numbers: PAROAttention (arXiv 2506.16054).
    Differs from the papers: what is taken from the keys to make them smaller is the mean of a
    sample of them, since any vector is exact; `int4` has a scale for each token and weights one for
    each query and tile, which is finer.
    """

    name: ClassVar[str] = "quantised"
    paper: ClassVar[str] = "arXiv 2410.02367, 2411.10958, 2506.16054"
    licence: ClassVar[str] = "Apache-2.0"
    use_when: ClassVar[str] = (
        "heads have 128 channels and tokens are many: from 75,600 tokens on `int8` queries and "
        "keys gain a tenth to a quarter on an H200, in tiles of 64×64 up to a half; at 32,760 they "
        "gain little, with 64 channels they lose."
    )

    qk: Literal["input", "int8", "int4"] = option(
        "input", "Of calls that are not dense: in what queries and keys are multiplied"
    )
    pv: Literal["input", "int8", "int4", "fp8"] = option(
        "input", "Of calls that are not dense: in what weights and values are multiplied"
    )

    @classmethod
    def check(cls, method: type[AttentionMethod], values: Mapping[str, Any]) -> None:
        """See `Wrapper`."""
        for name in ("qk", "pv"):
            value = values.get(name, "input")
            if value != "input" and not method.quantises:
                raise RecipeError(
                    f"attention.{name} is {value}, but {method.name} is computed in the precision "
                    f"of the input alone: leave {name} out, or choose another method"
                )

    @model_validator(mode="after")
    def _checked(self) -> Quantised:
        self.check(innermost(self.method), {"qk": self.qk, "pv": self.pv})
        return self

    def precision(self) -> Precision:
        """See `AttentionMethod`."""
        return Precision(self.qk, self.pv)

    def words(self) -> str:
        """See `AttentionMethod`."""
        told = [self.method.words()]
        if self.qk != "input":
            told.append(f"queries and keys in {self.qk}")
        if self.pv != "input":
            told.append(f"weights and values in {self.pv}")
        return ", ".join(told)


class Within(Wrapper):
    """Another method in a window of steps and layers, dense outside of it.

    Early steps decide the composition and first layers look everywhere: most papers keep both
    dense. Steps are shares of the schedule, so that one recipe serves any number of them.

    Source: ours; papers have it in numbers of steps and layers.
    """

    name: ClassVar[str] = "within"
    use_when: ClassVar[str] = (
        "videos lose what moves in them: a dense beginning of two fifths of the steps often serves "
        "better than keeping more."
    )
    idle: ClassVar[Mapping[str, Any]] = {"from_step": 0.0}

    from_step: float = option(
        0.2, "Share of the steps that stay dense at the start", least=0, most=1, unit="of the steps"
    )
    to_step: float = option(
        1.0,
        "Share of the steps after which it is dense again",
        least=0,
        most=1,
        unit="of the steps",
    )
    from_layer: int = option(
        0, "Layers that stay dense at the start", least=0, most=1000, unit="layers"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan | None:
        """See `AttentionMethod`."""
        return self.method.plan(q, k, site) if self.covers(site) else None

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.method.predict(site) if self.covers(site) else 1.0

    def computed(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.method.computed(site) if self.covers(site) else 1.0

    @classmethod
    def check(cls, method: type[AttentionMethod], values: Mapping[str, Any]) -> None:
        """See `Wrapper`."""
        first, last = values.get("from_step", 0.2), values.get("to_step", 1.0)
        if first >= last:
            raise RecipeError(
                f"attention.from_step {first:g} must be below attention.to_step {last:g}, else it "
                f"never runs"
            )

    def covers(self, site: Site) -> bool:
        """Whether the site lies in the window."""
        # A little more, so that 0.2 of 50 steps are ten of them, whatever 0.2 * 50 is in binary.
        step = site.step + 1e-6
        return (
            self.from_step * site.steps <= step < self.to_step * site.steps
            and site.layer >= self.from_layer
        )

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        inner = self.method.start()
        return lambda q, k, site: inner(q, k, site) if self.covers(site) else None

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        if self.covers(site):
            return self.method.why_dense(site)
        if site.step + 1e-6 < self.from_step * site.steps:
            return f"in the first {self.from_step:.0%} of the steps"
        if site.layer < self.from_layer:
            first = f"{self.from_layer} layers" if self.from_layer > 1 else "layer"
            return f"in the first {first}"
        return f"after {self.to_step:.0%} of the steps"

    def words(self) -> str:
        """See `AttentionMethod`."""
        told = [self.method.words()]
        if self.from_step > 0:
            told.append(f"after {self.from_step:.0%} of the steps")
        if self.to_step < 1:
            them = "them" if self.from_step > 0 else "the steps"
            told.append(f"until {self.to_step:.0%} of {them}")
        if self.from_layer:
            told.append(f"from layer {self.from_layer} on")
        return ", ".join(told)


class Reuse(Wrapper):
    """Another method whose plan is made at every `every`-th step and kept in between.

    A plan is kept per denoiser and layer, has what each head has chosen, and is made anew when the
    tokens change. Steps that a policy skips or prunes do not count. With `branches = "shared"` what
    the call with the prompt has chosen serves the others of the step too: where guidance is in
    calls of its own these are the later ones, where it is in the batch the first part of it, from
    the second step on, when that is known. Models that attend to each item of a batch alone (Mochi)
    keep a plan for each.

    Source: SparseD (arXiv 2509.24014), whose pattern is made once after a dense fifth of the steps:
    `every = 0` and `from_step = 0.2`, with `x-attention`'s `threshold = 0`, `stride = 1`, no tail
    and `least = 0.3` for its share of the tiles by exact attention.
    Differs from the paper: the plan is made at the first step that uses it instead of the last
    dense one; text is always kept and counts within the share, where SparseD gives the prompt one
    of its own; plans can be made anew and be shared between branches. Differs from the authors'
    code: logits are divided by the root of the channels, there by that of the heads.
    """

    name: ClassVar[str] = "reuse"
    paper: ClassVar[str] = "arXiv 2509.24014"
    licence: ClassVar[str] = "the repository has no licence file"
    use_when: ClassVar[str] = (
        "choosing costs much beside attention itself, as by exact attention, `blade` and `vmoba`: "
        "what is chosen changes little from step to step."
    )

    every: int = option(
        1, "Steps for which a plan is kept; 0 keeps it to the end", least=0, most=1000, unit="steps"
    )
    branches: Literal["own", "shared"] = option(
        "own", "Whether guidance branches choose for themselves or the prompt's for all"
    )

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        inner = self.method.start()
        kept: dict[Any, tuple[int, int, Plan | None]] = {}

        def plan(q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan | None:
            shared = self.branches == "shared"
            parts = site.branches if shared else 1
            branch = 0 if shared else site.branch
            key = (site.expert, site.layer, branch, site.item, site.grid, site.text, q.shape[0])
            made, of, found = kept.get(key, (-1, 0, None))
            evaluated = site.step - site.skipped
            if of != parts or (self.every and evaluated - made >= self.every):
                first = q.shape[0] - q.shape[0] // parts
                found = inner(q[first:], k[first:], site)
                found = found and found.repeated(parts)
                kept[key] = evaluated, parts, found
            return found

        return plan

    def kept_plans(self, batch: int) -> int:
        """See `AttentionMethod`."""
        own = self.method.kept_plans(batch)
        if own or (self.every == 1 and self.branches == "own"):
            return own
        return batch if self.branches == "own" else -(-batch // 2)

    def words(self) -> str:
        """See `AttentionMethod`."""
        told = [self.method.words()]
        if self.every != 1:
            span = f"for {self.every} steps" if self.every else "to the end"
            told.append(f"each plan kept {span}")
        if self.branches == "shared":
            told.append("one for all guidance branches")
        return ", ".join(told)


WRAPPERS: tuple[type[Wrapper], ...] = (ByLayer, Quantised, Reuse, Within)
"""In the order in which a recipe has them, from the inside to the outside."""
