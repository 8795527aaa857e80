"""The tables as a page: ours beside the paper's, differences, a plot and what became of the paper's claims.

What is said is made once, as blocks, and written twice: paper.md for reading and diffing, paper.html for looking.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from fpn.paper.claims import Numbers, Verdict, between, differences, in_words, judge_all, over_seeds, signed
from fpn.paper.plot import plot
from fpn.paper.published import ANCHORS, PUBLISHED
from fpn.paper.tables import Table
from fpn.writing import replacing

TITLE = "Feature Pyramid Networks: the paper's tables on these data"
LEAD = (
    "Ours first, as mean ± standard deviation over the seeds, then in round brackets what Lin et al. 2017 report for "
    "ResNet-50 on COCO. All in percent. The numbers of two data sets are not to be compared with each other; what can "
    "be compared is how the rows of a table stand to one another."
)
CAUTION = (
    "Differences are taken seed by seed, in points; in square brackets the 95 % interval of their mean by Student's t, "
    "in round ones the paper's. Each interval is right 19 times in 20 by itself, not all of them together, and speaks "
    "of the chance in training, not of other images."
)


@dataclass(frozen=True)
class Outcomes:
    """A table as far as it has been run: its numbers, a name for each row, anchors an image by row, cells planned."""

    table: Table
    names: Mapping[str, str]
    numbers: Numbers
    planned: int
    anchors: Mapping[str, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return sum(len(seeds) for seeds in self.numbers.values())


# What a page is made of.


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Grid:
    """A table of words; in a cell what is said first, and in brackets what is said beside it."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]


@dataclass(frozen=True)
class Drawing:
    name: str
    words: str
    png: Mapping[str, bytes]


@dataclass(frozen=True)
class Facts:
    entries: Mapping[str, str]


Block = Heading | Words | Grid | Drawing | Facts | Verdict


def write_page(out: Path, outcomes: Sequence[Outcomes], facts: Mapping[str, str]) -> Path:
    """Write out/paper.md, out/paper.html and a plot of each table, table-1.png; returns the HTML page."""
    from fpn.evaluation.page import page, write

    blocks: list[Block] = [block for each in outcomes for block in of_table(each)]
    blocks += [Heading("Settings"), Facts(facts)]
    for block in blocks:
        if isinstance(block, Drawing):
            write(out / block.name, block.png["light"])
    text = [f"# {TITLE}", LEAD, *map(markdown, blocks)]
    with replacing(out / "paper.md") as unfinished:
        unfinished.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    lead = f"<section><p>{escape(LEAD)}</p></section>"
    write(out / "paper.html", page(TITLE, [f"<style>{STYLE}</style>", lead, *sections(blocks)]).encode())
    return out / "paper.html"


def of_table(outcomes: Outcomes) -> list[Block]:
    table = outcomes.table
    number, planned = outcomes.done, outcomes.planned
    state = "" if number == planned else f" So far {number} of {planned} cells are done."
    blocks: list[Block] = [
        Heading(f"Table {table.number}: {table.title}"),
        Words(f"The paper's {table.section}.{state}"),
        numbers_grid(outcomes),
    ]
    png = {theme: plot(table, outcomes.numbers, theme) for theme in ("light", "dark")}
    drawn = {theme: content for theme, content in png.items() if content is not None}
    if drawn:
        words = (
            f"Table {table.number}{' by size of object' * bool(table.by_size)}, here and in the paper; the error bars"
        )
        words += " are standard deviations over the seeds."
        blocks.append(Drawing(f"table-{table.number}.png", words, drawn))
    if gaps := differences_grid(outcomes):
        blocks += [Heading(f"Table {table.number}: differences to {table.compared}"), Words(CAUTION), gaps]
    blocks.append(Heading(f"Table {table.number}: what the paper says of it"))
    blocks += judge_all(table.number, outcomes.numbers)
    return blocks


def numbers_grid(outcomes: Outcomes) -> Grid:
    """Each row's numbers beside the paper's, and its anchors an image where they are known."""
    table, rows = outcomes.table, []
    counted = bool(outcomes.anchors)
    for row in table.rows:
        entries = [
            (in_percent(outcomes.numbers, row, metric), f"{PUBLISHED[table.number][row][metric]:.1f}")
            for metric in table.metrics
        ]
        anchors = [(f"{outcomes.anchors[row]:,}" if row in outcomes.anchors else "–", thousands(ANCHORS.get(row)))]
        rows.append((named(outcomes, row), [*anchors * counted, *entries]))
    return Grid(["", *["anchors"] * counted, *table.metrics.values()], rows)


