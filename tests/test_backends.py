"""Every backend finds what the detector itself finds; the fused one has no batch norm left."""

from __future__ import annotations

import json

import pytest
import torch
from fresh import run
from PIL import Image
from test_pairs import detector_of
from torch import Tensor, nn
from torch._dynamo import config

import fpn
from fpn.backends import compiled
from fpn.backends.choose import described, ready
from fpn.backends.fused import Norm, followed, fused, noise
from fpn.data.generated import generate
from fpn.errors import OptionError
from fpn.evaluation.command import evaluate
from fpn.inference.command import predict
from fpn.model.detector import Detector
from fpn.structures import Batch, Detections


def lived_in(detector: Detector) -> Detector:
    """With statistics, scales and shifts of its batch norms as training leaves them, and heads that find something."""
    torch.manual_seed(1)
    for name, module in detector.named_modules():
        if isinstance(module, Norm):
            for values, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.3, 2.0)):
                assert values is not None
                values.uniform_(low, high)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        elif name.endswith(("classes", "offsets", "objectness")):
            nn.init.normal_(module.weight, std=0.05)
    return detector.eval()


def norms_in(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, Norm)]


def pictures() -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(256, (3, *size), dtype=torch.uint8, generator=draw) for size in ((64, 96), (91, 57))]


def same(found: list[Detections], expected: list[Detections], pixels: float = 0.01, score: float = 1e-4) -> None:
    assert sum(len(image) for image in expected) > 5
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.levels, b.levels)
        torch.testing.assert_close(a.boxes, b.boxes, atol=pixels, rtol=0)
        torch.testing.assert_close(a.scores, b.scores, atol=score, rtol=0)


SIDES = {"short": 64, "long": 96}


@pytest.mark.parametrize("model", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos"])
def test_a_fused_detector_finds_the_same(model):
    detector = lived_in(detector_of(model, "fpn", **SIDES))
    fast = fused(detector)
    assert norms_in(detector) and not norms_in(fast)
    same(fpn.predict(fast, pictures(), threshold=0), fpn.predict(detector, pictures(), threshold=0))


@pytest.mark.parametrize(
    "backbone", ["resnet18", "mobilenet_v2", "vgg11_bn", "regnet_y_400mf", "efficientnet_b0", "timm:test_efficientnet"]
)
@pytest.mark.parametrize("frozen", ["frozen", "batch"])
def test_all_batch_norms_after_convolutions_are_folded(backbone, frozen):
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    detector = lived_in(detector_of("retinanet", "fpn", backbone, backbone_norm=frozen, norm="batch", **SIDES))
    fast = fused(detector)
    assert norms_in(detector) and not norms_in(fast)
    with torch.no_grad():
        for level, p in detector.features(noise(detector)).items():
            torch.testing.assert_close(fast.features(noise(detector))[level], p, atol=1e-4 * float(p.max()), rtol=1e-3)


def test_a_fused_detector_cannot_be_trained_and_its_original_can():
    detector = lived_in(detector_of("faster_rcnn", "fpn", backbone="resnet18"))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    fast = fused(detector)
    assert not [name for name, p in fast.named_parameters() if p.requires_grad]
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert any(p.requires_grad for p in detector.parameters())


class Twice(nn.Module):
    """A convolution whose output goes past its norm as well."""

    def __init__(self, elsewhere: bool, shared: bool = False):
        super().__init__()
        self.elsewhere, self.shared = elsewhere, shared
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, 2, 1) for _ in range(3))
        self.channels = {2: 8, 3: 8, 4: 8, 5: 8}

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        x = self.stem(images)
        c = {2: self.first(x) + (x if self.elsewhere else 0) + (self.second(x) if self.shared else 0)}
        for level, conv in enumerate(self.down, 3):
            c[level] = conv(c[level - 1])
        return c


