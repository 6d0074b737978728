"""Resuming a run: which options may differ, the place in the data, and the state in a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.utils.errors import DataError, UsageError, error_context
from pipelines.utils.location import Url, location, url_of
from pipelines.utils.schema import read_json
from rsnet.checkpoint.authors_pytorch import assumed_sizes
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.manager import CheckpointManager
from rsnet.checkpoint.remote import RemoteRun, fetch_newest, require_of_run
from rsnet.config.model_config import FULL
from rsnet.config.recipes import by_new_names
from rsnet.config.resolve import ResolvedConfig, output_directory
from rsnet.config.run_topics import DEFAULT_KEEP
from rsnet.config.topics import DEFAULT_ARCH
from rsnet.config.train_config import TrainConfig, require_options, to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.loggers.run_dir import COMMANDS, is_last_typed, was_typed_last
from rsnet.release.source import open_source

# Options that do not change what is computed; batch_size and accumulate only by their product.
ASIDE = {
    "accumulate", "allow_change", "batch_size", "checkpoint_every", "compile", "cuda_graphs", "data",
    "device", "evaluate", "fused_bn", "keep", "log_interval", "num_classes", "on_nonfinite",
    "on_save_error", "output", "profile", "profile_limit", "profile_steps", "profile_sweep", "recompute",
    "resume", "tensorboard", "timeout", "val_data", "val_interval", "wandb", "wandb_entity", "wandb_name",
    "wandb_project", "wandb_tags",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """State that a training begins with: nothing, a checkpoint, or a run that is continued."""

    source: Path | None = None
    """File of the checkpoint."""

    checkpoint: Checkpoint | None = None
    """Content of that file."""

    continues: bool = False
    """Whether the run in the run directory is continued; otherwise a new one begins."""

    config: dict[str, Any] = field(default_factory=dict)
    """Options of the run in the run directory."""

    noted_batch: int | None = None
    """Images of an update of that run; None if that is not known."""

    must_be_same: bool = False
    """Whether it is continued without --resume, which needs the same options."""

    adopted: Sequence[str] = ()
    """Options that the command leaves out and that run has, where they are not the usual ones."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the training that goes on: the checkpoint's, or of the run."""
        return self.checkpoint.config if self.checkpoint else self.config

    @property
    def global_batch(self) -> int | None:
        """Images of an update of that training; None if there was none, or that is not known."""
        return self.checkpoint.global_batch if self.checkpoint else self.noted_batch

    def require_same(self, given: TrainConfig, config: ResolvedConfig, global_batch: int) -> None:
        """Raise UsageError if a run is continued without --resume and its options differ, or with --resume
        and --pretrained names weights that it did not start from.

        given: what `config` was resolved from.
        """
        if not self.must_be_same:
            self._require_own_weights(given)
            return
        plain = to_plain_dict(config)
        # Without --resume, unset --qw and --qa mean full precision, not the checkpoint's bits.
        plain |= {name: FULL for name in ("qw", "qa") if getattr(given, name) is None}
        changed = changes(self.config, plain)
        before = self.checkpoint.global_batch if self.checkpoint else global_batch
        if before != global_batch:
            changed.append(f"global batch {before} -> {global_batch}")
        if changed:
            flag = "--output: " if given.output else ""
            raise UsageError(
                f"{flag}{config.output} already holds a run with other options ({', '.join(changed)}); "
                "resume it with --resume auto, or choose another --output"
            )

    def moved_data(self, config: ResolvedConfig) -> list[str]:
        """Return where images lie now, and where before, if a run is continued without --resume."""
        if not self.must_be_same:
            return []
        moved = []
        for name in ("data", "val_data"):
            before, now = self.config.get(name), getattr(config, name)
            if before is not None and now is not None and _place(before) != _place(now):
                moved.append(f"--{name.replace('_', '-')} {before} -> {now}")
        return moved

    def require_unfinished(self, config: ResolvedConfig) -> str:
        """Return a message if the same command has finished already; else "".

        Raises UsageError if there is nothing left to train, and the command asks for something else.
        """
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.epoch < config.epochs:
            return ""
        other = [*changes(checkpoint.config, to_plain_dict(config)), *self.adopted]
        where = config.output if self.continues else self.source
        line = (
            f"{where}: already finished after {checkpoint.epoch} epochs: raise --epochs, with --resume "
            "auto, or give another --output"
        )
        if self.continues and checkpoint.config and not other:
            return line
        raise UsageError(f"{line} ({', '.join(other)})" if other else line)

    def _require_own_weights(self, given: TrainConfig) -> None:
        if self.checkpoint is None or given.evaluate:
            return
        if given.pretrained not in (None, self.checkpoint.config.get("pretrained")):
            raise UsageError(
                f"--pretrained {given.pretrained}: --resume goes on with the weights in {self.source}; "
                "leave out one of the two"
            )


