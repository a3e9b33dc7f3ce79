"""A folder of links, named as VBench looks for videos: `PROMPT-0.mp4` to `PROMPT-4.mp4`.

The package takes a name for the prompt and passes over what it does not find, so names are checked
here: that none is too long, that no two fall together where the file system ignores case (one
pair of its prompts would), and which are not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..clips import Clip, EvalError
from .spec import SAMPLES

LONGEST_NAME_BYTES = 255
READABLE = (".mp4", ".gif")
"""What the package reads as a video; of a png it takes the first frame."""
_NUMBER = re.compile(r"(.*)-(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Staged:
    """Links by name, with the clips that they lead to. `missing` are names that have none;
    `unused` are clips whose prompt is not asked for, or beyond the samples."""

    folder: Path
    links: dict[str, Clip]
    missing: tuple[str, ...]
    unused: tuple[Clip, ...]

    @property
    def expected(self) -> int:
        """How many videos a complete set has."""
        return len(self.links) + len(self.missing)


def stage(
    clips: Sequence[Clip], prompts: Sequence[str], folder: Path, *, samples: int = SAMPLES
) -> Staged:
    """Link videos of `prompts` into `folder`, those of one prompt numbered by their seeds.

    A video that carries no record and has no prompt in a file is taken by its name, `PROMPT-i`.

    Raises:
        EvalError: a video that the package cannot read, several kinds of files, one seed or number
            twice, a name that is too long or falls together with another.
    """
    suffix = _suffix(clips)
    wanted = dict.fromkeys(prompts)
    samples_of: dict[str, dict[int, Clip]] = {}
    unused: list[Clip] = []
    for clip in clips:
        prompt, number = _prompt_and_number(clip)
        if prompt not in wanted:
            unused.append(clip)
            continue
        taken = samples_of.setdefault(prompt, {})
        if number in taken:
            raise EvalError(
                f"{clip.path} and {taken[number].path} are both number {number} of {prompt!r:.80}: "
                "give each prompt's videos different seeds"
            )
        taken[number] = clip
    links: dict[str, Clip] = {}
    missing: list[str] = []
    for prompt in wanted:
        in_order = [clip for _, clip in sorted(samples_of.get(prompt, {}).items())]
        unused += in_order[samples:]
        for index in range(samples):
            name = f"{prompt}-{index}{suffix}"
            if index < len(in_order):
                links[name] = in_order[index]
            else:
                missing.append(name)
    check_names(list(links), ignores_case=_ignores_case(folder))
    _link(links, folder)
    return Staged(folder, links, tuple(missing), tuple(unused))


def stage_custom(clips: Sequence[Clip], folder: Path) -> Staged:
    """Link videos of any prompts, by number."""
    suffix = _suffix(clips)
    links = {f"{index:06d}{suffix}": clip for index, clip in enumerate(clips)}
    _link(links, folder)
    return Staged(folder, links, (), ())


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


def _suffix(clips: Sequence[Clip]) -> str:
    found = sorted({clip.path.suffix.lower() for clip in clips})
    for suffix in found:
        if suffix not in READABLE:
            clip = next(it for it in clips if it.path.suffix.lower() == suffix)
            raise EvalError(
                f"VBench reads {' and '.join(READABLE)}, not {clip.path}: generate with --format "
                "mp4, or `kinora decode` kept latents again"
            )
    if len(found) > 1:
        raise EvalError(f"VBench takes one kind of file at a time, not {' and '.join(found)}")
    return found[0] if found else READABLE[0]


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
