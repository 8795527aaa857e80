"""The server: its answers, its limits, what it refuses, and that nothing a client does ends it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import struct
import textwrap
import threading
import time
import tracemalloc
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO

import fresh
import httpx
import pytest
import torch
from PIL import Image
from serving import Slow, connected, encoded, picture, posting, raw, served, sized, until

import fpn
from fpn.errors import FpnError, OptionError
from fpn.serve import server
from fpn.serve.batching import Batcher, shape_of
from fpn.serve.command import serve
from fpn.serve.intake import MOST_FIELDS, decoded, fields_of, needs_of, pieces_of
from fpn.serve.limits import BYTES_A_DEEP_PIXEL, BYTES_A_PIXEL, Limits, Refused, Room


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    made = fpn.build(backbone="tiny", classes=("cat", "dog"), weights="none", width=32, hidden=64, short=64, long=96)
    for layer in (made.box_head.classes, made.box_head.offsets, made.rpn.objectness, made.rpn.offsets):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def client(detector):
    """Of a server with a finder of known answers."""
    with served(detector, Limits(megabytes=1, megapixels=1), find=Slow(), name="a.safetensors") as client:
        yield client


# --- answers


def test_answers_are_those_of_predict(detector):
    image = picture(50, 40)
    file = encoded(image)
    expected = fpn.predict(detector, image, threshold=0.1, device="cpu")
    assert len(expected) > 0
    with served(detector) as client:
        answer = client.post("/detect?threshold=0.1", content=file).raise_for_status().json()
        form = client.post("/detect?threshold=0.1", files={"image": ("a.png", file)}).raise_for_status().json()
        one = client.post("/detect", params={"threshold": 0.1, "classes": "dog"}, content=file).json()
    assert (answer["height"], answer["width"], answer["threshold"]) == (40, 50, 0.1) and answer["seconds"] > 0
    rows = answer["detections"]
    assert [row["class"] for row in rows] == expected.names
    assert [row["level"] for row in rows] == expected.levels.tolist()
    torch.testing.assert_close(torch.tensor([row["box"] for row in rows]), expected.boxes, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor([row["score"] for row in rows]), expected.scores, atol=1e-4, rtol=0)
    assert form["detections"] == rows
    assert one["detections"] == [row for row in rows if row["class"] == "dog"] != []


def test_masks_come_as_run_lengths():
    torch.manual_seed(0)
    sides = {"width": 32, "hidden": 64, "short": 64, "long": 96}
    made = fpn.build("mask_rcnn", backbone="tiny", classes=("cat",), weights="none", **sides)
    with served(made) as client:
        answer = client.post("/detect?threshold=0", content=encoded(picture(50, 40))).raise_for_status().json()
    assert all(row["segmentation"]["size"] == [40, 50] for row in answer["detections"]) and answer["detections"]


def test_threshold_and_the_annotated_picture(client):
    file = encoded(picture())
    assert [row["class"] for row in client.post("/detect", content=file).json()["detections"]] == ["cat"]
    assert len(client.post("/detect?threshold=0.2", content=file).json()["detections"]) == 2
    answer = client.post("/detect?answer=picture", content=file)
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(BytesIO(answer.content)).size == (40, 30)


def test_photos_are_seen_upright(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = client.post("/detect", content=encoded(picture(40, 30), "JPEG", exif=exif)).json()
    assert (answer["height"], answer["width"]) == (40, 30)


def test_what_it_tells_of_itself(client, detector):
    model = client.get("/model").json()
    assert (
        model["classes"] == ["cat", "dog"] and model["levels"] == [2, 3, 4, 5, 6] and model["file"] == "a.safetensors"
    )
    assert (model["kind"], model["short"], model["long"], model["score"]) == ("safetensors", 64, 96, detector.score)
    assert model["tile"] is None
    assert model["limits"]["bytes"] == model["limits"]["pixels"] == 1_000_000
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}
    document = client.get("/openapi.json").json()
    post = document["paths"]["/detect"]["post"]
    assert set(post["requestBody"]["content"]) == {"image/*", "application/octet-stream", "multipart/form-data"}
    assert {"421", "500"} <= set(post["responses"])
    assert document["components"]["schemas"]["Found"]["required"] == ["class", "score", "box", "level"]


def test_meters(client):
    def count(line: str) -> float:
        rows = dict(row.rsplit(" ", 1) for row in client.get("/metrics").text.splitlines() if row[0] != "#")
        return float(rows.get(line, 0))

    lines = (
        'fpn_requests_total{path="/detect",status="200"}',
        'fpn_requests_total{path="other",status="404"}',
        'fpn_detections_total{name="dog"}',
        "fpn_batch_images_sum",
    )
    before = [count(line) for line in lines]
    client.post("/detect?threshold=0", content=encoded(picture()))
    client.get("/secret.txt")
    assert [count(line) - old for line, old in zip(lines, before, strict=True)] == [1, 1, 1, 1]
    assert count("fpn_held_bytes") == count("fpn_waiting") == 0


def test_pages_may_load_nothing_from_elsewhere(client):
    for path in ("/health", "/detect", "/nothing"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_served(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
    for path in ("/__init__.py", "/../app.py", "/%2e%2e/app.py", "/page/../../app.py"):
        assert client.get(path).status_code == 404


# --- what is refused


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colours: int = 2, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiled_tiff(tiles: int, order: str = "<") -> bytes:
    """Of one-pixel tiles that all lie at the same place; both of its lists begin at byte 200."""
    rows = [(256, 4, 1, 1000), (257, 4, 1, 1000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, 1), (323, 4, 1, 1), (324, 4, tiles, 200), (325, 4, tiles, 200)]  # fmt: skip
    directory = b"".join(struct.pack(order + "HHII", *row) for row in rows)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(rows)) + directory + bytes(4)
    return head.ljust(200, b"\0") + struct.pack(order + "I", 8) * 2 * tiles


JPEG = encoded(picture(64, 64), "JPEG", progressive=True, quality=95)
BROKEN = (415, 422)  # the two, where Pillow's versions differ in when they notice
HOSTILE = {
    "nothing": (b"", 400),
    "a word": (b"hello", 415),
    "zeros": (bytes(100_000), 415),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415),
    "PostScript, which Pillow would have run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", 415),
    "PDF": (b"%PDF-1.7\n", 415),
    "cut-off PNG": (encoded(picture(100, 100))[:5000], 422),
    "cut-off JPEG": (JPEG[: len(JPEG) // 2], 422),
    "JPEG of a start alone": (b"\xff\xd8\xff", 415),
    "bomb": (png(50_000, 50_000), 413),
    "long": (png(1_000_001, 1), 413),
    "without pixels": (png(0, 10), BROKEN),
    "PNG without its pixels": (png(10, 10), 422),
    "too many scans": (JPEG[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 300 + b"\xff\xd9", 422),
    "tiles of one pixel": (tiled_tiff(110_000), 422),
    "large": (bytes(1_000_001), 413),
    "GIF without frames": (b"GIF89a\x10\0\x10\0\0\0\0;", BROKEN),
    "WebP without content": (b"RIFF\x10\0\0\0WEBPVP8 \x04\0\0\0abcd", BROKEN),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_a_reason(client, name):
    content, status = HOSTILE[name]
    answer = client.post("/detect", content=content)
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    assert len(answer.json()["detail"]) > 20 and "Traceback" not in answer.text
    assert client.post("/detect", content=encoded(picture())).status_code == 200


def test_damaged_files_are_never_the_servers_failure(client):
    rng = torch.Generator().manual_seed(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        file = encoded(picture(), kind)
        for _ in range(8):
            damaged = bytearray(file)
            for place in torch.randint(0, len(file), (6,), generator=rng).tolist():
                damaged[place] = int(torch.randint(0, 256, (), generator=rng))
            assert client.post("/detect", content=bytes(damaged)).status_code in (200, 413, 415, 422)


def test_tiny_tiles_are_counted_before_they_are_read():
    limits = Limits()
    assert needs_of(tiled_tiff(1000), limits) == 1_000_000 * BYTES_A_PIXEL
    for order in "<>":
        file = tiled_tiff(1_000_000, order)
        tracemalloc.start()
        try:
            with pytest.raises(Refused, match="tiles"):
                needs_of(file, limits)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000  # Pillow would take 200 MB
        finally:
            tracemalloc.stop()


def test_tiles_are_counted_in_every_kind_of_tiff():
    rows = [(256, 4, 1, 9), (324, 3, 123_456, 200)]
    for order, head in (("<", b"II+\0"), (">", b"MM\0+")):
        directory = b"".join(struct.pack(order + "HHQQ", *row) for row in rows)
        big = head + struct.pack(order + "HHQQ", 8, 0, 16, len(rows)) + directory
        assert pieces_of(big) == 123_456
        assert pieces_of(big[:-1]) == 0 == pieces_of(big[:10])
    for order, head in (("<", b"II*\0"), (">", b"MM*\0"), (">", b"MM\0+")):
        directory = b"".join(struct.pack(order + "HHII", *row) for row in rows)
        cut = head + struct.pack(order + "IH", 8, 60_000) + directory  # names more rows than there are
        assert pieces_of(cut) == 123_456
    assert pieces_of(encoded(picture(40, 30), "TIFF")) == 1
    assert pieces_of(encoded(picture(40, 30))) == 0 == pieces_of(b"II")


def test_scans_are_counted_in_the_jpeg_alone():
    needs_of(JPEG + b"\xff\xda" * 1000, Limits())  # a phone's video or depth map behind it


def test_deep_images_count_for_the_memory_they_take():
    deep = encoded(Image.new("I;16", (100, 50), 40_000))
    assert needs_of(deep, Limits()) == 5000 * BYTES_A_DEEP_PIXEL
    assert decoded(deep).shape == (3, 50, 100)


@pytest.mark.parametrize(
    "query, words",
    [
        ("threshold=1.5", "threshold"),
        ("threshold=nan", "threshold"),
        ("threshold=", "threshold"),
        ("classes=cow", "'cow'"),
        ("answer=xml", "answer"),
    ],
)
def test_wrong_options_are_named(client, query, words):
    answer = client.post(f"/detect?{query}", content=encoded(picture()))
    assert answer.status_code == 422 and words in answer.json()["detail"]


def test_forms(client):
    file = encoded(picture())
    other = client.post("/detect", files={"image": ("a.png", file)}, data={"note": "x" * 1000})
    assert other.status_code == 200
    assert client.post("/detect", files={"photo": ("a.png", file)}).status_code == 422
    kinds = ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 300)
    for kind in (*kinds, "multipart/form-data; boundary=abc"):
        answer = client.post("/detect", content=file, headers={"content-type": kind})
        assert answer.status_code in (400, 422), answer.text
    with pytest.raises(Refused, match="form"):
        fields_of(b'--a\r\nContent-Disposition: form-data; name="image"\r\n\r\ncut off', b"a")
    part = b'--a\r\nContent-Disposition: form-data; name="note"\r\n\r\nx\r\n'
    assert len(fields_of(part * MOST_FIELDS + b"--a--\r\n", b"a")) == MOST_FIELDS
    with pytest.raises(Refused, match="fields"):
        fields_of(part * (MOST_FIELDS + 1) + b"--a--\r\n", b"a")


def test_what_is_not_http(client):
    for nonsense in (
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/9\r\n\r\n",
        b"\r\n" * 100 + b"x",
    ):
        answer = raw(client, nonsense, b"\r\n\r\n")
        assert answer == b"" or b" 400 " in answer.splitlines()[0]
    assert b" 400 " in raw(client, b"GET /health HTTP/1.1\r\nx: " + b"y" * 100_000).splitlines()[0]
    large = b"POST /detect HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 99999999999999\r\n\r\n"
    declared = raw(client, large)
    assert b" 413 " in declared.splitlines()[0]
    assert client.get("/health").status_code == 200


def test_what_is_broken_after_its_answer_is_cut_off(client, caplog):
    with connected(client) as line:
        line.sendall(b"POST /nothing HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        assert b" 404 " in line.recv(1000)
        line.sendall(b"no chunk\r\n")
        line.settimeout(5)
        with suppress(ConnectionError):
            while line.recv(1000):
                pass
    assert client.get("/health").status_code == 200 and not caplog.text


def test_chunks_are_counted_as_they_come(client):
    answer = client.post("/detect", content=iter([bytes(100_000)] * 11))
    assert answer.status_code == 413 and "1,000,000 bytes" in answer.json()["detail"]


# --- limits


def test_a_full_queue_says_when_to_come_again(detector):
    find = Slow()
    find.open.clear()
    with served(detector, Limits(queue=3), find=find) as client, ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(client.post, "/detect", content=encoded(picture())) for _ in range(3)]
        until(lambda: client.get("/health").json()["waiting"] == 3)
        answer = client.post("/detect", content=encoded(picture()))
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        find.open.set()
        assert [job.result().status_code for job in waiting] == [200] * 3
        assert client.post("/detect", content=encoded(picture())).status_code == 200


def test_the_memory_of_all_requests_is_bounded(detector):
    find = Slow()
    find.open.clear()
    image = encoded(picture(400, 300), "JPEG")  # 2.6 MB while it is decoded, 0.4 MB after, and its file of 0.1 MB
    limits = Limits(megabytes=0.12, megapixels=0.12, memory=3.1)
    with served(detector, limits, find=find) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, "/detect", content=image)
        until(lambda: find.batches)
        answer = client.post("/detect", content=image)
        assert answer.status_code == 503 and "memory" in answer.json()["detail"]
        find.open.set()
        assert first.result().status_code == 200
        assert client.post("/detect", content=image).status_code == 200
        assert client.post("/detect", content=encoded(Image.new("I;16", (400, 300)))).status_code == 413


def test_a_slow_detector_costs_no_more_than_its_time(detector):
    find = Slow()
    find.open.clear()
    with served(detector, Limits(seconds=1), find=find) as client:
        answer = client.post("/detect", content=encoded(picture()))
        assert answer.status_code == 503 and "1 seconds" in answer.json()["detail"]
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["status"] == "stuck"
        find.open.set()
        until(lambda: client.get("/health").status_code == 200)
        assert client.post("/detect", content=encoded(picture())).status_code == 200


def test_slow_clients_are_let_go(detector, monkeypatch):
    monkeypatch.setattr(server, "HEADERS_WITHIN", 0.3)
    with served(detector, Limits(seconds=0.4), find=Slow()) as client:
        began = time.monotonic()
        assert raw(client, b"POST /detect HTT") == b"" == raw(client)
        assert b" 408 " in raw(client, posting(1000), b"a little", wait=1).splitlines()[0]
        assert time.monotonic() - began < 9
        with connected(client) as line:  # one who does not stop, a byte at a time
            line.sendall(posting(1000))
            with pytest.raises(OSError):
                for _ in range(200):
                    line.sendall(b"x")
                    time.sleep(0.02)
        assert "fpn_held_bytes 0.0" in client.get("/metrics").text


def test_answers_nobody_reads_are_let_go(detector):
    file = encoded(picture(1500, 1000), "JPEG", quality=95)
    request = posting(len(file), "/detect?answer=picture") + file
    with served(detector, Limits(seconds=0.5), find=Slow()) as client, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", client.base_url.port))
        line.settimeout(10)
        with pytest.raises(ConnectionError):  # a connection that is left open would end in TimeoutError
            for _ in range(8):  # megabytes that neither side can put anywhere
                line.sendall(request)
        assert client.get("/health").status_code == 200


def test_connections_are_bounded(detector):
    with served(detector, Limits(connections=5), find=Slow()) as client:
        lines = [connected(client) for _ in range(5)]
        time.sleep(0.1)
        answer = raw(client, wait=1)
        assert b" 503 " in answer and b"retry-after" in answer
        for line in lines:
            line.close()
        until(lambda: b" 200 " in raw(client, b"GET /health HTTP/1.0\r\n\r\n", wait=1))


def test_who_has_gone_is_not_looked_for(detector):
    find = Slow()
    find.open.clear()
    with served(detector, find=find) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, "/detect", content=encoded(picture()))
        until(lambda: find.batches)
        file = encoded(picture(50, 50))
        for _ in range(5):
            with connected(client) as line:
                line.sendall(posting(len(file)) + file)
                until(lambda: client.get("/health").json()["waiting"] == 2)
            until(lambda: client.get("/health").json()["waiting"] == 1)
        with connected(client) as line:
            line.sendall(posting(len(file)) + file[:100])
        find.open.set()
        assert first.result().status_code == 200
        assert client.post("/detect", content=encoded(picture(20, 20))).status_code == 200
        assert find.batches == [[(30, 40)], [(20, 20)]]
        text = client.get("/metrics").text
        assert "fpn_held_bytes 0.0" in text and 'path="/detect",status="499"} 6.0' in text
        assert 'status="500"' not in text


def test_work_that_goes_on_for_nobody_counts_for_the_memory(detector, monkeypatch):
    go_on, begun = threading.Event(), []

    def slow(file, limits):
        begun.append(file)
        assert go_on.wait(20)
        return needs_of(file, limits)

    monkeypatch.setattr("fpn.serve.app.needs_of", slow)
    monkeypatch.setattr("fpn.serve.app.cores", lambda: 1)
    with served(detector, find=Slow()) as client:
        file = encoded(picture(300, 200))
        for _ in range(3):
            with connected(client) as line:
                line.sendall(posting(len(file)) + file)
                until(lambda: client.get("/health").json()["waiting"] == 1)
                until(lambda: begun)
            until(lambda: client.get("/health").json()["waiting"] == 0)
        assert f"fpn_held_bytes {float(len(file))}" in client.get("/metrics").text  # the other two lie nowhere
        go_on.set()
        until(lambda: "fpn_held_bytes 0.0" in client.get("/metrics").text)
        assert client.post("/detect", content=file).status_code == 200 and len(begun) == 2


def test_requests_that_wait_in_one_connection_have_time_each(detector, monkeypatch):
    told = []
    monkeypatch.setattr(server.Connection, "end_in", lambda line, seconds: told.append(seconds))
    file, last = encoded(picture()), b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    with served(detector, Limits(seconds=20), find=Slow()) as client:
        assert raw(client, (posting(len(file)) + file) * 2 + last).count(b"HTTP/1.1 200") == 3
    assert told == [server.HEADERS_WITHIN, 60, 60, 60, 20]  # to open, three to be answered, the last to be read


def test_images_are_gathered_into_batches_of_one_shape(detector):
    find = Slow()
    with served(detector, find=find, batch=4, wait=1.0) as client, ThreadPoolExecutor(6) as threads:
        files = [encoded(picture(40, 30))] * 4 + [encoded(picture(30, 40))] * 2
        answers = list(threads.map(lambda file: client.post("/detect", content=file).json(), files))
        sizes = [(answer["width"], answer["height"]) for answer in answers]
        assert sizes == [(40, 30)] * 4 + [(30, 40)] * 2
        assert all(answer["detections"][0]["box"][2] == answer["width"] for answer in answers)
    assert sorted(map(len, find.batches)) == [2, 4] and all(len(set(batch)) == 1 for batch in find.batches)


def test_one_bad_image_costs_the_others_nothing():
    alive = []

    def find(images):
        assert not any(tensor() is not None for tensor in alive)  # of the batch that failed before
        scratch = torch.zeros(1)
        if len(images) > 1:
            alive.append(weakref.ref(scratch))
        if any(image.shape[2] == 13 for image in images):
            raise MemoryError
        return [sized(*image.shape[1:]) for image in images]

    async def all_of(widths):
        batcher = Batcher(find, lambda size: (1, 1), wait=0.05)
        task = asyncio.create_task(batcher.run())
        images = [torch.zeros((3, 10, width), dtype=torch.uint8) for width in widths]
        found = await asyncio.gather(*(batcher.detect(image) for image in images), return_exceptions=True)
        again = await batcher.detect(images[0])
        task.cancel()
        return [*found, again]

    *found, again = asyncio.run(all_of((11, 13, 12)))
    assert [float(one.boxes[0, 2]) for one in (found[0], found[2], again)] == [11, 12, 11]
    assert isinstance(found[1], MemoryError) and alive


def test_a_finder_that_forgets_images_is_an_error_and_no_end():
    async def twice():
        batcher = Batcher(lambda images: [], lambda size: (1, 1), wait=0)
        task = asyncio.create_task(batcher.run())
        image = torch.zeros((3, 4, 4), dtype=torch.uint8)
        found = [await asyncio.gather(batcher.detect(image), return_exceptions=True) for _ in range(2)]
        task.cancel()
        return found

    for (error,) in asyncio.run(asyncio.wait_for(twice(), 5)):
        assert isinstance(error, RuntimeError) and "0 answers to 1 images" in str(error)


def test_the_servers_own_failure_is_told_and_survived(detector, caplog):
    failing = threading.Event()

    def find(images):
        if failing.is_set():
            raise RuntimeError("out of memory")
        return [sized(*image.shape[1:]) for image in images]

    with served(detector, find=find) as client:
        failing.set()
        answer = client.post("/detect", content=encoded(picture()))
        assert answer.status_code == 500 and "log" in answer.json()["detail"] and "memory" not in answer.text
        assert "content-security-policy" in answer.headers
        failing.clear()
        assert client.post("/detect", content=encoded(picture())).status_code == 200
    assert "out of memory" in caplog.text


def test_many_clients_at_once(detector):
    def rows(answer):
        """In an order that scores which differ in the sixth digit do not change."""
        found = answer.raise_for_status().json()["detections"]
        return sorted(found, key=lambda row: (row["class"], row["level"], [round(side) for side in row["box"]]))

    with served(detector) as client, ThreadPoolExecutor(8) as threads:
        files = [encoded(picture(30 + 5 * (n % 4), 40, seed=n)) for n in range(4)]
        alone = [rows(client.post("/detect?threshold=0.2", content=file)) for file in files]
        together = list(threads.map(lambda n: client.post("/detect?threshold=0.2", content=files[n % 4]), range(24)))
        sizes = client.get("/metrics").text
    assert all(alone) and 'fpn_batch_images_bucket{le="1.0"} 28.0' not in sizes  # some were looked at together
    for n, answer in enumerate(together):
        for row, expected in zip(rows(answer), alone[n % 4], strict=True):
            assert row["class"] == expected["class"] and row["score"] == pytest.approx(expected["score"], abs=1e-3)
            assert row["box"] == pytest.approx(expected["box"], abs=0.1)


def test_images_share_a_batch_where_they_would_be_padded_alike_alone(detector):
    shape = shape_of(detector)
    assert shape((64, 96)) == (64, 96) == shape((65, 90)) and shape((90, 65)) == (96, 64)
    assert shape((1, 1000)) == (32, 96)


# --- who may ask


def test_token(detector):
    with served(detector, find=Slow(), token="0123456789abcdef") as client:
        file = encoded(picture())
        for headers in ({}, {"authorization": "Bearer 0123456789abcdeg"}, {"authorization": "0123456789abcdef"}):
            answer = client.post("/detect", content=file, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        for path in ("/model", "/metrics", "/openapi.json", "/nothing"):
            assert client.get(path).status_code == 401
        assert client.get("/").status_code == client.get("/health").status_code == 200
        right = {"authorization": "bearer 0123456789abcdef"}
        assert client.post("/detect", content=file, headers=right).status_code == 200
        odd = b"GET /model HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: Bearer \xff\xfe\r\n\r\n"
        assert b" 401 " in raw(client, odd).splitlines()[0]


def test_without_token_only_by_names_of_this_machine(detector):
    with served(detector, find=Slow(), hosts={"localhost", "127.0.0.1"}) as client:
        assert client.get("/model").status_code == 200
        assert client.get("/model", headers={"host": "LOCALHOST:8000"}).status_code == 200
        for name in ("evil.example", "localhost.evil.example", "", "[::1"):
            answer = client.get("/model", headers={"host": name})
            assert answer.status_code == 421, name


# --- parts


def test_limits_must_make_sense():
    for wrong in ({"megabytes": 0}, {"queue": -1}, {"seconds": float("nan")}, {"megapixels": 90}, {"memory": 10}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Limits(**wrong)


def test_room_is_given_back():
    room = Room(100)
    with room.share() as first, room.share() as second:
        first.hold(60)
        second.hold(40)
        with pytest.raises(Refused) as full:
            second.hold(41)
        assert full.value.status == 503 and full.value.retry == 1
        first.hold(10)
        second.hold(90)
        assert room.taken == 100
        with pytest.raises(Refused) as never:
            first.hold(101)
        assert never.value.status == 413
    assert room.taken == 0


def test_address():
    listening, local = server.bound("127.0.0.1", 0)
    with listening:
        assert local
        listening.listen()
        with pytest.raises(OptionError, match="another port"):
            server.bound("127.0.0.1", listening.getsockname()[1])
    everywhere, local = server.bound("0.0.0.0", 0)
    everywhere.close()
    assert not local
    with pytest.raises(OptionError, match="no such address"):
        server.bound("no.such.host.invalid", 80)


# --- the command, in a process of its own

SERVE = """
    import os, sys
    written = []
    modes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    # Every file that is opened for writing, by whatever part of Python.
    sys.addaudithook(lambda event, told: event == "open" and told[2] & modes and written.append(told[0]))
    import fpn.inference.finder as finder, time
    usual = finder.finder
    def slow(detector, device, **more):
        find = usual(detector, device, **more)
        def wait_and_find(images):
            while images[0].shape[1] == 1000 and not go.exists():  # the first image of all is the server's own
                time.sleep(0.02)
            return find(images)
        return wait_and_find
    finder.finder = slow
    from pathlib import Path
    go = Path(sys.argv[2])
    from fpn.cli import as_command
    from fpn.serve.command import serve
    with as_command():
        serve(Path(sys.argv[1]), port=0)
    print("written:", [name for name in written if name != os.devnull])
