"""VBench, VBench-I2V or VBench-2.0 of many videos: `kinora eval VIDEOS --suite vbench`.

A dimension is the unit: it has its own videos, process, log and result, and one that fails loses
no other. What was scored is not scored again unless a video, the environment or the list of prompts
has changed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cache import Cache
from ..clips import Clip, EvalError, Rejected, find, sha256_of, with_prompts
from ..report import samplers
from ..result import Result, failed, skipped
from . import client
from . import prompts as vbench_prompts
from .spec import FLICKER, STILL_FILES, STILL_SAMPLES, Dimension
from .stage import Staged, readable, stage, stage_custom, still, without
from .suites import VBENCH, Suite
from .totals import Totals

TIMEOUT_S = 4 * 3600.0
NOT_CUSTOM = "asks what its own prompts show, and cannot be taken of other videos"
IMAGES = (
    "needs the images that videos begin with, cut to their sides: --images FOLDER, of crop.zip "
    "(gdown 1JANXpTxg90M3Exi5WGnVNagb1nqyTJ4o)"
)


@dataclass(frozen=True, slots=True)
class Step:
    """`done` of `of` dimensions have a result; `dimension` is the next, None after the last."""

    done: int
    of: int
    dimension: str | None


@dataclass(frozen=True, slots=True)
class VBenchReport:
    """The last item of `evaluate`: results by dimension, totals, and what they depend on.

    `clips` are a dimension's videos by the names that `by_video` in its result has.
    """

    results: dict[str, Result]
    totals: Totals
    clips: dict[str, dict[str, Clip]]
    rejected: tuple[Rejected, ...]
    unmatched: tuple[str, ...]
    unused: int
    suite: Suite
    provenance: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every dimension that was asked for has a whole score."""
        return all(it.status == "ok" for it in self.results.values()) and not self.rejected

    def failures(self) -> list[str]:
        """One line for each thing that went wrong."""
        told = [it.reason for it in self.rejected]
        told += [
            it.reason if name in it.reason else f"{name}: {it.reason}"
            for name, it in self.results.items()
            if it.status in ("failed", "partial")
        ]
        told += [f"the prompts name {it}, which is not among the videos" for it in self.unmatched]
        return told

    def remarks(self) -> list[str]:
        """What must be said of scores and totals: why there are none, and notes."""
        told = [it.reason for it in self.results.values() if it.status == "skipped"]
        if self.totals.missing:
            whole = sum(it.weight > 0 for it in self.suite.dimensions.values())
            count = len(self.totals.missing)
            told.append(f"no total: {count} of {whole} dimensions have no whole score")
        if self.unused:
            told.append(f"{self.unused} videos belong to none of these dimensions")
        told += [f"note: {note}" for it in self.results.values() for note in it.notes]
        return list(dict.fromkeys(told))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            "schema": "kinora.vbench/1",
            "status": "ok" if self.ok else "partial",
            "dimensions": {
                name: it.to_json() | {"paths": self._paths(name)}
                for name, it in self.results.items()
            },
            "totals": {**self.totals.scores, "why": self.totals.why or None},
            "rejected": [{"path": str(it.path), "reason": it.reason} for it in self.rejected],
            "unmatched_prompts": list(self.unmatched),
            "unused_videos": self.unused,
            "provenance": self.provenance,
        }

    def _paths(self, dimension: str) -> dict[str, str]:
        return {name: str(it.path) for name, it in self.clips.get(dimension, {}).items()}


