"""The command line, end to end on a few generated images, and what it says when something is wrong."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fpn
from fpn.cli import main
from fpn.data.generated import generate
from fpn.training.settings import Options

SMALL = [
    "--backbone",
    "tiny",
    "--weights",
    "none",
    "--short",
    "96",
    "--width",
    "16",
    "--workers",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "shapes", images=8, size=(96, 128), seed=1)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "shapes"
    main(["train", str(data), "--out", str(out), "--epochs", "2", "--batch", "4", "--scales", "96", "112", *SMALL])
    return out


def read_rows(run) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def eager(run, folder):
    """The run's detector as a checkpoint that reports whatever it sees, for it has learnt next to nothing."""
    detector = fpn.load(run / "best.safetensors")
    detector.spec = dataclasses.replace(detector.spec, settings={**detector.spec.settings, "score": 0.0})
    return fpn.weights.save(detector, folder / "eager.safetensors")


def fails(arguments, capsys) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code not in (0, None)
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_train_leaves_what_the_contract_names(run):
    names = {p.name for p in run.iterdir()}
    assert {"best.safetensors", "last.safetensors", "metrics.csv", "config.yaml", "resume.ckpt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    rows = read_rows(run)
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(
        float(row["loss"]) > 0 and "AP50" in row for row in rows
    )
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["training"]["scales"] == [96, 112]
    assert config["training"]["epochs"] == 2 and config["detector"]["backbone"] == "tiny"


def test_eval_writes_numbers_and_coco_results(run, data, tmp_path, capsys):
    main(["eval", str(eager(run, tmp_path)), str(data), "--out", str(tmp_path / "e"), "--workers", "0"])
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert all(name in printed for name in ("AP50", "AR_large", "ball", "leaf"))
    assert {"AP", "AP75", "AR100", "per_class"} <= metrics.keys()
    results = json.loads((tmp_path / "e" / "predictions.json").read_text())
    assert results and all(set(row) == {"image_id", "category_id", "bbox", "score"} for row in results)


def test_predict_on_files_folders_and_patterns(run, data, tmp_path, capsys):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    picture = next((data / "images" / "val").iterdir())
    shutil.copy(picture, folder / "a.jpg")
    shutil.copy(picture, tmp_path / "in" / "a.jpg")  # the same name in another folder
    (folder / "b.jpg").write_bytes(picture.read_bytes()[:300])  # truncated
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(eager(run, tmp_path)), str(tmp_path / "in"), f"{folder}/*.jpg", "--out", str(out),
              "--threshold", "0.0"])  # fmt: skip
    assert "1 files could not be read" in str(stop.value.code)
    assert "b.jpg" in capsys.readouterr().err
    written = json.loads((out / "predictions.json").read_text())
    assert {row["picture"] for row in written["images"]} == {"a.jpg", "a-2.jpg"} < {p.name for p in out.iterdir()}
    for row in written["images"]:
        assert row["detections"]
        assert (row["height"], row["width"]) == (96, 128)
        for found in row["detections"]:
            x1, y1, x2, y2 = found["box"]
            assert (
                0 <= x1 < x2 <= 128
                and 0 <= y1 < y2 <= 96
                and found["class"] in ("ball", "crate", "ring", "star", "leaf")
            )


def test_boxes_are_in_the_pixels_of_the_picture_as_displayed(run, data, tmp_path):
    """Stored on its side with an EXIF note, a picture is detected in as if it had been stored upright."""
    upright = Image.open(next((data / "images" / "val").iterdir()))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    detector = fpn.load(run / "best.safetensors")
    detector.score = 0.0
    one, other = (fpn.predict(detector, tmp_path / f"{name}.png", 0.0, "cpu") for name in ("upright", "turned"))
    assert len(one) > 0 and torch.equal(one.boxes, other.boxes)


