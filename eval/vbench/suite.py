"""VBench of many videos: `kinora eval VIDEOS --suite vbench`.

A dimension is the unit: it has its own videos, process, log and result, and one that fails loses
no other. What was scored is not scored again unless a video, the environment or the list of prompts
has changed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import Cache
from ..clips import Clip, EvalError, Rejected, find, with_prompts
from ..result import Result, skipped
from . import client
from . import prompts as vbench_prompts
from .spec import DIMENSIONS, SAMPLES, VERSION, Dimension
from .stage import Staged, stage, stage_custom
from .totals import Totals, t2v

TIMEOUT_S = 4 * 3600.0
NOT_CUSTOM = "asks what its own prompts show, and cannot be taken of other videos"


@dataclass(frozen=True, slots=True)
class Step:
    """`done` of `of` dimensions have a result; `dimension` is the next, None after the last."""

    done: int
    of: int
    dimension: str | None


@dataclass(frozen=True, slots=True)
class VBenchReport:
    """The last item of `evaluate`: results by dimension, totals, and what they depend on."""

    results: dict[str, Result]
    totals: Totals
    rejected: tuple[Rejected, ...]
    unmatched: tuple[str, ...]
    unused: int
    provenance: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every dimension that was asked for has a whole score."""
        return all(it.status == "ok" for it in self.results.values()) and not self.rejected

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            "schema": "kinora.vbench/1",
            "status": "ok" if self.ok else "partial",
            "dimensions": {name: it.to_json() for name, it in self.results.items()},
            "totals": {**self.totals.scores, "why": self.totals.why or None},
            "rejected": [{"path": str(it.path), "reason": it.reason} for it in self.rejected],
            "unmatched_prompts": list(self.unmatched),
            "unused_videos": self.unused,
            "provenance": self.provenance,
        }


def evaluate(
    videos: Sequence[str | Path],
    *,
    dimensions: Sequence[str] = (),
    custom: bool = False,
    prompts: str | Path | None = None,
    info: str | Path | None = None,
    python: str | None = None,
    device: str = "auto",
    timeout_s: float = TIMEOUT_S,
    cache: Path | None = None,
) -> Generator[Step | VBenchReport, None, None]:
    """Score `videos` with the VBench package; yields steps and at last the report.

    Args:
        dimensions: those to take; all without any.
        custom: take videos of any prompts, in the dimensions that allow it, rather than the
            standard set of five for each of VBench's prompts.
        prompts: JSON file of VBench's own prompts by file name, where videos were made of longer
            ones.
        info: `VBench_full_info.json`; the environment's own without it.
        python: an interpreter that has the package, rather than uv's environment.
        timeout_s: for each dimension.

    Raises:
        EvalError: an unknown dimension, no videos, videos that VBench cannot read, names that
            collide, no environment or one that does not start.
    """
    wanted = [DIMENSIONS[it] for it in vbench_prompts.dimensions_of(dimensions)]
    clips, rejected = find([Path(it) for it in videos])
    if not clips:
        raise EvalError(rejected[0].reason if rejected else "there are no VIDEOS")
    unmatched: list[str] = []
    if prompts is not None:
        clips, unmatched = with_prompts(clips, Path(prompts))
    where = client.environment(python)
    if where is None:
        raise EvalError(client.NO_ENVIRONMENT)
    work = Path(tempfile.mkdtemp(prefix="kinora-vbench-"))
    results: dict[str, Result] = {}
    used: set[Path] = set()
    provenance: dict[str, Any] = {
        "suite": "VBench",
        "version": VERSION,
        "mode": "custom" if custom else "standard",
        "samples": None if custom else SAMPLES,
        "prompts_from_file": prompts is not None,
        "seeds": sorted({it.seed for it in clips if it.seed is not None}),
        "forms": sorted({it.form for it in clips}),
        "environment": where.identity,
    }
    try:
        listed, known_info = None, None if info is None else Path(info)
        if not custom:
            if known_info is None:
                known_info = Path(client.about(where, work, timeout_s)["info"])
            listed = vbench_prompts.read(known_info)
            provenance["prompts_sha256"] = listed.sha256
        run = _Run(where, clips, listed, known_info, work, device, timeout_s, Cache(cache))
        for index, dimension in enumerate(wanted):
            yield Step(index, len(wanted), dimension.name)
            results[dimension.name] = run.result(dimension, used)
    finally:
        # Logs of what failed are named in its reason.
        if not any(it.status == "failed" for it in results.values()):
            shutil.rmtree(work, ignore_errors=True)
    yield Step(len(wanted), len(wanted), None)
    raw = {name: it.score if it.status == "ok" else None for name, it in results.items()}
    yield VBenchReport(
        results, t2v(raw), tuple(rejected), tuple(unmatched), len(clips) - len(used), provenance
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What all dimensions share."""

    where: client.Environment
    clips: Sequence[Clip]
    listed: vbench_prompts.Prompts | None
    info: Path | None
    work: Path
    device: str
    timeout_s: float
    cache: Cache

    def result(self, dimension: Dimension, used: set[Path]) -> Result:
        """One dimension's, from its videos or from before; adds the videos to `used`."""
        if self.listed is None and not dimension.custom:
            return skipped(f"{dimension.name} {NOT_CUSTOM}", applies=False)
        folder = self.work / dimension.name
        staged = self._staged(dimension, folder / "videos")
        used.update(it.path for it in staged.links.values())
        if not staged.links:
            why = f"none of its {staged.expected} videos is there: {staged.missing[0]!r:.80} …"
            return skipped(f"{dimension.name}: {why}")
        without = client.without_weights(dimension)
        if without is not None:
            return without
        key = self._key(dimension, staged)
        before = self.cache.get(key)
        if before is not None:
            return before
        result = client.score(
            self.where, dimension, staged, folder,
            info=None if self.listed is None else self.info,
            timeout_s=self.timeout_s, device=self.device,
        )  # fmt: skip
        if result.status in ("ok", "partial"):
            self.cache.put(key, result)
        return result

    def _staged(self, dimension: Dimension, folder: Path) -> Staged:
        if self.listed is None:
            return stage_custom(self.clips, folder)
        return stage(self.clips, self.listed.of([dimension.name]), folder)

    def _key(self, dimension: Dimension, staged: Staged) -> list[str]:
        digest = hashlib.sha256()
        for name, clip in sorted(staged.links.items()):
            digest.update(f"{name}\0{clip.prompt}\0{clip.sha256()}\n".encode())
        mode = "custom" if self.listed is None else self.listed.sha256
        run = (self.where.identity, self.device, digest.hexdigest())
        return ["vbench", VERSION, dimension.name, mode, *run]
