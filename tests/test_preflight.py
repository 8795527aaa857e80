"""The checks before training: what cannot work is refused, what is doubtful is said, and it all fits on one screen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_folders import PICTURES, Picture, coco_content, save_json, write_coco, write_image
from PIL import Image

import fpn
from fpn.cli import BuildOptions, first_build
from fpn.data import Data, Split
from fpn.data.batching import seed_from
from fpn.errors import DataError
from fpn.evaluation.metrics import score
from fpn.model.detector import Detector
from fpn.training.preflight import Finding, _masks, caps, preflight, print_preflight, truth_as_results
from fpn.training.settings import Options, Settings, resolve


@pytest.fixture
def data(tmp_path: Path) -> Data:
    both = (("cat", 0, 0, 20, 20), ("dog", 20, 5, 50, 35))
    return fpn.data.load(
        write_coco(
            tmp_path,
            {
                "train": tuple(Picture(f"{i}.png", boxes=both) for i in range(7)),
                "val": (Picture("v.png", boxes=both), Picture("w.png")),
            },
        )
    )


def detector_for(data: Data, **options: object) -> Detector:
    return fpn.build(
        backbone="tiny", classes=data.classes, weights="none", **{"short": 64, "width": 8, "hidden": 8, **options}
    )


def settings_for(train: Split, **options: object) -> Settings:
    return resolve(Options(**{"device": "cpu", "workers": 0, "batch": 2, **options}), train, 64)  # pyright: ignore


def doubts(detector: Detector, train: Split, val: Split | None) -> list[str]:
    return [finding.text for finding in preflight(detector, train, val, settings_for(train)) if not finding.good]


def crowd(split: Split, count: int) -> Split:
    """The first image of a split with `count` boxes side by side, all of the first class."""
    places = np.stack(np.divmod(np.arange(count), 100), axis=1) * 0.3
    return replace(
        split.select(np.array([0]), split.name),
        offsets=np.array([0, count]),
        boxes=np.concatenate([places, places + 0.3], axis=1),
        labels=np.zeros(count, np.int64),
        ignore=np.zeros(count, bool),
        areas=np.full(count, 0.09),
    )


def test_nothing_to_say_about_good_data(data: Data) -> None:
    findings = preflight(detector_for(data), data["train"], data["val"], settings_for(data["train"]))
    assert all(finding.good for finding in findings)
    texts = " | ".join(finding.text for finding in findings)
    assert "5 of train and 2 of val" in texts and "gives AP 1.000 on 2 images of val" in texts
    assert "every class has boxes in train and val" in texts and "the densest has 2 objects" in texts


def test_the_screen_says_what_will_happen(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(data["train"], epochs=3, accumulate=3)  # 4 batches are 2 steps
    findings = [Finding(False, "[red]odd"), Finding(True, "fine")]
    print_preflight(findings, detector_for(data), data["train"], data["val"], settings)
    screen = " ".join(capsys.readouterr().out.split())
    for part in ("7 images, 14 boxes, 2 classes; measured on 2 images, 2 boxes", "faster_rcnn, tiny", "[red]odd",
                 "shorter side 64, at most 107 pixels; anchors 32 64 128 256 512",
                 "3 epochs of 2 steps of 6 images, 6 steps in all"):  # fmt: skip
        assert part in screen
    assert screen.index("fine") < screen.index("odd")  # warnings stand last, where they are seen


def test_limits_come_from_the_densest_image(data: Data) -> None:
    dense = crowd(data["train"], 5000)
    needed = caps({"train": dense, "val": data["val"]})
    assert needed["max_detections"] >= 5000 and min(needed["proposals"]) >= 5000
    (doubt,) = [text for text in doubts(detector_for(data), dense, data["val"]) if "limits" in text]
    assert "0.png has 5,000 objects" in doubt and "max_detections=6000, proposals=(12000, 12000)" in doubt
    findings = preflight(detector_for(data, **needed), dense, data["val"], settings_for(dense))
    assert any(f.good and "limits of 6,000 detections" in f.text and "5,000 objects" in f.text for f in findings)
    (doubt,) = [text for text in doubts(detector_for(data, proposals=(9, 1)), data["train"], None) if "limits" in text]
    assert doubt.endswith("fpn.build(..., proposals=(2000, 1000))")


def test_one_stage_detectors_have_limits_of_their_own(data: Data) -> None:
    dense = crowd(data["train"], 1100)
    small = {"model": "retinanet", "tower_convolutions": 1, "hidden": None}
    (doubt,) = [text for text in doubts(detector_for(data, **small), dense, None) if "limits" in text]
    assert "100 detections an image and 1,000 candidates a level" in doubt
    assert doubt.endswith("fpn.build(..., max_detections=1400, candidates=2800)")
    enough = detector_for(data, **small, max_detections=1400, candidates=2800)
    assert not [text for text in doubts(enough, dense, None) if "limits" in text]


@pytest.mark.parametrize("model", ["retinanet", "fcos", "atss", "faster_rcnn"])
def test_the_command_raises_the_limits_that_a_detector_has(data: Data, model: str) -> None:
    dense = replace(data, splits={"train": crowd(data["train"], 3000)})
    parts = BuildOptions(model=model, backbone="tiny", weights="none", width=32, short=64)  # pyright: ignore
    detector, _ = first_build(dense, parts, "cpu")
    assert detector.max_detections == 3600
    room = detector.proposals[1] if model == "faster_rcnn" else detector.candidates  # pyright: ignore
    assert room == 7200
    # Going on from it, the limits stay for data that need less.
    fewer = replace(data, splits={"train": crowd(data["train"], 200)})
    again, _ = first_build(fewer, BuildOptions(weights="it"), "cpu", source=detector)
    assert again.spec.settings == detector.spec.settings


def test_outlines_that_will_not_fit_into_memory(data: Data) -> None:
    """A batch of 2 at 64 x 96 pixels takes 12,288 bytes an object: 2 GiB are 174,762 of them."""
    detector = detector_for(data, model="mask_rcnn")

    def found(count: int, batch: int = 2) -> list[Finding]:
        split = crowd(data["train"], count)
        return _masks(detector, split, settings_for(split, batch=batch))

    assert found(174_762) == [] and found(174_763, batch=1) == []
    (finding,) = found(174_763)
    assert not finding.good and "0.png has 174,763 objects: the outlines of 2 images of 96x64 pixels" in finding.text
    assert "take 2.0 GiB; take a smaller --batch or --short" in finding.text
    assert _masks(detector_for(data), crowd(data["train"], 174_763), settings_for(data["train"])) == []


def test_truth_that_no_detector_can_reach_is_explained(data: Data) -> None:
    dense = crowd(data["val"], 250)
    (doubt,) = [text for text in doubts(detector_for(data), data["train"], dense) if "ground truth" in text]
    # 100 of 250 are found: precision 1 up to recall 0.4, which is 41 of the 101 recalls.
    assert f"AP {41 / 101:.3f}, not 1" in doubt and "150 objects are beyond the 100 detections" in doubt
    (doubt,) = doubts(detector_for(data, max_detections=300), data["train"], dense)
    assert doubt == "no box in val, so AP is -1 there and leaves them out: dog"


def test_truth_as_results_is_cut_image_by_image(data: Data) -> None:
    results, cut = truth_as_results(data["train"], 1)
    assert cut == 7 and results.indices.tolist() == list(range(7)) and set(results.labels) == {0}
    assert score(data["train"], truth_as_results(data["train"], 2)[0])["AP"] == pytest.approx(1)


def test_crowds_are_no_predictions(data: Data) -> None:
    ignored = replace(data["val"], ignore=np.array([True, False]))
    results, cut = truth_as_results(ignored, 100)
    assert cut == 0 and results.labels.tolist() == [1]
    nothing = replace(data["val"], ignore=np.array([True, True]))
    assert any("no object to find" in text for text in doubts(detector_for(data), data["train"], nothing))


def test_classes_without_boxes_are_named(data: Data) -> None:
    val = replace(data["val"], labels=np.zeros(2, np.int64))
    assert any(
        "no box in val" in text and text.endswith(": dog") for text in doubts(detector_for(data), data["train"], val)
    )
    train = replace(data["train"], labels=np.ones(14, np.int64))
    texts = doubts(detector_for(data), train, data["val"])
    assert any("never learnt: cat" in text for text in texts) and not any("no box in val" in text for text in texts)


def test_classes_that_are_never_learnt_are_refused(data: Data) -> None:
    with pytest.raises(DataError, match=r"'val' has classes that 'train' has not \(cow\)"):
        doubts(detector_for(data), data["train"], replace(data["val"], classes=("cat", "cow")))


def test_images_that_cannot_be_read(data: Data) -> None:
    data["val"].path(1).write_bytes(b"no image")
    (doubt,) = doubts(detector_for(data), data["train"], data["val"])
    assert "w.png" in doubt and "fpn data check" in doubt
    data["val"].path(0).unlink()
    with pytest.raises(DataError, match="None of the 2 images of 'val'"):
        doubts(detector_for(data), data["train"], data["val"])


def test_images_of_another_size_than_annotated(data: Data) -> None:
    with Image.open(data["val"].path(0)) as image:
        turned = Image.Exif()
        turned[0x0112] = 6  # displayed as 40x60, stored and annotated as 60x40, which is how it is read
        image.save(data["val"].path(0), exif=turned)
    assert doubts(detector_for(data), data["train"], data["val"]) == []
    write_image(data["val"].path(0), (60, 40))
    (doubt,) = doubts(detector_for(data), data["train"], data["val"])
    assert "is 40x60, but annotated as 60x40" in doubt
    write_image(data["val"].path(0), (60, 41))
    (doubt,) = doubts(detector_for(data), data["train"], data["val"])
    assert "is 41x60, but annotated as 60x40" in doubt


def test_any_seed_will_do(data: Data) -> None:
    settings = replace(settings_for(data["train"]), seed=-1)
    assert preflight(detector_for(data), data["train"], data["val"], settings)[0].good


def test_images_in_both_splits(data: Data) -> None:
    (doubt,) = doubts(detector_for(data), data["train"], data["train"].select(np.arange(3), "val"))
    assert "3 of 3 images of val are in train too" in doubt and "0.png" in doubt


def test_without_a_validation_split(data: Data) -> None:
    (doubt,) = doubts(detector_for(data), data["train"], None)
    assert "nothing is measured" in doubt


def test_poor_anchors(data: Data) -> None:
    (doubt,) = doubts(detector_for(data, anchor_sizes=(256, 256, 256, 256, 512)), data["train"], data["val"])
    assert "anchors fit only 0 % of the boxes" in doubt and "fpn data info" in doubt


def test_large_splits_take_seconds(data: Data) -> None:
    images = 100_000
    many = replace(
        data["train"],
        files=np.char.add(np.arange(images).astype(str), ".png"),
        image_ids=np.arange(images),
        sizes=np.tile([40, 60], (images, 1)),
        offsets=np.arange(images + 1) * 2,
        boxes=np.tile(data["train"].boxes[:2], (images, 1)),
        labels=np.tile([0, 1], images),
        ignore=np.zeros(2 * images, bool),
        areas=np.ones(2 * images),
    )
    for index in np.random.default_rng(seed_from(0)).permutation(images)[:5]:
        write_image(many.path(int(index)), (40, 60))
    texts = [f.text for f in preflight(detector_for(data), many, replace(many, name="val"), settings_for(many))]
    assert any("100,000 of 100,000 images of val are in train too" in text for text in texts)
    assert any("AP 1.000 on 1,000 of 100,000 images" in text for text in texts)


def test_defects_that_the_reader_left_out_leave_a_class_empty(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["annotations"][0]["bbox"] = [5, 5, 0, 10]
    write_coco(tmp_path)
    save_json(tmp_path / "annotations" / "instances_train.json", content)
    data = fpn.data.load(tmp_path)
    assert "no box in train, so never learnt: cat" in doubts(detector_for(data), data["train"], data["val"])
