"""Who is let in, on every route; and what hostile, slow and many clients can do."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from jobserver import Answer, Served, serving

from kinora.app.ui import guard, server
from kinora.app.ui.guard import Access
from kinora.pipelines.errors import KinoraError

TOKEN = "a secret of many letters"
OPEN, CLOSED = Access(None), Access(TOKEN)
SHOWN, FOLLOWED = {"sec_fetch_mode": "no-cors"}, {"sec_fetch_mode": "navigate"}
FORM = {"host": "localhost", "content_type": "multipart/form-data; boundary=x"}
ID = "video_0123456789abcdef"
ROUTES = (
    *(("GET", it) for it in ("/", "/config", "/assets/x.js", "/gradio_api/queue/data")),
    *(("GET", it) for it in ("/v1/videos", "/gradio_api/startup-events")),
    *(("GET", f"/v1/videos/{ID}{it}") for it in ("", "/content", "/events")),
    *(("GET", f"/gallery/0123456789abcdef/{it}") for it in ("media", "thumbnail", "sidecar")),
    *(("POST", it) for it in ("/v1/videos", "/v1/images/generations", "/gradio_api/queue/join")),
    *(("POST", it) for it in ("/gradio_api/upload", "/gradio_api/run/predict")),
    *(("POST", f"/v1/videos/{ID}/{it}") for it in ("cancel", "retry")),
    ("DELETE", f"/v1/videos/{ID}"),
    ("GET", "/gradio_api/file=/etc/passwd"),
)  # fmt: skip


def raw(**headers: str) -> dict[bytes, bytes]:
    """Headers as a server has them."""
    return {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}


def status(path: str, access: Access, **headers: str) -> int | None:
    """What a request is refused with."""
    refused = guard.refusal(path, raw(**headers), access)
    return None if refused is None else refused[0]


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/", {"host": "127.0.0.1:7860"}, None),
        ("/", {"host": "localhost:8000"}, None),
        ("/", {"host": "localhost"}, None),
        ("/", {"host": "[::1]:8000"}, None),
        ("/", {"host": "evil.example:7860"}, 403),
        ("/", {"host": "127.0.0.1.evil.example"}, 403),
        ("/", {"host": "localhost:80.evil.example:80"}, 403),
        ("/", {}, 403),
        ("/v1/videos", {"host": "localhost:1", "origin": "http://localhost:1"}, None),
        ("/v1/videos", {"host": "localhost:1", "origin": "http://localhost:2"}, 403),
        ("/v1/videos", {"host": "localhost:1", "origin": "https://localhost:1"}, 403),
        ("/v1/videos", {"host": "localhost:1", "origin": "http://evil.example"}, 403),
        ("/v1/videos", {"host": "localhost:1", "origin": "null"}, 403),
        ("/v1/videos", {"host": "localhost:1", **SHOWN, "sec_fetch_site": "cross-site"}, 403),
        ("/v1/videos", {"host": "localhost:1", **SHOWN, "sec_fetch_site": "same-site"}, 403),
        ("/v1/videos", {"host": "localhost:1", **SHOWN, "sec_fetch_site": "same-origin"}, None),
        ("/", {"host": "localhost", **FOLLOWED, "sec_fetch_site": "cross-site"}, None),
        ("/", {"host": "localhost", **FOLLOWED, "sec_fetch_site": "none"}, None),
        ("/gradio_api/file=/tmp/x.mp4", {"host": "localhost"}, 404),
        ("/gradio_api/proxy=http://evil.example/", {"host": "localhost"}, 404),
        ("/gradio_api/call/generate", {"host": "localhost"}, 404),
        ("/docs", {"host": "localhost"}, 404),
        ("/v1/videos", {"host": "localhost", "content_length": "3000000"}, 413),
        ("/v1/videos", {**FORM, "content_length": "30000000"}, None),
        ("/v1/videos", {**FORM, "content_length": "40000000"}, 413),
        ("/v1/images/generations", {**FORM, "content_length": "3000000"}, 413),
        ("/gradio_api/upload", {"host": "localhost", "content_length": "3000000"}, None),
        ("/gradio_api/upload", {"host": "localhost", "content_length": "600000000"}, 413),
        ("/v1/videos", {"host": "localhost", "content_length": "-1"}, 400),
    ],
)
def test_only_the_page_and_the_jobs_are_answered(
    path: str, headers: dict[str, str], expected: int | None
) -> None:
    assert status(path, OPEN, **headers) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"authorization": f"Bearer {TOKEN}"}, None),
        ({"authorization": f"bearer {TOKEN}"}, None),
        ({"authorization": "Bearer something else here"}, 401),
        ({"authorization": f"Basic {TOKEN}"}, 401),
        ({"authorization": "Bearer \xe9"}, 401),
        ({"cookie": f"a=b; kinora={CLOSED.cookie}"}, None),
        ({"cookie": f"kinora={TOKEN.replace(' ', '')}"}, 401),
        ({"cookie": f"kinora={OPEN.cookie}"}, 401),
        ({"cookie": "\x00;;="}, 401),
        ({"cookie": 'kinora="\xe9"'}, 401),
        ({"authorization": f"Bearer {TOKEN}", "origin": "https://evil.example"}, 403),
        ({"authorization": f"Bearer {TOKEN}", "origin": "https://a.example"}, None),
    ],
)
def test_a_token_is_asked_of_everybody(headers: dict[str, str], expected: int | None) -> None:
    assert status("/v1/videos", CLOSED, host="a.example", **headers) == expected


def test_without_the_token_every_route_is_closed(tmp_path: Path) -> None:
    with serving(tmp_path / "out", TOKEN) as served:
        for method, path in ROUTES:
            answer = served.ask(path, method=method)
            assert answer.status == 401 and "the token is missing" in answer.complaint, path
            assert answer.headers["www-authenticate"] == "Bearer"
        assert served.ask("/v1/videos", authorization=f"Bearer {TOKEN}").status == 200
        assert served.ask("/?token=wrong").status == 401


def test_the_address_with_the_token_is_exchanged_for_a_cookie(tmp_path: Path) -> None:
    with serving(tmp_path / "out", TOKEN) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("GET", f"/?token={TOKEN.replace(' ', '%20')}")
        answer = connection.getresponse()
        assert (answer.status, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        connection.close()
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
        shown = cookie.partition(";")[0]
        assert served.ask("/v1/videos", cookie=shown).status == 200


@pytest.mark.parametrize(
    ("host", "token", "complaint"),
    [
        ("0.0.0.0", None, "--host 0.0.0.0 lets others in: set KINORA_TOKEN"),
        ("192.168.1.2", None, "lets others in"),
        ("::", None, "lets others in"),
        ("example.org", None, "lets others in"),
        ("0.0.0.0", "short", "KINORA_TOKEN must have 16 characters"),
        ("127.0.0.1", "two\nlines of some length", "in one line"),
    ],
)
def test_no_other_address_without_a_token(host: str, token: str | None, complaint: str) -> None:
    with pytest.raises(KinoraError, match=re.escape(complaint)):
        Access.to(host, token)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(host: str) -> None:
    assert Access.to(host, None).token is None
    assert Access.to("0.0.0.0", TOKEN).token == TOKEN


def test_an_address_that_is_not_here(tmp_path: Path) -> None:
    told = pytest.raises(KinoraError, match=r"192\.0\.2\.1 is no address of this machine")
    with told, server.listening(0, "192.0.2.1"):
        raise AssertionError


HOSTILE = (
    *("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "..", ".kinora-jobs", "video_", "video_xyz"),
    *(f"{ID}%00.mp4", "video_0123456789ABCDEF", "C:%5cwindows", "a" * 5000, "%ff%fe"),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_ids_are_no_paths(served: Served, name: str) -> None:
    for method, path in ROUTES:
        if ID not in path:
            continue
        answer = served.ask(path.replace(ID, name), method=method)
        assert answer.status in (404, 405, 307), (method, path, answer)
        assert b"root:" not in answer.body


def test_a_hostile_prompt_names_a_harmless_file(served: Served) -> None:
    prompt = "../../<script>alert(1)</script> \u202e"
    assert served.ask("/v1/videos", {"prompt": prompt}).json["prompt"] == prompt.strip()
    (made,) = served.jobs.jobs()
    assert re.fullmatch("[a-z0-9-]+", made.row.name)


def post(port: int, *lines: str) -> socket.socket:
    """A connection on which a request has begun."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = ("POST /v1/videos HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines)
    client.sendall("".join(f"{line}\r\n" for line in head).encode())
    return client


