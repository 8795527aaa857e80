"""The verbs of `fpn data`: a thin skin over the functions of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

data_app = App(name="data", help="Look at a data set, mend it, divide it, write it in another format.")


@data_app.command
def info(path: Path, /, *, as_json: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """Format, splits, classes, sizes of images and boxes, and defects of a data set.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    as_json
        Print JSON for other programs.
    """
    from fpn import data

    description = data.describe(data.load(path))
    if as_json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
    else:
        data.print_info(description)
