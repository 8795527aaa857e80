"""The paper's rows (a) to (f): their anchors, what each is made from, how they learn and detect, what is refused."""

from __future__ import annotations

import pytest
import torch
from fresh import run
from torch import Tensor, nn

import fpn
from fpn.errors import OptionError
from fpn.model.backbone import Backbone, tiny
from fpn.model.box_head import StageHead
from fpn.model.detector import Detector
from fpn.model.faster_rcnn import FasterRCNN
from fpn.model.pyramid import FPN, SingleLevel
from fpn.model.rpn import RpnHead, SeparateRpnHeads
from fpn.paper.variants import VARIANTS, options
from fpn.spec import Spec, anchors_of, resolved
from fpn.structures import Batch, Regions, Targets
from fpn.weights.checkpoint import save
from fpn.weights.finetune import adapt

RESNET50 = {2: 256, 3: 512, 4: 1024, 5: 2048}
CHANNELS = {2: 4, 3: 6, 4: 10, 5: 12}
SMALL = {
    "backbone": "tiny",
    "short": 64,
    "long": 96,
    "width": 16,
    "anchor_sizes": (8, 16, 32, 64, 128),
}
REGIONS = {"hidden": 24, "pooled_size": 4, "box_examples": 16, "score": 0.0, "max_detections": 20, "canonical": 56.0}
PROPOSALS = {"proposals_per_level": (40, 20), "proposals": (60, 30), "rpn_examples": 32}
SETTINGS = {"rpn": PROPOSALS, "fast_rcnn": REGIONS, "faster_rcnn": PROPOSALS | REGIONS}
SIZES = torch.tensor([[75, 49], [33, 95]])


def built(letter: str, model: str = "faster_rcnn", **changes) -> Detector:
    """The detector of a row at small scale."""
    torch.manual_seed(0)
    base = {"model": model, **SMALL, **SETTINGS.get(model, {}), **changes}
    classes = None if model == "rpn" else ("a", "b")
    return fpn.build(classes=classes, weights="none", **options(letter, base))


def batch() -> Batch:
    """Two images of odd sizes, one with two objects and regions, the other with regions only, padded to 96x96."""
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[5.0, 7, 31, 40], [10, 3, 47, 74]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    targets = Targets(boxes, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[True, True], [False, False]]))
    regions = torch.tensor(
        [[[5.0, 8, 30, 40], [0, 0, 49, 75], [20, 20, 28, 30]], [[0, 0, 90, 30], [1, 2, 9, 9], [0] * 4]]
    )
    valid = torch.tensor([[True, True, True], [True, True, False]])
    return Batch(images, SIZES, SIZES, torch.arange(2), targets, torch.tensor([3, 4]), Regions(regions, valid))


