"""`rsnet evaluate`: a trained network on labelled images, in detail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    redirect_stdout,
)
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from pipelines.sources.cache_options import CacheOptions
from pipelines.utils.cli import EXIT_FAILED, EXIT_INTERRUPTED
from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from rsnet.cli.classifier import SOURCE, say_source
from rsnet.cli.loaders import Pipeline, chosen_pipeline, say_if_trained_on
from rsnet.cli.output import require_new
from rsnet.cli.wandb_table import log_table, require_wandb
from rsnet.config.bounds import MAX_IMAGES

if TYPE_CHECKING:
    import torch

    from pipelines.batch import LoaderSpec
    from rsnet.config.model_config import ModelConfig
    from rsnet.evaluation.detailed import DetailedEvaluation
    from rsnet.models.switchable import ResolutionSwitchable
    from rsnet.release.source import SavedNetwork


@dataclass(frozen=True, kw_only=True)
class Options(CacheOptions):
    """Evaluate a network at all of its sizes, and their ensemble, in one pass over labelled images.

    Top-1, top-5 and loss are those of `rsnet train --evaluate`, also by torchrun on several processes. The
    data may have some of the network's classes, or folders that are numbers.
    """

    source: Positional[Annotated[str, arg(metavar=SOURCE)]]
    """Run directory, checkpoint, release, or file of the original code."""

    data: Annotated[str, arg(aliases=("-d",), metavar="DIR")]
    """Folder with val/CLASS/IMAGE, CLASS/IMAGE or val.beton; a table of paths, or tar shards."""

    val_fraction: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Share of the images that a training with this option has left for validation. Unset: all."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """Some of the network's sizes. Of an original's file all of its, as they were given to it. Unset: all."""

    arch: Annotated[str | None, arg(metavar="NAME")] = None
    """Network of an original's file that does not say it."""

    pipeline: Annotated[Pipeline | None, arg(metavar="{dali,ffcv}")] = None
    """Pipeline that reads --data. Unset: ffcv if there are .beton files, else dali."""

    workers: Annotated[int | None, arg(aliases=("-j",), metavar="INT")] = None
    """CPU threads that read and decode. Unset: as in training."""

    skip_bad: bool = False
    """Leave out the images that `rsnet verify` found to be broken."""

    batch_size: Annotated[int | None, arg(aliases=("-b",), metavar="INT")] = None
    """Images per process and batch. Unset: 256 on a GPU, 32 on a CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    amp: Annotated[Literal["bf16", "fp16", "off"] | None, arg(metavar="{bf16,fp16,off}")] = None
    """Mixed precision. Unset: bf16 where the device computes it, else off."""

    real: Annotated[Path | None, arg(metavar="FILE.json")] = None
    """ImageNet-ReaL's labels, by the names of ILSVRC's validation images: an answer is right that is one of
    an image's labels; images without any are left out."""

    class_names: Annotated[Path | None, arg(metavar="FILE")] = None
    """Readable names: one a line in the order of the classes, or a dict of JSON by class. Unset: the
    release's, or ImageNet's for its WordNet ids."""

    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """New folder for evaluation.json, the confusion matrix, accuracy by class, and the hard images. Unset:
    none."""

    predictions: Annotated[Path | None, arg(metavar="FILE.parquet")] = None
    """New file with path, label and the five most likely classes at each size of every image. Unset: none."""

    logits: bool = False
    """All logits in --predictions, in place of the most likely classes."""

    json: bool = False
    """JSON on stdout in place of the tables."""

    wandb: Annotated[
        Literal["online", "offline", "disabled"], arg(metavar="{online,offline,disabled}")
    ] = "disabled"
    """Weights & Biases: the table and the confusion matrix; needs --output."""

    wandb_project: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B project. Unset: WANDB_PROJECT, else rsnet."""

    wandb_name: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B run name. Unset: WANDB_NAME, else the output folder's name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wandb != "disabled" and self.output is None:
            raise UsageError("--wandb: give --output, too, the folder that W&B logs in")
        if self.logits and self.predictions is None:
            raise UsageError("--logits: give --predictions, too, the file that they go to")
        if self.batch_size is not None and not 1 <= self.batch_size <= MAX_IMAGES:
            raise UsageError(
                f"--batch-size {self.batch_size}: at least 1, and {MAX_IMAGES} at most"
            )


def run(options: Options) -> int:
    from rsnet.distributed import process_group as distributed

    failed = 0
    try:
        with _errors_in_one_line():
            with _aside(options):
                found = _evaluate(options, distributed.setup(options.device))
            if found is not None:
                # Before what is written, as that may fail after hours.
                print(json.dumps(found.to_dict()) if options.json else found.tables())
                with _aside(options):
                    _write(options, found)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        failed = getattr(error, "exit_code", EXIT_INTERRUPTED if interrupted else EXIT_FAILED)
        raise
    finally:
        distributed.shutdown(failed)
    return 0


def _aside(options: Options) -> AbstractContextManager[object]:
    """Keep what is said on the way out of the JSON on stdout."""
    return redirect_stdout(sys.stderr) if options.json else nullcontext()


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Raise RunError if the block has not enough GPU memory, or another process was lost."""
    from pipelines.utils.errors import RunError
    from pipelines.utils.memory import is_out_of_gpu_memory
    from rsnet.distributed import watchdog

    try:
        with watchdog.lost_process_as_run_error():
            yield
    except RuntimeError as error:
        if not is_out_of_gpu_memory(error):
            raise
        raise RunError("out of GPU memory; give a smaller --batch-size") from error


