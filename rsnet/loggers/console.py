"""Messages and progress of a run on stdout, and the messages in the run's own log."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipelines.utils.output import lost_output
from pipelines.utils.progress import ProgressBar, StreamConsole
from pipelines.utils.text import printable

LINE_EVERY = 60.0  # seconds; the logged steps have lines of their own


class ConsoleLogger:
    """Progress on a terminal as a bar, elsewhere as plain lines; silent if not `active`.

    log: takes the messages, too.
    """

    def __init__(self, active: bool) -> None:
        self.log: Callable[[str], None] = lambda _: None
        self._active, self._is_lost = active, False
        self._console = StreamConsole(sys.stdout)
        self._bar: ProgressBar | None = None

    def say(self, text: str) -> None:
        """Print and log a line, above the bar if there is one."""
        self.say_table(printable(text))

    def say_table(self, text: str) -> None:
        """Print and log lines whose cells are printable."""
        if self._active:
            self.log(text)
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)
        if not self._is_lost and (error := lost_output()):
            self._is_lost = True
            self.log(f"stdout is lost ({error.strerror}): the training goes on without")

    def start(
        self, title: str, total: int, *, images: int, done: int = 0, later: float | None = None
    ) -> None:
        """Begin a phase of `total` units; see `ProgressBar`."""
        self.stop()
        if self._active:
            self._bar = ProgressBar(
                title, total, images=images, done=done, later=later, every=LINE_EVERY,
                console=self._console, line=self._print,
            )  # fmt: skip
            self._bar.__enter__()

    def update(self, done: int, info: str = "", prints: bool = False) -> None:
        """Show that `done` units are finished; `prints`: as a plain line at once where there is no bar."""
        if self._bar is not None:
            self._bar.update(done, info=info, prints=prints)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
