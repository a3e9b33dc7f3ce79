"""Who may ask for what: in front of every route, those of gradio and of files too."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from ...pipelines import images
from ...pipelines.errors import KinoraError
from . import dropped
from .dropped import Dropped

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NAMES = ("127.0.0.1", "localhost", "[::1]")
"""What a browser on this machine calls it."""
TOKEN = "KINORA_TOKEN"
"""The variable of the environment with the token."""
SHORTEST_TOKEN = 16
UPLOAD_BYTES = 512 * 2**20
BODY_BYTES = 2 * 2**20
IMAGE_BYTES = images.MOST_BYTES + BODY_BYTES
_UPLOAD = "/gradio_api/upload"
_VIDEOS = "/v1/videos"
_COOKIE = "kinora"
_LONGEST_PATH = 1000
# What the page asks for. Gradio offers much more: files by path, calls by name, a proxy.
_PATHS = ("/", "/config", "/favicon.ico", "/manifest.json", "/pwa_icon", "/theme.css", _UPLOAD)
_UNDER = (
    *(
        "/v1/",
        "/gallery/",
        "/evaluations/",
        "/assets/",
        "/static/",
        "/svelte/",
        "/gradio_api/heartbeat/",
    ),
    *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/run/"),
    *("/gradio_api/reset", "/gradio_api/info", "/gradio_api/startup-events"),
    *("/gradio_api/theme.css", "/gradio_api/upload_progress"),
)
_NO_TOKEN = (
    "the token is missing or wrong: send `Authorization: Bearer TOKEN`, or open /?token=TOKEN once"
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


class AccessError(KinoraError):
    """The page would be open to others."""


class _TooLargeError(Exception):
    """A body has more bytes than any that is taken."""


@dataclass(frozen=True, slots=True)
class Access:
    """What is asked of those who ask: a `token`, or that they are on this machine."""

    token: str | None

    @classmethod
    def to(cls, host: str, token: str | None) -> Access:
        """The access to a server at the address `host`. Raises `AccessError`."""
        if token is not None and (len(token) < SHORTEST_TOKEN or not token.isprintable()):
            raise AccessError(f"{TOKEN} must have {SHORTEST_TOKEN} characters or more, in one line")
        if token is None and not is_loopback(host):
            raise AccessError(
                f"--host {host} lets others in: set {TOKEN} to a secret that they must know, such "
                f"as that of `openssl rand -hex 16`"
            )
        return cls(token)

    @property
    def cookie(self) -> str:
        """What stands for the token in a browser."""
        return hashlib.sha256(f"kinora {self.token}".encode()).hexdigest()

    def knows(self, token: str) -> bool:
        """Whether it is the token."""
        return self.token is not None and hmac.compare_digest(token.encode(), self.token.encode())

    def admits(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the asker has shown the token, where there is one."""
        if self.token is None:
            return True
        kind, _, shown = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() == "bearer" and self.knows(shown.strip()):
            return True
        try:
            jar = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        shown = jar[_COOKIE].value if _COOKIE in jar else ""
        return hmac.compare_digest(shown.encode(), self.cookie.encode())


