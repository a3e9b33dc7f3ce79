"""The options that several commands share, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

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
Size = Annotated[
    str | None,
    typer.Option(metavar="WxH", help="Width and height in pixels. [default: the model's]"),
]
Frames = Annotated[
    int | None, typer.Option(help="Number of frames; 1 makes an image. [default: the model's]")
]
Steps = Annotated[
    int | None,
    typer.Option(help="Number of denoising steps, 1 to 1000. [default: the model's]"),
]
