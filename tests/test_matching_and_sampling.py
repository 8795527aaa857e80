"""Which anchors stand for which boxes, and which of them are looked at."""

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from fpn.model import matching
from fpn.model.matching import BACKGROUND, IGNORED, match
from fpn.model.sampling import sample

YES = torch.ones(1, 1, dtype=torch.bool)


def test_worked_numbers():
    truth = torch.tensor([[[0.0, 0, 10, 10]]])
    anchors = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [20, 20, 30, 30]]])  # IoU 1, 0.5, 0.2, 0
    assert match(truth, YES, anchors, 0.7, 0.3, True)[0].tolist() == [0, IGNORED, BACKGROUND, BACKGROUND]
    # 0.5 is positive at a threshold of 0.5: the threshold itself counts
    assert match(truth, YES, anchors, 0.5, 0.5, False)[0].tolist() == [0, 0, BACKGROUND, BACKGROUND]


def test_the_best_anchor_of_a_box_is_kept_however_poor():
    truth, anchors = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[[0.0, 0, 10, 1], [50, 50, 60, 60]]])
    assert match(truth, YES, anchors, 0.7, 0.3, True)[0].tolist() == [0, BACKGROUND]
    assert match(truth, YES, anchors, 0.7, 0.3, False)[0].tolist() == [BACKGROUND, BACKGROUND]


def test_a_box_that_no_anchor_touches_claims_none():
    truth = torch.tensor([[[100.0, 100, 110, 110]]])
    assert match(truth, YES, torch.tensor([[[0.0, 0, 10, 10]]]), 0.7, 0.3, True).tolist() == [[BACKGROUND]]


def test_padding_is_never_matched():
    truth = torch.tensor([[[0.0, 0, 10, 10]]])
    assert match(truth, ~YES, truth, 0.7, 0.3, True).tolist() == [[BACKGROUND]]


def test_equal_to_torchvisions_matcher_in_any_chunk_size(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 400, 4, generator=generator) * 80
    anchors = torch.cat([corner[..., :2], corner[..., :2] + corner[..., 2:] + 4], -1)
    truth, valid = anchors[:, :37] + torch.rand(2, 37, 4, generator=generator) * 8, torch.rand(2, 37) < 0.8
    valid[:, 0] = True
    for chunk in (1, 10_000, 10_000_000):
        monkeypatch.setattr(matching, "CHUNK", chunk)
        for keep_best in (True, False):
            mine = match(truth, valid, anchors, 0.7, 0.3, keep_best)
            for i in range(2):
                theirs = Matcher(0.7, 0.3, keep_best)(box_iou(truth[i][valid[i]], anchors[i]))
                position = valid[i].nonzero()[:, 0]
                theirs = torch.where(theirs >= 0, position[theirs.clamp(min=0)], theirs)
                assert torch.equal(mine[i], theirs)


def test_sampling_takes_what_it_promises():
    matched = torch.full((3, 1000), BACKGROUND)
    matched[0, :300] = torch.arange(300)  # more positives than wanted
    matched[1, :10] = 5  # fewer
    matched[2] = IGNORED
    matched[2, :7] = BACKGROUND  # nearly nothing to choose from
    chosen = sample(matched, 256, 0.5)
    assert chosen.positions.shape == (3, 256)
    assert chosen.valid.sum(1).tolist() == [256, 256, 7]
    assert chosen.positive.sum(1).tolist() == [128, 10, 0]
    for i in range(3):
        positions = chosen.positions[i][chosen.valid[i]]
        assert len(set(positions.tolist())) == len(positions)
        assert torch.equal(matched[i][positions] >= 0, chosen.positive[i][chosen.valid[i]])
        assert (matched[i][positions] != IGNORED).all()


def test_sampling_is_fair():
    torch.manual_seed(0)
    hits = torch.zeros(20)
    for _ in range(400):
        hits[sample(torch.zeros(1, 20, dtype=torch.int64), 10, 0.5).positions[0, :5]] += 1
    assert (hits / 400 - 0.25).abs().max() < 0.1  # 5 of 20


def test_fewer_anchors_than_examples():
    chosen = sample(torch.tensor([[0, BACKGROUND, IGNORED]]), 256, 0.5)
    assert chosen.valid.sum() == 2 and chosen.positive.sum() == 1
