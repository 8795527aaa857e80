"""Processes of their own for tests that need one, without the ten seconds in which PyTorch and Lightning are imported.

Each is forked from a process that has done just that. It is without the shape checks of conftest.py, as users run fpn;
they wrap every function, and neither torch.compile nor torch.export looks through them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

COMMAND = "import sys; from fpn.cli import main; main(sys.argv[1:])"  # `fpn`, with its arguments

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch._dynamo", "torchvision", "lightning.pytorch"])
# Compiling in processes of its own, torch would import itself anew in each.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def start(code: str, *arguments: object, log: Path) -> BaseProcess:
    """Begin to run a script with these arguments; what it prints goes to `log`."""
    usual = multiprocessing.get_start_method()
    process = context.Process(target=_execute, args=(code, list(map(str, arguments)), str(log), usual))
    process.start()
    return process


def run(*parts: str, arguments: Sequence[object] = (), patience: float = 600) -> None:
    """Run a script, in one part or several, to its end, which must be a good one, within `patience` seconds."""
    code = "".join(map(textwrap.dedent, parts))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = start(code, *arguments, log=log)
        process.join(patience)
        if process.is_alive():
            process.kill()
        said = log.read_text(errors="replace")[-3000:] if log.exists() else "nothing"
        assert process.exitcode == 0, f"ended with {process.exitcode}, and said: {said}"


def _execute(code: str, arguments: list[str], log: str, usual: str) -> None:
    # Python lets a process start others as it was started itself; loading processes are to begin as they do for users.
    multiprocessing.set_start_method(usual, force=True)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["fpn", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
