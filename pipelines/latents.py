"""Latents on disk: what the autoencoder is about to decode, so that a failure there loses nothing.

A latents file is safetensors. Tensor `N.name` is argument `name` of the N-th call of `vae.decode`;
the metadata entry `kinora` holds the video's record and how to decode.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import SidecarError
from .sidecar import Record

Calls = list[dict[str, torch.Tensor]]
"""Tensor arguments by name, one dict for each call of `vae.decode`."""

SCHEMA = "kinora.latents/1"


class DecodeState(BaseModel):
    """What decoding depends on besides tensors and weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vae_dtype: str
    tiling: bool
    slicing: bool
    normalised: bool


class _Metadata(BaseModel):
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
    metadata = _Metadata(record=latents.record, decode=latents.state)
    return save(tensors, {"kinora": json.dumps(metadata.model_dump(by_alias=True))})


def read(path: Path) -> Latents:
    """Read a latents file. Raises `SidecarError` if it is not there, damaged or not ours."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SidecarError(f"there is no file {path}")
    try:
        with cast("Any", safe_open(path, framework="pt")) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise SidecarError(f"{path} is damaged or no latents file: {error}") from None
    try:
        known = _Metadata.model_validate_json(metadata.get("kinora", ""))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise SidecarError(f"{path} was not written by this version of Kinora: {reason}") from None
    count = 1 + max((int(key.partition(".")[0]) for key in tensors), default=-1)
    calls: Calls = [{} for _ in range(count)]
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        calls[int(index)][name] = tensor
    return Latents(known.record, known.decode, calls)
