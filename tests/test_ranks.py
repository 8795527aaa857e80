"""Two processes with half of the images each learn what one process with all of them learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fresh import start
from torch import Tensor, nn

import fpn
from fpn.data import collate
from fpn.structures import Batch, Sample

# Boxes an image, of four images; the first process has the first two.
CASES = {"both have boxes": (3, 1, 2, 6), "only one has boxes": (4, 9, 0, 0), "none has boxes": (0, 0, 0, 0)}
TERMS = ("rpn_class", "rpn_box", "class", "box")


class Losses(nn.Module):
    """What DistributedDataParallel wraps: a module whose forward gives the losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Without statistics over the batch. More examples wanted than there are and many anchors ignored, so that the
        # processes have different numbers of examples.
        self.detector = fpn.build(
            backbone="tiny",
            classes=["a", "b"],
            weights="none",
            backbone_norm="frozen",
            width=16,
            hidden=32,
            rpn_examples=5000,
            rpn_negative=0.05,
            proposals=(60, 60),
            box_positive_fraction=0.9,
        ).train()
        rpn, head = self.detector.rpn, self.detector.box_head
        for layer in (rpn.objectness, rpn.offsets, head.classes, head.offsets):
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, batch: Batch) -> Tensor:
        losses = self.detector.losses(batch)
        return torch.stack([losses[name] for name in TERMS])


def batch_of(counts: tuple[int, ...], first: int, last: int) -> Batch:
    """Images `first` to `last` of a case; an image is the same in whatever batch it comes."""
    samples = []
    for index in range(first, last):
        generator = torch.Generator().manual_seed(index)
        corner = torch.rand(counts[index], 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 8 + torch.rand(counts[index], 2, generator=generator) * 25], dim=1)
        image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        samples.append(Sample(image, boxes, torch.arange(len(boxes)) % 2, index, (64, 96), key=index + 100))
    batch = collate(samples)
    assert batch is not None
    return batch


def learn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss terms, and the gradient of every parameter."""
    model.zero_grad()
    terms = model(batch)
    terms.sum().backward()
    return terms.detach(), {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}


def one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Losses())
    results = []
    for counts in CASES.values():
        terms, gradients = learn(model, batch_of(counts, 2 * rank, 2 * rank + 2))
        results.append((terms, {name: grad.clone() for name, grad in gradients.items() if grad is not None}))
    if rank == 0:  # a loss that is only measured waits for no other process
        with torch.no_grad():
            model.module(batch_of((1,), 0, 1))
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


ONE_OF_TWO = """
import sys
from pathlib import Path

import torch
from test_ranks import one_of_two

torch.set_num_threads(1)
one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """For each process, for each case: its loss terms, and the gradients it was left with."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [start(ONE_OF_TWO, rank, folder, log=folder / f"{rank}.txt") for rank in (0, 1)]
    try:
        for rank, process in enumerate(ranks):
            process.join(240)
            assert process.exitcode == 0, (folder / f"{rank}.txt").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_losses_and_gradients_of_one(case, halves):
    (first, gradients), (second, other) = (half[list(CASES).index(case)] for half in halves)
    terms, wanted = learn(Losses(), batch_of(CASES[case], 0, 4))
    torch.testing.assert_close((first + second) / 2, terms, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == other.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad is not None and torch.equal(gradients[name], other[name])
        assert (gradients[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


def test_a_mean_of_two_means_would_be_something_else():
    counts = CASES["both have boxes"]
    model = Losses()
    terms, _ = learn(model, batch_of(counts, 0, 4))
    alone = [learn(model, batch_of(counts, first, first + 2))[0] for first in (0, 2)]
    assert ((sum(alone) / 2 - terms).abs() > 1e-5).all()
