"""How a server keeps its deadline under load: each fixed size, and the controller, at several rates.

    python -m benchmarks.serve_load --release release --data demo/data/val --deadline-ms 150

Requests come at random times (Poisson), whether or not there were answers, and carry labelled images. Their
latency counts from the time at which they were due, at the client. The rates are multiples of what the
largest size is measured to compute in full batches. In each round all take turns at every rate, in random
order; client and server share the machine. Prints a table. On few cores, set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from benchmarks.options import command
from pipelines.utils.errors import RunError, error_context
from rsnet.inference.calibration import find_labelled_images
from rsnet.release.source import open_source

Images = list[tuple[bytes, str]]

CONTROLLER = "controller"


@dataclass(frozen=True)
class Options:
    release: Path
    """Folder that `rsnet release` wrote."""

    data: Path
    """Labelled images: a folder for each class."""

    deadline_ms: float = 150.0
    """What 99 of 100 answers may take."""

    loads: tuple[float, ...] = (0.3, 0.8, 1.2, 1.6)
    """Requests a second, as multiples of what the largest size can answer."""

    seconds: float = 10.0
    """Duration of each turn."""

    rounds: int = 2
    """Turns of each."""

    batch_size: int = 8
    """Of the server."""


@dataclass
class Outcome:
    """The outcome of the requests of one kind at one rate."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # ms, of those that were answered
    sizes: Counter[int] = field(default_factory=Counter)
    correct: int = 0
    refused: int = 0

    @property
    def answered(self) -> int:
        return len(self.latencies)

    def percentile(self, percent: float) -> float:
        return sorted(self.latencies)[math.ceil(percent / 100 * self.answered) - 1]

    def row(self, deadline_ms: float) -> str:
        late = sum(ms > deadline_ms for ms in self.latencies)
        sent = self.answered + self.refused
        mix = ", ".join(
            f"{s}: {100 * n / self.answered:.0f} %" for s, n in self.sizes.most_common()
        )
        cells = (
            f"{self.percentile(50):.0f}",
            f"{self.percentile(99):.0f}",
            f"{100 * late / self.answered:.1f}",
            f"{self.answered / self.seconds:.0f}",
            f"{100 * self.refused / sent:.1f}",
            f"{100 * self.correct / self.answered:.1f}",
            mix,
        )
        return " | ".join(cells)


@contextmanager
def serving(o: Options, *more: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    words = [sys.executable, "-m", "rsnet", "serve", str(o.release), "--port", "0"]
    words += ["--batch-size", str(o.batch_size), *more]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = re.search(r"\S+://\S+", process.stdout.readline())
            if address is None:
                raise RunError("rsnet serve did not start")
            yield address[0]
        finally:
            process.terminate()


async def post(url: str, size: int | None, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON. By hand: with httpx's pool, runs ended in read errors whose cause is not known."""
    query = "" if size is None else f"?size={size}"
    host, port = urlsplit(url).hostname, urlsplit(url).port
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        f"POST /classify{query} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), json.loads(body)


async def load(url: str, size: int | None, rate: float, o: Options, images: Images) -> Outcome:
    """One turn: requests at `rate` a second for `o.seconds`, all of whose answers are waited for."""
    outcome = Outcome(seconds=o.seconds)

    async def ask(due: float) -> None:
        data, label = random.choice(images)
        status, content = await post(url, size, data)
        if status == 503:
            outcome.refused += 1
            return
        if status != 200:
            raise RuntimeError(f"the server says {status}: {content}")
        outcome.latencies.append(1000 * (time.perf_counter() - due))
        outcome.sizes[content["size"]] += 1
        outcome.correct += content["top"][0]["class"] == label

    async with asyncio.TaskGroup() as tasks:
        due = start = time.perf_counter()
        while (due := due + random.expovariate(rate)) < start + o.seconds:
            await asyncio.sleep(due - time.perf_counter())
            tasks.create_task(ask(due))
    return outcome


def labelled_images(o: Options) -> Images:
    """Raises UsageError if there is no such release, or the images are not of its classes."""
    with error_context("--release"):
        network = open_source(o.release).network.to_dict()
    folder = find_labelled_images(o.data, network)
    found = zip(folder.paths, folder.names, strict=True)
    return [(Path(path).read_bytes(), name.split("/")[0]) for path, name in found]


def measure(o: Options) -> str:
    """The table."""
    images = labelled_images(o)
    with serving(o) as plain, serving(o, "--deadline-ms", str(o.deadline_ms)) as controlled:
        with build_opener(ProxyHandler({})).open(f"{plain}info") as answer:
            info = json.load(answer)
        sizes: list[int] = info["sizes"]
        capacity = 1000 * o.batch_size / info["latency"]["ms"][str(sizes[0])]["median"]
        found: dict[tuple[float, str], Outcome] = {}
        for _ in range(o.rounds):
            for share in o.loads:
                for name in random.sample([CONTROLLER, *map(str, sizes)], len(sizes) + 1):
                    url = controlled if name == CONTROLLER else plain
                    size = None if name == CONTROLLER else int(name)
                    turn = asyncio.run(load(url, size, share * capacity, o, images))
                    whole = found.setdefault((share, name), Outcome())
                    whole.seconds += turn.seconds
                    whole.latencies += turn.latencies
                    whole.sizes += turn.sizes
                    whole.correct += turn.correct
                    whole.refused += turn.refused
                    print(f"{share} x, {name}", file=sys.stderr, flush=True)
    lines = [
        f"| load | requests/s | size | p50, ms | p99, ms | later than {o.deadline_ms:g} ms, % "
        "| answers/s | refused, % | top-1, % | sizes |",
        "|---" * 10 + "|",
    ]
    for share in o.loads:
        for name in [*map(str, sizes), CONTROLLER]:
            row = found[share, name].row(o.deadline_ms)
            lines.append(f"| {share:g} | {share * capacity:.0f} | {name} | {row} |")
    return "\n".join(lines)


def run(o: Options) -> int:
    random.seed(0)
    print(measure(o))
    return 0


if __name__ == "__main__":
    sys.exit(command("serve_load", Options, run))
