"""Detection in overlapping tiles: small objects in large images, in memory that does not grow with the image.

What a tile's border cuts, the neighbour sees whole, or at least more of it, where it is no longer than the overlap:
there the neighbour alone answers for it. Longer objects are put together from their pieces, or come from a look at the
whole image, made smaller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torchvision.ops import batched_nms
from tqdm import tqdm

from fpn.boxes import area
from fpn.data.tiles import Grid, check_tiles, grid
from fpn.inference.finder import Finder
from fpn.model.masks import resampled
from fpn.structures import Detections

SLACK = 0.05  # of an object's length: how far from its edge a detector may put it, besides a pixel
AGREE = 0.5  # IoU, along the border, of two pieces of one object
INSIDE = 0.7  # of the area of a piece that lies in the box of the object that it is of
LARGEST = 4096  # pixels of the longer side of whole images; larger ones are made smaller before the detector does it
PAIRS = 2**20  # of pieces and objects that are compared at once
PIXELS = 2**30  # of a picture that is looked at in tiles; Pillow's own limit is a sixth of that
PATIENCE = 3.0  # seconds before the bar shows


def tiled(
    find: Finder, tile: int, overlap: float = 0.2, *, batch: int = 4, iou: float = 0.5, progress: bool = True
) -> Finder:
    """`find` in tiles of `tile` pixels a side that share `overlap` of it, and once in the whole image.

    Every object comes once, in pixels of the image: what the border of a tile cuts comes whole, and of boxes of one
    class that overlap by more than `iou` the best is kept. Images no larger than a tile are given to `find` as they
    are. batch: tiles given to `find` at once. progress: a bar where an image takes long. Raises OptionError for a tile
    or an overlap that cannot work.
    """
    check_tiles(tile, overlap)
    return partial(_find_in_tiles, find, tile, overlap, batch, iou, progress)


def _find_in_tiles(
    find: Finder, tile: int, overlap: float, batch: int, iou: float, progress: bool, images: Sequence[Tensor]
) -> list[Detections]:
    grids = [grid((image.shape[1], image.shape[2]), tile, overlap) for image in images]
    looks = [(n, window) for n, each in enumerate(grids) for window in each.windows.tolist()]
    found: list[list[Detections]] = [[] for _ in images]
    total = len(looks) + sum(len(each) > 1 for each in grids)
    disable = None if progress else True
    with tqdm(total=total, desc="tiles", unit=" tiles", delay=PATIENCE, leave=False, disable=disable) as bar:
        for first in range(0, len(looks), batch):
            some = looks[first : first + batch]
            parts = [images[n][:, top : top + high, left : left + wide] for n, (top, left, high, wide) in some]
            for (n, _), one in zip(some, find(parts), strict=True):
                found[n].append(one)
            bar.update(len(some))
        merged = []
        for image, each, parts in zip(images, grids, found, strict=True):
            if len(each) == 1:
                merged += parts
            else:
                whole = longer(find_in_whole(find, image), overlap * tile)
                merged.append(merge(parts, each, whole, iou))
                bar.update()
    return merged


def accept_large_pictures() -> None:
    """Let Pillow read pictures of up to `PIXELS` pixels in this process, which are safe to look at in tiles."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow warns from here on, and refuses twice as much