def test_a_convolution_that_is_needed_elsewhere_is_told_and_auto_leaves_it():
    detector = lived_in(detector_of("retinanet", "fpn", Twice(elsewhere=True)))
    with pytest.raises(OptionError, match="Twice: its batch norms cannot be folded.*backend eager"):
        fused(detector)
    assert ready(detector, "auto") is detector and described(detector) == "backend eager, fp32"
    with pytest.raises(OptionError, match="cannot be folded"):
        ready(detector, "auto", "bf16")


def test_a_convolution_with_two_norms_keeps_both():
    detector = lived_in(detector_of("retinanet", "fpn", Twice(elsewhere=False, shared=True), **SIDES))
    assert followed(detector) == {}
    same(fpn.predict(fused(detector), pictures(), threshold=0), fpn.predict(detector, pictures(), threshold=0))
    alone = lived_in(detector_of("retinanet", "fpn", Twice(elsewhere=False)))
    assert followed(alone) == {"backbone.first": "backbone.stem"}  # the other norm is never asked


def test_bfloat16_is_of_the_layers_with_weights_only():
    detector = lived_in(detector_of("faster_rcnn", "fpn", **SIDES))
    fast = ready(detector, "auto", "bf16")
    assert isinstance(fast, Detector)
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16} and fast.mean.dtype == torch.float32
    found, expected = fpn.predict(fast, pictures(), threshold=0), fpn.predict(detector, pictures(), threshold=0)
    assert found[0].boxes.dtype == found[0].scores.dtype == torch.float32
    # Of what both find, by place and class, most has nearly the same score.
    near = (found[0].boxes[:, None] - expected[0].boxes).abs().amax(-1) < 2
    near &= found[0].labels[:, None] == expected[0].labels
    near &= (found[0].scores[:, None] - expected[0].scores).abs() < 0.02
    assert near.any(0).float().mean() > 0.7


@pytest.mark.parametrize("model", ["mask_rcnn", "cascade_mask_rcnn", "rpn", "mask_proposals", "atss"])
def test_every_detector_takes_bfloat16(model):
    detector = lived_in(detector_of(model, "bifpn", **SIDES))
    found = fpn.predict(ready(detector, "fused", "bf16"), pictures(), threshold=0)
    assert all(image.boxes.isfinite().all() and image.scores.isfinite().all() for image in found)
    assert sum(map(len, found)) > 5


def test_a_detector_of_given_regions_can_be_fused():
    detector = lived_in(detector_of("fast_rcnn", "fpn"))
    assert not norms_in(fused(detector).backbone)


def test_load_gives_the_backend_that_is_asked_for(tmp_path):
    detector = lived_in(detector_of("faster_rcnn", "fpn", **SIDES))
    file = fpn.weights.save(detector, tmp_path / "a.safetensors")
    plain = fpn.load(file)
    assert isinstance(plain, Detector) and plain.backend == "eager" and norms_in(plain)
    fast = fpn.load(file, backend="auto")
    assert isinstance(fast, Detector) and described(fast) == "backend fused, fp32"
    same(fpn.predict(fast, pictures(), threshold=0), fpn.predict(plain, pictures(), threshold=0))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "tensorrt"}, "backend 'tensorrt': there are auto, eager"),
        ({"precision": "bf16"}, "precision 'bf16': backend eager has fp32; bf16 is of auto, fused"),
        ({"backend": "fused", "precision": "int8"}, "precision 'int8'.*fpn export --calibrate"),
        ({"backend": "onnx", "precision": "bf16"}, "backend onnx has fp32"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_is_read(options, words):
    with pytest.raises(OptionError, match=words):
        fpn.load("no.safetensors", **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "openvino", "compiled"])
