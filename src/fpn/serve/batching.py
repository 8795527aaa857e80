"""Images of many requests -> batches of one shape, through a detector one batch at a time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch import Tensor

from fpn.data.sizes import resized_size
from fpn.exported import Exported
from fpn.inference.finder import Finder
from fpn.model.detector import Detector
from fpn.serve.limits import Refused
from fpn.structures import Detections

Size = tuple[int, int]  # height, width
MULTIPLE = 32  # to which batches are padded, see `fpn.data.batching.collate`


@dataclass(eq=False)
class Wish:
    """An image that waits for its detections. Those of one shape may be one batch."""

    image: Tensor
    shape: Size
    answer: asyncio.Future[Detections] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Gathers images for up to `wait` seconds, or until there are `batch` of one shape, and has them looked at.

    find: runs on a thread of its own, one batch at a time. shape: see `shape_of`. places: requests that may be on
    their way at the same time. pixels: of all images of a batch; one may have more. watch: told of every batch, images
    and seconds.
    """

    def __init__(
        self,
        find: Finder,
        shape: Callable[[Size], Size],
        *,
        batch: int = 8,
        wait: float = 0.005,
        places: int = 64,
        pixels: int = 50_000_000,
        watch: Callable[[int, float], object] = lambda images, seconds: None,
    ) -> None:
        self.find, self.shape, self.batch, self.wait, self.places = find, shape, batch, wait, places
        self.pixels, self.watch = pixels, watch
        self.taken = 0  # places
        self.waiting: list[Wish] = []
        self.arrived = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="detect")
        self.began: float | None = None  # when the batch was begun that is being looked at
        self.pace = 0.1  # seconds an image, of late

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, taken before anything is done for a request. Raises Refused where there is none."""
        if self.taken >= self.places:
            seconds = min(60, max(1, math.ceil(self.pace * self.taken)))
            raise Refused(503, f"{self.taken} requests are waiting already; try again in {seconds} s", retry=seconds)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def detect(self, image: Tensor) -> Detections:
        """The detections in one image, uint8 (3, H, W). Whoever stops waiting costs no detection any more."""
        wish = Wish(image, self.shape((image.shape[1], image.shape[2])))
        self.waiting.append(wish)
        self.arrived.set()
        try:
            return await wish.answer
        finally:
            if wish in self.waiting:
                self.waiting.remove(wish)

    async def run(self) -> None:
        """Answer wishes until cancelled."""
        while True:
            if not self.waiting:
                self.arrived.clear()
                await self.arrived.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.wait):
                    while len(self.next_batch()) < self.batch:
                        self.arrived.clear()
                        await self.arrived.wait()
            batch = self.next_batch()
            self.waiting = [wish for wish in self.waiting if wish not in batch]
            if batch:  # its senders may all have gone
                await self.answer(batch)

    def next_batch(self) -> list[Wish]:
        """The image that has waited longest, and others of its shape."""
        chosen, pixels = [], 0
        for wish in self.waiting:
            size = wish.image.shape[1] * wish.image.shape[2]
            if wish.shape == self.waiting[0].shape and (not chosen or pixels + size <= self.pixels):
                chosen.append(wish)
                pixels += size
        return chosen[: self.batch]

    async def answer(self, batch: Sequence[Wish]) -> None:
        """Give each wish of a batch its detections; where they fail together, each has a try of its own."""
        found, failure, self.began = [], None, time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self.thread, self.find, [wish.image for wish in batch])
            if len(found) != len(batch):
                raise RuntimeError(f"the detector gave {len(found)} answers to {len(batch)} images")
            seconds = time.monotonic() - self.began
            self.pace = 0.9 * self.pace + 0.1 * seconds / len(batch)
            self.watch(len(batch), seconds)
        except Exception as error:  # out of memory, most likely; the next request may fit again
            # A traceback keeps the tensors of all that was being done, which the next tries need the memory of.
            failure = error if len(batch) == 1 else error.with_traceback(None)
        finally:
            self.began = None
        if failure is None:
            for wish, detections in zip(batch, found, strict=True):
                if not wish.answer.done():
                    wish.answer.set_result(detections)
        elif len(batch) > 1:
            for wish in batch:
                if not wish.answer.done():  # as that of one who has gone
                    await self.answer([wish])
        elif not batch[0].answer.done():
            batch[0].answer.set_exception(failure)

    def stuck_for(self) -> float:
        """Seconds since the batch was begun that is being looked at."""
        return 0.0 if self.began is None else time.monotonic() - self.began


def shape_of(detector: Detector | Exported) -> Callable[[Size], Size]:
    """The function from an image's size to what it must share with others to be in a batch with them.

    It is the size to which a detector pads the image when it is alone, so that nobody's answer depends on whose images
    come at the same time. Exported detectors take images of one size.
    """
    if isinstance(detector, Exported) or detector.spec.tile:
        return lambda size: size
    sides = detector.spec.sides

    def padded(size: Size) -> Size:
        height, width = resized_size(size, *sides)
        return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE

    return padded
