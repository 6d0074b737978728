"""Progress of a pass over many images, on stderr: a bar on a terminal, else a plain line every 10 s."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pipelines.utils.output import is_terminal, say

LINE_EVERY = 10.0  # seconds


class ProgressBar:
    """Images done of `total`, with images/s, time left, bytes and number of bad images."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._started = self._last_line = 0.0  # seconds, set on entry
        self._task = TaskID(0)
        self._bar: Progress | None = None
        if is_terminal(sys.stderr):
            console = Console(file=sys.stderr, force_terminal=True, force_interactive=True)
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[info]}", markup=False), console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, info="")

    def __enter__(self) -> ProgressBar:
        self._started = self._last_line = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, size: int, bad: int) -> None:
        """Show that `done` images of `size` bytes together are finished, `bad` of them broken."""
        now = time.perf_counter()
        speed = done / max(now - self._started, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self._total - done) / max(speed, 1e-9)))
        info = f"{speed:.0f} images/s, {left} left, {format_bytes(size)}, {bad} bad"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, info=info)
        elif now - self._last_line >= LINE_EVERY:
            self._last_line = now
            say(f"{self._title}: {done}/{self._total}, {info}", sys.stderr)


def format_bytes(size: float) -> str:
    """Return a number of bytes as text, such as "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
