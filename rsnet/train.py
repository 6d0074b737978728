"""The composition root: from a command line to a trained, evaluated or profiled network."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.batch import Loaders, LoaderSpec
from pipelines.sources.folder import require_apart_of_both
from pipelines.utils.atomic_io import atomic_write_json, sha256_file
from pipelines.utils.cli import EXIT_FAILED, exit_code
from pipelines.utils.errors import DataError, RunError, UsageError, first_line
from pipelines.utils.library_output import apart_from_libraries, keep_library_output
from pipelines.utils.location import url_of
from pipelines.utils.memory import is_out_of_gpu_memory
from pipelines.utils.output import say
from pipelines.utils.text import printable
from rsnet.checkpoint.authors_optimizer import weight_decay
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.command_line import parse
from rsnet.config.resolve import ResolvedConfig, output_directory, resolve
from rsnet.config.topics import DEFAULT_ARCH
from rsnet.config.train_config import TrainConfig, to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.distributed import watchdog
from rsnet.distributed.agreement import data_facts, require_on_rank_0, require_same
from rsnet.distributed.device import has_bf16, peak_memory_gb, time_convolutions
from rsnet.evaluation import report
from rsnet.evaluation.report import Results
from rsnet.loggers.console import ConsoleLogger
from rsnet.loggers.header import say_header
from rsnet.loggers.run_context import RunContext
from rsnet.models.autocast import AMP_DTYPES
from rsnet.profiler.run import ProfileRun
from rsnet.profiler.sweep import names_of
from rsnet.training.fine_tune import freeze
from rsnet.training.network import (
    build_network,
    load_start,
    normalized_as_pretrained,
    read_initial,
)
from rsnet.training.resume import Start, adopted, find_start, require_same_data
from rsnet.training.run import evaluate_with_progress, train
from rsnet.training.signals import TrainingInterrupted, handlers_put_back
from rsnet.training.size_schedule import used_images
from rsnet.training.teacher import TeacherSource, extra_sizes, make_teacher, read_teacher
from rsnet.training.trainer import require_trainable

# A node may have its data and checkpoints elsewhere; rank 0 alone resumes, saves and logs.
OWN_OF_A_NODE = {
    "data", "output", "resume", "tensorboard", "val_data", "wandb", "wandb_entity", "wandb_name",
    "wandb_project", "wandb_tags",
}  # fmt: skip

Options = TypeVar("Options")
MakeLoaders = Callable[[Options, LoaderSpec, bool], Loaders]


def main(
    script: str,
    options_type: type[Options],
    make_loaders: MakeLoaders[Options],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command line of `script`, by default this process's, and return the exit code.

    script: the command as users type it: train_dali.py, or `rsnet train`. A user's mistake is one line on
    stderr.
    """

    words = sys.argv[1:] if argv is None else argv
    typed = printable(shlex.join([*script.split(), *words]))

    def action() -> int:
        config, options = parse(options_type, words, script)
        with watchdog.lost_process_as_run_error():
            run(script, config, options, make_loaders, typed)
        return 0

    failed = EXIT_FAILED
    with handlers_put_back(), apart_from_libraries():
        try:
            failed = exit_code(script, action)
            return failed
        except TrainingInterrupted as stop:
            failed = stop.exit_code
            with suppress(RuntimeError):  # another was killed meanwhile
                # A launcher may kill the others when the first one ends.
                distributed.all_gather_object(None)
                failed = 0
            if distributed.is_main():
                say(f"{script}: stopped by {stop}; rerun the same command to resume", sys.stderr)
            return stop.exit_code
        finally:
            distributed.shutdown(failed)


