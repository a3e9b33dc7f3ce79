"""Images that clients have uploaded, beside the jobs: known by the SHA-256 of their content."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from .. import images
from ..errors import RequestError
from ..files import explain, write_all

_ID = re.compile(r"[0-9a-f]{64}")


class Uploads:
    """Those of one folder, which is made with the first. Ids are hashes; no path comes from them.

    They stay, since records of videos name them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, raw: bytes, *, named: str) -> str:
        """Keep the bytes of an image file, and return its id.

        Raises `RequestError` where they are none that can be used, calling it as it is `named`, and
        `OutputError` where it cannot be written.
        """
        images.decode(raw, named=named)
        id = images.sha256(raw)
        if self.find(id) is None:
            draft = self._folder / f".{secrets.token_hex(6)}.part"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                try:
                    write_all(descriptor, raw)
                finally:
                    os.close(descriptor)
                draft.replace(self._folder / f"{id}{images.ending(raw)}")
            except OSError as error:
                draft.unlink(missing_ok=True)
                raise explain(error, self._folder) from None
        return id

    def find(self, id: str | None) -> Path | None:
        """Where the image with this id is; None where there is none."""
        if id is None or not _ID.fullmatch(id):
            return None
        paths = (self._folder / f"{id}{ending}" for ending in images.FORMATS.values())
        return next((it for it in paths if it.is_file()), None)

    def fields(self, id: str) -> dict[str, str]:
        """What a request says to begin with the image with this id. Raises `RequestError`."""
        path = self.find(id)
        if path is None:
            raise RequestError("there is no such image any more: upload it again")
        return {"image": str(path), "image_sha256": id}
