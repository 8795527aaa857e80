"""What a server takes of its clients, and what it says when it takes no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from fpn.errors import OptionError

MOST_MEGAPIXELS = 89  # beyond these Pillow takes an image for a decompression bomb

# Memory while an image is decoded, at most, as measured on 30 megapixels in each of the formats: WebP takes most of
# those with 8 bits; 16-bit and float images go through numbers of 8 bytes.
BYTES_A_PIXEL, BYTES_A_DEEP_PIXEL = 22, 30
BYTES_A_DRAWN_PIXEL = 7  # beside the image's own 3, while boxes are drawn and written as JPEG
FORM_COPIES = 3  # of a body that is a form: itself, its field as it is gathered, and the file


@dataclass(frozen=True)
class Limits:
    """What a server takes of its clients.

    Parameters
    ----------
    megabytes
        Most megabytes of a request.
    megapixels
        Most megapixels of an image, however small its file; 89 at most.
    seconds
        Time for a request to arrive, and as long again to be answered.
    queue
        Most requests that wait for detections; one more is told to come again.
    connections
        Most connections at the same time, idle ones too.
    memory
        Megabytes that the files and pixels of all waiting requests may take together.
    """

    megabytes: float = 20
    megapixels: float = 50
    seconds: float = 30
    queue: int = 64
    connections: int = 256
    memory: float = 2048

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise OptionError(f"{field.name} is {getattr(self, field.name)}: it must be above 0")
        if self.megapixels > MOST_MEGAPIXELS:
            raise OptionError(f"megapixels is {self.megapixels}: it must be at most {MOST_MEGAPIXELS}")
        least = FORM_COPIES * self.megabytes + self.megapixels * BYTES_A_PIXEL
        if self.memory < least:
            raise OptionError(f"memory is {self.memory}: one request of these limits may need {least:.0f} megabytes")

    @property
    def bytes(self) -> int:
        return round(self.megabytes * 1e6)

    @property
    def pixels(self) -> int:
        return round(self.megapixels * 1e6)


class Refused(Exception):
    """A request that is not answered as it wished: the HTTP status, and the reason in words for its sender.

    retry: seconds after which to try again, where that may help.
    """

    def __init__(self, status: int, reason: str, retry: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry = status, reason, retry


class Room:
    """The memory for what clients have sent, all requests together."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """A request's share, which grows and shrinks with what the request holds and is given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            share.leave()


class Share:
    """What one request holds, until its last user has left: the request itself, or work on it that nobody awaits."""

    def __init__(self, room: Room) -> None:
        self.room, self.held, self.users = room, 0, 1

    def hold(self, size: int) -> None:
        """Take or give back, so that `size` bytes are held. Raises Refused where there is no room for them."""
        if size > self.room.most:
            raise Refused(413, f"the image would need {size / 1e6:.0f} MB of memory; this server has less for all")
        if size > self.held and self.room.taken - self.held + size > self.room.most:
            raise Refused(503, "the server holds as many images as fit its memory; try again", retry=1)
        self.room.taken += size - self.held
        self.held = size

    def leave(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.hold(0)
