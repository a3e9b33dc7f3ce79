"""The picture of a plan: its tiles, and over the token grid what one query attends to.

A colour says two things at once. Its hue is the plan: blue is kept, red is left out. How dark it is
says how much dense attention falls there, so that what is missed stands out in red.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..accel.inspection import View

    Values = NDArray[Any]

MARGIN, GAP, LABEL = 20, 6, 14
MAP = 340
"""Side of the picture of tiles, in pixels."""
GRID = 1060
"""Most width of the picture of the token grid."""
LARGEST, SMALLEST = 14, 3
"""Pixels of a token."""
DECADES = (-1.0, 2.0)
"""Attention of the palest and of the darkest colour: powers of ten of an even share."""
KEPT = ((222, 235, 247), (107, 174, 214), (8, 48, 107))
LEFT_OUT = ((250, 246, 240), (244, 165, 130), (165, 15, 21))
INK, GRAY, MARK = (30, 30, 30), (105, 105, 105), (255, 200, 0)


def drawn(
    view: View, heads: Sequence[int], query: tuple[int, int, int], title: Sequence[str]
) -> bytes:
    """A PNG with a row for each of `heads`.

    At the left are all pairs of tokens in the order of the plan, queries down and keys across, by
    tiles; at the right the keys of one query, frames side by side and the text below them.

    Args:
        query: frame, row and column of the token.
        title: lines above all.
    """
    page = _Page()
    for i, line in enumerate(title):
        page.text(line, 17 if i == 0 else 13, INK if i == 0 else GRAY)
    token = view.token(*query)
    weights, kept = (x.cpu() for x in view.row(token))
    even = 1 / weights.shape[-1]
    for head in heads:
        density, recall, best = (
            float(x[head]) for x in (view.density, view.recall, view.recall_at_best)
        )
        seen, held = float(kept[head].float().mean()), float(weights[head][kept[head]].sum())
        page.text(f"head {head}", 15, above=14)
        whole = "of the attention (at best" if view.plan.within is None else "(best whole tiles"
        page.columns(
            f"keeps {density:.0%}, which hold {recall:.0%} {whole} {best:.0%})",
            f"the query at frame {query[0]}, row {query[1]}, column {query[2]} keeps {seen:.0%} of "
            f"the tokens, which hold {held:.0%} of its attention",
        )
        colours = _coloured((weights[head] / even).numpy(), kept[head].numpy())
        page.images(_map(view, head, token), _grid(view, colours, query))
    left_out = "left out, their means stand for them" if view.plan.tail != "none" else "left out"
    page.legend(("kept", KEPT), (left_out, LEFT_OUT))
    return page.png()


def _coloured(shares: Values, kept: Values) -> Values:
    """Colours `[…, 3]` uint8 of attention in even shares."""
    low, high = DECADES
    dark = (np.log10(np.maximum(shares, 1e-9)) - low) / (high - low)
    both = [_ramp(stops, dark.clip(0, 1)) for stops in (KEPT, LEFT_OUT)]
    return np.where(kept[..., None], *both)


def _ramp(stops: Sequence[tuple[int, int, int]], at: Values) -> Values:
    """The colours at 0 to 1 between stops that stand at equal distances."""
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(at, places, [stop[i] for stop in stops]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _map(view: View, head: int, token: int) -> Image.Image:
    """All pairs of tokens, `MAP` pixels a side, by tile; marks beside the tile of the query."""
    plan, side = view.plan, MAP
    widths = np.minimum(plan.tile.key, plan.keys - plan.tile.key * np.arange(plan.columns))
    shares = view.mass[head].cpu().numpy() * plan.keys / widths
    colours = _coloured(shares, view.mask[head].cpu().numpy())
    place = (np.arange(side) + 0.5) * plan.queries / side  # the tokens in the middle of pixels
    rows, columns = (place.astype(int) // size for size in (plan.tile.query, plan.tile.key))
    image = Image.new("RGB", (side + 9, side + LABEL), "white")
    image.paste(Image.fromarray(colours[rows][:, columns]), (9, LABEL))
    draw = ImageDraw.Draw(image)
    draw.text(
        (9, -1),
        f"{plan.rows} by {plan.columns} tiles, "
        + ("queries down, keys across" if plan.within is None else "kept wholly or in part"),
        font=_font(11),
        fill=GRAY,
    )
    row = int(view.places[0][head, token]) // plan.tile.query
    high = side * plan.tile.query / plan.queries
    y = LABEL + min((row + 0.5) * high, side)
    draw.polygon([(0, y - 5), (0, y + 5), (7, y)], fill=INK)
    return image


def _grid(view: View, colours: Values, query: tuple[int, int, int]) -> Image.Image:
    """The keys of a query by their places; `colours` are `[L, 3]`."""
    picture = np.moveaxis(_of(view, colours, picture=True), 0, -1)
    text = _of(view, colours, picture=False).T
    frames, height, width, _ = picture.shape
    columns, cell = _layout(frames, height, width)
    across, down = width * cell + GAP, height * cell + GAP + LABEL
    rows, wide = -(-frames // columns), columns * across - GAP
    per_line = max(1, wide // cell)
    lines = -(-len(text) // per_line)
    below = LABEL + lines * cell if lines else 0
    image = Image.new("RGB", (wide, rows * down - (0 if lines else GAP) + below), "white")
    draw = ImageDraw.Draw(image)
    for frame in range(frames):
        x, y = frame % columns * across, frame // columns * down
        name = f"frame {frame}" if width * cell > 50 else str(frame)
        draw.text((x, y - 1), name, font=_font(11), fill=GRAY)
        image.paste(_enlarged(picture[frame], cell), (x, y + LABEL))
        if frame == query[0]:
            left, top = x + query[2] * cell, y + LABEL + query[1] * cell
            for reach, colour in ((1, MARK), (2, INK)):
                box = (left - reach, top - reach, left + cell - 1 + reach, top + cell - 1 + reach)
                draw.rectangle(box, outline=colour)
    if lines:
        draw.text((0, rows * down - 1), "text", font=_font(11), fill=GRAY)
    for line in range(lines):
        part = text[line * per_line : (line + 1) * per_line]
        image.paste(_enlarged(part[None], cell), (0, rows * down + LABEL + line * cell))
    return image


def _of(view: View, colours: Values, *, picture: bool) -> Values:
    """Of `[L, 3]` the picture `[3, frames, height, width]`, or else the text, `[3, text]`."""
    import torch

    every = torch.from_numpy(colours.T.copy())
    return (view.picture(every) if picture else view.text(every)).numpy()


def _layout(frames: int, height: int, width: int) -> tuple[int, int]:
    """Frames side by side, and pixels of a token: the largest for which there is room."""
    found: list[tuple[int, int, int]] = []
    for columns in range(1, frames + 1):
        rows = -(-frames // columns)
        across = (GRID - GAP * (columns - 1)) // (columns * width)
        down = (MAP + LABEL - (GAP + LABEL) * rows + GAP) // (rows * height)
        found.append((min(across, down, LARGEST), -rows, -columns))
    cell, _, columns = max(found)
    if cell >= SMALLEST:
        return -columns, cell
    cell = max(1, min(SMALLEST, GRID // width))
    return max(1, min(frames, (GRID + GAP) // (width * cell + GAP))), cell


def _enlarged(colours: Values, cell: int) -> Image.Image:
    return Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1))


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _indexed(image: Image.Image) -> Image.Image:
    """The same in 256 colours, which take half the bytes: ramps, grays of letters, the mark."""
    ramps = [_ramp(stops, np.linspace(0, 1, 100)) for stops in (KEPT, LEFT_OUT)]
    grays = _ramp(((0, 0, 0), (255, 255, 255)), np.linspace(0, 1, 55))
    palette = np.concatenate([*ramps, grays, np.array([MARK], np.uint8)])
    codes = np.asarray(image).astype(np.int64) @ (1, 256, 65536)
    found, places = np.unique(codes, return_inverse=True)
    colours = found[:, None] // (1, 256, 65536) % 256
    nearest = (np.square(colours[:, None] - palette.astype(np.int64))).sum(-1).argmin(-1)
    indexed = Image.fromarray(nearest.astype(np.uint8)[places.reshape(codes.shape)])
    indexed.putpalette(palette.tobytes())
    return indexed


@dataclass(slots=True)
class _Page:
    """Pieces one below the other, put together in the end."""

    y: int = MARGIN
    right: int = 0
    pieces: list[tuple[int, int, Any]] = field(default_factory=list[tuple[int, int, Any]])

    def text(self, told: str, size: int, colour: Any = INK, *, above: int = 0) -> None:
        """A line."""
        self.y += above
        self._write(MARGIN, told, size, colour)
        self.y += size + 7

    def columns(self, left: str, right: str) -> None:
        """What stands above the two pictures of a head."""
        self._write(MARGIN + 9, left, 13, INK)
        self._write(MARGIN + MAP + 40, right, 13, INK)
        self.y += 20

    def images(self, left: Image.Image, right: Image.Image) -> None:
        """The two pictures of a head."""
        for x, image in ((MARGIN, left), (MARGIN + MAP + 40, right)):
            self.pieces.append((x, self.y, image))
            self.right = max(self.right, x + image.width)
        self.y += max(left.height, right.height)

    def legend(self, *ramps: tuple[str, Sequence[tuple[int, int, int]]]) -> None:
        """What colours mean."""
        self.y += 18
        at = np.repeat(np.linspace(0, 1, 200)[None], 12, 0)
        x = MARGIN + 9
        for name, stops in ramps:
            self.pieces.append((x, self.y + 2, Image.fromarray(_ramp(stops, at))))
            self.pieces.append((x + 208, self.y, (name, 13, INK)))
            x += 230 + int(_font(13).getlength(name))
        low, high = (f"{10**decade:g}" for decade in DECADES)
        told = f"dense attention, from {low} to {high} times an even share, by powers of ten"
        self._write(x, told, 13, GRAY)
        self.y += 18

    def png(self) -> bytes:
        """The whole page."""
        image = Image.new("RGB", (self.right + MARGIN, self.y + MARGIN), "white")
        draw = ImageDraw.Draw(image)
        for x, y, piece in self.pieces:
            if isinstance(piece, Image.Image):
                image.paste(piece, (x, y))
            else:
                told, size, colour = piece
                draw.text((x, y), told, font=_font(size), fill=colour)
        file = io.BytesIO()
        _indexed(image).save(file, "png", optimize=True)
        return file.getvalue()

    def _write(self, x: int, told: str, size: int, colour: Any) -> None:
        told = told.replace("×", "x")  # which the font does not have
        self.pieces.append((x, self.y, (told, size, colour)))
        self.right = max(self.right, x + int(_font(size).getlength(told)))
