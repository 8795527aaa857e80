"""The figures of fpn.md. Each function draws what the page has computed into fpn/NAME.png, and gives it back.

Nothing is computed here but what drawing needs; every map, box and number comes from the page.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.patheffects
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle
from matplotlib.transforms import Affine2D
from PIL import Image
from torch import Tensor

from fpn.evaluation.page import LEVEL_COLOURS

COLOURS = {level: tuple(part / 255 for part in colour) for level, colour in LEVEL_COLOURS.items()}
INK, SOFT = "#16181d", "#5c6370"
OUT, DPI = Path("fpn"), 110


def save(figure: Figure, name: str) -> Image.Image:
    """Write the figure as a PNG of 256 colours, which is a third of the size, and give it to the notebook.

    The colours of the levels are among them, exactly: they would be lost in a photograph's many.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, facecolor="white")
    picture = Image.open(buffer).convert("RGB")
    fixed = [(255, 255, 255), *LEVEL_COLOURS.values()]
    found = np.array(picture.quantize(256 - len(fixed), kmeans=1).getpalette()).reshape(-1, 3)
    adaptive = np.where((found > 248).all(1, keepdims=True), 255, found)  # one white only: paper
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in fixed for part in colour] + adaptive.flatten().tolist())
    picture = picture.quantize(palette=palette, dither=Image.Dither.NONE)
    OUT.mkdir(exist_ok=True)
    picture.save(OUT / f"{name}.png", optimize=True)
    return picture


def blank(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def show(ax: Axes, pixels: Tensor | np.ndarray, title: str = "", frame: Any = None) -> None:
    """An image (3, H, W), or a picture of a map (h, w, 3), laid over the whole axes; a frame in a level's colour."""
    values = pixels.permute(1, 2, 0).numpy() if isinstance(pixels, Tensor) else pixels
    ax.imshow(values, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=9, color=INK)
    for spine in ax.spines.values():
        spine.set(color=frame or "#c8ccd4", linewidth=2.5 if frame else 0.8)


def box(ax: Axes, corners: Sequence[float] | Tensor, colour: Any, width: float = 1.8, **style: Any) -> None:
    """A box with a thin dark line around it, so that it is seen on light and dark."""
    x1, y1, x2, y2 = (float(value) for value in corners)
    dark = [
        matplotlib.patheffects.Stroke(linewidth=width + 1.4, foreground=INK, alpha=0.55),
        matplotlib.patheffects.Normal(),
    ]
    effects = {} if "linestyle" in style else {"path_effects": dark}
    ax.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width, **effects, **style)
    )


def label(ax: Axes, x: float, y: float, text: str, colour: Any, **style: Any) -> None:
    """Dark letters on a level's colour."""
    patch = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
    ax.text(x, y, text, **{"fontsize": 8, "color": INK, "va": "bottom", "bbox": patch, "clip_on": True, **style})


def strength(x: Tensor) -> np.ndarray:
    """A map (d, h, w) as grey values (h, w, 3): the length of the d numbers at each place, least to most."""
    length = x.norm(dim=0)
    low, high = length.quantile(0.01), length.quantile(0.99)
    return ((length - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)[..., None].expand(-1, -1, 3).numpy()


def directions(maps: Sequence[Tensor]) -> Tensor:
    """The three directions (d, 3) in which the d numbers of all places of these maps vary most; maps count alike."""
    covariance = sum((x - x.mean((1, 2), keepdim=True)).flatten(1).cov() for x in maps)
    assert isinstance(covariance, Tensor)
    return torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)


def tinted(x: Tensor, basis: Tensor, scale: Tensor | float) -> np.ndarray:
    """A map (d, h, w) as colours (h, w, 3): red, green and blue are its parts along the basis, grey is its mean."""
    parts = torch.einsum("dhw,dc->hwc", x - x.mean((1, 2), keepdim=True), basis)
    return (0.5 + parts / (2 * scale)).clamp(0, 1).numpy()


