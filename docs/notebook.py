"""fpn.md -> fpn.ipynb, and with --run first everything that the page shows: outputs and figures.

    python docs/notebook.py          # the notebook from the page as it is
    python docs/notebook.py --run    # runs the page's blocks on runs/demo, then writes page, figures and notebook

In the page a block of Python may be followed by a block of text, what it prints, and by the figure that it draws.
In the notebook both are outputs of the block's cell.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)\n```\n(?:\n```text\n(?P<output>.*?)\n```\n)?(?:\n(?P<figure>!\[[^\]]*\]\(fpn/\w+\.png\))\n)?",
    re.DOTALL | re.MULTILINE,
)


def run(page: str) -> str:
    """The page with the outputs that its blocks print now; they run in the working folder, in one namespace."""
    names: dict[str, Any] = {"__name__": "__page__"}

    def renewed(block: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], f"fpn.md:{page[: block.start('code')].count(chr(10)) + 1}", "exec"), names)
        text = printed.getvalue().rstrip()
        shown = "\n".join(line.rstrip() for line in text.splitlines())
        parts = [f"```python\n{block['code']}\n```\n"]
        parts += [f"```text\n{shown}\n```\n"] if shown else []
        parts += [f"{block['figure']}\n"] if block["figure"] else []
        return "\n".join(parts)

    return BLOCK.sub(renewed, page)


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook (nbformat 4.5), its outputs and links to its figures included."""
    cells, at = [], 0
    for block in BLOCK.finditer(page):
        cells += [text_cell(page[at : block.start()]), code_cell(block)]
        at = block.end()
    cells.append(text_cell(page[at:]))
    kept = [cell for cell in cells if cell["source"]]
    for number, cell in enumerate(kept):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": kept, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def text_cell(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text.strip())}


def code_cell(block: re.Match[str]) -> dict[str, Any]:
    outputs: list[dict[str, Any]] = []
    if block["output"]:
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(block["output"] + "\n")})
    if block["figure"]:
        data = {"text/markdown": [block["figure"]], "text/plain": [block["figure"]]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": outputs}
    return cell | {"source": lines(block["code"])}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def as_text(page: str) -> str:
    """The file's content."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    os.chdir(DOCS)
    page = Path("fpn.md").read_text(encoding="utf-8")
    if "--run" in sys.argv[1:]:
        page = run(page)
        Path("fpn.md").write_text(page, encoding="utf-8")
    Path("fpn.ipynb").write_text(as_text(page), encoding="utf-8")


if __name__ == "__main__":
    main()
