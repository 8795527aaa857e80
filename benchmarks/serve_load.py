"""Many clients of `fpn serve` at once, for minutes: most send images, some are hostile, slow or hang up.

    fpn serve runs/demo/best.safetensors &
    python benchmarks/serve_load.py http://127.0.0.1:8000 runs/demo/data --clients 16 --seconds 180

Prints every few seconds what was answered and the server's memory; at the end the answers by status, the times of those
that were looked at, and whether a polite client was ever failed. Exits with 1 where one was.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

PATIENCE = 60.0  # seconds a client waits for an answer


@dataclass
class Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)  # of polite clients


async def polite(client: httpx.AsyncClient, files: list[bytes], tally: Tally) -> None:
    """Sends an image, and comes again when told to."""
    file = random.choice(files)
    answer = random.choice(("json", "json", "json", "picture"))
    began = time.monotonic()
    try:
        reply = await client.post("/detect", params={"answer": answer, "threshold": 0.3}, content=file)
    except httpx.HTTPError as error:
        tally.failures[type(error).__name__] += 1
        return
    tally.statuses[f"image {reply.status_code}"] += 1
    if reply.status_code == 503:
        await asyncio.sleep(float(reply.headers["retry-after"]) * random.uniform(0.5, 1.5))
    elif reply.status_code == 200:
        tally.seconds.append(time.monotonic() - began)
    else:
        tally.failures[f"{reply.status_code} {reply.text[:80]}"] += 1


async def hostile(client: httpx.AsyncClient, files: list[bytes], tally: Tally) -> None:
    """Sends what is no image, or an image with a few bytes changed or its end cut off."""
    file = bytearray(random.choice(files))
    match random.randrange(3):
        case 0:
            file = bytearray(random.randbytes(20_000))
        case 1:
            file = file[: random.randrange(1, len(file))]
        case 2:
            for _ in range(20):
                file[random.randrange(len(file))] = random.randrange(256)
    try:
        reply = await client.post("/detect", content=bytes(file))
        tally.statuses[f"hostile {reply.status_code}"] += 1
        if reply.status_code == 500:
            tally.failures["hostile 500"] += 1
    except httpx.HTTPError as error:
        tally.failures[f"hostile {type(error).__name__}"] += 1
    await asyncio.sleep(0.2)


async def rude(client: httpx.AsyncClient, files: list[bytes], tally: Tally) -> None:
    """Hangs up in the middle of sending, or once all is sent; or sends so slowly that the server gives up."""
    address, file = urlsplit(str(client.base_url)), random.choice(files)
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"POST /detect HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(file)}\r\n\r\n".encode())
        way = random.choice(("cut off while sending", "cut off after sending", "slow"))
        tally.statuses[way] += 1
        if way == "slow":
            for place in range(0, 100):
                writer.write(file[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0.5)
        else:
            writer.write(file if way.endswith("after sending") else file[: len(file) // 2])
            await writer.drain()
            await asyncio.sleep(random.uniform(0, 0.3))
        writer.close()
    except OSError:
        pass
    await asyncio.sleep(0.2)


async def watch(client: httpx.AsyncClient, tally: Tally, began: float) -> None:
    """A line of the server's own numbers every ten seconds."""
    while True:
        await asyncio.sleep(10)
        try:
            text = (await client.get("/metrics")).text
            memory = float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.M)[1])  # type: ignore[index]
            files = float(re.search(r"^process_open_fds (\S+)", text, re.M)[1])  # type: ignore[index]
        except (httpx.HTTPError, TypeError) as error:
            tally.failures[f"metrics {type(error).__name__}"] += 1
            continue
        passed, failures = time.monotonic() - began, sum(tally.failures.values())
        rate = len(tally.seconds) / passed
        numbers = f"{rate:6.1f} images/s  {memory / 1e6:6.0f} MB  {files:4.0f} files open  {failures} failures"
        print(f"{passed:5.0f} s  {numbers}", flush=True)


async def load(url: str, files: list[bytes], clients: int, seconds: float) -> Tally:
    tally, began = Tally(), time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False, limits=limits) as client:

        async def again(act: Callable[[httpx.AsyncClient, list[bytes], Tally], Awaitable[None]]) -> None:
            while time.monotonic() - began < seconds:
                await act(client, files, tally)

        watcher = asyncio.create_task(watch(client, tally, began))
        few = max(1, clients // 8)
        await asyncio.gather(*map(again, [polite] * clients + [hostile] * few + [rude] * few))
        watcher.cancel()
        health = await client.get("/health")
    print(f"at the end: {health.status_code} {health.text}")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("url")
    parser.add_argument("images", type=Path, help="a folder of JPEG and PNG files, searched through")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=180)
    arguments = parser.parse_args()
    random.seed(0)
    found = sorted(file for file in arguments.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        parser.error(f"{arguments.images}: no JPEG or PNG files")
    files = [file.read_bytes() for file in random.sample(found, min(50, len(found)))]
    try:
        httpx.get(f"{arguments.url}/health", timeout=PATIENCE, trust_env=False)
        tally = asyncio.run(load(arguments.url, files, arguments.clients, arguments.seconds))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        sys.exit(f"{arguments.url}: {error}")
    for status, number in sorted(tally.statuses.items()):
        print(f"{number:7} {status}")
    times = sorted(tally.seconds)
    for share in (0.5, 0.95, 0.99, 1.0):
        if times:
            print(f"{share:7.0%} of images within {times[round(share * (len(times) - 1))]:.2f} s")
    for failure, number in tally.failures.items():
        print(f"FAILURE {number} x {failure}")
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
