"""A real ONNX file, there and back, and examples/onnx_without_torch.py, which runs it without torch and fpn."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "onnx_without_torch.py"
THRESHOLD = 0.1
PACKAGES = ("onnxruntime", "pillow", "numpy")

WRITE = """
    import json, sys
    import torch
    import fpn
    from fpn.exporting.certificate import confirm
    from fpn.exporting.export import export

    torch.manual_seed(0)
    made = fpn.build(backbone="tiny", classes=["Bär", "cat"], weights="none", width=16, hidden=32, short=64, long=96,
                     proposals_per_level=(50, 50), proposals=(50, 50))
    torch.nn.init.normal_(made.box_head.classes.weight, std=0.2)
    made.eval()
    export(made, sys.argv[1], progress=False)
    again = fpn.load(sys.argv[1])
    assert "certificate confirmed on 13 images" in confirm(again, progress=False)
    assert sum(row["original"] for row in again.about["certificate"]["rows"].values()) > 10
    found = fpn.predict(made, sys.argv[2], float(sys.argv[4]))
    with open(sys.argv[3], "w") as file:
        json.dump([found.names, found.scores.tolist(), found.boxes.tolist()], file)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """detector.onnx, picture.png and what the detector finds there, found.json."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    made = tmp_path_factory.mktemp("example")
    pixels = np.random.default_rng(0).integers(0, 256, (57, 83, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made / "picture.png")
    files = [made / name for name in ("detector.onnx", "picture.png", "found.json")]
    fresh.run(WRITE, arguments=[*files, THRESHOLD])
    return made


def detect(folder: Path, *command: str | Path) -> None:
    """Run the example as a command, and compare what it says with what the detector finds."""
    ran = subprocess.run(
        [*command, "detector.onnx", "picture.png", "--threshold", str(THRESHOLD)],
        cwd=folder, capture_output=True, text=True, env={"PYTHONIOENCODING": "utf-8"}, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    names, scores, boxes = json.loads((folder / "found.json").read_text())
    assert len(rows) == len(names) > 0
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-3)
    # Of two that score alike either may come first.
    apart = np.abs(np.array(boxes)[:, None] - np.array([row["box"] for row in rows])).max(2)
    other = np.array(names)[:, None] != np.array([row["class"] for row in rows])
    assert np.where(other, np.inf, apart).min(1).max() < 0.1
    with Image.open(folder / "picture.detected.png") as drawn:
        assert drawn.size == (83, 57)


def test_the_example_runs_where_torch_cannot_be_imported(folder):
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'fpn'))); sys.argv.pop(0); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    detect(folder, sys.executable, "-c", code, EXAMPLE)


def test_the_example_runs_with_three_packages_alone(folder):
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("needs uv")
    place = folder / "venv"
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, place], check=True, timeout=120)
    try:
        ran = subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", python, *PACKAGES], capture_output=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip("the packages do not come within two minutes")
    if ran.returncode:
        pytest.skip("the packages cannot be had here")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    detect(folder, python, EXAMPLE)


def test_the_example_is_short():
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 65 and not any(line.startswith(("import torch", "import fpn", "from fpn")) for line in lines)