"""


@pytest.mark.slow
def test_the_command_answers_what_has_begun_when_it_is_stopped(detector, tmp_path):
    checkpoint, log = fpn.weights.save(detector, tmp_path / "cats.safetensors"), tmp_path / "log.txt"
    go = tmp_path / "go"
    process = fresh.start(textwrap.dedent(SERVE), checkpoint, go, log=log)
    try:
        until(lambda: process.exitcode is not None or (log.exists() and "Ctrl-C" in log.read_text()), 60)
        address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert address and process.pid, log.read_text()
        file = encoded(picture(1500, 1000))  # 4.5 MB: as a form, more than is usually kept in memory
        with httpx.Client(base_url=address[0], trust_env=False) as client, ThreadPoolExecutor(3) as threads:
            jobs = [threads.submit(client.post, "/detect", files={"image": ("a.png", file)}) for _ in range(3)]
            until(lambda: client.get("/health").json()["waiting"] == 3)
            os.kill(process.pid, signal.SIGTERM)
            go.touch()
            assert [job.result().status_code for job in jobs] == [200] * 3
        process.join(20)
    finally:
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0, log.read_text()
    assert "stopped" in log.read_text() and "written: []" in log.read_text()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["cats.safetensors", "go", "log.txt"]


def test_what_the_command_refuses(detector, tmp_path):
    for keywords, words in (
        ({"host": "0.0.0.0"}, "needs --token"),
        ({"token": "short"}, "16 or more"),
        ({"token": "0123456789 abcdef"}, "without spaces"),
        ({"port": 70000}, "port is 70000"),
        ({"batch": 0}, "batch is 0"),
        ({"wait": -1}, "wait is -1"),
        ({"host": "no.such.host.invalid"}, "no such address"),
        ({}, "no such checkpoint"),
    ):
        with pytest.raises(FpnError, match=words):
            serve(tmp_path / "none.safetensors", **{"port": 0, **keywords})
