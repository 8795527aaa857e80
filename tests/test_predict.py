"""`fpn predict` on many pictures: batches, memory, stopping and going on, and the files that come of it."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from PIL import Image

import fpn
from fpn.cli import main
from fpn.data.generated import CLASSES, generate
from fpn.errors import DataError, FpnError, OptionError
from fpn.inference import stream
from fpn.inference.command import printable, video_names
from fpn.inference.rows import row_of
from fpn.inference.sources import check_apart, find_sources
from fpn.inference.stream import batches_of, predict_files
from fpn.structures import Detections


def spots(images):
    """A finder: a box at half the size of the image, its score and class by how bright the image is."""
    assert all(image.dtype == torch.uint8 for image in images)
    found = []
    for image in images:
        value, (height, width) = int(image.float().mean()), image.shape[1:]
        count = value % 3
        boxes = torch.tensor([[0, 0, width / 2, height / 2], [1, 1, width, height]])[:count]
        scores = torch.tensor([0.5 + value / 600, 0.5])[:count]
        found.append(Detections(boxes, scores, torch.tensor([value % 2, 1])[:count], torch.tensor([2, 3])[:count],
                                torch.tensor(count), ("cat", "dog")))  # fmt: skip
    return found


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """23 pictures of several sizes, some of one name in two folders, one that cannot be read."""
    chance = np.random.default_rng(0)
    files = []
    for number in range(23):
        folder = tmp_path / "in" / ("ab"[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{number // 2}.png")
        size = [(8, 12), (12, 8), (8, 30), (9, 9)][number % 4]
        Image.fromarray(chance.integers(0, 250, (*size, 1), np.uint8).repeat(3, 2)).save(files[-1])
    files[5].write_bytes(files[5].read_bytes()[:40])
    return files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A detector that has learnt nothing and finds much, as a checkpoint, and a folder of 25 generated pictures."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    detector = fpn.build(backbone="tiny", classes=CLASSES, weights="none", width=16, hidden=32, short=64, long=96)
    for layer in (detector.box_head.classes, detector.rpn.objectness, detector.rpn.offsets):
        torch.nn.init.normal_(layer.weight, std=0.2)
    data = generate(folder / "data", 20, (64, 96), seed=1)
    return fpn.weights.save(detector, folder / "eager.safetensors"), data / "images"


def predictions(out: Path) -> dict:
    return json.loads((out / "predictions.json").read_text())


def run(find, files, out, **options):
    return predict_files(find, files, out, **{"classes": ("cat", "dog"), "progress": False, "workers": 2, **options})


class Stops:
    """A finder that is interrupted in its n-th call, and knows how many images it was given."""

    def __init__(self, after: int, by: type[BaseException] = KeyboardInterrupt):
        self.after, self.by, self.calls, self.images = after, by, 0, 0

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.after:
            raise self.by
        self.images += len(images)
        return spots(images)


def test_rows_come_in_the_order_given_with_boxes_of_their_own_picture(pictures, tmp_path, capsys):
    done = run(spots, pictures, tmp_path / "out", about={"checkpoint": "x"}, threshold=0.4)
    assert done is not None and done.unreadable == (str(pictures[5]),) and str(pictures[5]) in capsys.readouterr().err
    written = predictions(tmp_path / "out")
    assert list(written) == ["checkpoint", "threshold", "images"] and written["threshold"] == 0.4
    readable = [file for file in pictures if file != pictures[5]]
    assert [row["file"] for row in written["images"]] == [str(file) for file in readable]
    for row, file in zip(written["images"], readable, strict=True):
        image = fpn.data.read_image(file)
        alone = row_of(spots([image])[0].above(0.4), (image.shape[1], image.shape[2]))
        assert {name: row[name] for name in alone} == alone
        assert list(row) == ["file", "picture", "height", "width", "detections"]
    assert done.images == 22 and done.objects == sum(len(row["detections"]) for row in written["images"]) > 5
    names = {row["picture"] for row in written["images"]}
    assert len(names) == 22 and {"0.jpg", "0-2.jpg"} <= names
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*names, "predictions.json"}


@pytest.mark.parametrize("after", [1, 2, 4, 6])
def test_a_run_that_was_stopped_goes_on_and_gives_the_same(pictures, tmp_path, after, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(spots, pictures, whole)
    first, second = Stops(after), Stops(100)
    with pytest.raises(KeyboardInterrupt):
        run(first, pictures, out)
    assert not (out / "predictions.json").exists()
    kept = [json.loads(line) for line in (out / "unfinished.jsonl").read_text().splitlines()[1:]] if after > 1 else []
    assert all((out / f"{row['name']}.jpg").is_file() for row in kept) and len(kept) == first.images
    capsys.readouterr()
    run(second, pictures, out)
    assert second.images == 22 - len(kept)
    assert ("going on" in capsys.readouterr().err) == bool(kept)
    assert predictions(out) == predictions(whole)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


def test_a_line_that_was_cut_off_is_done_again(pictures, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(spots, pictures, whole)
    with pytest.raises(KeyboardInterrupt):
        run(Stops(6), pictures, out)
    journal = out / "unfinished.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 5
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) + 3):
        for name in ("unfinished.jsonl", "unfinished-3.jsonl"):  # the latter of a process that is not there any more
            (out / name).write_bytes(b"".join(lines)[:-cut])
            again = Stops(100)
            run(again, pictures, out)
            assert again.images < 10 and predictions(out) == predictions(whole)
            assert not list(out.glob("unfinished*"))


def test_an_unfinished_run_of_another_kind_is_not_gone_on_with(pictures, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Stops(5), pictures, out, threshold=0.3, version=[1, 2])
    journal = out / "unfinished.jsonl"
    before = journal.read_bytes()
    with pytest.raises(OptionError, match="unfinished run with threshold 0.3 rather than 0.6"):
        run(spots, pictures, out, threshold=0.6, version=[1, 2])
    with pytest.raises(OptionError, match="version"):
        run(spots, pictures, out, threshold=0.3, version=[1, 3])
    assert journal.read_bytes() == before
    journal.write_bytes(before + b"[1, 2]\n")
    with pytest.raises(FpnError, match="unfinished.jsonl: damaged"):
        run(spots, pictures, out, threshold=0.3, version=[1, 2])
    journal.write_bytes(before.splitlines(keepends=True)[0])  # of a run that had done nothing
    assert run(spots, pictures, out, threshold=0.6) is not None


def test_a_run_that_fails_before_its_first_picture_leaves_nothing(pictures, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(Stops(1, ZeroDivisionError), pictures, tmp_path / "out")
    assert not list((tmp_path / "out").glob("unfinished*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FpnError, match="choose another folder with --out"):
        run(spots, pictures, tmp_path / "file" / "out")
    for wrong in ({"threshold": -1}, {"batch": 0}, {"formats": ["xml"]}, {"formats": []}):
        with pytest.raises(OptionError):
            run(spots, pictures, tmp_path / "out", **wrong)


def test_a_full_disk_stops_the_run_and_with_more_room_it_goes_on(pictures, tmp_path):
    fresh.run(
        """
        import json, resource, sys, torch
        from pathlib import Path
        from fpn.errors import FpnError
        from fpn.inference.stream import predict_files
        from fpn.structures import Detections

        calls = []
        def find(images):
            calls.append(len(images))
            return [Detections(torch.ones(9, 4), torch.ones(9), torch.zeros(9).long(), torch.zeros(9).long(),
                               torch.tensor(9), ("cat",))] * len(images)

        out, files = Path(sys.argv[1]), list(map(Path, sys.argv[2:]))
        again = lambda: predict_files(find, files, out, classes=["cat"], pictures=False, batch=1, progress=False)
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, usual[1]))
        try:
            again()
            raise SystemExit("there was room")
        except FpnError as error:
            said = str(error)
        assert "unfinished.jsonl: cannot be written" in said and "the same command goes on" in said, said
        lines = (out / "unfinished.jsonl").read_bytes().count(b"\\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert 3 < lines < 20, lines
        calls.clear()
        again()
        assert len(calls) == 22 - (lines - 1), (calls, lines)
        assert len(json.loads((out / "predictions.json").read_text())["images"]) == 22
        """,
        arguments=[tmp_path / "out", *pictures],
    )


def test_what_is_done_of_other_images_is_not_lost(pictures, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Stops(5), pictures, out)
    journal = (out / "unfinished.jsonl").read_bytes()
    for others in (pictures[-2:], pictures[1:]):
        with pytest.raises(OptionError, match="unfinished run of other images, such as .*unfinished.jsonl"):
            run(spots, others, out)
        assert (out / "unfinished.jsonl").read_bytes() == journal
    first = Path(json.loads(journal.splitlines()[1])["file"])
    first.unlink()
    done = run(spots, [file for file in pictures if file != first], out)
    assert done is not None and done.images == 21


def test_labels_of_the_data_set_are_not_written_over(pictures, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    with pytest.raises(OptionError, match="labels: is there already"):
        run(spots, pictures, tmp_path, formats=["json", "yolo"])
    assert (tmp_path / "labels" / "0.txt").read_text() == "1 0.5 0.5 0.2 0.2\n"
    for _ in range(2):
        run(spots, pictures[:3], tmp_path / "out", formats=["yolo"], pictures=False)
    run(spots, pictures[:3], tmp_path / "in", formats=["yolo"], pictures=False)
    assert len(list((tmp_path / "in" / "labels").iterdir())) == 3


def test_a_picture_too_long_for_jpeg_is_shown_smaller(tmp_path):
    Image.new("RGB", (66_000, 3), (61, 61, 61)).save(tmp_path / "long.png")
    run(spots, [tmp_path / "long.png"], tmp_path / "out")
    (row,) = predictions(tmp_path / "out")["images"]
    assert row["width"] == 66_000 and row["detections"][0]["box"][2] == 33_000
    assert fpn.data.image_size(tmp_path / "out" / "long.jpg") == (3, 65_500)


def test_too_little_memory_on_the_device_is_told_and_the_run_goes_on_with_smaller_batches(pictures, tmp_path):
    with pytest.raises(OptionError, match="smaller --batch"):
        run(Stops(5, torch.OutOfMemoryError), pictures, tmp_path / "out")
    assert (tmp_path / "out" / "unfinished.jsonl").exists()
    again = Stops(100)
    run(again, pictures, tmp_path / "out", batch=1)
    assert again.images < 22 and len(predictions(tmp_path / "out")["images"]) == 22


def test_batches_are_of_like_shape_and_bounded(pictures, tmp_path, monkeypatch):
    with stream.threads(2) as pool:
        batches = [files for files, _ in batches_of(pictures, (), 4, pool)]
        shapes = [{fpn.data.image_size(file) for file in files if file != pictures[5]} for files in batches]
        assert sum(map(len, batches)) == 23 and max(map(len, batches)) == 4
        assert sum(len(kinds) > 1 for kinds in shapes) <= 3  # of four kinds of shape, where one goes over into the next
        done = {str(file) for file in batches[2][:3]} | {str(file) for file in batches[4]}
        rest = [files for files, _ in batches_of(pictures, done, 4, pool)]
        assert rest == [batches[0], batches[1], batches[2][3:], batches[3], *batches[5:]]
        monkeypatch.setattr(stream, "PIXELS", 100)
        for files, pixels in batches_of(pictures, (), 4, pool):
            assert len(files) == 1 or pixels <= 100
        assert any(len(files) == 1 and pixels == 240 for files, pixels in batches_of(pictures, (), 4, pool))


def test_few_pictures_are_in_memory_at_a_time(tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.png" for number in range(60)]
    for file in files:
        Image.new("RGB", (20, 10), (60, 60, 60)).save(file)
    lock, alive, most = threading.RLock(), [0], [0]
    usual = stream.read_image

    def count(change):
        with lock:
            alive[0] += change
            most[0] = max(most[0], alive[0])

    def counting(file):
        image = usual(file)
        count(1)
        weakref.finalize(image, count, -1)
        return image

    monkeypatch.setattr(stream, "read_image", counting)
    run(spots, files, tmp_path / "out", batch=2)
    assert alive[0] <= 2 and 2 <= most[0] <= 2 * (2 * stream.AHEAD + 3), most
    assert len(predictions(tmp_path / "out")["images"]) == 60


def test_what_is_detected_is_what_fpn_predict_gives(trained, tmp_path):
    checkpoint, folder = trained
    main(["predict", str(checkpoint), str(folder), "--out", str(tmp_path), "--threshold", "0.24", "--batch", "1",
          "--device", "cpu", "--no-pictures"])  # fmt: skip
    rows, detector = predictions(tmp_path)["images"], fpn.load(checkpoint)
    rows.sort(key=lambda row: -len(row["detections"]))
    assert len(rows) > 20 and rows[4]["detections"]
    for row in rows[:5]:
        found = fpn.predict(detector, row["file"], 0.24, "cpu")
        assert row_of(found, (64, 96)) == {name: row[name] for name in ("height", "width", "detections")}


def command(trained, out: Path) -> list[str]:
    return ["predict", *map(str, trained), "--out", str(out), "--threshold", "0.24", "--device", "cpu"]


def test_a_killed_command_goes_on(trained, tmp_path, capsys):
    main(command(trained, tmp_path / "whole"))
    slowly = "import itertools, time, fpn.inference.stream as s; usual, n = s.row_of, itertools.count(); "
    slowly += "s.row_of = lambda *given: (time.sleep(1000 * (next(n) > 11)), usual(*given))[1]\n"  # the 13th never ends
    out, journal = tmp_path / "out", tmp_path / "out" / "unfinished.jsonl"
    process = fresh.start(slowly + fresh.COMMAND, *command(trained, out), log=tmp_path / "log.txt")
    waited = time.monotonic()
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 6):
        assert process.is_alive() and time.monotonic() - waited < 100, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    done = journal.read_bytes().count(b"\n") - 1
    assert 5 < done < 20 and not (out / "predictions.json").exists()
    capsys.readouterr()
    main(command(trained, out))
    assert f"going on: {done} of" in capsys.readouterr().err
    assert predictions(out)["images"] == predictions(tmp_path / "whole")["images"]
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in out.iterdir() if not file.name.endswith(".tmp")} == names


def test_ctrl_c_tells_how_to_go_on(trained, tmp_path, monkeypatch):
    stops = Stops(3)
    monkeypatch.setattr("fpn.inference.command.finder_of", lambda *_: lambda images: named(stops(images)))
    with pytest.raises(SystemExit) as stop:
        main([*command(trained, tmp_path / "out"), "--batch", "2"])
    assert "the same command goes on" in str(stop.value.code)
    assert (tmp_path / "out" / "unfinished.jsonl").read_bytes().count(b"\n") == 1 + 4


def named(found):
    return [dataclasses.replace(one, classes=CLASSES) for one in found]


@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_writes(trained, tmp_path):
    main([*command(trained, tmp_path / "one"), "--batch", "1", "--format", "json", "csv"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fpn.cli"]
    both = [*launcher, *command(trained, tmp_path / "two"), "--batch", "1", "--format", "json", "csv"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(both, capture_output=True, text=True, timeout=300, env=one_thread)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("objects in") == 1 and "Traceback" not in ended.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    mine, theirs = predictions(one)["images"], predictions(two)["images"]
    assert [(row["file"], row["picture"], len(row["detections"])) for row in mine] == [
        (row["file"], row["picture"], len(row["detections"])) for row in theirs
    ]
    assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()


def test_videos_go_their_own_way_under_names_of_their_own(trained, tmp_path, monkeypatch, capsys):
    from fpn.inference import video

    seen, broken = [], str(tmp_path / "b/x.avi")

    def spy(find, source, out, threshold, **options):
        seen.append((source, options))
        if source == broken:
            raise DataError(f"{source}: no video")
        return video.VideoResult(3, 4, 2, True, out / f"{options['name']}.json", None, ["it is short"])

    monkeypatch.setattr(video, "predict_video", spy)
    for name in ("a/predictions.mp4", "a/x.mov", "b/x.avi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    of_videos = ["predict", str(trained[0]), str(tmp_path / "?" / "*"), "webcam:1", "--device", "cpu"]
    with pytest.raises(SystemExit, match="1 files could not be read"):
        main([*of_videos, "--out", str(tmp_path / "out"), "--track", "--no-pictures"])
    assert [options["name"] for _, options in seen] == ["predictions-2", "x", "x-2", "webcam-1"]
    assert seen[-1][0] == "webcam:1" and all(options["track"] and not options["pictures"] for _, options in seen)
    printed = capsys.readouterr()
    assert printed.out.count("4 objects in 3 frames, 2 tracks") == 3 and "it is short" in printed.err
    assert f"skipped: {broken}: no video" in printed.err
    with pytest.raises(SystemExit, match="--format is for images"):
        main([*of_videos, "--format", "csv"])
    with pytest.raises(SystemExit, match="--track is for videos"):
        main(["predict", str(trained[0]), str(trained[1]), "--track"])


def test_results_take_the_place_of_no_video(tmp_path):
    videos = [str(tmp_path / name) for name in ("clip.mkv", "clip.mp4", "a/clip.mov", "b.avi")]
    assert [name for _, name in video_names(videos, tmp_path)] == ["clip-2", "clip-3", "clip-4", "b-2"]
    assert [name for _, name in video_names(videos, tmp_path / "a")] == ["clip-2", "clip-3", "clip-4", "b"]
    assert printable("a\udcff.mp4") == r"a\udcff.mp4"


def test_tiles_and_views_are_passed_on(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # is raised for tiles
    out = tmp_path / "out"
    Image.new("RGB", (150, 100), (90, 200, 30)).save(tmp_path / "a.png")
    for options, about in {
        ("--tile", "64", "--overlap", "0.5"): {"tile": 64, "overlap": 0.5},
        ("--tta",): {"tta": True},
    }.items():
        main(["predict", str(trained[0]), str(tmp_path / "a.png"), "--out", str(out), "--device", "cpu", *options])
        written = predictions(out)
        assert list(written) == ["checkpoint", *about, "threshold", "images"] and written == {**written, **about}


def test_a_very_large_picture_is_taken_in_tiles_only(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    Image.new("RGB", (150, 100), (90, 200, 30)).save(tmp_path / "a.png")
    of_picture = [
        "predict",
        str(trained[0]),
        str(tmp_path / "a.png"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit, match="could not be read"):
        main(of_picture)
    assert "cut it into tiles" in capsys.readouterr().err
    main([*of_picture, "--tile", "64"])
    assert len(predictions(tmp_path / "out")["images"]) == 1


def test_formats_tell_the_same(pictures, tmp_path):
    out = tmp_path / "out"
    formats = ["json", "coco", "csv", "yolo", "grid"]
    done = run(spots, pictures, out, formats=formats, pictures=False)
    assert done is not None and not list(out.glob("*.jpg"))
    assert [file.name for file in done.files] == ["predictions.json", "coco.json", "predictions.csv", "labels", "grid"]
    rows = predictions(out)["images"]
    assert all("picture" not in row for row in rows)
    every = [(row, found) for row in rows for found in row["detections"]]

    table = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert [(line["file"], line["class"], float(line["score"])) for line in table] == [
        (row["file"], found["class"], found["score"]) for row, found in every
    ]
    assert [[float(line[side]) for side in ("x1", "y1", "x2", "y2")] for line in table] == [f["box"] for _, f in every]

    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    named = stream.names_of(pictures, {})
    labels = {file.stem: file.read_text().splitlines() for file in (out / "labels").iterdir()}
    assert len(labels) == 22 and sum(map(len, labels.values())) == len(every)
    first, found = every[0]
    kind, *shares = labels[named[first["file"]]][0].split()
    x, y, w, h = (float(share) for share in shares)
    width, height = first["width"], first["height"]
    assert ("cat", "dog")[int(kind)] == found["class"]
    box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    assert box == pytest.approx(found["box"], abs=1e-3)

    pages = sorted((out / "grid").iterdir())
    assert [page.name for page in pages] == ["1.jpg", "2.jpg"]
    first_page, last_page = map(fpn.data.image_size, pages)
    assert first_page[0] > last_page[0] > 0


def test_coco_is_a_data_set_of_what_was_found(pictures, tmp_path):
    run(spots, pictures, tmp_path / "out", formats=["coco"])
    file = tmp_path / "in" / "found.json"
    file.write_bytes((tmp_path / "out" / "coco.json").read_bytes())
    data = fpn.data.load(file)
    assert data.classes == ("cat", "dog") and not data.problems
    paths = {str(split.path(index)) for split in data.values() for index in range(len(split))}
    assert paths == {str(f) for f in pictures if f != pictures[5]}
    content = json.loads(file.read_text())
    number = sum(len(split.boxes) for split in data.values())
    assert len(content["annotations"]) == number > 5
    assert {note["id"] for note in content["annotations"]} == set(range(1, number + 1))
    assert all(0.5 <= note["score"] <= 1 and note["area"] > 0 for note in content["annotations"])


def test_masks_go_into_every_format(tmp_path):
    from fpn.model.masks import paste

    files = [tmp_path / "in" / name for name in ("a.png", "ü b.png")]
    files[0].parent.mkdir()
    for file in files:
        Image.new("RGB", (900, 40), (90, 90, 90)).save(file)
    shape = torch.zeros(1, 4, 4)
    shape[:, :, :2] = 1.0  # the left half

    def find(images):
        return [
            Detections(torch.tensor([[100.0, 4, 500, 36]]), torch.tensor([0.9]), torch.tensor([0]), torch.tensor([4]),
                       torch.tensor(1), ("cat", "dog"), shape)
            for _ in images
        ]  # fmt: skip

    run(find, files, tmp_path / "out", formats=["json", "coco", "grid"])
    assert [row["picture"] for row in predictions(tmp_path / "out")["images"]] == ["a.jpg", "ü b.jpg"]
    pasted = int(paste(shape, torch.tensor([[100.0, 4, 500, 36]]), (40, 900)).sum())
    notes = json.loads((tmp_path / "out" / "coco.json").read_text())["annotations"]
    assert [note["area"] for note in notes] == [pasted] * 2 and notes[0]["segmentation"]["size"] == [40, 900]
    page = fpn.data.read_image(tmp_path / "out" / "grid" / "1.jpg").int()
    coloured = (page.amax(0) - page.amin(0)) > 40
    columns = coloured.any(0).nonzero()[:, 0]
    assert 50 < columns.min() < 65  # 100 of 900 pixels, at 420 and after the gap of 10


def test_nothing_found_and_nothing_readable(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    done = run(spots, [broken], tmp_path / "out", formats=["json", "coco", "csv", "yolo", "grid"])
    assert done is not None and done.images == 0 and predictions(tmp_path / "out")["images"] == []
    assert json.loads((tmp_path / "out" / "coco.json").read_text())["images"] == []


def test_a_picture_that_is_looked_at_is_never_overwritten(tmp_path):
    file = tmp_path / "a.jpg"
    Image.new("RGB", (20, 10)).save(file)
    before = file.read_bytes()
    with pytest.raises(OptionError, match="a.jpg: a picture with boxes would take its place"):
        run(spots, [file], tmp_path)
    assert run(spots, [file], tmp_path, pictures=False) is not None
    assert file.read_bytes() == before


def test_names_do_not_depend_on_what_is_done():
    files = [Path(folder) / name for folder in "xyz" for name in ("a.png", "A.jpg", "b.png")]
    whole = stream.names_of(files, {})
    assert list(whole.values()) == ["a", "A-2", "b", "a-3", "A-4", "b-2", "a-5", "A-6", "b-3"]
    for known in ({}, dict(list(whole.items())[4:7]), dict(list(whole.items())[:2])):
        assert stream.names_of(files, known) == whole


def test_sources(tmp_path):
    for name in ("in/a.png", "in/clip.MP4", "in/out/a.jpg", "in/.b.png", "c.mov", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    assert find_sources([folder]) == ([folder / "a.png", out / "a.jpg"], [])
    assert find_sources([folder, folder / "a.png"], out) == ([folder / "a.png"], [])  # results are no inputs
    assert find_sources([out], out) == ([out / "a.jpg"], [])  # unless they are asked for
    assert find_sources([tmp_path / "in" / "**" / "*"], out) == ([folder / "a.png"], [str(folder / "clip.MP4")])
    assert find_sources([out / "*.jpg"], out) == ([out / "a.jpg"], [])
    for both in (folder, folder / "*", folder / "**" / "*.jpg", folder / "*.mp4"):
        with pytest.raises(OptionError, match="choose another folder with --out"):
            check_apart([both], folder)
    check_apart([folder, folder / "*"], out)
    check_apart([folder / "*.png", folder / "a.png"], folder)
    videos = [str(tmp_path / "c.mov"), "webcam:0", str(folder / "clip.MP4")]
    assert find_sources([tmp_path / "c.mov", Path("webcam:0"), tmp_path / "*" / "*"]) == ([folder / "a.png"], videos)
    for wrong in (tmp_path / "none", tmp_path / "*.gif", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(fpn.errors.DataError, match=wrong.name.replace("*", r"\*")):
            find_sources([wrong])
