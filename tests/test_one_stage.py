"""What RetinaNet, FCOS and ATSS have in common: they learn, are saved, survive any image, and are one graph."""

from __future__ import annotations

import pytest
import torch
from fresh import run
from one_stage import batch_of, detector_on, maps_of
from torch.utils._python_dispatch import TorchDispatchMode

import fpn
from fpn.model.losses import giou_loss
from fpn.model.postprocess import best_pairs, rated
from fpn.structures import Batch, Targets

MODELS = ["retinanet", "fcos", "atss"]


def detector_of(model: str, **options: object) -> fpn.model.detector.Detector:
    torch.manual_seed(0)
    return fpn.build(model, backbone="tiny", weights="none", classes=("a", "b"), short=64, width=32, **options)


def squares() -> Batch:
    """A bright square of class a, a dark one of class b, and an image with nothing in it."""
    images = torch.full((3, 3, 64, 96), 120, dtype=torch.uint8)
    images[0, :, 10:42, 20:52] = 250
    images[1, :, 8:56, 40:88] = 10
    boxes = torch.tensor([[[20.0, 10, 52, 42]], [[40, 8, 88, 56]], [[0, 0, 0, 0]]])
    targets = Targets(boxes, torch.tensor([[0], [1], [0]]), torch.tensor([[True], [True], [False]]))
    sizes = torch.tensor([[64, 96]] * 3)
    return Batch(images, sizes, sizes, torch.arange(3), targets)


@pytest.mark.parametrize("model", MODELS)
def test_it_learns_what_it_sees_and_a_checkpoint_keeps_it(model, tmp_path):
    detector, batch = detector_of(model, tower_norm="group"), squares()
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    terms = []
    for _ in range(25):
        losses = detector.losses(batch)
        assert losses.keys() == detector.loss_weights.keys()
        loss = torch.stack([detector.loss_weights[name] * value for name, value in losses.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(loss.item())
    assert terms[-1] < terms[0] / 2
    with torch.no_grad():
        before = detector.eval().detect(batch)
    for i, label in ((0, 0), (1, 1)):
        best = before[i]
        assert best.labels[0] == label
        assert fpn.boxes.iou(best.boxes[:1], batch.targets.boxes[i]) > 0.6
    again = fpn.load(fpn.weights.save(detector, tmp_path / "a.safetensors"))
    assert again.spec == detector.spec
    with torch.no_grad():
        after = again.detect(batch)
    for name in ("boxes", "scores", "labels", "levels", "count"):
        assert torch.equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize("model", MODELS)
def test_images_without_boxes_and_degenerate_boxes_give_finite_gradients(model):
    detector, batch = detector_of(model), squares()
    nothing = Targets(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.bool))
    tiny = torch.tensor([[[5.0, 5, 5.01, 5.01], [0, 0, 96, 64]]] * 3)
    odd = Targets(tiny, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool))
    for targets in (nothing, odd):
        losses = detector.losses(Batch(batch.images, batch.sizes, batch.sizes, batch.indices, targets))
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in losses.values())
        if targets is nothing:
            assert losses["class"] > 0 and all(value == 0 for name, value in losses.items() if name != "class")
        for name, parameter in detector.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_went_nan_give_no_detections(model):
    maps = {k: torch.full_like(p, torch.nan) for k, p in maps_of((64, 64), 1).items()}
    found = detector_on(maps, model).detect(batch_of((64, 64), [(64, 64)]))
    assert found.count.item() == 0 and torch.isfinite(found.boxes).all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("model", MODELS)
def test_thousands_of_boxes_do_not_need_thousands_of_times_the_memory(model, monkeypatch):
    chunk = 2**19
    for module in ("matching", "fcos", "atss"):
        monkeypatch.setattr(f"fpn.model.{module}.CHUNK", chunk)
    torch.manual_seed(0)
    low = torch.rand(1, 5000, 2) * 220
    boxes = torch.cat([low, low + 4 + torch.rand(1, 5000, 2) * 30], dim=2)
    maps = maps_of((256, 256), 1)
    detector = detector_on(maps, model, anchor_scales=(1.0,))
    targets = Targets(boxes, torch.zeros(1, 5000, dtype=torch.int64), torch.ones(1, 5000, dtype=torch.bool))
    some = batch_of((256, 256), [(256, 256)])
    with Largest() as largest, torch.no_grad():
        losses = detector.losses(Batch(some.images, some.sizes, some.sizes, some.indices, targets))
    assert all(torch.isfinite(value) for value in losses.values())
    pairs = 5000 * sum(p.shape[2] * p.shape[3] for p in maps.values())
    assert largest.elements <= 2 * chunk < pairs / 6


