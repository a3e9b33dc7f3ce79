"""The videos on disk: what there is in the output folder, found by the sidecars."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from ...pipelines import sidecar
from ...pipelines.errors import SidecarError
from ...pipelines.media import read_first_frame
from ...pipelines.sidecar import Record
from . import api, view
from .seen import recipe_name

MOST = 2000  # newest sidecars that are looked at
SHOWN = 60
_THUMBNAIL_PX = 320
_KEPT = 500


@dataclass(frozen=True, slots=True)
class Item:
    """A video with its sidecar; the id is made from where it is, and says nothing about it."""

    id: str
    path: Path
    sidecar: Path
    record: Record


class Gallery:
    """What is in a folder, newest first; folders in it too, hidden ones not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._read: dict[tuple[Path, int], Item | None] = {}
        self._thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._items: dict[str, Item] = {}

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder

    def items(self) -> list[Item]:
        """All of them, read anew where something has changed."""
        with self._lock:
            newest = sorted(self._sidecars(), key=lambda it: it[1], reverse=True)[:MOST]
            self._read = {it: self._read.get(it) or self._item(it[0]) for it in newest}
            found = [it for it in self._read.values() if it is not None]
            self._items = {it.id: it for it in found}
            return found

    def find(self, id: str) -> Item | None:
        """The one with this id."""
        if id not in self._items:
            self.items()
        return self._items.get(id)

    def of(self, path: Path) -> Item | None:
        """The one whose video is there."""
        return self.find(self._id(path))

    def thumbnail(self, item: Item) -> bytes:
        """Its first frame as a small JPEG. Raises `OSError` or `ValueError` if it has none."""
        from PIL import Image

        key = item.id, item.path.stat().st_mtime_ns
        with self._lock:
            if key in self._thumbnails:
                self._thumbnails.move_to_end(key)
                return self._thumbnails[key]
        picture, data = Image.fromarray(read_first_frame(item.path)), io.BytesIO()
        picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        picture.save(data, "JPEG", quality=85)
        with self._lock:
            self._thumbnails[key] = data.getvalue()
            while len(self._thumbnails) > _KEPT:
                self._thumbnails.popitem(last=False)
        return data.getvalue()

    def _sidecars(self) -> list[tuple[Path, int]]:
        found: list[tuple[Path, int]] = []
        for folder, folders, files in os.walk(self._folder):
            folders[:] = [it for it in folders if not it.startswith(".")]
            for name in files:
                path = Path(folder, name)
                if path.suffix == ".json" and not name.startswith(".") and not path.is_symlink():
                    try:
                        found.append((path, path.stat().st_mtime_ns))
                    except OSError:
                        continue  # it goes meanwhile
        return found

    def _item(self, path: Path) -> Item | None:
        try:
            record = sidecar.read(path)
        except SidecarError:
            return None
        video = path.with_suffix(f".{record.request.format}")
        if not video.is_file() or video.is_symlink():
            return None
        return Item(self._id(video), video, path, record)

    def _id(self, path: Path) -> str:
        return hashlib.sha256(os.fsencode(path.relative_to(self._folder))).hexdigest()[:16]


def add(app: FastAPI, gallery: Gallery) -> None:
    """Add the routes of its files to `app`."""
    router = APIRouter(prefix="/gallery")

    def found(id: str) -> Item:
        item = gallery.find(id)
        if item is None:
            api.fail(404, f"there is no video {id[:40]!r}", "id")
        return item

    def media(id: str) -> Response:
        return api.file_of(found(id).path)

    def beside(id: str) -> Response:
        return api.file_of(found(id).sidecar)

    def thumbnail(id: str) -> Response:
        try:
            data = gallery.thumbnail(found(id))
        except (OSError, ValueError):
            api.fail(404, "the video cannot be read", "id")
        return Response(data, media_type="image/jpeg")

    for name, route in {"media": media, "sidecar": beside, "thumbnail": thumbnail}.items():
        router.add_api_route(f"/{{id}}/{name}", route, methods=["GET"], response_model=None)
    app.include_router(router)


def models_of(items: list[Item]) -> list[str]:
    """Models that made any of them."""
    return sorted({it.record.request.model for it in items})


def recipes_of(items: list[Item]) -> list[str]:
    """What recipes of any of them are called."""
    return sorted({recipe_name(it.record.request.recipe) for it in items})


def of(items: Sequence[Item], model: str, recipe: str) -> list[Item]:
    """Those of a model and a recipe, each empty for all."""
    return [
        it
        for it in items
        if model in ("", it.record.request.model)
        and recipe in ("", recipe_name(it.record.request.recipe))
    ]


def grid(items: list[Item], model: str, recipe: str) -> str:
    """Those of a model and a recipe (each empty for all) as pictures to choose from."""
    chosen = of(items, model, recipe)
    if not chosen:
        return '<div class="k-frame k-empty">No video here.</div>'
    cards = "".join(map(_card, chosen[:SHOWN]))
    more = len(chosen) - SHOWN
    note = f'<p class="k-facts">and {more:,} older ones</p>' if more > 0 else ""
    return f'<div class="k-gallery">{cards}</div>{note}'


def opened(item: Item) -> str:
    """One of them with all that is known of it."""
    links = " ".join(
        f'<a href="/gallery/{item.id}/{kind}" download="{name}">{name}</a>'
        for kind, name in (
            ("media", escape(item.path.name)),
            ("sidecar", escape(item.sidecar.name)),
        )
    )
    request = item.record.request
    return (
        f'<div class="k-opened"><figure class="k-frame">'
        f"{view.media(request, f'/gallery/{item.id}/media')}</figure>"
        f"<div><p><b>{view.prompt(request)}</b></p>"
        f'<p class="k-facts">{view.settings(request)}</p>'
        f'<p class="k-acts"><button data-act="restore" data-id="{item.id}">Restore settings'
        f'</button> <button data-act="close" data-id="">Close</button></p>'
        f'<p class="k-paths">{links}</p>{view.details([item.record])}</div></div>'
    )


def _card(item: Item) -> str:
    prompt = view.prompt(item.record.request)
    return (
        f'<button class="k-card" data-act="open" data-id="{item.id}" title="{prompt}">'
        f'<img src="/gallery/{item.id}/thumbnail" alt="" loading="lazy"><span>{prompt}</span>'
        f"<small>{view.settings(item.record.request)}</small></button>"
    )
