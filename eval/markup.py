"""Parts of reports as HTML: a page that fetches nothing, tables, and videos inside of it.

Every value that came from a file is escaped by who puts it in; cells of tables are HTML already.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ..pipelines.media import encode
from .clips import Clip, EvalError
from .players import SCRIPT, STYLE

PAGE_STYLE = Path(__file__).with_name("page.css")
MOST_VIDEO_BYTES = 64 * 2**20
"""Of videos in a page."""
_UNKNOWN_FPS = 8
"""At which a folder of frames is shown, which does not tell."""


def document(title: str, facts: str, body: str) -> str:
    """A whole page, in UTF-8; `body` is HTML, in which each form holds players."""
    style = STYLE.read_text("utf-8") + PAGE_STYLE.read_text("utf-8")
    script = f"const side = element => {{\n{SCRIPT.read_text('utf-8')}\n}};\n"
    script += "document.querySelectorAll('form').forEach(side);"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="k-facts">{escape(facts)}</p>'
        f"{body}<script>{script}</script></body></html>\n"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`rows` are HTML already, the first cell of each its name."""
    head = "".join(f"<th>{escape(it)}</th>" for it in headings)
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{it}</td>' for it in row[1:])}</tr>" for row in rows
    )
    return (
        f'<div class="k-wide"><table class="k-figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def note(text: str) -> str:
    """A small line below a table."""
    return f'<p class="k-facts">{escape(text)}</p>'


def warnings(lines: Iterable[str]) -> str:
    """What went wrong, a paragraph each."""
    return "".join(f'<p class="why">{escape(line)}</p>' for line in lines)


def provenance(made: Mapping[str, object]) -> str:
    """What results depend on, as a table."""
    rows = [f"<tr><th>{escape(k)}</th><td>{escape(_plain(v))}</td></tr>" for k, v in made.items()]
    return f'<table class="k-figures made">{"".join(rows)}</table>'


def media(clip: Clip, *, controls: bool = False) -> str:
    """A video or image as an element that holds it; where it cannot be read, a line that says so.

    Frames without loss are packed as mp4 for the page alone.
    """
    request = None if clip.record is None else clip.record.request
    facts = "" if request is None else f' width="{request.width}" height="{request.height}"'
    still = request is not None and request.frames == 1
    try:
        if clip.path.is_file() and (still or (request is None and clip.form in ("gif", "png"))):
            content, kind = clip.path.read_bytes(), f"image/{clip.form}"
            return f'<img{facts} alt="" src="{_address(content, kind)}">'
        if clip.form in ("mp4", "webm"):
            content, kind = clip.path.read_bytes(), f"video/{clip.form}"
        else:
            fps = _UNKNOWN_FPS if request is None else request.fps
            content, kind = encode(clip.frames(), "mp4", fps, ""), "video/mp4"
    except (EvalError, OSError) as error:
        return f'<p class="why">{escape(str(error))}</p>'
    shown = " controls" if controls else ""
    return (
        f'<video{facts} src="{_address(content, kind)}" preload="auto" loop muted playsinline'
        f"{shown}></video>"
    )


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _plain(value: object) -> str:
    if value in (None, {}, []):
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(it)}" for name, it in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)
