"""The verb `fpn serve`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fpn.backends.names import Backend, Precision
from fpn.errors import OptionError
from fpn.serve.limits import Limits

if TYPE_CHECKING:
    from fpn.inference.finder import Finder

LOCAL = ("localhost", "127.0.0.1", "::1")


def serve(
    checkpoint: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: Annotated[str | None, Parameter(env_var="FPN_TOKEN")] = None,
    batch: int = 8,
    wait: float = 5,
    device: str = "auto",
    backend: Backend = "auto",
    precision: Precision = "fp32",
    limits: Annotated[Limits, Parameter(name="*")] = Limits(),  # noqa: B008
) -> None:
    """Answer over HTTP: POST an image to /detect, or open the address in a browser. Ctrl-C or SIGTERM stops it.

    Parameters
    ----------
    checkpoint
        A .safetensors file written by `fpn train`, or an exported detector.
    host
        Address to listen on; others than this machine's own (loopback) need --token.
    port
        Port to listen on; 0 for any that is free.
    token
        What clients must send as `Authorization: Bearer TOKEN`. Better given as FPN_TOKEN in the environment, which
        other users of the machine cannot see.
    batch
        Most images that are looked at together.
    wait
        Milliseconds in which they are gathered.
    device
        auto, cpu, cuda, cuda:N or mps.
    backend
        What runs the detector of a checkpoint: auto, eager, fused, compiled, onnx or openvino; see `fpn predict`.
    precision
        fp32, or bf16 for twice the speed or more where the device has arithmetic for it.
    """
    try:
        from fpn.serve.app import application
        from fpn.serve.server import bound, server_of
    except ModuleNotFoundError as error:
        raise OptionError(f"fpn serve needs {error.name}: pip install 'fpn[serve]'") from error
    from fpn.inference.command import loaded
    from fpn.inference.finder import finder

    check(port, token, batch, wait)
    listening, local = bound(host, port)
    with listening:
        if not local and token is None:
            raise OptionError(f"--host {host}: others than this machine reach it, so it needs --token")
        detector = loaded(checkpoint, device, backend, precision)
        if detector.needs_regions:
            raise OptionError(f"{checkpoint}: looks at given regions only; serve a detector that finds its own")
        find = finder(detector, device, progress=False)
        warm_up(find, detector.spec.sides)
        hosts = None if token is not None else {*LOCAL, host.lower()}
        app = application(
            detector,
            find=find,
            name=checkpoint.name,
            limits=limits,
            batch=batch,
            wait=wait / 1000,
            token=token,
            hosts=hosts,
        )
        print(f"{checkpoint.name}: {detector.spec.model}, {', '.join(detector.classes[:5])}")
        print(f"serving on {address_of(host, listening.getsockname()[1])} (Ctrl-C stops it)", flush=True)
        warnings.simplefilter("ignore")  # Pillow's, on whatever clients send
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # likewise
        try:
            server_of(app, limits).run(sockets=[listening])
        except KeyboardInterrupt:  # how uvicorn passes the signal on, once all is answered
            print("stopped")


def check(port: int, token: str | None, batch: int, wait: float) -> None:
    """Raises OptionError for what cannot be served with."""
    if not 0 <= port <= 65535:
        raise OptionError(f"port is {port}: it must be from 0 to 65535")
    if batch < 1:
        raise OptionError(f"batch is {batch}: it must be at least 1")
    if not 0 <= wait <= 1000:
        raise OptionError(f"wait is {wait}: it must be from 0 to 1000 milliseconds")
    if token is not None and not (len(token) >= 16 and token.isascii() and token.isprintable() and " " not in token):
        raise OptionError(
            "the token must be 16 or more letters, digits and signs without spaces, such as from: "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )


def warm_up(find: Finder, sides: tuple[int, int]) -> None:
    """The first image through a detector is slow; and what does not work at all shows here rather than to a client."""
    import torch

    find([torch.zeros((3, sides[0], sides[0]), dtype=torch.uint8)])


def address_of(host: str, port: int) -> str:
    """
    >>> address_of("::1", 80), address_of("localhost", 8000)
    ('http://[::1]:80', 'http://localhost:8000')
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