def reach(maps: Sequence[Tensor], basis: Tensor) -> Tensor:
    """How far the maps go along the basis: the colours of `tinted` are used up to there."""
    parts = [torch.einsum("dhw,dc->hwc", x - x.mean((1, 2), keepdim=True), basis).abs().flatten() for x in maps]
    return torch.stack([part.quantile(0.98) for part in parts]).amax()


def window(corners: Tensor, side: float, size: int) -> tuple[float, float]:
    """Left and top of a square of this side around a box, inside an image of this size."""
    x, y = ((corners[:2] + corners[2:]) / 2).tolist()
    return tuple(min(max(0.0, centre - side / 2), max(0.0, size - side)) for centre in (x, y))  # pyright: ignore


def scales(image: Tensor, boxes: Mapping[str, Tensor], maps: Mapping[int, Tensor]) -> Image.Image:
    """The image with two objects; then for each a window with the cells of two maps, and what those maps hold there."""
    figure = blank(11, 5.1)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.22])[0]
    size, whole = image.shape[1], left.subplots()
    show(whole, image, "The image as the detector sees it")
    axes = right.subplots(len(boxes), len(maps) + 1)
    for row, (words, corners) in zip(axes, boxes.items(), strict=True):
        box(whole, corners, "white", 2.2)
        at_right = float(corners[0]) > 0.7 * size
        where = float(corners[2 if at_right else 0])
        label(whole, where, float(corners[1]) - 4, words, "white", ha="right" if at_right else "left")
        side = min(size, max(48.0, 1.25 * float((corners[2:] - corners[:2]).max())))
        x, y = window(corners, side, size)
        pictures = [image.permute(1, 2, 0).numpy(), *(strength(c) for c in maps.values())]
        titles = [words, *(f"C{k}: one cell is {2**k} pixels" for k in maps)]
        for ax, picture, title, level in zip(row, pictures, titles, [None, *maps], strict=True):
            show(ax, picture, title, level and COLOURS[level])
            ax.images[0].set_extent((0, picture.shape[1] * size / picture.shape[1], size, 0))
            box(ax, corners, "white", 2.2)
            ax.set(xlim=(x, x + side), ylim=(y + side, y))
    return save(figure, "scales")


def plane(ax: Axes, picture: np.ndarray, x: float, y: float, side: float, frame: Any, line: float) -> None:
    """A picture lying in space, its front edge from (x - side / 2, y)."""
    to_plane = Affine2D.from_values(side, 0.0, 0.34 * side, 0.36 * side, x - 0.67 * side, y)
    ax.imshow(
        picture,
        extent=(0, 1, 0, 1),
        interpolation="nearest",
        transform=to_plane + ax.transData,
        clip_on=False,
        zorder=3,
    )
    corners = to_plane.transform([(0, 0), (1, 0), (1, 1), (0, 1)])
    ax.add_patch(Polygon(corners, fill=False, edgecolor=frame, linewidth=line, zorder=4, joinstyle="round"))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=SOFT, linewidth=1.1, zorder=5))
    if text:
        ax.text(end[0] + 0.04, end[1], text, fontsize=8, color=INK, va="center")