def test_a_body_without_a_length_is_cut_off(served: Served) -> None:
    with post(served.port, "Transfer-Encoding: chunked", "") as client:
        chunk = b"x" * 65536
        for _ in range(40):  # 2.5 MiB
            try:
                client.sendall(b"10000\r\n" + chunk + b"\r\n")
            except OSError:
                break  # it has answered, and listens no more
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    assert served.ask("/v1/videos").status == 200


def test_slow_clients_hold_up_nobody(served: Served) -> None:
    slow = [post(served.port, "Content-Length: 100") for _ in range(50)]
    waiting = [post(served.port, "Content-Length: 100", "", '{"prompt"') for _ in range(50)]
    try:
        times: list[float] = []
        for _ in range(20):
            began = time.perf_counter()
            assert served.ask("/v1/videos").status == 200
            times.append(time.perf_counter() - began)
        print(f"a list beside 100 slow clients: at most {1000 * max(times):.0f} ms")
        assert max(times) < 2
    finally:
        for client in (*slow, *waiting):
            client.close()


def test_two_hundred_requests_at_once(served: Served) -> None:
    ready = threading.Barrier(200)

    def ask(number: int) -> Answer:
        ready.wait()
        return served.ask("/v1/videos", {"prompt": "a", "seed": number})

    began = time.perf_counter()
    with ThreadPoolExecutor(200) as threads:
        answers: list[Any] = list(threads.map(ask, range(200)))
    print(f"200 at once: {time.perf_counter() - began:.1f} s")
    assert {it.status for it in answers} == {200}
    ids = {it.json["id"] for it in answers}
    assert len(ids) == 200 == len(served.jobs.jobs(limit=1000))
