"""W&B's service, a process of its own: started, told and ended, with a limit to how long each takes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from pydantic import ValidationError

from pipelines.utils.errors import UsageError, first_line
from pipelines.utils.text import printable

Mode = Literal["online", "offline", "disabled"]
Table = tuple[list[str | int], list[list[Any]], Path]  # columns, rows; the plot, a PNG

# W&B's own default is 90 s, which a machine without a network would wait for at every start.
INIT_TIMEOUT_S = 30
# W&B's own default is to try for 7 days. What is left at the end is some lines of 1 kB and a plot.
FINISH_TIMEOUT_S = 15
# The service takes a line in 1 ms: one this late has stopped. The limits above are its own to keep.
SERVICE_TIMEOUT_S = 10


class Console:
    """Receives what W&B would print, and keeps the warnings, the only sign of data that it dropped.

    mode: instead of WANDB_MODE. Raises UsageError for a value in the environment that W&B does not take.
    """

    def __init__(self, mode: Mode | None = None) -> None:
        # Reports of W&B's own errors: a process lives 12 s longer if the server does not answer them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        logging.getLogger("wandb").setLevel(logging.ERROR)
        self.warnings: list[str] = []
        init_timeout(), finish_timeout()
        try:
            settings = wandb.Settings(silent=True)
            if mode is not None:
                settings.mode = mode
            wandb.termsetup(wandb.setup(settings).settings, self)
        except _REFUSALS as error:
            raise UsageError(f"{_wrong_variable()}: W&B does not take it: {_why(error)}") from None

    def info(self, msg: str) -> None:
        pass

    def warning(self, msg: str) -> None:
        if "already exists with the same content" not in msg:  # a table that is sent again
            self.warnings.append(msg.split("WARNING ")[-1].split(". ")[0])  # the rest is advice

    error = warning


# What W&B raises for a setting: by its type, and by its characters.
_REFUSALS = (ValidationError, wandb.errors.UsageError)


def _wrong_variable() -> str:
    """Return the variable of the environment that W&B refuses, and its value.

    Its errors name a setting, WANDB_TAGS' is `run_tags`, or none.
    """
    for name, value in os.environ.items():
        if name.startswith("WANDB_"):
            try:
                wandb.Settings().update_from_env_vars({name: value})
            except _REFUSALS:
                return f"{name} {value}"
    return "a file of W&B's settings"


def _why(error: Exception) -> str:
    return error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)


def require_names(project: str, entity: str | None, tags: Sequence[str]) -> None:
    """Raise UsageError for a name of a project or entity, or a tag, that W&B does not take."""
    if wrong := set(entity or "") & set("/\\#?%: "):  # of which W&B would make another address
        raise UsageError(
            f"--wandb-entity {entity}: no name of a W&B team or user has a {min(wrong)!r}"
        )
    given: list[tuple[str, str, dict[str, Any]]] = [("project", project, {"project": project})]
    given += [("tags", tag, {"run_tags": (tag,)}) for tag in tags]
    for option, value, settings in given:
        try:
            wandb.Settings(**settings)
        except _REFUSALS as error:
            raise UsageError(
                f"--wandb-{option} {value}: W&B does not take it: {_why(error)}"
            ) from None


def choose_mode(asked: Mode | None) -> tuple[Mode, str]:
    """Return the mode that is asked for, or WANDB_MODE's, else online; offline without a key; and why."""
    variable = os.environ.get("WANDB_MODE", "")
    mode = asked or _MODES.get(variable, "online")
    reason = "WANDB_MODE" if variable in _MODES else "a key is configured"
    if asked is not None:
        reason = "--wandb"
    if mode != "online":
        return mode, reason
    try:
        if wandb.login(prompt=False, verify=False):
            return "online", reason
    except wandb.errors.Error as error:
        return "offline", f"the key is not usable: {first_line(error)}"
    return "offline", "no key is configured"


# dryrun and run are older names of the two.
_MODES: dict[str, Mode] = {
    "online": "online", "run": "online", "offline": "offline", "dryrun": "offline",
    "disabled": "disabled",
}  # fmt: skip


