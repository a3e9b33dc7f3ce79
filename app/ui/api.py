"""The jobs over HTTP in OpenAI's shape, on the application that serves the page.

POST   /v1/videos                a job; JSON or a form, with an image in a form alone
GET    /v1/videos                all, newest first: after, limit, order
GET    /v1/videos/ID             one as it stands
GET    /v1/videos/ID/content     its video; ?variant=sidecar, latents
GET    /v1/videos/ID/events      server-sent, as it goes on
GET    /v1/videos/ID/preview     what it is heading for, while it runs
POST   /v1/videos/ID/cancel      stop it within a step
POST   /v1/videos/ID/retry       another attempt
DELETE /v1/videos/ID             stop it, forget it, remove its files
POST   /v1/images/generations    one frame each, waited for

HEAD is answered where GET is. Whatever is refused below /v1 is so in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import Receive, Scope, Send

from ...pipelines.errors import BusyError, KinoraError, OutputError
from ...pipelines.images import MOST_BYTES
from ...pipelines.jobs import Job, Jobs
from . import wire

TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".png": "image/png"}
PREVIEW = "image/jpeg"
_TICK_S = 0.25
_STILL_S = 15.0  # without news, something is sent, so that a client that is gone is noticed
_LONGEST_WAIT_S = 60.0
_GET = ["GET", "HEAD"]


def add(app: FastAPI, jobs: Jobs) -> None:
    """Add the routes to `app`."""
    api = _Api(jobs)
    app.include_router(api.router)
    app.mount("/v1", api.nowhere)  # else the page would answer, in a shape of its own
    app.add_exception_handler(KinoraError, api.refused)
    app.add_exception_handler(Exception, _fault)
    app.add_exception_handler(AnyHTTPException, _missing)
    app.add_exception_handler(RequestValidationError, _invalid)


class _Api:
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.router = APIRouter(prefix="/v1", dependencies=[Depends(_known)])
        add = self.router.add_api_route
        add("/videos", self.create, methods=["POST"])
        add("/videos", self.list, methods=_GET)
        add("/videos/{name}", self.retrieve, methods=_GET)
        add("/videos/{name}", self.delete, methods=["DELETE"])
        add("/videos/{name}/content", self.content, methods=_GET, response_model=None)
        add("/videos/{name}/events", self.events, methods=_GET, response_model=None)
        add("/videos/{name}/preview", self.preview, methods=_GET, response_model=None)
        add("/videos/{name}/cancel", self.cancel, methods=["POST"])
        add("/videos/{name}/retry", self.retry, methods=["POST"])
        add("/images/generations", self.images, methods=["POST"])

    async def create(self, asker: Request) -> dict[str, Any]:
        fields = await _fields(asker)
        (job,) = await run_in_threadpool(
            lambda: self._jobs.submit(wire.video_request(fields, self._jobs.uploads))
        )
        return wire.video(self._jobs, job)

    def list(
        self, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        if not 1 <= limit <= 100:
            fail(400, f"limit must be 1 to 100, not {limit}", "limit")
        last = None if after is None else self._find(after)
        found = self._jobs.jobs(newest=order == "desc", after=last, limit=limit + 1)
        data = [wire.video(self._jobs, job) for job in found[:limit]]
        first, end = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        more = len(found) > limit
        return {"object": "list", "data": data, "first_id": first, "last_id": end, "has_more": more}

    def retrieve(self, name: str) -> dict[str, Any]:
        return wire.video(self._jobs, self._find(name))

    def content(
        self, name: str, variant: Literal["video", "sidecar", "latents"] = "video"
    ) -> Response:
        job = self._find(name)
        if variant == "latents":
            path = self._jobs.latents(job)
        else:
            path = self._jobs.media(job) if variant == "video" else self._jobs.sidecar(job)
            path = path if job.status == "done" and path.is_file() else None
        if path is None:
            fail(404, f"{name} has no {variant}: it is {job.status}", "variant")
        return file_of(path)

    def preview(self, name: str, step: int | None = None) -> Response:
        del step  # the newest is shown; the page names the step so that a browser asks again
        job = self._find(name)
        found = self._jobs.preview(job)
        if found is None:  # no fault: it may have ended since the page was told of one
            return Response(status_code=204)
        return Response(found[1], media_type=PREVIEW, headers={"cache-control": "no-store"})

    def events(self, asker: Request, name: str) -> Response:
        self._find(name)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        kind = "text/event-stream"
        if asker.method == "HEAD":
            return Response(media_type=kind, headers=headers)
        return StreamingResponse(self._told(name), media_type=kind, headers=headers)

    async def _told(self, name: str) -> AsyncGenerator[str, None]:
        before, said_s = "", time.monotonic()
        while True:
            job = await run_in_threadpool(wire.find, self._jobs, name)
            if job is None:
                yield f"event: deleted\ndata: {json.dumps({'id': name})}\n\n"
                return
            content = await run_in_threadpool(wire.video, self._jobs, job)
            now = json.dumps(content)
            if now != before:
                before, said_s = now, time.monotonic()
                yield f"event: video\ndata: {now}\n\n"
            elif time.monotonic() - said_s > _STILL_S:
                said_s = time.monotonic()
                yield ": still there\n\n"
            if not job.open:
                return
            await asyncio.sleep(_TICK_S)

    def cancel(self, name: str) -> dict[str, Any]:
        job = self._jobs.cancel(self._find(name).id)
        return wire.video(self._jobs, job or self._find(name))

    def retry(self, name: str) -> dict[str, Any]:
        job = self._find(name)
        again = self._jobs.retry(job.id)
        if again is None:
            fail(409, f"{name} is {job.status}: there is nothing to retry", "id")
        return wire.video(self._jobs, again)

    async def delete(self, name: str) -> dict[str, Any]:
        job = await run_in_threadpool(self._find, name)
        if job.status in ("queued", "running"):
            await run_in_threadpool(self._jobs.cancel, job.id)
            await self._ended([job], _LONGEST_WAIT_S)
        if not await run_in_threadpool(self._jobs.remove, job.id):
            fail(409, f"{name} has been asked to stop and still runs: try again later", "id")
        return {"id": name, "object": "video.deleted", "deleted": True}

    async def images(self, asker: Request) -> dict[str, Any]:
        fields = await _fields(asker)
        jobs = await run_in_threadpool(
            lambda: self._jobs.submit(*wire.image_requests(fields, self._jobs.uploads))
        )
        while not await self._ended(jobs, _TICK_S):
            if await asker.is_disconnected():
                for job in jobs:
                    await run_in_threadpool(self._jobs.cancel, job.id)
        data: list[dict[str, str]] = []
        for job in jobs:
            now = await run_in_threadpool(self._jobs.get, job.id)
            if now is None or now.status != "done":
                reason = wire.within(self._jobs.folder, now and now.reason)
                fail(500, reason or "the job was cancelled", "prompt")
            if fields.get("response_format") == "url":
                address = asker.url_for("content", name=wire.name_of(now))
                data.append({"url": str(address)})
            else:
                image = await run_in_threadpool(self._jobs.media(now).read_bytes)
                data.append({"b64_json": base64.b64encode(image).decode()})
        return {"created": int(time.time()), "data": data}

    async def nowhere(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what no route does, whatever its method. See ASGI."""
        method, path = scope["method"][:20], scope["path"]
        routes = [it for it in self.router.routes if isinstance(it, APIRoute)]
        known = {
            name for it in routes if it.path_regex.fullmatch(path) for name in it.methods or ()
        }
        answer = _error(404, f"there is no {method} {path[:100]}")
        if known:
            allowed = ", ".join(sorted(known))
            answer = _error(405, f"{path[:100]} takes {allowed}, not {method}")
            answer.headers["allow"] = allowed
        await answer(scope, receive, send)

    def refused(self, _: Request, error: Exception) -> Response:
        """Answer with an error of Kinora's."""
        status = 400
        if isinstance(error, BusyError):
            status = 429
        elif isinstance(error, OutputError):
            status = 507
        return _error(status, wire.within(self._jobs.folder, str(error)) or "")

    async def _ended(self, jobs: list[Job], seconds: float) -> bool:
        """Whether all jobs have ended, waiting for it so long."""
        until = time.monotonic() + seconds
        while True:
            now = [await run_in_threadpool(self._jobs.get, job.id) for job in jobs]
            if not any(it is not None and it.open for it in now):
                return True
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(min(_TICK_S, seconds))

    def _find(self, name: str) -> Job:
        job = wire.find(self._jobs, name)
        if job is None:
            fail(404, f"there is no video {name[:40]!r}", "id")
        return job


