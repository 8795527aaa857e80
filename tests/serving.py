"""A server on a thread of its own, and clients of every kind: polite ones, and those who send what they like."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx
import torch
from PIL import Image

from fpn.serve.app import application
from fpn.serve.limits import Limits
from fpn.serve.server import bound, server_of
from fpn.structures import Detections


@contextmanager
def served(detector: Any, limits: Limits = Limits(), **keywords: Any) -> Iterator[httpx.Client]:  # noqa: B008
    """A client of the detector's server; its `base_url` has the port."""
    listening, _ = bound("127.0.0.1", 0)
    server = server_of(application(detector, limits=limits, **keywords), limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def raw(client: httpx.Client, *parts: bytes, wait: float = 5) -> bytes:
    """What the server answers to these bytes, until it or `wait` ends it."""
    with connected(client, wait) as line:
        for part in parts:
            line.sendall(part)
        answer = b""
        try:
            while more := line.recv(65536):
                answer += more
        except (TimeoutError, ConnectionError):
            pass
        return answer


def connected(client: httpx.Client, wait: float = 5) -> socket.socket:
    assert client.base_url.port
    return socket.create_connection(("127.0.0.1", client.base_url.port), wait)


def posting(size: int, path: str = "/detect") -> bytes:
    """The headers of a request with a body of so many bytes."""
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\n\r\n".encode()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


class Slow:
    """A finder that finds its images' own sizes, once `open` is set; it remembers its batches."""

    def __init__(self) -> None:
        self.open, self.batches = threading.Event(), []
        self.open.set()

    def __call__(self, images: Any) -> list[Detections]:
        self.batches.append([tuple(image.shape[1:]) for image in images])
        assert self.open.wait(20)
        return [sized(*image.shape[1:]) for image in images]


def sized(height: int, width: int) -> Detections:
    boxes = torch.tensor([[0.0, 0.0, width, height], [0.0, 0.0, 1.0, 1.0]])
    scores, labels = torch.tensor([0.9, 0.3]), torch.tensor([0, 1])
    return Detections(boxes, scores, labels, torch.tensor([3, 2]), torch.tensor(2), ("cat", "dog"))
