"""The options of a training run, by topic. Imports no torch.

An option of type `... | Unset` may be left unset on the command line: in `TrainConfig` Unset is None. In
`rsnet.config.resolve.ResolvedConfig`, which fills it in from the checkpoint or the recipe, it is Never.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from tyro.conf import arg

from rsnet.config.model_config import Mode
from rsnet.config.option_rules import require_valid
from rsnet.config.recipes import RecipeName

AutoAugmentOption = Literal["none", "trivial", "rand"]

DEFAULT_ARCH = "parallel_resnet50"
# Per process. Five ResNet-50 graphs of 32 images keep 4 GB, of 256 images 30 GB (bfloat16).
DEFAULT_BATCH_SIZE = {"cuda": 256, "cpu": 32}

Unset = TypeVar("Unset")
UNSET: Any = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Generic[Unset]):
    """The network."""

    arch: Annotated[str | Unset, arg(aliases=("-a",), metavar="NAME")] = UNSET
    """parallel_<torchvision name> or parallel_timm/<timm name>. Unset: parallel_resnet50."""

    sizes: Annotated[tuple[int, ...] | Unset, arg(metavar="INT [INT ...]")] = UNSET
    """Input sizes in pixels. Unset: 224 192 160 128 96."""

    num_classes: Annotated[int | None, arg(metavar="INT")] = None
    """Outputs of the network. Unset: the classes of the data."""

    width_mult: float = 1.0
    """Width of the network's layers, where it has a choice (MobileNetV2, ResNets up to 50)."""

    stem: Annotated[Literal["imagenet", "small"] | Unset, arg(metavar="{imagenet,small}")] = UNSET
    """First layer; small: 3x3, stride 1, no pooling, for images of about 32 pixels. Unset: imagenet."""

    norm: Annotated[Literal["private", "shared"] | Unset, arg(metavar="{private,shared}")] = UNSET
    """BatchNorm; shared: one for all sizes, to compare with. Unset: private."""

    blurpool: bool = False
    """Blur before strided convolutions."""

    mode: Annotated[Mode | Unset, arg(metavar="{resnet,preact,preact_typeA}")] = UNSET
    """resnet: --arch as it is; preact, preact_typeA: a pre-activation ResNet, which --qa needs. Unset:
    resnet."""

    qw: Annotated[int | Unset, arg(metavar="BITS")] = UNSET
    """Bits of the convolutions' weights, 1 to 8, but of the first one's. Unset: 32, not quantized."""

    qa: Annotated[int | Unset, arg(metavar="BITS")] = UNSET
    """Bits of the activations, 1 to 8. Unset: 32, not quantized."""

    fixed_qa: bool = False
    """The activations' levels follow the largest size alone."""

    tf_padding: bool = False
    """Pad strided layers as TensorFlow does, as networks of the original's quantized code need it."""

    init_from: Annotated[
        str | None, arg(aliases=("--initial-checkpoint",), metavar="CHECKPOINT.pt")
    ] = None
    """Start from the weights of a full-precision run of this network."""

    pretrained: Annotated[str | None, arg(metavar="default|NAME|PATH")] = None
    """Start from weights of the ordinary network: its library's, or a file. Unset: from scratch."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(Generic[Unset]):
    """The data, and how much of it is in a step."""

    data: Annotated[Path, arg(aliases=("-d",), metavar="DIR")]
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE; of train_ffcv.py, with train.beton and val.beton."""

    normalize: Annotated[Literal["imagenet", "unit"] | Unset, arg(metavar="{imagenet,unit}")] = (
        UNSET
    )
    """imagenet: mean and std; unit: [0, 1], what the original's checkpoints expect. Unset: imagenet."""

    batch_size: Annotated[int | Unset, arg(aliases=("-b",), metavar="INT")] = UNSET
    """Images per process and step. Unset: 256 on a GPU, 32 on a CPU."""

    seed: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Seed of initialisation, order, crops and flips. Unset: 0."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Generic[Unset]):
    """SGD, and what happens to gradients and weights beside it."""

    lr: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Learning rate. Unset: the paper's 0.1 (MobileNets 0.05) times global batch / 256."""

    momentum: float = 0.9
    """SGD's momentum."""

    weight_decay: Annotated[float | Unset, arg(aliases=("--wd",), metavar="FLOAT")] = UNSET
    """Unset: the paper's 1e-4 (MobileNets 4e-5, quantized 5e-5)."""

    sgd: Annotated[
        Literal["plain", "nesterov"] | Unset, arg(aliases=("--opt",), metavar="{plain,nesterov}")
    ] = UNSET
    """Kind of momentum. Unset: plain; nesterov for quantized networks."""

    decay: Annotated[Literal["all", "weights"] | Unset, arg(metavar="{all,weights}")] = UNSET
    """What weight decay acts on; weights: not on norm layers, biases and alpha. --norm-weight-decay is all,
    --no-norm-weight-decay weights. Unset: the recipe's (paper all, modern and quantized weights)."""

    accumulate: Annotated[int | Unset, arg(aliases=("--grad-accum-steps",), metavar="INT")] = UNSET
    """Batches whose gradients make up one update. Unset: 1; on other processes than before, as many as keep
    the images of an update."""

    clip_grad: Annotated[float | Unset, arg(aliases=("--clip-grad-norm",), metavar="FLOAT")] = UNSET
    """Largest norm of the gradients. Unset: 0, not clipped."""

    ema: Annotated[float | Unset, arg(aliases=("--model-ema-decay",), metavar="FLOAT")] = UNSET
    """Decay, per update, of averaged weights, which are evaluated; 0: none. Unset: the recipe's."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Generic[Unset]):
    """Length of the training, and learning rate over it."""

    recipe: Annotated[RecipeName | Unset, arg(metavar="{paper,modern}")] = UNSET
    """What is left unset: as in the paper, or as classifiers are trained today. Unset: paper."""

    epochs: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Unset: the paper's 120, or 150 for MobileNets."""

    lr_decay: Annotated[
        Literal["cosine", "step", "linear", "schedule"] | Unset,
        arg(aliases=("--sched",), metavar="{cosine,step,linear,schedule}"),
    ] = UNSET
    """cosine and linear fall to zero by iteration; step and schedule by --gamma at epochs. Unset: the
    recipe's (cosine; quantized: schedule; modern: linear up to 87 epochs)."""

    step: int = 30
    """Epochs between decays of --lr-decay step."""

    schedule: tuple[int, ...] = (30, 60, 85, 95, 105)
    """Epochs of the decays of --lr-decay schedule."""

    gamma: float = 0.1
    """Factor of a decay of step and schedule."""

    warmup: Annotated[int | Unset, arg(aliases=("--warmup-epochs",), metavar="INT")] = UNSET
    """Epochs in which the learning rate rises linearly. Unset: the recipe's (paper 0, modern up to 5)."""


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Generic[Unset]):
    """What is done to images and labels."""

    flip: Literal["independent", "shared"] = "independent"
    """Each size draws its own flip, as in the original, or all share one."""

    auto_augment: Annotated[AutoAugmentOption | Unset, arg(metavar="{none,trivial,rand}")] = UNSET
    """TrivialAugment or RandAugment on the crop (not of train_ffcv.py). Unset: none."""

    mixup: Annotated[float | Unset, arg(aliases=("--mixup-alpha",), metavar="FLOAT")] = UNSET
    """Mix images by Beta(a, a) of this a, alike at all sizes. Unset: 0, no."""

    cutmix: Annotated[float | Unset, arg(aliases=("--cutmix-alpha",), metavar="FLOAT")] = UNSET
    """Paste a neighbour's box by Beta(a, a) of this a, alike at all sizes. Unset: 0, no."""

    label_smoothing: Annotated[float | Unset, arg(aliases=("--smoothing",), metavar="FLOAT")] = (
        UNSET
    )
    """Share of the label that is spread over all classes. Unset: the recipe's (paper 0, modern 0.1)."""


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Generic[Unset]):
    """How the sizes of a step learn from each other."""

    kd: bool = True
    """Distil from the ensemble (and the larger sizes) to each size."""

    kd_type: Annotated[Literal["ens_topdown", "ens"], arg(aliases=("-t",))] = "ens_topdown"
    """ens_topdown: ensemble and larger sizes teach; ens: the ensemble alone."""

    sizes_per_step: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Sizes in a step: the largest and others, drawn at random. Unset: all, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Generic[Unset]):
    """Device, precision and memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    amp: Annotated[Literal["bf16", "fp16", "off"] | Unset, arg(metavar="{bf16,fp16,off}")] = UNSET
    """Mixed precision. Unset: bf16 where the device computes it, else off."""

    compile: bool = False
    """Compile a step's forward and backward, all sizes in one graph (torch.compile): minutes at the start."""

    recompute: Literal["off", "norm", "blocks"] = "off"
    """Save memory: keep outputs of convolutions, or inputs of blocks, and compute the rest twice."""

    deterministic: bool = False
    """Only kernels that give the same bits every time; slower on a GPU."""


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """Several processes."""

    sync_bn: bool = False
    """BatchNorm over the batches of all processes, still private to each size; needs GPUs."""

    grad_compress: Literal["bf16", "off"] = "off"
    """Send gradients between processes in bfloat16."""

    timeout: Annotated[float, arg(aliases=("--dist-timeout",))] = 600.0
    """Seconds after which a process that does not answer ends the run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Generic[Unset]):
    """Run directory, checkpoints, and what a run does in trouble."""

    output: Annotated[Path | Unset, arg(aliases=("-c", "--checkpoint"), metavar="DIR")] = UNSET
    """Run directory. Unset: runs/ARCH."""

    resume: Annotated[str | None, arg(metavar="auto|PATH")] = None
    """Continue from a checkpoint; auto: the last one of --output, if there is one. Unset: auto, if --output
    holds a run of the same options."""

    allow_change: Annotated[
        tuple[Literal["data", "global-batch", "seed"], ...],
        arg(metavar="[data] [global-batch] [seed]"),
    ] = ()
    """What may differ from the run that goes on, though its images then come in another order."""

    checkpoint_every: Annotated[str, arg(metavar="UPDATES|MINUTESm")] = "10m"
    """A checkpoint within the epoch every so many updates or, with an m, minutes; 0: only after epochs."""

    keep: Annotated[int, arg(aliases=("--keep-checkpoints",))] = 2
    """Last checkpoints to keep; the best is kept besides."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written: the one before it stays in any case."""

    on_nonfinite: Annotated[tuple[str, ...], arg(metavar="stop|skip INT")] = ("stop",)
    """What to do if a loss is NaN or infinite; skip: leave out up to so many updates in a row."""

    evaluate: Annotated[bool, arg(aliases=("-e",))] = False
    """Only evaluate --resume's checkpoint, with its arch, sizes and normalisation unless given."""


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """What is logged, and where."""

    log_interval: Annotated[int, arg(aliases=("-p", "--print-freq"))] = 50
    """Updates between two logged steps."""

    wandb: Annotated[
        Literal["online", "offline", "disabled"] | None, arg(metavar="{online,offline,disabled}")
    ] = None
    """Weights & Biases. Unset: online if a key is configured, else offline."""

    wandb_project: str = "rsnet"
    """W&B project."""

    wandb_name: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B run name. Unset: the run directory's name."""


