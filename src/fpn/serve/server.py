"""The server itself: its address, its connections, its end."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fpn.errors import OptionError
from fpn.serve.limits import Limits

HEADERS_WITHIN = 10.0  # seconds, from opening a connection to the end of a request's headers
HEADER_BYTES = 16_384
FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bound(host: str, port: int) -> tuple[socket.socket, bool]:
    """A socket at an address, and whether only this machine reaches it. Raises OptionError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise OptionError(f"--host {host} --port {port}: no such address ({error})") from error
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        reason = error.strerror or error
        raise OptionError(
            f"--host {host} --port {port}: cannot be listened on ({reason}); take another port"
        ) from error
    return made, ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback


def server_of(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    """uvicorn around an application. Its `run(sockets=[...])` serves until SIGTERM or SIGINT, and returns when the
    requests that have begun are answered."""
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits=limits),  # pyright: ignore[reportArgumentType]
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # a warning for every broken request would let clients fill the log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(limits.seconds) + 5,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return uvicorn.Server(config)


class Connection(H11Protocol):
    """uvicorn's, with an end to its patience: it would wait for ever for headers, and for answers to be read."""

    def __init__(self, *arguments: Any, limits: Limits, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.limits, self.alarm = limits, None

    def end_in(self, seconds: float) -> None:
        """Cut the connection after so long, unless it is told otherwise before."""
        if self.alarm is not None:
            self.alarm.cancel()
        self.alarm = self.loop.call_later(seconds, self.transport.abort)

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.end_in(HEADERS_WITHIN)
        if len(self.connections) > self.limits.connections:
            transport.write(FULL)
            transport.close()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a request has begun: to arrive, to be answered, and for the answer to be read
            self.end_in(3 * self.limits.seconds)

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        # What was answered may still be on its way out; a further request that was waiting has begun.
        self.end_in(self.limits.seconds if self.cycle is before else 3 * self.limits.seconds)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has begun already, and a second one would be an error of ours
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
        super().connection_lost(exc)
