"""The jobs over HTTP, asked for by OpenAI's own client."""

from __future__ import annotations

import base64
import json
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')
pytest.importorskip("openai", reason="the client is tested: pip install openai")

import openai
from jobserver import Served, serving, until

from kinora.app.ui import wire

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


def test_a_video_is_made_fetched_and_deleted(client: Any, served: Served) -> None:
    asked = client.videos.create(
        prompt="a red circle", model="kinora-tiny", size="64x48", extra_body={"seed": 7}
    )
    assert (asked.object, asked.status, asked.progress) == ("video", "queued", 0)
    assert (asked.model, asked.prompt, asked.size) == ("kinora-tiny", "a red circle", "64x48")
    done = client.videos.poll(asked.id, poll_interval_ms=20)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at >= done.created_at > 1.7e9
    assert float(done.seconds) == pytest.approx(33 / 16)
    assert done.kinora["seed"] == 7 and done.kinora["attempt"] == 1
    content = client.videos.download_content(asked.id)
    assert (
        content.read()
        == b"a red circle 7 30"
        == served.jobs.media(served.jobs.jobs()[0]).read_bytes()
    )
    assert content.response.headers["content-type"] == "video/mp4"
    assert client.videos.retrieve(asked.id) == done
    gone = client.videos.delete(asked.id)
    assert (gone.id, gone.deleted, gone.object) == (asked.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(asked.id)
    assert [it.name for it in served.jobs.folder.iterdir() if not it.name.startswith(".")] == []


def test_seconds_are_frames(client: Any) -> None:
    asked = client.videos.create(prompt="a", seconds="1")
    assert asked.kinora["frames"] == 17 and asked.seconds == "1.0625"
    with pytest.raises(openai.BadRequestError, match="makes no video of 900 seconds"):
        client.videos.create(prompt="a", seconds="900")


def test_the_list_has_pages(client: Any) -> None:
    made = [client.videos.create(prompt=f"a {k}").id for k in range(5)]
    page = client.videos.list(limit=2)
    assert [it.id for it in page.data] == made[:2:-1] and page.has_more
    assert [it.id for it in client.videos.list(limit=2)] == made[::-1], "page after page"
    up = client.videos.list(limit=3, order="asc", after=made[1])
    assert [it.id for it in up.data] == made[2:] and not up.has_more


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"frmaes": 5}, "'frmaes' is no field that Kinora knows: did you mean frames?"),
        ({"safety_identifier": "me"}, "is no field that Kinora knows: choose from prompt"),
        ({"output": "/etc"}, "output cannot be set: files are named here"),
        ({"frames": 6}, "cannot make 6 frames"),
        ({"frames": "many"}, "frames must be a whole number"),
        ({"frames": 5, "seconds": "4"}, "seconds stands beside frames"),
        ({"width": 64, "size": "64x64"}, "size stands beside width"),
        ({"size": "big"}, "size must be WIDTHxHEIGHT"),
        ({"seconds": "nan"}, "seconds must be a number"),
        ({"model": "/etc"}, "there is no model '/etc'"),
        ({"model": "kinora-tyni"}, "did you mean kinora-tiny?"),
        ({"recipe": "/etc/passwd"}, "there is no recipe '/etc/passwd'"),
        ({"recipe": {"attention": {"method": "blades"}}}, "blade"),
        ({"settings": ["attention.keep=7"]}, "attention"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"device": "toaster"}, "device must be"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_dropped(
    served: Served, fields: dict[str, Any], complaint: str
) -> None:
    answer = served.ask("/v1/videos", {"prompt": "a", **fields})
    assert answer.status == 400 and complaint in answer.complaint
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert served.jobs.jobs() == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 10_000])
def test_a_body_that_is_no_object(served: Served, body: bytes) -> None:
    answer = served.ask("/v1/videos", body)
    assert answer.status == 400 and "must be a JSON object" in answer.complaint


def test_a_form_takes_lists_and_no_needless_file(client: Any, served: Served) -> None:
    asked = client.videos.create(
        prompt="a",
        extra_body={
            "recipe": "balanced", "settings": ["attention.keep=0.5", "when=always"], "strict": True
        },
    )  # fmt: skip
    (job,) = served.jobs.jobs()
    assert asked.kinora["recipe"]["attention"]["keep"] == 0.5 and job.row.request.strict
    assert job.row.request.recipe["when"] == "always"
    with pytest.raises(openai.BadRequestError, match="takes no image: leave input_reference out"):
        client.videos.create(prompt="a", input_reference=("a.png", b"png", "image/png"))


def test_a_failure_says_why_and_a_retry_is_another_attempt(client: Any, served: Served) -> None:
    bad = client.videos.create_and_poll(prompt="flaky", poll_interval_ms=20)
    assert (bad.status, bad.error.code, bad.error.message) == (
        "failed", "GenerationError", "flaked",
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="has no video: it is failed"):
        client.videos.download_content(bad.id)
    again = served.ask(f"/v1/videos/{bad.id}/retry", method="POST")
    assert again.status == 200 and again.json["status"] in ("queued", "in_progress")
    assert client.videos.poll(bad.id, poll_interval_ms=20).kinora["attempt"] == 2
    nothing = served.ask(f"/v1/videos/{bad.id}/retry", method="POST")
    assert nothing.status == 409 and "nothing to retry" in nothing.complaint


