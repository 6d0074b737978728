"""Weights & Biases. A run that cannot reach the server logs offline; one that loses W&B continues without.

metrics.jsonl has all that W&B is sent, so that `rsnet sync` can complete the W&B run, whatever happened.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import wandb

from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.errors import first_line
from pipelines.utils.schema import NOTHING, TEXT, integer, parsing, require_fields
from rsnet.loggers import wandb_service
from rsnet.loggers.wandb_service import SERVICE_TIMEOUT_S, Console, Mode, within


@dataclass(frozen=True)
class Sent:
    """RUN/wandb.json: which W&B run it is, and how many lines of metrics.jsonl are there for sure."""

    id: str
    entity: str | None
    lines: int


_SENT = {"id": TEXT, "entity": TEXT | NOTHING, "lines": integer(0)}


class WandbLogger:
    """One W&B run; does nothing if `mode` is "disabled".

    mode None: WANDB_MODE's, else online. Without a key, or a server that takes the run, it is offline.
    directory: the run directory.
    run_id: the run to continue, or None. entity, tags: None and () for the environment's.
    remedy: how to recover data that W&B did not receive, for messages. Unset: `rsnet sync`, which reads a
    run's metrics.

    Raises UsageError if an environment variable of W&B, the project, the entity or a tag has a value that is
    none.

    No failure of W&B ends a training, or holds it up beyond the limits of `wandb_service`. The first is said
    in one line, and W&B is left alone from then on.
    """

    def __init__(
        self,
        mode: Mode | None,
        directory: Path,
        *,
        project: str,
        name: str | None,
        config: Mapping[str, Any],
        run_id: str | None,
        say: Callable[[str], None],
        entity: str | None = None,
        tags: Sequence[str] = (),
        remedy: str | None = None,
    ) -> None:
        self.run_id = run_id
        self._run: Any = None
        self._is_whole = False
        self._directory, self._say = directory, say
        command = shlex.join(["python", "-m", "rsnet", "sync", str(directory)])
        self._remedy = remedy or f"`{command}` sends the metrics later"
        if mode != "disabled":
            self._console = Console(mode)
            wandb_service.require_names(project, entity, tags)
        mode, reason = wandb_service.choose_mode(mode)
        if mode == "disabled":
            say(f"W&B: disabled ({reason})")
            return

        start = partial(
            wandb_service.start, directory=directory, project=project, name=name or directory.name,
            config=config, run_id=run_id, resume="allow", entity=entity, tags=tags,
        )  # fmt: skip
        try:
            if mode == "online":
                try:
                    self._run = start("online")
                except wandb.errors.Error as error:
                    mode, reason = "offline", f"no run online: {first_line(error)}"
            self._run = self._run or start("offline")
            self.run_id = self._run.id
            self._is_whole = self._begin(run_id) and mode == "online"
        except Exception as error:
            self._leave(first_line(error))
            return
        self._console.warnings.clear()
        self._say_where(mode, reason)

    def _say_where(self, mode: Mode, reason: str) -> None:
        """Say where the W&B run is, and how to complete it if it lacks metrics."""
        if mode == "offline":
            # run.dir is DIR/wandb/NAME/files.
            folder = self._directory.joinpath(*Path(self._run.dir).parts[-3:-1])
            self._say(f"W&B: offline in {folder} ({reason}); {self._remedy}")
            return
        lacks = "" if self._is_whole else f", without earlier lines; {self._remedy}"
        self._say(f"W&B: online at {self._run.url} ({reason}){lacks}")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics with their "step" and "epoch"; the axes are chosen by `define_metric`."""
        self._do(lambda: self._run.log(dict(metrics)), SERVICE_TIMEOUT_S)

    def log_results(
        self, columns: list[str | int], rows: list[list[Any]], plot: Path | None
    ) -> None:
        """Log the final table and the plot, if there is one."""
        self._do(
            lambda: wandb_service.log_results(self._run, columns, rows, plot),
            wandb_service.finish_timeout(),  # a table asks the server
        )

    def log_profile(self, figures: Mapping[str, Any], plot: Path, files: Sequence[Path]) -> None:
        """Log what a profile measured, its plot, and the files that have more; all in the run's directory."""
        self._do(
            lambda: wandb_service.log_profile(self._run, figures, plot, files), SERVICE_TIMEOUT_S
        )

    def finish(self, failed: bool = False) -> None:
        """End the W&B run and its service, so that the end of the process waits for neither."""

        def end() -> None:
            wandb_service.finish(self._run, self._console, failed)
            if self._is_whole:
                self._note(count_lines(self._directory))

        self._do(end, wandb_service.finish_timeout() + SERVICE_TIMEOUT_S)
        self._run = None

    def _begin(self, run_id: str | None) -> bool:
        """Write down which W&B run it is; return whether that has all lines up to now."""
        lines = count_lines(self._directory)
        sent = read_sent(self._directory) if run_id else None
        has_all = lines == (sent.lines if sent else 0)
        if sent and lines == 0:  # W&B has none, either, unless they are abandoned
            has_all = not (self._directory / "metrics.abandoned.jsonl").exists()
        self._note(lines if has_all else 0)
        return has_all

    def _note(self, lines: int) -> None:
        write_sent(self._directory, Sent(self._run.id, self._run.entity or None, lines))

    def _do(self, action: Callable[[], None], limit: float) -> None:
        if self._run:
            try:
                within(limit, action)
            except Exception as error:
                self._leave(first_line(error))

    def _leave(self, reason: str) -> None:
        self._say(f"W&B: lost ({reason.rstrip('.')}); {self._remedy}")
        wandb_service.let_go(self._run)
        self._run = None


def count_lines(directory: Path) -> int:
    """Return the number of lines of metrics."""
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_sent(directory: Path) -> Sent | None:
    """Read what W&B has of a run directory; None if W&B was never told of the run."""
    path, remedy = directory / "wandb.json", "without it, the run becomes a new W&B run"
    if not path.exists():
        return None
    with parsing(path, remedy):
        sent = json.loads(path.read_bytes())
        require_fields(sent, _SENT)
        return Sent(**sent)


def known_run_id(directory: Path) -> str | None:
    """Return the W&B run of a run directory, as `rsnet sync` may have made it; None if there is none."""
    sent = read_sent(directory)
    return None if sent is None else sent.id


def write_sent(directory: Path, sent: Sent) -> None:
    """Write down what W&B has of a run directory."""
    atomic_write_json(directory / "wandb.json", asdict(sent))
