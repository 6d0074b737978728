"""The composition root: from a command line to a trained or evaluated network. It alone knows all rooms."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from pipelines.batch import Loaders, LoaderSpec
from pipelines.utils.cli import exit_code
from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from rsnet.checkpoint import io as checkpoint
from rsnet.config.command_line import as_command, parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig, resolve
from rsnet.config.train_config import TrainConfig
from rsnet.distributed import process_group as distributed
from rsnet.distributed import watchdog
from rsnet.evaluation import report
from rsnet.evaluation.report import Results
from rsnet.loggers.console import ConsoleLogger
from rsnet.loggers.run_dir import RunDir
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.autocast import AMP_DTYPES
from rsnet.models.factory import create_model, synchronize_batchnorm
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.profiler.run import ProfileRun
from rsnet.profiler.sweep import names_of
from rsnet.training.loop import TrainingRun, cost_of, shown_evaluation
from rsnet.training.resume import find_start
from rsnet.training.signals import TrainingInterrupted

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

    def action() -> int:
        config, options = parse(options_type, argv)
        try:
            run(script, config, options, make_loaders)
        except RuntimeError as error:
            if not watchdog.is_collective_error(error):
                raise
            raise DataError(f"another process was lost: {first_line(error)}") from error
        return 0

    try:
        return exit_code(script, action)
    except TrainingInterrupted as stop:
        distributed.all_gather_object(
            None
        )  # a launcher may kill the others when the first one ends
        if distributed.is_main():
            print(f"{script}: stopped by {stop}; the same command goes on", file=sys.stderr)
        return stop.exit_code
    finally:
        distributed.shutdown()


def run(
    script: str, config: TrainConfig, options: Options, make_loaders: MakeLoaders[Options]
) -> Results:
    """Train (or only evaluate) as `config` says; returns the last evaluation.

    Raises UsageError or DataError, in one line, for what the user has to change.
    """
    device = distributed.setup(config.device, config.timeout)
    display = ConsoleLogger(distributed.is_main())
    start = distributed.run_on_main(lambda: find_start(config, display.say))
    source, content = start.source, start.content
    resolve_here = functools.partial(
        resolve,
        world_size=distributed.world_size(),
        device_type="cuda" if device.type == "cuda" else "cpu",
        has_bf16=has_bf16(device),
        trained=content["network"] if content else None,
        previous=None if config.evaluate else content["config"] if content else start.config,
        previous_global_batch=content["global_batch"] if content else None,
    )
    resolved = resolve_here(config)
    if resolved.batch_size < 2 and not resolved.evaluate:
        raise UsageError("--batch-size 1: BatchNorm needs at least 2 images to train on")
    if resolved.sync_bn and device.type != "cuda":
        raise UsageError("--sync-bn: PyTorch computes it on GPUs alone")
    swept = names_of(resolved.profile_sweep, options, distributed.world_size())
    start.require_same(config, resolved, resolved.global_batch(distributed.world_size()))
    _set_up_torch(resolved)
    loaders = distributed.run_on_all(
        lambda: make_loaders(options, _spec(resolved, device), not resolved.evaluate)
    )
    try:
        outputs = _outputs(resolved, loaders.classes)
        described = resolved.model_config(loaders.classes, outputs)
        model = _build(resolved, described, is_new=content is None).to(device)
        model = model.to(memory_format=torch.channels_last)
        network = described.to_dict()
        if source and content:
            with error_context(f"--resume: {source} does not fit"):
                training = not resolved.evaluate
                checkpoint.require_match(content["network"], network, training)
                is_average = not training and "ema" in content
                checkpoint.load_weights(model, content, "ema" if is_average else "model")
            if training:
                model.complete_alpha()
        elif resolved.init_from is not None:
            path = Path(resolved.init_from)
            distributed.run_on_all(lambda: checkpoint.start_from(model, network, path))
        display.say(as_command(script, resolved, options))
        if resolved.never_decays:
            first = min(resolved.schedule)
            display.say(
                f"note: the learning rate stays at {resolved.lr:g}: --epochs {resolved.epochs} end before "
                f"--schedule's first, {first}"
            )
        if resolved.evaluate:
            return _evaluate_only(config, resolved, model, loaders, device, display)
        if resolved.is_profile:
            profiling = ProfileRun(
                script, resolved, options, model, loaders, device, display, outputs
            )
            profiling.run(
                swept,
                lambda **changes: resolve_here(dataclasses.replace(config, **changes)),
                lambda changed, its: make_loaders(its, _spec(changed, device), True),
            )
            return {}
        session = TrainingRun(script, resolved, options, model, loaders, device, display, network)
        return session.train(source, content, start.continues)
    except torch.OutOfMemoryError as error:
        raise DataError(_out_of_memory(resolved, device)) from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise DataError(f"--compile: {first_line(error)}; train without it") from error
    finally:
        display.stop()
        for loader in (loaders.train, loaders.val):
            if loader is not None:
                loader.close()


def _evaluate_only(
    config: TrainConfig,
    resolved: ResolvedConfig,
    model: ResolutionSwitchable,
    loaders: Loaders,
    device: torch.device,
    display: ConsoleLogger,
) -> Results:
    """Print the table; with --output also write it there, and the plot."""
    results = shown_evaluation(model, loaders, device, AMP_DTYPES[resolved.amp], display)
    cost = cost_of(model)
    display.say(report.table(results, cost))
    if config.output is not None and distributed.is_main():
        run_dir = RunDir(resolved.output, continues=True, active=True)
        run_dir.write_json("evaluation.json", {"gflops": cost, **results})
        report.plot(resolved.output / "evaluation.png", resolved.arch, results, cost)
    return results


def _build(c: ResolvedConfig, config: ModelConfig, is_new: bool) -> ResolutionSwitchable:
    pretrained = c.pretrained if is_new else None
    model = create_model(config, pretrained, c.fixed_qa)
    if c.sync_bn:
        synchronize_batchnorm(model, c.arch)
    if c.recompute != "off":
        convert_to_checkpointed(model.network, c.recompute)
    return model


def _spec(config: ResolvedConfig, device: torch.device) -> LoaderSpec:
    return LoaderSpec(
        data=config.data,
        sizes=config.sizes,
        batch_size=config.batch_size,
        device=device,
        dtype=AMP_DTYPES[config.amp] or torch.float32,
        normalize=config.normalize,
        flip=config.flip,
        auto_augment=None if config.auto_augment == "none" else config.auto_augment,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _outputs(config: ResolvedConfig, classes: list[str]) -> int:
    if config.num_classes is not None and config.num_classes < len(classes):
        raise UsageError(f"--num-classes {config.num_classes}: the data has {len(classes)} classes")
    return config.num_classes or len(classes)


def _out_of_memory(config: ResolvedConfig, device: torch.device) -> str:
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    sizes = " ".join(map(str, config.sizes))
    return (
        f"out of GPU memory, {peak:.1f} GB were in use: --batch-size {config.batch_size} at sizes {sizes}, "
        f"amp {config.amp}. Halve --batch-size and double --accumulate ({config.accumulate}), so that an "
        "update keeps its images, set --recompute norm or blocks, or leave out sizes with --sizes-per-step"
    )


def _set_up_torch(config: ResolvedConfig) -> None:
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = not config.deterministic  # fixed input shapes: it pays at once
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # The oldest torch that is supported may not have it.
    can: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
