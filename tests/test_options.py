"""What `fpn.build` refuses: options of other models and necks, and settings of another form, told before any work."""

import pytest
from torch import nn

import fpn
from fpn.build import from_spec
from fpn.errors import OptionError
from fpn.spec import DENSE, MODELS, NECKS, OPTIONS_OF, WITH_MASKS, Spec, class_of


def build(model="faster_rcnn", backbone="tiny", **options):
    small = {"width": 32, "short": 64} | ({"hidden": 8} if model in OPTIONS_OF["hidden"] else {})
    classes = None if class_of(model).proposes else ("a", "b")
    return fpn.build(model, backbone=backbone, classes=classes, weights="none", **{**small, **options})


class Untouched(nn.Module):
    def forward(self, images):
        raise AssertionError("the options are looked at first")


@pytest.mark.parametrize(
    "model, options, words",
    [
        ("faster_rcnn", {"neck": "bifpn", "fuse": "average"}, "fuse 'average': bifpn has no such option, only fpn"),
        ("faster_rcnn", {"neck": "simple", "fuse": "max"}, "unknown fuse 'max'; there are sum, average"),
        ("faster_rcnn", {"repeats": 2}, "repeats 2: fpn has no such option, only bifpn, nas_fpn"),
        ("faster_rcnn", {"box_norm": "layer"}, "unknown box norm 'layer'; there are none, batch, group"),
        ("faster_rcnn", {"mask_norm": "layer"}, "unknown mask norm 'layer'"),
        ("faster_rcnn", {"tower_norm": "layer"}, "unknown tower norm 'layer'; there are none, group"),
        ("cascade_rcnn", {"mask_binary": False}, "mask_binary False: cascade_rcnn has no such option"),
        ("mask_rcnn", {"tower_convolutions": 2}, "tower_convolutions 2: mask_rcnn has no such option, only retinanet"),
        ("retinanet", {"box_convolutions": 4}, "box_convolutions 4: retinanet has no such option"),
        ("fcos", {"class_agnostic": True}, "class_agnostic True: fcos has no such option"),
        ("atss", {"rpn_convolutions": 2}, "rpn_convolutions 2: atss has no such option"),
        ("retinanet", {"hidden": 8}, "hidden 8: retinanet has no such option, only fast_rcnn"),
        ("retinanet", {"preset": "paper"}, "preset 'paper': retinanet has no such option"),
        ("fcos", {"anchor_ratios": (0.5, 1.0)}, r"anchor ratios \[0.5, 1.0\]: fcos has one box a cell"),
        ("fcos", {"anchor_scales": (1.0, 2.0)}, r"anchor scales \[1.0, 2.0\]: fcos has one box a cell"),
        ("cascade_rcnn", {"box_positive": 0.5}, r"box_positive is 0.5: it must be tuple\[float, ...\], such as \(0.5"),
        ("faster_rcnn", {"box_positive": (0.5, 0.6)}, r"box_positive is \(0.5, 0.6\): it must be float, such as 0.5"),
        ("faster_rcnn", {"proposals": 500}, r"proposals is 500: it must be tuple\[int, int\], such as \(2000, 1000\)"),
        ("faster_rcnn", {"proposals": [500]}, r"proposals is \(500,\): it must be"),
        ("faster_rcnn", {"pooled": 3}, r"pooled is 3: it must be tuple\[int, int\] | None"),
        ("faster_rcnn", {"bgr": 1}, "bgr is 1: it must be bool"),
        ("faster_rcnn", {"score": True}, "score is True: it must be float"),
        ("faster_rcnn", {"score": 1.5}, "score is 1.5: it must be 0 to 1"),
        ("faster_rcnn", {"score": float("nan")}, "score is nan: it must be 0 to 1"),
        ("faster_rcnn", {"proposals": (500, 0)}, r"proposals is \(500, 0\): it must be 1 or more"),
        ("faster_rcnn", {"pooled_size": 0}, "pooled_size is 0: it must be 1 or more"),
        ("retinanet", {"max_detections": 10.0}, "max_detections is 10.0: it must be int"),
        ("retinanet", {"candidates": 0}, "candidates is 0: it must be 1 or more"),
        ("retinanet", {"proposals": (500, 500)}, "retinanet has no option proposals"),
    ],
)  # fmt: skip
def test_options_without_effect_and_of_the_wrong_form_are_refused(model, options, words):
    with pytest.raises(OptionError, match=words):
        build(model, Untouched(), **options)


@pytest.mark.parametrize("options", [{"extra": "p5"}, {"neck": "bifpn", "levels": (2, 6)}])
def test_levels_that_fast_rcnn_pools_nothing_from_have_no_weights(options):
    with pytest.raises(OptionError, match="levels 2 6: fast_rcnn pools from the backbone's levels"):
        fpn.build("fast_rcnn", backbone="tiny", weights="none", classes=("a",), **options)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("width", "256", "width is '256': it must be int"),
        ("levels", (2, 3, 4), r"levels is \(2, 3, 4\): it must be tuple\[int, int\]"),
        ("anchor_sizes", 32, r"anchor_sizes is 32: it must be tuple\[float, ...\]"),
        ("short", 64.5, "short is 64.5: it must be int"),
        ("square", 1, "square is 1: it must be bool"),
        ("classes", (1, 2), r"classes is \(1, 2\): it must be tuple\[str, ...\]"),
    ],
)
def test_fields_of_another_form_are_refused(name, value, words):
    spec = Spec("faster_rcnn", ("a", "b"))
    object.__setattr__(spec, name, value)  # the tests' own checks would stop it in the constructor
    with pytest.raises(OptionError, match=words):
        from_spec(spec)


def test_options_that_fit_are_taken():
    assert build(neck="bifpn", repeats=2).spec.repeats == 2
    assert build(pooled=[3, 4], score=0, mean=[0, 0, 0]).pooled_levels == (3, 4)
    assert build("atss", anchor_scales=(1.0, 2.0)).cells.per_cell == 2
    assert build("retinanet", class_agnostic=False, fuse="average").spec.fuse == "average"


@pytest.mark.parametrize("model, neck", [*((m, "fpn") for m in MODELS), *(("faster_rcnn", n) for n in NECKS)])
def test_a_finished_spec_builds_the_same_again(model, neck):
    """It carries every field, also those that its model does not have."""
    first = build(model, neck=neck)
    again = from_spec(Spec.from_dict(first.spec.as_dict()))
    assert again.spec == first.spec
    assert [v.shape for v in again.state_dict().values()] == [v.shape for v in first.state_dict().values()]


def test_the_models_of_the_table_are_all_there_are():
    assert {*DENSE} < {*MODELS} and {*WITH_MASKS, "mask_proposals"} == {m for m in MODELS if build(m).has_masks}
    assert {*DENSE} == {m for m in MODELS if hasattr(build(m), "candidates")}
