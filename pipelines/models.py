"""Loads a model: from its card to a stock diffusers pipeline on a device.

Safetensors only, no remote code, no download. `place` decides device and precision, `Shelf` keeps
the model that was loaded last so that the next request can use it.
"""

from __future__ import annotations

import gc
import inspect
import os
import shlex
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from .cards import Card, Precision
from .errors import Cancelled, KinoraError, ModelError
from .folder import ModelFolder, WeightFile, fingerprint, reading, takes_image

if TYPE_CHECKING:
    from .encoding import Encodings


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a card as they lie on this disk, verified to be whole."""

    card: Card
    folder: ModelFolder
    files: list[WeightFile]
    variant: str | None

    @property
    def numel(self) -> dict[str, int]:
        """Numbers of weights by part."""
        counts = Counter[str]()
        for file in self.files:
            counts[file.part] += file.numel
        return dict(counts)


@dataclass(frozen=True, slots=True)
class Outline:
    """What predictions need of a model: its configs, numbers of weights by part, and their files.

    `absent` says why it could not run: its weights are not here.
    """

    folder: ModelFolder
    numel: dict[str, int]
    absent: str | None
    files: tuple[WeightFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model runs and in which precision."""

    device: str
    dtype: Precision
    vae_dtype: Precision


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline ready to run. `fingerprint` names the weights it was loaded from.

    It knows no card: two cards, with defaults of their own, can name the same folder.
    """

    folder: Path
    place: Place
    pipe: Any
    fingerprint: str


def _no_check() -> None:
    """For whoever does not want to stop."""


class Shelf:
    """Holds one loaded model for whoever makes several requests; the caller owns it.

    A pipeline can serve one run at a time: hold it `reserved` from `holds` to the end of the run.
    """

    def __init__(self) -> None:
        self._held: Loaded | None = None
        self._lock = Lock()
        self.encodings: Encodings | None = None
        """Of texts, by the model that is here."""

    @contextmanager
    def reserved(self, check: Callable[[], None]) -> Generator[None, None, None]:
        """Keep other runs off the shelf; while waiting for one, `check` may raise to give up."""
        while not self._lock.acquire(timeout=0.1):
            check()
        try:
            yield
        finally:
            self._lock.release()

    def holds(self, weights: Weights, place: Place) -> bool:
        """Whether this model is here, at this place."""
        held = self._held
        return held is not None and (held.folder, held.place) == (weights.folder.path, place)

    def take(self, weights: Weights, place: Place, check: Callable[[], None] = _no_check) -> Loaded:
        """The model from the shelf, or loaded now in place of the one that was there."""
        if self._held is not None and self.holds(weights, place):
            return self._held
        if self._held is not None:
            self._held = self.encodings = None
            gc.collect()
        from .encoding import Encodings

        self._held, self.encodings = load(weights, place, check), Encodings()
        return self._held


def locate(card: Card) -> Weights:
    """Find and verify the weights of `card` on this disk.

    Raises `ModelError`: absent or half downloaded (with the command that fetches them and their
    size), or damaged (with the file, and the commands that fetch it anew).
    """
    path = card.folder if card.folder is not None else _snapshot(card)
    with reading(path or Path()):
        if path is None or not path.is_dir():
            raise ModelError(_absent(card))
    try:
        folder = ModelFolder.open(path)
        files, variant = folder.check()
    except ModelError as error:
        if card.folder is not None:
            raise
        told = f"{_absent(card, 'not whole')}, which keeps the files that are here ({error})"
        if error.damaged is not None:
            # A download takes a file that is there for whole, and a link in the cache for the file.
            file = shlex.quote(os.path.realpath(error.damaged))
            told = f"{error}: `rm {file}`, then `{card.download_command()}`, which keeps the others"
        raise ModelError(told) from error
    return Weights(card, folder, files, variant)


def outline(card: Card) -> Outline:
    """What is known of the model of `card`, if need be without its weights.

    Without them a registered model is described by its card, a folder by its configs. Raises
    `ModelError` where those say too little, or where weights are damaged.
    """
    try:
        weights = locate(card)
    except ModelError as error:
        absent = str(error)
        if card.configs:
            return _told_by(card, absent)
        if card.folder is None or not card.folder.is_dir():
            raise
        folder = ModelFolder.open(card.folder)
        if not folder.bare():
            raise
        return Outline(folder, _counted(folder), absent)
    return Outline(weights.folder, weights.numel, None, tuple(weights.files))


def _told_by(card: Card, absent: str) -> Outline:
    parts = {part: str(config["_class_name"]) for part, config in card.configs.items()}
    denoiser = next(part for part in parts if part != "vae")
    billions = {denoiser: card.params_b or 0.0, **card.others_b}
    folder = ModelFolder(Path(card.repo or card.name), card.pipeline, parts, card.configs)
    return Outline(folder, {part: round(it * 1e9) for part, it in billions.items()}, absent)


def _counted(folder: ModelFolder) -> dict[str, int]:
    """Numbers of weights by part, from models that are built without memory for them."""
    import diffusers
    import torch

    counts: dict[str, int] = {}
    for part in folder.weighty:
        kind, config = _class_of(folder, part), folder.config(part)
        with _loading(folder.path / part), torch.device("meta"):
            if issubclass(kind, diffusers.ModelMixin):
                module: Any = cast("Any", kind).from_config(config)
            else:
                module = kind(kind.config_class.from_dict(config))
        counts[part] = sum(it.numel() for it in module.parameters())
    return counts


def _snapshot(card: Card) -> Path | None:
    """The newest snapshot of the card's repository in the Hugging Face cache, if there is one.

    It may lack files: those of an interrupted download, or some that no pipeline needs.
    """
    if card.repo is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(card.repo, local_files_only=True))
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        return None if partial is None else Path(partial)


def _absent(card: Card, state: str = "not") -> str:
    if card.repo is None:
        return (
            f"the weights of {card.name} are not in this installation ({card.folder}): "
            "install Kinora from a release or a full clone, or give --model a path"
        )
    size = "" if card.download_gb is None else f" (about {card.download_gb:g} GB)"
    return (
        f"the weights of {card.name} are {state} on this machine: "
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
    precision = cast("Precision", dtype)
    return Place(device, precision, card.vae_dtype or precision)


def load(weights: Weights, place: Place, check: Callable[[], None] = _no_check) -> Loaded:
    """Load the stock pipeline; `check` is called between its parts and may raise to stop.

    Raises `ModelError` with the library's reason in one line, or if a weight is not in the files:
    the libraries would go on with a random one.
    """
    import torch

    check()
    folder = weights.folder
    pipeline = pipeline_class(folder)
    check()
    takes = inspect.signature(pipeline.__init__).parameters
    parts: dict[str, Any] = {}
    for name in dict.fromkeys(file.part for file in weights.files if file.part in takes):
        dtype = place.vae_dtype if name == "vae" else place.dtype
        parts[name] = load_part(weights, name, dtype)
        check()
    if "add_watermarker" in takes:
        parts["add_watermarker"] = False  # frames must not depend on an optional package
    with _loading(folder.path):
        pipe = pipeline.from_pretrained(str(folder.path), local_files_only=True, **parts)
        check()
        pipe.to(torch.device(place.device))
    check()
    return Loaded(folder.path, place, pipe, fingerprint(weights.files))


def load_part(weights: Weights, name: str, dtype: Precision) -> Any:
    """One component with weights, on the CPU. Raises `ModelError` unless the files hold all."""
    import torch

    path, found = weights.folder.path / name, _class_of(weights.folder, name)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    options |= {"local_files_only": True, "output_loading_info": True}
    if weights.variant is not None:
        options["variant"] = weights.variant
    with _loading(path):
        part, info = found.from_pretrained(str(path), **options)
    missing = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ModelError(
            f"{path} is incomplete: its files lack the weight {missing[0]}{others}; "
            "download it again"
        )
    return part


def _class_of(folder: ModelFolder, part: str) -> Any:
    """The class of a component with weights. Raises `ModelError` if the libraries lack it."""
    import diffusers
    import transformers

    wanted = folder.parts.get(part, "")
    found: Any = getattr(diffusers, wanted, None) or getattr(transformers, wanted, None)
    kinds = (diffusers.ModelMixin, transformers.PreTrainedModel)
    if not (inspect.isclass(found) and issubclass(found, kinds)):
        raise ModelError(
            f"{folder.path / part} wants to be a {wanted}, which diffusers and transformers lack"
        )
    return found


@contextmanager
def _loading(path: Path) -> Generator[None, None, None]:
    """Turn what the libraries raise into a `ModelError` of one line."""
    try:
        yield
    except (Cancelled, KinoraError):
        raise
    except Exception as error:  # tokenizers raises bare ones, validators their own kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, and Kinora runs none that comes with a model"
        raise ModelError(f"{path} cannot be loaded: {reason}") from error


def pipeline_class(folder: ModelFolder) -> Any:
    """The diffusers class of a folder; refuses classes that Kinora cannot drive."""
    import diffusers

    found = getattr(diffusers, folder.pipeline, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ModelError(
            f"{folder.path} needs the pipeline {folder.pipeline}, "
            f"which is none of diffusers {diffusers.__version__}"
        )
    if "vae" not in folder.parts:
        raise ModelError(f"{folder.pipeline} has no autoencoder (vae), which Kinora decodes with")
    accepted = call_parameters(found)
    expected = {"prompt", "image"} if takes_image(folder.pipeline) else {"prompt"}
    if {"prompt", "image", "video", "mask_image"} & accepted != expected:
        raise ModelError(
            f"{folder.pipeline} makes pictures neither from text alone nor from text and one "
            f"image: pick another"
        )
    if "callback_on_step_end" not in accepted:
        raise ModelError(f"{folder.pipeline} reports no steps, so Kinora could not stop it")
    return cast("Any", found)


def call_parameters(pipeline: Any) -> set[str]:
    """Names that a pipeline's `__call__` accepts."""
    return set(inspect.signature(pipeline.__call__).parameters)
