"""Processes that decode: what they die of, and whose fault it is; copies and commands that are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fpn.data.scan
from fpn.cli import as_command, main
from fpn.data import load
from fpn.data.copies import new_folder, place_images
from fpn.data.scan import CHUNK, scan
from fpn.errors import FpnError, ImageError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}.png" for index in range(2 * CHUNK)]
    for path in paths:
        Image.new("RGB", (8, 6)).save(path)
    return paths


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "data.yaml").write_text("train: images\nnames: [cat]\n")
    for index in range(3):
        Image.new("RGB", (40, 30), (60 * index, 0, 0)).save(root / "images" / f"{index}.png")
        (root / "labels" / f"{index}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return root


def needs_fork() -> None:
    if fpn.data.scan.multiprocessing.get_start_method() != "fork":
        pytest.skip("the stand-in for a decoder reaches the processes only where they are forked")


def test_a_process_killed_while_idle_costs_nothing(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the system where memory is short: after its last answer, before it gets the next images."""
    give, dead = fpn.data.scan._Worker.give, []

    def give_to_the_dead(worker: Any, indices: Any, names: list[str]) -> None:
        if worker.ready and not dead:
            dead.append(worker.process.pid)
            worker.process.kill()
            worker.process.join()
        give(worker, indices, names)

    monkeypatch.setattr(fpn.data.scan._Worker, "give", give_to_the_dead)
    seen = scan(files, workers=1)
    assert dead and not seen.errors and (seen.sizes == [6, 8]).all()


def test_an_image_is_not_blamed_for_one_death(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_fork()
    decode, died = fpn.data.scan.decode, tmp_path / "died"

    def killed_once(path: str) -> Any:
        if path == str(files[5]) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path)

    monkeypatch.setattr(fpn.data.scan, "decode", killed_once)
    seen = scan(files, workers=2)
    assert died.exists() and not seen.errors and (seen.sizes == [6, 8]).all()


def test_a_source_that_vanishes_is_named_itself_and_nothing_stays(data: Path, tmp_path: Path) -> None:
    found, gone = load(data), data / "images" / "gone.png"
    out = tmp_path / "new" / "deep" / "copy"
    with pytest.raises(ImageError, match=r"^\S*images/gone\.png: cannot be read"), new_folder(out, found) as folder:
        place_images([(gone, folder / "gone.png")])
    with pytest.raises(FileNotFoundError), new_folder(out, found):
        gone.read_bytes()
    with pytest.raises(FpnError, match=r"^\S*/copy: cannot be written"), new_folder(out, found) as folder:
        (folder / "no" / "such.json").write_text("")
    assert not (tmp_path / "new").exists()
    with new_folder(out, found) as folder:
        place_images([(data / "images" / "0.png", folder / "0.png")])
    assert [path.name for path in out.parent.rglob("*")] == ["copy", "0.png"]


def test_a_copy_that_is_terminated_leaves_nothing(data: Path, tmp_path: Path) -> None:
    """The command is held up in the middle of writing, and gets SIGTERM there."""
    held = (
        "import sys, time, fpn.data.writers as writers; from fpn.cli import main\n"
        "def hold(pairs): print('writing', flush=True); time.sleep(60)\n"
        "writers.place_images = hold; main(sys.argv[1:])"
    )
    arguments = ["data", "convert", str(data), "--to", "coco", "--out", str(tmp_path / "new" / "copy")]
    process = subprocess.Popen(
        [sys.executable, "-c", held, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert list((tmp_path / "new").iterdir())
    process.terminate()
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and said.strip() == "fpn: interrupted"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_success(data: Path, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fpn.cli", "data", "check", str(data), "--json", "--workers", "1"],
        stdout=writer, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 141 and done.stderr == "", done


def test_another_broken_pipe_is_an_error(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(fpn.data, "find_defects", broken)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="Broken pipe"):
        main(["data", "check", str(data)])
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_warning_is_one_line_in_the_command_only() -> None:
    usual = warnings.formatwarning
    with as_command():
        assert warnings.formatwarning("a.png is odd", UserWarning, "fpn.py", 3) == "warning: a.png is odd\n"
        assert "fpn.py:3" in warnings.formatwarning("old", DeprecationWarning, "fpn.py", 3)
    assert warnings.formatwarning is usual
