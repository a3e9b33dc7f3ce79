"""A folder of links, named as VBench looks for videos: `PROMPT-0.mp4` to `PROMPT-4.mp4`.

The package takes a name for the prompt and passes over what it does not find, so names are checked
here: that none is too long, that no two fall together where the file system ignores case (one
pair of its prompts would), and which are not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..clips import Clip, EvalError, Rejected
from .suites import VBENCH, Suite

LONGEST_NAME_BYTES = 255
_NUMBER = re.compile(r"(.*)-(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Staged:
    """Links by name, with the clips that they lead to. `missing` are names that have none;
    `unused` are clips whose prompt is not asked for, or beyond the samples, or that are given only
    together with others which are missing; `prompts` are those of the links."""

    folder: Path
    links: dict[str, Clip]
    missing: tuple[str, ...]
    unused: tuple[Clip, ...]
    prompts: tuple[str, ...] = ()

    @property
    def expected(self) -> int:
        """How many videos a complete set has."""
        return len(self.links) + len(self.missing)


def stage(
    clips: Sequence[Clip],
    prompts: Sequence[str],
    folder: Path,
    *,
    suite: Suite = VBENCH,
    samples: int | None = None,
) -> Staged:
    """Link videos of `prompts` into `folder`, those of one prompt numbered by their seeds.

    All must be `readable`. A video that carries no record and has no prompt in a file is taken by
    its name, `PROMPT-i`. `samples` are the suite's if not given.

    Raises:
        EvalError: several kinds of files, one seed or number twice, a name that is too long or
            falls together with another.
    """
    count = suite.samples if samples is None else samples
    suffix = _suffix(clips, suite)
    wanted = _stems(prompts, suite)
    samples_of: dict[str, dict[int, Clip]] = {}
    unused: list[Clip] = []
    for clip in clips:
        prompt, number = _prompt_and_number(clip)
        stem = prompt[: suite.name_length]
        # A name may hold less than the prompt does; a record never.
        if stem not in wanted or (clip.prompt is not None and prompt != wanted[stem]):
            unused.append(clip)
            continue
        taken = samples_of.setdefault(stem, {})
        if number in taken:
            raise EvalError(
                f"{clip.path} and {taken[number].path} are both number {number} of {prompt!r:.80}: "
                "give each prompt's videos different seeds"
            )
        taken[number] = clip
    links: dict[str, Clip] = {}
    missing: list[str] = []
    for stem in wanted:
        in_order = [clip for _, clip in sorted(samples_of.get(stem, {}).items())]
        unused += in_order[count:]
        names = [f"{stem}-{index}{suffix}" for index in range(count)]
        if suite.whole and len(in_order) < count:
            missing += names
            unused += in_order
            continue
        links.update(zip(names, in_order, strict=False))
        missing += names[len(in_order) :]
    check_names(list(links), ignores_case=_ignores_case(folder))
    _link(links, folder)
    given = {name.rpartition("-")[0] for name in links}
    complete = tuple(wanted[it] for it in wanted if it in given)
    return Staged(folder, links, tuple(missing), tuple(unused), complete)


def _stems(prompts: Sequence[str], suite: Suite) -> dict[str, str]:
    """Prompts by what names of their videos begin with. Raises `EvalError` where two are one."""
    found: dict[str, str] = {}
    for prompt in prompts:
        other = found.setdefault(prompt[: suite.name_length], prompt)
        if other != prompt:
            raise EvalError(
                f"two prompts of {suite.title} have the same first {suite.name_length} characters, "
                f"which its names are: {prompt!r:.80}"
            )
    return found


def stage_custom(clips: Sequence[Clip], folder: Path, suite: Suite = VBENCH) -> Staged:
    """Link videos of any prompts, by number."""
    suffix = _suffix(clips, suite)
    links = {f"{index:06d}{suffix}": clip for index, clip in enumerate(clips)}
    _link(links, folder)
    return Staged(folder, links, (), ())


def without(staged: Staged, broken: Collection[Path], folder: Path, suite: Suite) -> Staged:
    """The same without some clips, in another folder; names stay, and theirs are missing."""
    gone = {name for name, clip in staged.links.items() if clip.path in broken}
    if suite.whole and staged.prompts:
        heads = {name.rpartition("-")[0] for name in gone}
        gone = {it for it in staged.links if it.rpartition("-")[0] in heads}
    links = {name: clip for name, clip in staged.links.items() if name not in gone}
    _link(links, folder)
    left = {name.rpartition("-")[0] for name in links}
    prompts = tuple(it for it in staged.prompts if it[: suite.name_length] in left)
    missing = (*staged.missing, *sorted(gone))
    return Staged(folder, links, missing, staged.unused, prompts)


def still(candidates: Staged, flags: Mapping[str, bool], folder: Path, count: int) -> Staged:
    """Of each prompt's candidates the first `count` that `flags` says are still, numbered anew.

    Candidates without prompts of their own stay under their names, as many as are still.
    """
    kept = {name: clip for name, clip in candidates.links.items() if flags.get(name)}
    if not candidates.prompts:
        _link(kept, folder)
        return Staged(folder, kept, (), ())
    suffix = Path(next(iter(candidates.links))).suffix
    links: dict[str, Clip] = {}
    missing: list[str] = []
    heads = dict.fromkeys(it.rpartition("-")[0] for it in (*candidates.links, *candidates.missing))
    for head in heads:
        its = [clip for name, clip in kept.items() if name.rpartition("-")[0] == head][:count]
        names = [f"{head}-{index}{suffix}" for index in range(count)]
        links.update(zip(names, its, strict=False))
        missing += names[len(its) :]
    _link(links, folder)
    return Staged(folder, links, tuple(missing), candidates.unused, candidates.prompts)


def check_names(names: Sequence[str], *, ignores_case: bool) -> None:
    """Raises `EvalError` for names that no file, or not each its own file, can have."""
    seen: dict[str, str] = {}
    for name in names:
        length = len(name.encode())
        if length > LONGEST_NAME_BYTES:
            raise EvalError(
                f"{name[:60]}… has {length} bytes for a name, of {LONGEST_NAME_BYTES} allowed"
            )
        if "/" in name or "\0" in name:
            raise EvalError(f"{name!r:.80} is no name for a file")
        other = seen.setdefault(name.casefold() if ignores_case else name, name)
        if other != name:
            raise EvalError(
                f"{name!r} and {other!r} are one file here, where case does not matter: "
                "set TMPDIR to a file system where it does"
            )


def readable(clips: Sequence[Clip], suite: Suite) -> tuple[list[Clip], list[Rejected]]:
    """Clips that the packages can be given, and the others.

    Raises `EvalError` where there are none, or they are of several kinds.
    """
    told = [(clip, _unfit(clip, suite)) for clip in clips]
    fit = [clip for clip, why in told if why is None]
    rejected = [Rejected(clip.path, why) for clip, why in told if why is not None]
    if not fit and rejected:
        raise EvalError(rejected[0].reason)
    _suffix(fit, suite)
    return fit, rejected


def _unfit(clip: Clip, suite: Suite) -> str | None:
    if clip.path.suffix.lower() not in suite.kinds:  # of a png they would read the first frame
        return (
            f"{suite.title} reads {' and '.join(suite.kinds)}, not {clip.path}: generate with "
            "--format mp4, or `kinora decode` kept latents again"
        )
    try:
        clip.path.open("rb").close()
    except OSError as error:
        return f"{clip.path} cannot be read ({error.strerror or error})"
    return None


def _suffix(clips: Sequence[Clip], suite: Suite) -> str:
    """Of all clips."""
    found = sorted({clip.path.suffix.lower() for clip in clips})
    if len(found) > 1:
        told = " and ".join(found)
        raise EvalError(f"{suite.title} takes one kind of file at a time, not {told}")
    return found[0] if found else suite.kinds[0]


def _prompt_and_number(clip: Clip) -> tuple[str, int]:
    named = _NUMBER.fullmatch(clip.path.stem)
    number = clip.seed if clip.seed is not None else int(named[2]) if named else 0
    if clip.prompt is not None:
        return clip.prompt, number
    return (named[1], number) if named else (clip.path.stem, 0)


def _ignores_case(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".kinora-Case"
    probe.touch()
    try:
        return (folder / ".kinora-case").exists()
    finally:
        probe.unlink()


def _link(links: dict[str, Clip], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, clip in links.items():
        os.symlink(clip.path.resolve(), folder / name)