def run(
    script: str,
    config: TrainConfig,
    options: Options,
    make_loaders: MakeLoaders[Options],
    typed: str = "",
) -> Results:
    """Train, evaluate or profile as `config` says; return the last evaluation, {} of a profile.

    typed: the command, as the run directory notes it.

    Raises UsageError, DataError or RunError, in one line, for what the user has to change.
    """
    device = distributed.setup(config.device, config.timeout)
    console = ConsoleLogger(distributed.is_main())
    # Before anything that all ranks do together, which depends on the options.
    require_same("options", lambda: _options_of_all(config))
    config, start, initial, taught_by = _read_start(config, typed, console.say)
    resolve_here = _resolver(config, start, initial, device)

    def checked() -> tuple[ResolvedConfig, list[str]]:
        resolved = resolve_here(config)
        # Among the images, the run directory would be read as a class by the next command.
        require_apart_of_both(resolved.folder, resolved.data, resolved.placed)
        require_trainable(resolved, device)
        swept = names_of(resolved.profile_sweep, options, distributed.world_size())
        start.require_same(config, resolved, resolved.global_batch(distributed.world_size()))
        return resolved, swept

    resolved, swept = distributed.run_on_all(checked)
    require_same_data(config, resolved, start, console.say)
    require_same("options", lambda: _options_of_all(resolved))
    start = dataclasses.replace(start, adopted=_adopted(config, start, resolved, device))
    _set_up_torch(resolved)
    loaders = distributed.run_on_all(
        lambda: make_loaders(options, _spec(resolved, device, taught_by), not resolved.evaluate)
    )
    try:
        require_same("data", lambda: data_facts(loaders))
        with _device_errors_in_one_line(resolved, device):
            network = resolved.model_config(
                loaders.classes, _num_classes(config, resolved, loaders)
            )
            model = build_network(resolved, network, start, initial, console.say).to(device)
            model = model.to(memory_format=torch.channels_last)
            teacher = make_teacher(taught_by, resolved, network, device, console.say)
            context = RunContext(
                script=script,
                typed=typed,
                config=resolved,
                options=options,
                network=network,
                model=model,
                loaders=loaders,
                device=device,
                console=console,
                teacher=teacher,
            )
            load_start(context, start, initial)
            freeze(model, resolved.freeze, network)
            # All ranks built the same network; dropout is each one's own.
            torch.manual_seed(rank_seed(resolved.seed, distributed.rank()))
            if resolved.evaluate:
                return evaluate(context, writes=config.output is not None)
            if resolved.is_profile:
                ProfileRun(context).run(
                    swept,
                    lambda **changes: resolve_here(dataclasses.replace(config, **changes)),
                    lambda changed, its: make_loaders(its, _spec(changed, device, taught_by), True),
                )
                return {}
            return train(context, start)
    finally:
        console.stop()
        loaders.close()


def _read_start(
    config: TrainConfig, typed: str, say: Callable[[str], None]
) -> tuple[TrainConfig, Start, Checkpoint | None, TeacherSource | None]:
    """Return the options, with what the weights say of them, and what the training begins with: a
    checkpoint, other weights, a teacher.
    """
    # A run directory that is given is found without the arch.
    initial = None if config.arch or config.output else read_initial(config, Start(), say)
    if initial is not None:
        config = dataclasses.replace(config, arch=initial.network.arch)
    start = distributed.run_on_main(lambda: find_start(config, say, typed))
    if not (start.continues or config.url or config.evaluate or config.is_profile):
        folder = output_directory(config, config.arch or DEFAULT_ARCH)
        require_on_rank_0(folder / "checkpoints" / "last.pt")
    initial = initial or read_initial(config, start, say)
    config = normalized_as_pretrained(config, start, initial, say)
    config, taught_by = read_teacher(config, start.options, say)
    return config, start, initial, taught_by


def evaluate(context: RunContext, writes: bool) -> Results:
    """Evaluate the network and print the table; with `writes`, leave it and a plot in --output, too."""
    config, console = context.config, context.console
    say_header(context)
    if writes:
        distributed.run_on_main(lambda: _make_folder(config.folder))
    results = evaluate_with_progress(context, context.model)
    for size, found in results.items():
        if not math.isfinite(found["loss"]):
            raise RunError(
                f"--evaluate: the loss at size {size} is not finite; try --amp off, or another checkpoint"
            )
    cost = context.cost
    console.say_table(report.table(results, cost))
    if writes and distributed.is_main():
        keep_library_output(config.folder / "libraries.log")
        atomic_write_json(config.folder / "evaluation.json", {"gmacs": cost, **results})
        report.plot(config.folder / "evaluation.png", config.arch, results, cost)
    return results


def _make_folder(folder: Path) -> None:
    """Raise UsageError if it cannot be made, or written to, or has what `rsnet evaluate` wrote."""
    if (folder / "per_class.csv").exists():
        raise UsageError(
            f"--output: {folder} holds an evaluation of other files; give another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output: cannot write to {folder}: {error.strerror}") from error


def _resolver(
    config: TrainConfig, start: Start, initial: Checkpoint | None, device: torch.device
) -> Callable[[TrainConfig], ResolvedConfig]:
    """Return a function that resolves options on this machine, for a run that begins with `start`."""
    checkpoint = start.checkpoint
    previous = start.options
    if checkpoint and (decay := weight_decay(checkpoint)) is not None:
        previous = {"weight_decay": decay}
    return functools.partial(
        resolve,
        world_size=distributed.world_size(),
        device_type="cuda" if device.type == "cuda" else "cpu",
        has_bf16=has_bf16(device),
        trained=checkpoint.network if checkpoint else None,
        initial=initial.network if initial else None,
        previous=None if config.evaluate else previous,
        previous_global_batch=start.global_batch,
    )


