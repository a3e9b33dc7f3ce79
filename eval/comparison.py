"""What a comparison of recipes found: per recipe, per prompt, and what may be said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from .clips import Clip
from .costs import STAGES, WHOLE, Cost, gain
from .paired import Verdict
from .result import Result, Total
from .runs import Identity

SCHEMA = "kinora.compare/1"
Ruling: TypeAlias = Literal["kept", "below", "none", "refused"]
"""Of the 99 % rule: kept or not, not to be said, or runs that may not be compared."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One recipe beside the dense runs.

    `quality` has each score's verdict over pairs, `fidelity` how near the frames are to the dense
    ones. `against` names the dense runs of the same kernels, which `against_cost` is of.
    `refused` says of each run that may not be compared why; with any there is no verdict. `same`:
    every run computed just what the dense one did, by the same kernels, as its receipt tells.
    """

    name: str
    recipe: Mapping[str, Any]
    ruling: Ruling
    reason: str
    quality: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    fidelity: dict[str, Total] = field(default_factory=dict[str, Total])
    cost: Cost | None = None
    against: str = ""
    against_cost: Cost | None = None
    refused: tuple[str, ...] = ()
    same: bool = False

    def to_json(self, dense: Cost) -> dict[str, Any]:
        """Plain values; gains are how many times as fast, over `dense` and over `against`."""
        return {
            "name": self.name,
            "recipe": dict(self.recipe),
            "ruling": self.ruling,
            "reason": self.reason,
            "quality": {name: asdict(it) for name, it in self.quality.items()},
            "fidelity": {name: it.to_json() for name, it in self.fidelity.items()},
            "cost": None if self.cost is None else self.cost.to_json(),
            "gain": _gains(self.cost, dense),
            "against": self.against,
            "gain_against": _gains(self.cost, self.against_cost),
            "refused": list(self.refused),
            "same_as_dense": self.same,
        }


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt and seed: by recipe the video and its results, dense first."""

    identity: Identity
    clips: Mapping[str, Clip]
    results: Mapping[str, Mapping[str, Result]]

    def score(self, recipe: str, metric: str) -> float | None:
        """None where it has none."""
        result = self.results.get(recipe, {}).get(metric)
        return None if result is None or not result.applies else result.score

    def difference(self, recipe: str, metric: str, dense: str) -> float | None:
        """A recipe's score less the dense one."""
        ours, theirs = self.score(recipe, metric), self.score(dense, metric)
        return None if ours is None or theirs is None else ours - theirs


@dataclass(frozen=True, slots=True)
class Comparison:
    """The last item of `compare`. `dense` names the first runs; `cases` are worst first."""

    dense: str
    dense_cost: Cost
    dense_quality: dict[str, Total]
    headline: str
    recipes: tuple[Compared, ...]
    cases: tuple[Case, ...]
    provenance: dict[str, Any]

    @property
    def status(self) -> Literal["ok", "partial"]:
        """partial where a recipe has no verdict."""
        told = {it.ruling for it in self.recipes}
        return "partial" if told & {"none", "refused"} else "ok"

    def failures(self) -> list[str]:
        """One line for each recipe that has no verdict."""
        return [
            f"{it.name}: {it.reason}" for it in self.recipes if it.ruling in ("none", "refused")
        ]

    def notes(self) -> list[str]:
        """What must be said of times: where a recipe changed nothing they show noise alone."""
        told: list[str] = []
        for it in self.recipes:
            faster = None if it.cost is None else gain(it.cost, self.dense_cost)
            if it.same and faster is not None:
                told.append(
                    f"{it.name} computed just what {self.dense} did: {faster:.2f}× is how much "
                    f"other work on the machine changes times, and no gain"
                )
        return told

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            "schema": SCHEMA,
            "status": self.status,
            "dense": {
                "name": self.dense,
                "cost": self.dense_cost.to_json(),
                "quality": {name: it.to_json() for name, it in self.dense_quality.items()},
            },
            "headline": self.headline,
            "recipes": [it.to_json(self.dense_cost) for it in self.recipes],
            "notes": self.notes(),
            "cases": [self._case(it) for it in self.cases],
            "provenance": self.provenance,
        }

    def _case(self, case: Case) -> dict[str, Any]:
        prompt, seed = case.identity
        runs = {
            name: {
                "path": str(clip.path),
                "results": {it: one.to_json() for it, one in case.results[name].items()},
                "differences": {
                    it: case.difference(name, it, self.dense)
                    for it in case.results[name]
                    if name != self.dense and it in case.results[self.dense]
                },
            }
            for name, clip in case.clips.items()
        }
        return {"prompt": prompt, "seed": seed, "runs": runs}


def worst_first(cases: Sequence[Case], headline: str, dense: str) -> tuple[Case, ...]:
    """By the most that a recipe loses of `headline`, then by the lowest PSNR to dense."""

    def badness(case: Case) -> tuple[float, float]:
        others = [name for name in case.clips if name != dense]
        losses = [case.difference(name, headline, dense) for name in others]
        near = [case.score(name, "psnr") for name in others]
        return (
            min((it for it in losses if it is not None), default=0.0),
            min((it for it in near if it is not None), default=float("inf")),
        )

    return tuple(sorted(cases, key=badness))


def _gains(fast: Cost | None, dense: Cost | None) -> dict[str, float | None] | None:
    if fast is None or dense is None:
        return None
    return {stage: gain(fast, dense, stage) for stage in (*STAGES, WHOLE)}
