"""The options of how a training is run, by topic; those of what is trained: `topics`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Generic, Literal

from tyro.conf import arg

from rsnet.config.topics import UNSET, Unset

DEFAULT_KEEP = 2


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Generic[Unset]):
    """Device, precision and memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    amp: Annotated[Literal["bf16", "fp16", "off"] | Unset, arg(metavar="{bf16,fp16,off}")] = UNSET
    """Mixed precision. Unset: bf16 where the device computes it, else off."""

    compile: bool = False
    """Compile a step's forward and backward, all sizes in one graph (torch.compile): minutes at the start."""

    cuda_graphs: bool = False
    """Launch each update as one CUDA graph, with or without --compile: one GPU, all sizes in a step, no
    --recompute. Not measured yet."""

    fused_bn: bool = False
    """Compute BatchNorm, the sum and the ReLU that follow as one operation in training (Triton), where the
    network has them so; on a GPU, without --recompute. Not measured yet."""

    recompute: Literal["off", "norm", "blocks"] = "off"
    """Activation checkpointing: norm keeps outputs of convolutions, blocks inputs of blocks; the rest is
    computed twice."""

    deterministic: bool = False
    """Use deterministic kernels only; slower on a GPU."""


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """Distributed training."""

    sync_bn: bool = False
    """BatchNorm over the batches of all processes, still private to each size; needs GPUs."""

    grad_compress: Literal["bf16", "off"] = "off"
    """Send gradients between processes in bfloat16."""

    timeout: Annotated[float, arg(aliases=("--dist-timeout",))] = 600.0
    """Seconds after which a process that does not answer ends the run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Generic[Unset]):
    """Run directory, checkpoints and error handling."""

    output: Annotated[str | Unset, arg(aliases=("-c", "--checkpoint"), metavar="DIR|URL")] = UNSET
    """Run directory. Unset: runs/ARCH-DATA, by the name of the data's folder. s3://BUCKET/.../NAME or gs://:
    runs/NAME, which is uploaded there behind the training."""

    resume: Annotated[str | None, arg(metavar="auto|PATH")] = None
    """Continue from a checkpoint; auto: the last one of --output, if there is one. Unset: auto, if --output
    holds a run of the same options."""

    allow_change: Annotated[
        tuple[Literal["data", "global-batch", "seed"], ...],
        arg(metavar="[data] [global-batch] [seed]"),
    ] = ()
    """Differences to the resumed run to accept; its images then come in another order."""

    val_interval: int = 1
    """Epochs between evaluations, from which best.pt is chosen; the last epoch is always evaluated."""

    checkpoint_every: Annotated[str, arg(metavar="UPDATES|MINUTESm")] = "10m"
    """Updates, or minutes as in 10m, between checkpoints within an epoch; 0: only after epochs."""

    keep: Annotated[int | Unset, arg(aliases=("--keep-checkpoints",), metavar="INT")] = UNSET
    """Last checkpoints to keep; the best one is kept in addition. Unset: 2."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written, or three in a row cannot be uploaded: stop, or continue
    without. The previous one is kept in any case.
    """

    on_nonfinite: Annotated[tuple[str, ...] | Unset, arg(metavar="stop|skip INT")] = UNSET
    """If a loss or gradient is NaN or infinite: stop, or skip up to so many updates in a row. Unset: stop."""

    evaluate: Annotated[bool, arg(aliases=("-e",))] = False
    """Only evaluate the checkpoint of --resume, with its own arch, sizes and normalisation unless given."""


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(Generic[Unset]):
    """Logging."""

    log_interval: Annotated[int, arg(aliases=("-p", "--print-freq"))] = 50
    """Updates between two logged steps."""

    wandb: Annotated[
        Literal["online", "offline", "disabled"] | None, arg(metavar="{online,offline,disabled}")
    ] = None
    """Weights & Biases. Unset: online if a key is configured, else offline."""

    wandb_project: Annotated[str | Unset, arg(metavar="NAME")] = UNSET
    """W&B project. Unset: WANDB_PROJECT, else rsnet."""

    wandb_name: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B run name. Unset: WANDB_NAME, else the run directory's name."""

    wandb_entity: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B team or user of the run. Unset: WANDB_ENTITY, else the user's own."""

    wandb_tags: Annotated[tuple[str, ...], arg(metavar="TAG [TAG ...]")] = ()
    """Tags of the W&B run. Unset: WANDB_TAGS, separated by commas."""

    tensorboard: bool = False
    """Write TensorBoard's event files, too, to --output/tensorboard."""


@dataclass(frozen=True, kw_only=True)
class ProfilingOptions:
    """Profiling."""

    profile: bool = False
    """Measure where the time of a step goes, instead of training, and write it to --output/profile."""

    profile_steps: int = 20
    """Steps that --profile measures of loader, computation and both together."""

    profile_sweep: Annotated[str | None, arg(metavar="OPTION[,OPTION...]")] = None
    """--profile, then try other values of workers, prefetch, decoder-hw-load, batch-size; print the best."""

    profile_limit: float = 300.0
    """Seconds for the trials of --profile-sweep."""