def test_cancelling_and_deleting_wait_for_the_worker(client: Any, served: Served) -> None:
    first, second = (client.videos.create(prompt="sleep 60") for _ in range(2))
    until(lambda: client.videos.retrieve(first.id).status == "in_progress")
    waiting = client.videos.retrieve(second.id)
    assert waiting.status == "queued" and waiting.kinora["ahead"] == 1
    served.ask(f"/v1/videos/{first.id}/cancel", method="POST")
    until(lambda: client.videos.retrieve(first.id).status == "failed")
    assert client.videos.retrieve(first.id).error.code == "cancelled"
    until(lambda: client.videos.retrieve(second.id).status == "in_progress")
    assert client.videos.delete(second.id).deleted
    assert [it.id for it in client.videos.list()] == [first.id]


def test_events_come_as_it_goes_on(client: Any, served: Served) -> None:
    asked = client.videos.create(prompt="sleep 2")
    with urllib.request.urlopen(f"{served.address}/v1/videos/{asked.id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line.decode().rstrip("\n") for line in stream]
    assert set(lines[::3]) == {"event: video"} and set(lines[2::3]) == {""}
    told = [json.loads(line.removeprefix("data: ")) for line in lines[1::3]]
    assert [it["id"] for it in told] == [asked.id] * len(told)
    states = list(dict.fromkeys(it["status"] for it in told))
    assert states[-2:] == ["in_progress", "completed"]
    steps = [it["kinora"]["step"] for it in told if "step" in it["kinora"]]
    assert steps == sorted(steps) and len(set(steps)) >= 3
    assert told[-1]["progress"] == 100
    assert served.ask("/v1/videos/video_0000000000000000/events").status == 404


def test_images_are_waited_for(client: Any, served: Served) -> None:
    made = client.images.generate(prompt="a red circle", n=2, size="64x64")
    first, second = (base64.b64decode(it.b64_json) for it in made.data)
    assert (first, second) == (b"a red circle 0 30", b"a red circle 1 30")
    linked = client.images.generate(prompt="a", response_format="url")
    with urllib.request.urlopen(linked.data[0].url) as answer:
        assert answer.headers["content-type"] == "image/png" and answer.read() == b"a 0 30"
    with pytest.raises(openai.InternalServerError, match="by zero"):
        client.images.generate(prompt="boom")
    with pytest.raises(openai.BadRequestError, match="'quality' is no field"):
        client.images.generate(prompt="a", quality="high")
    with pytest.raises(openai.BadRequestError, match="n must be 1 to 10, not 11"):
        client.images.generate(prompt="a", n=11)
    assert {it.row.request.frames for it in served.jobs.jobs()} == {1}


def test_what_a_running_job_is_heading_for_can_be_looked_at(served: Served) -> None:
    asked = served.ask("/v1/videos", {"prompt": "shown sleep 60"}).json["id"]
    preview = f"/v1/videos/{asked}/preview"
    until(lambda: served.ask(preview).status == 200)
    answer = served.ask(preview)
    assert (answer.body, answer.headers["content-type"]) == (b"a picture", "image/jpeg")
    assert answer.headers["cache-control"] == "no-store"
    assert served.ask(f"{preview}?step=3").body == b"a picture"
    assert served.ask(f"{preview}?page=3").status == 400
    told = served.ask(f"/v1/videos/{asked}").json["kinora"]
    assert told["preview_step"] >= 0 and "picture" not in json.dumps(told)
    served.ask(f"/v1/videos/{asked}/cancel", method="POST")
    until(lambda: served.ask(f"/v1/videos/{asked}").json["status"] == "failed")
    assert (served.ask(preview).status, served.ask(preview).body) == (204, b"")
    assert served.ask(f"/v1/videos/video_{'0' * 16}/preview").status == 404
    plain = served.ask("/v1/videos", {"prompt": "sleep 60"}).json["id"]
    until(lambda: "stage" in served.ask(f"/v1/videos/{plain}").json["kinora"])
    assert served.ask(f"/v1/videos/{plain}").json["kinora"]["preview_step"] is None
    assert served.ask(f"/v1/videos/{plain}/preview").status == 204


def test_head_says_what_get_would(client: Any, served: Served) -> None:
    asked = client.videos.create_and_poll(prompt="a", poll_interval_ms=20).id
    running = client.videos.create(prompt="sleep 60").id
    for path in ("", f"/{asked}", f"/{asked}/content", f"/{asked}/content?variant=sidecar"):
        told = served.ask(f"/v1/videos{path}", method="HEAD")
        shown = served.ask(f"/v1/videos{path}")
        assert (told.status, told.body) == (200, b"")
        assert told.headers["content-type"] == shown.headers["content-type"]
        if path:
            assert told.headers["content-length"] == str(len(shown.body))
    events = served.ask(f"/v1/videos/{running}/events", method="HEAD")
    assert (events.status, events.body) == (200, b""), "it does not wait for the end"
    assert events.headers["content-type"].startswith("text/event-stream")
    assert served.ask(f"/v1/videos/video_{'0' * 16}", method="HEAD").status == 404
    served.ask(f"/v1/videos/{running}/cancel", method="POST")


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_is_told_in_a_line_and_shows_where_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str], debug: bool,
) -> None:  # fmt: skip
    def wrong(*_: object) -> NoReturn:
        raise ZeroDivisionError("of /home/somebody")

    monkeypatch.setattr(wire, "video", wrong)
    monkeypatch.setenv("KINORA_DEBUG", "1" if debug else "")
    with serving(tmp_path / "out") as served:
        answer = served.ask("/v1/videos", {"prompt": "a"})
        assert answer.status == 500 and answer.json["error"]["type"] == "server_error"
        assert answer.complaint == (
            "a fault in Kinora: ZeroDivisionError; KINORA_DEBUG=1 shows where, please report it"
        )
    assert ("of /home/somebody" in caplog.text) == debug
    assert capfd.readouterr().err == ""
