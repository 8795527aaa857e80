"""Going on from a trained detector with other classes."""

import pytest
import torch

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


def test_the_source_is_left_alone():
    source = tiny()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    tuned = adapt(source, source.classes)
    with torch.no_grad():
        for parameter in tuned.detector.parameters():
            parameter += 1
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
