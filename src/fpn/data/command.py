"""The verbs of `fpn data`: a thin skin over the functions of this package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from fpn.errors import OptionError
from fpn.words import counted

if TYPE_CHECKING:
    from fpn.data.dataset import Data
    from fpn.spec import Spec

data_app = App(name="data", help="Look at a data set, mend it, divide it, write it in another format.")


@data_app.command
def info(
    path: Path,
    /,
    *,
    short: int | None = None,
    long: int | None = None,
    anchors: list[float] | None = None,
    ratios: list[float] | None = None,
    out: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Classes, boxes and defects of a data set, how well the anchors fit the boxes, and what would fit better.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    short
        Pixels of the shorter side of the resized images; as `fpn train` chooses on this machine when left out.
    long
        Most pixels of the longer side; 1333 for a short side of 800, in proportion for others, when left out.
    anchors
        Sides of the square anchors on P2 to P6, in pixels of the resized image; 32 64 128 256 512 when left out.
    ratios
        Height / width of the anchors; 0.5 1 2 when left out.
    out
        Write a picture of it all to this file, such as cells.png; png, svg, pdf or jpg.
    as_json
        Print JSON for other programs.
    """
    from fpn import data
    from fpn.data.fit import measure
    from fpn.spec import anchors_of

    spec = _spec(short, long=long, anchor_sizes=anchors and tuple(anchors), anchor_ratios=ratios and tuple(ratios))
    found = data.load(path)
    fit = measure(found.values(), *spec.sides, anchors_of(spec))
    if out is not None:
        from fpn.data.overview import save_overview

        save_overview(found, fit, out)
    description = data.describe(found, fit)
    if as_json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
    else:
        data.print_info(description)


@data_app.command
def show(
    path: Path,
    /,
    *,
    augment: list[Literal["auto", "none", "light", "strong"]] | None = None,
    split: str = "train",
    count: int = 16,
    times: int = 1,
    short: int | None = None,
    long: int | None = None,
    seed: int = 0,
    out: Path = Path("show.png"),
) -> None:
    """A picture of images with their boxes as the model will see them in training.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    augment
        How much the images are changed: none, light, strong; as `fpn train` chooses when no word follows. Only resized
        when left out.
    split
        Which split of the data.
    count
        Number of images.
    times
        Versions of each image, in a row: what it looks like in different epochs.
    short
        Pixels of the shorter side of the resized images; as `fpn train` chooses on this machine when left out.
    long
        Most pixels of the longer side; 1333 for a short side of 800, in proportion for others, when left out.
    seed
        Chooses the images and the changes.
    out
        File to write, .png or .jpg.
    """
    from dataclasses import replace

    from fpn import data
    from fpn.data.show import save_grid
    from fpn.training.options import Options
    from fpn.training.settings import augmentation_of, resolve

    if augment and len(augment) > 1:
        raise OptionError(f"augment {' '.join(augment)}: name one of auto, none, light, strong")
    spec = _spec(short, long=long)
    part = data.load(path, outlines=True)[split]
    preset = "none" if augment is None else (augment or ["auto"])[0]
    settings = resolve(Options(augment=preset), part, spec.short)
    transform, mixing = data.training_transform(augmentation_of(settings), settings.scales, spec.sides[1], times)
    mixing = mixing and replace(mixing, until=times)
    number = save_grid(part, transform, out, mixing, count, times, seed)
    print(f"{counted(number, 'image')} of {split}, augmentation {settings.augment}: {out}")


