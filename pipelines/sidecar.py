"""The record of one video: `NAME.json` beside it, and the same inside the container.

The embedded copy lacks the time of the save stage, which begins with encoding it; everything else
is equal. The sidecar's own save time ends where the two files are put on disk. A record holds all
that is needed to make its video again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..accel.receipt import Receipt
from .cards import Card, Precision
from .errors import SidecarError, explain_invalid
from .events import STAGES, Stage
from .files import LATENTS_SUFFIX
from .media import read_comment
from .request import FORMATS, Resolved, Whole

SCHEMA = "kinora.run/1"
# The fields of a request that decide what a video shows.
_CONTENT = (
    *("prompt", "negative_prompt", "model", "width", "height", "frames", "steps", "guidance"),
    *("seed", "recipe", "image_sha256"),
)
_PACKAGES = ("kinora", "torch", "diffusers", "transformers")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(_Part):
    """Which weights made it, and which scheduler.

    `fingerprint` is `folder.fingerprint`; `scheduler` is a class of diffusers, `scheduler_sha256`
    hashes its settings. Earlier records have neither.
    """

    name: str
    pipeline: str
    repo: str | None
    fingerprint: str
    vae_dtype: Precision
    scheduler: str | None = None
    scheduler_sha256: str | None = None


class Machine(_Part):
    """What the last bits of a result depend on besides the request."""

    device: str
    threads: Whole
    versions: dict[str, str]


class Record(_Part):
    """The record of one video. Hashes are SHA-256 of raw values, not of the compressed file."""

    schema_: Literal["kinora.run/1"] = Field(default=SCHEMA, alias="schema")
    request: Resolved
    model: ModelRecord
    machine: Machine
    created: str
    latents_sha256: str
    frames_sha256: str | None = None
    receipt: Receipt | None = None

    @property
    def stages_s(self) -> dict[Stage, float]:
        """Seconds by stage, as the receipt has them."""
        told = {} if self.receipt is None else self.receipt.stages_s
        return {stage: told[stage] for stage in STAGES if stage in told}

    def timed(self, stages_s: Mapping[Stage, float]) -> Record:
        """The same with other times."""
        if self.receipt is None:
            return self
        receipt = self.receipt.model_copy(update={"stages_s": dict(stages_s)})
        return self.model_copy(update={"receipt": receipt})

    @model_validator(mode="before")
    @classmethod
    def _times_beside_the_receipt(cls, content: Any) -> Any:
        """Earlier records have their times beside the receipt; the first ones have none."""
        if not isinstance(content, Mapping) or "stages_s" not in content:
            return content
        given = dict(cast("Mapping[str, Any]", content))
        times, receipt = given.pop("stages_s"), given.get("receipt")
        if receipt is None:  # from before recipes: the stock pipeline
            receipt = {"recipe": {}, "strict": False, "steps": None, "attention": None}
        if isinstance(receipt, Mapping):
            given["receipt"] = {**cast("Mapping[str, Any]", receipt), "stages_s": times}
        return given

    @model_validator(mode="before")
    @classmethod
    def _sparse_from_the_start(cls, content: Any) -> Any:
        """Recipes of earlier records that name no dense beginning have none."""
        if not isinstance(content, Mapping):
            return content
        given = dict(cast("Mapping[str, Any]", content))
        for key in ("request", "receipt"):
            holder: Any = given.get(key)
            recipe: Any = holder.get("recipe") if isinstance(holder, Mapping) else None
            table: Any = recipe.get("attention") if isinstance(recipe, Mapping) else None
            if isinstance(table, Mapping) and "from_step" not in table:
                attention: Any = {**table, "from_step": 0.0}
                given[key] = {**holder, "recipe": {**recipe, "attention": attention}}
        return given

    def to_text(self, indent: int | None = None) -> str:
        """As JSON."""
        return json.dumps(self.model_dump(by_alias=True), indent=indent, ensure_ascii=False)


def model(
    card: Card, fingerprint: str, vae_dtype: Precision, scheduler: object = None
) -> ModelRecord:
    """Describe the weights of `card`, and the scheduler of its pipeline."""
    return ModelRecord(
        name=card.name,
        pipeline=card.pipeline,
        repo=card.repo,
        fingerprint=fingerprint,
        vae_dtype=vae_dtype,
        scheduler=None if scheduler is None else type(scheduler).__name__,
        scheduler_sha256=None if scheduler is None else _settings_sha256(scheduler),
    )


def _settings_sha256(scheduler: Any) -> str:
    """Of a scheduler's settings, without what diffusers notes of itself."""
    settings = {name: it for name, it in scheduler.config.items() if not name.startswith("_")}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def machine(device: str) -> Machine:
    """Describe this machine and its libraries."""
    import torch

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(device))
    else:
        name = "Apple GPU" if device == "mps" else _cpu_name()
    return Machine(device=name, threads=torch.get_num_threads(), versions=versions())


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{it: _version(it) for it in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"  # run from its folder, by a path


def now() -> str:
    """The time in UTC, as a record states it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(path: Path) -> Record:
    """The record of a sidecar, a media file or a latents file of ours.

    Raises `SidecarError` in one line if there is none or it is malformed.
    """
    check_file(path)
    if path.suffix.lower() == ".json":
        try:
            return parse(path.read_text(encoding="utf-8-sig"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise SidecarError(f"{path} cannot be read ({error})") from error
    if path.name.endswith(LATENTS_SUFFIX):
        raise SidecarError(f"{path} holds latents: finish them with `kinora decode {path}`")
    if path.suffix.lower().removeprefix(".") in FORMATS:
        return parse(read_comment(path), path)
    raise SidecarError(f"{path} is neither a sidecar (.json) nor a video or image made by Kinora")


def check_file(path: Path) -> None:
    """Raises `SidecarError` if `path` is no file, saying what it is instead."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise SidecarError(f"there is no file {path}") from None
    except OSError as error:
        raise SidecarError(f"{path} cannot be read ({error.strerror or error})") from None
    if stat.S_ISDIR(mode):
        raise SidecarError(f"{path} is a folder: give a file")


def parse(text: str, origin: Path) -> Record:
    """Check the JSON `text` that came from `origin`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SidecarError(f"{origin} holds no readable record: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    version = re.fullmatch(r"kinora\.run/([1-9][0-9]{0,5})", str(schema))
    if version is not None and int(version[1]) > int(SCHEMA.rpartition("/")[2]):
        raise SidecarError(f"{origin} was written by a newer Kinora ({schema}): update Kinora")
    if schema != SCHEMA:
        raise SidecarError(
            f"{origin} is no Kinora sidecar: its schema is {schema!r:.80}, not {SCHEMA!r}"
        )
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        raise SidecarError(f"{origin} is a malformed sidecar: {explain_invalid(error)}") from None


def repeats(original: Record, request: Resolved) -> bool:
    """Whether `request`, for one video, asks for what `original` shows."""
    return all(getattr(original.request, name) == getattr(request, name) for name in _CONTENT)


def differences(original: Record, model: ModelRecord, here: Machine) -> list[str]:
    """Why a repeat may not equal the original: what has changed since, in words."""
    changed: list[str] = []
    if original.model.fingerprint != model.fingerprint:
        changed.append("the model's weights")
    before, now = original.model, model
    if None not in (before.scheduler, now.scheduler) and (
        (before.scheduler, before.scheduler_sha256) != (now.scheduler, now.scheduler_sha256)
    ):
        changed.append("the scheduler or its settings")
    for package, version in original.machine.versions.items():
        if here.versions.get(package) != version:
            changed.append(f"{package} {version} → {here.versions.get(package)}")
    if original.machine.device != here.device:
        changed.append(f"{original.machine.device} → {here.device}")
    if original.machine.threads != here.threads:
        changed.append(f"{original.machine.threads} → {here.threads} CPU threads")
    return changed


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