def find_in_whole(find: Finder, image: UInt8[Tensor, "3 H W"]) -> Detections:
    """The detections in an image, which is made smaller where it is huge."""
    factor = max(1, max(image.shape[1:]) // LARGEST)
    found = find([image if factor == 1 else shrunk(image, factor)])[0]
    limits = found.boxes.new_tensor([image.shape[2], image.shape[1]] * 2)
    return replace(found, boxes=torch.minimum(found.boxes * factor, limits))


def shrunk(image: UInt8[Tensor, "3 H W"], factor: int) -> UInt8[Tensor, "3 h w"]:
    """The means of squares of `factor` pixels a side. Strip by strip: all at once would take 4 bytes a value."""
    strips = image.split(64 * factor, dim=1)
    means = (F.avg_pool2d(strip.float(), factor, ceil_mode=True) for strip in strips)
    return torch.cat([mean.round_().to(torch.uint8) for mean in means], dim=1)


def longer(found: Detections, length: float) -> Detections:
    """Those that are longer than this on a side: what is not, some tile sees whole, and better."""
    return found.take((found.boxes[:, 2:] - found.boxes[:, :2]).amax(dim=1) > length)


def merge(parts: Sequence[Detections], tiles: Grid, whole: Detections, iou: float) -> Detections:
    """The detections in the tiles of an image, row by row, and in the whole image, as those of the image."""
    found, tile = laid_out(parts, tiles)
    cut, seen_better = borders(found.boxes, tile, tiles)
    found, tile, cut = found.take(~seen_better), tile[~seen_better], cut[~seen_better]
    pieces = cut.any(dim=1)
    joined, open_ = join(found.take(pieces), tile[pieces], cut[pieces])
    objects = together([whole, joined.take(~open_)])
    objects, left = absorb(objects, joined.take(open_))
    every = together([found.take(~pieces), objects, left])
    return every.take(batched_nms(every.boxes, every.scores, every.labels, iou))


def laid_out(parts: Sequence[Detections], tiles: Grid) -> tuple[Detections, Int64[Tensor, "N 2"]]:
    """All detections in pixels of the image, and the row and column of the tile of each."""
    number = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
    corners = torch.from_numpy(tiles.windows)[number, :2].flip(1)
    found = together(parts)
    moved = replace(found, boxes=found.boxes + corners.repeat(1, 2).to(found.boxes.dtype))
    return moved, torch.stack([number // len(tiles.lefts), number % len(tiles.lefts)], dim=1)


def borders(
    boxes: Float[Tensor, "N 4"], tile: Int64[Tensor, "N 2"], tiles: Grid
) -> tuple[Bool[Tensor, "N 4"], Bool[Tensor, " N"]]:
    """Which sides of a box (left, top, right, bottom) its tile cuts, and whether another tile sees more of it."""
    cut, seen_better = torch.zeros_like(boxes, dtype=torch.bool), torch.zeros(len(boxes), dtype=torch.bool)
    for axis, begins in enumerate((tiles.lefts, tiles.tops)):
        begin = torch.tensor(begins)
        end = begin + tiles.size[1 - axis]
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        slack = 1 + SLACK * (high - low)
        free_low = (low > begin + slack) | (begin == 0)
        free_high = (high < end - slack) | (end == end[-1])
        own = tile[:, 1 - axis, None]
        cut[:, axis], cut[:, axis + 2] = ~free_low.gather(1, own)[:, 0], ~free_high.gather(1, own)[:, 0]
        # A tile of the same row (or column) sees as much of it on the other axis.
        seen_better |= (cut[:, axis] | cut[:, axis + 2]) & (free_low & free_high).any(dim=1)
    return cut, seen_better


def join(
    pieces: Detections, tile: Int64[Tensor, "N 2"], cut: Bool[Tensor, "N 4"]
) -> tuple[Detections, Bool[Tensor, " G"]]:
    """Pieces on both sides of a border that agree, as one; and which of the outcome still have a side that is cut."""
    cut, pairs = cut.clone(), []
    for axis, first, second in seams(tile, cut.clone()):
        for a, b in partners(pieces, first, second, axis):
            cut[a, axis + 2] = cut[b, axis] = False
            pairs.append((a, b))
    return united(pieces, groups(len(pieces), pairs), cut)


def groups(count: int, pairs: Sequence[tuple[int, int]]) -> Int64[Tensor, " N"]:
    """Of each of `count` pieces the first of those that it is connected with by pairs."""
    group = torch.arange(count)
    ends = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    while len(ends):
        lowest = group[ends].amin(dim=1, keepdim=True).expand(-1, 2)
        changed = group.scatter_reduce(0, ends.flatten(), lowest.flatten(), "amin")
        if torch.equal(changed, group):
            break
        group = changed
    return group


def seams(
    tile: Int64[Tensor, "N 2"], cut: Bool[Tensor, "N 4"]
) -> Iterator[tuple[int, Int64[Tensor, " n"], Int64[Tensor, " m"]]]:
    """For every border inside the image its axis (0: crossed along x), and the pieces that end there on either side."""
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, place in enumerate(tile.tolist()):
        rows[tuple(place)].append(row)
    for (down, across), own in rows.items():
        for axis, neighbour in enumerate(((down, across + 1), (down + 1, across))):
            mine, theirs = torch.tensor(own), torch.tensor(rows.get(neighbour, []), dtype=torch.int64)
            yield axis, mine[cut[mine, axis + 2]], theirs[cut[theirs, axis]]


def partners(
    pieces: Detections, first: Int64[Tensor, " n"], second: Int64[Tensor, " m"], axis: int
) -> list[tuple[int, int]]:
    """The pieces of either side of a border that are of one object: of one class, each the other's best match."""
    if not len(first) or not len(second):
        return []
    low, high = pieces.boxes[:, 1 - axis], pieces.boxes[:, 3 - axis]
    shared = torch.minimum(high[first, None], high[second]) - torch.maximum(low[first, None], low[second])
    spanned = torch.maximum(high[first, None], high[second]) - torch.minimum(low[first, None], low[second])
    match = shared / spanned.clamp(min=1e-6) * (pieces.labels[first, None] == pieces.labels[second])
    best, place = match.max(dim=1)
    mutual = (match.argmax(dim=0)[place] == torch.arange(len(first))) & (best >= AGREE)
    return list(zip(first[mutual].tolist(), second[place[mutual]].tolist(), strict=True))


def united(
    pieces: Detections, group: Int64[Tensor, " N"], cut: Bool[Tensor, "N 4"]
) -> tuple[Detections, Bool[Tensor, " G"]]:
    """One detection for each group of pieces: around them all, otherwise as the best of them; and which are cut."""
    _, group = torch.unique(group, return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0
    order = pieces.scores.argsort(descending=True, stable=True)
    rank = torch.full((count,), len(group)).scatter_reduce(0, group[order], torch.arange(len(group)), "amin")
    best = order[rank]
    spread = group[:, None].expand(-1, 2)
    low = pieces.boxes[best, :2].scatter_reduce(0, spread, pieces.boxes[:, :2], "amin")
    high = pieces.boxes[best, 2:].scatter_reduce(0, spread, pieces.boxes[:, 2:], "amax")
    open_ = torch.zeros(count, dtype=torch.bool)
    open_[group[cut.any(dim=1)]] = True
    made = replace(pieces.take(best), boxes=torch.cat([low, high], dim=1))
    if made.masks is None or pieces.masks is None:
        return made, open_
    masks = torch.zeros_like(made.masks)
    for mask, owner in zip(resampled(pieces.masks, pieces.boxes, made.boxes[group]), group.tolist(), strict=True):
        masks[owner] = torch.maximum(masks[owner], mask)
    return replace(made, masks=masks), open_


def absorb(objects: Detections, pieces: Detections) -> tuple[Detections, Detections]:
    """Pieces that lie in a larger object of their class add their score to it; and the pieces that do not."""
    if not len(pieces) or not len(objects):
        return objects, pieces
    owned, raised = [], objects.scores
    for rows in torch.arange(len(pieces)).split(max(1, PAIRS // len(objects))):
        some = pieces.take(rows)
        owns = belonging(some, objects)
        raised = torch.maximum(raised, torch.where(owns, some.scores[:, None], 0.0).amax(dim=0))
        owned.append(owns.any(dim=1))
    return replace(objects, scores=raised), pieces.take(~torch.cat(owned))


def belonging(pieces: Detections, objects: Detections) -> Bool[Tensor, "N M"]:
    """Which pieces lie in which larger objects of their class."""
    low = torch.maximum(pieces.boxes[:, None, :2], objects.boxes[:, :2])
    high = torch.minimum(pieces.boxes[:, None, 2:], objects.boxes[:, 2:])
    inside = (high - low).clamp(min=0).prod(dim=2) >= INSIDE * area(pieces.boxes)[:, None]
    larger = area(objects.boxes) > area(pieces.boxes)[:, None]
    return inside & larger & (pieces.labels[:, None] == objects.labels)


def together(parts: Sequence[Detections]) -> Detections:
    """The detections of several parts of one image."""
    masks = [part.masks for part in parts if part.masks is not None]
    return Detections(
        torch.cat([part.boxes for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.levels for part in parts]),
        torch.tensor(sum(len(part) for part in parts)),
        parts[0].classes,
        torch.cat(masks) if masks else None,
    )
