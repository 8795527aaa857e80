"""The necks: worked numbers, the graphs of the papers, any levels and sizes, gradients, export; and square padding."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh import run
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

import fpn
from fpn.build import neck_of
from fpn.data import collate
from fpn.errors import OptionError
from fpn.model.bifpn import BiFPN, BiLayer, Fusion
from fpn.model.nas_fpn import NASFPN, NasCell
from fpn.model.pafpn import PAFPN
from fpn.model.pyramid import FPN, Extra, GroupNorm, halve
from fpn.spec import NECKS, Spec, resolved
from fpn.structures import Sample

CHANNELS = {2: 4, 3: 6, 4: 10, 5: 12}


def neck(name: str, channels: dict[int, int] = CHANNELS, **options) -> nn.Module:
    """A neck as `fpn.build` makes it."""
    spec = Spec("faster_rcnn", ("a",), neck=name, **{"width": 8, "repeats": 2, **options})
    return neck_of(resolved(spec, channels), channels)


def maps(channels: dict[int, int], height: int, width: int, batch: int = 2) -> dict[int, Tensor]:
    """What a backbone with these channels makes of images of this size, in noise."""
    return {k: torch.randn(batch, n, -(-height // 2**k), -(-width // 2**k)) for k, n in channels.items()}


def copying(module: nn.Module) -> nn.Module:
    """The module with all its convolutions passing on what is in their middle."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight, layer.groups)
    return module


def levels_of(p: dict[int, Tensor]) -> dict[int, float]:
    """The one value of each map."""
    return {k: x.unique().item() for k, x in p.items()}


