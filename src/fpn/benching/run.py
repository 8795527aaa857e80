"""Every backend that this machine has, one after the other in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.util import find_spec

from tqdm import tqdm

from fpn.backends.names import PRECISIONS
from fpn.benching.measure import Row, Task, measure
from fpn.hardware import pick_device, pick_precision

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
PIXELS = 0.1  # that boxes are apart at most where results are called the same
EQUAL = 0.002  # of AP, that is lost at most by what is called as good


def candidates(device: str, calibrated: bool) -> tuple[list[tuple[str, str]], list[str]]:
    """The backends and precisions to measure on a device, and in words why others are left out.

    calibrated: whether there are images to fit 8 bits to.
    """
    wanted, notes = [], []
    kind = pick_device(device).type
    for backend, precisions in PRECISIONS.items():
        if backend == "auto":
            continue
        missing = [name for name in NEEDS.get(backend, ()) if find_spec(name) is None]
        if missing:
            notes.append(f"{backend} is left out: it needs pip install 'fpn[{backend}]'")
        elif backend in NEEDS and kind != "cpu":
            notes.append(f"{backend} is left out: it runs on the CPU; see it with --device cpu")
        else:
            wanted += [(backend, precision) for precision in precisions]
    if pick_precision("auto", pick_device(device)) != "bf16":
        wanted = [(backend, precision) for backend, precision in wanted if precision != "bf16"]
        notes.append("bf16 is left out: this device has no arithmetic for it")
    if ("openvino", "fp32") in wanted:
        if not calibrated:
            notes.append("openvino int8 is left out: it is fitted to images of a training split; give data")
        elif find_spec("nncf") is None:
            notes.append("openvino int8 is left out: it needs pip install 'fpn[openvino]'")
        else:
            wanted.append(("openvino", "int8"))
    return wanted, notes


def measure_all(task: Task, wanted: Sequence[tuple[str, str]], progress: bool = True) -> list[Row]:
    """A row for each backend and precision; what there is when it is interrupted, where there is something."""
    rows = []
    with tqdm(total=len(wanted), desc="measuring", unit=" backends", disable=not progress, leave=False) as bar:
        for backend, precision in wanted:
            bar.set_postfix_str(f"{backend} {precision}")
            try:
                rows.append(alone(replace(task, backend=backend, precision=precision)))
            except KeyboardInterrupt:
                if not rows:
                    raise
                return [*rows, Row(backend, precision, error="interrupted")]
            bar.update()
    return rows


def alone(task: Task) -> Row:
    """`measure` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, task).result()
        except BrokenProcessPool:
            words = "its process was ended: for want of memory, or by a script without `if __name__ == '__main__'`"
            return Row(task.backend, task.precision, error=words)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # which the pool would wait for
                process.terminate()
            raise


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each backend."""
    name = next((row.measure for row in rows if row.AP is not None), "AP")
    lines = [
        f"| backend | ms an image | times as fast as eager | MiB | boxes found again | {name} | ready after |",
        "|---|---|---|---|---|---|---|",
    ]
    base = base_of(rows)
    for row in rows:
        if row.error:
            lines.append(f"| {row.name} | {row.error.replace('|', '/')} | | | | | |")
            continue
        memory = "-" if row.memory is None else f"{row.memory:.0f}"
        boxes = f"{row.again} of {row.compared}, within {row.apart:.3f} px" if row.compared else "-"
        lines.append(
            f"| {row.name} | {spread([1000 * value for value in row.seconds], 1)} | {spread(row.ratios, 2)} "
            f"| {memory} | {boxes} | {precision_of(row, base)} | {row.ready:.1f} s |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the lowest and the highest."""
    middle, low, high = sorted(values)[len(values) // 2], min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def base_of(rows: Sequence[Row]) -> float | None:
    """The AP of the detector as it is."""
    return next((row.AP for row in rows if row.backend == "eager" and not row.error), None)


def precision_of(row: Row, base: float | None) -> str:
    if row.AP is None:
        return "-"
    return f"{row.AP:.4f}" if base is None or row.backend == "eager" else f"{row.AP:.4f} ({row.AP - base:+.4f})"


def advice(rows: Sequence[Row]) -> list[str]:
    """What to run, in words: the fastest with the same results, and the fastest that is as good."""
    good, base, words = [row for row in rows if not row.error], base_of(rows), []
    same = [row for row in good if row.precision == "fp32" and row.again == row.compared and row.apart <= PIXELS]
    if same:
        words.append(f"the same results, fastest: {name_and_option(max(same, key=lambda row: row.times))}")
    lowest = None if base is None or base < 0 else base - EQUAL  # -1 where the split has no object
    close = [row for row in good if lowest is not None and row.AP is not None and lowest <= row.AP]
    if close:
        fastest = max(close, key=lambda row: row.times)
        words.append(f"{fastest.measure} lower by {EQUAL} at most, fastest: {name_and_option(fastest)}")
    return words


def name_and_option(row: Row) -> str:
    if row.precision == "int8":
        return "fpn export CHECKPOINT --to openvino --precision int8 --calibrate IMAGES"
    return f"--backend {row.backend} --precision {row.precision}"
