"""On one GPU: every path of fpn beside torchvision's own, pixels in to boxes out, and a step of training.

    make bench-gpu                                   # or, with any Python that has what is imported here:
    PYTHONPATH=src python3 benchmarks/gpu.py --out runs/bench-gpu
    PYTHONPATH=src python3 benchmarks/gpu.py --device cpu --small --out runs/bench-gpu    # does the script work?

Needs torch, torchvision, jaxtyping, safetensors, numpy, pillow and tqdm. Weights are seeded and images generated.
Pixels lie on the GPU as uint8, and cuDNN looks for its fastest convolutions, for all sides. A row that fails says why,
and the others go on. Rows are in order of importance; none begins after --minutes. Writes gpu.md and gpu.json to --out
after every row.

torchvision runs as its documentation says, in float32, and under autocast; what the other columns mean:
times: of the first row's speed, medians. first: seconds of the first three calls, in which it is compiled.
waits: how often the host waits for the GPU in one call, by `torch.cuda.set_sync_debug_mode`.
results: how far boxes are from the first row's, see `harness.apart`; of a step the loss, whose examples are drawn anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import alternate, apart, machine, spread, wait
from latency import MODELS, PEER, detections_in, peer_of
from torch import Tensor, nn

from fpn.backends.fused import fused
from fpn.exporting.scenes import scene
from fpn.model.detector import Detector
from fpn.model.nms import by_torchvision, nms
from fpn.structures import Batch, Detections, Targets
from fpn.weights.torchvision import from_torchvision

BF16 = torch.bfloat16
Row = dict[str, Any]


class Report:
    """The rows so far, on the screen and in the files."""

    def __init__(self, out: Path, title: str, minutes: float):
        self.out, self.title, self.rows = out, title, list[Row]()
        self.ends = time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        print(f"{title}\n")

    def add(self, table: str, name: str, measured: Callable[[], Row]) -> Row:
        """Run one row, whatever becomes of it."""
        try:
            if time.monotonic() > self.ends:
                raise TimeoutError("not begun: the time is up")
            row = measured()
        except Exception as error:
            print(traceback.format_exc(), file=sys.stderr)
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
        row = {"table": table, "row": name, **row}
        if not any(other["table"] == table for other in self.rows):
            print(f"\n{table}\n\n{HEADER}")
        print(line(row), flush=True)
        self.rows.append(row)
        self.write()
        return row

    def write(self) -> None:
        text = [self.title]
        for table in dict.fromkeys(row["table"] for row in self.rows):
            text += ["", table, "", HEADER, *(line(row) for row in self.rows if row["table"] == table)]
        (self.out / "gpu.md").write_text("\n".join(text) + "\n", encoding="utf-8")
        content = {"machine": self.title, "rows": self.rows}
        (self.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


HEADER = (
    "| | ms (quartiles) | images/s | times | peak GiB | first, s | waits | results |\n|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    if "error" in row:
        return f"| {row['row']} | {row['error']} | | | | | | |"
    took = "{:.2f} ({:.2f} to {:.2f})".format(*row["ms"])
    rate = f"{row['images_per_second']:.1f}"
    ratio = f"{row['times']:.2f}"
    peak = "" if row["peak"] is None else f"{row['peak']:.1f}"
    waits = "" if row["waits"] is None else row["waits"]
    return f"| {row['row']} | {took} | {rate} | {ratio} | {peak} | {row['first']:.1f} | {waits} | {row['results']} |"


def measure(run: Callable[[], Any], images: int, repeats: int) -> tuple[Row, Any]:
    """Times, memory and waits of one path, and what it gave last."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    # A CUDA graph is recorded at the second call, and first used at the third.
    for _ in range(3 if torch.cuda.is_available() else 1):
        run()
        wait()
    first = time.perf_counter() - start
    seconds = alternate({"": run}, repeats, warmup=0)[""]
    row: Row = {"ms": [1000 * value for value in spread(seconds)], "first": first, "seconds": seconds}
    row["images_per_second"] = images / statistics.median(seconds)
    row["peak"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    row["waits"], result = waits_of(run)
    return row, result


def waits_of(run: Callable[[], Any]) -> tuple[int | None, Any]:
    """How often the host waits for the GPU in one call; and what the call gives."""
    if not torch.cuda.is_available():
        return None, run()
    wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught), result