def require_same_data(
    given: TrainConfig, config: ResolvedConfig, start: Start, say: Callable[[str], None]
) -> None:
    """Say that a run is continued, without --resume, on images of another place than before.

    Raises UsageError if its folder was not named either: folders of images that are called alike have the
    same one by default, and images of the same names are taken for the same. Nodes may have their images in
    different places, and take turns in being the first.
    """
    moved = distributed.all_gather_object(start.moved_data(config))
    if not all(moved):
        return
    changed = ", ".join(moved[0])
    if given.output is None:
        raise UsageError(
            f"{config.output} holds a run on images of another place ({changed}); give a folder of its own "
            "by --output, or --resume auto if the same images were moved"
        )
    say(f"not as before: {changed}")


def find_start(config: TrainConfig, say: Callable[[str], None], typed: str = "") -> Start:
    """Return what --resume names; if it is unset, the run directory's own run, if its options are known.

    typed: the command line. If a launcher restarts the same command, it resumes from the newest checkpoint
    of its own, not again from the one that --resume names.

    Raises UsageError if there is no such checkpoint, or a training cannot go on with it, DataError if it,
    or all of a run's, are damaged.
    """
    if config.resume is None and config.is_profile:
        return Start()
    if config.resume not in (None, "auto"):
        start, output = _of_named(config, config.resume, say)
        return _own_of(config, output, typed, say) or start
    output = output_directory(config, config.arch or DEFAULT_ARCH)
    _fetch(config, output, say)
    return _find_in(output, config, say)


def _find_in(output: Path, config: TrainConfig, say: Callable[[str], None]) -> Start:
    """Return the run in `output`; without --resume, `Start()` if there is none to continue."""
    is_implicit = config.resume is None
    options, store = _noted(output / "config.json"), CheckpointManager(output / "checkpoints")
    if is_implicit and not options and not store.last.exists():
        return Start()
    with error_context(str(output) if is_implicit else "--resume"):
        path, checkpoint = store.newest(say, moves=not config.evaluate) or (None, None)
        if checkpoint is not None:
            require_options(checkpoint.config, str(path))
    options = options or (checkpoint.config if checkpoint else {})
    if is_implicit and not options:
        return Start()  # an imported run, which only --resume continues
    if config.evaluate and checkpoint is None:
        raise UsageError(f"--resume auto: there is no checkpoint in {output / 'checkpoints'}")
    batch = None if checkpoint else _noted_batch(output, options)
    return Start(path, checkpoint, True, options, batch, must_be_same=is_implicit)


def _remote_of(url: str, output: Path) -> RemoteRun:
    """Return what is stored at `url`. Raises UsageError if the run directory `output` is another run's."""
    local = _noted(output / "config.json").get("output")
    with error_context("--output"):
        if url_of(local) not in (None, url):
            raise UsageError(
                f"{output} holds a run that is uploaded to {local}; give {url} another last name, or run in "
                "another folder"
            )
        remote = RemoteRun(url)
        if url_of(local) is None:
            require_of_run(remote, output)
    return remote


