"""Videos with sidecars as Kinora makes them, written without a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from kinora.accel.receipt import Receipt
from kinora.pipelines import cards
from kinora.pipelines.media import encode
from kinora.pipelines.request import Request, resolve
from kinora.pipelines.sidecar import Machine, ModelRecord, Record

WORLDLY = "a red circle moving left over a black background"
HOSTILE = '<img src=x onerror="window.hacked = 1"><b>bold</b>'
BALANCED: dict[str, Any] = {"title": "x", "attention": {"method": "blade"}}


def film(
    folder: Path,
    name: str,
    *,
    prompt: str = WORLDLY,
    seed: int = 0,
    recipe: dict[str, Any] | None = None,
    level: int = 20,
    size: int = 64,
    frames: int = 5,
    content: bytes | None = None,
) -> Path:
    """A grey video, or one of that `content`, with its sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = Request(prompt=prompt, seed=seed, width=size, height=size, frames=frames)
    request = resolve(asked, cards.find("kinora-tiny"))
    stages = {"load": 0.0, "text": 0.1, "denoise": 2.0, "decode": 0.2, "save": 0.1}
    receipt = Receipt(recipe=recipe or {}, strict=False, steps=2, attention=None, stages_s=stages)
    model = ModelRecord(name="m", pipeline="p", repo=None, fingerprint="f", vae_dtype="float32")
    record = Record(
        request=request.model_copy(update={"recipe": recipe or {}}), model=model,
        machine=Machine(device="cpu", threads=1, versions={}), created="2026-01-01T00:00:00Z",
        latents_sha256=hashlib.sha256(name.encode()).hexdigest(), receipt=receipt,
    )  # fmt: skip
    path = folder / f"{name}.mp4"
    grey = np.full((frames, size, size, 3), level, np.uint8)
    path.write_bytes(encode(grey, "mp4", 16, "") if content is None else content)
    path.with_suffix(".json").write_text(record.to_text(), "utf-8")
    return path
