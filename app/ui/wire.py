"""Jobs as OpenAI's clients ask for and read them: fields to a `Request`, a job to a `video`.

What a field means is what `Request` says; `size` and `seconds` are OpenAI's own. What is not known
is refused. Clients name models and recipes, never paths, and jobs by ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...accel import recipe as recipes
from ...pipelines import cards
from ...pipelines.cards import Card
from ...pipelines.errors import RequestError, nearest, shortened
from ...pipelines.events import Progress
from ...pipelines.jobs import Job, Jobs, Uploads
from ...pipelines.request import DEFAULT_MODEL, Request, recipe_table, size_of
from . import form

_ELSEWHERE = {
    "output": "files are named here, and fetched by id",
    "num_videos": "ask once for each video",
    "force": "whether a run fits is decided here",
    **dict.fromkeys(("image", "image_sha256"), "send the file as input_reference, in a form"),
}
REFERENCE = "input_reference"
"""OpenAI's name for the image that a video begins with."""
_OWN = ("size", "seconds", REFERENCE)
VIDEO_FIELDS = (*(it for it in Request.model_fields if it not in _ELSEWHERE), *_OWN)
IMAGE_FIELDS = (
    *(it for it in VIDEO_FIELDS if it not in ("frames", "fps", "seconds", "format", REFERENCE)),
    *("n", "response_format"),
)
MOST_IMAGES = 10
_SPENT = {"load": 0.0, "text": 0.0, "denoise": 0.0, "decode": 0.95, "save": 0.98}
_ID = re.compile(r"video_([0-9a-f]{16})")


def video_request(given: Mapping[str, Any], uploads: Uploads) -> Request:
    """What `POST /v1/videos` asks for. Raises `KinoraError`."""
    _check_names(given, VIDEO_FIELDS)
    fields = {name: it for name, it in given.items() if it is not None}  # null is the default
    card = _card(fields)
    image = fields.pop(REFERENCE, None)
    _check_image(image, card)
    if "size" in fields:
        if {"width", "height"} & set(fields):
            raise RequestError("size stands beside width or height: leave one out")
        fields |= size_of(str(fields.pop("size")), "size")
    if "seconds" in fields:
        if "frames" in fields:
            raise RequestError("seconds stands beside frames: leave one out")
        fields["frames"] = _frames(fields.pop("seconds"), fields.get("fps"), card)
    request = form.checked(fields)
    check_no_paths(request)
    if image is None:
        return request
    kept = uploads.fields(uploads.keep(image, named=REFERENCE))
    return request.model_copy(update=kept)


def image_requests(given: Mapping[str, Any], uploads: Uploads) -> list[Request]:
    """What `POST /v1/images/generations` asks for, one for each image. Raises `KinoraError`."""
    _check_names(given, IMAGE_FIELDS)
    fields = {name: it for name, it in given.items() if name not in ("n", "response_format")}
    wanted = given.get("response_format") or "b64_json"
    if wanted not in ("b64_json", "url"):
        raise RequestError(f"response_format must be b64_json or url, not {str(wanted)[:40]!r}")
    number = str(1 if given.get("n") is None else given["n"])
    if not re.fullmatch("[0-9]{1,3}", number) or not 1 <= int(number) <= MOST_IMAGES:
        raise RequestError(f"n must be 1 to {MOST_IMAGES}, not {number[:40]}")
    first = video_request({**fields, "frames": 1, "format": "png"}, uploads)
    return [
        first.model_copy(update={"seed": first.seed + index}) for index in range(int(number))
    ]  # fmt: skip


def name_of(job: Job) -> str:
    """The id of a job for clients."""
    return f"video_{job.id}"


def find(jobs: Jobs, name: str) -> Job | None:
    """The job that a client calls so."""
    match = _ID.fullmatch(name)
    return None if match is None else jobs.get(match[1])


def video(jobs: Jobs, job: Job) -> dict[str, Any]:
    """A job in OpenAI's shape; what that has no place for is under `kinora`."""
    request, told = job.row.request, jobs.progress(job)
    progress = None if told is None else told[0]
    status = {"queued": "queued", "running": "in_progress", "done": "completed"}
    return {
        "id": name_of(job),
        "object": "video",
        "status": status.get(job.status, "failed"),
        "progress": 100 if job.status == "done" else round(100 * share(progress)),
        "model": request.model,
        "prompt": request.prompt,
        "size": f"{request.width}x{request.height}",
        "seconds": f"{request.frames / request.fps:g}",
        "created_at": int(job.created),
        "completed_at": None if job.status != "done" or job.ended is None else int(job.ended),
        "error": _error(jobs, job),
        "kinora": _further(jobs, job, told),
    }


