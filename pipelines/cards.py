"""Model cards: what a model is called, its defaults, and which sizes and lengths it takes.

The registry is `models.toml`; a path to any diffusers folder gets a card made from its configs.
Nothing here imports torch or reads weights.
"""

from __future__ import annotations

import math
import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from ..accel.grid import TokenGrid
from .errors import ModelError, nearest, shortened
from .folder import ModelFolder, geometry, reading, takes_image
from .tiny import WEIGHTS

CallValue = bool | int | float | str
MAX_FRAMES = 10**6
"""For models without a limit of their own: hours of video, which predictions can still count."""
Precision = Literal["float32", "bfloat16", "float16"]


class Card(BaseModel):
    """One model: facts, defaults and rules.

    `vae_spatial` and `vae_temporal` are pixels and frames per latent, `patch` latents per token
    along (time, height, width), `size_multiple` what the pipeline wants sizes to be divisible by
    besides whole tokens, `frame_multiple` the step between lengths where that is not
    `vae_temporal`; sizes are in pixels, `download_gb` and `memory_gb` in 10^9 bytes.
    `prompt_tokens` is where the pipeline cuts a prompt without saying so; most do say so.
    `trained_px` (of a side) and `trained_frames` are the least and the most that training showed;
    None where that is not known. `estimates` names the fields that were not read off the repository
    itself.

    `configs` and `others_b` are for predictions where the weights are absent: of the denoiser's and
    the autoencoder's own config.json what those need, with the class as `_class_name`, and 10^9
    weights of the parts beside the denoiser.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pipeline: str
    kind: Literal["video", "image"]
    title: str = ""
    repo: str | None = None
    folder: Path | None = None
    include: tuple[str, ...] = ()
    licence: str = "not stated"
    params_b: float | None = None
    download_gb: float | None = None
    memory_gb: float | None = None
    estimates: tuple[str, ...] = ()
    note: str = ""
    configs: dict[str, dict[str, Any]] = {}
    others_b: dict[str, float] = {}

    width: int
    height: int
    frames: int = 1
    fps: float = 16.0
    steps: int
    guidance: float
    negative: bool = True
    dtype: Precision = "bfloat16"
    vae_dtype: Literal["float32"] | None = None
    call: dict[str, CallValue] = {}
    prompt_tokens: int | None = None

    vae_spatial: int = 8
    vae_temporal: int = 1
    size_multiple: int = 1
    frame_multiple: int | None = None
    patch: tuple[int, int, int] = (1, 1, 1)
    max_axis_tokens: int | None = None
    trained_px: tuple[int, int] | None = None
    trained_frames: tuple[int, int] | None = None

    @property
    def takes_image(self) -> bool:
        """Whether a video begins with an image, which then must be given."""
        return takes_image(self.pipeline)

    @property
    def token_px(self) -> tuple[int, int]:
        """Width and height of one token, in pixels."""
        return self.vae_spatial * self.patch[2], self.vae_spatial * self.patch[1]

    @property
    def multiple_px(self) -> tuple[int, int]:
        """What width and height must each be divisible by, in pixels."""
        across, down = self.token_px
        return math.lcm(across, self.size_multiple), math.lcm(down, self.size_multiple)

    @property
    def frame_stride(self) -> int:
        """A clip has `frame_stride * k + 1` frames."""
        return self.frame_multiple or self.vae_temporal

    def grid(self, width: int, height: int, frames: int) -> TokenGrid:
        """Tokens of a clip of `frames` frames of `width` x `height` pixels."""
        across, down = self.token_px
        latent_frames = (frames - 1) // self.vae_temporal + 1
        return TokenGrid(-(-latent_frames // self.patch[0]), height // down, width // across)

    def nearest_size(self, width: int, height: int) -> tuple[int, int]:
        """The allowed (width, height) nearest to the one given."""
        most = self._most_px()
        return tuple(  # pyright: ignore[reportReturnType]
            multiple * max(1, min((given + multiple // 2) // multiple, limit // multiple))
            for given, multiple, limit in zip((width, height), self.multiple_px, most, strict=True)
        )

    def _most_px(self) -> tuple[int, int]:
        """The largest width and height for which the model has positions."""
        limit = self.max_axis_tokens or 10**9
        return self.token_px[0] * limit, self.token_px[1] * limit

    def nearest_frames(self, frames: int) -> int:
        """The allowed number of frames nearest to the one given."""
        if self.kind == "image":
            return 1
        stride = self.frame_stride
        count = max(0, (frames - 1 + (stride - 1) // 2) // stride)
        most = MAX_FRAMES - 1
        if self.max_axis_tokens is not None:
            most = (self.max_axis_tokens * self.patch[0] - 1) * self.vae_temporal
        return stride * min(count, most // stride) + 1

    def size_rule(self) -> str:
        """The rule for sizes, as the end of a sentence."""
        across, down = self.multiple_px
        limit = self._most_px()
        most = f" and at most {limit[0]}x{limit[1]}" if self.max_axis_tokens else ""
        if across == down:
            return f"width and height must be multiples of {across}{most}"
        return f"width must be a multiple of {across}, height of {down}{most}"

    def frames_rule(self) -> str:
        """The rule for lengths, as the end of a sentence."""
        if self.kind == "image":
            return "it makes single images"
        stride = self.frame_stride
        return "at least 1" if stride == 1 else f"the number must be {stride}k+1 ({self._first()})"

    def trained_range(self) -> str:
        """The sizes and lengths that training showed, in words; empty where not known."""
        px, frames = self.trained_px, self.trained_frames
        told = ["" if px is None else f"{px[0]} to {px[1]} px a side"]
        told.append("" if frames is None else f"{frames[0]} to {frames[1]} frames")
        return ", ".join(filter(None, told))

    def outside_training(self, width: int, height: int, frames: int) -> str | None:
        """One line if training showed no clip of such a size or length, else None."""
        px, length = self.trained_px, self.trained_frames
        known_size = px is None or px[0] <= min(width, height) <= max(width, height) <= px[1]
        if known_size and (length is None or length[0] <= frames <= length[1]):
            return None
        given = f"{width}x{height}, {frames} {'frame' if frames == 1 else 'frames'}"
        return (
            f"{self.name} was trained for {self.trained_range()}; {given} is outside that "
            "and may not show what is asked for"
        )

    def _first(self) -> str:
        stride = self.frame_stride
        return f"1, {stride + 1}, {2 * stride + 1}, …"

    def download_command(self) -> str:
        """The command that fetches the weights."""
        include = "".join(f" --include '{pattern}'" for pattern in self.include)
        return f"hf download {self.repo}{include}"


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    text = (Path(__file__).parent / "models.toml").read_text(encoding="utf-8")
    return cast("dict[str, dict[str, dict[str, Any]]]", tomllib.loads(text))


def names() -> list[str]:
    """Names of all registered models, in the registry's order."""
    return list(_table()["models"])


