"""Progress of a long pass: a bar on a terminal that is wide enough, elsewhere a plain line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TextIO

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from pipelines.utils.output import is_terminal, say

LINE_EVERY = 10.0  # seconds
WINDOW = 30.0  # seconds that the speed is measured over
SAMPLE_EVERY = 0.1  # seconds; a pass may count a thousand images in one
# "epoch 120/120", the bar, "5004/5004", "0:12:34 left, 127:03:04 of the run".
MIN_COLUMNS = 72


class StreamConsole(Console):
    """A console as wide as the terminal behind its own stream; rich asks the descriptors 0, 1 and 2."""

    _width: int | None
    _height: int | None

    def __init__(self, stream: TextIO) -> None:
        draws = is_terminal(stream)
        super().__init__(
            file=stream,
            highlight=False,
            soft_wrap=True,
            force_terminal=draws,
            force_interactive=draws,
        )

    @property
    def size(self) -> ConsoleDimensions:
        if self._width is None:  # else COLUMNS'
            try:
                width, height = os.get_terminal_size(self.file.fileno())
            except (OSError, ValueError):  # no terminal, or no descriptor
                width = 0
            if width:
                return ConsoleDimensions(width, self._height or height)
        return super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


class ProgressBar:
    """Units done of `total`, with images/s and the time left. On stderr, unless `console` is another's.

    images: of a unit; 0 for units of another kind. done: units that were finished before.
    later: units that follow after these until the end of a run, whose time left is shown, too.
    every: seconds between two plain lines, after the first, which comes after 10 s. line: prints them.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        images: int = 1,
        done: int = 0,
        later: float | None = None,
        every: float = LINE_EVERY,
        console: Console | None = None,
        line: Callable[[str], None] = lambda text: say(text, sys.stderr),
    ) -> None:
        self._title, self._total, self._later = title, total, later
        self._images, self._done = images, done
        self._every, self._print = every, line
        self._wait, self._last_line = LINE_EVERY, 0.0  # seconds
        self._samples: deque[tuple[float, int]] = deque()  # seconds, units
        self._task = TaskID(0)
        self._bar: _TwoLines | None = None
        console = console or StreamConsole(sys.stderr)
        if console.is_terminal and console.width >= MIN_COLUMNS:
            self._bar = _TwoLines(
                TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"), console=console, transient=True, expand=True,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, completed=done, left="", info="")

    def __enter__(self) -> ProgressBar:
        self._last_line = time.perf_counter()
        self._samples.append((self._last_line, self._done))
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

    def update(
        self,
        done: int,
        size: float | None = None,
        bad: int | None = None,
        *,
        info: str = "",
        prints: bool = False,
    ) -> None:
        """Show that `done` units are finished, of `size` bytes together, `bad` of them broken; and `info`.

        prints: as a plain line at once, where there is no bar.
        """
        now = time.perf_counter()
        speed = self._speed(now, done)
        left = (self._total - done) / speed if speed else 0.0
        times = f"{format_seconds(left)} left"
        if self._later is not None:
            times += f", {format_seconds(left + self._later / max(speed, 1e-9))} of the run"
        rate = speed * self._images
        facts = [
            f"{rate:.{0 if rate >= 10 else 1}f} images/s" if self._images else "",
            "" if size is None else format_bytes(size),
            "" if bad is None else f"{bad} bad",
            info,
        ]
        if self._bar is not None:
            text = ", ".join(filter(None, facts))
            self._bar.update(self._task, completed=done, left=times, info=text)
        elif prints or now - self._last_line >= self._wait:
            self._last_line, self._wait = now, self._every
            text = ", ".join(filter(None, [facts[0], times, *facts[1:]]))
            self._print(f"{self._title}: {done}/{self._total}, {text}")

    def _speed(self, now: float, done: int) -> float:
        """Return the units per second over the last WINDOW seconds, without the first unit, which takes
        longer.
        """
        samples, is_first = self._samples, len(self._samples) == 1
        if is_first or now - samples[-1][0] >= SAMPLE_EVERY:
            samples.append((now, done))
            begins_with_first = samples[0][1] == self._done
            while len(samples) > 2 and (begins_with_first or samples[1][0] <= now - WINDOW):
                samples.popleft()
                begins_with_first = False
        then, before = samples[0]
        return (done - before) / max(now - then, 1e-9)


class _TwoLines(Progress):
    """The bar and, on a second line, everything but the times."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Text(f"  {task.fields['info']}", no_wrap=True, overflow="ellipsis")


def format_seconds(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, such as "127:03:04"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def format_bytes(size: float) -> str:
    """Return a number of bytes as text, such as "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
