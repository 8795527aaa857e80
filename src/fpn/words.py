"""Words for people: what messages and tables share."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LONGEST_TEXT = 1000  # characters
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control, line ends, surrogates


def printable(text: str) -> str:
    """Words from a file as they can be shown: what would break a line, a terminal or UTF-8 is escaped, and the end of
    very long ones is left out."""
    text = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "box", "boxes"), counted(1200, "image")
    ('1 box', '1,200 images')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many more there are.

    >>> some_of(["cat", "dog", "owl"], 2)
    'cat, dog and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def listed(names: Sequence[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
