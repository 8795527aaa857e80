"""Backbones of torchvision and timm, plain ViTs under a simple pyramid, and modules of the user's own."""

import re
import sys
from pathlib import Path

import pytest
import torch
from fresh import run
from torch import nn
from torchvision.models import VisionTransformer

import fpn
from fpn.errors import CheckpointError, OptionError
from fpn.model.backbone import FrozenBatchNorm, build_backbone, freeze_batch_norm
from fpn.model.dry_run import dry_run
from fpn.model.vit import ChannelNorm, PlainViT, SimpleNeck, SimplePyramid, quarters
from fpn.structures import Batch

DOCS = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def plain_vit() -> PlainViT:
    return PlainViT(VisionTransformer(64, 16, 4, 2, 32, 64)).eval()


def batch() -> Batch:
    sizes = torch.tensor([[96, 160], [80, 150]])
    return Batch(torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8), sizes, sizes, torch.arange(2))


class Strides(nn.Module):
    """The user's own: a convolution a level."""

    def __init__(self, levels=(2, 3), width=8):
        super().__init__()
        self.maps = nn.ModuleDict({str(level): nn.Conv2d(3, width, 2**level, 2**level) for level in levels})

    def forward(self, images):
        return {int(level): conv(images) for level, conv in self.maps.items()}


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "regnet_y_400mf", pytest.param("convnext_tiny", marks=pytest.mark.slow)]
)
def test_torchvisions_others_keep_to_the_strides_and_learn_whole(name):
    backbone = build_backbone(name)
    assert dry_run(backbone, name) == backbone.channels
    maps = backbone(torch.randn(2, 3, 32, 64))
    sum(x.square().sum() for x in maps.values()).backward()
    assert list(maps) == [2, 3, 4, 5] and all(p.grad is not None for p in backbone.parameters())


