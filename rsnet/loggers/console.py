"""Messages and progress of a run on stdout, and the messages in the run's own log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipelines.utils.output import is_terminal, lost_output
from pipelines.utils.text import printable


class ConsoleLogger:
    """Progress on a terminal as a bar, elsewhere as plain lines; silent if not `active`.

    log: takes the messages, too.
    """

    def __init__(self, active: bool) -> None:
        self.log: Callable[[str], None] = lambda _: None
        self._active, self._is_lost = active, False
        self._draws = is_terminal(sys.stdout)
        self._console = Console(
            file=sys.stdout,
            highlight=False,
            soft_wrap=True,
            force_terminal=self._draws,
            force_interactive=self._draws,
        )
        self._bar: Progress | None = None
        self._task: Any = None
        self._title, self._total = "", 0
        self._started = 0.0
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print and log a line, above the bar if there is one."""
        self.say_table(printable(text))

    def say_table(self, text: str) -> None:
        """Print and log lines whose cells are printable."""
        if self._active:
            self.log(text)
            self._print(text)

    def _print(self, text: str) -> None:
        if not self._active:
            return
        self._console.print(text, markup=False)
        if not self._is_lost and (error := lost_output()):
            self._is_lost = True
            self.log(f"stdout is lost ({error.strerror}): the training goes on without")

    def start(self, title: str, total: int) -> None:
        """Begin a phase of `total` units."""
        self.stop()
        self._title, self._total = title, total
        self._started = self._last_line = time.perf_counter()
        if self._active and self._draws:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[info]}", markup=False),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, info="")
            self._bar.start()

    def update(self, done: int, info: str, every: float = 0.0) -> None:
        """Show that `done` units are finished; with `every`, as a plain line each so many seconds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, info=info)
            return
        now = time.perf_counter()
        if every and (now - self._last_line < every or done == self._total):
            return
        self._last_line = now
        left = (now - self._started) / done * (self._total - done)
        self._print(
            "  ".join(
                filter(
                    None, (f"{self._title} {done}/{self._total}", info, f"eta {_duration(left)}")
                )
            )
        )

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{secs:02}"
