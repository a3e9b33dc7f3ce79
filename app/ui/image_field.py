"""The field for the image that a video begins with; it shows where the model takes one.

The page knows an image by its id alone, see `pipelines/jobs/uploads.py`.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import gradio as gr

from ...pipelines import images
from ...pipelines.cards import Card
from ...pipelines.errors import KinoraError
from ...pipelines.jobs import Uploads
from . import view
from .history import BRIEF, Update

_ENDINGS = [*images.FORMATS.values(), ".jpeg"]
_THUMBNAIL_PX = 240
_NONE = '<p class="k-facts">What is beyond the width and height is cut off evenly.</p>'
_LOST = '<p class="k-facts">The image of this video was not uploaded here: drop it again.</p>'


class ImageField:
    """Its components; `id` is what a request is made from."""

    def __init__(self, card: Card) -> None:
        with gr.Column(visible=card.takes_image, elem_id="k-image") as self._column:
            self._dropped = gr.File(
                label="Image that the video begins with: PNG, JPEG or WebP", file_types=_ENDINGS,
                elem_id="k-image-dropped", height=120,
            )  # fmt: skip
            self._shown = gr.HTML(_NONE, elem_id="k-image-shown")
            self.id = gr.Textbox("", visible=False)

    def changed(self) -> list[Any]:
        """What `standing` changes."""
        return [self._column, self._shown, self.id]

    def wire(self, uploads: Uploads) -> None:
        """Take what is dropped there."""
        self._uploads = uploads
        parts = [self._shown, self.id, self._dropped]
        self._dropped.upload(self.take, self._dropped, parts, **BRIEF)

    def take(self, path: str | None) -> Update:
        """Keep the image that was dropped, and forget the file; or say why it is none."""
        if path is None:
            return {}
        file = Path(path)
        try:
            id = self._uploads.keep(images.read(path), named=file.name)
            told: Update = {self.id: id, self._shown: self._drawn(id)}
        except KinoraError as error:
            told = {self._shown: view.failed(str(error).replace(path, file.name)), self.id: ""}
        finally:
            file.unlink(missing_ok=True)
        return {**told, self._dropped: None}

    def standing(self, card: Card, id: str | None = None) -> Update:
        """The field as a model needs it, with the image of a record that had one."""
        known = id if card.takes_image and self._uploads.find(id) else ""
        shown = self._drawn(known) if known else _LOST if id else _NONE
        return {
            self._column: gr.Column(visible=card.takes_image), self._shown: shown, self.id: known
        }  # fmt: skip

    def _drawn(self, id: str) -> str:
        path = self._uploads.fields(id)["image"]
        picture, data = images.decode(images.read(path), named="kept"), io.BytesIO()
        width, height = picture.size
        picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        picture.save(data, "JPEG", quality=85)
        encoded = base64.b64encode(data.getvalue()).decode()
        told = f"the video begins with this image of {width}x{height}"
        return f'<img class="k-image" alt="{told}" src="data:image/jpeg;base64,{encoded}">{_NONE}'
