"""Resuming a run: which options may differ, the place in the data, and the state in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.batch import Loader
from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from pipelines.utils.location import url_of
from pipelines.utils.memory import is_out_of_memory
from pipelines.utils.schema import read_json
from rsnet.checkpoint.authors_pytorch import assumed_sizes
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.manager import CheckpointManager
from rsnet.checkpoint.remote import RemoteRun, fetch_newest, require_of_run
from rsnet.checkpoint.weights import load_weights
from rsnet.config.model_config import FULL
from rsnet.config.recipes import by_new_names
from rsnet.config.resolve import ResolvedConfig, output_directory
from rsnet.config.topics import DEFAULT_ARCH
from rsnet.config.train_config import TrainConfig, require_options, to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.release.source import open_source
from rsnet.training.optim import load_optimizer_state
from rsnet.training.trainer import Trainer

# Options that do not change what is computed; batch_size and accumulate only by their product.
ASIDE = {
    "accumulate", "allow_change", "batch_size", "checkpoint_every", "compile", "cuda_graphs", "data",
    "device", "evaluate", "fused_bn", "keep", "log_interval", "num_classes", "on_nonfinite",
    "on_save_error", "output", "profile", "profile_limit", "profile_steps", "profile_sweep", "recompute",
    "resume", "tensorboard", "timeout", "val_data", "val_interval", "wandb", "wandb_entity", "wandb_name",
    "wandb_project", "wandb_tags",
}  # fmt: skip


_HOW = {
    "global-batch": " (without --batch-size and --accumulate it stays on any number of processes)"
}


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

    must_be_same: bool = False
    """Whether it is continued without --resume, which needs the same options."""

    adopted: Sequence[str] = ()
    """Options that the command leaves out and that run has, where they are not the usual ones."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the training that goes on: the checkpoint's, or of the run."""
        return self.checkpoint.config if self.checkpoint else self.config

    def require_same(self, given: TrainConfig, config: ResolvedConfig, global_batch: int) -> None:
        """Raise UsageError if the run is continued without --resume, but has other options; or with it, but
        --pretrained names weights that it did not start from.

        given: what `config` was resolved from.
        """
        if not self.must_be_same:
            self._require_own_weights(given)
            return
        plain = to_plain_dict(config)
        # Bits that are not asked for are the checkpoint's only where --resume asks for those.
        plain |= {name: FULL for name in ("qw", "qa") if getattr(given, name) is None}
        changed = changes(self.config, plain)
        before = self.checkpoint.global_batch if self.checkpoint else global_batch
        if before != global_batch:
            changed.append(f"global batch {before} -> {global_batch}")
        if changed:
            flag = "--output: " if given.output else ""
            raise UsageError(
                f"{flag}{config.output} holds a run already, of other options ({', '.join(changed)}); "
                "go on with it by --resume auto, or give another folder by --output"
            )

    def require_unfinished(self, config: ResolvedConfig) -> str:
        """Return a line if there is nothing left to train, as the same command has trained it all; else "".

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


def find_start(config: TrainConfig, say: Callable[[str], None]) -> Start:
    """Return what --resume names; if it is unset, the run directory's own run, if its options are known.

    Raises UsageError if there is no such checkpoint, or a training cannot go on with it, DataError if it,
    or all of a run's, are damaged.
    """
    output = output_directory(config, config.arch or DEFAULT_ARCH)
    if config.is_profile and config.resume is None:
        return Start()
    if config.resume not in (None, "auto"):
        start = _of_named(config, config.resume, say)
        if config.url is not None and start.continues and not config.evaluate:
            _remote_of(config.url, output)
        return start
    if config.url is not None:
        remote = _remote_of(config.url, output)
        with error_context("--output"):
            fetch_newest(remote, output, config.keep, say)
    noted, store = _noted(output / "config.json"), CheckpointManager(output / "checkpoints")
    if config.resume is None and not noted and not store.last.exists():
        return Start()
    with error_context("--resume" if config.resume else str(output)):
        newest = store.newest(say, moves=not config.evaluate)
        if newest:
            require_options(newest[1].config, str(newest[0]))
    noted = noted or (newest[1].config if newest else {})
    if config.resume is None and not noted:
        return Start()  # imported: resuming it needs --resume
    if config.evaluate and newest is None:
        raise UsageError(f"--resume auto: there is no checkpoint in {output / 'checkpoints'}")
    is_own = config.resume is None
    if newest is None:
        return Start(continues=True, config=noted, must_be_same=is_own)
    return Start(*newest, continues=True, config=noted, must_be_same=is_own)


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


def _of_named(config: TrainConfig, resume: str, say: Callable[[str], None]) -> Start:
    """Return what --resume PATH names: a checkpoint, a run or, to evaluate, a release."""
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
    return Start(source.file, found, is_of_output)


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
    if (config.batch_size, config.accumulate) == (alone.batch_size, alone.accumulate):
        names.add("lr")  # otherwise it follows them
    if config.sizes_per_step == len(config.sizes):
        names.discard("sizes_per_step")
    ours, own = to_plain_dict(config), to_plain_dict(alone)
    taken = [name for name in own if name in names and ours[name] != own[name]]
    return [f"--{name.replace('_', '-')} {_shown(ours[name])}" for name in taken]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def restore_position(
    checkpoint: Checkpoint,
    config: ResolvedConfig,
    loader: Loader,
    global_batch: int,
    steps_per_epoch: int,
) -> tuple[int, list[str]]:
    """Put the training loader where a checkpoint was taken.

    Return the updates of its epoch that are done, and what is not as it would have been, in words.

    Raises UsageError if other data, another seed or another global batch would change the order, unless
    --allow-change names it.
    """
    there, here = checkpoint.loader, loader.state_dict()
    if there is None:  # weights alone: there is no order to keep
        return 0, []
    differing = {"data": _other_data(there, here), "seed": _other(["seed"], there, here)}
    problems = [(name, what) for name, found in differing.items() for what in found]
    if checkpoint.global_batch != global_batch:
        problems.append(
            ("global-batch", f"global batch {checkpoint.global_batch} -> {global_batch}")
        )
    refused: dict[str, str] = {}
    for name, what in problems:
        if name not in config.allow_change:
            refused[name] = f"{refused[name]}, {what}" if name in refused else what
    if refused:
        where = "--resume" if config.resume else config.output
        raise UsageError(
            f"{where}: {'; '.join(refused.values())}: the run would not go on with the images that come "
            f"next; change it back{_HOW.get(next(iter(refused)), '')}, or add --allow-change "
            + " ".join(refused)
        )
    moved = [what for _, what in problems]
    if checkpoint.done == 0:
        return 0, moved
    if any(differing.values()):
        loader.set_epoch(checkpoint.epoch)
        return 0, [*moved, f"epoch {checkpoint.epoch + 1} begins anew, in another order"]
    # With another global batch: to the last update that is whole, so that no image is left out.
    done = min(there["position"] // global_batch, steps_per_epoch)
    loader.load_state_dict({**there, "position": done * global_batch})
    return done, moved


def _other(fields: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [f"{f} {there[f]} -> {here[f]}" for f in fields if f in there and there[f] != here[f]]


def _other_data(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return how the data of two loaders' states differ; of other classes, the network's, is said before."""
    is_other = there["data"] != here["data"]  # two pipelines may know images by the same
    found = _other(["pipeline", "samples"] if is_other else ["samples"], there, here)
    if is_other and not found:
        # Version 0.1 did not note the pipeline, and each has a way of its own to know images again.
        unknown = "" if "pipeline" in there else ", or another pipeline reads them"
        found = [f"as many images as before, but others (names, order, labels or sizes){unknown}"]
    return [*found, *_other(["order"], there, here)]


