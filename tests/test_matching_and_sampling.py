"""Which anchors stand for which boxes, and which of them are looked at."""

from dataclasses import replace

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import fpn
from fpn.data import collate
from fpn.data.generated import generate
from fpn.model import matching
from fpn.model.matching import BACKGROUND, IGNORED, match
from fpn.model.sampling import BOX_HEAD, RPN, draw, mix, sample
from fpn.structures import Sample

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
    chosen = sample(matched, 256, 0.5, torch.tensor([1, 2, 3]), RPN)
    assert chosen.positions.shape == (3, 256)
    assert chosen.valid.sum(1).tolist() == [256, 256, 7]
    assert chosen.positive.sum(1).tolist() == [128, 10, 0]
    for i in range(3):
        positions = chosen.positions[i][chosen.valid[i]]
        assert len(set(positions.tolist())) == len(positions)
        assert torch.equal(matched[i][positions] >= 0, chosen.positive[i][chosen.valid[i]])
        assert (matched[i][positions] != IGNORED).all()


def test_where_all_are_wanted_only_positives_beyond_their_share_stay_out():
    matched = torch.full((2, 1000), BACKGROUND)
    matched[0, :5] = 0
    matched[1, :600] = 0
    matched[:, 990:] = IGNORED
    chosen = sample(matched, 2**30, 0.5, torch.tensor([1, 2]), RPN)
    assert chosen.positive.sum(1).tolist() == [5, 500]
    assert chosen.valid.sum(1).tolist() == [990, 890]


def test_sampling_is_fair():
    images = 20_000
    chosen = sample(torch.zeros(images, 20, dtype=torch.int64), 10, 0.5, torch.arange(images), RPN)
    hits = chosen.positions[chosen.positive].bincount(minlength=20)
    assert hits.sum() == images * 5
    assert (hits / images - 0.25).abs().max() < 0.0125  # 5 of 20, within 4 standard deviations


def surprise(counts):
    """How far counts are from equal, in standard deviations of chi-square."""
    wanted, freedom = counts.sum() / counts.numel(), counts.numel() - 1
    return (((counts - wanted) ** 2 / wanted).sum().item() - freedom) / (2 * freedom) ** 0.5


def test_the_hash_on_worked_numbers():
    # MurmurHash3's finalizer as published, with multipliers that overflow 64 signed bits
    x = 0x12345678
    y = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    y = (y ^ y >> 13) * 0xC2B2AE35 % 2**32
    assert mix(x) == mix(torch.tensor(x)).item() == y ^ y >> 16
    assert mix(torch.tensor([0, 1, 2**32 - 1])).tolist() == [0, 0x514E28B7, 0x81F16F39]
    # what resumed runs rely on, from one version to the next
    assert draw(torch.tensor([0, 2**62 + 12345]), RPN, 3).tolist() == [
        [215606638, 3726610979, 2411201074],
        [1887825822, 3567306084, 2171966035],
    ]
    assert draw(torch.tensor([-1]), BOX_HEAD, 2).tolist() == [[4027382476, 3852598554]]


def test_luck_is_even_and_never_the_same_twice_in_an_image():
    for keys in (torch.arange(4), torch.arange(4) * 2**32, torch.tensor([7, 2**40 + 3, 2**62, 2**63 - 1])):
        for stage in (RPN, BOX_HEAD):
            luck = draw(keys, stage, 2**15)
            assert torch.equal(luck, draw(keys, stage, 2**15))
            for one in luck:
                assert one.min() >= 0 and one.max() < 2**32 and len(one.unique()) == 2**15
                assert abs(surprise((one >> 24).bincount(minlength=256))) < 5
                assert abs(surprise((one & 255).bincount(minlength=256))) < 5
                pairs = (one[:-1] >> 28) * 16 + (one[1:] >> 28)
                assert abs(surprise(pairs.bincount(minlength=256))) < 5