# All necks


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("levels", [(2, 6), (3, 7), (1, 5), (4, 8)])
@pytest.mark.parametrize("size", [(64, 32), (96, 160), (75, 301), (1, 1)])
def test_every_neck_gives_its_levels_in_their_sizes(name, levels, size):
    channels = {k: 2 + k for k in range(1, 7)}
    if levels[1] > 6:
        channels = CHANNELS
    pyramid = neck(name, channels, levels=levels)
    p = pyramid(maps(channels, *size))
    assert pyramid.levels == tuple(p) == tuple(range(levels[0], levels[1] + 1)) and pyramid.width == 8
    assert {k: tuple(x.shape) for k, x in p.items()} == {k: (2, 8, -(-size[0] // 2**k), -(-size[1] // 2**k)) for k in p}
    assert all(x.isfinite().all() for x in p.values())


@pytest.mark.parametrize("name", sorted(NECKS.keys() - {"nas_fpn"}))
@pytest.mark.parametrize("levels", [(3, 3), (2, 4), (5, 9)])
def test_necks_but_nas_fpn_give_any_number_of_levels(name, levels):
    p = neck(name, levels=levels)(maps(CHANNELS, 96, 64))
    assert {k: x.shape[2] for k, x in p.items()} == {k: -(-96 // 2**k) for k in range(levels[0], levels[1] + 1)}


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("extra, norm", [("p5", None), ("c5", "none"), ("max", "batch"), ("pool", None)])
def test_gradient_reaches_every_parameter_and_every_map(name, extra, norm):
    torch.manual_seed(0)
    pyramid = neck(name, extra=extra, norm=norm, extra_norm=norm == "batch", levels=(3, 7))
    c = {k: x.requires_grad_() for k, x in maps(CHANNELS, 352, 416).items()}
    torch.stack([(x * torch.randn_like(x)).sum() for x in pyramid(c).values()]).sum().backward()
    without = [key for key, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert {k for k, x in c.items() if x.grad is not None and x.grad.any()} == {3, 4, 5}


@pytest.mark.parametrize("name", NECKS)
def test_maps_stay_channels_last(name):
    pyramid = neck(name, levels=(3, 7)).to(memory_format=torch.channels_last)
    c = {k: x.contiguous(memory_format=torch.channels_last) for k, x in maps(CHANNELS, 416, 480).items()}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in pyramid(c).values())


@pytest.mark.slow
def test_every_neck_exports_with_dynamic_height_and_width():
    """The exported sides begin where P7 has more than one place: a side of 1 is another program to torch.export."""
    run("""
        import itertools
        import torch
        from torch.export import Dim
        from fpn.build import neck_of
        from fpn.spec import NECKS, Spec, resolved

        torch.manual_seed(0)
        channels = {3: 4, 4: 4, 5: 4}
        h, w = Dim("h", min=5, max=50), Dim("w", min=5, max=50)

        def maps(height, width):
            return {k: torch.randn(1, 4, height << 5 - k, width << 5 - k) for k in channels}

        for name, extra in zip(NECKS, itertools.cycle(("pool", "max", "p5"))):
            spec = Spec("faster_rcnn", ("a",), neck=name, width=4, levels=(3, 7), repeats=1, extra=extra)
            neck = neck_of(resolved(spec, channels), channels).eval()
            shapes = {"c": {k: {2: 2 ** (5 - k) * h, 3: 2 ** (5 - k) * w} for k in channels}}
            exported = torch.export.export(neck, (maps(6, 9),), dynamic_shapes=shapes).module()
            for size in ((5, 5), (6, 8), (7, 11), (50, 5)):
                c = maps(*size)
                found = exported(c)
                for k, x in neck(c).items():
                    torch.testing.assert_close(found[k], x)
    """)


def test_levels_that_do_not_fit_are_refused_in_words():
    with pytest.raises(OptionError, match=r"nas_fpn merges 5 levels, not the 4 of P3 to P6; published are .* 3 7"):
        neck("nas_fpn", levels=(3, 6))
    with pytest.raises(OptionError, match="cannot stand on a backbone with levels 2, 3, 4, 5"):
        neck("bifpn", levels=(1, 6))
    with pytest.raises(OptionError, match="extra levels 'conv': it must be pool, max, p5, c5"):
        neck("pafpn", extra="conv")
    with pytest.raises(OptionError, match="fuse 'max'"):
        neck("pafpn", fuse="max")
    with pytest.raises(OptionError, match="unknown neck 'pan'; there are fpn, pafpn"):
        fpn.build(backbone="tiny", classes=["a"], weights="none", neck="pan")


def test_what_a_spec_leaves_open_fits_the_neck():
    assert isinstance(neck("nas_fpn", repeats=None), NASFPN)
    spec = resolved(Spec("faster_rcnn", ("a",), neck="bifpn"), CHANNELS)
    assert (spec.norm, spec.extra, spec.repeats, spec.levels) == ("batch", "max", 3, (2, 6))
    spec = resolved(Spec("faster_rcnn", ("a",), neck="bifpn", norm="none", extra="p5", repeats=1), CHANNELS)
    assert (spec.norm, spec.extra, spec.repeats) == ("none", "p5", 1)
    spec = resolved(Spec("faster_rcnn", ("a",)), CHANNELS)
    assert (spec.norm, spec.extra, spec.repeats) == ("none", "pool", None)


# The parts


@pytest.mark.parametrize("height, width", [(1, 1), (4, 6), (7, 4), (5, 9)])
def test_halving_is_max_pooling_that_rounds_up(height, width):
    x = torch.randn(2, 3, height, width)
    assert torch.equal(halve(x), F.max_pool2d(x, 2, 2, ceil_mode=True))
    assert torch.equal(halve(x, kernel=3), F.max_pool2d(x, 3, 2, 1))
    assert torch.equal(halve(x, kernel=1), x[..., ::2, ::2])


@pytest.mark.parametrize("extra, block", [("pool", LastLevelMaxPool), ("p5", LastLevelP6P7), ("c5", LastLevelP6P7)])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_fpn_is_torchvisions(extra, block, norm):
    torch.manual_seed(0)
    blocks = () if extra == "pool" else (12 if extra == "c5" else 8, 8)
    other = FeaturePyramidNetwork(
        list(CHANNELS.values()), 8, block(*blocks), None if norm == "none" else nn.BatchNorm2d
    )
    own = FPN(CHANNELS, 8, (2, 6 if extra == "pool" else 7), extra, norm)
    ours, theirs = own.state_dict(), other.state_dict()
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]
    own.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    c = maps(CHANNELS, 203, 290)
    for p, q in zip(own(c).values(), other(OrderedDict((str(k), x) for k, x in c.items())).values(), strict=True):
        torch.testing.assert_close(p, q)


def test_norms_and_relus_of_extra_levels():
    x = torch.randn(2, 4, 8, 8)
    plain, without = Extra("p5", 2, 6, 4), Extra("p5", 2, 6, 4, relu=False)
    without.load_state_dict(plain.state_dict())
    p6, p7 = plain(x, x)
    assert torch.equal(p7, plain.convs[1](p6.relu())) and torch.equal(without(x, x)[1], plain.convs[1](p6))
    normed = Extra("p5", 2, 6, 32, norm="group")
    assert [type(part) for conv in normed.convs for part in conv] == [nn.Conv2d, GroupNorm] * 2
    pyramid = FPN(CHANNELS, 8, (2, 7), "c5", "batch", extra_norm=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in pyramid.modules()) == 10
    assert all(m.bias is None for m in pyramid.modules() if isinstance(m, nn.Conv2d))


# PAFPN


def test_pafpn_adds_up_and_up_again():
    c = {k: torch.full((1, 1, n, n), 10.0**k) for k, n in {2: 7, 3: 4, 4: 2, 5: 1}.items()}
    pyramid = copying(PAFPN(dict.fromkeys(CHANNELS, 1), 1))
    # P5, P4, P3, P2 are 1e5, 1.1e5, 1.11e5, 1.111e5; N2 is P2, and each N the P of its level plus the N below.
    wanted = {2: 1.111e5, 3: 2.221e5, 4: 3.321e5, 5: 4.321e5, 6: 4.321e5}
    assert levels_of(pyramid(c)) == pytest.approx(wanted)
    below = levels_of(pyramid({k: -x for k, x in c.items()}))  # a ReLU follows the convolutions of the second path
    assert below == pytest.approx({2: -1.111e5, 3: 0, 4: 0, 5: 0, 6: 0})
    averaged = levels_of(copying(PAFPN(dict.fromkeys(CHANNELS, 1), 1, (2, 5), fuse="average"))(c))
    # P5, P4, P3, P2 are 1e5, (1e4 + 1e5) / 2, (1e3 + 5.5e4) / 2, (1e2 + 2.8e4) / 2
    n3 = (2.8e4 + 1.405e4) / 2
    assert averaged == pytest.approx({2: 1.405e4, 3: n3, 4: (5.5e4 + n3) / 2, 5: (1e5 + (5.5e4 + n3) / 2) / 2})


def test_a_convolution_comes_between_two_steps_of_pafpn():
    """As in the paper: N4 is made from N3 behind its convolution."""
    c = {k: torch.full((1, 1, 1, 1), 1.0) for k in CHANNELS}
    pyramid = copying(PAFPN(dict.fromkeys(CHANNELS, 1), 1, (2, 5)))
    nn.init.zeros_(pyramid.output["3"].weight)
    assert levels_of(pyramid(c)) == {2: 4, 3: 0, 4: 2, 5: 3}


# BiFPN


def test_fusion_weights_are_positive_and_sum_to_one():
    fusion = copying(Fusion(3, 1, "none"))
    fusion.weights.data = torch.tensor([1.0, 3.0, -5.0])
    ones = torch.ones(1, 1, 2, 2)
    fused = torch.tensor((1 * 1.0 + 3 * 2.0) / (4 + 1e-4))
    assert fusion(ones, 2 * ones, 100 * ones).unique().item() == pytest.approx(F.silu(fused).item())


def test_bifpn_goes_down_and_up_as_in_the_paper():
    layer = copying(BiLayer((3, 4, 5, 6, 7), 1, "none"))
    p = {k: torch.full((1, 1, n, n), 100.0 * k) for k, n in {3: 13, 4: 7, 5: 4, 6: 2, 7: 1}.items()}
    down = {6: 650.0, 5: 575.0, 4: 487.5}  # (600 + 700) / 2, (500 + 650) / 2 ...
    out = {3: (300 + 487.5) / 2}
    for k in (4, 5, 6):
        out[k] = (100 * k + down[k] + out[k - 1]) / 3
    out[7] = (700 + out[6]) / 2
    assert levels_of(layer(p)) == pytest.approx(out, rel=1e-3)  # swish leaves large numbers; the sums have 1e-4 more


def test_bifpn_pools_upwards_around_every_second_place():
    layer = copying(BiLayer((2, 3), 1, "none"))
    p = {2: torch.zeros(1, 1, 1, 6), 3: torch.zeros(1, 1, 1, 3)}
    p[2][..., 3] = 400.0  # column 3 is next to 2 and 4, and these are columns 1 and 2 one level up
    assert layer(p)[3].flatten().tolist() == pytest.approx([0, 100, 100], rel=1e-3)


def test_bifpn_repeats_layers_of_their_own():
    assert [len(BiFPN(CHANNELS, 8, repeats=n).layers) for n in (1, 4)] == [1, 4]
    pyramid = BiFPN(CHANNELS, 8, (3, 7), repeats=2)
    assert sum(isinstance(m, Fusion) for m in pyramid.modules()) == 2 * 8
    assert pyramid.layers[0].up["5"].weights is not pyramid.layers[1].up["5"].weights


# NAS-FPN

# The authors' own notation: level, operation, which of the maps so far (0 to 4 are P3..P7), whether it is an output.
SEARCHED = [
    (4, "attention", (1, 3), False),
    (4, "sum", (1, 5), False),
    (3, "sum", (0, 6), True),
    (4, "sum", (6, 7), True),
    (5, "attention", (7, 8), True),
    (7, "attention", (6, 9), True),
    (6, "attention", (9, 10), True),
]


def to_level(x: Tensor, own: int, wanted: int) -> Tensor:
    if own < wanted:
        return F.max_pool2d(x, 2 ** (wanted - own))
    return x.repeat_interleave(2 ** (own - wanted), 2).repeat_interleave(2 ** (own - wanted), 3)


def test_the_cell_of_nas_fpn_is_the_one_that_was_found():
    torch.manual_seed(0)
    cell = NasCell(4, "none")
    p = tuple(torch.randn(2, 4, 2 ** (8 - k), 2 ** (9 - k)) for k in range(3, 8))
    found, levels, used = list(p), [3, 4, 5, 6, 7], set()
    for (level, operation, inputs, is_output), convolution in zip(SEARCHED, cell.convolutions, strict=True):
        used |= set(inputs)
        high, low = sorted(inputs, key=lambda n: -levels[n])
        top, x = (to_level(found[n], levels[n], level) for n in (high, low))
        gate = top.amax((2, 3), keepdim=True).sigmoid() if operation == "attention" else 1
        merged = top + x * gate
        for n in range(len(found)):
            if is_output and n not in used and levels[n] == level:
                merged, used = merged + found[n], used | {n}
        found.append(convolution(merged.relu()))
        levels.append(level)
    wanted = dict(zip(levels[-5:], found[-5:], strict=True))
    for level, x in enumerate(cell(*p), 3):
        torch.testing.assert_close(x, wanted[level])


def test_nas_fpn_works_one_level_lower_with_the_same_cell():
    torch.manual_seed(0)
    published, lower = NASFPN({3: 4, 4: 4, 5: 4}, 8), NASFPN({2: 4, 3: 4, 4: 4}, 8, (2, 6))
    lower.load_state_dict(dict(zip(lower.state_dict(), published.state_dict().values(), strict=True)))
    c = maps({3: 4, 4: 4, 5: 4}, 160, 352)
    down = lower({k - 1: x for k, x in c.items()})
    for level, x in published(c).items():
        torch.testing.assert_close(down[level - 1], x)


# Square padding


def sample(height: int, width: int) -> Sample:
    image = torch.full((3, height, width), 7, dtype=torch.uint8)
    return Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0, (height, width))


def test_batches_are_padded_to_one_square():
    for images in ([(30, 50)], [(100, 20), (10, 90)]):
        batch = collate([sample(*size) for size in images], square=100)
        assert batch is not None and batch.images.shape[2:] == (128, 128)  # the next multiple of 32
        assert batch.sizes.tolist() == [list(size) for size in images]
        assert batch.images.sum().item() == 7 * 3 * sum(height * width for height, width in images)
    larger = collate([sample(30, 150)], square=100, multiple=1)
    assert larger is not None and larger.images.shape[2:] == (150, 150)


def test_a_square_detector_sees_squares(monkeypatch):
    detector = fpn.build(
        backbone="tiny", classes=["a"], weights="none", width=8, hidden=8, short=40, long=60, square=True
    )
    assert detector.spec.square_side == 60 and Spec("faster_rcnn", ("a",)).square_side is None
    seen, detect = [], detector.detect
    monkeypatch.setattr(
        detector, "detect", lambda batch: (seen.append(tuple(batch.images.shape[2:])), detect(batch))[1]
    )
    fpn.predict(detector, [np.zeros((30, 50, 3), np.uint8), np.zeros((90, 20, 3), np.uint8)], device="cpu")
    assert seen == [(64, 64)] * 2