TIMM = {
    "test_convnext": {2: 24, 3: 32, 4: 48, 5: 64},
    "test_resnet": {2: 32, 3: 48, 4: 192, 5: 96},
    "test_efficientnet": {2: 24, 3: 32, 4: 48, 5: 64},
    "regnetx_002": {2: 24, 3: 56, 4: 152, 5: 368},
    "swin_tiny_patch4_window7_224": {2: 96, 3: 192, 4: 384, 5: 768},  # channels last, and made for one size
    "test_vit": {2: 16, 3: 32, 4: 64, 5: 64},  # one map, made for one size
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_give_maps_that_all_of_them_learns_from(timm, name):
    backbone = build_backbone(f"timm:{name}")
    assert backbone.channels == TIMM[name]
    maps = backbone(torch.randn(2, 3, 96, 160))
    assert {k: tuple(x.shape[1:]) for k, x in maps.items()} == {
        k: (c, 96 >> k, 160 >> k) for k, c in TIMM[name].items()
    }
    sum(x.square().sum() for x in maps.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_timms_maps_are_timms(timm):
    backbone = build_backbone("timm:test_resnet").eval()
    images = torch.randn(1, 3, 64, 96)
    for mine, theirs in zip(backbone(images).values(), backbone.net(images)[1:], strict=True):
        assert torch.equal(mine, theirs)
    backbone = build_backbone("timm:mambaout_femto").eval()  # channels last, as Swin, and smaller
    assert torch.equal(backbone(images)[3], backbone.net(images)[1].movedim(3, 1))


@pytest.mark.parametrize(
    "name, stages, last",
    [
        ("test_convnext", 1, "stem_"),  # no level 1: what comes before the first
        ("test_convnext", 3, "stages_1"),
        ("test_resnet", 1, "bn1"),
        ("test_resnet", 2, "layer1"),
        ("test_efficientnet", 2, "blocks.1"),
        ("test_efficientnet", 5, "blocks.4"),
    ],
)
def test_timms_stages_freeze_up_to_the_module_of_their_level(timm, name, stages, last):
    backbone = build_backbone(f"timm:{name}", freeze=stages)
    learns = [parameter.requires_grad for parameter in backbone.parameters()]
    frozen = [key.removeprefix("net.") for key, p in backbone.named_parameters() if not p.requires_grad]
    assert learns == sorted(learns) and frozen[-1].startswith(last)


def test_a_vit_freezes_its_embedding_and_quarters_of_its_blocks(timm):
    def frozen(backbone):
        keys = [key for key, p in backbone.named_parameters() if not p.requires_grad]
        return len(keys), {int(key[1]) for key in (re.search(r"blocks\.(\d)", key) for key in keys) if key}

    assert [quarters(12, n) for n in range(6)] == [0, 0, 3, 6, 9, 12] and quarters(6, 2) == 2
    assert frozen(build_backbone("timm:test_vit", freeze=1)) == (4, set())  # patches, class token and positions
    assert frozen(build_backbone("timm:test_vit", freeze=2))[1] == {0, 1}
    vit = plain_vit()
    vit.freeze(1)
    assert frozen(vit) == (4, set())
    vit.freeze(3)
    assert frozen(vit)[1] == {0, 1}


def test_frozen_batch_norm_keeps_timms_activation(timm):
    backbone = build_backbone("timm:test_efficientnet").eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.bias)
    images = torch.randn(1, 3, 64, 64)
    before = backbone(images)
    freeze_batch_norm(backbone)
    assert any(isinstance(m, FrozenBatchNorm) for m in backbone.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    torch.testing.assert_close(backbone.train()(images), before)


def test_timms_weights_from_a_file(timm, tmp_path):
    file = tmp_path / "weights.pth"
    trained = timm.create_model("test_convnext", num_classes=7).eval()  # the classifier is not ours to judge
    torch.save(trained.state_dict(), file)
    backbone = build_backbone("timm:test_convnext", file).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(trained.forward_intermediates(images, intermediates_only=True)[-1], backbone(images)[5])
    assert not next(backbone.parameters()).requires_grad  # stages 1 and 2 are frozen where there are weights
    state = trained.state_dict()
    del state["stages.2.blocks.0.norm.weight"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"does not fit.*test_convnext: .*stages\.2\.blocks\.0\.norm\.weight"):
        build_backbone("timm:test_convnext", file)


def test_timms_pixels_become_the_detectors(timm, tmp_path):
    detector = fpn.build(backbone="timm:test_resnet", classes=["a"], weights="none", width=16, hidden=16)
    assert (detector.mean.flatten() / 255).tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert detector.spec.settings["std"] == (0.5, 0.5, 0.5)
    file = fpn.weights.save(detector, tmp_path / "d.safetensors")
    assert torch.equal(fpn.load(file).mean, detector.mean)
    chosen = fpn.build(backbone="timm:test_resnet", classes=["a"], weights="none", width=16, hidden=16, mean=(0, 0, 0))
    assert not chosen.mean.any()


@pytest.mark.parametrize(
    "name, words",
    [
        ("convnext_pico_", "unknown backbone timm:convnext_pico_"),
        ("convnext_pic", "unknown backbone timm:convnext_pic; there are timm:convnext_pico"),
        ("resnet50.mine", r"unknown backbone timm:resnet50.mine \(Invalid pretrained tag"),
        ("levit_128s", "levit_128s fails on an image of 96 x 160 pixels"),
        ("crossvit_9_240", "stride 12, which is no power of two"),
    ],
)
def test_what_timm_cannot_give_is_said(timm, name, words):
    with pytest.raises(OptionError, match=words):
        build_backbone(f"timm:{name}")


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OptionError, match=r"timm:resnet50 needs timm: pip install 'fpn\[timm\]'"):
        build_backbone("timm:resnet50")


def test_a_plain_vit_is_torchvisions_at_its_own_size_and_takes_others():
    model = VisionTransformer(64, 16, 2, 2, 32, 64).eval()
    nn.init.normal_(model.class_token)
    vit, images = PlainViT(model).eval(), torch.randn(2, 3, 64, 64)
    tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(images)], 1)
    wanted = model.encoder.layers(tokens + model.encoder.pos_embedding)[:, 1:]
    with torch.no_grad():
        torch.testing.assert_close(vit(images)[4].flatten(2).mT, wanted)
    assert vit(torch.randn(1, 3, 96, 160))[4].shape == (1, 32, 6, 10)


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_a_simple_pyramid_has_four_levels_from_any_patch(patch):
    vit = PlainViT(VisionTransformer(64, patch, 1, 2, 32, 64))
    pyramid = SimplePyramid(vit, vit.channels)
    assert dry_run(pyramid, "vit") == pyramid.channels
    own = patch.bit_length() - 1
    assert pyramid.channels == {k: 32 >> max(own - k, 0) for k in (2, 3, 4, 5)}
    pyramid.keep((3, 4, 5, 6, 7))
    assert dry_run(pyramid, "vit") == pyramid.channels and list(pyramid.channels) == [3, 4, 5]


def test_channel_norm_is_layer_norm_of_each_place():
    x = torch.randn(2, 5, 3, 4)
    y = ChannelNorm(5)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(y[1, :, 2, 3], nn.functional.layer_norm(x[1, :, 2, 3], (5,)))