@contextmanager
def forgetting() -> Iterator[None]:
    """What a row took is free again for the next."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def compiled(run: Callable[..., Any], small: bool, graphs: bool) -> Callable[..., Any]:
    """By torch.compile, in one piece and for one size; `small` only looks whether it can be traced."""
    how: dict[str, Any] = {"backend": "eager"} if small else {"mode": "reduce-overhead" if graphs else "default"}
    return torch.compile(run, fullgraph=True, dynamic=False, **how)


def graphed(run: Callable[[], Detections]) -> Callable[[], Detections]:
    """The eager path recorded as one CUDA graph, and replayed. Every replay writes to the same detections."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay() -> Detections:
        graph.replay()
        return found

    return replay


def peer_for(name: str, options: argparse.Namespace) -> nn.Module:
    """torchvision's model, which leaves images of this size as they are."""
    model: Any = peer_of(name)
    model.transform.min_size, model.transform.max_size = (min(options.size),), max(options.size)
    if options.small and hasattr(model, "rpn"):
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 100, "testing": 100}
    return model


def pixels(count: int, size: tuple[int, int], device: str) -> Tensor:
    return torch.stack([scene(size, seed) for seed in range(count)]).to(device)


def batch_of(images: Tensor, targets: Targets | None = None) -> Batch:
    sizes = torch.tensor([tuple(images.shape[-2:])] * len(images)).to(images.device)
    indices = torch.arange(len(images), device=images.device)
    return Batch(images, sizes, sizes, indices, targets, indices)


@torch.inference_mode()
def ask(model: nn.Module, images: Tensor, autocast: bool) -> list[dict[str, Tensor]]:
    with torch.autocast(images.device.type, BF16, enabled=autocast):
        return model(list(images.float() / 255))


@torch.inference_mode()
def detect(function: Callable[[Batch], Detections], batch: Batch) -> Detections:
    return function(batch)


def detection(report: Report, name: str, count: int, options: argparse.Namespace, repeats: int) -> None:
    """The table of one detector and one size of batch."""
    size, device = options.size, options.device
    table = f"{name}, ResNet-50, {count} x 3 x {size[0]} x {size[1]}: detection"
    theirs = peer_for(name, options)
    ours = from_torchvision(theirs)
    theirs.to(device)
    images = pixels(count, size, device)
    batch, first = batch_of(images), dict[str, Any]()

    def row(build: Callable[[], Callable[[], Any]]) -> Row:
        with forgetting():
            measured, result = measure(build(), count, repeats)
            found = result[0].to("cpu") if isinstance(result, Detections) else detections_in(result[0], ours.classes)
            first.setdefault("found", found)
            first.setdefault("ms", measured["ms"][0])
            times = first["ms"] / measured["ms"][0]
            return {**measured, "times": times, "results": apart(found, first["found"])}

    def of(precision: str, how: Callable[[Any], Any] | None = None) -> Callable[[], Detections]:
        detector = fused(ours.to(device), precision)
        return partial(detect, how(detector.detect) if how else detector.detect, batch)

    report.add(table, f"{PEER}, float32", lambda: row(lambda: partial(ask, theirs, images, False)))
    report.add(table, f"{PEER}, autocast to bfloat16", lambda: row(lambda: partial(ask, theirs, images, True)))
    theirs.cpu()
    report.add(table, "fpn, fused, float32", lambda: row(lambda: of("fp32")))
    report.add(table, "fpn, fused, bfloat16", lambda: row(lambda: of("bf16")))
    report.add(table, "fpn, fused, bfloat16, CUDA graph", lambda: row(lambda: graphed(of("bf16"))))
    whole = partial(compiled, small=options.small, graphs=True)
    report.add(table, "fpn, fused, bfloat16, compiled, CUDA graph", lambda: row(lambda: of("bf16", whole)))


def truth_of(count: int, size: tuple[int, int], classes: int, device: str) -> Targets:
    """Seven boxes an image."""
    torch.manual_seed(0)
    limits = torch.tensor([size[1], size[0]])
    corner = torch.rand(count, 7, 2) * limits * 0.6
    boxes = torch.cat([corner, corner + (0.05 + 0.3 * torch.rand(count, 7, 2)) * limits], dim=-1)
    labels = torch.randint(classes, (count, 7))
    return Targets(boxes, labels, torch.ones(count, 7, dtype=torch.bool)).to(device)