def pyramids(
    image: Tensor, scaled: Mapping[int, Tensor], c: Mapping[int, Tensor], p: Mapping[int, Tensor]
) -> Image.Image:
    """The four ways to many scales (the paper's figure 1): image pyramid, single map, feature hierarchy, FPN.

    scaled: C4 maps of the image at several sizes, by the level whose stride they have in the image. Lines are the
    thicker the deeper the network is that has made the map.
    """
    figure = blank(11, 2.8)
    ax = figure.subplots()
    ax.set(xlim=(-0.85, 12.75), ylim=(-1.0, 2.25), aspect="equal")
    ax.axis("off")
    heights = {2: 0.0, 3: 0.62, 4: 1.15, 5: 1.6}
    sides = {2: 1.2, 3: 0.9, 4: 0.68, 5: 0.5}
    photo, own = image.permute(1, 2, 0).numpy() / 255, {k: strength(c[k]) for k in heights}
    basis = directions([p[k] for k in heights])
    merged = {k: tinted(p[k], basis, reach([p[k]], basis)) for k in heights}
    at = {"a  image pyramid": 0.0, "b  single map": 4.15, "c  hierarchy of features": 6.85, "d  feature pyramid": 9.55}
    for title, x in at.items():
        ax.text(x - 0.8, 2.1, title, fontsize=10.5, color=INK, va="center")
    a, b, hierarchy, d = at.values()
    for level, y in heights.items():
        colour, side = COLOURS[level], sides[level]
        middle, half = y + 0.18 * side, 0.5 * side
        plane(ax, photo, a, y, side, "#9aa2b1", 1)
        plane(ax, strength(scaled[level]), a + 1.75, y, side, colour, 2.6)
        for x in (a, d):
            arrow(ax, (x + half + 0.05, middle), (x + 1.75 - half - 0.05, middle))
        plane(ax, merged[level], d + 1.75, y, side, colour, 2.6)
        for x in (b, hierarchy, d):
            plane(ax, own[level], x, y, side, colour, {2: 0.9, 3: 1.4, 4: 2.0, 5: 2.6}[level])
        heads = [a + 1.75, hierarchy, d + 1.75, *([b] if level == 5 else [])]
        for x in heads:
            arrow(ax, (x + half + 0.08, middle), (x + (0.95 if x != b else 0.85), middle), "predict")
        if level > 2:
            arrow(ax, (d + 1.75, y - 0.02), (d + 1.75, heights[level - 1] + 0.36 * sides[level - 1]))
    for x in (b, hierarchy, d):
        plane(ax, photo, x, -0.85, 1.4, "#9aa2b1", 1)
        arrow(ax, (x, -0.32), (x, -0.02))
    return save(figure, "pyramids")


def top_down(
    c: Mapping[int, Tensor],
    lateral: Mapping[int, Tensor],
    above: Mapping[int, Tensor],
    merged: Mapping[int, Tensor],
    p: Mapping[int, Tensor],
) -> Image.Image:
    """One row a level, the highest first: what the backbone gives, what comes from the side and from above, their sum,
    and the output. The three in the middle have the same colours, so that the sum is the sum of the colours.
    """
    figure = blank(11, 8.6)
    axes = figure.subplots(len(p), 5, squeeze=False)
    basis, outer = directions(list(merged.values())), directions(list(p.values()))
    heads = ("bottom-up", "lateral, 1x1", "from above, upsampled", "sum", "output, 3x3")
    for row, level in zip(axes, sorted(p, reverse=True), strict=True):
        colour = COLOURS[level]
        maps = [lateral[level], *([above[level]] if level in above else []), merged[level]]
        far = reach(maps, basis)
        show(row[0], strength(c[level]), f"C{level}", colour)
        show(row[1], tinted(lateral[level], basis, far), "", colour)
        if level in above:
            show(row[2], tinted(above[level], basis, far), "", colour)
        else:
            row[2].axis("off")
            row[2].text(0.5, 0.5, "nothing is\nabove it", ha="center", va="center", color=SOFT, fontsize=9)
        show(row[3], tinted(merged[level], basis, far), "", colour)
        show(row[4], tinted(p[level], outer, reach([p[level]], outer)), f"P{level}", colour)
        for ax, sign in ((row[1], "+"), (row[2], "="), (row[3], "→")):
            if level in above or sign == "→":
                ax.text(1.07, 0.5, sign, transform=ax.transAxes, ha="center", va="center", fontsize=15, color=INK)
    for ax, head in zip(axes[0], heads, strict=True):
        title = ax.get_title()
        ax.set_title(f"{head}\n{title}", fontsize=10, color=INK)
    return save(figure, "top_down")


