"""What a user asks for (`Request`) and the same with every default filled in (`Resolved`)."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from ..accel.options import LONGEST_TEXT, no_utf8
from ..accel.presets import DENSE
from ..accel.table import effective
from . import images
from .cards import Card
from .errors import RequestError, nearest, shortened

Format = Literal["mp4", "gif", "webm", "png"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEVICES = ("auto", "cpu", "cuda", "mps")
"""And `cuda:N`, where there are several."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_MODEL = "kinora-tiny"
DEFAULT_OUTPUT = "outputs"
EXAMPLE_PROMPT = "a red circle moving left over a black background"
MAX_VIDEOS = 1000
MAX_STEPS = 1000  # schedulers are trained with as many noise levels
MAX_SEED = 2**63 - 1
MIN_FPS, MAX_FPS = 0.1, 240
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # others end lines, or are tabs


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "must be a whole number")
    return value


Whole = Annotated[int, BeforeValidator(_no_boolean)]
"""A whole number; true and false are none."""


class Request(BaseModel):
    """One call of `generate`. None means the model's own default.

    Video `k` of `num_videos` is made with seed `seed + k` and a generator of its own, so it equals
    the single video of a request with that seed. `output` is a file, or a folder in which files are
    named after prompt and seed. `image` is the file that the video begins with, where the model
    takes one, and `image_sha256` what its content must be; None is what it is. `recipe` is the name
    of a preset, the path of a TOML file, or the table that such a file holds; `settings` such as
    `attention.keep=0.3` are put over it, and `strict` refuses whatever would not run as it asks.
    `force` goes on where predicted memory or disk is too small.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str | None = None
    model: str = DEFAULT_MODEL
    width: Whole | None = None
    height: Whole | None = None
    frames: Whole | None = None
    steps: Whole | None = None
    guidance: float | None = None
    fps: float | None = None
    seed: Whole = 0
    num_videos: Whole = 1
    image: str | None = None
    image_sha256: str | None = None
    output: str = DEFAULT_OUTPUT
    format: Format | None = None
    device: str = "auto"
    dtype: str = "auto"
    recipe: str | dict[str, Any] = DENSE
    settings: tuple[str, ...] = ()
    strict: bool = False
    keep_latents: bool = False
    force: bool = False


class Resolved(BaseModel):
    """A request with nothing left open; `device` and `dtype` are concrete once a model is placed.

    Its fields are those of `Request`, so `resolved.request()` asks for it again. A model that was
    given as a folder is named by its absolute path, and so is an image. `recipe` is a table with
    the settings in it, empty for the stock pipeline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str | None
    model: str
    width: Whole
    height: Whole
    frames: Whole
    steps: Whole
    guidance: float
    fps: float
    seed: Whole
    num_videos: Whole
    image: str | None = None
    image_sha256: str | None = None
    output: str
    format: Format
    device: str
    dtype: str
    recipe: dict[str, Any] = {}
    settings: tuple[str, ...] = ()
    strict: bool = False
    keep_latents: bool
    force: bool

    def request(self) -> Request:
        """The request that asks for exactly this."""
        return Request.model_validate(self.model_dump())

    def accelerated(self) -> dict[str, Any]:
        """What the recipe accelerates; empty for the stock pipeline, whatever that is called."""
        return effective(self.recipe)

    def single(self, index: int) -> Resolved:
        """The request for video `index` (from 0) alone."""
        return self.model_copy(update={"seed": self.seed + index, "num_videos": 1})


def resolve(request: Request, card: Card, *, read_image: bool = True) -> Resolved:
    """Fill in what `request` leaves open from `card`, and check that `card` can take it.

    Without `read_image` one that the model needs may be missing, and none is looked at. Raises
    `RequestError` with the nearest allowed value. Reads no weights, and needs no torch but for a
    recipe.
    """
    _check_text(request, card)
    width, height = _size(request, card)
    frames = _frames(request, card)
    steps = card.steps if request.steps is None else request.steps
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"steps must be 1 to {MAX_STEPS}, not {shortened(steps)}")
    guidance = card.guidance if request.guidance is None else request.guidance
    if not math.isfinite(guidance) or guidance < 0:
        raise RequestError(f"guidance must be a finite number from 0 up, not {guidance}")
    fps = card.fps if request.fps is None else request.fps
    if not MIN_FPS <= fps <= MAX_FPS:
        raise RequestError(f"fps must be {MIN_FPS} to {MAX_FPS}, not {fps:g}")
    _check_counts(request)
    _check_device(request)
    image, image_sha256 = _image(request, card, read=read_image)
    return Resolved(
        prompt=request.prompt.strip(),
        negative_prompt=request.negative_prompt,
        image=image,
        image_sha256=image_sha256,
        model=card.name,
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        guidance=guidance,
        fps=fps,
        seed=request.seed,
        num_videos=request.num_videos,
        output=request.output,
        format=_format(request, frames),
        device=request.device,
        dtype=request.dtype,
        recipe=recipe_table(request),
        strict=request.strict,
        keep_latents=request.keep_latents,
        force=request.force,
    )


def recipe_table(request: Request) -> dict[str, Any]:
    """The table of the recipe that is asked for. Raises `RecipeError`."""
    if request.recipe in (DENSE, {}) and not request.settings:
        return {}
    from ..accel import recipe as recipes  # it needs torch

    given = request.recipe
    found = recipes.find(given) if isinstance(given, str) else recipes.from_table(given)
    return recipes.changed(found, request.settings).table()