def test_the_simple_neck_mixes_no_levels():
    neck = SimpleNeck({2: 4, 3: 8, 4: 16, 5: 16}, 16)
    c = {k: torch.randn(1, n, 64 >> k, 96 >> k) for k, n in {2: 4, 3: 8, 4: 16, 5: 16}.items()}
    p = neck(c)
    assert neck.levels == tuple(p) == (2, 3, 4, 5, 6) and torch.equal(p[6], p[5][..., ::2, ::2])
    again = neck({**c, 5: c[5] + 1, 4: c[4] + 1})
    assert torch.equal(again[3], p[3]) and not torch.equal(again[4], p[4])


def test_every_weight_of_a_detector_on_a_vit_is_used(timm):
    """RetinaNet takes no C2: weights that only make C2 would stop a training on several GPUs."""
    detector = fpn.build("retinanet", backbone="timm:test_vit", neck="simple", classes=["a"], weights="none", width=32)
    assert list(detector.backbone.channels) == [3, 4, 5]
    sum(p.square().sum() for p in detector.features(batch()).values()).backward()
    parts = [*detector.backbone.parameters(), *detector.pyramid.parameters()]
    assert all(p.grad is not None for p in parts)


def test_the_pages_backbone_in_15_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    kept: dict = {"__name__": "page"}
    exec(code, kept)
    assert kept["detector"].detect(batch()).count.shape == (2,)
    assert kept["detector"].spec.backbone == "module:Plain"
    lines = code.partition("class ")[2].partition("\n\n\n")[0].splitlines()
    assert len([line for line in lines if line.strip()]) <= 15


def test_a_module_of_ones_own_comes_back_with_its_weights(tmp_path):
    own = Strides((2, 3, 4, 5))
    own.mean, own.std = [0.1, 0.2, 0.3], (1.0, 1.0, 1.0)
    detector = fpn.build(backbone=own, classes=["a"], width=16, hidden=16)
    assert detector.backbone is own and own.channels == {2: 8, 3: 8, 4: 8, 5: 8} and own.training
    assert detector.spec.settings["mean"] == (0.1, 0.2, 0.3)
    file = fpn.weights.save(detector, tmp_path / "own.safetensors")
    loaded = fpn.load(file, backbone=Strides((2, 3, 4, 5)))
    assert loaded.spec == detector.spec
    torch.testing.assert_close(loaded.state_dict(), detector.state_dict())
    with pytest.raises(CheckpointError, match=r"own.safetensors: its backbone.*Strides: load it with backbone=Strides"):
        fpn.load(file)
    with pytest.raises(CheckpointError, match="own.safetensors: .* tensors do not fit"):
        fpn.load(file, backbone=Strides((2, 3, 4, 5), width=4))
    usual = fpn.build(backbone="tiny", classes=["a"], weights="none", width=16, hidden=16)
    fpn.weights.save(usual, tmp_path / "usual.safetensors")
    with pytest.raises(CheckpointError, match="its backbone is tiny, which fpn builds itself"):
        fpn.load(tmp_path / "usual.safetensors", backbone=own)


def test_freeze_and_norm_of_a_module_of_ones_own():
    class Normed(Strides):
        def __init__(self):
            super().__init__((2, 3, 4, 5))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return super().forward(self.norm(images))

    with pytest.raises(OptionError, match="freeze is 1, but the backbone Normed has no method `freeze`"):
        fpn.build(backbone=Normed(), classes=["a"], freeze=1)
    assert isinstance(fpn.build(backbone=Normed(), classes=["a"], width=16, hidden=16).backbone.norm, nn.BatchNorm2d)
    frozen = fpn.build(backbone=Normed(), classes=["a"], width=16, hidden=16, backbone_norm="frozen")
    assert isinstance(frozen.backbone.norm, FrozenBatchNorm)


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, images):
        return self.what(images)


@pytest.mark.parametrize(
    "what, words",
    [
        (lambda x: [x], "gives a list; it must be"),
        (lambda x: {}, "gives a dict; it must be"),
        (lambda x: {"p2": x}, "level 'p2'"),
        (lambda x: {0: x}, "level 0"),
        (lambda x: {1: x[0]}, r"level 1 .* is \[3, 96, 160\]; it must be a map"),
        (
            lambda x: {1: x},
            r"level 1 .* is \[1, 3, 96, 160\] for an image of 96 x 160 pixels; its stride must be 2\*\*1",
        ),
        (lambda x: {1: x.reshape(1, 3, 7, 7)}, "fails on an image of 96 x 160 pixels"),
        (lambda x: {1: x[..., ::2, ::2].flatten(2)[..., None]}, "its stride must be"),
        (lambda x: {1: x[..., ::2, ::2].expand(x.shape[2], 3, -1, -1).transpose(0, 1)}, "for one size of image and"),
    ],
)
def test_a_module_that_does_not_keep_to_the_levels_is_refused(what, words):
    with pytest.raises(OptionError, match=f"backbone Gives.*{words}|{words}.*"):
        fpn.build(backbone=Gives(what), classes=["a"])


