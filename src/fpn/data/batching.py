"""Split -> Samples -> Batches: the data set, the order of its images, and padding them to one size.

Everything random follows from (seed, epoch, index), so a run repeats whatever the number of workers. The batch sampler
hands out (epoch, index) pairs, which is how the epoch reaches workers that stay alive.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fpn.data.augment import Masks, Pair, Target, boxes_in, pair_of, plain
from fpn.data.dataset import Split
from fpn.data.images import image_size, read_image, shrink_for
from fpn.data.mixing import Mixing
from fpn.data.outlines import needed
from fpn.data.transforms import largest_size
from fpn.errors import DataError, ImageError, OptionError
from fpn.structures import Batch, Regions, Sample, Targets

Item = int | tuple[int, int]  # index, or (epoch, index)
Transform = Callable[..., Any]  # (image, target) -> (image, target), see transforms.py
TRIES = 20  # images in a row that may be unreadable before training gives up


class DetectionDataset(Dataset):
    """The samples of a split, ready for `collate`.

    Ignored boxes (crowds, difficult objects) are left out of the samples. An image that cannot be read brings a
    warning; in training the next readable image takes its place, otherwise the sample is None. `mixing` stands in for
    the transform in the epochs before `mixing.until`. With `masks` every box comes with the pixels of its object;
    raises DataError where the split has no outlines. Proposals that the split has go the way of the boxes.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform | None = None,
        training: bool = False,
        seed: int = 0,
        mixing: Mixing | None = None,
        masks: bool = False,
    ) -> None:
        self.split, self.transform, self.training, self.seed, self.mixing = split, transform, training, seed, mixing
        self.outlines = needed(split.outlines, f"{split.root}: the split {split.name}") if masks else None
        self.epoch = 0
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """The epoch for items that do not name theirs."""
        self.epoch = epoch

    def __getitem__(self, item: Item) -> Sample | None:
        """Raises DataError when training meets `TRIES` unreadable images in a row."""
        epoch, first = item if isinstance(item, tuple) else (self.epoch, item)
        if not 0 <= first < len(self):
            raise IndexError(first)
        tries = min(TRIES, len(self)) if self.training else 1
        for index in ((first + step) % len(self) for step in range(tries)):
            try:
                image, shrink = self._decoded(index, epoch)
            except ImageError as error:
                instead = "the next image takes its place" if self.training else "it is left out"
                self._warn(index, f"{error}; {instead}")
                continue
            return self._sample(image, index, epoch, shrink)
        if self.training:
            raise DataError(
                f"{self.split.path(first)} and the {tries - 1} images after it cannot be read; mend the files"
            )
        return None

    def _decoded(self, index: int, epoch: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """The image, and by how much its sides were divided in decoding.

        By 1 except for large JPEG files in training: evaluation and prediction see the same pixels.
        """
        height, width = size = tuple(self.split.sizes[index].tolist())
        mixed = self.mixing is not None and epoch < self.mixing.until
        wanted = largest_size(self.transform, size) if self.training and not mixed and self.outlines is None else None
        shrink = 1 if wanted is None else shrink_for(size, wanted)
        path = self.split.path(index)
        if shrink == 1 or image_size(path) != size:
            return self._read(index), 1
        image = read_image(path, shrink=shrink)
        return image, height // image.shape[1]

    def _read(self, index: int) -> UInt8[Tensor, "3 H W"]:
        """The image in the orientation in which it was annotated: as displayed, unless only the stored size fits."""
        path, annotated = self.split.path(index), tuple(self.split.sizes[index].tolist())
        image = read_image(path)
        if image.shape[1:] == annotated:
            return image
        if image.shape[:0:-1] == annotated:
            stored = read_image(path, apply_exif=False)
            if stored.shape[1:] == annotated:
                return stored
        height, width = image.shape[1:]
        self._warn(
            index,
            f"{path}: is {width}x{height}, but annotated as {annotated[1]}x{annotated[0]} (width x height); "
            "boxes are taken as pixels of the image as it is, correct the annotation",
        )
        return image

    def _warn(self, index: int, text: str) -> None:
        if index not in self._warned:
            self._warned.add(index)
            warnings.warn(text, stacklevel=3)

    def _sample(self, image: UInt8[Tensor, "3 H W"], index: int, epoch: int, shrink: int = 1) -> Sample:
        pair, seed = self._pair(image, index, shrink), seed_from(self.seed, epoch, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if self.mixing is not None and epoch < self.mixing.until:
                pair = self.mixing(pair, self._another)
            elif self.transform is not None:
                pair = self.transform(*pair)
        changed, boxes, labels = pair[0].as_subclass(Tensor), plain(pair[1]["boxes"]), pair[1]["labels"]
        height, width = changed.shape[1:]
        boxes, with_size = inside(boxes, (height, width))
        masks = None if self.outlines is None else plain(pair[1]["masks"])[with_size]
        size = (image.shape[1] * shrink, image.shape[2] * shrink)
        regions = None
        if self.split.regions is not None:
            regions, real = inside(followed(pair[1]), (height, width))
            regions = regions[real]
        return Sample(changed, boxes[with_size], labels[with_size], index, size, seed, masks, regions)

    def _pair(self, image: UInt8[Tensor, "3 H W"], index: int, shrink: int = 1) -> Pair:
        """An image, smaller by `shrink` than the boxes say, with what is to be learnt from it."""
        rows = self.split.rows(index)
        learnt = ~self.split.ignore[rows]
        boxes = torch.from_numpy(self.split.boxes[rows][learnt]).float().reshape(-1, 4) / shrink
        labels = torch.from_numpy(self.split.labels[rows][learnt])
        pair = pair_of(image, boxes, labels, self._masks(np.flatnonzero(learnt) + rows.start, image))
        if self.split.regions is not None:
            given = torch.from_numpy(self.split.regions.of(index)) / shrink
            pair[1]["regions"] = boxes_in(given, (image.shape[1], image.shape[2]))
        return pair

    def _masks(self, rows: np.ndarray, image: UInt8[Tensor, "3 H W"]) -> Masks:
        if self.outlines is None:
            return None
        masks = np.zeros((len(rows), *image.shape[1:]), np.uint8)
        for mask, row in zip(masks, rows.tolist(), strict=True):
            mask[:] = self.outlines.mask(row, self.split.boxes[row], (image.shape[1], image.shape[2]))
        return torch.from_numpy(masks)

    def _another(self) -> Pair | None:
        """A random image to be mixed in, None where it cannot be read."""
        index = int(torch.randint(len(self), ()))
        try:
            return self._pair(self._read(index), index)
        except ImageError as error:
            self._warn(index, f"{error}; it is not mixed into others")
            return None


def inside(boxes: Float[Tensor, "N 4"], size: tuple[int, int]) -> tuple[Float[Tensor, "N 4"], Bool[Tensor, " N"]]:
    """Boxes cut at the border of an image (height, width), and which of them something is left of."""
    height, width = size
    cut = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    return cut, (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])


def followed(target: Target) -> Float[Tensor, "R 4"]:
    """The proposals where a transform has moved them. Raises OptionError for one that has made another image."""
    if "regions" not in target:
        raise OptionError(
            "saved proposals cannot follow what cuts images or puts several into one: train without lsj, crop, mosaic, "
            "mixup and copy_paste"
        )
    return plain(target["regions"])


def seed_from(*numbers: int) -> int:
    """One well-mixed seed from several numbers."""
    return int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


def collate(samples: Sequence[Sample | None], multiple: int = 32, square: int | None = None) -> Batch | None:
    """Pads images with zeros at the right and bottom to one size, a multiple of `multiple` pixels; None without images.

    With `square` the batch is padded to a square with this side, or a larger one where an image does not fit.
    Targets have room for at least one box, so that no reduction over them is empty.
    """
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    sizes = torch.tensor([sample.image.shape[1:] for sample in kept])
    sides = sizes.amax(dim=0).tolist()
    if square is not None:
        sides = [max(square, *sides)] * 2
    height, width = (-(-side // multiple) * multiple for side in sides)
    most = max(1, *(len(sample.boxes) for sample in kept))
    images = torch.empty((len(kept), height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # as they are decoded
    boxes = torch.zeros((len(kept), most, 4))
    labels = torch.zeros((len(kept), most), dtype=torch.int64)
    valid = torch.zeros((len(kept), most), dtype=torch.bool)
    with_masks = all(sample.masks is not None for sample in kept)
    masks = torch.zeros((len(kept), most, height, width), dtype=torch.uint8) if with_masks else None
    for row, sample in enumerate(kept):
        n, (bottom, right) = len(sample.boxes), sample.image.shape[1:]
        images[row, :, :bottom, :right] = sample.image
        images[row, :, bottom:], images[row, :, :bottom, right:] = 0, 0
        boxes[row, :n], labels[row, :n], valid[row, :n] = sample.boxes, sample.labels, True
        if masks is not None and sample.masks is not None:
            masks[row, :n, :bottom, :right] = sample.masks
    original_sizes = torch.tensor([sample.original_size for sample in kept])
    indices = torch.tensor([sample.index for sample in kept])
    given = [sample.key for sample in kept if sample.key is not None]
    keys = torch.tensor(given) if len(given) == len(kept) else None
    targets, regions = Targets(boxes, labels, valid, masks), padded([sample.regions for sample in kept])
    return Batch(images, sizes, original_sizes, indices, targets, keys, regions)


def padded(regions: Sequence[Float[Tensor, "_ 4"] | None]) -> Regions | None:
    """The regions of several images in one tensor, with room for at least one; None where not all have some."""
    given = [boxes for boxes in regions if boxes is not None]
    if len(given) < len(regions):
        return None
    boxes = torch.zeros((len(given), max(1, *map(len, given)), 4))
    valid = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for row, found in enumerate(given):
        boxes[row, : len(found)], valid[row, : len(found)] = found, True
    return Regions(boxes, valid)


class GroupedBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), the same number on every rank; wide and tall images mix in one of an epoch at most.

    With `shuffle` (training) the order follows from seed and epoch; where the batches do not divide evenly among
    `world` ranks, some are repeated, or the rest is dropped with `drop_last`. Without `shuffle` (evaluation) every
    image comes exactly once over all ranks, similar sizes together; where there are fewer images than ranks, some
    get empty batches.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise OptionError(f"the batch size must be at least 1, not {batch_size}")
        if not 0 <= rank < world:
            raise OptionError(f"rank {rank} is not one of {world} processes")
        self.sizes, self.batch_size, self.shuffle, self.seed = split.sizes, batch_size, shuffle, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last and shuffle
        self.epoch = 0
        self._done = (0, 0)
        self._number = len(self._batches()) // world
        if drop_last and not self._number:
            raise OptionError(
                f"{len(split)} images do not fill a batch of {batch_size} on each of {world} processes; "
                "take a smaller batch size"
            )

    @property
    def sampler(self) -> GroupedBatches:
        """Itself: Lightning looks for `set_epoch` in `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def begin_at(self, epoch: int, done: int) -> None:
        """Go on in the middle: with this epoch, without the batches of this rank that are done already."""
        self.epoch, self._done = epoch, (epoch, done)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self._number

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        done = self._done[1] if epoch == self._done[0] else 0
        for batch in self._batches()[self.rank :: self.world][done:]:
            yield [(epoch, int(index)) for index in batch]

    def _batches(self) -> list[np.ndarray]:
        """The batches of all ranks; those of one step stand together."""
        return self._training_batches() if self.shuffle else self._evaluation_batches()

    def _training_batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng(seed_from(self.seed, self.epoch))
        order = rng.permutation(len(self.sizes))
        wide = self.sizes[order, 1] >= self.sizes[order, 0]
        groups = [order[wide], order[~wide]]
        batches, rest = [], []
        for group in groups:
            full = len(group) // self.batch_size * self.batch_size
            batches += _chunks(group[:full], self.batch_size)
            rest.append(group[full:])
        batches += _chunks(np.concatenate(rest), self.batch_size)
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        batches = [batches[place] for place in rng.permutation(len(batches))]
        surplus = len(batches) % self.world
        if surplus and self.drop_last:
            return batches[:-surplus]
        if surplus:
            batches += [batches[place % len(batches)] for place in range(self.world - surplus)]
        return batches

    def _evaluation_batches(self) -> list[np.ndarray]:
        heights, widths = self.sizes[:, 0], self.sizes[:, 1]
        order = np.lexsort((heights * widths, widths / np.maximum(heights, 1)))
        steps = -(-len(order) // (self.batch_size * self.world))
        return np.array_split(order, steps * self.world) if steps else []


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def loader(
    split: Split,
    transform: Transform | None,
    batch_size: int,
    training: bool,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
    multiple: int = 32,
    pin_memory: bool = False,
    mixing: Mixing | None = None,
    square: int | None = None,
    masks: bool = False,
    dataset: type[DetectionDataset] = DetectionDataset,
) -> DataLoader:
    """Batches of a split, shuffled when training. `pin_memory` speeds the way to a GPU; workers outlive the epoch.

    transform, mixing: what `training_transform` gives, or for evaluation `resize_transform` and None. multiple, square:
    see `collate`. masks: with the pixels of each object, for detectors that learn them. dataset: that of the split, as
    `fpn.data.tiles.TileDataset`.
    Call `loader.batch_sampler.set_epoch(epoch)` before each epoch. A batch of which no image can be read is None.
    """
    if workers < 0:
        raise OptionError(f"the number of workers must not be negative, it is {workers}")
    return DataLoader(
        dataset(split, transform, training, seed, mixing, masks),
        batch_sampler=GroupedBatches(split, batch_size, training, seed, rank, world, drop_last),
        num_workers=workers,
        collate_fn=partial(collate, multiple=multiple, square=square),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread if workers else None,
        generator=torch.Generator().manual_seed(seed % 2**32),  # leaves the global random state alone
    )


def _one_thread(worker: int) -> None:
    """Workers share the cores; threads within them would only get in each other's way."""
    torch.set_num_threads(1)