def size_of(text: str, given: str = "--size") -> dict[str, int]:
    """`WIDTHxHEIGHT` as fields of a request. Raises `RequestError`, calling it what was `given`."""
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX×*]\s*([0-9]{1,9})\s*", text)
    if match is None:
        raise RequestError(
            f"{given} must be WIDTHxHEIGHT in pixels, such as 128x128, not {shortened(text)!r}"
        )
    return {"width": int(match[1]), "height": int(match[2])}


def names_a_file(output: str) -> bool:
    """Whether `output` means one file rather than a folder to put files into."""
    return not _names_a_folder(output) and Path(output).suffix != ""


def _names_a_folder(output: str) -> bool:
    return output.endswith("/") or os.path.isdir(os.path.expanduser(output))


def _check_text(request: Request, card: Card) -> None:
    texts = {"prompt": request.prompt, "negative prompt": request.negative_prompt or ""}
    for what, text in texts.items():
        if len(text) > LONGEST_TEXT:
            raise RequestError(
                f"the {what} has {len(text):,} characters: {LONGEST_TEXT:,} are the most"
            )
        if found := _CONTROL.search(text):
            raise RequestError(f"the {what} has the control character {found[0]!r}: leave it out")
    paths = {"output": request.output, "model's path": card.name}
    settings = {f"setting {shortened(it)!r}": it for it in request.settings}
    for what, text in {**texts, **paths, "image's path": request.image or "", **settings}.items():
        if wrong := no_utf8(text):
            raise RequestError(f"the {what} is {wrong}")
    if not request.prompt.strip():
        raise RequestError(
            f'the prompt is empty: say what the video shows, for example "{EXAMPLE_PROMPT}"'
        )
    if request.negative_prompt and not card.negative:
        raise RequestError(
            f"{card.name} ({card.pipeline}) takes no negative prompt: leave --negative-prompt out"
        )


def _size(request: Request, card: Card) -> tuple[int, int]:
    width = card.width if request.width is None else request.width
    height = card.height if request.height is None else request.height
    near = card.nearest_size(width, height)
    if near != (width, height):
        raise RequestError(
            f"{card.name} cannot make {shortened(width)}x{shortened(height)}: {card.size_rule()}; "
            f"the nearest is --size {near[0]}x{near[1]}"
        )
    return width, height


def check_image_given(request: Request, card: Card) -> None:
    """Raises `RequestError` where `card` needs an image, as `resolve` does unless told not to."""
    if card.takes_image and request.image is None:
        raise RequestError(
            f"{card.name} ({card.pipeline}) makes a video from an image: say which by --image"
        )


def _image(request: Request, card: Card, *, read: bool) -> tuple[str | None, str | None]:
    """The absolute path of the image, and its SHA-256."""
    given, expected = request.image, request.image_sha256
    if given is None:
        if expected is not None:
            raise RequestError("image_sha256 stands without an image: give the image too")
        if read:
            check_image_given(request, card)
        return None, None
    if not card.takes_image:
        raise RequestError(f"{card.name} ({card.pipeline}) takes no image: leave --image out")
    path = os.path.abspath(os.path.expanduser(given))
    if not read:
        return path, expected
    found = images.check(path)
    if expected not in (None, found):
        raise RequestError(images.changed(path))
    return path, found


def _frames(request: Request, card: Card) -> int:
    frames = card.frames if request.frames is None else request.frames
    near = card.nearest_frames(frames)
    if near != frames:
        raise RequestError(
            f"{card.name} cannot make {shortened(frames)} frames: {card.frames_rule()}; "
            f"the nearest is --frames {near}"
        )
    return frames


def _check_counts(request: Request) -> None:
    if not 1 <= request.num_videos <= MAX_VIDEOS:
        given = shortened(request.num_videos)
        raise RequestError(f"num_videos must be 1 to {MAX_VIDEOS}, not {given}")
    if not 0 <= request.seed <= MAX_SEED - request.num_videos:
        given = shortened(request.seed)
        raise RequestError(f"seed must be 0 to {MAX_SEED - request.num_videos}, not {given}")


def _check_device(request: Request) -> None:
    if not re.fullmatch(rf"{'|'.join(DEVICES)}|cuda:\d+", request.device):
        raise RequestError(f"device must be auto, cpu, cuda, cuda:N or mps, not {request.device!r}")
    if request.dtype not in DTYPES:
        close = nearest(request.dtype, DTYPES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise RequestError(f"dtype must be {', '.join(DTYPES)}, not {request.dtype!r}{hint}")


def _format(request: Request, frames: int) -> Format:
    given = request.format
    name = Path(request.output).name
    ending_alone = re.fullmatch(rf"[.\s]*\.({'|'.join(FORMATS)})", name, re.IGNORECASE)
    if ending_alone and not _names_a_folder(request.output):
        raise RequestError(
            f"--output {request.output} is an ending without a name: write a name before it, such "
            f"as video.{ending_alone[1]}, or end a folder's name with /"
        )
    if names_a_file(request.output):
        suffix = Path(request.output).suffix.lower().removeprefix(".")
        ending: Format | None = next((known for known in FORMATS if known == suffix), None)
        if ending is None:
            raise RequestError(
                f"--output {request.output} ends in .{suffix}, which Kinora does not write: "
                f"use {', '.join('.' + name for name in FORMATS)}, or end a folder's name with /"
            )
        if given is not None and given != ending:
            raise RequestError(f"--output {request.output} and --format {given} disagree: drop one")
        return ending
    if given is not None:
        return given
    return "png" if frames == 1 else "mp4"
