"""What the paper says about its tables, judged on the cells that were run here: holds, does not, or cannot be told.

A claim is a set of differences that it says are above zero. Each is taken within a seed, so that what rows with the
same seed share falls out, and comes with the 95 % interval of its mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fpn.paper.interval import Estimate, estimate
from fpn.paper.published import PUBLISHED
from fpn.paper.tables import TABLES
from fpn.words import listed

Numbers = Mapping[str, Mapping[int, Mapping[str, float]]]  # row -> seed -> metric -> 0 to 1, or -1 where undefined
Outcome = Literal["holds here", "does not hold here", "cannot be told at this size"]

SLIGHTLY = 2.0  # points: what "slightly" is taken for


@dataclass(frozen=True)
class Difference:
    """A sum of numbers with signs: (sign, row, metric) each."""

    words: str
    terms: tuple[tuple[int, str, str], ...]

    def minus(self, other: Difference) -> Difference:
        """How much larger it is than another."""
        terms = (*self.terms, *((-sign, row, metric) for sign, row, metric in other.terms))
        return Difference(f"{self.words} against {other.words}", terms)

    def by_seed(self, numbers: Numbers) -> dict[int, float]:
        """In points, for the seeds that have all its numbers."""
        rows = [numbers.get(row, {}) for _, row, _ in self.terms]
        common = [seed for seed in rows[0] if all(seed in row for row in rows)]
        return {seed: value for seed in common if (value := self.value(numbers, seed)) is not None}

    def value(self, numbers: Numbers, seed: int) -> float | None:
        """In points; None where a number is undefined."""
        parts = [(sign, numbers[row][seed].get(metric, -1.0)) for sign, row, metric in self.terms]
        return None if any(part < 0 for _, part in parts) else 100 * sum(sign * part for sign, part in parts)

    def published(self, table: int) -> float:
        """The paper's, in points."""
        return sum(sign * PUBLISHED[table][row][metric] for sign, row, metric in self.terms)


