"""The pages of `--help`, without rich's reader of Markdown, which takes long to load."""

from __future__ import annotations

from typing import Any

from cyclopts.help import DefaultFormatter


class Help(DefaultFormatter):
    """Cyclopts' own pages, from plain text in which a docstring's paragraphs and `code` are found again."""

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        super().render_description(console, options, set_words(description))

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        for entry in panel.entries:
            set_words(entry.description)
        super().__call__(console, options, panel)


def set_words(description: Any) -> Any:
    """Join the lines that a paragraph is broken into, and show what stands in backticks as code."""
    from rich.text import Text

    plain = getattr(description, "primary_renderable", None)
    if isinstance(plain, Text):
        paragraphs = [" ".join(part.split()) for part in plain.plain.split("\n\n")]
        words = "\n\n".join(paragraphs).split("`")
        styled = [(part, "markdown.code" if place % 2 else "") for place, part in enumerate(words)]
        description.primary_renderable = Text.assemble(*styled)
    return description
