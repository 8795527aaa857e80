"""Whatever stands in annotation files, what comes out is clean data or an error of fpn, in bounded time and memory."""

from __future__ import annotations

import copy
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
from data_folders import PICTURES, coco_content, save_json, write_coco, write_image, write_voc, write_yolo, xml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

import fpn.data
from fpn.data.dataset import KINDS, Data, Split
from fpn.errors import FpnError
from fpn.words import printable

set_hypothesis_home_dir(
    Path(tempfile.gettempdir()) / "fpn-hypothesis"
)  # it would write into the folder that pytest runs in
fuzz = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)

NUMBERS = [0, 1, 2, 3, -1, 0.5, 1e-320, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -1e308, 1e999, -1e999, float("nan")]
TEXTS = ["", " ", "1", "nan", "1e999", "cat", "a\0b", "\ud800", "\udcff", "\x1b[31m", "a\nb", "x" * 5000, "café", "😀"]
PATHS = [
    "../secret/s.png",
    "images/../../secret/s.png",
    "..\\secret\\s.png",
    "..",
    ".",
    "/",
    "//",
    "/etc/passwd",
    "C:\\x.png",
]
values = st.recursive(
    st.none() | st.booleans() | st.sampled_from([*NUMBERS, *TEXTS, *PATHS]) | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=8,
)


def load(folder: Path) -> Data | None:
    """The data set, checked all over, or None where there was an error, which has to be one that can be shown."""
    try:
        data = fpn.data.load(folder)
    except FpnError as error:
        assert len(str(error).encode()) < 10_000
        return None
    json.dumps(fpn.data.describe(data), allow_nan=False, ensure_ascii=False).encode()
    for problem in data.problems:
        assert problem.kind in KINDS and printable(problem.text) == problem.text
    assert data.classes and len(set(data.classes)) == len(data.classes)
    assert all(name.strip() and printable(name) == name for name in data.classes)
    for name, split in data.items():
        assert split.name == name and split.classes == data.classes and len(split) > 0
        check_arrays(split)
        for index in range(len(split)):
            file = split.path(index)
            assert os.path.normpath(file) == str(file) and file.is_relative_to(split.root) and file.is_file()
            assert split.root in (folder, folder.parent) and "secret" not in file.parts
    return data


def check_arrays(split: Split) -> None:
    images, boxes = len(split.files), len(split.boxes)
    assert split.sizes.shape == (images, 2) and split.image_ids.shape == (images,) and (split.sizes > 0).all()
    assert len(set(split.image_ids.tolist())) == images
    assert split.category_ids.shape == (len(split.classes),)
    assert split.offsets[0] == 0 and split.offsets[-1] == boxes and (np.diff(split.offsets) >= 0).all()
    assert split.boxes.shape == (boxes, 4) and np.isfinite(split.boxes).all()
    assert split.labels.shape == split.ignore.shape == split.areas.shape == (boxes,)
    assert ((split.labels >= 0) & (split.labels < len(split.classes))).all()
    assert np.isfinite(split.areas).all() and (split.areas >= 0).all()
    owner = np.repeat(np.arange(images), np.diff(split.offsets))
    x1, y1, x2, y2 = split.boxes.T
    height, width = split.sizes[owner].T
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= width) & (y1 >= 0) & (y1 < y2) & (y2 <= height)).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound data set in each format, and files outside of them that none may reach."""
    base = tmp_path_factory.mktemp("fuzz")
    writers = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}
    for outside in (base / "secret", base / "coco" / "secret", base / "voc" / "secret"):
        write_image(outside / "s.png", (8, 8))
        (outside / "s.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return {name: writer(base / name / "set") for name, writer in writers.items()}


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """The text cut off, or with pieces left out, doubled or replaced by other bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 40)))
        junk = st.binary(max_size=6) | st.sampled_from(
            [b"", b"[" * 3000, b"9" * 5000, b"NaN", b"\xff\xfe", b"<!DOCTYPE"]
        )
        text = text[:start] + draw(junk | st.just(text[start:stop] * 2)) + text[stop:]
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


