"""The paths of the server: POST /detect, GET /model, /health, /metrics, /openapi.json, and the page."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from io import BytesIO
from typing import Annotated, Any, Literal, NotRequired, TypeVar

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from torch import Tensor
from typing_extensions import TypedDict

import fpn
from fpn.exported import SUFFIXES, Exported
from fpn.hardware import cores
from fpn.inference.finder import Finder, finder
from fpn.inference.rows import row_of
from fpn.model.detector import Detector
from fpn.serve.batching import Batcher, shape_of
from fpn.serve.guard import Guard
from fpn.serve.intake import body_of, decoded, file_of, needs_of
from fpn.serve.limits import BYTES_A_DRAWN_PIXEL, FORM_COPIES, Limits, Refused, Room, Share
from fpn.serve.meters import Meters
from fpn.structures import Detections

T = TypeVar("T")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
OWN = ("/detect", "/model", "/health", "/metrics", "/openapi.json")

# For the OpenAPI document. "class" cannot be written as an attribute.
Found = TypedDict(
    "Found",
    {
        "class": str,
        "score": float,
        "box": tuple[float, float, float, float],
        "level": int,
        "segmentation": NotRequired[Any],
    },
)


class Answer(TypedDict):
    height: int
    width: int
    threshold: float
    seconds: float
    detections: list[Found]


class Refusal(TypedDict):
    detail: str


FILE = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": FILE},
        "application/octet-stream": {"schema": FILE},
        "multipart/form-data": {"schema": {"type": "object", "properties": {"image": FILE}, "required": ["image"]}},
    },
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "No body, or a broken form"},
    401: {"model": Refusal, "description": "The token is missing or wrong"},
    408: {"model": Refusal, "description": "The body came too slowly"},
    413: {"model": Refusal, "description": "Too many bytes or pixels"},
    415: {"model": Refusal, "description": "Not an image, or of a format that is not taken"},
    421: {"model": Refusal, "description": "Without a token: called by a name that is not this machine's"},
    422: {"model": Refusal, "description": "A damaged image, or an option that cannot be"},
    500: {"model": Refusal, "description": "The server failed; its log says how"},
    503: {"model": Refusal, "description": "Too busy; Retry-After says when to try again"},
}


def application(
    detector: Detector | Exported,
    *,
    find: Finder | None = None,
    name: str = "",
    limits: Limits = Limits(),  # noqa: B008
    batch: int = 8,
    wait: float = 0.005,
    token: str | None = None,
    hosts: Collection[str] | None = None,
) -> ASGIApp:
    """The server of a detector as an ASGI application, for any server of those.

    find: see `fpn.inference.finder`; of the detector on the machine's best device when left out. name: of its file.
    batch: images at a time, gathered for up to `wait` seconds. token, hosts: see `fpn.serve.guard.Guard`.
    """
    meters, room = Meters(), Room(round(limits.memory * 1e6))
    batcher = Batcher(
        find or finder(detector, progress=False),
        shape_of(detector),
        batch=batch,
        wait=wait,
        places=limits.queue,
        pixels=limits.pixels,
        watch=meters.batch,
    )
    hands = min(4, cores())
    desk = Desk(detector, batcher, limits, room, meters, ThreadPoolExecutor(hands, "hands"), asyncio.Semaphore(hands))

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        for thread in (desk.hands, batcher.thread):
            thread.shutdown(wait=False, cancel_futures=True)

    # Its pages on the API would load scripts from elsewhere.
    app = FastAPI(title="fpn", version=fpn.__version__, docs_url=None, redoc_url=None, lifespan=running)
    add_detect(app, desk)
    add_knowledge(app, desk, about(detector, name, limits))
    pages = add_page(app)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, misasked)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, failed)

    def told(path: str, status: int) -> None:
        known = path if path in OWN or path in pages else "other"
        meters.requests.labels(known, str(status)).inc()

    return Guard(app, token=token, hosts=hosts, public={*pages, "/health"}, told=told)


@dataclass(frozen=True)
class Desk:
    """What it takes to answer a request for detections."""

    detector: Detector | Exported
    batcher: Batcher
    limits: Limits
    room: Room
    meters: Meters
    hands: ThreadPoolExecutor  # for what would keep the other requests waiting: decoding, drawing, run lengths
    free: asyncio.Semaphore  # how many of them have nothing to do

    async def by_hand(self, share: Share, work: Callable[..., T], *arguments: Any) -> T:
        """What the work gives. It cannot be stopped once it has begun: what its request holds in `share` is held until
        it ends, even where the client has gone; and it begins only when a hand is free, so that none lies in wait."""
        await self.free.acquire()
        job, loop = self.hands.submit(work, *arguments), asyncio.get_running_loop()
        share.users += 1

        def ended() -> None:
            self.free.release()
            share.leave()

        def tell(job: Future[T]) -> None:
            with suppress(RuntimeError):  # the server has stopped before
                loop.call_soon_threadsafe(ended)

        job.add_done_callback(tell)
        return await asyncio.wrap_future(job)

    async def look(self, file: bytes, share: Share) -> tuple[Tensor, Detections]:
        """The pixels of an image file, held in `share` beside what it holds, and all that is found in them."""
        before = share.held
        share.hold(before + await self.by_hand(share, needs_of, file, self.limits))
        image = await self.by_hand(share, decoded, file)
        share.hold(before + image.numel())
        return image, await self.batcher.detect(image)


def add_detect(app: FastAPI, desk: Desk) -> None:
    @app.post(
        "/detect",
        summary="Find objects in an image",
        responses={
            200: {"model": Answer, "description": "What was found", "content": {"image/jpeg": {"schema": FILE}}},
            **REFUSALS,
        },
        openapi_extra={"requestBody": BODY},
    )
    async def detect(
        request: Request,
        threshold: Annotated[float, Query(ge=0, le=1, description="Lowest score of a detection")] = 0.5,
        classes: Annotated[list[str] | None, Query(description="Only these classes")] = None,
        answer: Annotated[Literal["json", "picture"], Query(description="picture: a JPEG with boxes")] = "json",
    ) -> Response:
        began = time.monotonic()
        labels = labels_of(classes or (), desk.detector.classes)
        with desk.room.share() as share:
            body = await body_of(request, desk.limits, share)
            with desk.batcher.place():
                work = respond(desk, body, request.headers.get("content-type", ""), share, threshold, labels, answer)
                try:
                    async with asyncio.timeout(desk.limits.seconds):
                        response = await unless_gone(request, work)
                except TimeoutError:
                    reason = f"the image was not looked at within {desk.limits.seconds:g} seconds; try again later"
                    raise Refused(503, reason, retry=10) from None
        desk.meters.seconds.observe(time.monotonic() - began)
        return response


async def respond(
    desk: Desk, body: bytes, kind: str, share: Share, threshold: float, labels: Sequence[int], answer: str
) -> Response:
    """The detections in the image in a request's body of this content type."""
    began = time.monotonic()
    if kind.lower().startswith("multipart/"):
        share.hold(FORM_COPIES * len(body))
    file = await desk.by_hand(share, file_of, body, kind)
    image, found = await desk.look(file, share)
    found = chosen(found, threshold, labels)
    for name in found.names:
        desk.meters.objects.labels(name).inc()
    if answer == "picture":
        share.hold(share.held + BYTES_A_DRAWN_PIXEL * image.shape[1] * image.shape[2])
        return Response(await desk.by_hand(share, picture_of, image, found), media_type="image/jpeg")
    row = await desk.by_hand(share, row_of, found, (image.shape[1], image.shape[2]))
    size = {"height": row["height"], "width": row["width"]}
    seconds = round(time.monotonic() - began, 4)
    return JSONResponse({**size, "threshold": threshold, "seconds": seconds, "detections": row["detections"]})


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work gives; it is given up, with ClientDisconnect, where the client does not wait for it."""
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientDisconnect
        return job.result()
    finally:
        job.cancel()
        gone.cancel()


async def left(request: Request) -> None:
    """Until the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def labels_of(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The labels of classes. Raises Refused for one that the detector does not know."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise Refused(422, f"classes: the detector knows no {unknown[0]!r}; GET /model lists what it knows")
    return [classes.index(name) for name in names]


def chosen(found: Detections, threshold: float, labels: Sequence[int]) -> Detections:
    """The detections of one image that score at least `threshold`, of these labels where there are some."""
    keep = found.scores >= threshold
    if labels:
        keep &= torch.isin(found.labels, torch.tensor(labels))
    return found.take(keep)


def picture_of(image: Tensor, found: Detections) -> bytes:
    """The image with its detections drawn in, as JPEG."""
    from fpn.drawing import draw

    file = BytesIO()
    draw(image, found.boxes, found.labels, found.scores, found.classes, found.masks).save(file, "JPEG", quality=92)
    return file.getvalue()


def add_knowledge(app: FastAPI, desk: Desk, model: dict[str, Any]) -> None:
    """What can be asked about the server itself."""

    @app.get("/model", summary="The detector: classes, levels, sizes, limits")
    async def of_model() -> dict[str, Any]:
        return model

    @app.get("/health", summary="Whether images are looked at", responses={503: {"description": "They are not"}})
    async def health() -> Response:
        stuck = desk.batcher.stuck_for() > desk.limits.seconds
        state = {"status": "stuck" if stuck else "ok", "waiting": desk.batcher.taken}
        return JSONResponse(state, 503 if stuck else 200)

    @app.get("/metrics", summary="Counters for Prometheus", response_class=Response)
    async def metrics() -> Response:
        desk.meters.waiting.set(desk.batcher.taken)
        desk.meters.memory.set(desk.room.taken)
        return Response(desk.meters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def about(detector: Detector | Exported, name: str, limits: Limits) -> dict[str, Any]:
    """What GET /model tells."""
    spec = detector.spec
    levels = range(spec.levels[0], spec.levels[1] + 1) if spec.levels else ()
    return {
        "model": spec.model,
        "backbone": spec.backbone,
        "classes": list(detector.classes),
        "levels": list(levels),
        "score": detector.score,
        "short": spec.sides[0],
        "long": spec.sides[1],
        "tile": spec.tile,
        "masks": detector.has_masks,
        "max_detections": detector.max_detections,
        "file": name,
        "kind": next((kind for kind, suffix in SUFFIXES.items() if name.endswith(suffix)), "safetensors"),
        "backend": detector.backend,
        "precision": detector.precision,
        "version": fpn.__version__,
        "limits": {"bytes": limits.bytes, "pixels": limits.pixels, "seconds": limits.seconds, "queue": limits.queue},
    }


def add_page(app: FastAPI) -> set[str]:
    """The files of the page, read once, index.html at /. Gives their paths."""
    folder = files("fpn.serve") / "page"
    found = {f"/{file.name}": file for file in folder.iterdir()} if folder.is_dir() else {}
    found = {path: file for path, file in found.items() if os.path.splitext(path)[1] in TYPES}
    if "/index.html" in found:
        found["/"] = found.pop("/index.html")
    for path, file in found.items():
        kind = TYPES[os.path.splitext(file.name)[1]]
        response = Response(file.read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})
        app.add_route(path, partial(as_it_is, response), methods=["GET", "HEAD"], include_in_schema=False)
    return set(found)


async def as_it_is(response: Response, request: Request) -> Response:
    return response


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {} if error.retry is None else {"retry-after": str(error.retry)}
    return JSONResponse({"detail": error.reason}, error.status, headers)


async def gone(request: Request, error: Exception) -> Response:
    """Nobody is there to be answered; nginx's number for it goes into the metrics."""
    return Response(status_code=499)


async def misasked(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{fault['loc'][-1]}: {fault['msg'].lower()}" for fault in error.errors()]
    return JSONResponse({"detail": "; ".join(faults)}, 422)


async def failed(request: Request, error: Exception) -> Response:
    """Of an error of ours, which the log tells; the server goes on."""
    return JSONResponse({"detail": "the server failed at this image; its log says why"}, 500)