def noise(channels: dict[int, int] = CHANNELS, height: int = 75, width: int = 301) -> dict[int, Tensor]:
    torch.manual_seed(1)
    return {k: torch.randn(2, n, -(-height // 2**k), -(-width // 2**k)) for k, n in channels.items()}


def changed(c: dict[int, Tensor], *levels: int) -> dict[int, Tensor]:
    return {k: x + 1 if k in levels else x for k, x in c.items()}


# Table 1: anchors


@pytest.mark.parametrize(
    "letter, levels, count",
    [
        ("a", {4: 47_250}, 47),  # 50 x 63 places, 15 anchors each
        ("b", {5: 12_000}, 12),  # 25 x 32
        ("c", {2: 150_000, 3: 37_500, 4: 9_450, 5: 2_400, 6: 624}, 200),  # 3 anchors a place
        ("d", {2: 150_000, 3: 37_500, 4: 9_450, 5: 2_400, 6: 624}, 200),
        ("e", {2: 150_000, 3: 37_500, 4: 9_450, 5: 2_400, 6: 624}, 200),
        ("f", {2: 750_000}, 750),  # 200 x 250 places, 15 anchors each
    ],
)
def test_anchors_of_table_1(letter, levels, count):
    """On images of 800 x 1000 as many as in the table, and of the same 15 shapes in each row."""
    spec = resolved(Spec(classes=("object",), **options(letter, {"model": "rpn"})), RESNET50)
    anchors = anchors_of(spec)
    maps = {k: torch.empty(1, 1, -(-800 // 2**k), -(-1000 // 2**k)) for k in anchors.sizes}
    found = anchors(maps, (800, 1000))
    assert {level: len(boxes) for level, boxes in found.items()} == levels
    assert round(sum(levels.values()) / 1000) == count
    boxes = torch.cat(list(found.values()))
    sides = torch.unique((boxes[:, 2:] - boxes[:, :2]).round(decimals=2), dim=0)
    paper = torch.tensor([[s / r**0.5, s * r**0.5] for s in (32, 64, 128, 256, 512) for r in (0.5, 1.0, 2.0)])
    torch.testing.assert_close(sides.sort(0)[0], paper.sort(0)[0], atol=0.02, rtol=0)
    assert len(sides) == 15


def test_rows_at_full_scale():
    spec = {letter: resolved(Spec(classes=("object",), **options(letter)), RESNET50) for letter in VARIANTS}
    assert {k: (s.levels, s.width) for k, s in spec.items()} == {
        "a": ((4, 4), 1024), "b": ((5, 5), 2048), "c": ((2, 6), 256), "d": ((2, 6), 256), "e": ((2, 6), 256),
        "f": ((2, 2), 256),
    }  # fmt: skip
    assert {k for k, s in spec.items() if s.settings["pooled_size"] == 14} == {"a"}
    assert {k for k, s in spec.items() if s.settings["proposals_per_level"] == (10000, 5000)} == {"a", "b", "f"}
    assert all(s.settings["proposals"] == (2000, 1000) for s in spec.values())


def test_rows_follow_the_scale_of_the_base():
    base = {
        **SMALL,
        **PROPOSALS,
        "hidden": 24,
        "pooled_size": 4,
        "anchor_scales": (1.0, 1.5),
        "extra": "max",
        "fuse": "average",
        "rpn_shared": False,
    }
    f, a, d = options("f", base), options("a", base), options("d", base)
    assert f["anchor_sizes"] == a["anchor_sizes"] == (8.0,) and a["levels"] == (4, 4) and "levels" not in f
    assert f["anchor_scales"] == a["anchor_scales"] == (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
    assert f["proposals_per_level"] == (200, 100) and a["pooled_size"] == 8 and f["pooled_size"] == 4
    assert f["fuse"] == "average" and not {"fuse", "hidden", "width", "extra", "rpn_shared"} & a.keys()
    assert d["rpn_shared"] is False and "fuse" not in d and options("c", base) == {"model": "faster_rcnn", **base}
    assert options("f", {**SMALL, "levels": (3, 7)})["levels"] == (3, 3)
    assert options("b", {"levels": (3, 5)})["anchor_scales"] == (1, 2, 4) and options("b")["levels"] == (5, 5)


def test_a_vgg_has_two_layers_on_c4():
    """Fast R-CNN's fc6 and fc7, where other backbones have stage 5; here C5 of a VGG is only its conv5, pooled."""
    a = options("a", {"backbone": "vgg16"})
    assert (
        a["hidden"] == 4096 and "box_head" not in a and options("a", {"backbone": "vgg16", "hidden": 8})["hidden"] == 8
    )
    assert resolved(Spec(classes=("a",), **a), {2: 256, 3: 512, 4: 512, 5: 512}).settings["pooled_size"] == 7
    assert "hidden" not in options("a", {"backbone": "vgg16", "model": "rpn"})
    with pytest.raises(
        OptionError, match="stage 5 of this backbone has no weights, so it is no head: use box_head layers"
    ):
        Backbone({4: nn.Conv2d(1, 2, 1), 5: nn.MaxPool2d(2)}, {4: 2, 5: 2}).give_up(5)


# What each row is made from


def test_d_makes_every_level_from_its_own_alone():
    pyramid, c = FPN(CHANNELS, 8, top_down=False), noise()
    p = pyramid(c)
    for level in CHANNELS:
        q = pyramid(changed(c, level))
        assert {k for k in p if not torch.equal(p[k], q[k])} == ({5, 6} if level == 5 else {level})


def test_e_makes_every_level_from_c5_alone():
    pyramid, c = FPN(CHANNELS, 8, lateral=False), noise()
    assert list(pyramid.lateral) == ["5"]
    p, q, r = pyramid(c), pyramid(changed(c, 2, 3, 4)), pyramid(changed(c, 5))
    assert {k: x.shape for k, x in p.items()} == {k: x.shape for k, x in FPN(CHANNELS, 8)(c).items()}
    assert all(torch.equal(p[k], q[k]) and not torch.equal(p[k], r[k]) for k in p)


def test_c_without_weights_in_its_lateral_connections_is_e():
    whole, e, c = FPN(CHANNELS, 8), FPN(CHANNELS, 8, lateral=False), noise()
    for level in ("2", "3", "4"):
        nn.init.zeros_(whole.lateral[level].weight)
    e.load_state_dict({key: value for key, value in whole.state_dict().items() if key in e.state_dict()})
    p, q = whole(c), e(c)
    assert all(torch.equal(p[k], q[k]) for k in p)


def test_c_of_nothing_but_one_level_is_d_there():
    """With the other levels' maps and biases at 0 nothing comes down to it."""
    whole, d, c = FPN(CHANNELS, 8), FPN(CHANNELS, 8, top_down=False), noise()
    d.load_state_dict(whole.state_dict())
    p, q = whole({k: x * (k == 3) for k, x in c.items()}), d(c)
    assert torch.equal(p[3], q[3]) and not torch.equal(p[3], whole(c)[3])


@pytest.mark.parametrize("fuse, lateral", [("sum", True), ("average", True), ("sum", False)])
def test_f_gives_the_finest_level_of_the_whole_pyramid(fuse, lateral):
    whole = FPN(CHANNELS, 8, fuse=fuse, lateral=lateral)
    f, c = FPN(CHANNELS, 8, (2, 2), fuse=fuse, lateral=lateral, finest=True), noise()
    assert list(f.output) == ["2"] and f.own == (2, 3, 4, 5) and f.levels == (2,)
    f.load_state_dict({key: value for key, value in whole.state_dict().items() if key in f.state_dict()})
    p = f(c)
    assert list(p) == [2] and torch.equal(p[2], whole(c)[2])
    assert not torch.equal(p[2], f(changed(c, 5))[2])


def test_a_single_level_is_the_backbones():
    single, c = SingleLevel(CHANNELS, 4), noise()
    assert single(c) == {4: c[4]} and single.levels == (4,) and single.width == 10 and not list(single.parameters())


def test_separate_rpn_heads_of_equal_weights_are_the_shared_one():
    shared, separate = RpnHead(8, 3), SeparateRpnHeads(range(2, 7), 8, 3)
    for head in separate.heads.values():
        head.load_state_dict(shared.state_dict())
    p = FPN(CHANNELS, 8)(noise())
    one, many = shared(p), separate(p)
    assert list(many.logits) == list(p) and sum(1 for _ in separate.parameters()) == 5 * 6
    for level in p:
        assert torch.equal(one.logits[level], many.logits[level]) and torch.equal(
            one.offsets[level], many.offsets[level]
        )
    nn.init.ones_(separate.heads["3"].objectness.bias)
    again = separate(p)
    assert [k for k in p if not torch.equal(again.logits[k], one.logits[k])] == [3]


def test_stage_5_leaves_the_backbone_for_the_head():
    """On all of C4 it makes C5; no weight is there twice, none is lost."""
    torch.manual_seed(0)
    backbone, images = tiny().eval(), torch.randn(2, 3, 64, 64)
    before, keys = backbone(images), sum(1 for _ in backbone.parameters())
    head = StageHead(backbone.give_up(5), 192, classes=2).eval()
    assert list(backbone(images)) == [2, 3, 4] and backbone.channels == {2: 32, 3: 64, 4: 128}
    assert torch.equal(head.stage(backbone(images)[4]), before[5])
    assert sum(1 for _ in (*backbone.parameters(), *head.stage.parameters())) == keys
    logits, offsets = head(before[4])
    assert torch.equal(logits, head.classes(before[5].mean((2, 3)))) and offsets.shape == (2, 2, 4)


def test_row_a_starts_with_the_backbones_weights_in_its_head():
    detector = built("a")
    assert isinstance(detector, FasterRCNN) and isinstance(detector.box_head, StageHead)
    torch.manual_seed(0)
    stage = tiny().stages["5"]
    assert all(torch.equal(v, stage.state_dict()[k]) for k, v in detector.box_head.stage.state_dict().items())
    names = [key for key, _ in detector.named_parameters()]
    assert not [key for key in names if key.startswith("backbone.stages.5")] and detector.pooled_size == 8
    assert all(p.requires_grad for p in detector.parameters())


# They learn, detect, and come back from files


@pytest.mark.parametrize("model", SETTINGS)
@pytest.mark.parametrize("letter", [*VARIANTS, "c separate"])
def test_every_row_learns_and_detects(model, letter):
    separate = {"rpn_shared": False} if letter == "c separate" and model != "fast_rcnn" else {}
    detector, some = built(letter[0], model, **separate), batch()
    losses = detector.train().losses(some)
    assert losses.keys() == detector.loss_weights.keys() and all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    # Weights without a gradient stop DistributedDataParallel.
    learning = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    assert not [name for name, grad in learning.items() if grad is None or not grad.isfinite().all()]
    asleep = {name.split(".")[2] for name, p in detector.named_parameters() if not p.requires_grad}
    assert asleep == ({"5"} if letter == "a" and model == "rpn" else set())  # C4 is made without stage 5
    with torch.no_grad():
        found = detector.eval().detect(some)
    assert found.count.min() > 0 and found.boxes.isfinite().all()
    assert (found.boxes <= SIZES[:, None, [1, 0, 1, 0]]).all() and (found.boxes >= 0).all()
    # P6 is for the RPN alone.
    levels = set(detector.levels) - ({6} if model != "rpn" else set())
    assert {*found.levels.unique().tolist()} <= {-1, *levels}


@pytest.mark.parametrize("letter, model", [("a", "faster_rcnn"), ("a", "fast_rcnn"), ("b", "rpn"), ("e", "faster_rcnn"),
                                           ("f", "faster_rcnn")])  # fmt: skip
def test_rows_come_back_from_checkpoints(letter, model, tmp_path):
    detector, some = built(letter, model).eval(), batch()
    again = fpn.load(save(detector, tmp_path / "row.safetensors"))
    assert again.spec == detector.spec and again.levels == detector.levels
    with torch.no_grad():
        ours, theirs = detector.detect(some), again.detect(some)
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.scores, theirs.scores)


def test_separate_heads_and_the_stage_head_are_fine_tuned_for_other_classes(tmp_path):
    for detector, anew in ((built("a"), "box_head"), (built("c", rpn_shared=False), "box_head")):
        tuned = adapt(detector, ["x", "y", "z"])
        assert {name.rsplit(".", 1)[0] for name in tuned.replaced} == {f"{anew}.classes", f"{anew}.offsets"}
        assert tuned.detector.spec.box_head == detector.spec.box_head


@pytest.mark.parametrize(
    "letter, model, changes",
    [
        ("f", "mask_rcnn", {}),
        ("d", "cascade_mask_rcnn", {}),
        ("b", "cascade_rcnn", {"class_agnostic": True}),
        ("e", "retinanet", {"levels": (3, 7)}),
        ("d", "fcos", {"levels": (3, 7), "width": 32}),
        ("a", "faster_rcnn", {"backbone": "mobilenet_v2"}),
        ("a", "faster_rcnn", {"backbone": "resnet18", "class_agnostic": True}),
    ],
)
def test_other_models_and_backbones(letter, model, changes):
    settings = {} if model in ("retinanet", "fcos") else PROPOSALS | REGIONS
    base = {"model": model, **SMALL, **settings, "backbone_norm": "frozen", **changes}
    detector, some = fpn.build(classes=("a", "b"), weights="none", **options(letter, base)), batch()
    assert some.targets is not None
    masks = torch.zeros(2, 2, 96, 96, dtype=torch.uint8)
    some = Batch(some.images, SIZES, SIZES, some.indices,
                 Targets(some.targets.boxes, some.targets.labels, some.targets.valid, masks), some.keys)  # fmt: skip
    torch.stack(list(detector.train().losses(some).values())).sum().backward()
    assert not [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        assert detector.eval().detect(some).boxes.isfinite().all()


@pytest.mark.slow
def test_row_a_exports_with_dynamic_height_and_width():
    """In a process of its own: the tests' shape checks wrap every function, and the tracer sees them."""
    code = """
        import torch, fpn
        from torch.export import Dim
        from fpn.paper.variants import options
        from fpn.structures import Batch

        def batch(height, width):
            sizes = torch.tensor([[height, width], [height - 8, width]])
            return Batch(torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8), sizes, sizes, torch.arange(2))

        torch.manual_seed(0)
        base = dict(backbone="tiny", width=16, hidden=16, score=0.2, proposals_per_level=(20, 20), proposals=(50, 50))
        sides = {2: 32 * Dim("h", min=3, max=40), 3: 32 * Dim("w", min=3, max=40)}
        shapes = {"batch": [sides, {}, {}, {}]}
        detector = fpn.build(classes=["a", "b"], weights="none", **options("a", base)).eval()
        for part in (detector.box_head, detector.rpn):
            for layer in (getattr(part, "classes", None) or part.objectness, part.offsets):
                torch.nn.init.normal_(layer.weight, std=0.2)
        with torch.no_grad():
            program = torch.export.export(detector, (batch(128, 160),), dynamic_shapes=shapes).module()
            for shape in ((96, 320), (224, 128)):
                some = batch(*shape)
                ours, theirs = detector.detect(some), program(some)
                assert ours.count.sum() > 0 and torch.equal(ours.labels, theirs.labels)
                torch.testing.assert_close(ours.boxes, theirs.boxes, atol=1e-2, rtol=0)
    """
    run(code)


# What is refused


@pytest.mark.parametrize(
    "model, given, words",
    [
        ("faster_rcnn", {"top_down": False, "lateral": False}, "nothing would make the levels below C5"),
        ("faster_rcnn", {"neck": "pafpn", "top_down": False}, "top_down False: pafpn has no such option, only fpn"),
        ("faster_rcnn", {"neck": "none", "lateral": False}, "lateral False: none has no such option, only fpn"),
        ("faster_rcnn", {"neck": "none", "extra": "p5"}, "extra 'p5': none has no such option"),
        ("faster_rcnn", {"lateral": False, "fuse": "average"}, "fuse 'average': without top_down or lateral nothing"),
        ("faster_rcnn", {"finest": True, "top_down": False}, "finest without top_down"),
        ("faster_rcnn", {"finest": True, "levels": (2, 6)}, r"levels \(2, 6\): finest gives one level"),
        ("faster_rcnn", {"finest": True, "rpn_shared": False}, "rpn_shared False: finest leaves one level"),
        ("faster_rcnn", {"finest": True, "anchor_sizes": (8, 16)}, r"sizes \[8, 16\]: the levels P2 to P2 need 1"),
        ("faster_rcnn", {"neck": "none", "levels": (4, 5)}, r"levels \(4, 5\): neck none gives one level"),
        ("faster_rcnn", {"neck": "none", "levels": (7, 7)}, "cannot stand on a backbone with levels 2, 3, 4, 5"),
        ("faster_rcnn", {"neck": "none", "width": 64}, "width 64: without a neck it is that of C5 of tiny, 192"),
        ("faster_rcnn", {"box_head": "conv5"}, "unknown box head 'conv5'; there are layers, stage"),
        ("faster_rcnn", {"box_head": "stage"}, "stage 5 takes regions of C4 as they are: neck none, not fpn"),
        ("faster_rcnn", {"box_head": "stage", "neck": "none", "levels": (5, 5)}, "takes regions of C4: 4 4"),
        ("faster_rcnn", {"box_head": "stage", "neck": "none", "hidden": 8, "box_convolutions": 2},
         "box_convolutions, hidden: box_head 'stage' has no layers but"),
        ("cascade_rcnn", {"box_head": "stage", "neck": "none"}, "box_head 'stage': cascade_rcnn has no such option"),
        ("rpn", {"box_head": "stage", "neck": "none"}, "box_head 'stage': rpn has no such option"),
        ("fast_rcnn", {"rpn_shared": False}, "rpn_shared False: fast_rcnn has no such option"),
        ("mask_rcnn", {"neck": "none"}, "neck none: mask_rcnn has no such option, only rpn, fast_rcnn, faster_rcnn"),
        ("retinanet", {"finest": True}, "finest: retinanet has no such option, only rpn"),
        ("atss", {"neck": "none"}, "neck none: atss has no such option"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(model, given, words):
    with pytest.raises(OptionError, match=words):
        fpn.build(model, backbone="tiny", classes=None if model == "rpn" else ("a",), weights="none", **given)


def test_backbones_without_stages_are_refused():
    own = tiny()
    with pytest.raises(OptionError, match="the stage 5 of module:Backbone cannot be told apart; use box_head layers"):
        fpn.build(backbone=own, classes=("a",), neck="none", box_head="stage")
    with pytest.raises(OptionError, match="lateral False: the levels of vit_b_32 do not make each other"):
        fpn.build(backbone="vit_b_32", classes=("a",), weights="none", lateral=False)


def test_rows_are_made_from_the_whole_fpn():
    with pytest.raises(OptionError, match="row 'g': the tables have a, b, c, d, e, f"):
        options("g")
    with pytest.raises(OptionError, match="neck 'bifpn', finest True: the rows of the tables are made from the FPN"):
        options("d", {"neck": "bifpn", "finest": True})
