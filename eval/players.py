"""Videos side by side that play in step, as HTML: in a page of the front end or in a report.

`SCRIPT` is the body of a function of `element`, in which one such comparison stands; `STYLE` names
colours as gradio does.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

SCRIPT = Path(__file__).with_name("players.js")
STYLE = Path(__file__).with_name("players.css")


def players(
    names: Sequence[str],
    media: Sequence[str],
    *,
    fps: float,
    frames: int,
    size: tuple[int, int],
    beside: str = "",
) -> str:
    """The players, and below them a stage where the first is laid over one of the others.

    `media` are elements, one for each of `names`; `size` is width and height in px; `beside` goes
    to the right of the stage.
    """
    told = [escape(name) for name in names]
    figures = "".join(
        f'<figure><div class="k-frame">{it}</div><figcaption>{name}</figcaption></figure>'
        for name, it in zip(told, media, strict=True)
    )
    others = "".join(f'<option value="{k}">{name}</option>' for k, name in enumerate(told) if k)
    width, height = size
    return (
        f'<div class="k-compare" data-fps="{fps}" data-frames="{frames}">'
        f'<div class="k-players" style="--count: {len(media)}">{figures}</div>'
        f'<div class="k-bar k-acts"><button type="button" data-play>Play</button>'
        f'<input type="range" name="frame" min="0" max="{frames - 1}" value="0" '
        f'aria-label="Frame"></div>'
        f'<div class="k-below"><div class="k-stage"><div class="k-bar">'
        f'<label><input type="radio" name="how" value="wipe" checked> Wipe</label>'
        f'<label><input type="radio" name="how" value="difference"> Difference, 4×</label>'
        f'<label>{told[0]} and <select name="other">{others}</select></label></div>'
        f'<div class="k-frame"><canvas width="{width}" height="{height}"></canvas>'
        f'</div><input type="range" name="wipe" min="0" max="100" value="50" step="any" '
        f'aria-label="Wipe"></div>{beside}</div></div>'
    )
