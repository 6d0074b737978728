"""The options of a training run, and what their values may be. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import BITS, FULL
from rsnet.config.recipes import RecipeName

Mode = Literal["resnet", "preact", "preact_typeA"]
AutoAugmentOption = Literal["none", "trivial", "rand"]

DEFAULT_ARCH = "parallel_resnet50"
DEFAULT_SIZES = (224, 192, 160, 128, 96)
# Per process. Five ResNet-50 graphs of 32 images keep 4 GB, of 256 images 30 GB (bfloat16).
DEFAULT_BATCH_SIZE = {"cuda": 256, "cpu": 32}


@dataclass(frozen=True)
class TrainConfig:
    """Train one network for several input resolutions."""

    data: Annotated[Path, arg(aliases=("-d",), metavar="DIR")]
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE; of train_ffcv.py, with train.beton and val.beton."""

    arch: Annotated[str | None, arg(aliases=("-a",), metavar="NAME")] = None
    """parallel_<torchvision name> or parallel_timm/<timm name>. Unset: parallel_resnet50."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """Input sizes in pixels. Unset: 224 192 160 128 96."""

    num_classes: Annotated[int | None, arg(metavar="INT")] = None
    """Outputs of the network. Unset: the classes of the data."""

    width_mult: float = 1.0
    """Width of the network's layers, where it has a choice (MobileNetV2, ResNets up to 50)."""

    stem: Annotated[Literal["imagenet", "small"] | None, arg(metavar="{imagenet,small}")] = None
    """First layer; small: 3x3, stride 1, no pooling, for images of about 32 pixels. Unset: imagenet."""

    norm: Annotated[Literal["private", "shared"] | None, arg(metavar="{private,shared}")] = None
    """BatchNorm; shared: one for all sizes, to compare with. Unset: private."""

    blurpool: bool = False
    """Blur before strided convolutions."""

    mode: Annotated[Mode | None, arg(metavar="{resnet,preact,preact_typeA}")] = None
    """resnet: --arch as it is; preact, preact_typeA: a pre-activation ResNet, which --qa needs. Unset:
    resnet."""

    qw: Annotated[int | None, arg(metavar="BITS")] = None
    """Bits of the convolutions' weights, 1 to 8, but of the first one's. Unset: 32, not quantized."""

    qa: Annotated[int | None, arg(metavar="BITS")] = None
    """Bits of the activations, 1 to 8. Unset: 32, not quantized."""

    fixed_qa: bool = False
    """The activations' levels follow the largest size alone."""

    tf_padding: bool = False
    """Pad strided layers as TensorFlow does, as networks of the original's quantized code need it."""

    init_from: Annotated[str | None, arg(metavar="CHECKPOINT.pt")] = None
    """Start from the weights of a full-precision run of this network."""

    pretrained: Annotated[str | None, arg(metavar="default|NAME|PATH")] = None
    """Start from weights of the ordinary network: its library's, or a file. Unset: from scratch."""

    recipe: Annotated[RecipeName | None, arg(metavar="{paper,modern}")] = None
    """What is left unset: as in the paper, or as classifiers are trained today. Unset: paper."""

    epochs: Annotated[int | None, arg(metavar="INT")] = None
    """Unset: the paper's 120, or 150 for MobileNets."""

    batch_size: Annotated[int | None, arg(aliases=("-b",), metavar="INT")] = None
    """Images per process and step. Unset: 256 on a GPU, 32 on a CPU."""

    accumulate: Annotated[int | None, arg(metavar="INT")] = None
    """Batches whose gradients make up one update. Unset: 1; on other processes than before, as many as keep
    the images of an update."""

    lr: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate. Unset: the paper's 0.1 (MobileNets 0.05) times global batch / 256."""

    momentum: float = 0.9
    """SGD's momentum."""

    weight_decay: Annotated[float | None, arg(aliases=("--wd",), metavar="FLOAT")] = None
    """Unset: the paper's 1e-4 (MobileNets 4e-5, quantized 5e-5)."""

    sgd: Annotated[Literal["plain", "nesterov"] | None, arg(metavar="{plain,nesterov}")] = None
    """Kind of momentum. Unset: plain; nesterov for quantized networks."""

    decay: Annotated[Literal["all", "weights"] | None, arg(metavar="{all,weights}")] = None
    """What weight decay acts on; weights: not on norm layers, biases and alpha. Unset: the recipe's (paper
    all, modern and quantized weights)."""

    lr_decay: Annotated[
        Literal["cosine", "step", "linear", "schedule"] | None,
        arg(metavar="{cosine,step,linear,schedule}"),
    ] = None
    """cosine and linear fall to zero by iteration; step and schedule by --gamma at epochs. Unset: the
    recipe's (cosine; quantized: schedule; modern: linear up to 87 epochs)."""

    step: int = 30
    """Epochs between decays of --lr-decay step."""

    schedule: tuple[int, ...] = (30, 60, 85, 95, 105)
    """Epochs of the decays of --lr-decay schedule."""

    gamma: float = 0.1
    """Factor of a decay of step and schedule."""

    warmup: Annotated[int | None, arg(metavar="INT")] = None
    """Epochs in which the learning rate rises linearly. Unset: the recipe's (paper 0, modern up to 5)."""

    clip_grad: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Largest norm of the gradients. Unset: 0, not clipped."""

    kd: bool = True
    """Distil from the ensemble (and the larger sizes) to each size."""

    kd_type: Annotated[Literal["ens_topdown", "ens"], arg(aliases=("-t",))] = "ens_topdown"
    """ens_topdown: ensemble and larger sizes teach; ens: the ensemble alone."""

    sizes_per_step: Annotated[int | None, arg(metavar="INT")] = None
    """Sizes in a step: the largest and others, drawn at random. Unset: all, as in the paper."""

    label_smoothing: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Share of the label that is spread over all classes. Unset: the recipe's (paper 0, modern 0.1)."""

    ema: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Decay, per update, of averaged weights, which are evaluated; 0: none. Unset: the recipe's."""

    mixup: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Mix images by Beta(a, a) of this a, alike at all sizes. Unset: 0, no."""

    cutmix: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Paste a neighbour's box by Beta(a, a) of this a, alike at all sizes. Unset: 0, no."""

    auto_augment: Annotated[AutoAugmentOption | None, arg(metavar="{none,trivial,rand}")] = None
    """TrivialAugment or RandAugment on the crop (not of train_ffcv.py). Unset: none."""

    normalize: Annotated[Literal["imagenet", "unit"] | None, arg(metavar="{imagenet,unit}")] = None
    """imagenet: mean and std; unit: [0, 1], what the original's checkpoints expect. Unset: imagenet."""

    flip: Literal["independent", "shared"] = "independent"
    """Each size draws its own flip, as in the original, or all share one."""

    amp: Annotated[Literal["bf16", "fp16", "off"] | None, arg(metavar="{bf16,fp16,off}")] = None
    """Mixed precision. Unset: bf16 where the device computes it, else off."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    compile: bool = False
    """Compile a step's forward and backward, all sizes in one graph (torch.compile): minutes at the start."""

    recompute: Literal["off", "norm", "blocks"] = "off"
    """Save memory: keep outputs of convolutions, or inputs of blocks, and compute the rest twice."""

    sync_bn: bool = False
    """BatchNorm over the batches of all processes, still private to each size; needs GPUs."""

    grad_compress: Literal["bf16", "off"] = "off"
    """Send gradients between processes in bfloat16."""

    timeout: float = 600.0
    """Seconds after which a process that does not answer ends the run."""

    seed: Annotated[int | None, arg(metavar="INT")] = None
    """Seed of initialisation, order, crops and flips. Unset: 0."""

    deterministic: bool = False
    """Only kernels that give the same bits every time; slower on a GPU."""

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

    keep: int = 2
    """Last checkpoints to keep; the best is kept besides."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written: the one before it stays in any case."""

    on_nonfinite: Annotated[tuple[str, ...], arg(metavar="stop|skip INT")] = ("stop",)
    """What to do if a loss is NaN or infinite; skip: leave out up to so many updates in a row."""

    evaluate: Annotated[bool, arg(aliases=("-e",))] = False
    """Only evaluate --resume's checkpoint, with its arch, sizes and normalisation unless given."""

    profile: bool = False
    """Train nothing; measure where the time of a step goes, and write it to --output/profile."""

    profile_steps: int = 20
    """Steps that --profile measures of each kind."""

    profile_sweep: Annotated[str | None, arg(metavar="OPTION[,OPTION...]")] = None
    """--profile, then try other values of workers, prefetch, decoder-hw-load, batch-size; print the best."""

    profile_limit: float = 300.0
    """Seconds that --profile-sweep may try values for."""

    output: Annotated[Path | None, arg(aliases=("-c", "--checkpoint"), metavar="DIR")] = None
    """Run directory. Unset: runs/ARCH."""

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

    def __post_init__(self) -> None:
        for flag, value, fine, rule in option_rules(self):
            if value is not None and not fine(value):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"{flag} {shown}".rstrip() + f": {rule}")
        if self.evaluate and self.is_profile:
            raise UsageError("--evaluate and --profile: choose one of them")
        if self.pretrained is not None and self.init_from is not None:
            raise UsageError("--pretrained and --init-from: choose one of them to start from")
        if self.compile and self.recompute != "off":
            raise UsageError(
                "--compile and --recompute: choose one; the compiler recomputes by itself"
            )
        if self.evaluate and self.resume is None:
            raise UsageError(
                "--evaluate: say which checkpoint, with --resume PATH or --resume auto"
            )
        if self.evaluate and self.init_from is not None:
            raise UsageError("--init-from: a training starts from it; --evaluate takes --resume")

    @property
    def is_profile(self) -> bool:
        """Whether to measure instead of training."""
        return self.profile or self.profile_sweep is not None