def anchors(image: Tensor, by_level: Mapping[int, Tensor], centres: Mapping[int, Tensor]) -> Image.Image:
    """For each level the cells of its map as dots, and the anchors of the cell that is nearest to the middle."""
    figure = blank(11, 2.7)
    size, pale = image.shape[1], (image.float() * 0.45 + 255 * 0.55).to(torch.uint8)
    middle = torch.tensor([size / 2, size / 2])
    for ax, level in zip(figure.subplots(1, len(by_level)), by_level, strict=True):
        dots, colour = centres[level], COLOURS[level]
        nearest = (dots - middle).norm(dim=1).argmin()
        own = by_level[level].unflatten(0, (len(dots), -1))[nearest]
        show(ax, pale, f"P{level}: {len(dots)} cells, {len(by_level[level])} anchors", colour)
        ax.scatter(*dots.T.numpy(), s=max(0.6, 2**level / 5), color=INK, linewidths=0, alpha=0.65)
        for corners in own:
            box(ax, corners, colour, 2)
        ax.set(xlim=(-12, size + 12), ylim=(size + 12, -12))
    return save(figure, "anchors")


def matches(image: Tensor, truth: Tensor, anchors: Tensor, levels: Tensor, forced: Tensor) -> Image.Image:
    """Left the objects; right the anchors that stand for them, in the colour of their level."""
    figure = blank(11, 5.4)
    pale = (image.float() * 0.6 + 255 * 0.4).to(torch.uint8)
    left, right = figure.subplots(1, 2)
    show(left, image, f"{len(truth)} objects")
    show(right, pale, f"{len(anchors)} anchors that stand for one of them; broken line: only because none fits better")
    for corners in truth:
        box(left, corners, "white", 2)
    for corners, level, weak in zip(anchors, levels.tolist(), forced.tolist(), strict=True):
        style = {"linestyle": (0, (4, 2))} if weak else {}
        box(right, corners, COLOURS[level], 1.5, **style)
    size = image.shape[1]
    for ax in (left, right):
        ax.set(xlim=(-4, size + 4), ylim=(size + 4, -4))
    level_key(right, sorted(set(levels.tolist())))
    return save(figure, "matches")


def level_key(ax: Axes, levels: Sequence[int]) -> None:
    """Which colour is which level, under the picture."""
    for n, level in enumerate(levels):
        ax.text(
            0.01 + 0.09 * n,
            -0.04,
            f"P{level}",
            transform=ax.transAxes,
            fontsize=9,
            va="center",
            color=INK,
            bbox={"facecolor": COLOURS[level], "edgecolor": "none", "pad": 2},
        )


def proposals(image: Tensor, objectness: Mapping[int, Tensor], boxes: Tensor, levels: Tensor) -> Image.Image:
    """How much each place of each level looks like an object, and the best proposals in the colour of their level."""
    figure = blank(11, 4.9)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.3, 1])[0]
    axes = left.subplots(2, 3).flatten()
    for ax, (level, scores) in zip(axes, objectness.items(), strict=False):
        show(ax, scores.numpy(), f"P{level}", COLOURS[level])
        ax.images[0].set(cmap="magma", norm=LogNorm(1e-3, 1))
    axes[-1].axis("off")
    bar = axes[-1].inset_axes((0.1, 0.1, 0.1, 0.8))
    left.colorbar(axes[0].images[0], cax=bar).set_label("objectness,\nbest of 3 anchors", fontsize=8)
    bar.tick_params(labelsize=8)
    best = right.subplots()
    show(best, image, f"the best {len(boxes)} proposals")
    for corners, level in zip(boxes.flip(0), levels.flip(0).tolist(), strict=True):
        box(best, corners, COLOURS[level], 1.4)
    level_key(best, sorted(set(levels.tolist())))
    return save(figure, "proposals")


