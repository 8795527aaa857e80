"""The page of `fpn serve`, in a headless Chromium: against a server of this file, and against the true one."""

from __future__ import annotations

import importlib.resources
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import browser
import numpy as np
import pytest
import torch
from browser import Browser
from PIL import Image

import fpn
from fpn import rle
from fpn.drawing import PALETTE
from fpn.evaluation.page import LEVEL_COLOURS
from fpn.serve import guard

PAGE = importlib.resources.files("fpn.serve") / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MODEL = {
    "model": "faster_rcnn", "backbone": "tiny", "classes": ["ball", "ring", "leaf"], "levels": [2, 3, 4, 5],
    "score": 0.05, "short": 100, "long": 200, "file": "toys.safetensors", "kind": "safetensors", "version": "1",
    "limits": {"bytes": 5000, "pixels": 10**6},
}  # fmt: skip
ROWS = [
    {"class": "ball", "score": 0.9, "box": [20.0, 20.0, 60.0, 60.0], "level": 3},
    {"class": "ring", "score": 0.8, "box": [120.0, 10.0, 180.0, 90.0], "level": 4},
    {"class": "ball", "score": 0.6, "box": [130.0, 30.0, 150.0, 50.0], "level": 2},
    {"class": "leaf", "score": 0.3, "box": [70.0, 70.0, 90.0, 90.0], "level": 2},
]
ANSWER = {"height": 100, "width": 200, "threshold": 0.05, "seconds": 0.012, "detections": ROWS}

needs_chromium = pytest.mark.skipif(browser.PROGRAM is None, reason="needs chromium")


