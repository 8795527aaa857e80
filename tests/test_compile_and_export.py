"""`detect` whole through torch.compile and torch.export, with the eager results."""

import pytest
from fresh import run

PRELUDE = """
    import torch, fpn
    from fpn.structures import Batch

    torch.manual_seed(0)
    torch.set_num_threads(2)
    detector = fpn.build(backbone="tiny", classes=["a", "b", "c"], weights="none", width=32, hidden=64, score=0.2,
                         proposals_per_level=(100, 100), proposals=(200, 200)).eval()
    for layer in (detector.box_head.classes, detector.box_head.offsets, detector.rpn.objectness, detector.rpn.offsets):
        torch.nn.init.normal_(layer.weight, std=0.2)

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
def test_detect_compiles_without_a_graph_break():
    run(
        PRELUDE,
        """
        compiled, traced = (torch.compile(detector.detect, fullgraph=True, backend=b) for b in ("inductor", "eager"))
        with torch.no_grad():
            for shape in ((128, 160, 2), (160, 128, 2)):
                some = batch(*shape)
                same(detector.detect(some), traced(some))
            same(detector.detect(some), compiled(some))
    """,
    )


@pytest.mark.slow
def test_detect_exports_with_dynamic_height_and_width():
    run(
        PRELUDE,
        """
        from torch.export import Dim
        sides = {2: 32 * Dim("h", min=3, max=40), 3: 32 * Dim("w", min=3, max=40)}
        shapes = {"batch": [sides, {}, {}, {}]}
        with torch.no_grad():
            exported = torch.export.export(detector, (batch(128, 160, 2),), dynamic_shapes=shapes).module()
            for shape in ((128, 160, 2), (96, 320, 2), (224, 128, 2), (160, 224, 2)):  # P5 odd and even
                some = batch(*shape)
                same(detector.detect(some), exported(some))
    """,
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["faster_rcnn", "retinanet"])
def test_losses_compile_without_a_graph_break_under_autocast(model):
    run(
        PRELUDE,
        """
        import sys
        from dataclasses import replace
        from fpn.structures import Targets

        boxes = torch.rand(2, 4, 4) * 40 + torch.tensor([0.0, 0, 50, 50])
        targets = Targets(boxes, torch.randint(0, 3, (2, 4)), torch.ones(2, 4, dtype=torch.bool))
        some = replace(batch(128, 160, 2), targets=targets, keys=torch.arange(2))
        detector = fpn.build(sys.argv[1], backbone="tiny", classes=["a", "b", "c"], weights="none", width=32).train()
        compiled = torch.compile(detector.losses, fullgraph=True, dynamic=False, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            losses, wanted = compiled(some), detector.losses(some)
        torch.testing.assert_close(losses, wanted, atol=1e-3, rtol=1e-2)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in detector.parameters())
    """,
        arguments=[model],
    )