def share(progress: Progress | None) -> float:
    """How much of a video is made, from 0 to 1, as far as that is known."""
    if progress is None:
        return 0.0
    if progress.stage == "denoise" and progress.steps:
        return 0.95 * progress.step / progress.steps
    return _SPENT[progress.stage]


def within(folder: Path, text: str | None) -> str | None:
    """The text with files named from `folder` on: where that is, clients need not know."""
    if text is None:
        return None
    whole = rf"(?<![\w.-]){re.escape(str(folder))}(?:/|(?![\w-]|\.\w))"
    return re.sub(whole, lambda it: "" if it[0].endswith("/") else ".", text)


def _further(jobs: Jobs, job: Job, told: tuple[Progress, float] | None) -> dict[str, Any]:
    request = job.row.request
    content: dict[str, Any] = {
        "status": job.status,
        "stopping": job.stopping > 0,
        "attempt": job.attempt,
        "frames": request.frames,
        "fps": request.fps,
        "steps": request.steps,
        "seed": request.seed,
        "format": request.format,
        "image_sha256": request.image_sha256,
        "recipe": request.recipe,
        "reason": within(jobs.folder, job.reason),
        "notices": [within(jobs.folder, it) for it in jobs.notices(job)],
    }
    if job.status == "queued":
        content |= {"ahead": jobs.ahead(job), "held": within(jobs.folder, jobs.held)}
    if told is not None:
        progress, ago_s = told
        eta_s = None if progress.eta_s is None else round(max(0.0, progress.eta_s - ago_s), 1)
        shown = jobs.preview(job)
        content |= {"stage": progress.stage, "step": progress.step, "eta_s": eta_s}
        content |= {"preview_step": None if shown is None else shown[0]}
    return content


def _error(jobs: Jobs, job: Job) -> dict[str, str] | None:
    if job.status in ("queued", "running", "done"):
        return None
    code, reason = job.kind or job.status, within(jobs.folder, job.reason)
    return {"code": code, "message": reason or f"the job was {job.status}"}


def _check_names(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name in _ELSEWHERE:
            raise RequestError(f"{name} cannot be set: {_ELSEWHERE[name]}")
        if name not in known:
            close = nearest(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise RequestError(f"{shortened(name)!r} is no field that Kinora knows: {hint}")


def _check_image(image: object, card: Card) -> None:
    """Raises `RequestError` where the model needs an image and has none, or takes none."""
    if image is None and card.takes_image:
        raise RequestError(
            f"{card.name} makes a video from an image: send one as {REFERENCE}, a file in a form"
        )
    if image is not None and not card.takes_image:
        raise RequestError(f"{card.name} takes no image: leave {REFERENCE} out")
    if not isinstance(image, bytes | None):
        raise RequestError(f"{REFERENCE} must be a file, in a form (multipart/form-data)")


def _card(fields: Mapping[str, Any]) -> Card:
    """The card of the model. Raises `RequestError` for what is no name of a model or recipe."""
    check_named(fields.get("model", DEFAULT_MODEL), fields.get("recipe"))
    return cards.find(fields.get("model", DEFAULT_MODEL))


def check_no_paths(request: Request) -> None:
    """Raises `RequestError` where the recipe or a setting names a file, `RecipeError` for others.

    A recipe that is named by a path is not looked at: `check_named` refuses it.
    """
    for option in recipes.from_table(recipe_table(request)).paths():
        raise RequestError(f"{option} names a file of the server, as clients may not: leave it out")


def check_named(model: object, recipe: object) -> None:
    """Raises `RequestError` where a model or a recipe is given by its path rather than its name."""
    for what, given, known in (
        ("model", model, cards.names()),
        ("recipe", recipe, recipes.names()),
    ):
        if given is None or isinstance(given, dict) or given in known:
            continue
        close = nearest(str(given), known, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
        raise RequestError(f"there is no {what} {shortened(str(given))!r}: {hint}")


def _frames(seconds: object, fps: object, card: Card) -> int:
    """The length that comes nearest to so many seconds. Raises `RequestError`."""
    try:
        wanted = float(str(seconds)) * (card.fps if fps is None else float(str(fps)))
        near = card.nearest_frames(round(wanted))
    except (ValueError, OverflowError):
        raise RequestError(f"seconds must be a number, not {str(seconds)[:40]!r}") from None
    if abs(near - wanted) > card.frame_stride:
        raise RequestError(
            f"{card.name} makes no video of {shortened(str(seconds))} seconds: "
            f"{card.frames_rule()}; the nearest is frames {near}"
        )
    return near