class Guard:
    """Answers those who may ask, and refuses the rest in OpenAI's shape."""

    def __init__(self, app: App, access: Access, uploads: Dropped | None = None) -> None:
        self._app, self._access, self._uploads = app, access, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a web socket; the page opens none
        headers, path = dict(scope["headers"]), scope["path"]
        if path == "/" and scope["method"] == "GET" and await self._login(scope, headers, send):
            return
        refused = refusal(path, headers, self._access)
        if refused is not None:
            await _refuse(send, *refused)
            return
        left = most_bytes(path, headers)
        over: tuple[int, str] | None = None
        upload = self._uploads if path == _UPLOAD else None
        with nullcontext() if upload is None else upload.receiving() as taken:

            async def counted() -> Message:
                nonlocal over, left
                message = await receive()
                size = len(message.get("body", b""))
                left -= size
                if left < 0:
                    over = 413, _too_large(path, headers)
                elif taken is not None and not taken(size):
                    over = 507, _full()
                if over is not None:
                    raise _TooLargeError
                return message

            async def sealed(message: Message) -> None:
                if over is not None:
                    return  # whatever it makes of it
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), *_HEADERS]
                await send(message)

            with suppress(_TooLargeError):
                await self._app(scope, counted, sealed)
        if over is not None:
            await _refuse(send, *over)

    async def _login(self, scope: Scope, headers: Mapping[bytes, bytes], send: Send) -> bool:
        """Take the token out of the page's address and into a cookie, where it is right."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if self._access.token is None or not given or _foreign(headers, self._access):
            return False
        if not self._access.knows(given[0]):
            return False
        cookie = f"{_COOKIE}={self._access.cookie}; Path=/; HttpOnly; SameSite=Strict"
        told = [(b"location", b"/"), (b"set-cookie", cookie.encode()), *_HEADERS]
        await send({"type": "http.response.start", "status": 303, "headers": told})
        await send({"type": "http.response.body", "body": b""})
        return True


def refusal(path: str, headers: Mapping[bytes, bytes], access: Access) -> tuple[int, str] | None:
    """The status that a request is refused with and why. Header names are in lower case.

    A name that points to 127.0.0.1 without being it would let any website read the page (DNS
    rebinding); a request with another origin comes from such a website.
    """
    foreign = _foreign(headers, access)
    if foreign is not None:
        return 403, foreign
    if not access.admits(headers):
        return 401, _NO_TOKEN
    known = path in _PATHS or path.startswith(_UNDER)
    # Patterns of routes overlook a line break at the end.
    if not known or not path.isprintable() or len(path) > _LONGEST_PATH:
        return 404, "there is nothing here"
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        return 400, "content-length must be a number"
    if int(length) > most_bytes(path, headers):
        return 413, _too_large(path, headers)
    return None


def most_bytes(path: str, headers: Mapping[bytes, bytes]) -> int:
    """The largest body that is taken there; a form for a video may hold an image."""
    if path == _UPLOAD:
        return UPLOAD_BYTES
    form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
    return IMAGE_BYTES if form and path == _VIDEOS else BODY_BYTES


def is_loopback(host: str) -> bool:
    """Whether nobody else reaches a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _foreign(headers: Mapping[bytes, bytes], access: Access) -> str | None:
    """Why a request comes from another website, if it does."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    # Whoever has to know a token cannot be made to ask by a website that does not.
    if access.token is None and host.rpartition(":")[0] not in NAMES and host not in NAMES:
        return f"this server is not called {host[:60]!r}: open it as 127.0.0.1 or localhost"
    origin = headers.get(b"origin")
    schemes = ("http",) if access.token is None else ("http", "https")  # behind a proxy
    own = {f"{it}://{host}" for it in schemes}
    if origin is not None and origin.decode("latin-1").lower() not in own:
        return "another website may not ask here"
    # Browsers send no Origin for what a website shows, as an image; a link may be followed.
    site, mode = headers.get(b"sec-fetch-site"), headers.get(b"sec-fetch-mode")
    if site in (b"cross-site", b"same-site") and mode != b"navigate":
        return "another website may not ask here"
    return None


def _too_large(path: str, headers: Mapping[bytes, bytes]) -> str:
    return f"the body is larger than {most_bytes(path, headers) // 2**20} MiB"


def _full() -> str:
    most, minutes = dropped.MOST_BYTES // 2**20, dropped.AGE_S // 60
    return f"uploads hold {most} MiB, which is the most: try again in {minutes:.0f} minutes"


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"message": message, "type": kind, "param": None, "code": None}
    headers = [(b"content-type", b"application/json"), *_HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": content}).encode()})
