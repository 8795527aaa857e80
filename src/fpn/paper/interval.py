"""Mean, spread and confidence of a few numbers, one a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5 %, for 1 to 10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z = 1.959964  # the same of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """The mean of `count` numbers, their standard deviation, and half the width of the mean's 95 % interval.

    The last two are None where one number is all there is, and `half` where all are equal: recall moves in steps, so
    that a few equal numbers do not say that there is no chance in them.
    """

    mean: float
    spread: float | None
    half: float | None
    count: int

    @property
    def low(self) -> float:
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        return math.inf if self.half is None else self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation (of a sample, n - 1) and 95 % interval by Student's t.

    >>> three = estimate([1.0, 2.0, 3.0])
    >>> three.mean, three.spread, round(three.half, 3)
    (2.0, 1.0, 2.484)
    """
    assert values, "there is nothing to estimate"
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, None, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = quantile(count - 1) * spread / math.sqrt(count)
    return Estimate(mean, spread, half if spread > 1e-9 else None, count)


def quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond 10 degrees of freedom by Cornish and Fisher's expansion (1938).

    >>> quantile(2), round(quantile(30), 3)
    (4.303, 2.042)
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / freedom + second / freedom**2 + third / freedom**3