def evaluate(
    videos: Sequence[str | Path],
    *,
    suite: Suite = VBENCH,
    dimensions: Sequence[str] = (),
    custom: bool = False,
    prompts: str | Path | None = None,
    info: str | Path | None = None,
    images: str | Path | None = None,
    still: bool = False,
    python: str | None = None,
    device: str = "auto",
    timeout_s: float = TIMEOUT_S,
    cache: Path | None = None,
) -> Generator[Step | VBenchReport, None, None]:
    """Score `videos` with a package of VBench; yields steps and at last the report.

    Args:
        suite: one of `VBENCHES`.
        dimensions: those to take; all without any.
        custom: take videos of any prompts, in the dimensions that allow it, rather than the
            standard set of several for each of VBench's prompts.
        prompts: JSON file of VBench's own prompts by file name, where videos were made of longer
            ones.
        info: the suite's list of prompts; the environment's own without it.
        images: folder of the images that videos begin with, cut to their sides (VBench-I2V).
        still: score flickering of those videos alone that the package's filter says are still, five
            of each prompt's up to 25.
        python: an interpreter that has the package, rather than uv's environment.
        timeout_s: for each dimension.

    Raises:
        EvalError: an unknown dimension, no videos that the package can read, several kinds of
            files, no environment or one that does not start.
    """
    names = vbench_prompts.dimensions_of(dimensions, suite)
    wanted = [suite.dimensions[it] for it in names]
    if custom and not any(it.custom for it in suite.dimensions.values()):
        raise EvalError(f"{suite.title} takes videos of its own prompts alone: leave --custom out")
    if images is not None and not any(it.images for it in suite.dimensions.values()):
        raise EvalError(f"{suite.title} compares with no images: leave --images out")
    if images is not None and not Path(images).is_dir():
        raise EvalError(f"--images {images} is no folder: give that of the cut images")
    if still and FLICKER not in names:
        raise EvalError(f"--static-filter is for {FLICKER}, which is not asked for: leave it out")
    clips, rejected = find([Path(it) for it in videos])
    if not clips:
        raise EvalError(rejected[0].reason if rejected else "there are no VIDEOS")
    clips, unfit = readable(clips, suite)
    rejected += unfit
    unmatched: list[str] = []
    if prompts is not None:
        clips, unmatched = with_prompts(clips, Path(prompts))
    where = client.environment(python, suite)
    work = Path(tempfile.mkdtemp(prefix="kinora-vbench-"))
    results: dict[str, Result] = {}
    provenance: dict[str, Any] = {
        "suite": suite.title,
        "version": suite.version,
        "mode": "custom" if custom else "standard",
        "still_videos_alone": still,
        "samples": None if custom else suite.samples,
        "prompts_from_file": prompts is not None,
        "seeds": sorted({it.seed for it in clips if it.seed is not None}),
        "samplers": samplers(clips),
        "forms": sorted({it.form for it in clips}),
        "environment": where.identity,
    }
    try:
        listed, known_info = None, None if info is None else Path(info)
        if not custom:
            if known_info is None:
                known_info = client.about(where, suite, work, timeout_s)
            listed = vbench_prompts.read(known_info, suite)
            provenance["prompts_sha256"] = listed.sha256
        run = _Run(
            suite, where, clips, listed, known_info, None if images is None else Path(images),
            still, work, device, timeout_s, Cache(cache),
        )  # fmt: skip
        for index, dimension in enumerate(wanted):
            yield Step(index, len(wanted), dimension.name)
            results[dimension.name] = run.result(dimension)
    finally:
        # Logs of what failed are named in its reason.
        if not any(it.status == "failed" for it in results.values()):
            shutil.rmtree(work, ignore_errors=True)
    yield Step(len(wanted), len(wanted), None)
    provenance["coverage"] = {
        name: f"{it.details['videos']} of {it.details['expected']}"
        for name, it in results.items()
        if "videos" in it.details
    }
    ran = [it.details for it in results.values() if "device" in it.details]
    if ran:
        provenance |= {"device": ran[0]["device"], "versions": ran[0]["versions"]}
    raw = {name: it.score if it.status == "ok" else None for name, it in results.items()}
    unused = len(clips) - len({it.path for links in run.used.values() for it in links.values()})
    yield VBenchReport(
        results, suite.totals(raw), run.used, tuple(rejected), tuple(unmatched), unused, suite,
        provenance,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """What all dimensions share; `used` are dimensions' videos, by name."""

    suite: Suite
    where: client.Environment
    clips: Sequence[Clip]
    listed: vbench_prompts.Prompts | None
    info: Path | None
    images: Path | None
    still: bool
    work: Path
    device: str
    timeout_s: float
    cache: Cache
    used: dict[str, dict[str, Clip]] = field(default_factory=dict[str, dict[str, Clip]])

    def result(self, dimension: Dimension) -> Result:
        """One dimension's, from its videos or from before; adds the videos to `used`."""
        if self.listed is None and not dimension.custom:
            return skipped(f"{dimension.name} {NOT_CUSTOM}", applies=False)
        folder = self.work / dimension.name
        try:
            filtered = self.still and dimension.name == FLICKER
            staged = self._still(folder) if filtered else self._staged(dimension, folder / "videos")
        except EvalError as error:  # names that collide: of this dimension's videos alone
            return failed(f"{dimension.name}: {error}")
        if isinstance(staged, Result):
            return staged
        if filtered:
            kept = f"{len(staged.links)} of {staged.expected}"
            note = f"{FLICKER} of still videos alone, as the package's filter says: {kept}"
            dimension = replace(dimension, note=note)
        self.used[dimension.name] = staged.links
        if not staged.expected:
            return skipped(f"{dimension.name}: the list of prompts has none of its")
        if not staged.links:
            why = f"none of its {staged.expected} videos is there: {staged.missing[0]!r:.80} …"
            return skipped(f"{dimension.name}: {why}")
        needs = client.without_weights(dimension, self.suite)
        needs = needs or self._without_images(dimension, staged)
        if needs is not None:
            return needs
        key = self._key(dimension, staged)
        before = self.cache.get(key)
        if before is not None:
            return before
        result = self._scored(dimension, staged, folder)
        if result.status == "failed":
            result = self._without_broken(dimension, staged, result)
        if result.status in ("ok", "partial"):
            self.cache.put(key, result)
        return result

    def _scored(self, dimension: Dimension, staged: Staged, folder: Path) -> Result:
        info = None if self.listed is None else self.info
        if info is not None and self.suite.whole:
            info = vbench_prompts.only(info, staged.prompts, folder / self.suite.listed)
        return client.score(
            self.where, dimension, staged, folder, suite=self.suite, info=info,
            images=self.images if dimension.images else None,
            timeout_s=self.timeout_s, device=self.device,
        )  # fmt: skip

    def _without_broken(self, dimension: Dimension, staged: Staged, result: Result) -> Result:
        """The same of the videos that can be read, if it failed because others cannot.

        The package ends at the first of these.
        """
        broken: dict[Path, str] = {}
        for clip in staged.links.values():
            try:
                clip.frames()
            except EvalError as error:
                broken[clip.path] = str(error)
        folder = self.work / f"{dimension.name}-sound"
        sound = without(staged, broken, folder / "videos", self.suite)
        if not broken or not sound.links:
            return result
        again = self._scored(dimension, sound, folder)
        if again.status != "partial":
            return again
        why = f"{dimension.name}: {again.reason}; {next(iter(broken.values()))}"
        return replace(again, reason=why)

    def _still(self, folder: Path) -> Staged | Result:
        """Five still videos of each prompt, or why there are none."""
        dimension = self.suite.dimensions[FLICKER]
        needs = client.without_weights(replace(dimension, files=STILL_FILES), self.suite)
        if needs is not None:
            return needs
        candidates = self._staged(dimension, folder / "candidates", STILL_SAMPLES)
        if not candidates.links:
            return candidates
        key = ["still", *self._key(dimension, candidates)]
        told = self.cache.get(key)
        if told is None:
            told = client.still(
                self.where, candidates, folder, suite=self.suite, timeout_s=self.timeout_s,
                device=self.device,
            )  # fmt: skip
            if told.status != "ok":
                return told
            self.cache.put(key, told)
        flags = told.details["still"]
        count = self.suite.samples_in(FLICKER)
        found = still(candidates, flags, folder / "videos", count)
        if not found.links:
            return skipped(f"{FLICKER}: none of {len(flags)} videos is still, says the filter")
        return found

    def _staged(self, dimension: Dimension, folder: Path, count: int | None = None) -> Staged:
        if self.listed is None:
            return stage_custom(self.clips, folder, self.suite)
        count = count or self.suite.samples_in(dimension.name)
        prompts = self.listed.of([dimension.name])
        return stage(self.clips, prompts, folder, suite=self.suite, samples=count)

    def _without_images(self, dimension: Dimension, staged: Staged) -> Result | None:
        """Why a dimension cannot be scored, if images are missing."""
        if not dimension.images or self.listed is None:
            return None
        if self.images is None:
            return skipped(f"{dimension.name} {IMAGES}")
        names = [self.listed.images.get(it, f"{it}.jpg") for it in staged.prompts]
        gone = [it for it in names if not (self.images / it).is_file()]
        if gone:
            told = f"{len(gone)} of {len(names)} images are not in {self.images}"
            return skipped(f"{dimension.name}: {told}, the first {gone[0]!r:.80}")
        return None

    def _key(self, dimension: Dimension, staged: Staged) -> list[str]:
        digest = hashlib.sha256()
        for name, clip in sorted(staged.links.items()):
            digest.update(
                f"{name}\0{clip.prompt}\0{clip.sha256()}\n".encode(errors="surrogatepass")
            )
        if dimension.images and self.images is not None and self.listed is not None:
            for prompt in staged.prompts:
                image = self.images / self.listed.images.get(prompt, f"{prompt}.jpg")
                digest.update(f"{image.name}\0{sha256_of(image)}\n".encode())
        mode = "custom" if self.listed is None else self.listed.sha256
        run = (self.where.identity, self.device, digest.hexdigest())
        # The note tells the score apart from that of the same videos without the filter.
        what = (self.suite.name, self.suite.version, dimension.name, dimension.note)
        return [*what, mode, *run]
