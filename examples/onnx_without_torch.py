"""Detect objects with a file that `fpn export` wrote, without torch and without fpn.

    pip install onnxruntime pillow numpy
    python onnx_without_torch.py detector.onnx photo.jpg another.png --threshold 0.5

Prints a line of JSON a detection, and writes each image with its boxes as NAME.detected.png where it is run.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--threshold", type=float, default=0.5)
    options = parser.parse_args()
    session = onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["fpn"])
    for path in options.images:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        found = detect(session, picture, about["classes"], options.threshold)
        for one in found:
            print(json.dumps({"file": str(path), **one}, ensure_ascii=False))
        draw(picture, found, about["classes"]).save(f"{path.stem}.detected.png")


def detect(session: onnxruntime.InferenceSession, picture: Image.Image, classes: list[str], threshold: float) -> list:
    """Name, score and box (x1, y1, x2, y2 in pixels of the picture) of each detection, highest score first."""
    pixels = np.asarray(picture).transpose(2, 0, 1)[None]  # uint8 (1, 3, H, W): the file resizes and normalises itself
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {session.get_inputs()[0].name: pixels}), strict=True))
    real = int(outputs["count"][0])  # the rest is padding
    rows = zip(*(outputs[name][0, :real].tolist() for name in ("labels", "scores", "boxes")), strict=True)
    shown = ((label, score, [round(side, 1) for side in box]) for label, score, box in rows if score >= threshold)
    return [{"class": classes[label], "score": round(score, 4), "box": box} for label, score, box in shown]


def draw(picture: Image.Image, found: list, classes: list[str]) -> Image.Image:
    pen, width = ImageDraw.Draw(picture), 1 + max(picture.size) // 300
    for one in found:
        colour = COLOURS[classes.index(one["class"]) % len(COLOURS)]
        pen.rectangle(one["box"], outline=colour, width=width)
        pen.text((one["box"][0] + width, one["box"][1] + width), f"{one['class']} {one['score']:.2f}", fill=colour)
    return picture


if __name__ == "__main__":
    main()