def test_the_best_pairs_are_those_of_a_full_sort():
    torch.manual_seed(0)
    logits, centerness = torch.randn(2, 40, 5), torch.randn(2, 40)
    every = rated(logits, centerness[..., None], True).flatten(1)
    for count in (30, 200, 500):
        scores, place, label = best_pairs(logits, centerness, count, True)
        value, position = every.topk(min(count, 200))
        assert scores.shape == (2, count) and (scores[:, 200:] == -1).all()
        torch.testing.assert_close(scores[:, :200], value)
        assert torch.equal((place * 5 + label)[:, :200], position)


PRELUDE = """
    import sys, torch, fpn
    from fpn.structures import Batch

    torch.manual_seed(0)
    detector = fpn.build(sys.argv[1], backbone="tiny", classes=["a", "b", "c"], weights="none", width=32, score=0.1,
                         candidates=100).eval()
    for layer in (detector.head.classes, detector.head.offsets):
        torch.nn.init.normal_(layer.weight, std=0.1)
    for conv in (m for m in detector.head.box_tower if isinstance(m, torch.nn.Conv2d)):
        torch.nn.init.normal_(conv.weight, std=0.08)
    for conv in (m for m in detector.head.class_tower if isinstance(m, torch.nn.Conv2d)):
        torch.nn.init.normal_(conv.weight, std=0.08)
    torch.nn.init.constant_(detector.head.classes.bias, -1.0)

    def batch(height, width, count):
        images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        sizes = torch.tensor([[height, width]] * count) - torch.arange(count)[:, None] * 8
        return Batch(images, sizes, sizes, torch.arange(count))

    def same(a, b):
        assert a.count.sum() > 0 and torch.equal(a.count, b.count) and torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_detect_compiles_without_a_graph_break(model):
    run(
        PRELUDE,
        """
        compiled = torch.compile(detector.detect, fullgraph=True, backend="eager")
        with torch.no_grad():
            for shape in ((128, 160, 2), (160, 128, 2)):
                some = batch(*shape)
                same(detector.detect(some), compiled(some))
        """,
        arguments=[model],
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_detect_exports_with_dynamic_height_and_width(model):
    run(
        PRELUDE,
        """
        from torch.export import Dim
        # torch 2.11 exports for sides above 128 only if the example has them: a P7 of one place is a case of its own.
        sides = {2: 32 * Dim("h", min=5, max=40), 3: 32 * Dim("w", min=5, max=40)}
        shapes = {"batch": [sides, {}, {}, {}]}
        with torch.no_grad():
            exported = torch.export.export(detector, (batch(160, 288, 2),), dynamic_shapes=shapes).module()
            for shape in ((160, 288, 2), (192, 320, 2), (288, 160, 2)):
                some = batch(*shape)
                same(detector.detect(some), exported(some))
        """,
        arguments=[model],
    )


def test_the_giou_loss_in_numbers():
    # Two unit squares a unit apart: no overlap, a hull of 3, of which 1 is empty; the same box; and no positive.
    wanted = torch.tensor([[[0.0, 0, 1, 1]] * 3])
    boxes = torch.tensor([[[2.0, 0, 3, 1], [0, 0, 1, 1], [5, 5, 6, 6]]], requires_grad=True)
    loss = giou_loss(boxes, wanted, torch.tensor([[True, True, False]]), torch.tensor(2.0))
    assert loss.item() == pytest.approx((1 + 1 / 3) / 2, abs=1e-5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    assert boxes.grad is not None and "aten::item" not in {event.key for event in profile.key_averages()}
