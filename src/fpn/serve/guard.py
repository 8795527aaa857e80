"""What stands before every request: whose it is, which headers its answer gets, and that it is counted."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

# The page may load and ask nothing but this server; pictures are also made in the browser.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """An ASGI application around another.

    token: what requests must bring for all paths but the `public`; None where none is needed. hosts: names by which the
    server may be called; None where any will do. Without it, a page on the web whose name is made to point to this
    machine (DNS rebinding) could read answers. told: is given the path and status of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: Collection[str] | None,
        public: Collection[str],
        told: Callable[[str, int], None],
    ) -> None:
        self.app, self.token, self.hosts, self.public, self.told = app, token, hosts, public, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.told(scope["path"], message["status"])
                headers = MutableHeaders(raw=message["headers"])
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        reply = self.refusal(scope["path"], Headers(scope=scope)) or self.app
        try:
            await reply(scope, receive, answer)
        except Exception:  # which has been answered with 500; passed on, it would cost the connection
            log.exception("%s %s failed", scope["method"], scope["path"])

    def refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            reason = "this server has no token, so it answers only when called by a name of this machine itself"
            return JSONResponse({"detail": reason}, 421)
        if self.token is None or path in self.public:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        reason = "this server wants a token: send the header `Authorization: Bearer TOKEN`"
        return JSONResponse({"detail": reason}, 401, {"www-authenticate": "Bearer"})


def host_of(header: str) -> str:
    """The name in a Host header, without port.

    >>> host_of("localhost:8000"), host_of("[::1]:8000"), host_of("127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
