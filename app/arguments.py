"""The options that several commands share, each with its help, and how their text is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import typer

if TYPE_CHECKING:
    from ..pipelines.request import Format

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", help="File, or folder to name files in. [default: outputs]"),
]
Media = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="mp4, gif, webm or png (lossless; animated). [default: mp4, or png for one frame]",
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. [default: auto]")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16. [default: auto]")
]
Force = Annotated[bool, typer.Option("--force", help="Go on where memory or disk looks too small.")]

Model = Annotated[
    str | None,
    typer.Option(help="Name from `kinora models`, or a diffusers folder. [default: kinora-tiny]"),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Name from `kinora recipes`, or a TOML file. [default: dense]"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PART.OPTION=VALUE",
        help="Change the recipe; may be given several times. [default: nothing]",
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict/--no-strict",
        help="Refuse whatever would not run as the recipe asks, or let it fall back. "
        "[default: fall back]",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="WxH", help="Width and height in pixels. [default: the model's]"
    ),
]
Frames = Annotated[
    int | None, typer.Option(help="Number of frames; 1 makes an image. [default: the model's]")
]
Steps = Annotated[
    int | None,
    typer.Option(help="Number of denoising steps, 1 to 1000. [default: the model's]"),
]
Guidance = Annotated[
    float | None,
    typer.Option(help="How closely to follow the prompt, from 0. [default: the model's]"),
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What the video must not show. [default: nothing]")
]
Image = Annotated[
    str | None,
    typer.Option(
        help="PNG, JPEG or WebP that the video begins with, where the model takes one. "
        "[default: none]"
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of the noise; video k, from 0, gets seed + k. [default: 0]"),
]
NumVideos = Annotated[int | None, typer.Option(help="Number of videos, 1 to 1000. [default: 1]")]
Fps = Annotated[
    float | None,
    typer.Option(help="Frames per second of the file, 0.1 to 240. [default: the model's]"),
]
KeepLatents = Annotated[
    bool, typer.Option("--keep-latents", help="Keep the latents, for `kinora decode`.")
]


class Spelled(NamedTuple):
    """An option as the command line shows it: flag, what it is for, what holds without it."""

    flag: str
    help: str
    default: str


def spelled(option: Any, parameter: str) -> Spelled:
    """What the definition of a parameter's option says, for front ends that show it otherwise."""
    info = get_args(option)[1]
    flags = [info.default, *(info.param_decls or ())]  # typer takes the first for a default
    flags = [it.partition("/")[0] for it in flags if isinstance(it, str) and it.startswith("--")]
    flag = flags[0] if flags else f"--{parameter.replace('_', '-')}"
    text, _, default = str(info.help).partition(" [default: ")
    return Spelled(flag, text, default.removesuffix("]"))


def requested(
    *,
    size: str | None = None,
    settings: list[str] | None = None,
    media: str | None = None,
    keep_latents: bool = False,
    force: bool = False,
    **others: object,
) -> dict[str, Any]:
    """What these options say of a request, by its fields; `others` are called as the fields are.

    Raises `RequestError`.
    """
    from ..pipelines.request import size_of

    fields = {
        **others,
        "settings": tuple(settings) if settings else None,
        "format": format_of(media),
        "keep_latents": keep_latents or None,
        "force": force or None,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return given if size is None else given | size_of(size)


def format_of(text: str | None) -> Format | None:
    """The format called so, in whatever case. Raises `RequestError`."""
    from ..pipelines.errors import RequestError, nearest
    from ..pipelines.request import FORMATS

    if text is None:
        return None
    for known in FORMATS:
        if text.lower() == known:
            return known
    close = nearest(text, FORMATS, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RequestError(f"--format must be {', '.join(FORMATS)}, not {text!r}{hint}")
