"""Going on from a trained detector with other classes."""

import pytest
import torch
from torch import nn

import fpn
from fpn.errors import CheckpointError
from fpn.weights import adapt


def tiny(classes=("cat", "dog"), **options):
    torch.manual_seed(0)
    return fpn.build(backbone="tiny", weights="none", classes=classes, short=64, width=16, hidden=16, **options)


def test_other_classes_replace_the_layers_by_class_and_nothing_else():
    source = tiny()
    tuned = adapt(source, ("cat", "dog", "horse"))
    assert {name.rsplit(".", 1)[0] for name in tuned.replaced} == {"box_head.classes", "box_head.offsets"}
    assert tuned.detector.classes == ("cat", "dog", "horse")
    for name, value in tuned.detector.state_dict().items():
        if name not in tuned.replaced:
            assert torch.equal(value, source.state_dict()[name]), name
    assert "box_head.classes, box_head.offsets" in str(tuned)


def test_as_many_classes_of_other_names_start_anew_too():
    source = tiny()
    tuned = adapt(source, ("axe", "saw"))
    assert {name.rsplit(".", 1)[0] for name in tuned.replaced} == {"box_head.classes", "box_head.offsets"}
    assert not torch.equal(tuned.detector.state_dict()["box_head.classes.weight"], source.box_head.classes.weight)


def test_one_that_proposes_regions_knows_no_classes_and_keeps_everything():
    source = fpn.build("rpn", backbone="tiny", weights="none", short=64, width=16)
    tuned = adapt(source, ("axe", "saw"))
    assert not tuned.replaced and tuned.detector.classes == ("object",)


def test_the_same_classes_keep_everything():
    source = tiny()
    tuned = adapt(source, source.classes, short=96)
    assert not tuned.replaced and tuned.detector.spec.sides == (96, 160)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in tuned.detector.state_dict().items())


def test_settings_of_the_source_stay_and_can_be_changed():
    source = tiny(score=0.2, box_nms=0.7)
    detector = adapt(source, ("a",), max_detections=7).detector
    assert (detector.score, detector.box_nms, detector.max_detections) == (0.2, 0.7, 7)


def test_what_belongs_to_the_weights_cannot_be_changed():
    with pytest.raises(CheckpointError, match="a detector with width 16: leave out width"):
        adapt(tiny(), ("a",), width=32, backbone="tiny")


def test_a_setting_that_changes_layers_is_refused():
    with pytest.raises(CheckpointError, match="make box_head.fc1.weight of another shape than the weights have"):
        adapt(tiny(), ("a",), pooled_size=5)


def test_a_class_of_any_name_is_a_class():
    source = tiny(("one more class", "+", "a+b"))
    assert adapt(source, ("+", "one more class", "++")).replaced


class Own(nn.Module):
    """A user's own backbone, which can be frozen."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, 8, 3, stride, 1) for n, stride in ((3, 4), (8, 2), (8, 2), (8, 2)))

    def forward(self, x):
        levels = {}
        for level, conv in enumerate(self.convs, 2):
            x = levels[level] = conv(x).relu()
        return levels

    def freeze(self, stages):
        self.convs[: stages - 1].requires_grad_(False)


@pytest.mark.parametrize("given, learning", [({}, 2), ({"freeze": 0}, 4), ({"freeze": 2}, 3)])
def test_how_much_of_an_own_backbone_learns(given, learning):
    source = fpn.build(backbone=Own(), classes=("a",), weights="none", short=64, width=16, hidden=16, freeze=3)
    backbone = adapt(source, ("b",), **given).detector.backbone
    assert sum(conv.weight.requires_grad for conv in backbone.convs) == learning
    assert sum(conv.weight.requires_grad for conv in source.backbone.convs) == 2


def test_the_source_is_left_alone():
    source = tiny()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    tuned = adapt(source, source.classes)
    with torch.no_grad():
        for parameter in tuned.detector.parameters():
            parameter += 1
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
