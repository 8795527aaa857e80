"""Which cells each table of the paper needs: what is to be trained and measured, each thing once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fpn.errors import OptionError

Kind = Literal["rpn", "fast_rcnn", "shared_rpn", "shared_fast_rcnn", "mask_proposals"]


@dataclass(frozen=True)
class Cell:
    """One thing that is trained and measured: a row of a table, with one seed.

    kind: what it is; the shared ones are steps 3 and 4 of the training that shares features (section 5.2.3). row: the
    variant, a letter of Table 1, or the windows of mask proposals. proposals: of Fast R-CNN, the variant whose RPN made
    the regions that it learns from and is measured on.
    """

    kind: Kind
    row: str
    seed: int = 0
    proposals: str | None = None

    @property
    def key(self) -> str:
        """The name of its folder."""
        on = f"-on-{self.proposals}" if self.proposals else ""
        return f"{self.kind}-{self.row}{on}-seed{self.seed}"

    @property
    def features(self) -> Cell | None:
        """The cell whose backbone and pyramid it takes over and leaves as they are."""
        shared = self.kind in ("shared_rpn", "shared_fast_rcnn")
        return Cell("fast_rcnn", self.row, self.seed, self.row) if shared else None

    @property
    def proposer(self) -> Cell | None:
        """The cell whose proposals it learns from."""
        if self.kind == "shared_fast_rcnn":
            return Cell("shared_rpn", self.row, self.seed)
        return Cell("rpn", self.proposals, self.seed) if self.proposals else None

    @property
    def needs(self) -> tuple[Cell, ...]:
        """The cells that must be there before it."""
        return tuple(cell for cell in (self.features, self.proposer) if cell is not None)


@dataclass(frozen=True)
class Table:
    """A table of the paper. metrics: what is measured, by the heading of its column; the first of them is drawn.

    rows: each with the cell that gives its numbers, at seed 0. compared: the row that differences are taken to.
    """

    number: int
    title: str
    section: str
    metrics: dict[str, str]
    rows: dict[str, Cell]
    compared: str

    @property
    def by_size(self) -> dict[str, str]:
        """The sizes of objects and the metric of each; {} where the table has none."""
        names = {key.rpartition("_")[2]: key for key in self.metrics if "_" in key}
        return {size: names[size] for size in ("small", "medium", "large") if size in names}


_RECALL = {"AR1000": "AR1k", "AR1000_small": "AR1k small", "AR1000_medium": "AR1k medium", "AR1000_large": "AR1k large"}
_PRECISION = {"AP50": "AP50", "AP": "AP", "AP_small": "AP small", "AP_medium": "AP medium", "AP_large": "AP large"}

TABLES: dict[int, Table] = {
    1: Table(
        1,
        "Proposals of the RPN",
        "section 5.1",
        {"AR100": "AR100", **_RECALL},
        {letter: Cell("rpn", letter) for letter in "abcdef"},
        "c",
    ),
    2: Table(
        2,
        "Fast R-CNN on the same proposals, those of RPN c",
        "section 5.2.1",
        _PRECISION,
        {letter: Cell("fast_rcnn", letter, proposals="c") for letter in "abcdef"},
        "c",
    ),
    3: Table(
        3,
        "Faster R-CNN: each Fast R-CNN on the proposals of an RPN of its own kind",
        "section 5.2.2",
        _PRECISION,
        {letter: Cell("fast_rcnn", letter, proposals=letter) for letter in "abc"},
        "c",
    ),
    5: Table(
        5,
        "RPN and Fast R-CNN with features of their own, and with shared ones",
        "section 5.2.3",
        {key: _PRECISION[key] for key in ("AP50", "AP")},
        {"separate": Cell("fast_rcnn", "c", proposals="c"), "shared": Cell("shared_fast_rcnn", "c")},
        "separate",
    ),
    6: Table(
        6,
        "Mask proposals",
        "section 6",
        _RECALL,
        {name: Cell("mask_proposals", name) for name in ("5x5", "7x7", "both")},
        "both",
    ),
}

WINDOWS = {"5x5": (5,), "7x7": (7,), "both": (5, 7)}


def table_of(number: int) -> Table:
    """Raises OptionError for a table that is not re-run here."""
    if number not in TABLES:
        there = ", ".join(map(str, TABLES))
        more = "; Table 4 compares with other work on COCO's test server" if number == 4 else ""
        raise OptionError(f"table {number}: the tables that can be run again are {there}{more}")
    return TABLES[number]


def plan(table: Table, seeds: int, rows: Sequence[str] | None = None) -> list[Cell]:
    """The cells of a table in the order in which they are run, each once, after those that it needs.

    Seed by seed, so that a run which is stopped early has whole tables. rows: only these.
    """
    wanted = table.rows if rows is None else {row: table.rows[row] for row in rows}
    cells: dict[Cell, None] = {}
    for seed in range(seeds):
        add((replace(cell, seed=seed) for cell in wanted.values()), cells)
    return list(cells)


def add(wanted: Iterable[Cell], cells: dict[Cell, None]) -> None:
    """Put cells behind those that they need; a dictionary keeps the order and each once."""
    for cell in wanted:
        add(cell.needs, cells)
        cells[cell] = None