def replace_somewhere(draw: st.DrawFn, content: Any) -> None:
    """Puts a hostile value into a random place of nested lists and dictionaries, or takes a place away."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and draw(st.integers(0, 9)):
            place = place[key]
            continue
        if draw(st.integers(0, 9)):
            place[key] = draw(values)
        else:
            del place[key]
        return


@st.composite
def hostile_coco(draw: st.DrawFn) -> dict[str, Any]:
    content = copy.deepcopy(coco_content(PICTURES["train"]))
    for _ in range(draw(st.integers(1, 4))):
        replace_somewhere(draw, content)
    return content


@fuzz
@given(content=hostile_coco())
def test_coco_with_hostile_values(folders: dict[str, Path], content: dict[str, Any]) -> None:
    save_json(folders["coco"] / "annotations" / "instances_train.json", content)
    load(folders["coco"])


@fuzz
@given(text=damaged(json.dumps(coco_content(PICTURES["train"]), indent=1).encode()))
def test_coco_with_damaged_json(folders: dict[str, Path], text: bytes) -> None:
    (folders["coco"] / "annotations" / "instances_train.json").write_bytes(text)
    load(folders["coco"])


words = st.sampled_from([*map(str, NUMBERS[:-2]), *TEXTS, *PATHS, "inf", "1_0", "٣"]) | st.text(max_size=8)


@st.composite
def hostile_xml(draw: st.DrawFn) -> bytes:
    text = xml(PICTURES["train"][0], "<object><name>dog</name></object>")
    for _ in range(draw(st.integers(1, 3))):
        tag = draw(
            st.sampled_from(["filename", "width", "height", "name", "difficult", "xmin", "ymax", "bndbox", "size"])
        )
        start = text.find(f"<{tag}>", draw(st.integers(0, len(text) // 2)))
        stop = text.find(f"</{tag}>", start)
        if 0 <= start < stop:
            text = text[: start + len(tag) + 2] + escape(draw(words)) + text[stop:]
    return text.encode("utf-8", "surrogatepass")


@fuzz
@given(text=hostile_xml() | damaged(xml(PICTURES["train"][0]).encode()))
def test_voc_with_hostile_xml(folders: dict[str, Path], text: bytes) -> None:
    (folders["voc"] / "Annotations" / "a.xml").write_bytes(text)
    load(folders["voc"])


@fuzz
@given(lines=st.lists(st.sampled_from(["a", "b", "c.png", "d  1"]) | words, max_size=5))
def test_voc_with_hostile_lists(folders: dict[str, Path], lines: list[str]) -> None:
    (folders["voc"] / "Annotations" / "a.xml").write_text(xml(PICTURES["train"][0]))
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    (folders["voc"] / "ImageSets" / "Main" / "train.txt").write_bytes(text)
    load(folders["voc"])


coordinates = st.sampled_from(
    ["0.5", "0.25", "0", "-0.5", "2", "nan", "inf", "1e308", "-1e308", "1e-320", "x", "1" * 400]
)
rows = st.lists(coordinates | words, min_size=3, max_size=9).map(lambda parts: " ".join(["0", *parts]))


@fuzz
@given(text=st.lists(rows | words, max_size=6).map("\n".join))
def test_yolo_with_hostile_labels(folders: dict[str, Path], text: str) -> None:
    (folders["yolo"] / "labels" / "train" / "a.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    load(folders["yolo"])


YAML = "path: .\nnames:\n  0: cat\n  1: dog\ntrain: images/train\nval: [images/val]\n"
snippets = [
    "&a [*a, *a]",
    "!!python/object/apply:os.system [ls]",
    "!!binary x",
    "{? [a] : b}",
    "[" * 3000,
    "<<: *a",
    "~",
]
snippets += [
    "../secret",
    "../../secret",
    "/etc",
    "../set/images/train",
    "..",
    "list.txt",
    "[.., images/train]",
    "- no\n- on",
]


@st.composite
def hostile_yaml(draw: st.DrawFn) -> bytes:
    text = YAML
    for old in draw(
        st.lists(st.sampled_from([".", "cat", "0", "images/train", "[images/val]", "names", "train"]), max_size=3)
    ):
        text = text.replace(old, draw(st.sampled_from(snippets) | words), 1)
    return text.encode("utf-8", "surrogatepass")


@fuzz
@given(text=hostile_yaml() | damaged(YAML.encode()), listed=st.lists(words | st.just("images/train/a.png"), max_size=4))
def test_yolo_with_hostile_yaml(folders: dict[str, Path], text: bytes, listed: list[str]) -> None:
    (folders["yolo"] / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (folders["yolo"] / "list.txt").write_bytes("\n".join(listed).encode("utf-8", "surrogatepass"))
    (folders["yolo"] / "data.yaml").write_bytes(text)
    load(folders["yolo"])


# Single attacks, each with the reason why it fails.


def within(seconds: float, megabytes: float, work: Callable[[], object]) -> None:
    start, before = time.process_time(), peak_memory()
    work()
    assert time.process_time() - start < seconds and peak_memory() - before < megabytes


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, '{"images": [' + "[" * 10**5, "9" * 10**5, "[1e999, " * 10**4]
)
def test_json_nested_deeply_or_with_long_numbers(text: str, tmp_path: Path) -> None:
    (write_coco(tmp_path) / "annotations" / "instances_train.json").write_text(text)
    within(5, 200, lambda: pytest.raises(FpnError, fpn.data.load, tmp_path))


@pytest.mark.parametrize("field", ["bbox", "image_id", "category_id", "segmentation", "iscrowd", "area", "id"])
def test_coco_value_nested_as_deep_as_the_parser_goes(field: str, tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    content["annotations"][0][field] = deep
    save_json(write_coco(tmp_path) / "annotations" / "instances_train.json", content)
    load(tmp_path)
    content["categories"].append(deep)
    save_json(tmp_path / "annotations" / "instances_train.json", content)
    with pytest.raises(FpnError, match="needs a whole number 'id'"):
        fpn.data.load(tmp_path)


def test_coco_with_many_categories_of_one_name_takes_linear_time(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["categories"] += [{"id": 10 + n, "name": f"c{n // 2}"} for n in range(20_000)]
    save_json(write_coco(tmp_path) / "annotations" / "instances_train.json", content)
    within(20, 300, lambda: load(tmp_path))


@pytest.mark.parametrize(
    "name", ["../secret/s.png", "{}/secret/s.png", "images/../../secret/s.png", "..\\secret\\s.png"]
)
def test_coco_file_names_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "secret" / "s.png", (40, 80))
    folder = write_coco(tmp_path / "set")
    content = coco_content(PICTURES["train"])
    content["images"][0]["file_name"] = name.format(tmp_path)
    save_json(folder / "annotations" / "instances_train.json", content)
    data = fpn.data.load(folder)
    assert [problem.kind for problem in data.problems] == ["missing-image"] and len(data["train"]) == 2
    write_image(folder / "images" / "s.png", (40, 80))  # what the last part of the name may stand for
    assert fpn.data.load(folder)["train"].files[0] == "images/s.png"


def test_coco_json_beside_its_images_folder(tmp_path: Path) -> None:
    for picture in PICTURES["train"]:
        write_image(tmp_path / "images" / picture.name, picture.size)
    file = save_json(tmp_path / "labels" / "all.json", coco_content(PICTURES["train"]))
    for path in (file, file.parent):
        split = fpn.data.load(path)["train"]
        assert split.root == tmp_path and split.files[0].startswith("images/")


def test_voc_file_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "secret" / "a.png", (40, 80))
    folder = write_voc(tmp_path / "set")
    (folder / "JPEGImages" / "a.png").unlink()
    text = xml(PICTURES["train"][0]).replace("a.png", "../../secret/a.png")
    (folder / "Annotations" / "a.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("../../secret/s\n../Annotations/a\nb\n/etc/passwd\n")
    data = load(folder)
    assert data is not None and data["train"].files.tolist() == ["JPEGImages/b.png"]


@pytest.mark.parametrize(
    "declaration",
    [
        '<!ENTITY x SYSTEM "file:///etc/passwd">',
        '<!ENTITY a "ha"><!ENTITY b "&a;&a;"><!ENTITY x "&b;&b;">',
        '<!ENTITY % p SYSTEM "http://127.0.0.1:9/x.dtd"> %p;',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "cp037", "utf-7"])
def test_xml_entities_are_not_expanded_in_any_encoding(declaration: str, encoding: str, tmp_path: Path) -> None:
    text = xml(PICTURES["train"][0]).replace("cat", "&x;")
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    content = (head + f"<!DOCTYPE annotation [{declaration}]>" + text).encode(encoding)
    folder = write_voc(tmp_path)
    for hidden in (content, head.encode() + content[len(head.encode(encoding)) :]):
        (folder / "Annotations" / "a.xml").write_bytes(hidden)
        data = load(folder)
        assert data is not None and data.problems[0].file == "Annotations/a.xml"
        assert data.problems[0].kind == "broken-annotation" and len(data["train"]) == 2


def test_xml_nested_deeply(tmp_path: Path) -> None:
    text = xml(PICTURES["train"][0], "<part>" * 10**5 + "</part>" * 10**5)
    (write_voc(tmp_path) / "Annotations" / "a.xml").write_text(text)
    within(5, 200, lambda: load(tmp_path))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "names: *a29\ntrain: images/train\nval: images/val\n",
        BOMB + "names: [cat, dog]\ntrain: *a29\nval: images/val\n",
        BOMB + "names: {0: *a29}\ntrain: images/train\n",
        "names: &a [*a]\ntrain: &b [*b]\n",
        "names: {? [1] : x}\ntrain: images/train\n",
        "a: " + "[" * 10**5,
        "names: [cat]\ntrain: images/train\n" + "#" * 10**6,
        "names: {-1: cat}\ntrain: images/train\n",
        f"names: {{{'9' * 5000}: cat}}\ntrain: images/train\n",
        "names: {0: cat, 00: dog}\ntrain: images/train\n",
        'names: ["a\\0b"]\ntrain: images/train\n',
    ],
)
def test_yaml_bombs_and_keys_that_are_no_numbers(text: str, tmp_path: Path) -> None:
    (write_yolo(tmp_path) / "data.yaml").write_text(text)
    within(5, 200, lambda: pytest.raises(FpnError, fpn.data.load, tmp_path))


def test_yaml_tags_run_nothing_and_words_stay_words(tmp_path: Path) -> None:
    made = tmp_path / "made"
    names = f"[no, 007, !!python/object/apply:os.mkdir [{made}]]"
    (write_yolo(tmp_path) / "data.yaml").write_text(f"names: {names}\ntrain: images/train\n")
    with pytest.raises(FpnError, match="name of class 2 must be text"):
        fpn.data.load(tmp_path)
    assert not made.exists()
    (tmp_path / "data.yaml").write_text("names: [no, 007]\ntrain: images/train\nval: images/val\ntest: null\n")
    assert fpn.data.load(tmp_path).classes == ("no", "007")


def test_yolo_paths(tmp_path: Path) -> None:
    folder = write_yolo(tmp_path / "sets" / "one")
    write_yolo(tmp_path / "outside")
    for train in ("../../outside/images/train", str(tmp_path / "outside/images/train"), "..", "/", "images/../../.."):
        (folder / "data.yaml").write_text(f"names: [cat, dog]\ntrain: {train}\nval: images/val\n")
        data = fpn.data.load(folder)
        assert list(data) == ["val"] and [problem.kind for problem in data.problems] == ["path-outside"]

    (folder / "list.txt").write_text(
        f"{tmp_path}/outside/images/train/a.png\n../../outside/images/train/b.png\n/\n..\n"
    )
    (folder / "data.yaml").write_text("names: [cat, dog]\ntrain: list.txt\nval: images/val\n")
    data = fpn.data.load(folder)
    assert list(data) == ["val"] and [problem.kind for problem in data.problems] == ["path-outside"] * 4

    # A folder beside that of the YAML file is the data set's; what the two have in common is then its root.
    beside = write_yolo(tmp_path / "sets" / "two")
    (folder / "data.yaml").write_text("names: [cat, dog]\npath: ../two\ntrain: images/train\nval: ../two/images/val\n")
    train = fpn.data.load(folder)["train"]
    assert train.root == tmp_path / "sets" and train.path(0) == beside / "images/train/a.png" and len(train.boxes) == 3

    # Where both ../images/val and images/val exist, as in an export unpacked beside another, the folder's own counts.
    write_image(tmp_path / "sets" / "images" / "val" / "other.png", (8, 8))
    (folder / "data.yaml").write_text("names: [cat, dog]\ntrain: ../images/train\nval: ../images/val\n")
    assert fpn.data.load(folder)["val"].files.tolist() == ["images/val/d.png"]


def test_links_in_a_circle_and_files_that_are_none(tmp_path: Path) -> None:
    for name, writer in (("yolo", write_yolo), ("coco", write_coco), ("voc", write_voc)):
        folder = writer(tmp_path / name)
        images = {"yolo": "images/train", "coco": "images", "voc": "JPEGImages"}[name]
        labels = {"yolo": "labels/train", "coco": "annotations", "voc": "Annotations"}[name]
        for place in (images, labels):
            (folder / place / "circle").symlink_to(folder / place)
            (folder / place / "nowhere.png").symlink_to(tmp_path / "nothing")
            for suffix in ("json", "xml", "txt", "png", "yaml"):
                os.mkfifo(folder / place / f"pipe.{suffix}")  # to open one would wait for ever
                (folder / place / f"folder.{suffix}").mkdir()
        os.mkfifo(folder / "a.yaml")
        (folder / "b.xml").mkdir()
        data = load(folder)
        assert data is not None and data.problems == [] and len(data["train"]) == 3


def test_long_names_and_lines(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["images"][0]["file_name"] = "x/" * 10**6 + "a.png"
    content["annotations"][0]["image_id"] = "y" * 10**6
    content["annotations"][1]["id"] = 10**4000
    save_json(write_coco(tmp_path / "coco") / "annotations" / "instances_train.json", content)
    (write_yolo(tmp_path / "yolo") / "labels/train/a.txt").write_text("0 " + "0.5 " * 10**6)
    within(10, 300, lambda: (load(tmp_path / "coco"), load(tmp_path / "yolo")))