def _options_of_all(config: TrainConfig | ResolvedConfig) -> dict[str, Any]:
    """Return the options that must be equal on all ranks; of files the hash of their content, as nodes may
    keep them in different places.
    """
    facts = {
        f"--{name.replace('_', '-')}": value
        for name, value in to_plain_dict(config).items()
        if name not in OWN_OF_A_NODE
    }
    for name in ("pretrained", "class_weights"):
        value = getattr(config, name)
        if value is not None and Path(value).is_file():
            facts[f"--{name.replace('_', '-')}"] = sha256_file(Path(value))
    # Nodes may use different folders, but all must agree on the URL, and on whether --output is given.
    facts["--output"] = url_of(config.output) or ("a folder" if config.output else "unset")
    return facts


def _adopted(
    config: TrainConfig, start: Start, resolved: ResolvedConfig, device: torch.device
) -> list[str]:
    """Return the options that a command without --resume leaves to the run in its --output."""
    if not start.must_be_same:
        return []

    def silent(_: str) -> None:
        pass

    try:
        initial = read_initial(config, Start(), silent)
        config = normalized_as_pretrained(config, Start(), initial, silent)
        alone = _resolver(config, Start(), initial, device)(config)
    except (UsageError, DataError):  # it needs the run's options, or started from what is gone
        return []
    return adopted(resolved, alone)


def rank_seed(seed: int, rank: int) -> int:
    """Return the seed of a rank's random numbers in layers; neighbouring seeds and ranks share nothing."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0])


def _spec(
    config: ResolvedConfig, device: torch.device, teacher: TeacherSource | None
) -> LoaderSpec:
    return LoaderSpec(
        data=config.data,
        sizes=config.sizes,
        batch_size=config.batch_size,
        device=device,
        dtype=AMP_DTYPES[config.amp] or torch.float32,
        normalize=config.normalize,
        flip=config.flip,
        auto_augment=None if config.auto_augment == "none" else config.auto_augment,
        ra_magnitude=config.ra_magnitude,
        random_erase=config.random_erase,
        repeats=config.ra_reps,
        train_sizes=config.train_sizes,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        node_of_rank=distributed.node_of_rank(),
        splits=config.placed,
        class_weights=config.class_weights,
        balanced_sampling=config.balanced_sampling,
        extra_sizes=extra_sizes(teacher, config.train_sizes),
        used=used_images(config, teacher.sizes if teacher else ()),
    )


def _num_classes(given: TrainConfig, config: ResolvedConfig, loaders: Loaders) -> int:
    """Return the network's outputs: --num-classes, the checkpoint's, or the classes of the data."""
    known = len(loaders.classes)
    if config.num_classes is not None and config.num_classes < known:
        if given.num_classes is None:
            raise UsageError(
                f"--data has {known} classes, the network to resume has {config.num_classes}; "
                "--pretrained starts from its weights with other classes"
            )
        raise UsageError(f"--num-classes {config.num_classes}: the data has {known} classes")
    return config.num_classes or known


@contextmanager
def _device_errors_in_one_line(config: ResolvedConfig, device: torch.device) -> Iterator[None]:
    """Turn errors of the device, or of a compiler for it, into a RunError with advice."""
    try:
        yield
    except (RuntimeError, subprocess.CalledProcessError) as error:
        if is_out_of_gpu_memory(error):
            sizes = " ".join(map(str, config.train_sizes))
            raise RunError(
                f"out of GPU memory, {peak_memory_gb(device) or 0.0:.1f} GB were in use; "
                f"--batch-size {config.batch_size} at sizes {sizes}, amp {config.amp}. Halve --batch-size "
                f"and double --accumulate ({config.accumulate}), so that an update keeps its images, set "
                "--recompute norm or blocks, or leave out sizes with --sizes-per-step"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise RunError(f"--compile: {first_line(error)}; train without it") from error
        if found := re.search(r"(\S+) does not have a deterministic implementation", str(error)):
            raise RunError(
                f"--deterministic: {found[1]} is not deterministic; leave the option out, or "
                "choose another --arch"
            ) from error
        if not _is_of_tritons_build(error):
            raise
        flag = "--fused-bn" if config.fused_bn else "--qw, --qa"
        raise RunError(
            f"{flag}: Triton cannot build what starts its kernels ({first_line(error)}): install a C "
            "compiler and Python's headers (gcc, python3-dev)"
        ) from error


def _is_of_tritons_build(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(f.f_globals.get("__name__") == "triton.runtime.build" for f, _ in frames)


def _set_up_torch(config: ResolvedConfig) -> None:
    torch.manual_seed(config.seed)
    time_convolutions(deterministic=config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Nothing is read before it is written; to fill each batch's buffer costs more than to load it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