@dataclass(frozen=True, kw_only=True)
class ProfilingOptions:
    """Measuring the steps instead of training."""

    profile: bool = False
    """Train nothing; measure where the time of a step goes, and write it to --output/profile."""

    profile_steps: int = 20
    """Steps that --profile measures of each kind."""

    profile_sweep: Annotated[str | None, arg(metavar="OPTION[,OPTION...]")] = None
    """--profile, then try other values of workers, prefetch, decoder-hw-load, batch-size; print the best."""

    profile_limit: float = 300.0
    """Seconds that --profile-sweep may try values for."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    # The fields of the last base come first.
    ProfilingOptions,
    LoggingOptions,
    CheckpointOptions[Unset],
    DistributedOptions,
    ComputeOptions[Unset],
    DistillationOptions[Unset],
    AugmentationOptions[Unset],
    ScheduleOptions[Unset],
    OptimizerOptions[Unset],
    ModelOptions[Unset],
    DataOptions[Unset],
    Generic[Unset],
):
    """All options of a training.

    Raises UsageError for a value that is wrong whatever data and network are.
    """

    def __post_init__(self) -> None:
        require_valid(self)

    @property
    def is_profile(self) -> bool:
        """Whether to measure instead of training."""
        return self.profile or self.profile_sweep is not None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions[None]):
    """Train one network for several input resolutions."""


# The headings of --help.
TOPICS: dict[str, Any] = {
    "data": DataOptions[None],
    "model": ModelOptions[None],
    "optimizer": OptimizerOptions[None],
    "schedule": ScheduleOptions[None],
    "augmentation": AugmentationOptions[None],
    "distillation": DistillationOptions[None],
    "compute": ComputeOptions[None],
    "distributed": DistributedOptions,
    "checkpointing": CheckpointOptions[None],
    "logging": LoggingOptions,
    "profiling": ProfilingOptions,
}


def to_plain_dict(options: Any) -> dict[str, Any]:
    """Return a dataclass as JSON and `torch.load(weights_only=True)` take it."""
    plain = dataclasses.asdict(options)
    return {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in plain.items()
    }