def test_a_module_with_other_channels_than_it_says_is_refused():
    own = Strides()
    own.channels = {2: 8, 3: 16}
    with pytest.raises(
        OptionError, match=r"gives channels \{2: 8, 3: 8\}, but its attribute `channels` is \{2: 8, 3: 16\}"
    ):
        fpn.build(backbone=own, classes=["a"])


def test_a_dry_run_changes_nothing():
    own = Strides()
    own.norm = nn.BatchNorm2d(8).eval()
    own.add = nn.Dropout()
    state = {key: value.clone() for key, value in own.state_dict().items()}
    random = torch.get_rng_state()
    dry_run(own, "own")
    assert own.training and own.add.training and not own.norm.training and torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(own.state_dict(), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:test_convnext", "timm:test_efficientnet", "vit"])
def test_backbones_compile_and_export_with_free_height_and_width(timm, name):
    code = f"""
        import torch
        from torch.export import Dim
        from torchvision.models import VisionTransformer
        from fpn.model.backbone import build_backbone
        from fpn.model.vit import PlainViT, SimplePyramid

        vit = PlainViT(VisionTransformer(64, 16, 2, 2, 32, 64))
        net = SimplePyramid(vit, vit.channels) if "{name}" == "vit" else build_backbone("{name}")
        net.eval()
        sides = ({{2: 32 * Dim("h", min=2, max=40), 3: 32 * Dim("w", min=2, max=40)}},)
        with torch.no_grad():
            exported = torch.export.export(net, (torch.randn(2, 3, 128, 160),), dynamic_shapes=sides).module()
            compiled = torch.compile(net, fullgraph=True, backend="eager")
            for size in ((96, 160), (224, 128)):
                images = torch.randn(2, 3, *size)
                for other in (exported, compiled):
                    torch.testing.assert_close(other(images), net(images), atol=1e-4, rtol=1e-4)
    """
    run(code)


def test_synchronised_batch_norm_keeps_timms_activation(timm, tmp_path):
    """What Lightning does for `sync_batchnorm`, which replaces whatever is a batch norm by nothing more than that."""
    backbone = build_backbone("timm:test_efficientnet").eval()
    net = timm.create_model("test_efficientnet", features_only=True).eval()
    backbone.net.load_state_dict(net.state_dict())  # the names are timm's
    assert backbone.net.state_dict().keys() == net.state_dict().keys()
    images = torch.randn(1, 3, 64, 64)
    before = list(backbone(images).values())
    torch.testing.assert_close(before, net(images)[1:])
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synchronised.modules())
    torch.testing.assert_close(list(synchronised(images).values()), before)
    assert synchronised.net.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", ["tiny", "timm:test_efficientnet", "timm:test_vit"])
def test_what_no_level_needs_does_not_learn(timm, name):
    """A pyramid that ends below C5 leaves weights without a gradient, which would stop a training on several GPUs."""
    torch.manual_seed(0)
    options = {"backbone": name, "classes": ["a"], "weights": "none", "width": 32}
    detector, whole = fpn.build(levels=(2, 4), **options), fpn.build(**options)
    assert list(detector.backbone.channels) == [2, 3, 4]
    sum(p.square().sum() for p in detector.features(batch()).values()).backward()
    parts = [*detector.backbone.parameters(), *detector.pyramid.parameters()]
    assert all((p.grad is not None) == p.requires_grad for p in parts)
    if name != "timm:test_vit":  # whose levels are not made from each other
        assert detector.backbone.state_dict().keys() == whole.backbone.state_dict().keys()
    assert all(p.requires_grad for p in whole.backbone.parameters())


def test_levels_above_a_vits_are_refused_by_name():
    body = plain_vit()
    with pytest.raises(OptionError, match="levels 2, 3, 4, 5"):
        fpn.build(backbone=SimplePyramid(body, body.channels), classes=["a"], levels=(6, 7), width=32)
    with pytest.raises(OptionError, match="extra_norm"):
        SimpleNeck({4: 32}, 32, (4, 5), extra="p5", extra_norm=True)


def test_a_module_whose_channels_cannot_be_set():
    class Fixed(Strides):
        @property
        def channels(self):
            return {2: 8, 3: 8}

    detector = fpn.build(backbone=Fixed(), classes=["a"], width=32, levels=(2, 4))
    assert detector.backbone.channels == {2: 8, 3: 8}
