"""docs/fpn.md: its blocks run from top to bottom, it shows what they make, and the notebook is the same page."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import fpn
from fpn.data.generated import generate
from fpn.demo import small_detector

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "fpn.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def notebook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like docs/, the working folder."""
    folder = tmp_path / "docs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(DOCS))
    return folder


def shape_of(page: str, notebook: ModuleType) -> list[tuple[str, bool, str | None]]:
    """Of each block its code, whether it prints something, and its figure."""
    return [(b["code"], b["output"] is not None, b["figure"]) for b in notebook.BLOCK.finditer(page)]


def test_blocks_run_and_make_what_the_page_shows(
    notebook: ModuleType, workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.import_module("figures"), "DPI", 30)  # docs/figures.py
    demo = workplace.parent / "runs" / "demo"
    data = fpn.data.load(generate(demo / "data", 6, (128, 128)))
    fpn.weights.save(small_detector(data.classes), demo / "best.safetensors")
    made = notebook.run(PAGE)
    assert shape_of(made, notebook) == shape_of(PAGE, notebook)
    assert "the same as detector.pyramid(c): True" in made and "column of P5: True" in made
    figures = {Path(link).name for link in re.findall(r"\]\((fpn/\w+\.png)\)", PAGE)}
    assert {file.name for file in (workplace / "fpn").iterdir()} == figures
    published = list((DOCS / "fpn").iterdir())
    assert {file.name for file in published} == figures
    assert max(file.stat().st_size for file in published) < 200_000


def test_refuses_without_a_trained_detector(notebook: ModuleType, workplace: Path):
    with pytest.raises(SystemExit, match="run `make demo`"):
        notebook.run(PAGE)


def test_every_block_is_found(notebook: ModuleType):
    blocks = list(notebook.BLOCK.finditer(PAGE))
    assert len(blocks) == PAGE.count("```python") == PAGE.count("```text")
    assert sum(b["figure"] is not None for b in blocks) == PAGE.count("](fpn/")


def test_notebook_is_the_page(notebook: ModuleType):
    assert (DOCS / "fpn.ipynb").read_text(encoding="utf-8") == notebook.as_text(PAGE), "run: python docs/notebook.py"


def test_worked_page(notebook: ModuleType):
    page = (
        "# A\n\n```python\nx = 2\nprint(x)\n```\n\n```text\nold\n```\n\n![a](fpn/a.png)\n\nB\n\n```python\ny = x\n```\n"
    )
    made = notebook.run(page)
    assert made == page.replace("old", "2")
    text, first, more, second = notebook.notebook(made)["cells"]
    assert text["source"] == ["# A"] and more["source"] == ["B"]
    assert first["source"] == ["x = 2\n", "print(x)"] and second["source"] == ["y = x"] and not second["outputs"]
    assert first["outputs"][0]["text"] == ["2\n"]
    assert first["outputs"][1]["data"]["text/markdown"] == ["![a](fpn/a.png)"]


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([\w./]+\.\w+)\)", PAGE):
        assert (DOCS / link).is_file(), link
