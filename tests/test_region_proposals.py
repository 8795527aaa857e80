"""An RPN alone, average recall, proposals in a file, Fast R-CNN on them, and features that both share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import write_coco
from safetensors.numpy import load_file, save_file
from test_mask_metrics import random_masks
from test_metrics import make_results, make_split, random_case

import fpn
from fpn.data import DetectionDataset, Split, class_agnostic, collate, resize_transform, training_transform
from fpn.data.augment import Augmentation
from fpn.data.generated import generate
from fpn.errors import CheckpointError, DataError, OptionError
from fpn.evaluation import proposals
from fpn.evaluation.evaluate import detect_split
from fpn.evaluation.metrics import Results, ground_truth, to_coco
from fpn.evaluation.proposals import average_recall, score_proposals
from fpn.model.detector import Detector
from fpn.paper.sharing import features_of, joined, on_features_of
from fpn.structures import Batch, Regions, Targets
from fpn.training.options import Options
from fpn.training.settings import resolve

TINY = {"backbone": "tiny", "weights": "none", "width": 16, "short": 64, "anchor_sizes": (8, 16, 32, 64, 128)}
FEW = {"proposals": (150, 120), "proposals_per_level": (100, 60)}
HEAD = {"hidden": 32, "score": 0.2}
QUICK = {"epochs": 1, "workers": 0, "device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fpn.data.load(generate(tmp_path_factory.mktemp("data") / "shapes", images=8, size=(96, 128), seed=3))


def lively(detector: Detector, seed: int = 0) -> Detector:
    """With weights whose outputs differ from place to place."""
    torch.manual_seed(seed)
    for name, parameter in detector.named_parameters():
        if name.split(".")[-2] in ("objectness", "classes", "offsets"):
            torch.nn.init.normal_(parameter, std=0.3)
    return detector.eval()


def filled_from(detector: Detector, *others: Detector) -> Detector:
    weights = {key: value for other in others for key, value in other.state_dict().items()}
    detector.load_state_dict({key: weights[key] for key in detector.state_dict()})
    return detector.eval()


def some_batch(**more) -> Batch:
    images = torch.randint(256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 80]])
    boxes = torch.tensor([[[4.0, 4.0, 40.0, 30.0], [50.0, 10.0, 66.0, 28.0]], [[10.0, 10.0, 30.0, 42.0]] * 2])
    valid = torch.tensor([[True, True], [True, False]])
    targets = Targets(boxes, torch.zeros((2, 2), dtype=torch.int64), valid)
    return Batch(images, sizes, sizes, torch.arange(2), targets, torch.tensor([5, 6]), **more)


# Average recall


def by_pycocotools(split: Split, results: Results, limits: tuple[int, ...], kind: str = "bbox") -> list[float]:
    """AR of all objects at each limit, then by size at the last, without regard to classes."""
    from pycocotools import mask as api
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    truth.dataset = json.loads(json.dumps(ground_truth(split)))
    detections = json.loads(json.dumps(to_coco(split, results)))
    for n, d in enumerate(detections, 1):
        pixels = float(api.area(d["segmentation"])) if kind == "segm" else d["bbox"][2] * d["bbox"][3]
        d |= {"id": n, "area": pixels, "iscrowd": 0}
    found.dataset = {**truth.dataset, "annotations": detections}
    truth.createIndex()
    found.createIndex()
    evaluation = COCOeval(truth, found, kind)
    evaluation.params.useCats, evaluation.params.maxDets = 0, list(limits)
    evaluation.params.imgIds = split.image_ids[results.images].tolist()
    evaluation.evaluate()
    evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]
    wanted = [*(recall[:, 0, m] for m in range(len(limits))), *(recall[:, a, -1] for a in (1, 2, 3))]
    return [float(part.mean()) if (part > -1).any() else -1.0 for part in wanted]


def many_proposals(seed: int) -> tuple[Split, Results]:
    """Objects with crowds among them, and about 1,000 proposals an image, good ones anywhere in their order.

    No two have one score: pycocotools puts those of a class together first, so that it breaks ties otherwise.
    """
    rng, rows = np.random.default_rng(seed), []
    split, _ = random_case(seed)
    split = split.select(np.arange(8), "val")
    for image, per_image in enumerate(rng.integers(900, 1300, 8)):
        truth = split.boxes[split.rows(image)]
        near = truth[rng.integers(0, len(truth), per_image)] + rng.normal(0, 25, (per_image, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        label, score = rng.integers(0, 4, per_image), rng.permutation(per_image) / per_image
        rows.append(np.column_stack([np.full(per_image, image), near, label, score]))
    return split, make_results(split, np.concatenate(rows))


@pytest.mark.parametrize("seed", range(2))
def test_recall_of_many_proposals_equals_pycocotools(seed, monkeypatch):
    monkeypatch.setattr(proposals, "IMAGES", 3)  # scored in parts, the last of which is smaller
    split, results = many_proposals(seed)
    found = average_recall(split, results)
    assert list(found) == ["AR100", "AR1000", "AR1000_small", "AR1000_medium", "AR1000_large"]
    np.testing.assert_allclose(list(found.values()), by_pycocotools(split, results, (100, 1000)), atol=1e-9)
    assert 0.1 < found["AR100"] < found["AR1000"] - 0.05 < 0.95


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_recall_of_masks_equals_pycocotools():
    split, results = random_masks(1)
    results = replace(results, scores=np.random.default_rng(0).permutation(len(results.scores)) / 1e4)  # no ties
    found = average_recall(split, results, (5, 20), "segm")
    np.testing.assert_allclose(list(found.values()), by_pycocotools(split, results, (5, 20), "segm"), atol=1e-9)
    metrics = score_proposals(split, results)
    assert metrics.masks is not None and metrics.main == "mask_AR1000" and metrics.with_masks()[metrics.main] > 0


def test_recall_on_worked_numbers():
    """Of two objects one is covered wholly, one with IoU 0.6; a third is a crowd, and a label is of no account."""
    split = make_split([[(0, 0, 20, 20, 0, 0), (50, 50, 150, 150, 1, 0), (0, 0, 400, 400, 0, 1)], []])
    results = make_results(split, [(0, 0, 0, 20, 20, 1, 0.2), (0, 50, 50, 150, 110, 0, 0.9)])
    found = average_recall(split, results, (1, 2))
    # IoU 0.6 counts at 0.50, 0.55 and 0.60: 0.3 of the thresholds.
    wanted = {"AR1": 0.15, "AR2": 0.65, "AR2_small": 1.0, "AR2_medium": -1.0, "AR2_large": 0.3}
    assert found == pytest.approx(wanted)
    metrics = score_proposals(split, replace(results, images=np.array([0])))
    assert metrics.main == "AR1000" and metrics["AR100"] == pytest.approx(0.65)
    assert "AR1000_medium: -1" in " ".join(metrics.notes) and "1 of 2 images" in metrics.notes[0]
    assert "AR1000_small    1.000" in metrics.table() and "class" not in metrics.table()
    assert metrics.summary() == "AR100 0.650  AR1000 0.650  small 1.000 medium - large 0.300"


def test_recall_where_there_is_nothing():
    split = make_split([[], []])
    assert set(average_recall(split, make_results(split, [])).values()) == {-1.0}
    assert set(average_recall(split, make_results(split, [], images=[])).values()) == {-1.0}
    with_object = make_split([[(0, 0, 9, 9, 0, 0)]])
    assert average_recall(with_object, make_results(with_object, []))["AR100"] == 0


# The RPN


def test_an_rpn_gives_the_proposals_of_a_faster_rcnn_with_its_weights():
    faster = lively(fpn.build("faster_rcnn", classes=["a", "b"], **TINY, **FEW, **HEAD))
    rpn = filled_from(fpn.build("rpn", **TINY, **FEW), faster)
    batch = some_batch()
    with torch.no_grad():
        found, pyramid = rpn.detect(batch), faster.features(batch)
        anchors = faster.anchors(pyramid, batch.images.shape[-2:])
        wanted = faster.propose(faster.rpn(pyramid), anchors, batch.sizes, training=False)
    assert torch.equal(found.count, wanted.valid.sum(1)) and found.count.min() > 50 and found.classes == ("object",)
    for row, count in enumerate(found.count.tolist()):
        assert torch.equal(found.boxes[row, :count], wanted.boxes[row, :count])
        assert torch.equal(found.scores[row, :count], wanted.scores[row, :count])
        assert (found.boxes[row, count:] == 0).all() and (found.scores[row, count:] == 0).all()
        assert (found.labels[row] == torch.where(torch.arange(120) < count, 0, -1)).all()
    terms, both = rpn.losses(batch), faster.losses(batch)
    assert list(terms) == ["rpn_class", "rpn_box"] and all(torch.equal(terms[name], both[name]) for name in terms)


def test_levels_of_proposals_are_those_of_their_anchors():
    """Anchors of 8 pixels on P2 up to 128 on P6, moved by nothing."""
    rpn = lively(fpn.build("rpn", **TINY, anchor_ratios=(1.0,), rpn_nms=1.0, proposals_per_level=(20, 20)))
    for parameter in rpn.rpn.offsets.parameters():
        torch.nn.init.zeros_(parameter)
    images = torch.randint(256, (1, 3, 512, 512), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = torch.tensor([[512, 512]])
    with torch.no_grad():
        one = rpn.detect(Batch(images, sizes, sizes, torch.arange(1)))[0]
    sides = one.boxes[:, 2:] - one.boxes[:, :2]
    whole = (one.boxes > 0).all(1) & (one.boxes < 512).all(1)
    assert set(one.levels[whole].tolist()) >= {2, 3, 4, 5}
    torch.testing.assert_close(sides[whole].amin(1), 2.0 ** (one.levels[whole] + 1))


def test_an_rpn_learns_objects_whatever_their_class(data, tmp_path):
    torch.manual_seed(0)
    rpn = fpn.build("rpn", **TINY, **FEW)
    run = fpn.train(rpn, data, out=tmp_path / "run", **{**QUICK, "epochs": 2, "batch": 4})
    best = max(run.history, key=lambda row: row["AR1000"])
    assert run.best_epoch == best["epoch"] and {"rpn_class", "rpn_box", "AR100", "AR1000_small"} <= best.keys()
    assert "AP" not in best and best["AR1000"] > 0
    assert "AR1000" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    metrics = fpn.evaluate(fpn.load(run.best), data["val"], workers=0, device="cpu", progress=False)
    assert metrics["AR1000"] == pytest.approx(best["AR1000"], abs=1e-4)
    results = detect_split(rpn, data["val"], workers=0, device="cpu", progress=False)
    assert set(results.labels) == {0} and results.levels is not None and {2, 3} <= set(results.levels.tolist())


def test_one_class_for_all(data):
    split = class_agnostic(data["train"])
    assert split.classes == ("object",) and split.category_ids.tolist() == [1] and not split.labels.any()
    assert len(split.labels) == len(data["train"].labels) and data["train"].labels.any()
    with pytest.raises(OptionError, match="its one class is 'object', not circle, square: leave classes out"):
        fpn.build("rpn", classes=["circle", "square"], **TINY)
    with pytest.raises(OptionError, match="faster_rcnn needs the names of its classes"):
        fpn.build("faster_rcnn", **TINY)
    assert fpn.build("rpn", classes=["object"], **TINY).classes == ("object",)


def test_options_of_the_other_stage_are_refused():
    with pytest.raises(OptionError, match="rpn has no such option"):
        fpn.build("rpn", box_convolutions=4, **TINY)
    with pytest.raises(OptionError, match="rpn has no option box_nms"):
        fpn.build("rpn", box_nms=0.4, **TINY)
    with pytest.raises(OptionError, match="fast_rcnn has no such option"):
        fpn.build("fast_rcnn", classes=["a"], rpn_convolutions=2, **TINY)
    with pytest.raises(OptionError, match="fast_rcnn has no option rpn_nms"):
        fpn.build("fast_rcnn", classes=["a"], rpn_nms=0.4, **TINY)


# Saved proposals


def saved(rpn: Detector, split: Split, file: Path) -> Split:
    results = detect_split(rpn, split, workers=0, device="cpu", progress=False)
    return fpn.data.with_regions(split, fpn.data.write_regions(file, split, results))


def test_fast_rcnn_on_saved_proposals_is_faster_rcnn(data, tmp_path):
    """Through a file in pixels of the original images, which are larger than those that the detectors see."""
    split = data["train"]
    faster = lively(fpn.build("faster_rcnn", classes=split.classes, **TINY, **FEW, **HEAD))
    rpn = filled_from(fpn.build("rpn", **TINY, **FEW), faster)
    fast = filled_from(fpn.build("fast_rcnn", classes=split.classes, **TINY, **HEAD), faster)
    assert not any(key.startswith("rpn") for key in fast.state_dict())
    kwargs = {"workers": 0, "device": "cpu", "progress": False, "batch": 3}
    mine = detect_split(fast, saved(rpn, split, tmp_path / "regions.safetensors"), **kwargs)
    theirs = detect_split(faster, split, **kwargs)
    assert len(mine.scores) == len(theirs.scores) > 50
    assert np.array_equal(mine.indices, theirs.indices) and np.array_equal(mine.labels, theirs.labels)
    np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-4)
    np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=1e-2)


def test_losses_of_fast_rcnn_are_the_second_half_of_faster_rcnn(data):
    faster = lively(fpn.build("faster_rcnn", classes=["a"], **TINY, **HEAD, proposals=(80, 80)))
    fast = filled_from(fpn.build("fast_rcnn", classes=["a"], **TINY, **HEAD), faster)
    batch = some_batch()
    with torch.no_grad():
        pyramid = faster.features(batch)
        anchors = faster.anchors(pyramid, batch.images.shape[-2:])
        given = faster.propose(faster.rpn(pyramid), anchors, batch.sizes, training=True)
    terms = fast.losses(some_batch(regions=Regions(given.boxes, given.valid)))
    wanted = faster.losses(batch)
    assert list(terms) == ["class", "box"] and terms["box"] > 0
    for name, value in terms.items():
        torch.testing.assert_close(value, wanted[name])
    torch.stack(list(terms.values())).sum().backward()
    idle = [name for name, p in fast.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


@pytest.fixture
def pictures(tmp_path) -> Split:
    """a.png 80 x 40, b.png 40 x 80 and c.png 20 x 20, wide x high."""
    return fpn.data.load(write_coco(tmp_path / "pictures"))["train"]


def regions_for(split: Split, rows) -> Results:
    """Results from rows (image, x1, y1, x2, y2, score)."""
    return make_results(split, [(*row[:5], 0, row[5]) for row in rows])


def with_rows(split: Split, rows, file: Path) -> Split:
    return fpn.data.with_regions(split, fpn.data.write_regions(file, split, regions_for(split, rows)))


ROWS = [(2, 1, 2, 3, 4, 0.5), (0, 8, 4, 24, 20, 0.25), (0, 40, 10, 80, 40, 0.75), (1, 0, 0, 10, 20, 1.0)]


def test_regions_of_each_image_best_first(pictures, tmp_path):
    split = with_rows(pictures, ROWS, tmp_path / "r.safetensors")
    assert split.regions is not None and split.regions.offsets.tolist() == [0, 2, 3, 4]
    assert split.regions.of(0).tolist() == [[40, 10, 80, 40], [8, 4, 24, 20]]
    assert split.regions.scores.tolist() == [0.75, 0.25, 1.0, 0.5]
    part = split.select(np.array([2, 0]), "part")
    assert part.regions is not None and part.regions.offsets.tolist() == [0, 1, 3]
    assert part.regions.of(1).tolist() == [[40, 10, 80, 40], [8, 4, 24, 20]]
    again = fpn.data.with_regions(pictures.select(np.array([1, 2]), "fewer"), tmp_path / "r.safetensors")
    assert again.regions is not None and again.regions.of(1).tolist() == [[1, 2, 3, 4]]  # the file may hold more


def test_regions_follow_resizing_and_flips_as_boxes_do(pictures, tmp_path):
    split = with_rows(pictures, ROWS, tmp_path / "r.safetensors")
    doubled = DetectionDataset(split, resize_transform(80, 1000))
    sample = doubled[0]
    assert sample.regions is not None and sample.image.shape[1:] == (80, 160)
    assert sample.regions.tolist() == [[80, 20, 160, 80], [16, 8, 48, 40]]

    transform, mixing = training_transform(Augmentation(flip=1, vertical_flip=1), (80,), 1000, epochs=12)
    turned = DetectionDataset(split, transform, training=True, mixing=mixing)[0]
    assert turned.regions is not None and turned.regions.tolist() == [[0, 0, 80, 60], [112, 40, 144, 72]]
    assert turned.boxes.tolist() == [[112, 40, 144, 72], [0, 0, 80, 60]]

    scales, _ = training_transform(Augmentation(flip=0.5, jitter=0.5), (40, 60, 80, 120), 1000, epochs=12)
    several = DetectionDataset(split, scales, training=True)
    for epoch in range(8):
        changed = several[(epoch, 0)]
        assert changed.regions is not None
        torch.testing.assert_close(changed.regions.flip(0), changed.boxes)
    batch = collate([doubled[0], doubled[1], doubled[2]])
    assert batch is not None and batch.regions is not None
    assert batch.regions.valid.tolist() == [[True, True], [True, False], [True, False]]
    assert batch.regions.boxes[2].tolist() == [[4, 8, 12, 16], [0, 0, 0, 0]]
    assert batch.to("cpu").regions is not None


def test_images_without_regions_have_none(pictures, tmp_path):
    split = with_rows(pictures, [], tmp_path / "r.safetensors")
    batch = collate([DetectionDataset(split, resize_transform(64, 100))[0]])
    assert batch is not None and batch.regions is not None and batch.regions.boxes.shape == (1, 1, 4)
    fast = fpn.build("fast_rcnn", classes=split.classes, **TINY).eval()
    with torch.no_grad():
        assert fast.detect(batch).count.tolist() == [0]
    assert all(torch.isfinite(term) for term in fast.losses(batch).values())


def test_what_makes_other_images_is_refused(pictures, tmp_path):
    split = with_rows(pictures, ROWS, tmp_path / "r.safetensors")
    with pytest.raises(OptionError, match="cannot follow lsj, mosaic, mixup, copy_paste: leave these out"):
        resolve(Options(augment="strong", device="cpu"), split, 64)
    with pytest.raises(OptionError, match="cannot follow crop"):
        resolve(Options(crop=0.5, device="cpu"), split, 64)
    assert resolve(Options(epochs=60, device="cpu"), split, 64).augment == "light"
    assert resolve(Options(epochs=60, device="cpu"), pictures, 64).augment == "strong"
    cut, _ = training_transform(Augmentation(lsj=(0.5, 2.0)), (64,), 100, epochs=12)
    with pytest.raises(OptionError, match="saved proposals cannot follow what cuts images"):
        DetectionDataset(split, cut, training=True)[0]


def test_a_detector_that_needs_regions_says_so(pictures, tmp_path):
    fast = fpn.build("fast_rcnn", classes=pictures.classes, **TINY).eval()
    with pytest.raises(OptionError, match="the split 'train' has none: add another"):
        fpn.train(fast, {"train": pictures}, out=tmp_path / "run", **QUICK)
    with pytest.raises(OptionError, match="the split 'train' has none"):
        fpn.evaluate(fast, pictures, workers=0, device="cpu", progress=False)
    with pytest.raises(OptionError, match="the images came without"):
        fpn.predict(fast, pictures.path(0), device="cpu")
    assert not (tmp_path / "run").exists()


def changed_file(file: Path, out: Path, about: dict | None = None, **tensors: np.ndarray) -> Path:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as content:
        kept = json.loads(content.metadata()["fpn_regions"])
    save_file({**load_file(file), **tensors}, out, {"fpn_regions": json.dumps({**kept, **(about or {})})})
    return out


def test_files_that_do_not_fit_are_refused(pictures, tmp_path):
    good = fpn.data.write_regions(tmp_path / "good.safetensors", pictures, regions_for(pictures, ROWS))
    out, boxes = tmp_path / "bad.safetensors", load_file(good)["boxes"]

    def refused(file: Path, match: str, split: Split = pictures) -> None:
        with pytest.raises(DataError, match=match) as caught:
            fpn.data.with_regions(split, file)
        assert str(file) in str(caught.value)

    refused(tmp_path / "none.safetensors", "no such file of proposals")
    out.write_bytes(good.read_bytes()[:-7])
    refused(out, "not a whole file of proposals")
    out.write_text("boxes")
    refused(out, "not a whole file of proposals")
    save_file({"weight": boxes}, out)
    refused(out, "not a whole file of proposals")
    other = changed_file(good, out, {"files": ["x.png", "images/b.png", "images/c.png"]})
    refused(other, "no proposals for 1 of the 3 images of split 'train': images/a.png")
    refused(changed_file(good, out, {"format": 9}), "written in format 9")
    refused(changed_file(good, out, boxes=boxes[:-1]), "do not divide into 3 images")
    refused(changed_file(good, out, boxes=boxes.astype(np.float64)), "boxes is float64")
    refused(changed_file(good, out, offsets=np.array([0, 3, 2, 4])), "do not divide into 3 images")
    for bad in ([0, 0, 81, 9], [5, 5, 4, 9], [0, 0, np.nan, 9], [-1, 0, 9, 9]):
        rows = boxes.copy()
        rows[1] = bad
        refused(changed_file(good, out, boxes=rows), "proposal 1 of images/a.png is no box inside the image")
    smaller = replace(pictures, sizes=pictures.sizes // 2)
    refused(good, "images/a.png has 40x20 pixels, but its proposals were made when it had 80x40", smaller)


# Sharing features (Ren et al. 2015, section 3.2)


def test_four_steps_make_one_detector_with_shared_features(data, tmp_path):
    torch.manual_seed(0)
    first = fpn.build("rpn", **TINY, **FEW)
    second = fpn.build("fast_rcnn", classes=data.classes, **TINY, **HEAD)
    with_first = {name: saved(first, data[name], tmp_path / f"1-{name}.safetensors") for name in ("train", "val")}
    fpn.train(second, with_first, out=tmp_path / "2", **QUICK, batch=8)
    shared = {key: value.clone() for key, value in features_of(second).items()}
    assert any("running_mean" in key for key in shared), "the norms must be such as could move"

    third = on_features_of(fpn.build("rpn", **TINY, **FEW), second)
    before = third.rpn.objectness.weight.clone()
    run = fpn.train(third, data, out=tmp_path / "3", **QUICK, batch=8)
    with_third = {name: saved(third, data[name], tmp_path / f"3-{name}.safetensors") for name in ("train", "val")}
    fourth = on_features_of(second, second)
    fpn.train(fourth, with_third, out=tmp_path / "4", **QUICK, batch=8)
    for detector in (third, fourth, fpn.load(run.best)):
        assert all(torch.equal(value, shared[key]) for key, value in features_of(detector).items())
        assert not any(p.requires_grad for part in (detector.backbone, detector.pyramid) for p in part.parameters())
    assert not torch.equal(third.rpn.objectness.weight, before)
    assert not torch.equal(fourth.box_head.classes.weight, second.box_head.classes.weight)

    faster = joined(third, fourth)
    assert faster.spec.model == "faster_rcnn" and faster.proposals == FEW["proposals"] and faster.score == 0.2
    assert any(p.requires_grad for p in faster.backbone.parameters())
    again = fpn.load(fpn.weights.save(faster, tmp_path / "joined.safetensors"))
    assert again.spec == faster.spec and list(again.state_dict()) == list(faster.state_dict())
    for key, value in again.state_dict().items():
        part = third if key.startswith("rpn.") else fourth
        assert torch.equal(value, part.state_dict()[key])
    with pytest.raises(OptionError, match="differ in .* make both with on_features_of"):
        joined(first, fourth)


def test_features_that_do_not_fit_are_not_shared():
    fast = fpn.build("fast_rcnn", classes=["a"], **TINY)
    with pytest.raises(OptionError, match="differ in .* tensors, such as pyramid"):
        on_features_of(fpn.build("rpn", **{**TINY, "width": 24}), fast)
    with pytest.raises(OptionError, match="images of different sizes"):
        on_features_of(fpn.build("rpn", **{**TINY, "short": 96}), fast)
    with pytest.raises(OptionError, match="needs an rpn and a fast_rcnn, not rpn and faster_rcnn"):
        joined(fpn.build("rpn", **TINY), fpn.build("faster_rcnn", classes=["a"], **TINY))
    with pytest.raises(CheckpointError, match="do not fit"):
        joined(on_features_of(fpn.build("rpn", **TINY), fast), replace_head(fast))


def replace_head(fast: Detector) -> Detector:
    """With a head of other sizes than its spec says."""
    made = on_features_of(fast, fast)
    made.box_head = fpn.build("fast_rcnn", classes=["a"], **TINY, hidden=8).box_head
    return made