@data_app.command
def check(
    path: Path,
    /,
    *,
    fix: bool = False,
    out: Path | None = None,
    ignore: list[str] | None = None,
    workers: int | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Every defect of a data set, with file, item and remedy; every image is decoded. Exit code 1 where there is one.

    Finds images that are missing, damaged or of another size than annotated, the same picture in two splits, boxes that
    cannot be, are drawn twice or too small, classes spelt in two ways or without boxes, ids used twice.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    fix
        Write a repaired copy to --out, list what was changed, and check the copy too; exit code 1 if a defect remains.
    out
        New folder for the repaired copy: annotations/instances_train.json, ..., images/train/, ... Images are hard
        links to the originals, or copies on another disk.
    ignore
        Kinds of defects that are meant to be so, such as near-duplicate: not listed, not repaired.
    workers
        Processes that decode images; one a core when left out.
    as_json
        Print JSON for other programs.
    """
    from fpn import data
    from fpn.data import defects, listing

    unknown = sorted(set(ignore or ()) - set(defects.KINDS))
    if unknown:
        raise OptionError(f"ignore {' '.join(unknown)}: no such kind of defect; there are {', '.join(defects.KINDS)}")
    if fix and out is None:
        raise OptionError("--fix writes a repaired copy and leaves the data as it is: give --out and a new folder")
    if out is not None and not fix:
        raise OptionError("--out is where --fix writes the repaired copy: give --fix too")
    if workers is not None and workers < 1:
        raise OptionError(f"workers is {workers}; at least 1 is needed")
    loaded = data.load(path, draw=False, outlines=True)
    done = None if out is None else data.repair(loaded, out, ignore=ignore or (), workers=workers)
    if done is None:
        found = [d for d in data.find_defects(loaded, workers=workers) if d.kind not in (ignore or ())]
    else:
        found = done.defects
    if as_json:
        content = listing.defects_as_json(loaded, found, done, str(out))
        print(json.dumps(content, indent=2, ensure_ascii=False))
    elif done is not None:
        listing.print_repair(loaded, done, str(out))
    else:
        listing.print_defects(loaded, found)
        listing.print_verdict(loaded, found)
    if listing.number_of_defects(found if done is None else done.remaining):
        raise SystemExit(1)


@data_app.command
def split(
    path: Path,
    /,
    *,
    out: Path,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    group: str | None = None,
    group_file: Path | None = None,
) -> None:
    """Divide all images of a data set anew into train, val and test, and write them as COCO.

    Each split gets close to its share of every class's boxes and of full and empty images. Images are hard links to the
    originals, or copies on another disk.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    out
        New folder: annotations/instances_train.json, ..., images/train/, ...
    val
        Share of the images for val; 0 for none.
    test
        Share of the images for test; 0 for none.
    seed
        The same seed gives the same splits.
    group
        Keep images together whose file names give the same text for this regular expression, or for its first bracket:
        '^(patient[0-9]+)_'.
    group_file
        The same from a CSV file with the columns file and group.
    """
    from fpn import data

    loaded = data.load(path, draw=False, outlines=True)
    divided = data.split(loaded, val, test, seed, group, group_file)
    lost = data.convert(divided, out, "coco")
    print(f"{path}: {counted(sum(map(len, divided.values())), 'image')} divided with seed {seed}")
    data.print_balance(divided)
    _print_copy(divided, out, "COCO", lost, len(loaded.problems))


@data_app.command
def convert(path: Path, /, *, to: Literal["coco", "voc", "yolo"], out: Path) -> None:
    """Write a data set in another format, and say what that format cannot hold.

    Images are hard links to the originals, or copies on another disk.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    to
        The format to write.
    out
        New folder.
    """
    from fpn import data

    loaded = data.load(path, draw=False, outlines=True)
    lost = data.convert(loaded, out, to)
    _print_copy(loaded, out, to.upper(), lost, len(loaded.problems))


def _spec(short: int | None, **given: Any) -> Spec:
    """What `fpn train` would build on this machine; what is None is left to it. Raises OptionError as it does."""
    from fpn.data.fit import default_short
    from fpn.hardware import pick_device
    from fpn.spec import Spec, check, resolved

    given = {name: value for name, value in given.items() if value is not None}
    spec = Spec("faster_rcnn", ("any",), short=default_short(pick_device()) if short is None else short, **given)
    check(spec)
    return resolved(spec, channels=dict.fromkeys(range(2, 6), 0))  # levels 2 to 5, as most backbones have


def _print_copy(copy: Data, out: Path, form: str, lost: list[str], problems: int) -> None:
    for note in copy.notes:
        print(f"Note: {note}")
    if problems:
        were = "1 defect was" if problems == 1 else f"{problems:,} defects were"
        print(f"Note: {were} found while reading, left out or mended; see fpn data check")
    for text in lost:
        print(f"Not in the copy: {text}")
    sizes = ", ".join(f"{name} {len(split)}" for name, split in copy.items())
    kept = [~split.ignore if form == "YOLO" else split.labels >= 0 for split in copy.values()]
    boxes = sum(int(rows.sum()) for rows in kept)
    print(f"{out}: {form} format, {counted(boxes, 'box', 'boxes')}, images: {sizes}")


def tell(data: Data) -> None:
    """What reading the data decided and left out, on stderr."""
    from fpn.hardware import is_main_process

    if not is_main_process():
        return
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    shown = data.problems[:10]
    for problem in shown:
        print(f"warning: {problem}", file=sys.stderr)
    if len(data.problems) > len(shown):
        print(f"warning: and {len(data.problems) - len(shown)} more; see fpn data info {data.path}", file=sys.stderr)
