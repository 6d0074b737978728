"""`--profile-sweep`: other values of some options, one option after the other, keeping what is faster."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.utils.errors import DataError, RunError, UsageError, first_line
from pipelines.utils.memory import is_out_of_gpu_memory
from rsnet.config.resolve import ResolvedConfig
from rsnet.profiler.report import images_per_s
from rsnet.profiler.step_profiler import OutOfTimeError, Profile

TRIED = ("workers", "prefetch", "decoder-hw-load", "batch-size")
GAIN = 1.02  # less is the spread of short measurements, and not worth another command
# Doublings of the batch: memory ends them on a GPU. On a CPU the system would end the process.
DOUBLINGS = {"cuda": 8, "cpu": 2}

Measure = Callable[[ResolvedConfig, Any, float], Profile]


@dataclass(frozen=True)
class Trial:
    """One value of one option, and what it is worth; the first one is the command as given."""

    option: str
    value: Any
    config: ResolvedConfig
    options: Any
    found: Profile | None = None
    failure: str = ""  # why nothing was found
    kept: bool = False

    @property
    def speed(self) -> float:
        """Images/s of loader and computation together."""
        return images_per_s(self.found)["end_to_end"] if self.found else 0.0

    @property
    def label(self) -> str:
        if self.option == "batch-size":
            return f"--batch-size {self.value} --accumulate {self.config.accumulate}"
        return f"--{self.option} {self.value}" if self.option else "as given"

    def row(self) -> str:
        """Return the line for the console, in the columns of `HEADER`."""
        if self.found is None:
            return f"{self.label:34}{self.failure}"
        speeds = "".join(f"{speed:13.0f}" for speed in images_per_s(self.found).values())
        return f"{self.label:34}{speeds}{'  kept' if self.kept else ''}"


# Columns of fixed width, because each line is printed when it is measured.
HEADER = f"{'img/s':34}{'loader':>13}{'computation':>13}{'together':>13}"


class Sweep:
    """Raises one option after the other as long as it gets faster, or else lowers it.

    given: the command as it is, measured. again: the configuration with other batches. measure: the
    profile of a configuration, by a moment of `time.perf_counter`, or OutOfTimeError.
    """

    def __init__(
        self,
        given: Trial,
        again: Callable[..., ResolvedConfig],
        measure: Measure,
        say: Callable[[str], None],
    ) -> None:
        self.given = self.best = given
        self.trials = [given]
        self.not_tried: list[str] = []  # for lack of time
        self._again, self._measure, self._say = again, measure, say
        self._deadline = math.inf  # of `time.perf_counter`

    def run(self, names: list[str], device_type: str, cores: int, limit: float) -> None:
        """Try values of the options of these names, for `limit` seconds."""
        self._deadline = time.perf_counter() + limit
        self._say(HEADER)
        self._say(self.given.row())
        for name in names:
            before = self.best
            for values in _candidates(name, self._value(name), device_type, cores):
                self._try_in_order(name, values)
                if self.best is not before:
                    break

    def _try_in_order(self, name: str, values: list[Any]) -> None:
        """Try these, in order, until one is not faster."""
        for value in values:
            try:
                trial = self._try(name, value)
            except OutOfTimeError:
                self.not_tried.append(f"--{name} {value}")
                return
            self.trials.append(trial)
            self._say(trial.row())
            if not trial.kept:
                return
            self.best = trial

    def _try(self, name: str, value: Any) -> Trial:
        trial = Trial(name, value, *self._with(name, value))
        try:
            if time.perf_counter() > self._deadline:
                raise OutOfTimeError
            found = self._measure(trial.config, trial.options, self._deadline)
        except (UsageError, DataError, RunError) as error:  # such as of too few images
            return dataclasses.replace(trial, failure=first_line(error))
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error):
                raise
            return dataclasses.replace(trial, failure="out of memory")
        trial = dataclasses.replace(trial, found=found)
        return dataclasses.replace(trial, kept=trial.speed > GAIN * self.best.speed)

    def _value(self, name: str) -> Any:
        """Return the option's value in the best trial so far."""
        holder = self.best.config if name == "batch-size" else self.best.options
        return getattr(holder, name.replace("-", "_"))

    def _with(self, name: str, value: Any) -> tuple[ResolvedConfig, Any]:
        """Return the best so far with another value. An update keeps its images, as far as it can."""
        if name == "batch-size":
            images = self.given.config.global_batch(world_size=1)
            accumulate = max(1, images // value)
            return self._again(batch_size=value, accumulate=accumulate), self.best.options
        changed = {name.replace("-", "_"): value}
        return self.best.config, dataclasses.replace(self.best.options, **changed)


def names_of(text: str | None, options: Any, world_size: int) -> list[str]:
    """Return the options that --profile-sweep names. Raises UsageError for what cannot be tried."""
    if text is None:
        return []
    if world_size > 1:
        raise UsageError(
            f"--profile-sweep {text}: it tries one process alone; start it without torchrun"
        )
    names = [name.strip() for name in text.split(",")]
    can = [n for n in TRIED if n == "batch-size" or hasattr(options, n.replace("-", "_"))]
    for name in names:
        if name not in can:
            raise UsageError(f"--profile-sweep {text}: {name!r} is none of {', '.join(can)}")
    return names


def other_recipe(given: ResolvedConfig, best: ResolvedConfig) -> str:
    """Return a note on what another number of images per update changes; "" if it is the same."""
    before, now = given.global_batch(world_size=1), best.global_batch(world_size=1)
    if before == now:
        return ""
    fields = (f.name for f in dataclasses.fields(given))
    changed = [
        f"--{name.replace('_', '-')} {getattr(best, name)} instead of {getattr(given, name)}"
        for name in fields
        if name not in ("batch_size", "accumulate") and getattr(best, name) != getattr(given, name)
    ]
    what = ", ".join([f"{now} images an update instead of {before}", *changed])
    return f"this changes the recipe: {what}; without batch-size in --profile-sweep, all stays"


def as_json(sweep: Sweep, command: str) -> dict[str, Any]:
    """Return all trials, and the command of the best."""
    return {
        "trials": [
            {
                "option": t.option or None,
                "value": t.value,
                "batch_size": t.config.batch_size,
                "accumulate": t.config.accumulate,
                "images_per_s": images_per_s(t.found) if t.found else None,
                "failure": t.failure or None,
                "kept": t.kept,
            }
            for t in sweep.trials
        ],
        "not_tried": sweep.not_tried,
        "command": command,
    }


def _candidates(name: str, value: Any, device_type: str, cores: int) -> tuple[list[Any], list[Any]]:
    """Return values above the present one, ascending, and below it, descending."""
    if name == "batch-size":
        up = [value << n for n in range(1, DOUBLINGS[device_type] + 1)]
        return up, [half for half in (value >> 1, value >> 2) if half >= 2]  # BatchNorm's least
    steps: dict[str, list[Any]] = {
        "workers": [*(2**n for n in range(cores.bit_length()) if 2**n < cores), cores],
        "prefetch": [1, 2, 4, 8],
        "decoder-hw-load": [0.0, 0.25, 0.5, 0.75, 1.0],
    }
    above = [step for step in steps[name] if step > value]
    return above, [step for step in reversed(steps[name]) if step < value]
