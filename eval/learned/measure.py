"""LPIPS and CLIP score of a clip."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..clips import Clip, sha256_of
from ..fidelity import Frames, shape_words
from ..result import Result, failed, ok, skipped
from ..weights import Missing, need_of
from ..worldsuite import NO_PROMPT
from . import client
from .spec import CLIP_LICENCE, CLIP_MODEL, CLIP_SIZE, Tools

LEAST_SIDE = 32
"""Of frames for LPIPS: less than that AlexNet has no place for."""
_BATCH = 8


def lpips(made: Frames, reference: Frames, tools: Tools, *notes: str) -> Result:
    """LPIPS (AlexNet, version 0.1, frames in −1 … 1) of each frame; the mean is the score.

    Source: Zhang et al. 2018 (arXiv 1801.03924), by the authors' package, out of process.
    """
    if min(made.shape[1:3]) < LEAST_SIDE:
        return skipped(f"lpips needs sides of at least {LEAST_SIDE} px, not {shape_words(made)}")
    found = client.without("lpips", tools) or client.runner("lpips", tools)
    if isinstance(found, Result):
        return found
    paths = {name: str(client.scratch() / f"{name}.npy") for name in ("frames", "reference")}
    for path, frames in zip(paths.values(), (made, reference), strict=True):
        np.save(path, frames)
    told = found.ask(**paths)
    values: list[float] = told.get("values", [])
    if len(values) != len(made) or not all(map(math.isfinite, values)):
        return failed(f"lpips: {told.get('error', 'its values are not one finite one a frame')}")
    return ok(math.fsum(values) / len(values), *notes, frames=[round(it, 6) for it in values])


def clip_score(clip: Clip, frames: Frames, tools: Tools) -> Result:
    """100 · max(cos, 0) of a frame's and the prompt's CLIP embeddings, mean over frames.

    Source: Hessel et al. 2021 (arXiv 2104.08718), with 100 in place of 2.5, by transformers.
    A prompt of more than CLIP's 77 tokens is cut, which a note says.
    """
    if clip.prompt is None:
        return skipped(NO_PROMPT)
    loaded = _clip(tools)
    if isinstance(loaded, Result):
        return loaded
    import torch

    model, words, pictures, device = loaded
    longest = model.config.text_config.max_position_embeddings
    tokens = words(clip.prompt, return_tensors="pt", truncation=True, max_length=longest)
    whole = len(words(clip.prompt)["input_ids"])
    values: list[float] = []
    with torch.inference_mode():
        text = _embedding(model.get_text_features(**tokens.to(device)))
        for start in range(0, len(frames), _BATCH):
            batch = pictures(list(frames[start : start + _BATCH]), return_tensors="pt")
            image = _embedding(model.get_image_features(batch["pixel_values"].to(device)))
            values += torch.nn.functional.cosine_similarity(image, text).tolist()
    scores = [round(100 * max(it, 0.0), 6) for it in values]
    cut = f"clip_score of the first {longest} of {whole} tokens of a prompt"
    return ok(math.fsum(scores) / len(scores), *([cut] if whole > longest else []), frames=scores)


def clip_identity(tools: Tools) -> str:
    """Changes with the checkpoint; its name where it is not here."""
    from transformers.utils import cached_file

    try:
        found = cached_file(tools.clip, "model.safetensors", local_files_only=True)
    except (OSError, ValueError):
        return tools.clip
    return tools.clip if found is None else _hash(str(found))


@cache
def _hash(path: str) -> str:
    return sha256_of(Path(path))


def _embedding(found: Any) -> Any:
    """Releases of transformers differ in whether features come alone."""
    return found if hasattr(found, "shape") else found.pooler_output


@cache
def _clip(tools: Tools) -> tuple[Any, Any, Any, str] | Result:
    """Model, tokenizer, preprocessing and device; skipped where it is not on this disk."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    name, options = tools.clip, {"local_files_only": True}
    device = tools.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = cast("Any", CLIPModel).from_pretrained(name, use_safetensors=True, **options)
        words = cast("Any", CLIPTokenizer).from_pretrained(name, **options)
        pictures = cast("Any", CLIPImageProcessorPil).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        size, licence = (CLIP_SIZE, CLIP_LICENCE) if name == CLIP_MODEL else (None, None)
        missing: Missing = {
            "file": name, "address": f"https://huggingface.co/{name}", "size": size,
            "licence": licence, "command": f"hf download {name}",
        }  # fmt: skip
        return Result(
            "skipped",
            reason=f"{need_of('clip_score', [missing])}, or --clip FOLDER of another: {why}",
            details={"missing_weights": [missing]},
        )
    return model.eval().to(device), words, pictures, device