@dataclass(frozen=True)
class Claim:
    """Something that the paper says of a table: that all `differences` are above zero.

    within: that they are none to speak of instead: between plus and minus so many points.
    """

    table: int
    text: str
    metric: str
    differences: tuple[Difference, ...]
    within: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim, what became of it here, and one sentence with the figures."""

    claim: Claim
    outcome: Outcome
    sentence: str


def between(better: str, worse: str, metric: str) -> Difference:
    return Difference(f"{better} − {worse}", ((1, better, metric), (-1, worse, metric)))


def more_so(better: str, worse: str, most: str, less: str) -> Difference:
    """How much more is gained in one metric than in another."""
    gains = [between(better, worse, f"AR1000_{size}") for size in (most, less)]
    return Difference(f"{better} − {worse}, {most} over {less}", gains[0].minus(gains[1]).terms)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        1,
        "The pyramid (c) finds more objects than every other variant.",
        "AR1k",
        tuple(between("c", row, "AR1000") for row in "abdef"),
    ),
    Claim(
        1,
        "What it gains over one map of stride 16 (a), it gains most on small objects.",
        "AR1k",
        tuple(more_so("c", "a", "small", size) for size in ("medium", "large")),
    ),
    Claim(
        1,
        "Without the top-down pathway (d) the levels are too unlike for one head, and fewer objects are found.",
        "AR1k",
        (between("c", "d", "AR1000"),),
    ),
    Claim(
        1,
        "Without lateral connections (e) places are known less exactly, and fewer objects are found.",
        "AR1k",
        (between("c", "e", "AR1000"),),
    ),
    Claim(
        1,
        "The finest level alone (f) falls behind the pyramid, although it has more anchors.",
        "AR1k",
        (between("c", "f", "AR1000"),),
    ),
    Claim(
        2,
        "On the same proposals the pyramid (c) detects better than one level (a, b) and than half a pyramid (d, e).",
        "AP",
        tuple(between("c", row, "AP") for row in "abde"),
    ),
    Claim(
        2,
        f"The finest level alone (f) is nearly as good: less than {SLIGHTLY:g} points from the pyramid.",
        "AP",
        (between("c", "f", "AP"),),
        within=SLIGHTLY,
    ),
    Claim(
        3,
        "With proposals of its own, the pyramid (c) detects better than one level (a, b).",
        "AP",
        tuple(between("c", row, "AP") for row in "ab"),
    ),
    Claim(
        5,
        "Sharing features between the RPN and Fast R-CNN makes detection slightly better, not only faster.",
        "AP",
        (between("shared", "separate", "AP"),),
    ),
    Claim(
        6,
        "Windows of two sizes find more objects than those of one.",
        "AR1k",
        tuple(between("both", row, "AR1000") for row in ("5x5", "7x7")),
    ),
    Claim(
        6,
        "What they gain, they gain on large objects more than on small ones.",
        "AR1k",
        tuple(more_so("both", row, "large", "small") for row in ("5x5", "7x7")),
    ),
)


def judge_all(table: int, numbers: Numbers) -> list[Verdict]:
    return [judge(claim, numbers) for claim in CLAIMS if claim.table == table]


def judge(claim: Claim, numbers: Numbers) -> Verdict:
    """What the cells say about a claim: all of it, with 95 % confidence for each difference, or nothing."""
    if why := unknown(claim, numbers):
        return Verdict(claim, "cannot be told at this size", why)
    estimates = [estimate(list(difference.by_seed(numbers).values())) for difference in claim.differences]
    figures = "; ".join(
        f"{difference.words} {in_words(found)}, in the paper {signed(difference.published(claim.table))}"
        for difference, found in zip(claim.differences, estimates, strict=True)
    )
    against = [d.words for d, found in zip(claim.differences, estimates, strict=True) if refutes(claim, found)]
    open_ones = [d.words for d, found in zip(claim.differences, estimates, strict=True) if not supports(claim, found)]
    figures = f"{claim.metric} in points: {figures}"
    limit = "above 0" if claim.within is None else f"within {claim.within:g} points of 0"
    if against:
        return Verdict(claim, "does not hold here", f"{figures}. Not {limit}: {listed(against)}.")
    if not open_ones:
        return Verdict(claim, "holds here", f"{figures}.")
    if max(found.count for found in estimates) == 1:
        return Verdict(claim, "cannot be told at this size", f"{figures}. One seed does not tell chance from effect.")
    doubt = f"The interval does not say whether it is {limit}: {listed(open_ones)}."
    return Verdict(claim, "cannot be told at this size", f"{figures}. {doubt}")


def supports(claim: Claim, found: Estimate) -> bool:
    if claim.within is None:
        return found.low > 0
    return -claim.within < found.low and found.high < claim.within


def refutes(claim: Claim, found: Estimate) -> bool:
    if claim.within is None:
        return found.high < 0
    return found.low > claim.within or found.high < -claim.within


def unknown(claim: Claim, numbers: Numbers) -> str:
    """Why a claim cannot even be looked at, "" where it can."""
    terms = [term for difference in claim.differences for term in difference.terms]
    if absent := sorted({row for _, row, _ in terms if not numbers.get(row)}):
        return f"Not run yet: {listed(absent)}."
    for difference in claim.differences:
        if difference.by_seed(numbers):
            continue
        common = set.intersection(*(set(numbers[row]) for _, row, _ in difference.terms))
        if not common:
            return f"No seed has been run for both sides of {difference.words}."
        lacking = {metric for _, row, metric in difference.terms if numbers[row][min(common)].get(metric, -1.0) < 0}
        sizes = [size for size in ("small", "medium", "large") if any(metric.endswith(size) for metric in lacking)]
        return f"The validation images have no {' and no '.join(sizes or ['known'])} objects to measure it on."
    return ""


def differences(table: int, metric: str, numbers: Numbers) -> dict[str, Estimate]:
    """By row how far it is from the row that the table compares with, in points; the rows that have common seeds."""
    base = TABLES[table].compared
    found = {row: between(row, base, metric).by_seed(numbers) for row in TABLES[table].rows if row != base}
    return {row: estimate(list(values.values())) for row, values in found.items() if values}


def over_seeds(numbers: Numbers, row: str, metric: str) -> Estimate | None:
    """A row's number in percent; None where no seed has one."""
    values = [100 * cell[metric] for cell in numbers.get(row, {}).values() if cell.get(metric, -1.0) >= 0]
    return estimate(values) if values else None


def in_words(found: Estimate) -> str:
    """
    >>> in_words(Estimate(4.25, 0.5, 1.24, 3)), in_words(Estimate(-0.5, None, None, 1))
    ('+4.2 [+3.0, +5.5]', '−0.5 [one seed]')
    """
    if found.half is None:
        return f"{signed(found.mean)} [{'one seed' if found.count == 1 else 'all seeds equal'}]"
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


def signed(points: float) -> str:
    """
    >>> signed(1.26), signed(-1.26), signed(-0.01)
    ('+1.3', '−1.3', '0.0')
    """
    text = f"{abs(points):.1f}"
    return text if float(text) == 0 else ("+" if points > 0 else "−") + text
