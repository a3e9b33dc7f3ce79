"""What hostile and clumsy clients send to the whole application, the page's own routes included."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from filming import film
from jobserver import Served, serving, until, whole

from kinora.app.ui import view, wire
from kinora.app.ui.gallery import Gallery
from kinora.app.ui.page import Page
from kinora.pipelines.errors import RequestError

TOKEN = "a secret of many letters"
SECRET = "nobody may read this"
PATHS = (
    *("../secret.txt", "../../../../../../../../etc/passwd", "/etc/passwd", "....//secret.txt"),
    *("..\\secret.txt", "C:\\secret.txt", "secret.txt\x00.mp4", "file:///etc/passwd"),
    *("link.txt", ".kinora-jobs/jobs.sqlite", "~/secret.txt", "%2e%2e%2fsecret.txt", "a" * 3000),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one video, beside a file that is nobody's, which a link in it leads to."""
    made = tmp_path_factory.mktemp("hostile") / "made"
    film(made, "one")
    film(made, "large", content=b"x" * 2**23)
    secret = made.parent / "secret.txt"
    secret.write_text(SECRET)
    (made / "link.txt").symlink_to(secret)
    (made / "linked.mp4").symlink_to(secret)
    (made / "linked.json").write_text((made / "one.json").read_text())
    return made


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The application for this machine."""
    with whole(folder, tmp_path_factory.mktemp("scratch")) as served:
        yield served


def routes(served: Served) -> list[tuple[str, str]]:
    """Method and path of every route that takes a name, with {} for it, that the guard lets by."""
    fixed = [
        *(("GET", f"/v1/videos/{{}}{it}") for it in ("", "/content", "/events")),
        *(("POST", f"/v1/videos/{{}}/{it}") for it in ("cancel", "retry")),
        ("DELETE", "/v1/videos/{}"),
        *(("GET", f"/gallery/{{}}/{it}") for it in ("media", "sidecar", "thumbnail")),
        ("GET", "/evaluations/{}"),
        *(("GET", f"/{it}/{{}}") for it in ("assets", "static", "svelte")),
        *(("GET", f"/gradio_api/{it}") for it in ("upload_progress?upload_id={}", "file={}")),
        *(("GET", f"/gradio_api/{it}") for it in ("file/{}", "proxy={}", "stream/{}/a/b")),
        *(("GET", f"/{it}") for it in ("file={}", "custom_component/{}/x/y/z", "theme.css?a={}")),
        ("POST", "/gradio_api/run/{}"),
        ("POST", "/gradio_api/call/{}"),
        ("GET", "/gradio_api/queue/data?session_hash={}"),
    ]
    return fixed


@pytest.mark.parametrize("path", PATHS)
def test_no_route_leads_to_a_file_by_its_path(served: Served, path: str) -> None:
    for method, route in routes(served):
        if "queue/data" in route or "upload_progress" in route:
            continue  # streams that say nothing of files
        for spelled in (quote(path, safe=""), quote(path, safe="/.~:\\")):
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
            connection.request(method, route.format(spelled), headers={"host": "localhost"})
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            assert SECRET.encode() not in body and b"root:" not in body, (method, route)
            assert b"SQLite format" not in body and b"Traceback" not in body, (method, route)
            harmless = "theme.css" in route
            assert harmless or answer.status in (307, 400, 403, 404, 405, 422), (method, route)


def test_every_route_of_the_application_asks_for_the_token(folder: Path, tmp_path: Path) -> None:
    with whole(tmp_path / "made", tmp_path / "scratch", TOKEN) as served:
        for method, route in routes(served):
            answer = served.ask(route.format("x"), method=method)
            assert answer.status == 401 and "the token is missing" in answer.complaint, route
        for route in ("/", "/config", "/theme.css", "/manifest.json", "/gradio_api/info"):
            assert served.ask(route).status == 401, route
        assert served.ask("/config", authorization=f"Bearer {TOKEN}").status == 200


def page_of(served: Served) -> dict[str, Any]:
    """The configuration of the page."""
    return served.ask("/config").json


def test_files_that_a_client_names_are_neither_read_nor_removed(
    served: Served, folder: Path
) -> None:
    """The fields that take dropped files are told a path, as if that had been uploaded."""
    config = page_of(served)
    dropped = {it["id"] for it in config["components"] if it["type"] == "file"}
    asked = [it for it in config["dependencies"] if dropped & set(it["inputs"])]
    assert len(dropped) == 2 == len(asked), "settings are restored from one, videos begin with one"
    victim = folder / "one.json"
    for path in (str(victim), "/etc/passwd", str(folder.parent / "secret.txt")):
        for call in asked:
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.json"}]
            data += [None] * (len(call["inputs"]) - 1)
            body = {"data": data, "fn_index": call["id"], "session_hash": "s"}
            for route in ("/gradio_api/run/predict", "/gradio_api/queue/join"):
                answer = served.ask(route, body)
                assert SECRET.encode() not in answer.body and b"root:" not in answer.body
    assert victim.is_file() and (folder.parent / "secret.txt").read_text() == SECRET


JUNK = (
    *(b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 20_000, b'{"data": 1}'),
    *(b'{"data": [], "fn_index": -1}', b'{"data": [], "fn_index": 100000}'),
    *(b'{"data": [], "fn_index": "x", "session_hash": {}}', b'{"data": [1], "fn_index": 0}'),
    b'{"data": [null], "fn_index": 1, "session_hash": "../../x", "event_data": {"a": [[[]]]}}',
    b'{"data": [], "fn_index": 2, "trigger_id": 1e400}',
)


@pytest.mark.parametrize("junk", JUNK)
def test_junk_for_the_page_ends_nothing(served: Served, junk: bytes) -> None:
    for route in ("/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/reset"):
        answer = served.ask(route, junk)
        assert b"Traceback" not in answer.body and b"/app/ui/" not in answer.body, answer
    assert served.ask("/v1/videos").status == 200
    assert served.ask("/config").status == 200


def test_who_reads_slowly_holds_up_nobody(served: Served, folder: Path) -> None:
    (id,) = (it.id for it in Gallery(folder).items() if it.path.stem == "large")
    slow = [socket.create_connection(("127.0.0.1", served.port), timeout=30) for _ in range(100)]
    try:
        for client in slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.sendall(f"GET /gallery/{id}/media HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        times: list[float] = []
        for _ in range(20):
            began = time.perf_counter()
            assert served.ask("/v1/videos").status == 200
            times.append(time.perf_counter() - began)
        print(f"a list beside 100 that do not read their 8 MiB: at most {1000 * max(times):.0f} ms")
        assert max(times) < 2
    finally:
        for client in slow:
            client.close()


def test_the_page_is_served_to_many_at_once(served: Served) -> None:
    ready, seen = threading.Barrier(100), list[int]()

    def ask() -> None:
        ready.wait()
        seen.append(served.ask("/").status)

    began = time.perf_counter()
    threads = [threading.Thread(target=ask) for _ in range(100)]
    for it in threads:
        it.start()
    for it in threads:
        it.join()
    print(f"100 pages at once: {time.perf_counter() - began:.1f} s")
    assert seen == [200] * 100


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"prompt": "a", "frmaes": None}, "'frmaes' is no field"),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "seed is given twice"),
        (b'{"prompt": "a", "guidance": NaN}', "nan"),
        (b'{"prompt": "a", "guidance": 1e999}', "guidance"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON object"),
        ({"prompt": "a", "seed": 2**70}, "seed"),
        ({"prompt": "a\ud800"}, "no UTF-8"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a" * 200_001}, "prompt"),
        ({"prompt": "a", "settings": "attention.keep=1" * 1000}, "settings"),
        ({"prompt": "a", "recipe": {"x": {"y": {}}}}, "x"),
        (b'{"prompt": "a", "recipe": {"title": "\\ud800"}}', "title is no UTF-8 text"),
        (b'{"prompt": "a", "settings": ["title=\\ud800"]}', "no UTF-8 text"),
        (
            b'{"prompt": "a", "settings": ["attention.method=blade", "attention.keep=\\ud800"]}',
            "keep",
        ),
        (b'{"prompt": "a", "recipe": {"\\ud800": 1}}', "has no"),
        (b'{"prompt": "a", "model": "\\ud800"}', "there is no model"),
        (b'{"prompt": "a", "\\ud800": 1}', "no field"),
        ({"prompt": "a", "recipe": {"title": "a" * 20_001}}, "title has 20,001 characters"),
        ({"prompt": "a", "steps": 8, "settings": ["steps.policy=pattern"]}, "need 12 steps"),
        *(
            ({"prompt": "a", **it}, "names a file of the server")
            for it in (
                {"settings": ["attention.method=paro", "attention.calibration=/etc/passwd"]},
                {"recipe": {"attention": {"method": "paro", "calibration": "/nowhere"}}},
                {"settings": ["steps.policy=pattern", "steps.mask=/etc/passwd"]},
            )
        ),
    ],
)
def test_what_is_no_request_is_refused_in_a_line(served: Served, body: Any, complaint: str) -> None:
    for route in ("/v1/videos", "/v1/images/generations"):
        answer = served.ask(route, body)
        assert answer.status == 400, answer
        assert complaint in answer.complaint and len(answer.complaint) < 1000
    assert served.jobs.jobs() == [] and served.ask("/v1/videos").status == 200


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        (3 * ['name="input_reference"; filename="a.png"'], "Too many files"),
        ([f'name="a{i}"' for i in range(1001)], "Too many fields"),
        (['nothing="a"'], "name"),
    ],
)
def test_what_is_no_form_is_refused_in_a_line(
    served: Served, parts: list[str], complaint: str
) -> None:
    body = "".join(f"--b\r\nContent-Disposition: form-data; {it}\r\n\r\nx\r\n" for it in parts)
    answer = served.ask(
        "/v1/videos", f"{body}--b--\r\n".encode(), content_type="multipart/form-data; boundary=b"
    )
    assert answer.status == 400 and complaint in answer.complaint


@pytest.mark.parametrize("debug", [False, True])
def test_clients_write_no_lines_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, debug: bool
) -> None:
    monkeypatch.setenv("KINORA_DEBUG", "1" if debug else "")
    with serving(tmp_path / "out") as served:
        answer = served.ask(
            "/v1/videos", b"--b\r\n\r\nEvil line", content_type="multipart/form-data; boundary=a"
        )
        assert answer.status == 400
    told = [it for it in caplog.records if it.name.startswith("python_multipart")]
    assert bool(told) == debug


METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW")
ID = "video_0123456789abcdef"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/", "/v1/videos/", "/v1/a/b?c=d", "/v1/a?b&b"])
def test_where_nothing_is_the_answer_is_a_line(served: Served, method: str, path: str) -> None:
    answer = served.ask(path, method=method)
    assert answer.status == 404
    assert answer.complaint == f"there is no {method} {path.partition('?')[0]}"


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        ("/v1/videos", {"GET", "HEAD", "POST"}),
        (f"/v1/videos/{ID}", {"DELETE", "GET", "HEAD"}),
        (f"/v1/videos/{ID}/events", {"GET", "HEAD"}),
        (f"/v1/videos/{ID}/retry", {"POST"}),
        ("/v1/images/generations", {"POST"}),
    ],
)
def test_other_methods_are_told_those_that_there_are(
    served: Served, path: str, taken: set[str]
) -> None:
    for method in {*METHODS, "HEAD"} - taken:
        answer = served.ask(path, method=method)
        assert answer.status == 405 and set(answer.headers["allow"].split(", ")) == taken
        if method != "HEAD":
            known = ", ".join(sorted(taken))
            assert answer.complaint == f"{path} takes {known}, not {method}"


@pytest.mark.parametrize("path", ["/v1/nothing%0a", "/v1/videos%0a", "/v1/a%0ab", "/v1/videos/%00"])
def test_a_line_break_is_no_part_of_a_path(served: Served, path: str) -> None:
    answer = served.ask(path)
    assert answer.status == 404 and answer.complaint == "there is nothing here"


@pytest.mark.parametrize(
    ("path", "unknown"),
    [
        ("/v1/videos?limt=3", "limt"),
        ("/v1/videos?limit=3&offset=1", "offset"),
        ("/v1/videos/video_0123456789abcdef?x=1", "x"),
        ("/v1/videos/video_0123456789abcdef/content?varient=video", "varient"),
    ],
)
def test_unknown_parameters_are_refused(served: Served, path: str, unknown: str) -> None:
    answer = served.ask(path)
    assert answer.status == 400 and f"'{unknown}' is no parameter" in answer.complaint


@pytest.mark.parametrize("query", ["limit=1&limit=2", "limit=1&order=asc&limit=1", "limit&limit"])
def test_parameters_that_are_given_twice_are_refused(served: Served, query: str) -> None:
    answer = served.ask(f"/v1/videos?{query}")
    assert answer.status == 400 and answer.complaint == "limit is given twice"


def test_answers_have_the_headers_that_keep_strangers_out(served: Served) -> None:
    for path in ("/", "/config", "/v1/videos", "/nothing"):
        headers = {name.lower(): it for name, it in served.ask(path).headers.items()}
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers, path
    origin = served.ask("/config", origin="http://evil.example")
    assert origin.status == 403 and "another website" in origin.complaint


def test_the_page_names_no_folder_to_strangers(served: Served, folder: Path) -> None:
    text = json.dumps(page_of(served)) + served.ask("/").body.decode()
    assert str(folder.parent) not in text
    assert not re.search(r"share\.gradio|googleapis|cdnjs", text)


@pytest.mark.parametrize("named_only", [True, False])
def test_the_page_says_how_to_decode_and_no_folder_to_strangers(
    named_only: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with serving(folder) as served:
        asked = served.ask("/v1/videos", {"prompt": "nan"}).json["id"]
        until(lambda: served.ask(f"/v1/videos/{asked}").json["status"] == "failed")
        job = served.jobs.jobs()[0]
        kept = served.jobs.latents(job)
        assert kept is not None

        async def made() -> Page:
            return Page(served.jobs, Gallery(served.jobs.folder), named_only=named_only)

        page = asyncio.run(made())
        seen = page.see([job.id, "gone"])
        cancelled = [replace(it, job=replace(it.job, reason=None)) for it in seen]
        named = kept.name if named_only else str(kept)
        for html in (view.status(seen), view.listing(seen), view.status(cancelled)):
            assert f"<code>kinora decode {named}</code>" in html
        assert (str(folder) in page.told(RequestError(f"no {kept}"))) is not named_only
        assert (str(folder) in page.told(OSError(f"no {kept}"))) is not named_only


def test_jobs_and_errors_name_no_folder_to_strangers(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with serving(folder) as served:
        asked = served.ask("/v1/videos", {"prompt": "nan"}).json["id"]
        until(lambda: served.ask(f"/v1/videos/{asked}").json["status"] == "failed")
        told = served.ask(f"/v1/videos/{asked}").json
        name = f"nan-s0-{asked.removeprefix('video_')}.latents.safetensors"
        assert told["error"]["message"] == f"decoding gave NaN; `kinora decode {name}`"
        assert told["kinora"]["reason"] == told["error"]["message"]
        image = served.ask("/v1/images/generations", {"prompt": "nan"})
        assert image.status == 500 and "`kinora decode nan-s0-" in image.complaint
        waiting = served.ask("/v1/videos", {"prompt": "disk"}).json["id"]
        until(lambda: served.ask(f"/v1/videos/{waiting}").json["kinora"].get("held"))
        shown = [served.ask("/v1/videos").body, image.body]
        store = served.jobs._store  # pyright: ignore[reportPrivateUsage]
        connection = store._connection  # pyright: ignore[reportPrivateUsage]
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        prompt = "a long prompt " * 1400
        answers = [served.ask("/v1/videos", {"prompt": prompt}) for _ in range(20)]
        full = answers[-1]
        assert full.status == 507
        told = ".kinora-jobs/jobs.sqlite cannot be used: database or disk is full"
        assert full.complaint == told
    for body in (*shown, full.body):
        assert str(tmp_path).encode() not in body


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, None),
        ("/a/out/b.mp4 and `/a/out/c` stay", "b.mp4 and `c` stay"),
        ("the disk is full: /a/out cannot be written", "the disk is full: . cannot be written"),
        ("(/a/out) or /a/out. file:///a/out/b", "(.) or .. file://b"),
        ("/a/output/b, /z/a/out/b, /a/out.old", "/a/output/b, /z/a/out/b, /a/out.old"),
    ],
)
def test_files_are_named_from_the_output_folder_on(text: str | None, told: str | None) -> None:
    assert wire.within(Path("/a/out"), text) == told
