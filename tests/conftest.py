"""Set-up of all tests. While they run, every shape in an annotation of the package is checked at every call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import install_import_hook

# The hook decorates methods one by one, where beartype cannot know what Self is. An int will do for a float.
check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any}), is_pep484_tower=True))

# Before anything imports the package; pytest reads this file first.
install_import_hook("fpn", f"{__name__}.check")

# Several test processes share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets and weights that stands beside the repository on some machines; not part of it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder ../shared with data sets and weights, which is not here")
    return path
