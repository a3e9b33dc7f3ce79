"""What is uploaded to the page: hostile forms and names, and what is left of it."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from jobserver import Served, until, whole

from kinora.app.ui import dropped, guard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the jobs."""
    return tmp_path_factory.mktemp("uploads") / "made"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what is uploaded goes."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def served(folder: Path, place: Path) -> Iterator[Served]:
    """The application for this machine."""
    with whole(folder, place) as served:
        yield served


@pytest.fixture
def scratch(served: Served, place: Path) -> Path:
    """Where what is uploaded goes, emptied."""
    for it in place.iterdir():
        shutil.rmtree(it)
    return place


def upload(served: Served, body: bytes, kind: str) -> Any:
    """Send a body to where dropped files go."""
    return served.ask("/gradio_api/upload?upload_id=x", body, method="POST", content_type=kind)


def form(name: str, content: bytes) -> bytes:
    """A form with one file."""
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode("utf-8", "surrogateescape") + content + b"\r\n--b--\r\n"


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", FORM),
        (b"--b", FORM),
        (b"--b\r\n\r\n", FORM),
        (b"\x00" * 1000, FORM),
        (form("a.mp4", b"x")[:-10], FORM),
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=" + "b" * 5000),
        (b"{}", "application/json"),
        (b"x", "text/\xff"),
    ],
)
def test_a_malformed_upload_is_refused(
    served: Served, scratch: Path, body: bytes, kind: str
) -> None:
    answer = upload(served, body, kind)
    assert answer.status >= 400 or answer.json == [], "no file is in it"
    assert b"Traceback" not in answer.body
    until(lambda: not lying(scratch))
    assert served.ask("/config").status == 200


@pytest.mark.parametrize(
    "name",
    [
        *("../../../x.mp4", "/etc/cron.d/x.mp4", "..", "", "a" * 4000 + ".mp4", "con\x01trol.mp4"),
        *("<img src=x onerror=alert(1)>.mp4", "x.mp4\\..\\..\\y", "\u202egpm.4", "-rf.mp4"),
    ],
)
def test_a_hostile_file_name_stays_in_the_scratch_folder(
    served: Served, folder: Path, name: str
) -> None:
    before = {it for it in folder.parent.rglob("*") if ".kinora-jobs" not in it.parts}
    answer = upload(served, form(name, b"x"), FORM)
    assert b"Traceback" not in answer.body
    if answer.status == 200:
        for path in answer.json:
            assert ".." not in Path(path).parts and "scratch" in path
    assert {it for it in folder.parent.rglob("*") if ".kinora-jobs" not in it.parts} == before


def sending(served: Served, content: bytes) -> socket.socket:
    """A connection on which an upload without a length has begun."""
    client = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    lines = ("POST /gradio_api/upload HTTP/1.1", "Host: localhost", f"Content-Type: {FORM}")
    head = (*lines, "Transfer-Encoding: chunked", "", "")
    client.sendall("\r\n".join(head).encode())
    send(client, form("a.mp4", content).removesuffix(b"\r\n--b--\r\n"))
    return client


def send(client: socket.socket, chunk: bytes) -> None:
    """Send more of it."""
    client.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))


def lying(scratch: Path) -> list[Path]:
    """The files that uploads have left."""
    return [it for it in scratch.rglob("*") if it.is_file()]


def opened(folder: Path) -> list[str]:
    """The files in it that this process has open, those that were removed too."""
    found: list[str] = []
    for it in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(it))
    return [it for it in found if it.startswith(f"{folder}/")]


def test_an_oversized_upload_is_cut_off(
    served: Served, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "UPLOAD_BYTES", 2**20)
    assert upload(served, form("a.mp4", b"x" * 2**19), FORM).status == 200
    (arrived,) = lying(scratch)
    with sending(served, b"") as client:
        for _ in range(32):
            try:
                send(client, b"x" * 65536)
            except OSError:
                break
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    assert lying(scratch) == [arrived], "nothing of what was cut off"
    assert served.ask("/config").status == 200


def test_an_upload_that_is_given_up_leaves_nothing(served: Served, scratch: Path) -> None:
    with sending(served, b"x" * 2**20):
        until(lambda: any(it.stat().st_size == 2**20 for it in lying(scratch)))
    until(lambda: not lying(scratch))
    # The disk has its space again, once garbage is looked for: who received it is in a cycle.
    until(lambda: gc.collect() >= 0 and not opened(scratch))
    for body in (form("a.mp4", b"x" * 999)[:-10], form("a.mp4", b"x").replace(b"files", b"fools")):
        assert upload(served, body, FORM).json == []
        until(lambda: not lying(scratch))


def test_an_upload_beside_one_that_fails_arrives(served: Served, scratch: Path) -> None:
    with sending(served, b"x" * 1000) as slow:
        until(lambda: len(lying(scratch)) == 1)
        assert upload(served, form("b.mp4", b"x")[:-10], FORM).json == []
        send(slow, b"\r\n--b--\r\n")
        slow.sendall(b"0\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
    until(lambda: [it.name for it in lying(scratch)] == ["a.mp4"])
    assert lying(scratch)[0].read_bytes() == b"x" * 1000


def test_what_was_uploaded_and_not_used_is_removed(
    served: Served, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropped, "AGE_S", 0.5)
    assert upload(served, form("a.mp4", b"x"), FORM).status == 200
    assert [it.name for it in lying(scratch)] == ["a.mp4"], "the page is about to read it"
    until(lambda: not list(scratch.iterdir()))


def test_uploads_have_an_end_in_total(
    served: Served, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropped, "MOST_BYTES", 3 * 2**20)
    with sending(served, b"x" * 2**21) as slow:
        until(lambda: any(it.stat().st_size == 2**21 for it in lying(scratch)))
        answer = upload(served, form("b.mp4", b"y" * (2**20 + 1)), FORM)
        assert answer.status == 507
        assert answer.complaint == "uploads hold 3 MiB, which is the most: try again in 5 minutes"
        assert served.ask("/v1/videos").status == 200
        slow.sendall(b"0\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 ")
    until(lambda: not lying(scratch))
    assert upload(served, form("b.mp4", b"y" * 2**21), FORM).status == 200
