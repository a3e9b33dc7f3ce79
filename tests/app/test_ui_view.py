"""What the page shows of jobs: one line for each thing, all of it escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from kinora.accel import recipe as recipes
from kinora.accel.receipt import Receipt
from kinora.app.ui import controls, fields, form, view
from kinora.app.ui.seen import Seen, recipe_name
from kinora.pipelines import cards, planning
from kinora.pipelines.batch.rows import Row
from kinora.pipelines.events import STAGES, Progress
from kinora.pipelines.jobs import STATUSES, Job, Status
from kinora.pipelines.request import Request, resolve
from kinora.pipelines.sidecar import Machine, ModelRecord, Record

ASKED = Request(prompt='a "red" <circle>')
RESOLVED = resolve(ASKED, cards.find("kinora-tiny"))
TIMES: dict[str, float] = dict(zip(STAGES, (1.0, 0.0, 2.5, 0.25, 0.25), strict=True))


def progress(stage: Any, step: int = 0, steps: int = 0, eta_s: float | None = None) -> Progress:
    return Progress(stage, step, steps, 10.0, eta_s, 1, 1)


def seen(status: Status, reason: str | None = None, **known: Any) -> Seen:
    """A job as it stands."""
    id = f"{known.pop('id', 1):016x}"
    stopping = int(known.pop("stopping", False))
    row = Row(id, 0, f"a-red-circle-s0-{id}", known.pop("request", RESOLVED))
    return Seen(Job(1, status, row, 1, stopping, 1.0, 2.0, 5.0, None, reason), **known)


def record(**fields: Any) -> Record:
    """What the sidecar of a finished video says."""
    receipt = Receipt(recipe={}, strict=False, steps=2, attention=None, stages_s=TIMES)
    model = ModelRecord(name="m", pipeline="p", repo=None, fingerprint="f", vae_dtype="float32")
    machine = Machine(device="cpu", threads=1, versions={})
    request = RESOLVED.model_copy(update=fields)
    return Record(request=request, model=model, machine=machine, created="today",
                  latents_sha256="l", receipt=receipt)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the nearest is --size 32x48", "the nearest is Width and Height 32x48"),
        ("a smaller --size or --frames", "a smaller Width and Height or Frames"),
        ("leave --negative-prompt out", "leave Negative prompt out"),
        ("num_videos must be 1 to 9", "Videos must be 1 to 9"),
        ("choose --recipe dense; try --dtype float32", "choose Recipe dense; try Dtype float32"),
        ("going on, as --force asks", "going on, as Force asks"),
        ("another --output", "another --output"),
        ("`kinora decode x --device cpu`", "`kinora decode x --device cpu`"),
        ("/models/num_videos --sizes x--size", "/models/num_videos --sizes x--size"),
    ],
)
def test_what_is_said_on_the_page_has_its_words(text: str, expected: str) -> None:
    assert fields.in_titles(text) == expected
    shown = re.sub("`(.*)`", r"<code>\1</code>", escape(expected))
    assert shown in view.failed(text)
    assert shown in view.refused(text)
    assert shown in view.status([seen("running", notices=(text,))])


def test_what_stands_between_backticks_is_code_and_stays_text() -> None:
    told = view.worded("run `kinora <b> --size` or `x'y`, not ` <i>")
    assert told == (
        "run <code>kinora &lt;b&gt; --size</code> or <code>x&#x27;y</code>, not ` &lt;i&gt;"
    )
    assert view.worded("``") == "``"
    assert "<li>a <code>&lt;b&gt;</code></li>" in view.remark("Predicted", ["a `<b>`"])


def test_a_notice_of_several_recipes_says_of_which() -> None:
    def job(name: str, id: int, *notices: str) -> Seen:
        table = recipes.find(name).table() if name != "dense" else {}
        request = RESOLVED.model_copy(update={"recipe": table})
        return seen("running", id=id, request=request, notices=notices)

    html = view.status([
        job("dense", 1, "unknown word"), job("balanced", 2, "unknown word", "no gain", "<b>"),
        job("fast", 3, "unknown word", "no gain", "no gain at all"),
    ])  # fmt: skip
    told = re.findall('<p class="k-notice">(.*?)</p>', html)
    assert told == [
        "unknown word", "balanced, fast: no gain", "balanced: &lt;b&gt;", "fast: no gain at all"
    ]  # fmt: skip
    html = view.status([job("fast", 1, "no gain"), job("fast", 2, "no gain")])
    assert re.findall('<p class="k-notice">(.*?)</p>', html) == ["no gain"]


def test_a_job_on_its_way_is_told_with_a_bar() -> None:
    told = view.status([seen("queued", ahead=2)])
    assert "waiting for its turn" in told and "2 ahead of it" in told
    assert 'data-phase="waiting"' in told
    held = view.status([seen("queued", held="the disk <b> is full")])
    assert "the disk &lt;b&gt; is full" in held
    told = view.status([seen("running", progress=progress("load"))])
    assert "loading the model" in told and "<progress" in told and "value=" not in told
    step = progress("denoise", 12, 30, 20.0)
    told = view.status([seen("running", progress=step, ago_s=3.0, notices=("a <b>",))])
    assert "step 12 of 30" in told and 'max="30" value="12"' in told
    assert "13 s, about 17 s left" in told, "three seconds after the step"
    assert "a &lt;b&gt;" in told and 'data-phase="running"' in told
    told = view.status([seen("running", progress=step, stopping=True)])
    assert "stopping, within a step" in told and "step 12" not in told


@pytest.mark.parametrize(
    ("job", "phase", "told"),
    [
        (seen("cancelled"), "cancelled", "Cancelled: nothing of it is left."),
        (
            seen("cancelled", latents=Path("x.latents.safetensors")),
            "cancelled",
            "Cancelled: its latents are kept: finish with <code>kinora decode "
            "x.latents.safetensors</code>",
        ),
        (seen("interrupted", "Kinora was ended"), "failed", "Interrupted: Kinora was ended"),
        (seen("failed", "no <model>"), "failed", "no &lt;model&gt;"),
        (seen("failed", "decode x", latents=Path("x")), "failed", "decode x<"),
    ],
)
def test_what_ended_a_job_is_one_line(job: Seen, phase: str, told: str) -> None:
    html = view.status([job])
    assert told in html and f'data-phase="{phase}"' in html and html.count("<p") == 1


def test_the_result_names_files_times_and_receipt() -> None:
    html = view.result([seen("done", record=record())])
    address = "/v1/videos/video_0000000000000001/content"
    assert f'<video src="{address}" width="128" height="128"' in html
    assert "a &quot;red&quot; &lt;circle&gt;" in html and "<circle>" not in html
    assert "<dt>denoise</dt><dd>2.50 s</dd>" in html and "<dt>total</dt><dd>4.00 s</dd>" in html
    assert "nothing accelerated: the stock pipeline ran" in html
    for link, name in (("", "mp4"), ("?variant=sidecar", "json")):
        named = f"a-red-circle-s0-0000000000000001.{name}"
        assert f'<a href="{address}{link}" download="{named}">{named}</a>' in html
    for kind, tag in (("png", "<img src="), ("gif", "<img src="), ("webm", "<video src=")):
        request = RESOLVED.model_copy(update={"format": kind})
        assert tag in view.result([seen("done", request=request, record=record())])
    kept = seen("done", record=record(), latents=Path("/x/a.latents.safetensors"))
    assert '?variant=latents" download="a.latents.safetensors">' in view.result([kept])
    assert view.result([seen("running"), seen("failed")]) == view.EMPTY


def test_a_running_job_is_shown_as_far_as_it_is() -> None:
    shown = [seen("running", id=3, progress=progress("denoise", 12, 30), preview=11)]
    html = view.result(shown)
    assert 'src="/v1/videos/video_0000000000000003/preview?step=11"' in html
    assert "the first frame as step 11 of 30 estimates it" in html
    html = view.result([seen("done", id=1, record=record()), *shown])
    assert "preview" not in html, "it would begin the finished one anew"
    image = RESOLVED.model_copy(update={"frames": 1})
    assert "the image as step" in view.result([seen("running", request=image, preview=1)])


def test_several_videos_are_all_shown_as_they_come() -> None:
    step = progress("denoise", 2, 9)
    shown = [*(seen("done", id=k, record=record()) for k in (1, 2)),
             seen("running", id=3, progress=step), seen("queued", id=4, ahead=1)]  # fmt: skip
    assert "video 3 of 4, step 2 of 9" in view.status(shown)
    html = view.result(shown)
    assert html.count("<video") == 2 and "k-several" in html
    assert "<dt>total</dt><dd>8.00 s</dd>" in html
    assert html.count("nothing accelerated") == 1, "what all receipts say is said once"
    over = [*shown[:2], seen("cancelled", id=3), seen("cancelled", id=4)]
    told = view.status(over)
    assert 'data-phase="cancelled"' in told and told.count("Cancelled") == 1
    assert view.result(over) == html


def test_the_list_of_jobs_says_what_can_be_done_about_each() -> None:
    statuses: tuple[Status, ...] = STATUSES
    html = view.listing([seen(it, "why", id=k) for k, it in enumerate(statuses)])
    parts = dict(zip(statuses, html.split("<li ")[1:], strict=True))
    acts = {it: set(re.findall('data-act="([a-z]+)"', part)) for it, part in parts.items()}
    again = {"retry", "remove"}
    assert acts == {
        "queued": {"cancel"}, "running": {"cancel"}, "done": {"open", "remove"},
        "failed": again, "cancelled": again, "interrupted": again,
    }  # fmt: skip
    assert "&lt;circle&gt;" in html and "<circle>" not in html
    assert "kinora-tiny · 128×128 · 33 frames · 30 steps · seed 0 · dense" in html
    assert "Stop at once" in view.listing([seen("running", stopping=True)])
    assert "No job yet" in view.listing([])
    assert "Older ones" in view.listing([seen("done")], more=True) and "Older ones" not in html
    long = RESOLVED.model_copy(update={"prompt": "a <b> " + "long " * 3000})
    assert len(view.listing([seen("queued", request=long)])) < 1500


def test_recipes_have_short_names() -> None:
    for name in recipes.names():
        assert recipe_name(recipes.find(name).table()) == name
    assert recipe_name({}) == "dense"
    changed = recipes.changed(recipes.find("balanced"), ["attention.keep=0.5"]).table()
    assert recipe_name(changed) == "blade, changed"


@pytest.mark.parametrize(
    ("base", "changes", "preset"),
    [
        ("dense", (), "dense"),
        ("balanced", (), "balanced"),
        ("fast", ("attention.keep=0.4", "when=always"), "fast"),
        ("dense", ("attention.method=top-blocks", "attention.keep=0.4", "title=Mine = this"), None),
        ("balanced", ("steps.policy=shadow",), "balanced"),
        ("dense", ("steps.policy=sada", "steps.prune=true", "parallel.cfg=2"), "dense"),
    ],
)
def test_fields_restored_from_a_record_ask_for_the_same(
    base: str, changes: tuple[str, ...], preset: str | None
) -> None:
    table = recipes.changed(recipes.find(base), changes).table()
    asked = record(recipe=table, seed=9, steps=3, negative_prompt="blue", strict=True)
    given, recipe = form.restored(asked)
    assert preset in (None, given["recipe"])
    request = form.request_of(given, controls.values(recipe), "outputs")
    again = resolve(request, cards.find("kinora-tiny"))
    table.pop("title" if preset is None else "", None)  # that of a preset alone comes back
    assert again.recipe == (table if changes or base != "dense" else {})
    without = {"recipe": {}}
    assert again.model_copy(update=without) == asked.request.model_copy(update=without)


def test_a_prediction_in_words(wan_folder: Path) -> None:
    plan = planning.plan(Request(prompt="a", model=str(wan_folder), width=32, height=32, frames=5))
    html = view.prediction(plan)
    assert "32 tokens, 50 steps on" in html and "it fits" in html
    assert "nothing accelerated: the stock pipeline" in html and "k-bad" not in html
    part = planning.Part("attention", "x", "refused", "it <cannot>", 1.0, None)
    html = view.prediction(replace(plan, parts=(part,), free_bytes=0))
    assert "attention refused: it &lt;cannot&gt;" in html
    assert "it does not fit" in html and "k-bad" in html


def test_a_filter_keeps_what_is_chosen_and_is_all_where_that_is_gone() -> None:
    """What is chosen is not said again: by then it may be something else."""
    for chosen in ("", "a", None):
        told = fields.filtering(["a", "b"], chosen).constructor_args
        assert told["choices"] == [("all", ""), ("a", "a"), ("b", "b")] and "value" not in told
    assert fields.filtering(["a"], "gone").constructor_args["value"] == ""
    assert [fields.known(it, ["a"]) for it in ("a", "gone", "", None)] == ["a", "", "", ""]
