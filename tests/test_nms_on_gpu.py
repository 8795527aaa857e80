"""The way of NMS that GPUs take, decided by Triton's interpreter on the CPU: the boxes that torchvision keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fpn.model.postprocess import detections_of

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton")

CODE = """
import torch, torchvision
from fpn.model.nms_triton import BLOCK, greedy

def kept(boxes, scores, groups, valid, threshold):
    keep = torch.zeros_like(valid)
    for i in range(len(boxes)):
        for group in groups[i].unique():
            rows = (valid[i] & (groups[i] == group)).nonzero()[:, 0]
            keep[i, rows[torchvision.ops.nms(boxes[i, rows].float(), scores[i, rows].float(), threshold)]] = True
    return keep

def check(boxes, scores, groups, valid, threshold=0.5):
    found = greedy(boxes, scores, groups, valid, threshold)
    assert torch.equal(found, kept(boxes, scores, groups, valid, threshold)), (boxes.shape, threshold)
    return found

def boxes_in(extent, side, *shape):
    corner = torch.rand(*shape, 2) * extent
    return torch.cat([corner, corner + torch.rand(*shape, 2) * side], -1)

def one_group(boxes, scores=None):
    count = boxes.shape[1]
    scores = torch.linspace(1, 0.1, count)[None] if scores is None else scores
    return boxes, scores, torch.zeros(1, count, dtype=torch.int64), torch.ones(1, count, dtype=torch.bool)

torch.manual_seed(0)
for seed in range(25):  # sizes around those of a block; few and many groups; scattered, clustered; with ties
    count = int(torch.randint(1, 3 * BLOCK, ()))
    kinds = int(torch.randint(1, (2, 5, 200)[seed % 3], ()))
    boxes = boxes_in((10, 100, 1000)[seed % 3], 60, 2, count)
    scores = torch.rand(2, count).mul(9).round().div(9) if seed % 2 else torch.rand(2, count)
    valid = torch.rand(2, count) < (1.0, 0.7, 0.05)[seed % 3]
    check(boxes, scores, torch.randint(kinds, (2, count)), valid, (0.3, 0.5, 0.7)[seed // 3 % 3])
for count in (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):  # groups that end with a block
    boxes, scores, groups, valid = one_group(boxes_in(40, 40, 1, 3 * BLOCK))
    groups[:, count:] = 2**40
    check(boxes, scores, groups, valid)
# A chain, every box suppressing the next: the longest way to an answer there is.
left = torch.arange(3 * BLOCK + 7) * 3.0
chain = torch.stack([left, left * 0, left + 10, left * 0 + 10], dim=1)[None]
found = check(*one_group(chain))
assert torch.equal(found[0], torch.arange(len(left)) % 2 == 0)
check(*one_group(chain, torch.full((1, len(left)), 0.5)))
check(*one_group(chain[:, torch.randperm(len(left))]))
assert check(*one_group(torch.tensor([[[0.0, 0, 5, 5]]]).expand(1, 2 * BLOCK, 4))).sum() == 1
assert check(*one_group(torch.zeros(1, 70, 4))).all()  # empty boxes overlap nothing
boxes, scores, groups, valid = one_group(boxes_in(40, 40, 1, 70))
check(boxes.mT.contiguous().mT, scores, groups, (boxes[..., 0] < 30).t().contiguous().t())  # laid out in another order
check(boxes.bfloat16(), scores.bfloat16(), groups, valid)
assert not greedy(boxes * torch.nan, scores * torch.nan, groups, torch.zeros_like(valid), 0.5).any()
assert greedy(boxes[:, :0], scores[:, :0], groups[:, :0], valid[:, :0], 0.5).shape == (1, 0)
assert greedy(boxes[:0], scores[:0], groups[:0], valid[:0], 0.5).shape == (0, 70)
"""


@needs_triton
@pytest.mark.slow
def test_a_gpu_keeps_what_torchvision_keeps():
    # A process of its own: whether Triton interprets is settled when it is imported.
    run = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]


@needs_triton
def test_what_surrounds_the_kernel_reads_no_value(monkeypatch):
    from fpn.model import nms_triton

    class Launched:
        grids: list[tuple[int, int]] = []

        def __getitem__(self, grid):
            self.grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(nms_triton, "survive", Launched())
    scores, groups = torch.rand(2, 9, device="meta"), torch.zeros(2, 9, dtype=torch.int64, device="meta")
    keep = nms_triton.greedy(torch.rand(2, 9, 4, device="meta"), scores, groups, groups.bool(), 0.5)
    assert keep.shape == (2, 9) and keep.dtype == torch.bool and Launched.grids == [(9, 2)]


def test_only_the_best_pairs_go_into_the_nms_and_change_nothing(monkeypatch):
    torch.manual_seed(0)
    scores, corner = (torch.randn(2, 60, 5) * 2).softmax(-1), torch.rand(2, 60, 4, 2) * 200
    boxes = torch.cat([corner, corner + torch.rand(2, 60, 4, 2) * 100], dim=-1)
    rest = torch.rand(2, 60) < 0.9, torch.randint(2, 6, (2, 60)), torch.full((2, 2), 250), 0.05, 0.5, 10
    every = detections_of(scores, boxes, *rest)
    assert (scores[..., :-1] > 0.05).sum(dim=(1, 2)).min() > 50
    monkeypatch.setattr("fpn.model.postprocess.CANDIDATES", 50)
    some = detections_of(scores, boxes, *rest)
    for name in ("boxes", "scores", "labels", "levels", "count"):
        assert torch.equal(getattr(every, name), getattr(some, name)), name


def test_where_triton_fails_torchvision_takes_its_place_and_that_is_said_once(monkeypatch):
    from fpn.model import nms

    monkeypatch.setattr(nms, "triton_works", True)
    monkeypatch.setitem(sys.modules, "fpn.model.nms_triton", None)  # importing it is an ImportError
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]]])
    rest = (
        torch.tensor([[0.9, 0.8, 0.7]]),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.ones(1, 3, dtype=torch.bool),
        0.5,
    )
    with pytest.warns(UserWarning, match="NMS waits for the GPU"):
        assert nms.on_gpu(boxes, *rest).tolist() == [[True, False, True]]
    assert nms.on_gpu(boxes, *rest).tolist() == [[True, False, True]]  # without a warning, which would be an error
