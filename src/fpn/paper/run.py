"""`fpn paper`: the cells of a table one after the other, and after each the page of what there is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fpn.build import build
from fpn.data import Data, load
from fpn.data.outlines import needed
from fpn.errors import CheckpointError, DataError, OptionError, TrainingError
from fpn.hardware import is_main_process
from fpn.paper.cells import Setup, check_kept, finished, options_of, read, run_cell
from fpn.paper.page import Grid, Outcomes, numbers_grid, write_page
from fpn.paper.scales import SCALES, Scale, chosen, full, of_demo, placed, small
from fpn.paper.tables import TABLES, Cell, Table, plan, table_of
from fpn.words import counted, some_of
from fpn.writing import write_json

DEMO = "demo"
KEPT = "paper.json"  # which tables were asked for, with how many seeds


def run_paper(
    path: str | Path,
    table: int,
    *,
    out: str | Path,
    scale: str = "small",
    seeds: int = 3,
    backbone: str | None = None,
    weights: str | None = None,
    short: int | None = None,
    epochs: int | None = None,
    rows: Sequence[str] | None = None,
    device: str = "auto",
    devices: int | None = None,
    workers: int | None = None,
    command: str = "",
) -> Path:
    """Run a table of the paper on a data set; `out/paper.html` and `out/paper.md` have it beside the paper's.

    path: a data set, or "demo" for generated images. rows: only these rows of the table. All else is as `fpn paper`
    says. What is in `out/cells` already is taken from there, so a run that was stopped goes on. Returns the page.

    Raises OptionError and DataError for what cannot work, before anything is trained.
    """
    wanted, out = table_of(table), Path(out)
    check(wanted, scale, seeds, epochs, rows)
    if str(path) == DEMO:
        check_demo(scale, backbone, weights, short)
    run = placed(device, devices, workers)
    if str(path) == DEMO and run.get("devices", 1) * run.get("nodes", 1) > 1:
        raise OptionError("demo is for one device: leave torchrun out")
    data = data_of(path, out, wanted)
    picked = scale_of(scale, path, data, backbone, weights, short, epochs, run)
    most_train, most_val = picked.images or (None, None)
    setup = Setup(out, chosen(data["train"], most_train), chosen(data["val"], most_val), picked)
    cells = plan(wanted, seeds, rows)
    kept = tables_of(out) | {table: max(seeds, tables_of(out).get(table, 0))}
    check_kept(sorted({*cells, *(cell for t, n in kept.items() for cell in plan(TABLES[t], n))}, key=str), setup)
    facts = {"Command": command} if command else {}
    facts["Data"] = words_of(path, setup)
    if is_main_process():
        write_json(out / KEPT, {"tables": {str(number): kept[number] for number in sorted(kept)}}, indent=2)
        say_plan(wanted, cells, setup)
    check_rows(cells, setup)
    run_cells(wanted, cells, setup, kept, facts)
    if is_main_process():
        show(outcomes_of(wanted, kept[table], setup))
    return out / "paper.html"


def check(table: Table, scale: str, seeds: int, epochs: int | None, rows: Sequence[str] | None) -> None:
    if scale not in SCALES:
        raise OptionError(f"scale {scale!r}: it must be {' or '.join(SCALES)}")
    if seeds < 1 or (epochs is not None and epochs < 1):
        raise OptionError(f"seeds {seeds}, epochs {epochs}: at least 1 is needed")
    if unknown := sorted(set(rows or ()) - table.rows.keys()):
        raise OptionError(f"rows {', '.join(unknown)}: table {table.number} has {', '.join(table.rows)}")


def check_demo(scale: str, backbone: str | None, weights: str | None, short: int | None) -> None:
    if scale == "full":
        raise OptionError("scale full: demo's images are too few and too small; name a data set of your own")
    if (backbone or "tiny", weights or "none") != ("tiny", "none") or short is not None:
        raise OptionError("demo has a detector of its own: leave out --backbone, --weights and --short")


def data_of(path: str | Path, out: Path, table: Table) -> Data:
    """The data set, with outlines for the table of mask proposals. Raises DataError where it lacks what is needed."""
    masks = table.number == 6
    if str(path) == DEMO:
        from fpn.data.generated import generate
        from fpn.demo import IMAGES, SIDE

        path = generate(out / "data", IMAGES, (SIDE, SIDE))
    data = load(path, outlines=masks)
    if "val" not in data:
        raise DataError(f"{path}: has no val split to measure on; make one with `fpn data split {path} --out FOLDER`")
    for name in ("train", "val"):
        if not (~data[name].ignore).any():
            raise DataError(f"{path}: no image of the split {name!r} has an object")
        if masks:
            needed(data[name].outlines, f"{path}: the split {name}")
    return data


def scale_of(
    name: str,
    path: str | Path,
    data: Data,
    backbone: str | None,
    weights: str | None,
    short: int | None,
    epochs: int | None,
    run: dict[str, Any],
) -> Scale:
    """The scale asked for, with the backbone and weights that there are."""
    images = len(data["train"])
    if str(path) == DEMO:
        return of_demo(epochs, run)
    if name == "full":
        return full(backbone or "resnet50", weights or "imagenet", short, None, epochs, images, run)
    if backbone is None and weights == "none":
        backbone = "tiny"
    if backbone is None and weights is None and run.get("devices", 1) * run.get("nodes", 1) == 1:
        return small(*obtainable("mobilenet_v2"), short, None, epochs, images, run)
    return small(backbone or "mobilenet_v2", weights or "imagenet", short, None, epochs, images, run)


def obtainable(backbone: str) -> tuple[str, str]:
    """A backbone with ImageNet weights, for who asked for nothing; without internet the tiny one from scratch."""
    from fpn.model.backbone import build_backbone

    try:
        build_backbone(backbone, "imagenet", 2, None, None, False)
    except CheckpointError as error:
        tqdm.write(f"warning: {error}.\nwarning: going on with the tiny backbone from scratch")
        return "tiny", "none"
    return backbone, "imagenet"


def check_rows(cells: Sequence[Cell], setup: Setup) -> None:
    """Build every row once: one that this backbone cannot have is refused before others are trained for hours."""
    for cell in {(cell.kind, cell.row): cell for cell in cells if finished(cell, setup) is None}.values():
        options = options_of(cell, setup.scale)
        if options["model"] == "fast_rcnn":
            options["classes"] = setup.train.classes
        build(**{**options, "weights": "none"})


def run_cells(table: Table, cells: list[Cell], setup: Setup, kept: dict[int, int], facts: Mapping[str, str]) -> None:
    """All cells, with a bar, and the page anew after each.

    A cell that cannot be trained, its loss being no number, does not keep the others from it. Raises TrainingError at
    the end where there is one.
    """
    main = is_main_process()
    done = [cell for cell in cells if finished(cell, setup) is not None]
    if main:
        write_pages(kept, setup, facts)
    title, failed = f"Table {table.number}", set[Cell]()
    with tqdm(total=len(cells), initial=len(done), desc=title, unit=" cells", disable=not main or None) as bar:
        for cell in cells:
            if cell in done:
                run_cell(cell, setup)  # which tidies up where that was cut off
                continue
            bar.set_postfix_str(cell.key)
            try:
                content = None if failed & {*cell.needs} else run_cell(cell, setup)
            except TrainingError as error:
                content = None
                tqdm.write(f"{cell.key}: {error}")
            bar.update()
            if content is None:
                failed.add(cell)
                continue
            if main:
                tqdm.write(in_one_line(cell, content, table))
                write_pages(kept, setup, facts)
    if failed:
        raise TrainingError(f"{some_of(sorted(cell.key for cell in failed))}: not trained, see above; all else is kept")


def in_one_line(cell: Cell, content: Mapping[str, Any], table: Table) -> str:
    numbers = content["numbers"]
    shown = [f"{name} {100 * numbers[key]:.1f}" for key, name in table.metrics.items() if numbers.get(key, -1) >= 0]
    shown = shown or [f"{key} {100 * value:.1f}" for key, value in list(numbers.items())[:2]]
    seconds = sum(content["seconds"].values())
    return f"{cell.key}: {', '.join(shown)}  ({seconds:.0f} s)"


def tables_of(out: Path) -> dict[int, int]:
    """The tables that earlier runs in this folder were asked for, with their numbers of seeds."""
    if not (out / KEPT).is_file():
        return {}
    content = read(out / KEPT).get("tables")
    if not isinstance(content, dict) or not all(isinstance(seeds, int) for seeds in content.values()):
        raise DataError(f"{out / KEPT}: damaged; remove it, the cells stay")
    return {int(number): seeds for number, seeds in content.items() if number.isdigit() and int(number) in TABLES}


def outcomes_of(table: Table, seeds: int, setup: Setup) -> Outcomes:
    """What is there of a table."""
    numbers: dict[str, dict[int, dict[str, float]]] = {row: {} for row in table.rows}
    anchors: dict[str, int] = {}
    for row, first in table.rows.items():
        for seed in range(seeds):
            content = finished(replace(first, seed=seed), setup)
            if content is not None:
                numbers[row][seed] = content["numbers"]
                if table.number == 1 and content.get("anchors"):
                    anchors[row] = content["anchors"]
    return Outcomes(table, names_of(table), numbers, len(table.rows) * seeds, anchors)


def names_of(table: Table) -> dict[str, str]:
    from fpn.paper.variants import VARIANTS

    return {row: VARIANTS[row].name for row in table.rows if row in VARIANTS}


def write_pages(kept: dict[int, int], setup: Setup, facts: Mapping[str, str]) -> Path:
    outcomes = [outcomes_of(TABLES[number], seeds, setup) for number, seeds in sorted(kept.items())]
    return write_page(setup.out, outcomes, {**facts, **facts_of(kept, setup)})


def facts_of(kept: dict[int, int], setup: Setup) -> dict[str, str]:
    """The settings, and where and when the cells were made."""
    scale = setup.scale
    planned = dict.fromkeys(cell for number, seeds in kept.items() for cell in plan(TABLES[number], seeds))
    cells = [content for cell in planned if (content := finished(cell, setup)) is not None]
    plain = {name: value for name, value in scale.detector.items() if name != "anchor_sizes"}
    plain["weights"] = Path(plain["weights"]).name  # a file's folder is nobody's business
    facts = {
        "Scale": scale.name,
        "Detector (row c)": ", ".join(f"{name} {value}" for name, value in plain.items()),
        "Anchors": " ".join(f"{size:g}" for size in scale.detector["anchor_sizes"]) + " pixels on P2 to P6",
        "Seeds": ", ".join(f"Table {number}: {seeds}" for number, seeds in kept.items()),
    }
    training = {json.dumps(content["asked"]["training"] | {"seed": 0}) for content in cells}
    for n, text in enumerate(sorted(training), 1):
        entries = {name: value for name, value in json.loads(text).items() if name != "seed"}
        facts["Training" if len(training) == 1 else f"Training {n}"] = in_text(entries)
    if cells:
        facts["Machine"] = ", ".join(sorted({content["machine"] for content in cells}))
        facts["Versions"] = in_text(cells[-1]["versions"])
        minutes = sum(sum(content["seconds"].values()) for content in cells) / 60
        facts["Time"] = f"{minutes:.1f} minutes for {counted(len(cells), 'cell')}"
        facts["Date"] = max(content["finished"] for content in cells)
    return facts


def in_text(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items())


def words_of(path: str | Path, setup: Setup) -> str:
    train, val = setup.train, setup.val
    counts = ", ".join(
        f"{counted(len(split), 'image')} with {counted(int((~split.ignore).sum()), 'object')} {purpose}"
        for split, purpose in ((train, "to learn from"), (val, "to measure on"))
    )
    name = "the demo's generated images" if str(path) == DEMO else Path(path).name
    return f"{name}: {counts}, {counted(len(train.classes), 'class', 'classes')}"


def say_plan(table: Table, cells: list[Cell], setup: Setup) -> None:
    done = sum(finished(cell, setup) is not None for cell in cells)
    there = f", of which {done} are there already" if done else ""
    epochs = sorted({setup.scale.training[model]["epochs"] for model in setup.scale.training})
    print(f"Table {table.number}: {counted(len(cells), 'cell')}{there}; {', '.join(map(str, epochs))} epochs each")
    print(
        f"{counted(len(setup.train), 'image')} to learn from, {len(setup.val):,} to measure on; results in {setup.out}"
    )


def show(outcomes: Outcomes) -> None:
    """The table at the end: ours, and the paper's in brackets."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Printed

    grid: Grid = numbers_grid(outcomes)
    print(f"\nTable {outcomes.table.number}: {outcomes.table.title}")
    printed = Printed(box=None, pad_edge=False)
    for position, name in enumerate(grid.head):
        printed.add_column(name, justify="right" if position else "left", no_wrap=position == 0)
    for name, entries in grid.rows:
        printed.add_row(escape(name), *(f"{ours} ({paper})" if paper else ours for ours, paper in entries))
    Console(highlight=False).print(printed)
