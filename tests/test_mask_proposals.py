"""Mask proposals: which window learns which object, in numbers; the same windows dense and gathered; that it learns."""

import json

import pytest
import torch
import torch.nn.functional as F
from fresh import run
from torch import Tensor

import fpn
from fpn.cli import main
from fpn.data import class_agnostic, loader, resize_transform
from fpn.data.generated import generate
from fpn.errors import OptionError
from fpn.evaluation.evaluate import detect_split
from fpn.evaluation.proposals import average_recall
from fpn.inference.finder import detect_original
from fpn.model.mask_proposals import MaskProposals, Places, assign, scales_of, windows_at
from fpn.model.matching import BACKGROUND
from fpn.structures import Batch, Targets

SMALL = {"backbone": "tiny", "weights": "none", "width": 16, "hidden": 32}


def built(**options: object) -> MaskProposals:
    torch.manual_seed(0)
    detector = fpn.build("mask_proposals", **{**SMALL, **options})
    assert isinstance(detector, MaskProposals)
    return detector


def batch_of(padded: tuple[int, int], sizes: list[tuple[int, int]], boxes: Tensor | None = None) -> Batch:
    """Noise; with boxes (B, N, 4), of whole pixels, targets whose masks fill them. An empty box is padding."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(sizes), 3, *padded), dtype=torch.uint8, generator=generator)
    shape, targets = torch.tensor(sizes), None
    if boxes is not None:
        masks = torch.zeros(*boxes.shape[:2], *padded, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks.flatten(0, 1), boxes.flatten(0, 1).int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        targets = Targets(boxes, torch.zeros(boxes.shape[:2], dtype=torch.int64), valid, masks)
    return Batch(pixels, shape, shape, torch.arange(len(sizes)), targets, torch.arange(len(sizes)))


def places_of(detector: MaskProposals, height: int, width: int) -> Places:
    """The windows on an image of this size, whatever is in it."""
    sides = {k: (-(-height // 2**k), -(-width // 2**k)) for k in detector.levels}
    return detector.places({k: torch.zeros(1, 1, *side) for k, side in sides.items()}, (height, width))


def taken(
    detector: MaskProposals, boxes: list[list[float]], size: tuple[int, int] = (128, 192)
) -> dict[int, set[tuple[int, int, int, int]]]:
    """For each object the windows that learn it: (level, cells of the window, column, row)."""
    places = places_of(detector, *size)
    truth = torch.tensor(boxes).reshape(1, -1, 4)
    index = assign(truth, torch.ones(truth.shape[:2], dtype=torch.bool), places, detector.sides, detector.reach)[0]
    found: dict[int, set[tuple[int, int, int, int]]] = {n: set() for n in range(len(boxes))}
    for place in (index != BACKGROUND).nonzero()[:, 0]:
        window = detector.windows[int(places.windows[place])]
        found[int(index[place])].add((int(places.levels[place]), window, *places.cells[place].tolist()))
    return found


def test_an_object_is_learnt_by_the_windows_of_its_size_around_its_centre():
    # 64 x 40 around (94, 62): the cells of P3 whose centres, 8 i + 4, are at most 8 pixels from it along both axes.
    assert taken(built(), [[62.0, 42, 126, 82]]) == {0: {(3, 5, x, y) for x in (11, 12) for y in (7, 8)}}
    # At the middle of a cell of P4, 16 i + 8, its neighbours are exactly one stride away.
    assert taken(built(), [[40.0, 0, 168, 112]]) == {0: {(4, 5, x, y) for x in (5, 6, 7) for y in (2, 3, 4)}}
    # With a reach of half a stride only the cell that it is in.
    assert taken(built(reach=0.5), [[62.0, 42, 126, 82]]) == {0: {(3, 5, 11, 7)}}


@pytest.mark.parametrize(
    "side, windows, wanted",
    [
        (76.0, (5, 7), (3, 5)),  # 64 * 2**0.25 is 76.1
        (77.0, (5, 7), (3, 7)),
        (107.0, (5, 7), (3, 7)),  # 128 / 2**0.25 is 107.6
        (108.0, (5, 7), (4, 5)),
        (90.0, (5,), (3, 5)),  # 64 * 2**0.5 is 90.5
        (91.0, (5,), (4, 5)),
        (90.0, (7,), (3, 7)),
        (2.0, (5, 7), (2, 5)),  # smaller than all, and larger
        (9000.0, (5, 7), (6, 7)),
    ],
)
def test_the_nearest_size_in_octaves_learns_it(side, windows, wanted):
    found = taken(built(windows=windows), [[90 - side / 2, 62 - side / 4, 90 + side / 2, 62 + side / 4]])[0]
    assert found and {place[:2] for place in found} == {wanted}


def test_of_several_objects_a_window_learns_the_nearest():
    # Centres at 90 and 98; both reach column 11 of P3, whose centre is 92.
    found = taken(built(), [[58.0, 42, 122, 82], [66.0, 42, 130, 82]])
    assert {x for _, _, x, _ in found[0]} == {10, 11} and {x for _, _, x, _ in found[1]} == {12}
    # Two in one place: the first. Of two sizes: both.
    assert not taken(built(), [[62.0, 42, 126, 82], [62.0, 42, 126, 82]])[1]
    assert all(taken(built(), [[62.0, 42, 126, 82], [78.0, 46, 110, 78]]).values())


def test_the_regions_of_the_masks_in_pixels():
    detector = built()
    places = places_of(detector, 128, 192)
    regions = places.regions(detector.padding)
    count = 2 * (32 * 48 + 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3)
    assert len(regions) == count
    # The first cell of P2 is centred on (2, 2); 40 pixels around it, 40 sqrt 2 for the window of 7 x 7.
    assert regions[0].tolist() == [-18, -18, 22, 22]
    torch.testing.assert_close(regions[1], 2 + 20 * 2**0.5 * torch.tensor([-1.0, -1, 1, 1]))
    assert (regions[:, 2] - regions[:, 0])[places.windows == 0].unique().tolist() == [40, 80, 160, 320, 640]
    # The last is the lower right cell of P6, centred on (160, 96).
    assert regions[-2].tolist() == [160 - 320, 96 - 320, 160 + 320, 96 + 320] and places.cells[-1].tolist() == [2, 1]


def test_one_example_in_four_is_positive():
    detector = built()
    for head in detector.heads:
        torch.nn.init.zeros_(head.score.weight)
        torch.nn.init.constant_(head.score.bias, 20.0)  # sure of an object everywhere: wrong costs 20, right nothing
        torch.nn.init.zeros_(head.mask.weight)
    corner = torch.cartesian_prod(torch.arange(5) * 24.0, torch.arange(5) * 24.0)
    many = torch.cat([corner, corner + 22], dim=1)[None]  # 25 objects, of 4 windows or more each
    losses = detector.losses(batch_of((128, 128), [(128, 128)], many))
    assert losses["score"].item() == pytest.approx(20 * 0.75, abs=1e-4)
    assert losses["mask"].item() == pytest.approx(0.6931472, abs=1e-5)  # log 2
    assert detector.losses(batch_of((128, 128), [(128, 128)], many[:, :1]))["score"] > 20 * 0.85


def test_no_objects():
    detector = built()
    for count in (0, 2):  # no row, or only padding
        losses = detector.losses(batch_of((64, 96), [(64, 96), (50, 70)], torch.zeros(2, count, 4)))
        assert losses["mask"] == 0 and losses["score"] > 0
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_every_parameter_learns():
    detector = built()
    boxes = torch.tensor([[[8.0, 10, 40, 38], [50, 20, 94, 60]], [[2, 2, 66, 50], [10, 5, 22, 15]]])
    losses = detector.losses(batch_of((64, 96), [(64, 96), (55, 70)], boxes))
    sum(detector.loss_weights[name] * value for name, value in losses.items()).backward()
    assert set(losses) == set(detector.loss_weights)
    # Levels above the objects' have nothing but their scores to learn.
    assert [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("windows", [(5,), (7,), (5, 7), (7, 3)])
@pytest.mark.parametrize("size", [(64, 96), (33, 70)])
def test_windows_cut_out_score_as_a_convolution_does(windows, size):
    detector = built(windows=windows).eval()
    for head in detector.heads:
        torch.nn.init.normal_(head.score.weight)
    batch = batch_of((64, 96), [size, size])
    with torch.no_grad():
        pyramid = detector.features(batch)
        dense = detector.rate(pyramid)
        places = detector.places(pyramid, (64, 96))
        scores, masks = detector.judge(pyramid, places, torch.arange(dense.shape[1]).expand(2, -1))
    assert dense.std() > 0.1 and masks.shape == (*dense.shape, 14, 14)
    torch.testing.assert_close(scores, dense, atol=1e-4, rtol=1e-4)


def test_windows_are_cut_out_with_zeros_around_the_map():
    maps = {2: torch.randn(2, 3, 5, 4), 3: torch.randn(2, 3, 3, 2)}
    levels, cells = torch.tensor([[2, 3], [3, 2]]), torch.tensor([[[3, 0], [1, 2]], [[0, 0], [1, 4]]])
    found = windows_at(maps, levels, cells, 3)
    for n, (image, level, (x, y)) in enumerate(zip((0, 0, 1, 1), (2, 3, 3, 2), cells.flatten(0, 1), strict=True)):
        assert torch.equal(found[n], F.pad(maps[level][image], (1, 1, 1, 1))[:, y : y + 3, x : x + 3])


@pytest.mark.parametrize("padded, size", [((64, 96), (64, 96)), ((64, 96), (41, 67)), ((32, 32), (1, 1))])
def test_detect_gives_windows_of_the_image_and_nothing_of_its_padding(padded, size):
    detector = built(max_detections=4000).eval()
    with torch.no_grad():
        found = detector.detect(batch_of(padded, [size, size]))
    cells = sum(-(-size[0] // 2**k) * -(-size[1] // 2**k) for k in detector.levels)
    assert found.count.tolist() == [2 * cells] * 2 and found.masks is not None
    one = found[0]
    assert one.masks.shape == (2 * cells, 14, 14) and ((one.masks > 0) & (one.masks < 1)).all()
    assert (one.scores.diff() <= 0).all() and (one.labels == 0).all() and one.names[0] == "object"
    assert set(one.levels.tolist()) == set(detector.levels)
    for part in (found.boxes, found.scores, found.masks):
        assert not part[0, 2 * cells :].any()
    assert (found.labels[0, 2 * cells :] == -1).all() and (found.levels[0, 2 * cells :] == -1).all()


def test_weights_that_went_nan_detect_nothing():
    detector = built(max_detections=50).eval()
    torch.nn.init.constant_(detector.heads[0].hidden.weight, torch.nan)
    torch.nn.init.constant_(detector.heads[1].hidden.weight, torch.nan)
    with torch.no_grad():
        found = detector.detect(batch_of((64, 64), [(64, 64)]))
    assert found.count.tolist() == [0] and not found.boxes.any() and not found.masks.any()


def test_regions_beyond_the_image_keep_their_place_in_the_original():
    detector = built(max_detections=300).eval()
    batch = batch_of((64, 64), [(64, 60)])
    with torch.no_grad():
        small, same = detector.detect(batch), detect_original(detector, batch)
        double = detect_original(detector, Batch(batch.images, batch.sizes, batch.sizes * 2, batch.indices))
    assert (small.boxes[..., 2] > 60).any()  # or there is nothing to see
    assert torch.equal(small.boxes, same.boxes)
    torch.testing.assert_close(double.boxes, small.boxes * 2)


def test_options_that_cannot_work():
    assert scales_of((5, 7, 3)) == pytest.approx((1, 2**0.5, 0.5**0.5))
    for windows, words in (((), "at least one"), ((4,), "odd"), ((5, 5), "one size"), ((9, 11), "one size")):
        with pytest.raises(OptionError, match=words):
            built(windows=windows)
    for options, words in (
        ({"reach": 0.4}, "reach 0.4"),
        ({"padding": -0.1}, "padding -0.1"),
        ({"anchor_ratios": (2.0,)}, "leave out anchor_ratios"),
        ({"anchor_scales": (1.0, 2.0)}, "must be one"),
        ({"anchor_sizes": (8.0, 16.0)}, "levels P2 to P6 need 5"),
        ({"mask_size": 0}, "1 or more"),
        ({"positive_fraction": 1.5}, "0 to 1"),
        ({"classes": ("cat",)}, "object"),
        ({"box_nms": 0.5}, "has no option box_nms"),
    ):
        with pytest.raises(OptionError, match=words):
            built(**options)
    with pytest.raises(OptionError, match="no outlines"):
        batch = batch_of((64, 64), [(64, 64)], torch.tensor([[[8.0, 8, 40, 40]]]))
        targets = Targets(batch.targets.boxes, batch.targets.labels, batch.targets.valid)
        built().losses(Batch(batch.images, batch.sizes, batch.sizes, batch.indices, targets))


def test_the_defaults_are_the_papers():
    detector = fpn.build("mask_proposals", backbone="tiny", weights="none")
    assert detector.sides == pytest.approx([32 * 2 ** (n / 2) for n in range(10)])
    assert detector.spec.width == 128 and detector.levels == (2, 3, 4, 5, 6) and detector.classes == ("object",)
    shapes = {name: tuple(p.shape) for name, p in detector.heads[1].named_parameters() if name.endswith("weight")}
    assert shapes == {
        "hidden.weight": (512, 128, 7, 7),
        "score.weight": (1, 512, 1, 1),
        "mask.weight": (196, 512, 1, 1),
    }
    assert detector.loss_weights == {"score": 1.0, "mask": 10.0} and detector.max_detections == 1000
    assert detector.examples == 128 and detector.positive_fraction == 0.25  # 2048 of 16 images, 1:3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "shapes", images=2, size=(64, 64), seed=0)


@pytest.fixture(scope="module")
def learnt(data):
    """A detector that has seen two images 30 times, the images with their outlines, and its proposals on them."""
    split = fpn.data.load(data, outlines=True)["train"]
    sizes = {"anchor_sizes": (8.0, 16.0, 32.0, 64.0), "levels": (2, 5)}
    detector = built(short=64, width=32, hidden=64, max_detections=100, **sizes)
    assert average_recall(split, detect_split(detector, split, workers=0, progress=False), kind="segm")["AR100"] < 0.05
    batch = next(iter(loader(class_agnostic(split), resize_transform(64, 107), 2, False, workers=0, masks=True)))
    assert int(batch.targets.valid.sum()) == len(split.boxes) > 10
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    detector.train()
    for _ in range(30):
        losses = detector.losses(Batch(batch.images, batch.sizes, batch.sizes, batch.indices, batch.targets))
        optimizer.zero_grad()
        sum(detector.loss_weights[name] * value for name, value in losses.items()).backward()
        optimizer.step()
    return detector, split, detect_split(detector, split, workers=0, progress=False)


def test_two_images_are_learnt_by_heart(learnt):
    _, split, results = learnt
    assert average_recall(split, results, kind="segm")["AR100"] > 0.7
    assert average_recall(split, results, limits=(5, 50), kind="segm")["AR50"] > 0.6


def test_a_checkpoint_finds_the_same(learnt, tmp_path):
    detector, split, _ = learnt
    file = fpn.weights.save(detector, tmp_path / "masks.safetensors")
    image = split.path(0)
    mine, other = fpn.predict(detector, image, device="cpu"), fpn.predict(fpn.load(file), image, device="cpu")
    assert len(mine) > 5 and mine.masks.shape[1:] == (14, 14) and set(mine.names) == {"object"}
    assert torch.equal(mine.boxes, other.boxes) and torch.equal(mine.masks, other.masks)


def test_predict_draws_and_writes_them(learnt, tmp_path):
    detector, split, _ = learnt
    file = fpn.weights.save(detector, tmp_path / "masks.safetensors")
    main(["predict", str(file), str(split.path(0)), "--out", str(tmp_path / "out"), "--device", "cpu"])
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert "counts" in json.dumps(written) and list((tmp_path / "out").glob("**/*.jpg"))


def test_training_needs_nothing_but_outlines(data, tmp_path):
    detector = built(short=64, anchor_sizes=(8.0, 16.0, 32.0, 64.0, 128.0), max_detections=50)
    folder = fpn.data.load(data, outlines=True)
    trained = fpn.train(detector, folder, out=tmp_path / "run", epochs=1, batch=2, workers=0, device="cpu", quiet=True)
    metrics = fpn.evaluate(fpn.load(trained.best), folder["val"], device="cpu", workers=0, progress=False)
    assert metrics.main == "mask_AR1000" and 0 <= metrics.masks["AR1000"] <= 1


PRELUDE = """
    import torch, fpn
    from fpn.structures import Batch

    torch.manual_seed(0)
    small = {"backbone": "tiny", "weights": "none", "width": 16, "hidden": 32, "max_detections": 50}
    detector = fpn.build("mask_proposals", **small).eval()
    for head in detector.heads:
        torch.nn.init.normal_(head.score.weight, std=0.2)
        torch.nn.init.normal_(head.mask.weight, std=0.2)

    def batch(height, width, count):
        images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        sizes = torch.tensor([[height, width]] * count) - torch.arange(count)[:, None] * 8
        return Batch(images, sizes, sizes, torch.arange(count))

    def same(a, b):
        assert a.count.sum() > 0 and torch.equal(a.count, b.count) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.levels, b.levels) and a.masks.std() > 0.1
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.masks, b.masks, atol=1e-3, rtol=0)
"""


def test_detect_is_one_graph():
    code = """
        compiled = torch.compile(detector.detect, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            some = batch(64, 96, 2)
            same(detector.detect(some), compiled(some))
    """
    run(PRELUDE, code)


@pytest.mark.slow
def test_detect_exports_with_dynamic_height_and_width():
    code = """
        from torch.export import Dim
        sides = {2: 32 * Dim("h", min=3, max=40), 3: 32 * Dim("w", min=3, max=40)}
        shapes = {"batch": [sides, {}, {}, {}]}
        with torch.no_grad():
            exported = torch.export.export(detector, (batch(128, 160, 2),), dynamic_shapes=shapes).module()
            for shape in ((128, 160, 2), (96, 320, 2), (224, 128, 2)):
                some = batch(*shape)
                same(detector.detect(some), exported(some))
    """
    run(PRELUDE, code)
