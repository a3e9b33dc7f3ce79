"""A diffusers model folder on disk, read without torch: parts, configs, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from .errors import ModelError, shortened

_WEIGHTLESS = ("tokenizer", "scheduler", "feature_extractor", "image_processor", "processor")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FULL_HASH_BYTES = 256 * 2**20
# Where a component's class may come from: naming any other module would run that module's code.
_LIBRARIES = ("diffusers", "transformers")
_FROM_IMAGE = re.compile(r"(ImageToVideo|Image2Video|I2V)Pipeline")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file: which part it belongs to, and what its header says."""

    part: str
    path: Path
    numel: int
    bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with a readable `model_index.json`.

    `parts` maps a component's name to its class name; components that are null are left out.
    `configs` stand for the files of a folder that is not there.
    """

    path: Path
    pipeline: str
    parts: dict[str, str]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Read the index of `path`. Raises `ModelError` if there is none or it is not JSON."""
        index = path / "model_index.json"
        with reading(index):
            if not index.is_file():
                raise ModelError(f"{path} is no diffusers model: it has no model_index.json")
        content = read_object(index)
        pipeline = content.get("_class_name")
        if not isinstance(pipeline, str):
            raise ModelError(f"{index} names no pipeline (`_class_name`): the folder is damaged")
        parts: dict[str, str] = {}
        for name, value in content.items():
            if not isinstance(value, list):
                continue
            entry = cast("list[object]", value)
            if len(entry) != 2 or not isinstance(entry[1], str):
                continue
            if entry[0] not in _LIBRARIES:
                raise ModelError(
                    f"{index} takes its {name} from {entry[0]!r}: Kinora loads components of "
                    f"{' and '.join(_LIBRARIES)} only"
                )
            parts[name] = entry[1]
        if not parts:
            raise ModelError(f"{index} lists no components: the folder is damaged")
        return cls(path, pipeline, parts)

    def config(self, part: str) -> dict[str, Any]:
        """The config of a component; empty where it has none."""
        if part in self.configs:
            return self.configs[part]
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = self.path / part / name
        with reading(file):
            return read_object(file) if part in self.parts and file.is_file() else {}

    @property
    def weighty(self) -> list[str]:
        """The components that have weights."""
        return [part for part in self.parts if not part.startswith(_WEIGHTLESS)]

    def bare(self) -> bool:
        """Whether every component has its config and none of them has any file of weights."""
        with reading(self.path):
            return all(
                (self.path / part / "config.json").is_file()
                and not any(
                    file.suffix in (".safetensors", *_PICKLES)
                    for file in (self.path / part).iterdir()
                )
                for part in self.weighty
            )

    def check(self) -> tuple[list[WeightFile], str | None]:
        """Verify that every component is there and whole.

        Returns the weight files, and the variant ("fp16") if only that one is present. Raises
        `ModelError` naming the first component that is missing, truncated or pickle-only.
        """
        with reading(self.path):
            return self._check()

    def _check(self) -> tuple[list[WeightFile], str | None]:
        for part in self.parts:
            if not (self.path / part).is_dir():
                raise ModelError(f"{self.path} is incomplete: the folder {part}/ is missing")
        weighty = self.weighty
        for part in weighty:
            if not (self.path / part / "config.json").is_file():
                raise ModelError(f"{self.path} is incomplete: {part}/config.json is missing")
            self.config(part)
        plain = {part: self._files(part, None) for part in weighty}
        variant = None if all(plain.values()) else "fp16"
        if variant is not None and not all(self._files(part, variant) for part in weighty):
            self._explain(next(part for part, files in plain.items() if not files))
        return [
            read_header(part, file) for part in weighty for file in self._files(part, variant)
        ], variant

    def _files(self, part: str, variant: str | None) -> list[Path]:
        """The safetensors files that diffusers would load for one component, if all is there."""
        folder = self.path / part
        infix = f".{variant}" if variant else ""
        for stem in ("diffusion_pytorch_model", "model"):
            index = folder / f"{stem}.safetensors.index{infix}.json"
            if index.is_file():
                shards = read_object(index).get("weight_map")
                if not isinstance(shards, dict):
                    raise ModelError(f"{index} is damaged: it has no weight_map", damaged=index)
                named = cast("dict[str, object]", shards)
                return [folder / name for name in sorted({str(name) for name in named.values()})]
            single = folder / f"{stem}{infix}.safetensors"
            if single.is_file():
                return [single]
        return []

    def _explain(self, part: str) -> None:
        folder = self.path / part
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ModelError(
                f"{folder} holds pickled weights only ({pickles[0]}), which can run code when "
                "loaded: Kinora reads safetensors only; convert with save_pretrained("
                "safe_serialization=True)"
            )
        raise ModelError(f"{self.path} is incomplete: {part}/ holds no safetensors file")


