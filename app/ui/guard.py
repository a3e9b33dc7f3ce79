"""Keeps the page on this machine: who may ask, for what, and where the page may ask itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HOSTS = ("127.0.0.1", "localhost")
# What the page asks for. Gradio offers much more: uploads, calls by name, a proxy for any address.
_PATHS = ("/", "/config", "/favicon.ico", "/manifest.json", "/pwa_icon", "/theme.css")
_UNDER = (
    *("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", "/gradio_api/file=/"),
    *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/run/"),
    *("/gradio_api/reset", "/gradio_api/info", "/gradio_api/startup-events"),
    "/gradio_api/theme.css",
)
# Gradio's own page needs inline scripts and eval; anything from elsewhere stays out.
_CONTENT = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _CONTENT.encode()),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """Answers what comes from this machine's own page, and refuses the rest.

    A name that points to 127.0.0.1 without being it would let any website read the page (DNS
    rebinding); a request with another origin comes from such a website.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a web socket; the page opens none
        status = refusal(scope["path"], dict(scope["headers"]))
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self._app(scope, receive, sealed)


def refusal(path: str, headers: dict[bytes, bytes]) -> int | None:
    """The status that a request is refused with, or None. Header names are in lower case."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if host.partition(":")[0] not in HOSTS:
        return 403
    origin = headers.get(b"origin")
    if origin is not None and origin.decode("latin-1").lower() != f"http://{host}":
        return 403
    return None if path in _PATHS or path.startswith(_UNDER) else 404
