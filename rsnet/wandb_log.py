"""Weights & Biases. A run that cannot reach the server goes on, offline."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from pipelines.errors import first_line

Mode = Literal["online", "offline", "disabled"]

# W&B's own default is 90 s, which a machine without a network would wait for at every start.
INIT_TIMEOUT_S = 30


class WandbLog:
    """One W&B run; does nothing if `mode` is "disabled".

    mode None: online if a key is configured, else offline; WANDB_MODE decides before that.
    run_id: the run to continue, or None.
    """

    def __init__(
        self,
        mode: Mode | None,
        directory: Path,
        project: str,
        name: str | None,
        config: Mapping[str, Any],
        run_id: str | None,
        say: Callable[[str], None],
    ) -> None:
        self._run: Any = None
        mode, reason = (mode, "--wandb") if mode else _default_mode()
        if mode == "disabled":
            say(f"W&B: disabled ({reason})")
            return
        logging.getLogger("wandb").setLevel(logging.ERROR)
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S)),
        )

        def start(mode: Mode) -> Any:
            return wandb.init(
                mode=mode,
                dir=directory,
                project=project,
                name=name or directory.name,
                config=dict(config),
                id=run_id,
                resume="allow",
                settings=settings,
            )

        if mode == "online":
            try:
                self._run = start("online")
                say(f"W&B: online at {self._run.url} ({reason})")
            except wandb.errors.Error as error:
                mode, reason = "offline", f"the server did not answer: {first_line(error)}"
        if self._run is None:
            self._run = start("offline")
            say(f"W&B: offline in {Path(self._run.dir).parent} ({reason})")
        self._run.define_metric("epoch")
        for name in ("lr", "train/*", "alpha/*", "perf/*"):
            self._run.define_metric(name, step_metric="step")
        self._run.define_metric("val/*", step_metric="epoch")

    @property
    def run_id(self) -> str | None:
        return self._run.id if self._run else None

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Metrics with their "step" and "epoch"; the axes are chosen by `define_metric`."""
        if self._run:
            self._run.log(dict(metrics))

    def log_results(self, columns: list[str | int], rows: list[list[Any]], plot: Path) -> None:
        """The final table and the plot."""
        if self._run:
            table = wandb.Table(columns=columns, data=rows)
            self._run.log({"results": table, "accuracy_flops": wandb.Image(str(plot))})

    def finish(self, failed: bool = False) -> None:
        if self._run:
            self._run.finish(exit_code=int(failed))
            self._run = None


def _default_mode() -> tuple[Mode, str]:
    modes: tuple[Mode, ...] = ("online", "offline", "disabled")
    for mode in modes:
        if os.environ.get("WANDB_MODE") == mode:
            return mode, "WANDB_MODE"
    try:
        if wandb.login(prompt=False, verify=False):
            return "online", "a key is configured"
    except wandb.errors.Error as error:
        return "offline", f"the key is not usable: {first_line(error)}"
    return "offline", "no key is configured"