def find(model: str) -> Card:
    """The card of a registered name or of a path to a diffusers folder.

    Raises `ModelError`: the nearest names for an unknown one, the fault of a damaged folder.
    """
    entry = _table()["models"].get(model)
    if entry is not None:
        return _registered(model, entry)
    path = Path(os.path.expanduser(model))  # a user who does not exist is no error here
    with reading(path):
        if path.is_dir():
            return from_folder(path)
        if path.exists():
            raise ModelError(
                f"{shortened(model)} is a file: give the folder that holds model_index.json"
            )
    if "/" in model and (model.startswith((".", "/", "~")) or not _looks_like_repo(model)):
        raise ModelError(f"there is no model folder at {shortened(model)}: check the path")
    by_repo = [name for name in names() if _table()["models"][name].get("repo") == model]
    close = by_repo or nearest(model, names())
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelError(
        f"unknown model {shortened(model)!r}: {hint}`kinora models` lists the names; "
        "a path to a diffusers folder works too"
    )


def from_folder(path: Path) -> Card:
    """A card for a diffusers folder: rules from its configs, defaults from its pipeline class.

    It is named after the folder's absolute path, which means the same from anywhere.
    """
    path = Path(os.path.realpath(path))
    folder = ModelFolder.open(path)
    rules = geometry(folder)
    known = _table()["classes"].get(folder.pipeline)
    defaults = known if known is not None else _generic(folder, rules)
    return _snapped({**defaults, **rules, "pipeline": folder.pipeline}, str(path), path)


def _registered(name: str, entry: dict[str, Any]) -> Card:
    fields = {**_table()["classes"].get(entry["pipeline"], {}), **entry}
    folder = WEIGHTS if name == "kinora-tiny" else None
    if folder is not None:
        with reading(folder):
            if folder.is_dir():
                fields = {**fields, **geometry(ModelFolder.open(folder))}
    return Card(name=name, folder=folder, **fields)


def _generic(folder: ModelFolder, rules: dict[str, Any]) -> dict[str, Any]:
    """Defaults for a pipeline class that the registry does not know."""
    sample = folder.config("transformer").get("sample_size") or folder.config("unet").get(
        "sample_size"
    )
    side = sample * rules.get("vae_spatial", 8) if isinstance(sample, int) else 512
    video = rules.get("vae_temporal", 1) > 1
    return {
        "kind": "video" if video else "image",
        "width": side,
        "height": side,
        "frames": 8 * rules["vae_temporal"] + 1 if video else 1,
        "steps": 30,
        "guidance": 5.0,
        "estimates": ("width", "height", "frames", "fps", "steps", "guidance"),
    }


def _snapped(fields: dict[str, Any], name: str, path: Path) -> Card:
    """The card with its default size and length moved to what the model takes."""
    card = Card(name=name, folder=path, **fields)
    width, height = card.nearest_size(card.width, card.height)
    return card.model_copy(
        update={"width": width, "height": height, "frames": card.nearest_frames(card.frames)}
    )


def _looks_like_repo(model: str) -> bool:
    owner, _, rest = model.partition("/")
    return bool(owner) and bool(rest) and "/" not in rest