def levels(sides: Tensor, assigned: Tensor, canonical: float, lowest: int, highest: int) -> Image.Image:
    """Eq. 1 as a staircase, and under each step how many of the objects of a data set stand on it."""
    figure = blank(8, 3.3)
    ax = figure.subplots()
    edges = [canonical * 2 ** (k - 4) for k in range(lowest, highest + 2)]
    edges[0], edges[-1] = float(sides.min()) * 0.9, max(edges[-2] * 2, float(sides.max()) * 1.1)
    ax.set(xscale="log", xlim=(edges[0], edges[-1]), ylim=(lowest - 0.9, highest + 0.6))
    for level, start, end in zip(range(lowest, highest + 1), edges[:-1], edges[1:], strict=True):
        ax.axvspan(start, end, color=COLOURS[level], alpha=0.14, linewidth=0)
        ax.plot([start, end], [level, level], color=COLOURS[level], linewidth=5, solid_capstyle="butt")
        count = int((assigned == level).sum())
        ax.text(math.sqrt(start * end), level + 0.2, f"{count} objects", ha="center", fontsize=9, color=INK)
    jitter = torch.rand(len(sides), generator=torch.Generator().manual_seed(0)) * 0.5
    ax.scatter(sides, lowest - 0.75 + jitter, s=5, c=[COLOURS[k] for k in assigned.tolist()], linewidths=0)
    ax.set_yticks(range(lowest, highest + 1), [f"P{k}" for k in range(lowest, highest + 1)])
    shown = [value for value in (8, 12, 24, 48, 96, 192, 384) if edges[0] <= value <= edges[-1]]
    ax.set_xticks(shown, [str(value) for value in shown])
    ax.minorticks_off()
    ax.set_xlabel("side of the region, √(w h), in pixels", fontsize=9)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return save(figure, "levels")


def regions(
    image: Tensor, pyramid: Mapping[int, Tensor], boxes: Tensor, assigned: Tensor, pooled: Tensor, names: Sequence[str]
) -> Image.Image:
    """For each region: the image, its level's map with the 7 x 7 cells and the 2 x 2 points of each, what is pooled."""
    figure = blank(8.2, 2.75 * len(boxes))
    axes = figure.subplots(len(boxes), 3, squeeze=False)
    basis, size = directions(list(pyramid.values())), image.shape[1]
    for row, corners, level, found, name in zip(axes, boxes, assigned.tolist(), pooled, names, strict=True):
        colour, far = COLOURS[level], reach([pyramid[level]], basis)
        side = 1.35 * float((corners[2:] - corners[:2]).max())
        x, y = window(corners, side, size)
        mean = pyramid[level].mean((1, 2), keepdim=True)
        show(row[0], image, name)
        show(row[1], tinted(pyramid[level], basis, far), f"on P{level}: 7 x 7 cells of 2 x 2 points", colour)
        row[1].images[0].set_extent((0, size, size, 0))
        parts = torch.einsum("dhw,dc->hwc", found - mean, basis)
        show(
            row[2],
            (0.5 + parts / (2 * far)).clamp(0, 1).numpy(),
            f"pooled: {' x '.join(map(str, found.shape))}",
            colour,
        )
        for ax in row[:2]:
            box(ax, corners, colour, 2)
            ax.set(xlim=(x, x + side), ylim=(y + side, y))
        points = [
            (start + (end - start) * (torch.arange(14) + 0.5) / 14)
            for start, end in zip(corners[:2], corners[2:], strict=True)
        ]
        xs, ys = torch.meshgrid(*points, indexing="xy")
        row[1].scatter(xs, ys, s=4, color="white", edgecolors=INK, linewidths=0.4)
    return save(figure, "regions")


def detections(image: Tensor, boxes: Tensor, texts: Sequence[str], levels: Tensor, missed: Tensor) -> Image.Image:
    """What was found, in the colour of the level that the features came from; objects that were missed are dotted."""
    figure = blank(5.9, 6.1)
    ax = figure.subplots()
    show(ax, image)
    for corners, text, level in zip(boxes, texts, levels.tolist(), strict=True):
        box(ax, corners, COLOURS[level], 2)
        x, y = float(corners[0]), float(corners[1])
        size, wide = image.shape[1], 5.4 * len(text)
        label(ax, min(x, size - wide), y - 2 if y > 14 else float(corners[3]) + 12, text, COLOURS[level])
    for corners in missed:
        box(ax, corners, "white", 2.4, linestyle=":")
    level_key(ax, sorted(set(levels.tolist())))
    return save(figure, "detections")


def ablations(maps: Mapping[str, tuple[Tensor, int]]) -> Image.Image:
    """What is left of the map that small objects are found on, by the words for what was taken away."""
    figure = blank(11, 3.1)
    basis = directions([x for x, _ in maps.values()])
    for ax, (words, (x, level)) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        show(ax, tinted(x, basis, reach([x], basis)), words, COLOURS[level])
    return save(figure, "ablations")