class Server(ThreadingHTTPServer):
    """A server whose answers to POST /detect the test gives: (status, JSON) from the request's handler."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.asked: list[Handler] = []
        self.model: dict[str, Any] = MODEL
        self.token: str | None = None
        self.reply: Callable[[Handler], tuple[int, Any]] = lambda request: (200, ANSWER)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server
    body = b""
    more: dict[str, str] = {}

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        file = PAGE / (path[1:] or "index.html")
        if path == "/model":
            self.send(*(self.refused() or (200, self.server.model)))
        elif file.is_file():
            self.send(200, file.read_bytes(), TYPES[Path(file.name).suffix])
        else:
            self.send(404, {"detail": "not found"})

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self)
        self.send(*(self.refused() or self.server.reply(self)))

    def refused(self) -> tuple[int, Any] | None:
        token = self.server.token
        wrong = token is not None and self.headers["Authorization"] != f"Bearer {token}"
        return (401, {"detail": "a token is wanted"}) if wrong else None

    def send(self, status: int, content: Any, kind: str = "application/json") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": guard.POLICY,
            **self.more,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            pass  # the page has turned to another image

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.end()


@pytest.fixture
def page(tab: Browser, server: Server) -> Iterator[Browser]:
    """The page of the server, which knows the model; at the end there must be no error but those that were answered."""
    tab.size(1000, 700)
    visit(tab, server.address)
    yield tab
    assert [problem for problem in tab.problems if "Failed to load resource" not in problem] == []


def visit(tab: Browser, address: str) -> None:
    tab.open("about:blank")
    tab.problems.clear()
    tab.open(address)
    tab.wait("document.querySelector('#finds li')")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return image_file(tmp_path / "toys.png")


def image_file(path: Path, size: tuple[int, int] = (200, 100), colour: str = "#808080", **options: Any) -> Path:
    Image.new("RGB", size, colour).save(path, **options)
    return path


def look(page: Browser, image: Path) -> None:
    """Give an image to the page, and wait for what was found in it."""
    page.choose("#file", image)
    page.wait("!document.querySelector('#panel').hidden")


def text(page: Browser, selector: str) -> str:
    return page.js(f"document.querySelector({selector!r}).innerText")


def listed(page: Browser) -> list[str]:
    """The rows of the list that are seen."""
    rows = "[...document.querySelectorAll('#list li')].filter(row => !row.hidden)"
    return page.js(f"{rows}.map(row => [...row.firstChild.children].map(part => part.textContent).join(' ').trim())")


def click(page: Browser, selector: str) -> None:
    page.js(f"document.querySelector({selector!r}).click()")
    page.js("new Promise(requestAnimationFrame)")


def press(page: Browser, *keys: str) -> None:
    for key in keys:
        page.press(key)
    page.js("new Promise(requestAnimationFrame)")


def spot(page: Browser, x: float, y: float) -> tuple[float, float]:
    """Where a place of the 200 x 100 image is on the screen: the image fills the width but for a border of 22."""
    left, top, width, height = page.js("(r => [r.left, r.top, r.width, r.height])(boxes.getBoundingClientRect())")
    scale = (width - 44) / 200
    return left + width / 2 + (x - 100) * scale, top + height / 2 + (y - 50) * scale


def pixel(page: Browser, canvas: str, x: float, y: float) -> list[int]:
    """Red, green, blue and alpha that a canvas has at a place of the image."""
    across, down = spot(page, x, y)
    place = f"{across} - c.getBoundingClientRect().left, {down} - c.getBoundingClientRect().top"
    return page.js(
        f"(c => [...c.getContext('2d').getImageData({place}, 1, 1).data])(document.querySelector('{canvas}'))"
    )


def click_at(page: Browser, x: float, y: float) -> None:
    across, down = spot(page, x, y)
    page.mouse("mouseMoved", across, down)
    page.mouse("mousePressed", across, down, button="left", clickCount=1)
    page.mouse("mouseReleased", across, down, button="left", clickCount=1)
    page.mouse("mouseMoved", 5, 5)
    page.js("new Promise(requestAnimationFrame)")


# What needs no browser.


def test_page_names_no_other_host_and_nothing_inline() -> None:
    for file in PAGE.iterdir():
        content = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", content), file.name
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script>|javascript:|innerHTML|eval\(", content), file.name


def test_colours_are_those_of_pictures_and_reports() -> None:
    content = (PAGE / "colours.js").read_text()
    classes, levels = content.split("const LEVELS")
    numbers = [tuple(map(int, found)) for found in re.findall(r"\[(\d+), (\d+), (\d+)\]", classes)]
    assert tuple(numbers) == PALETTE
    rows = re.findall(r"(\d): \[(\d+), (\d+), (\d+)\]", levels)
    assert {int(level): tuple(map(int, colour)) for level, *colour in rows} == LEVEL_COLOURS


# With the server of this file.


@needs_chromium
class TestPage:
    def test_first_view_tells_what_is_found(self, page: Browser) -> None:
        assert text(page, "#about") == "fpn Faster R-CNN · tiny · 3 classes"
        assert text(page, "#finds ul").split() == ["ball", "ring", "leaf"]
        assert page.js("panel.hidden")

    def test_boxes_lie_where_the_server_says(self, page: Browser, image: Path) -> None:
        look(page, image)
        assert pixel(page, "#picture", 100, 50) == [128, 128, 128, 255]
        for x, y in ((20, 40), (60, 40), (40, 60)):  # of the first ball: left, right, bottom
            assert pixel(page, "#boxes", x, y) == [*PALETTE[0], 255]
        for x, y in ((180, 70), (150, 90)):
            assert pixel(page, "#boxes", x, y) == [*PALETTE[1], 255]
        for x, y in ((40, 40), (100, 50), (80, 90)):  # within, without, and the leaf's, which scores too low
            assert pixel(page, "#boxes", x, y)[3] == 0

    def test_threshold_acts_at_once_and_asks_nobody(self, page: Browser, server: Server, image: Path) -> None:
        look(page, image)
        assert text(page, "#count") == "3"
        page.js("document.querySelector('input[type=range]').focus()")
        press(page, *["ArrowRight"] * 11)
        assert (text(page, "#chosen"), text(page, "#count")) == ("0.61", "2")
        press(page, "[", "[", "[", "[", "[", "[", "[")  # the slider does not keep them for itself
        assert (text(page, "#chosen"), text(page, "#count")) == ("0.26", "4")
        assert listed(page)[-1] == "leaf P2 0.30"
        press(page, *["["] * 9)
        assert text(page, "#chosen") == "0.05"  # the model's own, below which nothing was asked for
        assert [parse_qs(urlsplit(asked.path).query) for asked in server.asked] == [{"threshold": ["0.05"]}]
        assert server.asked[0].body == image.read_bytes()

    def test_classes_are_switches(self, page: Browser, image: Path) -> None:
        look(page, image)
        assert text(page, "#classes").split() == ["ball", "2", "only", "ring", "1", "only", "leaf", "0", "only"]
        click(page, "#classes li:nth-child(1) .switch")
        assert listed(page) == ["ring P4 0.80"]
        assert pixel(page, "#boxes", 20, 40)[3] == 0
        assert text(page, "#filtered") == "1 class hidden. Show all"
        click(page, "#classes li:nth-child(1) .only")
        assert listed(page) == ["ball P3 0.90", "ball P2 0.60"]
        click(page, "#filtered button")
        assert len(listed(page)) == 3 and page.js("filtered.hidden")

    def test_levels_tell_who_found_what(self, page: Browser, image: Path) -> None:
        look(page, image)
        press(page, "l")
        rows = page.js("[...document.querySelectorAll('#levels .switch')].map(row => row.innerText.split('\\n'))")
        # Cells: 2 ** level pixels of the resized image, which is as large as this one.
        assert rows == [
            ["P5", "cells 32 px", "0"],
            ["P4", "objects ~69 px, cells 16 px", "1"],
            ["P3", "objects ~40 px, cells 8 px", "1"],
            ["P2", "objects ~20 px, cells 4 px", "1"],
        ]
        assert pixel(page, "#boxes", 20, 40) == [*LEVEL_COLOURS[3], 255]
        assert pixel(page, "#boxes", 180, 70) == [*LEVEL_COLOURS[4], 255]
        click(page, "#levels li:nth-child(2) .switch")
        assert listed(page) == ["ball P3 0.90", "ball P2 0.60"]
        page.js("document.querySelector('#levels li:nth-child(4) .switch').focus()")
        page.js("new Promise(requestAnimationFrame)")
        assert pixel(page, "#boxes", 4, 98)[3] > 0  # its cells
        assert pixel(page, "#boxes", 20, 41)[3] < 255  # the box of another level is pale

    def test_a_box_is_picked_in_the_image_also_when_zoomed(self, page: Browser, image: Path) -> None:
        picked = "document.querySelector('#list [aria-current=true] .number')?.textContent"
        look(page, image)
        click_at(page, 140, 40)  # the ball within the ring
        assert page.js(picked) == "0.60"
        click_at(page, 170, 70)
        assert page.js(picked) == "0.80"
        page.mouse("mouseWheel", *spot(page, 140, 40), deltaX=0, deltaY=-600)
        page.wait("zoom.hidden === false")
        page.js("new Promise(requestAnimationFrame)")
        assert pixel(page, "#boxes", 180, 70) != [*PALETTE[1], 255]
        click_at(page, 140, 40)  # around which it was zoomed
        assert page.js(picked) == "0.60"
        press(page, "0", "Escape")
        assert page.js(picked) is None
        assert pixel(page, "#boxes", 180, 70) == [*PALETTE[1], 255]

    def test_arrow_keys_go_from_one_to_the_next(self, page: Browser, image: Path) -> None:
        picked = "document.querySelector('#list [aria-current=true] .number')?.textContent"
        look(page, image)
        seen = []
        for _ in range(4):
            press(page, "ArrowDown")
            seen.append(page.js(picked))
        assert seen == ["0.90", "0.80", "0.60", "0.90"]
        press(page, "ArrowUp")
        assert page.js(picked) == "0.60"

    def test_json_holds_what_is_shown(self, page: Browser, image: Path, tmp_path: Path) -> None:
        look(page, image)
        click(page, "#classes li:nth-child(2) .switch")
        shown = {"file": "toys.png", "height": 100, "width": 200, "threshold": 0.5, "detections": [ROWS[0], ROWS[2]]}
        page.js("navigator.clipboard.writeText = async text => { window.copied = text }")
        click(page, "#copy")
        assert json.loads(page.js("copied")) == shown
        page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        click(page, "#download")
        click(page, "#save")
        end = time.monotonic() + 10
        files = [tmp_path / "toys.json", tmp_path / "toys-detections.png"]
        while not all(file.exists() and file.stat().st_size for file in files) and time.monotonic() < end:
            time.sleep(0.02)
        assert json.loads(files[0].read_text()) == shown
        with Image.open(files[1]) as picture:
            assert picture.size == (200, 100)
            assert picture.convert("RGB").getpixel((20, 40)) == PALETTE[0]
            assert picture.convert("RGB").getpixel((100, 50)) == (128, 128, 128)

    def test_nothing_found(self, page: Browser, server: Server, image: Path) -> None:
        server.reply = lambda request: (200, {**ANSWER, "detections": []})
        look(page, image)
        assert text(page, "#none") == "Nothing found: no detection scores 0.05 or more."
        assert text(page, "#count") == "0"
        server.reply = lambda request: (200, {**ANSWER, "detections": ROWS[3:]})
        look(page, image)
        page.wait("none.innerText.startsWith('No score reaches 0.50; the highest is 0.30.')")
        click(page, "#none button")
        assert listed(page) == ["leaf P2 0.30"]

    def test_names_are_never_markup(self, page: Browser, server: Server, image: Path) -> None:
        name = "<img src=x onerror=alert(1)>"
        server.reply = lambda request: (200, {**ANSWER, "detections": [{**ROWS[0], "class": name}]})
        look(page, image)
        assert listed(page) == [f"{name} P3 0.90"]
        assert page.js("document.querySelectorAll('main img').length") == 0

    @pytest.mark.parametrize(
        ("status", "answer", "words"),
        [
            (415, {"detail": "not an image"}, "Not an image."),
            (422, {"detail": [{"msg": "too dark"}, {"msg": "too small"}]}, "Too dark; too small."),
            (500, b"<html>", "The server answered with an error (500)."),
            (200, b"<html>", "The server answered with an error (200)."),
            (413, {}, "The image is too large for this server."),
        ],
    )
    def test_refusals_are_told(
        self, page: Browser, server: Server, image: Path, status: int, answer: Any, words: str
    ) -> None:
        server.reply = lambda request: (status, answer)
        page.choose("#file", image)
        page.wait("document.querySelector('#note.bad')")
        assert text(page, "#note p") == words
        again = page.js("!document.querySelector('#note button').hidden")
        assert again == (status not in (413, 415, 422))  # these would be answered the same
        server.reply = lambda request: (200, ANSWER)
        look(page, image)
        assert page.js("note.hidden")

    def test_large_and_empty_files_are_not_sent(self, page: Browser, server: Server, tmp_path: Path) -> None:
        for content, words in ((b"x" * 5001, "5 kB; the server takes up to 5 kB"), (b"", "empty")):
            (tmp_path / "file.png").write_bytes(content)
            page.choose("#file", tmp_path / "file.png")
            page.wait(f"note.innerText.includes({words!r})")
        assert server.asked == []

    def test_a_refused_file_ends_the_wait_for_the_one_before(
        self, page: Browser, server: Server, image: Path, tmp_path: Path
    ) -> None:
        slow = threading.Event()
        server.reply = lambda request: (slow.wait(10) and 200, ANSWER)
        page.choose("#file", image)
        page.wait("!progress.hidden")
        (tmp_path / "file.png").write_bytes(b"")
        page.choose("#file", tmp_path / "file.png")
        page.wait("note.innerText.includes('empty')")
        slow.set()
        time.sleep(0.1)
        assert page.js("progress.hidden && panel.hidden && note.innerText.includes('empty')")

    def test_a_busy_server_is_asked_again(self, page: Browser, server: Server, image: Path) -> None:
        def reply(request: Handler) -> tuple[int, Any]:
            request.more = {"Retry-After": "0"}
            return (503, {"detail": "full"}) if len(server.asked) < 3 else (200, ANSWER)

        server.reply = reply
        look(page, image)
        assert len(server.asked) == 3

    def test_a_server_that_has_gone(self, page: Browser, server: Server, image: Path) -> None:
        port = server.server_address[1]
        server.end()
        page.choose("#file", image)
        page.wait("document.querySelector('#note.bad')")
        assert text(page, "#note p") == "The server does not answer. Is fpn serve still running?"
        back = Server(port)
        try:
            click(page, "#note button")
            page.wait("!document.querySelector('#panel').hidden")
        finally:
            back.end()

    def test_token(self, tab: Browser, server: Server, image: Path) -> None:
        server.token = "open sesame"
        tab.open(server.address)
        for given in ("wrong", "open sesame"):
            tab.wait("token.open")
            assert tab.js("finds.hidden")
            tab.js(f"secret.value = {given!r}")
            tab.js("document.querySelector('#token form').requestSubmit()")
        tab.wait("!finds.hidden")
        assert tab.js("document.querySelector('#token-title').textContent") == "That is not this server's token"
        look(tab, image)
        assert server.asked[-1].headers["Authorization"] == "Bearer open sesame"
        tab.js("sessionStorage.clear()")
        visit(tab, server.address + "#token=open%20sesame")
        assert tab.js("location.href") == server.address
        server.token = "another"  # as after a restart, while the page is open
        tab.choose("#file", image)
        tab.wait("token.open")
        click(tab, "#later")
        tab.wait("document.querySelector('#note').textContent.includes('asks for a token')")
        tab.js("sessionStorage.clear()")

    def test_the_latest_image_wins(self, page: Browser, server: Server, image: Path, tmp_path: Path) -> None:
        slow = threading.Event()

        def reply(request: Handler) -> tuple[int, Any]:
            if request.body != image.read_bytes():
                return 200, {**ANSWER, "detections": ROWS[:1]}
            slow.wait(10)
            return 200, ANSWER

        server.reply = reply
        page.choose("#file", image)
        page.wait("!progress.hidden")
        look(page, image_file(tmp_path / "other.png", colour="red"))
        slow.set()
        time.sleep(0.2)
        assert listed(page) == ["ball P3 0.90"]
        assert page.js("document.title") == "other.png – fpn"

    def test_dropped_and_pasted_images(self, page: Browser, server: Server, image: Path) -> None:
        numbers = list(image.read_bytes())
        page.js(
            f"bag = new DataTransfer(); bag.items.add(new File([new Uint8Array({numbers})], 'dropped.png', "
            "{type: 'image/png'})); dispatchEvent(new DragEvent('dragenter', {dataTransfer: bag}))"
        )
        assert not page.js("drop.hidden")
        page.js("dispatchEvent(new DragEvent('drop', {dataTransfer: bag, cancelable: true}))")
        page.wait("!panel.hidden && document.title === 'dropped.png – fpn'")
        assert page.js("drop.hidden")
        page.js("dispatchEvent(new ClipboardEvent('paste', {clipboardData: bag}))")
        end = time.monotonic() + 10
        while len(server.asked) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert [asked.body for asked in server.asked] == [image.read_bytes()] * 2
        page.js("dispatchEvent(new ClipboardEvent('paste', {clipboardData: new DataTransfer()}))")
        assert text(page, "#note p") == "The clipboard holds no image."

    def test_an_image_that_only_the_server_can_read(self, page: Browser, server: Server, tmp_path: Path) -> None:
        image_file(tmp_path / "image.tiff", (20, 10))
        look(page, tmp_path / "image.tiff")
        page.wait("note.innerText.includes('cannot show')")
        assert len(listed(page)) == 3
        assert pixel(page, "#boxes", 20, 40) == [*PALETTE[0], 255]

    def test_masks_are_drawn_as_they_are_encoded(self, page: Browser, server: Server, image: Path) -> None:
        masks = torch.from_numpy(np.random.default_rng(0).random((6, 37, 53)) < 0.5)
        masks[4], masks[5] = True, False
        for mask, counts in zip(masks, rle.encode(masks), strict=True):
            js = f"import('/masks.js').then(m => m.runs({json.dumps(counts)}))"
            assert page.js(js) == rle.runs_of(counts).tolist()
            part = f"{{size: [37, 53], counts: {json.dumps(counts)}}}, [10.2, 3.7, 44.5, 30.1], [9, 8, 7]"
            drawn = page.js(
                f"import('/masks.js').then(m => m.tinted({part})).then(t => [t.x, t.y, t.width, t.height, "
                "...t.canvas.getContext('2d').getImageData(0, 0, t.width, t.height).data.filter((_, i) => i % 4 == 3)])"
            )
            x, y, width, height = drawn[:4]
            assert (x, y, width, height) == (10, 3, 35, 28)
            assert (np.reshape(drawn[4:], (height, width)) == 255 * mask[y : y + height, x : x + width].numpy()).all()

        whole = torch.zeros(1, 100, 200, dtype=torch.bool)
        whole[:, 30:50, 30:50] = True
        row = {**ROWS[0], "segmentation": {"size": [100, 200], "counts": rle.encode(whole)[0]}}
        server.reply = lambda request: (200, {**ANSWER, "detections": [row]})
        look(page, image)
        assert pixel(page, "#boxes", 40, 40)[:3] == pytest.approx(PALETTE[0], abs=3)
        assert pixel(page, "#boxes", 40, 40)[3] == pytest.approx(0.45 * 255, abs=2)
        assert pixel(page, "#boxes", 25, 40)[3] == 0

    def test_camera(self, page: Browser, server: Server) -> None:
        press(page, "c")
        page.wait("!panel.hidden && measures.innerText.includes('frames a second')")
        assert page.js("camera.getAttribute('aria-pressed')") == "true"
        frame = Image.open(io.BytesIO(server.asked[-1].body))
        assert frame.format == "JPEG" and min(frame.size) > 100
        press(page, "c")
        page.wait("camera.getAttribute('aria-pressed') === 'false'")
        time.sleep(0.1)
        count = len(server.asked)
        time.sleep(0.3)
        assert len(server.asked) == count
        assert len(listed(page)) == 3  # the last frame stays, with what was found

    @pytest.mark.parametrize(("width", "phone"), [(320, True), (390, True), (800, False)])
    def test_small_screens(self, page: Browser, image: Path, width: int, phone: bool) -> None:
        page.size(width, 700, phone=phone)
        assert page.js("document.documentElement.scrollWidth") <= width
        look(page, image)
        press(page, "l")
        assert page.js("document.documentElement.scrollWidth") <= width
        hidden = page.js(
            "[...document.querySelectorAll('button')].filter(b => b.getBoundingClientRect().right > innerWidth)"
        )
        assert hidden == []

    def test_controls_have_names_and_text_has_contrast(self, page: Browser, image: Path) -> None:
        look(page, image)
        for dark in (False, True):
            page.size(1000, 700, dark=dark)
            colours = page.js(
                "['#page', '#card', '#ink', '#soft', '#accent', '#on-accent', '#alarm'].map(name => getComputedStyle("
                "document.documentElement).getPropertyValue(name.replace('#', '--')).trim())"
            )
            paper, card, ink, soft, accent, on_accent, alarm = map(luminance, colours)
            for back in (paper, card):
                assert min(contrast(front, back) for front in (ink, soft, accent, alarm)) > 4.5
            assert contrast(accent, on_accent) > 4.5
        nodes = page.send("Accessibility.getFullAXTree")["nodes"]
        controls = [node for node in nodes if node.get("role", {}).get("value") in ("button", "slider", "tab", "image")]
        assert len(controls) > 10
        assert [node for node in controls if not node.get("name", {}).get("value")] == []


# With the true server.


@needs_chromium
def test_true_server(tab: Browser, tmp_path: Path) -> None:
    """Its policy, token, answers and refusals are what the page expects; a turned photograph lies under its boxes."""
    for package in ("fastapi", "httpx", "prometheus_client", "uvicorn"):
        pytest.importorskip(package)
    from serving import Slow, served

    from fpn.serve.limits import Limits

    detector = fpn.build(
        backbone="tiny", classes=("cat", "dog"), weights="none", width=32, hidden=64, short=64, long=96
    )
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: 20 wide and 40 tall, red at the top
    picture.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    (tmp_path / "bad.jpg").write_bytes(b"no image at all")
    tab.size(1000, 700)
    with served(detector, Limits(megabytes=1, megapixels=1), find=Slow(), token="key", name="a.safetensors") as client:
        visit(tab, f"{client.base_url}/#token=key")
        assert tab.js("facts.title") == "a.safetensors"
        look(tab, tmp_path / "photo.jpg")
        assert text(tab, "#measures").startswith("20 × 40 px")
        assert listed(tab) == ["cat P3 0.90"]
        data = "c.getContext('2d').getImageData(c.width / 2, c.height * {}, 1, 1).data"
        red, _, blue, _ = tab.js(f"(c => [...{data.format(0.25)}])(picture)")
        assert red > 200 and blue < 60
        red, _, blue, _ = tab.js(f"(c => [...{data.format(0.75)}])(picture)")
        assert red < 60 and blue > 200
        press(tab, "c")
        tab.wait("measures.innerText.includes('frames a second')")
        press(tab, "c")
        assert tab.problems == []
        tab.choose("#file", tmp_path / "bad.jpg")
        tab.wait("document.querySelector('#note.bad')")
        assert "none of JPEG, PNG" in text(tab, "#note p")
    tab.js("sessionStorage.clear()")


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    """As WCAG has it; 4.5 is asked for of text."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