def test_other_backends_find_the_same(backend, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime", "compiled": "torch"}.get(backend, backend))
    detector = lived_in(detector_of("retinanet", "fpn", **SIDES))
    fpn.weights.save(detector, tmp_path / "a.safetensors")
    torch.save(pictures()[:1], tmp_path / "in.pt")  # not resized, which rounds some bytes to another side in files
    run(
        """
        import sys, torch, fpn
        from fpn.backends.choose import described

        folder, backend = sys.argv[1:]
        torch.set_num_threads(1)
        made = fpn.load(folder + "/a.safetensors", backend=backend)
        assert described(made) == f"backend {backend}, fp32"
        found = fpn.predict(made, torch.load(folder + "/in.pt"), threshold=0)
        torch.save([vars(image) for image in found], folder + "/out.pt")
        """,
        arguments=(tmp_path, backend),
    )
    found = [Detections(**fields) for fields in torch.load(tmp_path / "out.pt")]
    same(found, fpn.predict(detector, pictures()[:1], threshold=0))


def test_the_verbs_say_which_backend_runs_and_take_another(tmp_path, capsys):
    detector = lived_in(detector_of("faster_rcnn", "fpn", **SIDES))
    file = fpn.weights.save(detector, tmp_path / "a.safetensors")
    Image.fromarray(pictures()[0].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    found = []
    for backend in ("auto", "eager"):
        out = tmp_path / backend
        predict(file, tmp_path / "one.png", out=out, threshold=0, backend=backend, pictures=False, workers=0)
        found.append(json.loads((out / "predictions.json").read_text()))
    said = capsys.readouterr().err
    assert "a.safetensors: backend fused, fp32" in said and "a.safetensors: backend eager, fp32" in said
    fast, plain = (one["images"][0]["detections"] for one in found)
    assert len(fast) == len(plain) > 3
    for a, b in zip(fast, plain, strict=True):
        assert a["class"] == b["class"] and a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a["box"] == pytest.approx(b["box"], abs=0.01)


def test_an_exported_file_has_its_backend(tmp_path):
    with pytest.raises(OptionError, match="an exported detector has its backend and precision"):
        fpn.load(tmp_path / "a.onnx", backend="eager")


def test_only_so_many_sizes_are_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "SIZES", 2)
    asked, usual = [], config.recompile_limit
    nothing = Detections(*(torch.zeros(1, 0, *rest) for rest in ((4,), ())), *[torch.zeros(1, 0).long()] * 2,
                         torch.zeros(1).long(), ("a",))  # fmt: skip

    def fast(batch: Batch) -> Detections:
        asked.append(config.recompile_limit)
        return nothing

    def plain(batch: Batch) -> Detections:
        asked.append("plain")
        return nothing

    detect = compiled.by_size(fast, plain)
    for side in (32, 64, 96, 32, 128, 64):
        detect(noise_of(side))
    assert asked == [6400, 6400, "plain", 6400, "plain", 6400] and config.recompile_limit == usual


def noise_of(side: int) -> Batch:
    sizes = torch.tensor([[side, side]])
    return Batch(torch.zeros(1, 3, side, side, dtype=torch.uint8), sizes, sizes, torch.zeros(1, dtype=torch.int64))


def test_what_only_detects_is_neither_saved_nor_changed_nor_exported_nor_trained(tmp_path, tmp_path_factory):
    made = generate(tmp_path_factory.mktemp("data"), images=6, size=(64, 96))
    fast, data = fused(lived_in(detector_of("retinanet", "fpn"))), fpn.data.load(made)
    for use in (
        lambda: fpn.weights.save(fast, tmp_path / "b.safetensors"),
        lambda: fpn.weights.adapt(fast, ["c"]),
        lambda: fpn.export(fast, tmp_path / "b.onnx"),
        lambda: fpn.train(fast, data, out=tmp_path / "run"),
    ):
        with pytest.raises(OptionError, match="backend fused only detects: load the checkpoint without backend="):
            use()
    assert not list(tmp_path.iterdir())


def test_the_pyramid_cannot_be_looked_into_through_every_backend(tmp_path):
    with pytest.raises(OptionError, match="--pyramid looks into the detector, where backend compiled cannot"):
        evaluate(tmp_path / "a.safetensors", tmp_path, pyramid=True, backend="compiled")
