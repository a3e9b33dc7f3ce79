"""Runs of a recipe, and with which dense run each may be compared.

Two runs say something of a recipe only if nothing but the recipe differs. What differs otherwise
(seed, sampler, weights, machine, the kernel of dense calls) is a refusal in one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..pipelines.sidecar import Record
from .clips import Clip, EvalError, find

Identity: TypeAlias = tuple[str, int]
"""Prompt and seed."""

STOCK = "stock"
_SAMPLER = (
    *("model", "width", "height", "frames", "steps", "guidance", "negative_prompt", "dtype"),
    *("fps", "format"),
)


@dataclass(frozen=True, slots=True)
class Runs:
    """The videos of one recipe in a folder, by prompt and seed. `recipe` is its table."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    clips: Mapping[Identity, Clip]

    @property
    def dense(self) -> bool:
        """Whether every step and every pair of tokens is computed."""
        return is_dense(self.recipe)

    @property
    def dense_kernel(self) -> str:
        """Of dense calls, as the recipe asks."""
        return str(self.recipe.get("dense_kernel", STOCK))


def is_dense(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe leaves nothing out: it may name a kernel."""
    return not {"attention", "steps"} & set(recipe)


def read_runs(name: str, folder: Path, videos: Sequence[Path] | None = None) -> Runs:
    """The runs in `folder`, or of those the `videos`.

    Raises:
        EvalError: no videos, one without a record, several recipes, or a prompt and seed twice.
    """
    if videos is not None and not videos:
        raise EvalError(f"{name} has no videos in {folder}: make at least one")
    if not folder.is_dir():
        raise EvalError(f"{folder} of the recipe {name} is no folder: give that of its videos")
    clips, rejected = find([folder] if videos is None else videos)
    if rejected:
        raise EvalError(f"{name}: {rejected[0].reason}")
    found: dict[Identity, Clip] = {}
    first: Clip | None = None
    for clip in clips:
        if clip.record is None or clip.identity is None:
            raise EvalError(
                f"{clip.path} has no record of how it was made: take it out of {folder}"
            )
        first = first or clip
        if _recipe(clip) != _recipe(first):
            raise EvalError(
                f"{clip.path} and {first.path} are of different recipes: give each its own folder"
            )
        if clip.identity in found:
            other = found[clip.identity].path
            raise EvalError(f"{clip.path} and {other} have one prompt and seed: take one out")
        found[clip.identity] = clip
    assert first is not None
    return Runs(name, folder, _recipe(first), found)


def record_of(clip: Clip) -> Record:
    """The record, which `read_runs` has seen to."""
    assert clip.record is not None
    return clip.record


def differences(fast: Record, dense: Record) -> Iterator[str]:
    """What differs between two runs besides the recipe, in words; kernels apart."""
    for name in _SAMPLER:
        one, other = getattr(fast.request, name), getattr(dense.request, name)
        if one != other:
            yield f"{name} {_said(one)}, dense {_said(other)}"
    if fast.model.fingerprint != dense.model.fingerprint:
        yield f"weights {fast.model.fingerprint:.19}, dense {dense.model.fingerprint:.19}"
    one, other = fast.model, dense.model
    if None not in (one.scheduler, other.scheduler):  # earlier records do not tell
        if one.scheduler != other.scheduler:
            yield f"scheduler {one.scheduler}, dense {other.scheduler}"
        elif one.scheduler_sha256 != other.scheduler_sha256:
            settings = [str(it.scheduler_sha256)[:12] for it in (one, other)]
            yield f"{one.scheduler} with settings {settings[0]}…, dense {settings[1]}…"
    if fast.model.vae_dtype != dense.model.vae_dtype:
        yield f"decoder in {fast.model.vae_dtype}, dense in {dense.model.vae_dtype}"
    if fast.machine.device != dense.machine.device:
        yield f"made on {fast.machine.device}, dense on {dense.machine.device}"
    if fast.machine.threads != dense.machine.threads:
        yield f"made by {fast.machine.threads} threads, dense by {dense.machine.threads}"
    for name, version in fast.machine.versions.items():
        other = dense.machine.versions.get(name)
        if version != other:
            yield f"{name} {version}, dense {other}"


def dense_kernels(record: Record) -> set[str]:
    """The kernels that dense calls ran by; empty where all calls were sparse."""
    attention = record.receipt and record.receipt.attention
    if attention is None:
        return {STOCK}
    dense = attention.calls - sum(attention.kernels.values())
    named = {name for name, count in attention.dense_kernels.items() if count}
    return named | ({STOCK} if dense > sum(attention.dense_kernels.values()) else set())


def refusal(fast: Clip, dense: Clip, *, kernels: bool) -> str | None:
    """Why two runs cannot be compared, naming the file; None where they can.

    With `kernels` those of dense calls, as the receipts tell them, must be the same.
    """
    one, other = record_of(fast), record_of(dense)
    told = next(differences(one, other), None)
    if told is not None:
        return f"{fast.path}: {told}"
    if one.receipt is None or other.receipt is None:
        return f"{(fast if one.receipt is None else dense).path} has no receipt of what ran"
    if kernels:
        ours, theirs = dense_kernels(one), dense_kernels(other)
        if not ours <= theirs:
            return (
                f"{fast.path}: dense calls by {_kernels(ours)}, those of {dense.path.parent.name} "
                f"by {_kernels(theirs)}; compare with a dense recipe of the same dense_kernel"
            )
    return None


def baseline_of(runs: Runs, all_runs: Mapping[str, Runs]) -> Runs:
    """The dense runs that its times are compared with: by the same kernel, else the stock ones.

    What a method gains is told apart from what a faster kernel gains. A dense recipe, whose gain is
    its kernel, is compared with the first runs, as is any without its like.
    """
    first = next(iter(all_runs.values()))
    if runs.dense:
        return first
    alike = [it for it in all_runs.values() if it.dense and it.dense_kernel == runs.dense_kernel]
    return alike[0] if alike else first


def _recipe(clip: Clip) -> dict[str, Any]:
    asked = record_of(clip).request
    return asked.recipe if asked.accelerated() else {}


def _said(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _kernels(names: set[str]) -> str:
    return f"the {' and '.join(sorted(names))} kernel{'s' if len(names) > 1 else ''}"