def file_of(path: Path) -> Response:
    """A file of ours, to be shown where it is a video or an image, else to be saved."""
    kind = TYPES.get(path.suffix)
    shown = "inline" if kind else "attachment"
    return FileResponse(
        path, media_type=kind or "application/octet-stream", filename=path.name,
        content_disposition_type=shown,
    )  # fmt: skip


async def _fields(asker: Request) -> dict[str, Any]:
    """The fields of a body, which is a JSON object or a form."""
    kind = asker.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(asker)
    try:
        content = json.loads(await asker.body(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        fail(400, "the body must be a JSON object or a form", None)
    if not isinstance(content, dict):
        fail(400, "the body must be a JSON object or a form", None)
    return cast("dict[str, Any]", content)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names must differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(it for it in names if names.count(it) > 1)[:40]
        fail(400, f"{twice} is given twice", twice)
    return found


def _known(asker: Request) -> None:
    """Refuse parameters of the address that its route does not take, or are given twice."""
    known = [it.alias for it in asker.scope["route"].dependant.query_params]
    for name in asker.query_params:
        if name not in known:
            told = f"choose from {', '.join(known)}" if known else "there are none here"
            fail(400, f"{name[:40]!r} is no parameter: {told}", name[:40])
        if len(asker.query_params.getlist(name)) > 1:
            fail(400, f"{name} is given twice", name)


async def _form(asker: Request) -> dict[str, Any]:
    """Its fields are text; one that ends with [] is an entry of a list."""
    fields: dict[str, Any] = {}
    async with asker.form(max_files=2, max_fields=1000) as form:
        for name, value in form.multi_items():
            if not isinstance(value, str):
                if name != wire.REFERENCE:
                    fail(400, f"{name[:40]} is a file, which only {wire.REFERENCE} is", name[:40])
                if name in fields:
                    fail(400, f"{name[:40]} is given twice", name[:40])
                fields[name] = await value.read(MOST_BYTES + 1)
            elif name.endswith("[]"):
                fields.setdefault(name.removesuffix("[]"), []).append(value)
            elif name in fields:
                fail(400, f"{name[:40]} is given twice", name[:40])
            else:
                fields[name] = value
    return fields


def fail(status: int, message: str, param: str | None) -> NoReturn:
    """End a request with an error in OpenAI's shape."""
    raise HTTPException(status, {"message": message, "param": param})


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = message.encode("utf-8", "backslashreplace").decode()  # it may quote what is no UTF-8
    content = {"message": told, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": content}, status)


def _missing(_: Request, error: Exception) -> Response:
    failed = cast("AnyHTTPException", error)
    detail: Any = failed.detail
    if isinstance(detail, dict):
        return _error(failed.status_code, detail["message"], detail["param"])
    return _error(failed.status_code, str(detail))


def _fault(_: Request, error: Exception) -> Response:
    """What it says may name folders; it is raised again, for the server to show on demand."""
    told = f"a fault in Kinora: {type(error).__name__}; KINORA_DEBUG=1 shows where"
    return _error(500, f"{told}, please report it")


def _invalid(_: Request, error: Exception) -> Response:
    first = cast("RequestValidationError", error).errors()[0]
    name = str(first["loc"][-1])
    return _error(400, f"{name}: {first['msg']}", name)