def differences_grid(outcomes: Outcomes) -> Grid | None:
    """How far the rows are from the one that they are compared with; None where nothing can be compared."""
    table = outcomes.table
    by_metric = {metric: differences(table.number, metric, outcomes.numbers) for metric in table.metrics}
    rows = []
    for row in (row for row in table.rows if any(row in found for found in by_metric.values())):
        entries = [
            (in_words(found[row]) if row in found else "–", paper_gap(table, row, metric))
            for metric, found in by_metric.items()
        ]
        rows.append((named(outcomes, row), entries))
    return Grid(["", *table.metrics.values()], rows) if rows else None


def paper_gap(table: Table, row: str, metric: str) -> str:
    return signed(between(row, table.compared, metric).published(table.number))


def named(outcomes: Outcomes, row: str) -> str:
    name = outcomes.names.get(row, row)
    return row if name == row else f"{row}: {name}"


def in_percent(numbers: Numbers, row: str, metric: str) -> str:
    """Mean ± standard deviation over the seeds in percent, "–" where nothing is known."""
    found = over_seeds(numbers, row, metric)
    if found is None:
        return "–"
    return f"{found.mean:.1f}" if found.spread is None else f"{found.mean:.1f} ± {found.spread:.1f}"


def thousands(number: int | None) -> str:
    return "" if number is None else f"{number // 1000}k"


def markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Words(text):
            return text
        case Grid(head, rows):
            lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
            for name, entries in rows:
                cells = [f"{ours} ({paper})" if paper else ours for ours, paper in entries]
                lines.append(f"| {' | '.join([name, *cells])} |".replace("\n", " "))
            return "\n".join(lines)
        case Drawing(name, words, _):
            return f"![{words}]({name})"
        case Facts(entries):
            return "\n".join(f"- {name}: {value}" for name, value in entries.items())
        case Verdict(claim, outcome, sentence):
            return f"- {claim.text} **{outcome.capitalize()}.** {sentence}"


def sections(blocks: Sequence[Block]) -> list[str]:
    """HTML: each heading with all that follows it is a section."""
    starts = [n for n, block in enumerate(blocks) if isinstance(block, Heading)]
    parts = [blocks[a:b] for a, b in zip(starts, [*starts[1:], len(blocks)], strict=True)]
    return [f"<section>{''.join(map(html, part))}</section>" for part in parts]


def html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Words(text):
            return f"<p>{escape(text)}</p>"
        case Grid(head, rows):
            top = "".join(
                f"<{tag}>{escape(text)}</{tag}>" for text, tag in zip(head, ["th", *["td"] * 99], strict=False)
            )
            body = "".join(f"<tr><th>{escape(name)}</th>{''.join(map(cell, entries))}</tr>" for name, entries in rows)
            return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
        case Drawing(_, words, png):
            light, dark = (f"data:image/png;base64,{base64.b64encode(png[key]).decode()}" for key in ("light", "dark"))
            source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            image = f'<picture>{source}<img src="{light}" alt="{escape(words)}"></picture>'
            return f'<figure class="plot">{image}<figcaption>{escape(words)}</figcaption></figure>'
        case Facts(entries):
            rows = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries.items()]
            return f'<dl class="facts">{"".join(rows)}</dl>'
        case Verdict(claim, outcome, sentence):
            kind = outcome.split()[0]
            mark = f'<span class="outcome {kind}">{escape(outcome.capitalize())}</span>'
            return f'<div class="claim"><p>{mark}<b>{escape(claim.text)}</b></p><p>{escape(sentence)}</p></div>'


def cell(entry: tuple[str, str]) -> str:
    ours, paper = entry
    return f"<td>{escape(ours)}{f'<small>({escape(paper)})</small>' if paper else ''}</td>"


STYLE = """
td small { display: block; color: var(--soft); font-size: 0.82em; }
.plot { margin-top: 16px; }
.plot img { background: none; }
.claim { border-bottom: 1px solid var(--line); padding: 12px 0; max-width: 90ch; }
.claim p { margin: 0 0 4px; }
.claim p + p { color: var(--soft); font-size: 0.92rem; }
.outcome { display: inline-block; border-radius: 6px; padding: 1px 8px; margin-right: 10px; font-size: 0.82rem;
  font-weight: 600; border: 1px solid var(--line); color: var(--soft); }
.outcome.holds { color: #fff; background: #2b8a3e; border-color: #2b8a3e; }
.outcome.does { color: #fff; background: #c92a2a; border-color: #c92a2a; }
"""