def _of_named(config: TrainConfig, resume: str, say: Callable[[str], None]) -> tuple[Start, Path]:
    """Return what --resume PATH names: a checkpoint, a run or, to evaluate, a release; and the directory of
    the run that begins or goes on.
    """
    with error_context("--resume"):
        source = open_source(resume, config.arch, config.sizes, newest=not config.evaluate)
        found = source.checkpoint
        if source.release is not None:
            if not config.evaluate:
                raise UsageError(
                    f"{resume} is a release, which has no optimizer's state to go on with; start from its "
                    "weights by --pretrained"
                )
            found = dataclasses.replace(found, network=dataclasses.replace(found.network, qw=FULL))
        require_options(found.config, str(source.file))
    say(f"--resume: {source.lines()[0]}")
    if found.assumes_sizes and config.sizes is None:
        say(assumed_sizes(resume, found.network))
    output = output_directory(config, config.arch or found.network.arch)
    is_of_output = source.run_dir == output.resolve() and not found.network.calibrated
    if config.url is not None and is_of_output and not config.evaluate:
        _remote_of(config.url, output)
    return Start(source.file, found, is_of_output), output


def _own_of(
    config: TrainConfig, output: Path, typed: str, say: Callable[[str], None]
) -> Start | None:
    """Return the newest checkpoint that an earlier start of the same --resume PATH command saved; None if
    there is none.
    """
    if config.evaluate or config.is_profile:
        return None
    noted = (RemoteRun(config.url).store.read(COMMANDS) or b"") if config.url else b""
    if not (was_typed_last(output, typed) or is_last_typed(noted, typed)):
        return None
    _fetch(config, output, say)
    try:
        newest = CheckpointManager(output / "checkpoints").newest(say)
    except DataError:  # all are damaged: it begins once more
        return None
    # In a run's own directory there may be what it had trained before.
    if newest is None or newest[1].config.get("resume") != to_plain_dict(config)["resume"]:
        return None
    return Start(*newest, continues=True, config=_noted(output / "config.json"))


def _fetch(config: TrainConfig, output: Path, say: Callable[[str], None]) -> None:
    """Download newer checkpoints from the run's bucket, if it has one, to the run directory."""
    if config.url is not None:
        remote = _remote_of(config.url, output)
        with error_context("--output"):
            fetch_newest(remote, output, config.keep or DEFAULT_KEEP, say)


def _noted(path: Path) -> dict[str, Any]:
    """Return the options in a run's config.json; {} if there are none or the file is damaged."""
    try:
        noted = read_json(path, "the checkpoint's are taken")
        if not isinstance(noted, dict) or "imported" in noted:
            return {}
        noted = by_new_names(noted)
        require_options(noted, str(path))
    except DataError:  # also if there is none
        return {}
    return noted


def _noted_batch(folder: Path, noted: Mapping[str, Any]) -> int | None:
    """Return the images of an update of a run that has no checkpoint yet."""
    with suppress(DataError, LookupError, TypeError, ValueError):
        env = read_json(folder / "env.json", "the batch is not known")
        return int(noted["batch_size"] * noted["accumulate"] * env["world_size"])
    return None


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the options that change what is computed and were given another value, with both values."""
    return [
        f"--{name.replace('_', '-')} {_shown(before[name])} -> {_shown(now[name])}"
        for name in now
        if name not in ASIDE and name in before and now[name] != before[name]
    ]


def adopted(config: ResolvedConfig, alone: ResolvedConfig) -> list[str]:
    """Return the options of `config` that a command leaves to the run that it continues.

    alone: what the command would be resolved to without that run.
    """
    names = {f.name for f in dataclasses.fields(config)} - ASIDE - {"pretrained", "lr", "amp"}
    names.add("val_data")
    if (config.batch_size, config.accumulate) == (alone.batch_size, alone.accumulate):
        names.add("lr")  # otherwise it follows them
    if config.sizes_per_step == len(config.sizes):
        names.discard("sizes_per_step")
    ours, own = to_plain_dict(config), to_plain_dict(alone)
    taken = [name for name in own if name in names and ours[name] != own[name]]
    return [f"--{name.replace('_', '-')} {_shown(ours[name])}" for name in taken]


def _place(data: Any) -> str:
    """Return where images lie, whatever links lead there."""
    found = location(str(data))
    return str(found) if isinstance(found, Url) else os.path.realpath(found)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