def start(
    mode: Mode,
    directory: Path,
    *,
    project: str,
    name: str,
    config: Mapping[str, Any],
    run_id: str | None,
    resume: Literal["allow"] | None,
    entity: str | None = None,
    tags: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """Start a W&B run; one that exists under the id is continued or, with resume None, replaced."""
    timeouts = {
        "init_timeout": init_timeout(),
        "finish_timeout": finish_timeout(),
    }
    words, sys.argv = sys.argv, [printable(word) for word in sys.argv]  # W&B stores them
    try:
        run = wandb.init(
            mode=mode,
            dir=_text_path(directory),
            project=project,
            name=printable(name),
            config={key: _plain(value) for key, value in config.items()},
            id=run_id,
            resume=resume,
            entity=entity,
            tags=[printable(tag) for tag in tags] or None,
            settings=wandb.Settings(
                silent=True, console="off", finish_timeout_raises=True, **timeouts | settings
            ),
        )
    finally:
        sys.argv = words
    run.define_metric("epoch")
    for metric in ("lr", "train/*", "alpha/*", "perf/*"):
        run.define_metric(metric, step_metric="step")
    run.define_metric("val/*", step_metric="epoch")
    return run


def _plain(value: Any) -> Any:
    """Return an option's value without bytes that are no text, which W&B does not take."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _text_path(directory: Path) -> Path:
    """Return the folder, by another name if its own is no text, which W&B does not take."""
    try:
        str(directory).encode()
        return directory
    except UnicodeEncodeError:
        _links.append(tempfile.TemporaryDirectory())
        link = Path(_links[-1].name, "run")
        link.symlink_to(directory.absolute())
        return link


_links: list[tempfile.TemporaryDirectory[str]] = []  # until the end of the process


def log_results(
    run: Any, columns: list[str | int], rows: list[list[Any]], plot: Path | None
) -> None:
    """Log the final table and the plot, which goes by its file's name, if there is one."""
    plots = {} if plot is None else {plot.stem: wandb.Image(str(plot))}
    run.log({"results": wandb.Table(columns=columns, data=rows), **plots})


def log_profile(run: Any, figures: Mapping[str, Any], plot: Path, files: Sequence[Path]) -> None:
    """Log one line of metrics, which W&B also takes for the run's summary; the plot and the files."""
    run.log({**figures, "profile/plot": wandb.Image(str(plot))})
    for file in files:
        # W&B warns of links, and the next profile overwrites what they lead to. Without the mode, which some
        # file systems do not let us set.
        copy = shutil.copyfile(file, Path(run.dir, file.name))
        run.save(copy, base_path=run.dir, policy="now", glob=False)


def init_timeout() -> float:
    """Return the seconds that the start of a run may take."""
    return _seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S)


def finish_timeout() -> float:
    """Return the seconds that the end of a run may take."""
    return _seconds("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT_S)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < threading.TIMEOUT_MAX / 2:
        raise UsageError(f"{name} {text}: must be a positive number of seconds")
    return seconds


def finish(run: Any, console: Console, failed: bool) -> None:
    """End the run and the service. Raises if not everything was sent."""
    run.finish(exit_code=int(failed))
    if console.warnings:
        raise RuntimeError(console.warnings[0])
    wandb.teardown()


def let_go(run: Any) -> None:
    """Leave the service, and the run if there is one, alone; it finishes its work in the background.

    The end of the process has hooks of W&B, which wait for a service that has stopped, and fail with a
    traceback if it died: they are taken out, after the run's threads, which fail without them.
    """
    for end in ([run.finish] if run else []) + [wandb.teardown]:
        with contextlib.suppress(Exception):
            within(1, end)


def within(limit: float, action: Callable[[], object]) -> None:
    """Raise what `action` does, as a RuntimeError, or TimeoutError if it takes more than `limit` seconds.

    Which error a service that died leaves is a matter of the moment: of the socket (reset, closed, broken
    pipe), or of the queue of answers. All are said in the same words.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # wandb.teardown() exits if its service failed
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {limit:g} s")
    if errors:
        error = errors[0]
        is_gone = (
            isinstance(error, ConnectionError) or "wandb.sdk.mailbox" in type(error).__module__
        )
        raise RuntimeError("its service has ended" if is_gone else first_line(error)) from error