def step(losses: Callable[[], Any], optimizer: torch.optim.Optimizer, autocast: bool, device: str) -> Tensor:
    """One step of training. The loss stays where it is, so that nobody waits."""
    with torch.autocast(device, BF16, enabled=autocast):
        loss = torch.stack(list(losses().values())).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def training(report: Report, name: str, count: int, options: argparse.Namespace, repeats: int) -> None:
    """The table of a step of training: losses, gradients, SGD. All layers learn, in training mode."""
    size, device = options.size, options.device
    table = f"{name}, ResNet-50, {count} x 3 x {size[0]} x {size[1]}: a step of training"
    images, first = pixels(count, size, device), dict[str, Any]()
    targets = truth_of(count, size, 90, device)
    batch = batch_of(images, targets)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        # A rate of 0 is as much work, and the losses of all rows stay comparable.
        return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)

    def of_torchvision(autocast: bool) -> Callable[[], Tensor]:
        model = peer_for(name, options).to(device).train()
        given = [{"boxes": b, "labels": k + 1} for b, k in zip(targets.boxes, targets.labels, strict=True)]
        losses = lambda: model(list(images.float() / 255), given)  # noqa: E731
        return partial(step, losses, optimizer(model), autocast, device)

    def of_fpn(whole: bool) -> Callable[[], Tensor]:
        detector: Detector = from_torchvision(peer_for(name, options)).to(device).requires_grad_(True).train()
        losses = compiled(detector.losses, options.small, graphs=False) if whole else detector.losses
        return partial(step, partial(losses, batch), optimizer(detector), True, device)

    def row(build: Callable[[], Callable[[], Tensor]]) -> Row:
        with forgetting():
            measured, loss = measure(build(), count, repeats)
            first.setdefault("ms", measured["ms"][0])
            return {**measured, "times": first["ms"] / measured["ms"][0], "results": f"loss {float(loss):.3f}"}

    report.add(table, f"{PEER}, float32", lambda: row(lambda: of_torchvision(False)))
    report.add(table, f"{PEER}, autocast to bfloat16", lambda: row(lambda: of_torchvision(True)))
    report.add(table, "fpn, autocast to bfloat16", lambda: row(lambda: of_fpn(False)))
    report.add(table, "fpn, autocast to bfloat16, compiled", lambda: row(lambda: of_fpn(True)))


def suppression(report: Report, title: str, groups: int, count: int, options: argparse.Namespace) -> None:
    """NMS alone, and whether it keeps what torchvision's does on a CPU."""
    torch.manual_seed(0)
    corner = torch.rand(1, count, 2) * torch.tensor([500.0, 300.0])
    boxes = torch.cat([corner, corner + 20 + torch.rand(1, count, 2) * 150], dim=-1)
    scores = torch.rand(1, count).mul(2000).round() / 2000  # some alike
    given = boxes, scores, torch.randint(groups, (1, count)), torch.ones(1, count, dtype=torch.bool)
    wanted, there = by_torchvision(*given, 0.5), [part.to(options.device) for part in given]
    first: dict[str, float] = {}

    def row(run: Callable[..., Tensor]) -> Row:
        measured, keep = measure(lambda: run(*there, 0.5), 1, 20)
        first.setdefault("ms", measured["ms"][0])
        others = int((keep.cpu() != wanted).sum())
        return {
            **measured,
            "times": first["ms"] / measured["ms"][0],
            "results": f"{int(wanted.sum())} kept, {others} other than torchvision's on a CPU",
        }

    report.add(title, PEER, lambda: row(by_torchvision))
    report.add(title, "fpn", lambda: row(nms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small images, nothing is compiled: does the script work?")
    parser.add_argument("--minutes", type=float, default=7.0, help="no row begins later than this")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; add --device cpu --small to see whether the script works", file=sys.stderr)
        sys.exit(1)
    torch.backends.cudnn.benchmark = True
    options.size, many, turns = ((96, 128), 2, 1) if options.small else ((800, 1216), 16, 20)
    report = Report(options.out, machine(), options.minutes)
    suppression(report, "NMS alone: 5000 boxes in 5 groups", 5, 5000, options)
    suppression(report, "NMS alone: 4096 boxes in 80 groups", 80, 4096, options)
    first, *others = options.models
    detection(report, first, 1, options, turns)
    training(report, first, many, options, max(1, turns // 2))
    detection(report, first, many, options, max(1, turns // 2))
    for name in others:
        detection(report, name, 1, options, turns)
    for name in others:
        detection(report, name, many, options, max(1, turns // 2))
    print(f"\n{report.out / 'gpu.md'}, {report.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
