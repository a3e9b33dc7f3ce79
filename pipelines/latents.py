"""Latents on disk: what the autoencoder is about to decode, so that a failure there loses nothing.

A latents file is safetensors. Tensor `N.name` is argument `name` of the N-th call of `vae.decode`;
the metadata entry `kinora` holds the video's record and how to decode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .cards import Precision
from .errors import SidecarError, explain_invalid
from .sidecar import Record, check_file

if TYPE_CHECKING:
    import torch

Calls: TypeAlias = "list[dict[str, torch.Tensor]]"
"""Tensor arguments by name, one dict for each call of `vae.decode`."""

SCHEMA = "kinora.latents/1"


class DecodeState(BaseModel):
    """What decoding depends on besides tensors and weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vae_dtype: Precision
    tiling: bool
    slicing: bool
    normalised: bool


class Header(BaseModel):
    """What a latents file says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["kinora.latents/1"] = Field(default=SCHEMA, alias="schema")
    record: Record
    decode: DecodeState


@dataclass(frozen=True, slots=True)
class Latents:
    """The content of a latents file."""

    record: Record
    state: DecodeState
    calls: Calls


def sha256(calls: Calls) -> str:
    """SHA-256 over names, types, shapes and values of all tensors."""
    import torch

    digest = hashlib.sha256()
    for index, call in enumerate(calls):
        for name in sorted(call):
            tensor = call[name].detach().cpu().contiguous()
            digest.update(f"{index}.{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_bytes(latents: Latents) -> bytes:
    """As the bytes of a safetensors file."""
    from safetensors.torch import save

    tensors = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, call in enumerate(latents.calls)
        for name, tensor in call.items()
    }
    metadata = Header(record=latents.record, decode=latents.state)
    return save(tensors, {"kinora": json.dumps(metadata.model_dump(by_alias=True))})


def read_header(path: Path) -> Header:
    """Read what a latents file says of itself, without torch; the tensors are not looked at.

    Raises `SidecarError` if it is not there, damaged or not ours.
    """
    with _opened(path, "np") as file:
        metadata = file.metadata() or {}
    try:
        return Header.model_validate_json(metadata.get("kinora", "{}"))
    except ValidationError as error:
        raise SidecarError(
            f"{path} was not written by this version of Kinora: {explain_invalid(error)}"
        ) from None


def read(path: Path) -> Latents:
    """Read a latents file. Raises `SidecarError` if it is not there, damaged or not ours."""
    header = read_header(path)
    with _opened(path, "pt") as file:
        calls = _calls({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    if calls is None or sha256(calls) != header.record.latents_sha256:
        raise SidecarError(f"{path} is damaged: its tensors are not those that its record names")
    return Latents(header.record, header.decode, calls)


@contextmanager
def _opened(path: Path, framework: str) -> Generator[Any, None, None]:
    """The safetensors file at `path`, whatever goes wrong told as a `SidecarError`."""
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with cast("Any", safe_open(path, framework=framework)) as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise SidecarError(f"{path} is damaged or no latents file: {error}") from None


def _calls(tensors: dict[str, torch.Tensor]) -> Calls | None:
    """The tensors by call; None if their names are not those that `to_bytes` gives."""
    calls: Calls = []
    for index in range(len(tensors)):
        start = f"{index}."
        found = {key[len(start) :]: it for key, it in tensors.items() if key.startswith(start)}
        if found:
            calls.append(found)
    return calls if calls and sum(map(len, calls)) == len(tensors) else None