@contextmanager
def reading(path: Path) -> Generator[None, None, None]:
    """Turn what the file system refuses into a `ModelError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        named = shortened(str(error.filename or path))
        raise ModelError(f"{named} cannot be read ({reason})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `ModelError` if it is not one."""
    with reading(path):
        raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({error}): the folder is damaged", damaged=path
        ) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no JSON object: the folder is damaged", damaged=path)
    return cast("dict[str, Any]", content)


def read_header(part: str, path: Path) -> WeightFile:
    """Read and verify the header of one safetensors file; its size must be what it promises."""
    if not path.is_file():
        raise ModelError(f"the model is incomplete: {path} is missing; download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(
                f"{path} is truncated or no safetensors file: download it again", damaged=path
            )
        raw = file.read(length)
    try:
        header = cast("dict[str, dict[str, Any]]", json.loads(raw))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        numel = sum(math.prod(entry["shape"]) for entry in header.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelError(
            f"{path} has no readable safetensors header: download it again", damaged=path
        ) from None
    if size != 8 + length + end:
        raise ModelError(
            f"{path} is truncated: {size:,} bytes of {8 + length + end:,}; download it again",
            damaged=path,
        )
    return WeightFile(part, path, numel, end, hashlib.sha256(raw).hexdigest())


def takes_image(pipeline: str) -> bool:
    """Whether a class of diffusers makes videos that begin with an image, as its name says.

    Loading compares that with what the class accepts, which needs torch.
    """
    return _FROM_IMAGE.search(pipeline) is not None


def fingerprint(files: Sequence[WeightFile]) -> str:
    """A name for the weights: of every byte up to 256 MiB in all, above that of the headers.

    `sha256:…` or `headers-sha256:…`; the second does not see values that changed in place.
    """
    full = sum(file.bytes for file in files) <= _FULL_HASH_BYTES
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda item: (item.part, item.path.name)):
        digest.update(f"{file.part}/{file.path.name}:{file.bytes}\n".encode())
        if full:
            with reading(file.path), file.path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(file.header_sha256.encode())
    return f"{'sha256' if full else 'headers-sha256'}:{digest.hexdigest()}"


def geometry(folder: ModelFolder) -> dict[str, Any]:
    """`Card` fields for sizes and lengths, as the folder's own configs give them.

    Raises `ModelError` where they are of no use.
    """
    try:
        fields = _geometry(folder)
    except (TypeError, ValueError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder.path} has a damaged config.json: {error}") from None
    for name, value in fields.items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ModelError(f"{folder.path} has a damaged config.json: {name} is {value}")
    return fields


def _geometry(folder: ModelFolder) -> dict[str, Any]:
    vae, denoiser = folder.config("vae"), folder.config("transformer")
    fields: dict[str, Any] = {}
    blocks = vae.get("block_out_channels")
    spatial = _first_int(vae, "scale_factor_spatial", "spatial_compression_ratio")
    if spatial is None and folder.parts.get("vae") == "AutoencoderKLLTXVideo":
        scaled = sum(map(bool, vae.get("spatio_temporal_scaling", (1, 1, 1, 0))))
        spatial = int(vae.get("patch_size", 4)) * 2**scaled
        fields["vae_temporal"] = int(vae.get("patch_size_t", 1)) * 2**scaled
    if spatial is None and isinstance(blocks, list):
        spatial = 2 ** (len(cast("list[int]", blocks)) - 1)
    if spatial is not None:
        fields["vae_spatial"] = spatial
    temporal = _first_int(vae, "scale_factor_temporal", "temporal_compression_ratio")
    if temporal is not None:
        fields["vae_temporal"] = temporal
    if denoiser:
        fields["patch"] = _patch(folder, denoiser)
    limit = _first_int(denoiser, "rope_max_seq_len")
    if limit is not None:
        fields["max_axis_tokens"] = limit
    return fields


def _patch(folder: ModelFolder, denoiser: dict[str, Any]) -> tuple[int, int, int]:
    patch = denoiser.get("patch_size", 1)
    if isinstance(patch, list):
        *first, down, across = (int(value) for value in cast("list[Any]", patch))
        return (*first, 1)[0], down, across
    side = int(patch or 1)
    if folder.pipeline.startswith("Flux"):
        side *= 2  # the pipeline packs 2×2 latents into one token outside the transformer
    return int(denoiser.get("patch_size_t") or 1), side, side


def _first_int(config: dict[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)
