"""What an evaluation found: every clip's results, totals, and all that they depend on."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pipelines.sidecar import versions
from .clips import Clip, Rejected
from .registry import Metric
from .result import Status, Total, total
from .scoring import Scored

SCHEMA = "kinora.eval/1"


@dataclass(frozen=True, slots=True)
class Report:
    """The last item of `evaluate`. `rejected` are paths that are no clips; `unmatched` are names in
    the file of prompts that no clip has."""

    metrics: tuple[Metric, ...]
    clips: tuple[Scored, ...]
    totals: dict[str, Total]
    rejected: tuple[Rejected, ...]
    unmatched: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def status(self) -> Status:
        """failed if nothing has a score, partial if something went wrong, else ok."""
        states = [it.status for one in self.clips for it in one.results.values()]
        states += [self.totals[it.name].status for it in self.metrics if it.scorer == "set"]
        if "ok" not in states and "partial" not in states:
            return "failed"
        wrong = "failed" in states or "partial" in states or self.rejected or self.unmatched
        return "partial" if wrong else "ok"

    def failures(self) -> list[str]:
        """One line for each thing that went wrong, each once."""
        told = [it.reason for it in self.rejected]
        told += [
            result.reason
            for one in self.clips
            for result in one.results.values()
            if result.status == "failed"
        ]
        of_all = [self.totals[it.name] for it in self.metrics if it.scorer == "set"]
        told += [it.reason for it in of_all if it.status in ("failed", "partial")]
        told += [f"the prompts name {it}, which is not among the videos" for it in self.unmatched]
        return list(dict.fromkeys(told))

    def remarks(self) -> list[str]:
        """What must be said of totals: why they are none, by reason, and notes."""
        reasons: dict[str, list[str]] = {}
        for name, it in self.totals.items():
            if it.reason:
                mean = it.partial_mean
                others = "" if mean is None else f"; the mean of the {it.n} is {mean:.4f}"
                reasons.setdefault(it.reason, []).append(f"{name}{others}")
        told = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
        notes = (note for it in self.totals.values() for note in it.notes)
        return told + [f"note: {note}" for note in dict.fromkeys(notes)]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            "schema": SCHEMA,
            "status": self.status,
            "totals": {name: it.to_json() for name, it in self.totals.items()},
            "clips": [_clip_json(it) for it in self.clips],
            "rejected": [{"path": str(it.path), "reason": it.reason} for it in self.rejected],
            "unmatched_prompts": list(self.unmatched),
            "provenance": self.provenance,
        }


def report(
    metrics: Sequence[Metric],
    scored: Sequence[Scored],
    rejected: Sequence[Rejected],
    unmatched: Sequence[str],
    of_all: Mapping[str, Total] | None = None,
    environments: Mapping[str, str] | None = None,
) -> Report:
    """Sum up; `of_all` are the totals of metrics that are of all clips together, `environments`
    what metrics by networks were taken with."""
    sets = of_all or {}
    totals = {
        it.name: sets[it.name]
        if it.name in sets
        else total([one.results[it.name] for one in scored])
        for it in metrics
    }
    return Report(
        tuple(metrics), tuple(scored), totals, tuple(rejected), tuple(unmatched),
        _provenance(metrics, scored, totals) | {"environments": dict(environments or {})},
    )  # fmt: skip


def _provenance(
    metrics: Sequence[Metric], scored: Sequence[Scored], totals: dict[str, Total]
) -> dict[str, Any]:
    clips = [it.clip for it in scored]
    prompts = sorted({it.prompt for it in clips if it.prompt is not None})
    seeds = sorted({it.seed for it in clips if it.seed is not None})
    return {
        "metrics": {it.name: {"version": it.version, "what": it.what} for it in metrics},
        "prompts": len(prompts),
        "prompts_sha256": sha256_of_prompts(prompts),
        "seeds": seeds,
        "samplers": samplers(clips),
        "forms": sorted({it.form for it in clips}),
        "coverage": {name: f"{it.n} of {it.asked}" for name, it in totals.items()},
        "versions": versions(),
        "device": f"{platform.machine()} CPU",  # of all but metrics by networks
    }


def sha256_of_prompts(prompts: Sequence[str]) -> str:
    """Of the texts, a line each; those of a file may be no Unicode."""
    return hashlib.sha256("\n".join(prompts).encode(errors="surrogatepass")).hexdigest()


def samplers(clips: Sequence[Clip]) -> list[str]:
    """How the clips with a record were made, each way once, in words."""
    told: dict[str, None] = {}
    for record in (it.record for it in clips if it.record is not None):
        asked = record.request
        scheduler = "" if record.model.scheduler is None else f" of {record.model.scheduler}"
        told[
            f"{asked.model}, {asked.frames} frames of {asked.width}x{asked.height} at "
            f"{asked.fps:g} fps, {asked.steps} steps{scheduler}, guidance {asked.guidance:g}, "
            f"{record.machine.device}"
        ] = None
    return list(told)


def _clip_json(scored: Scored) -> dict[str, Any]:
    return {
        **_known(scored.clip),
        "reference": None if scored.reference is None else str(scored.reference.path),
        "results": {name: it.to_json() for name, it in scored.results.items()},
    }


def _known(clip: Clip) -> dict[str, Any]:
    told: dict[str, Any] = {"path": str(clip.path), "prompt": clip.prompt, "form": clip.form}
    if clip.record is None:
        return told
    asked = clip.record.request
    receipt = clip.record.receipt
    return told | {
        "seed": asked.seed,
        "model": asked.model,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "frames": asked.frames,
        "size": f"{asked.width}x{asked.height}",
        "recipe": asked.recipe,
        "made_on": clip.record.machine.device,
        "seconds": None if receipt is None else dict(receipt.stages_s),
    }