def test_predict_takes_every_kind_of_picture(run):
    detector = fpn.load(run / "best.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    kinds = [pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)]
    found = fpn.predict(detector, kinds, 0.0, "cpu")
    assert torch.equal(found[0].boxes, found[1].boxes) and torch.equal(found[0].boxes, found[2].boxes)
    with pytest.raises(fpn.errors.DataError, match="must be \\(H, W, 3\\)"):
        fpn.predict(detector, pixels[..., 0], device="cpu")


@pytest.mark.parametrize("size", [(1, 1), (20, 4000), (4000, 3)])
def test_odd_pictures_do_not_break_it(run, size):
    detector = fpn.load(run / "best.safetensors")
    detector.score = 0.0
    found = fpn.predict(detector, torch.zeros(3, *size, dtype=torch.uint8), 0.0, "cpu")
    height, width = size
    assert (
        len(found) > 0
        and (found.boxes >= 0).all()
        and (found.boxes <= torch.tensor([width, height, width, height])).all()
    )


def test_resume_goes_on_where_the_run_stopped(run, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["training"]["epochs"] = 3
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    main(["train", str(data), "--out", str(out), "--resume"])
    rows = read_rows(out)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    first = read_rows(run)
    assert [r["loss"] for r in rows[:2]] == [r["loss"] for r in first]


def test_an_existing_run_is_not_overwritten(run, data, capsys):
    before = (run / "best.safetensors").read_bytes()
    text = fails(["train", data, "--out", run, *SMALL], capsys)
    assert "add --resume" in text and (run / "best.safetensors").read_bytes() == before


def test_mistakes_are_told_in_one_line(run, data, tmp_path, capsys):
    checkpoint, empty = run / "best.safetensors", tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    annotations = broken / "annotations" / "instances_train.json"
    annotations.write_text(annotations.read_text()[:5000])
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    cases = [
        (["train", tmp_path / "nothing", *SMALL], "nothing"),
        (["train", empty, *SMALL], "empty"),
        (["train", broken, *SMALL], "instances_train.json"),
        (["train", data, "--device", "cuda:7", *SMALL[:-2]], "cuda:7"),
        (["train", data, "--backbone", "resnet51", "--weights", "none"], "resnet51"),
        (["train", data, "--backbone", "resnet18", "--weights", notes], "notes.txt"),
        (["train", data, "--batch", "0", *SMALL], "batch is 0"),
        (["train", data, "--lr", "-1", *SMALL], "lr is -1"),
        (["train", data, "--short", "8", *SMALL[:4]], "short 8"),
        (["train", data, "--width", "0", *SMALL[:6]], "width is 0"),
        (["train", data, "--anchors", "1", "2", *SMALL], "need 5"),
        (["train", data, "--flip", "2", *SMALL], "flip is 2"),
        (["train", data, "--seed", "-1", *SMALL], "seed is -1"),
        (["train", data, "--out", notes, *SMALL], "notes.txt"),
        (["predict", checkpoint, data, "--out", notes / "x"], "notes.txt"),
        (["train", data, "--resume", "--out", empty, *SMALL], "no run to resume"),
        (["eval", notes, data], "notes.txt: not a checkpoint"),
        (["eval", checkpoint, data, "--split", "tset"], "no split 'tset'; it has train, val"),
        (["predict", checkpoint, tmp_path / "no.jpg"], "no.jpg"),
        (["predict", checkpoint, empty], "no images in this folder"),
        (["predict", checkpoint], "nothing to look at"),
        (["predict", checkpoint, data, "--threshold", "2"], "threshold is 2"),
        (["train", data, "--config", tmp_path / "no.yaml"], "no.yaml: no such configuration file"),
        (["data", "info", notes], "notes.txt"),
    ]
    for arguments, said in cases:
        text = fails(arguments, capsys)
        assert said in text and len(text.strip().splitlines()) < 12, (arguments, text)
    assert not any(p.suffix == ".tmp" for p in tmp_path.rglob("*"))


def test_data_of_other_classes_is_refused(run, data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for file in (other / "annotations").iterdir():
        file.write_text(file.read_text().replace('"ball"', '"sphere"'))
    assert "it does not know sphere" in fails(["eval", run / "best.safetensors", other], capsys)


def test_options_can_stand_in_a_yaml_file(data, tmp_path):
    (tmp_path / "options.yaml").write_text("train:\n  epochs: 1\n  batch: 4\n  width: 8\n")
    main(["train", str(data), "--config", str(tmp_path / "options.yaml"), "--out", str(tmp_path / "run"),
          "--backbone", "tiny", "--weights", "none", "--short", "64", "--workers", "0", "--device", "cpu"])  # fmt: skip
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["training"]["epochs"] == 1 and config["detector"]["width"] == 8


def test_the_configuration_of_a_run_repeats_it(run, data, tmp_path):
    main(["train", str(data), "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")])
    times = {"seconds", "images_per_second", "waiting"}
    again, first = ([{k: v for k, v in row.items() if k not in times} for row in read_rows(out)]
                    for out in (tmp_path / "again", run))  # fmt: skip
    assert again == first and len(first) == 2


def test_an_option_overrides_the_configuration_file(run, data, tmp_path):
    main(["train", str(data), "--config", str(run / "config.yaml"), "--epochs", "1", "--out", str(tmp_path / "again")])
    assert len(read_rows(tmp_path / "again")) == 1


def test_info_as_text_and_json(data, capsys):
    main(["data", "info", str(data)])
    assert "COCO" in capsys.readouterr().out
    main(["data", "info", str(data), "--json"])
    assert json.loads(capsys.readouterr().out)["format"] == "coco"


def test_help_explains_every_option_of_training(capsys):
    main(["train", "--help"])
    page = capsys.readouterr().out
    for option in dataclasses.fields(Options):
        row = page.split("--" + option.name.replace("_", "-"), 1)[1]
        assert any(word.isalpha() and word.islower() for word in row.split("--")[0].split()), option.name
