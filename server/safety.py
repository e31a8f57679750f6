"""Who may ask, and how much: checked before any route is reached.

Host and Origin: a web page that resolves its own name to 127.0.0.1 (DNS rebinding) or posts to localhost is not the
person at this machine. application/json: a browser cannot send it across origins without asking first.
"""

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.responses import Response

from .errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # names of this machine in a Host header
PUBLIC = ("/health",)  # paths without a key
CORS = {
    b"access-control-allow-methods": b"GET, POST, OPTIONS",
    b"access-control-allow-headers": b"authorization, content-type, x-api-key, anthropic-version, anthropic-beta",
    b"access-control-max-age": b"600",
}


@dataclass(frozen=True)
class Guard:
    """host: where the server listens; keys: any of them opens; hosts, origins: allowed besides this machine's own."""

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_body: int = 32 * 2**20
    digests: tuple[bytes, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digests", tuple(sha256(key.encode()).digest() for key in self.keys))

    def check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError for what may not pass."""
        host, origin = text(headers, b"host"), text(headers, b"origin")
        self.check_host(host)
        if origin and origin not in self.origins and urlsplit(origin).netloc != host:
            message = "This Origin may not use the server: start it with --allow-origin ORIGIN"
            raise ApiError(403, message, code="origin_not_allowed")
        if path not in PUBLIC and method != "OPTIONS":
            self.check_key(headers)
        if method == "POST" and text(headers, b"content-type").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Content-Type must be application/json")
        if not re.fullmatch(r"\d{0,18}", length := text(headers, b"content-length")):
            raise ApiError(400, "Content-Length is not a number", code="invalid_header")
        self.check_size(int(length or 0))

    def check_host(self, host: str) -> None:
        """On loopback only names of this machine; elsewhere --allow-host, or with a key any."""
        name = re.sub(r":\d{1,5}$", "", host).strip("[]").lower()
        allowed = {*LOOPBACK, self.host, *self.hosts}
        open_to_all = not is_loopback(self.host) and not self.hosts
        if not (open_to_all or name in allowed or name.endswith(".localhost")):
            raise ApiError(403, "This Host is not served here: start with --allow-host NAME", code="host_not_allowed")

    def check_key(self, headers: dict[bytes, bytes]) -> None:
        if not self.keys:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [headers.get(b"x-api-key", b""), token.strip() if scheme.lower() == b"bearer" else b""]
        digests = [sha256(key).digest() for key in given]
        if not any([hmac.compare_digest(a, b) for a in digests for b in self.digests]):  # a list: all are compared
            raise ApiError(401, "Incorrect API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`")

    def check_size(self, size: int) -> None:
        if size > self.max_body:
            raise ApiError(413, f"The body is larger than {self.max_body} bytes")

    def cors(self, origin: str) -> Iterable[tuple[bytes, bytes]]:
        if origin not in self.origins:
            return ()
        return ((b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin"), *CORS.items())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def text(headers: dict[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


class Safety:
    """The outermost ASGI layer: checks, counts the body, names the request, and lets no error out with its details."""

    def __init__(self, app: Any, guard: Guard, log: Any) -> None:
        self.app, self.guard, self.log = app, guard, log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, size = dict(scope["headers"]), 0
        request_id = scope["request_id"] = f"req_{uuid4().hex}"
        scope["send"] = send  # for the parts of a stream, see stream.py
        more = [(b"request-id", request_id.encode()), (b"x-request-id", request_id.encode())]
        more += [*self.guard.cors(text(headers, b"origin")), (b"x-content-type-options", b"nosniff")]

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            self.guard.check_size(size)
            return message

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            self.guard.check(scope["method"], scope["path"], headers)
            preflight = scope["method"] == "OPTIONS" and b"origin" in headers
            await (Response(status_code=204) if preflight else self.app)(scope, counted, named)
        except ApiError as error:
            await error.response(scope["path"], request_id)(scope, receive, named)
        except Exception as error:
            self.log(request_id, error)  # the routes have answered it