def _evaluate(options: Options, device: torch.device) -> DetailedEvaluation | None:
    """Return the evaluation on rank 0, None on others."""
    from pipelines.utils.progress import ProgressBar
    from rsnet.cli.loaders import make_loaders
    from rsnet.distributed import process_group as distributed
    from rsnet.distributed.agreement import data_facts, require_same
    from rsnet.distributed.device import has_bf16, time_convolutions
    from rsnet.evaluation.detailed import evaluate_in_detail
    from rsnet.models.autocast import AMP_DTYPES
    from rsnet.models.state_dict import state_digest

    require_wandb(options)
    distributed.run_on_main(lambda: _require_new(options))
    source, model = distributed.run_on_all(lambda: _open(options))
    precision = options.amp or ("bf16" if has_bf16(device) else "off")
    amp = AMP_DTYPES[precision]
    facts = {"--sizes": model.sizes, "--amp": precision}
    require_same(
        "networks", lambda: facts | {"weights": state_digest(source.checkpoint.eval_weights)}
    )
    spec = _loader_spec(options, source.network, model.sizes, device, amp)
    time_convolutions()
    main, world = distributed.is_main(), distributed.world_size()
    with ExitStack() as stack:
        loaders = distributed.run_on_all(
            lambda: make_loaders(
                spec,
                False,
                options.pipeline,
                options.workers,
                skip_bad=options.skip_bad,
                cache=options,
            )
        )
        stack.enter_context(closing(loaders))
        require_same("data", lambda: data_facts(loaders))
        images = len(loaders.val.sample_names)
        bar = stack.enter_context(ProgressBar("evaluate", images)) if main else None
        return evaluate_in_detail(
            model.to(device), source.network, loaders, device, amp,
            source={"source": source.lines()[0], "data": str(options.data)},
            real=options.real,
            names=lambda classes: _names(options, source, classes),
            keep_logits=options.logits,
            say=say if main else lambda _: None,
            on_images=lambda done: bar.update(min(done * world, images)) if bar else None,
        )  # fmt: skip


def _require_new(options: Options) -> None:
    """Raise UsageError, before minutes have passed, if a file or folder cannot be made."""
    from pipelines.sources.folder import require_apart

    for flag, path in (("--output", options.output), ("--predictions", options.predictions)):
        if path is None:
            continue
        if flag == "--output":
            require_apart(path, options.data, whole=True)
        require_new(flag, path)
    if options.output is not None and options.output == options.predictions:
        raise UsageError(f"--predictions: {options.output} is --output's folder; give another name")


def _open(options: Options) -> tuple[SavedNetwork, ResolutionSwitchable]:
    """Open what is to be evaluated, and say on rank 0, on stderr, what it is."""
    import torch

    from rsnet.distributed import process_group as distributed
    from rsnet.release.source import open_source

    source = open_source(options.source, options.arch, options.sizes)
    known = source.network.sizes
    if options.sizes and not set(options.sizes) <= set(known):
        there, here = (" ".join(map(str, sizes)) for sizes in (known, options.sizes))
        raise UsageError(f"--sizes is {there} in {options.source} and {here} here")
    model = source.build(sorted(set(options.sizes or known), reverse=True))
    if distributed.is_main():
        say_source(source, sys.stderr)
        say_if_trained_on(source.checkpoint.config, options.data, options.val_fraction)
    return source, model.to(memory_format=torch.channels_last)


def _loader_spec(
    options: Options,
    network: ModelConfig,
    sizes: Sequence[int],
    device: torch.device,
    amp: torch.dtype | None,
) -> LoaderSpec:
    import torch

    from pipelines.batch import LoaderSpec
    from pipelines.sources.options import NO_OPTIONS, SplitOptions
    from rsnet.config.topics import DEFAULT_BATCH_SIZE
    from rsnet.distributed import process_group as distributed

    # FFCV reads val.beton; of all else `open_splits` finds the validation images, or takes the whole.
    splits = SplitOptions(
        options.data if options.val_fraction is None else None, options.val_fraction
    )
    is_ffcv = chosen_pipeline(options.data, options.pipeline) == "ffcv"
    return LoaderSpec(
        data=options.data,
        sizes=tuple(sizes),
        batch_size=options.batch_size or DEFAULT_BATCH_SIZE[device.type],
        device=device,
        dtype=amp or torch.float32,
        normalize=network.normalize,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        node_of_rank=distributed.node_of_rank(),
        splits=NO_OPTIONS if is_ffcv and options.val_fraction is None else splits,
    )


def _names(options: Options, source: SavedNetwork, classes: Sequence[str]) -> Sequence[str]:
    """Return the readable names of the network's outputs."""
    from rsnet.evaluation.class_names import readable_names
    from rsnet.release.config import output_names

    release = source.release
    if release and "class_names" in release.config and options.class_names is None:
        return output_names(release.config)
    return readable_names(classes, source.network.num_classes, options.class_names)


def _write(options: Options, found: DetailedEvaluation) -> None:
    """Write what the options ask for."""
    from rsnet.evaluation.detailed import COLUMNS
    from rsnet.evaluation.predictions import write_parquet

    plot = None
    if options.output is not None:  # first, as the predictions may belong into it
        plot = found.write(options.output)
        say(f"{options.output}: {', '.join(sorted(p.name for p in options.output.iterdir()))}")
    if options.predictions is not None:
        options.predictions.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(options.predictions, found.predictions, found.names, found.source)
        say(f"{options.predictions}: {len(found.predictions.paths)} images")
    config = {**found.source, "images": len(found.predictions.paths)}
    log_table(options, config, COLUMNS, found.rows(), plot)