def to_plain_dict(options: Any) -> dict[str, Any]:
    """A dataclass as JSON and `torch.load(weights_only=True)` take it."""
    plain = dataclasses.asdict(options)
    return {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in plain.items()
    }


if TYPE_CHECKING:
    pass


def option_rules(c: TrainConfig) -> list[tuple[str, Any, Any, str]]:
    """(flag, value, predicate, rule) of all that can be checked without data or network."""

    def positive(x: float) -> bool:
        return math.isfinite(x) and x > 0

    def not_negative(x: float) -> bool:
        return math.isfinite(x) and x >= 0

    def share(x: float) -> bool:
        return 0 <= x < 1

    def bits(n: int) -> bool:
        return n in BITS or n == FULL

    def of_a_beta(x: float) -> bool:
        # Beyond, all shares are 1/2, and drawing them takes ever longer.
        return 0 <= x <= 100

    def is_interval(text: str) -> bool:
        return re.fullmatch(r"\d+|\d+(\.\d+)?m", text) is not None

    def is_reaction(words: tuple[str, ...]) -> bool:
        return words == ("stop",) or (
            len(words) == 2 and words[0] == "skip" and words[1].isdecimal() and int(words[1]) > 0
        )

    def distinct_positive(sizes: tuple[int, ...]) -> bool:
        return bool(sizes) and min(sizes) > 0 and len(set(sizes)) == len(sizes)

    return [
        (
            "--sizes",
            c.sizes,
            distinct_positive,
            "give one or more sizes, positive and all different",
        ),
        ("--num-classes", c.num_classes, lambda n: n >= 2, "at least 2"),
        ("--width-mult", c.width_mult, positive, "must be a positive number"),
        ("--qw", c.qw, bits, "from 1 to 8, or 32 for full precision"),
        ("--qa", c.qa, bits, "from 1 to 8, or 32 for full precision"),
        ("--ema", c.ema, share, "must be at least 0 and less than 1"),
        ("--mixup", c.mixup, of_a_beta, "must be from 0 to 100"),
        ("--cutmix", c.cutmix, of_a_beta, "must be from 0 to 100"),
        ("--epochs", c.epochs, positive, "at least 1 epoch is needed"),
        ("--batch-size", c.batch_size, positive, "at least 1 image is needed"),
        ("--accumulate", c.accumulate, positive, "at least 1 batch is needed"),
        ("--lr", c.lr, positive, "must be a positive number"),
        ("--momentum", c.momentum, share, "must be at least 0 and less than 1"),
        ("--weight-decay", c.weight_decay, not_negative, "must be 0 or a positive number"),
        ("--step", c.step, positive, "at least 1 epoch"),
        ("--schedule", c.schedule, lambda s: all(e > 0 for e in s), "epochs are positive"),
        ("--gamma", c.gamma, positive, "must be a positive number"),
        ("--warmup", c.warmup, not_negative, "must be 0 or a number of epochs"),
        ("--clip-grad", c.clip_grad, not_negative, "must be 0 or a positive number"),
        ("--sizes-per-step", c.sizes_per_step, positive, "at least 2 sizes are needed"),
        ("--label-smoothing", c.label_smoothing, share, "must be at least 0 and less than 1"),
        (
            "--checkpoint-every",
            c.checkpoint_every,
            is_interval,
            "a number of updates, or of minutes as in 10m",
        ),
        ("--keep", c.keep, positive, "at least 1"),
        ("--on-nonfinite", c.on_nonfinite, is_reaction, "stop, or skip and a number of updates"),
        ("--profile-steps", c.profile_steps, positive, "at least 1 step"),
        ("--profile-limit", c.profile_limit, positive, "must be a positive number of seconds"),
        ("--timeout", c.timeout, positive, "must be a positive number of seconds"),
        ("--seed", c.seed, lambda n: 0 <= n < 2**63, "must be from 0 to 2^63 - 1"),
        ("--log-interval", c.log_interval, positive, "at least 1 step"),
    ]