def training_state(trainer: Trainer, model: ResolutionSwitchable) -> dict[str, Any]:
    """Return the fields of a `Checkpoint` that training changes. All ranks have to call it."""
    state = {
        "model": model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "step": trainer.step,
        "guard": trainer.guard.state(),
        "ranks": distributed.all_gather_object(_of_this_rank(trainer, model)),
    }
    if trainer.ema:
        state["ema"] = trainer.ema.model.state_dict()
    return state


@contextmanager
def _state_in_one_line() -> Iterator[None]:
    """Raise DataError for whatever a state of other shapes, or of no shape at all, makes of PyTorch."""
    try:
        yield
    except (UsageError, DataError):
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"--resume: the state beside the weights does not fit ({reason}); --pretrained takes the weights"
        ) from error


@_state_in_one_line()
def load_training_state(
    trainer: Trainer, model: ResolutionSwitchable, checkpoint: Checkpoint
) -> list[str]:
    """Put back what `training_state` took, except the weights, which the model has already, and the step.

    Return what is not as it was, in words.
    """
    missing = []
    if checkpoint.scaler and trainer.scaler.is_enabled():  # empty but of float16
        trainer.scaler.load_state_dict(checkpoint.scaler)
    saved = checkpoint.optimizer
    if saved is None or not load_optimizer_state(trainer.optimizer, saved):
        missing.append(
            "the checkpoint has no momentum for these weights: the optimizer starts without"
        )
    if trainer.ema and checkpoint.ema is not None:
        with error_context("the checkpoint's averaged weights do not fit"):
            load_weights(trainer.ema.model, checkpoint.ema, checkpoint.network.sizes)
    if checkpoint.guard is not None:
        trainer.guard.load(checkpoint.guard)
    ranks = checkpoint.ranks or []
    if len(ranks) == distributed.world_size():
        _load_of_this_rank(trainer, model, ranks[distributed.rank()])
    elif ranks:
        missing.append(
            f"{len(ranks)} processes then, {distributed.world_size()} now: BatchNorm's statistics go on "
            "from those of the first, and random numbers of layers (dropout) are others"
        )
    return missing


def _of_this_rank(trainer: Trainer, model: ResolutionSwitchable) -> dict[str, Any]:
    device = model.alpha.device
    alone = distributed.world_size() == 1  # then the state dicts have all buffers
    return {
        "buffers": [] if alone else [b.cpu() for b in _buffers(trainer, model)],
        "means": trainer.means.state(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _load_of_this_rank(
    trainer: Trainer, model: ResolutionSwitchable, state: Mapping[str, Any]
) -> None:
    device = model.alpha.device
    if state["buffers"]:
        # Averages are there both then and now, or they were turned on or off.
        for buffer, value in zip(_buffers(trainer, model), state["buffers"], strict=False):
            buffer.copy_(value)
    trainer.means.load(state["means"], device)
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def _buffers(trainer: Trainer, model: ResolutionSwitchable) -> Sequence[Tensor]:
    """Return BatchNorm's statistics, which every rank has for itself in training, and their averages."""
    averages = trainer.ema.model.buffers() if trainer.ema else ()
    return [*model.buffers(), *averages]
