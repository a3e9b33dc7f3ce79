"""Loads a model: from its card to a stock diffusers pipeline on a device.

Safetensors only, no remote code, no download. `place` decides device and precision, `Shelf` keeps
the model that was loaded last so that the next request can use it.
"""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .cards import Card
from .errors import ModelError
from .folder import ModelFolder, WeightFile, fingerprint


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a card as they lie on this disk, verified to be whole."""

    card: Card
    folder: ModelFolder
    files: list[WeightFile]
    variant: str | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model runs and in which precision."""

    device: str
    dtype: str
    vae_dtype: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline ready to run. `fingerprint` names the weights it was loaded from."""

    weights: Weights
    place: Place
    pipe: Any
    fingerprint: str

    @property
    def card(self) -> Card:
        """The model's card."""
        return self.weights.card


class Shelf:
    """Holds one loaded model for whoever makes several requests; the caller owns it."""

    def __init__(self) -> None:
        self._held: Loaded | None = None

    def holds(self, weights: Weights, place: Place) -> bool:
        """Whether this model is here, at this place."""
        held = self._held
        return held is not None and _same(held, weights, place)

    def take(self, weights: Weights, place: Place) -> Loaded:
        """The model from the shelf, or loaded now in place of the one that was there."""
        held = self._held
        if held is not None and _same(held, weights, place):
            return held
        if held is not None:
            self._held = held = None
            gc.collect()
        self._held = loaded = load(weights, place)
        return loaded


def _same(held: Loaded, weights: Weights, place: Place) -> bool:
    return held.weights.folder.path == weights.folder.path and held.place == place


def locate(card: Card) -> Weights:
    """Find and verify the weights of `card` on this disk.

    Raises `ModelError`: absent (with the command that fetches them and their size), or damaged.
    """
    path = card.folder if card.folder is not None else _snapshot(card)
    if path is None or not path.is_dir():
        raise ModelError(_absent(card))
    folder = ModelFolder.open(path)
    files, variant = folder.check()
    return Weights(card, folder, files, variant)


def _snapshot(card: Card) -> Path | None:
    """The newest snapshot of the card's repository in the Hugging Face cache, if there is one."""
    if card.repo is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(card.repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _absent(card: Card) -> str:
    if card.repo is None:
        return (
            f"the weights of {card.name} are not in this installation ({card.folder}): "
            "install Kinora from a release or a full clone, or give --model a path"
        )
    size = "" if card.download_gb is None else f" (about {card.download_gb:g} GB)"
    return (
        f"the weights of {card.name} are not on this machine: "
        f"fetch them with `{card.download_command()}`{size}"
    )


def place(card: Card, device: str, dtype: str) -> Place:
    """Settle "auto": the first accelerator there is, and the precision the card wants on it.

    Raises `ModelError` if a named device is not there. On a CPU "auto" is float32.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if device == "cuda":
        device = "cuda:0"
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if cuda else 0))]
    if mps:
        there.append("mps")
    if device not in there:
        raise ModelError(f"there is no device {device} here: choose from {', '.join(there)}")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else card.dtype
    return Place(device, dtype, card.vae_dtype or dtype)


def load(weights: Weights, place: Place) -> Loaded:
    """Load the stock pipeline. Raises `ModelError` with the library's reason in one line."""
    import torch

    pipeline = pipeline_class(weights.folder)
    dtypes = {"default": getattr(torch, place.dtype), "vae": getattr(torch, place.vae_dtype)}
    options: dict[str, Any] = {"dtype": dtypes, "use_safetensors": True, "local_files_only": True}
    if weights.variant is not None:
        options["variant"] = weights.variant
    if "add_watermarker" in inspect.signature(pipeline.__init__).parameters:
        options["add_watermarker"] = False  # frames must not depend on an optional package
    try:
        pipe = pipeline.from_pretrained(str(weights.folder.path), **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{weights.folder.path} cannot be loaded: {reason}") from error
    pipe.to(torch.device(place.device))
    return Loaded(weights, place, pipe, fingerprint(weights.files))


def pipeline_class(folder: ModelFolder) -> Any:
    """The diffusers class of a folder; refuses classes that Kinora cannot drive from text."""
    import diffusers

    found = getattr(diffusers, folder.pipeline, None)
    if found is None or not inspect.isclass(found):
        raise ModelError(
            f"{folder.path} needs the pipeline {folder.pipeline}, "
            f"which diffusers {diffusers.__version__} does not have"
        )
    if "vae" not in folder.parts:
        raise ModelError(f"{folder.pipeline} has no autoencoder (vae), which Kinora decodes with")
    accepted = call_parameters(found)
    if "prompt" not in accepted or {"image", "video", "mask_image"} & accepted:
        raise ModelError(f"{folder.pipeline} does not make pictures from text alone: pick another")
    if "callback_on_step_end" not in accepted:
        raise ModelError(f"{folder.pipeline} reports no steps, so Kinora could not stop it")
    return cast("Any", found)


def call_parameters(pipeline: Any) -> set[str]:
    """Names that a pipeline's `__call__` accepts."""
    return set(inspect.signature(pipeline.__call__).parameters)