def test_luck_of_images_stages_and_positions_has_nothing_in_common():
    keys = torch.cat([torch.arange(4), torch.arange(1, 4) * 2**32])
    luck = torch.cat([draw(keys, stage, 2**17) for stage in (RPN, BOX_HEAD)]).double() / 2**32 - 0.5
    correlation = (luck @ luck.T / 2**17 * 12).fill_diagonal_(0).abs().max()
    assert correlation < 5 / 2**8.5  # standard deviations
    first = draw(torch.arange(2**15), RPN, 8)
    for position in range(7):
        pairs = (first[:, position] >> 28) * 16 + (first[:, position + 1] >> 28)
        assert abs(surprise(pairs.bincount(minlength=256))) < 5


def test_an_image_gets_the_same_examples_in_any_company():
    generator = torch.Generator().manual_seed(0)
    matched = torch.randint(-2, 2, (4, 3000), generator=generator)
    keys = torch.tensor([11, 12, 13, 12])
    together = sample(matched, 256, 0.25, keys, RPN)
    for i in (0, 1, 2):
        alone = sample(matched[i : i + 1], 256, 0.25, keys[i : i + 1], RPN)
        assert torch.equal(alone.positions[0], together.positions[i])
        assert torch.equal(alone.positive[0], together.positive[i])
    other = sample(matched, 256, 0.25, keys, BOX_HEAD)
    assert not torch.equal(other.positions.sort(1).values, together.positions.sort(1).values)


def keys_of(split, seed, epoch, workers=0):
    """The key of each image of an epoch, by its index."""
    batches = fpn.data.loader(split, None, 3, training=True, seed=seed, workers=workers)
    batches.batch_sampler.set_epoch(epoch)
    return {index: key for b in batches for index, key in zip(b.indices.tolist(), b.keys.tolist(), strict=True)}


def test_keys_follow_from_seed_epoch_and_image(tmp_path):
    split = fpn.data.load(generate(tmp_path / "shapes", images=8, size=(64, 64), seed=2))["train"]
    keys = keys_of(split, seed=0, epoch=1)
    assert len(set(keys.values())) == len(keys) == len(split)
    assert keys == keys_of(split, seed=0, epoch=1, workers=1)
    assert not set(keys.values()) & (set(keys_of(split, 0, 2).values()) | set(keys_of(split, 1, 1).values()))


def test_keys_decide_the_losses_and_without_them_the_global_seed_does():
    torch.manual_seed(0)
    detector = fpn.build(
        backbone="tiny",
        classes=["a"],
        weights="none",
        width=16,
        hidden=32,
        rpn_examples=16,
        proposals=(50, 50),
        box_examples=16,
    )
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with_key = collate([Sample(image, torch.tensor([[5.0, 5, 40, 50]]), torch.tensor([0]), 0, (64, 64), key=3)])

    def loss(batch, seed):
        torch.manual_seed(seed)
        return detector.losses(batch)["rpn_class"].item()

    assert loss(with_key, 0) == loss(with_key, 1)
    for other in (replace(with_key, keys=None), replace(with_key, keys=torch.tensor([4]))):
        assert loss(other, 0) == loss(other, 0) != loss(with_key, 0)
    assert loss(replace(with_key, keys=None), 0) != loss(replace(with_key, keys=None), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_choice_is_the_same_on_a_gpu():
    matched, keys = torch.randint(-2, 2, (3, 50_000)), torch.tensor([5, 2**50, 2**62 + 1])
    here, there = sample(matched, 512, 0.5, keys, RPN), sample(matched.cuda(), 512, 0.5, keys.cuda(), RPN)
    assert torch.equal(here.positions, there.positions.cpu()) and torch.equal(here.positive, there.positive.cpu())


def test_fewer_anchors_than_examples():
    chosen = sample(torch.tensor([[0, BACKGROUND, IGNORED]]), 256, 0.5, torch.tensor([0]), RPN)
    assert chosen.valid.sum() == 2 and chosen.positive.sum() == 1
