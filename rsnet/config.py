"""The options of a training run, their rules, and what is left unset resolves to. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from pipelines.errors import UsageError

DEFAULT_ARCH = "parallel_resnet50"
DEFAULT_SIZES = (224, 192, 160, 128, 96)
# Per process. Five ResNet-50 graphs of 32 images keep 4 GB, of 256 images 30 GB (bfloat16).
DEFAULT_BATCH_SIZE = {"cuda": 256, "cpu": 32}


@dataclass(frozen=True)
class Recipe:
    """What the paper trains an arch with (Wang et al. 2020, section 4.1); `lr` is for 256 images a step."""

    epochs: int = 120
    lr: float = 0.1
    weight_decay: float = 1e-4


MOBILENET = Recipe(epochs=150, lr=0.05, weight_decay=4e-5)


def recipe_of(arch: str) -> Recipe:
    """MobileNets have their own recipe, everything else has the ResNets'."""
    return MOBILENET if "mobilenet" in arch else Recipe()


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
    """Width of the network's layers, where it has a choice (MobileNetV2)."""

    epochs: Annotated[int | None, arg(metavar="INT")] = None
    """Unset: the paper's 120, or 150 for MobileNets."""

    batch_size: Annotated[int | None, arg(aliases=("-b",), metavar="INT")] = None
    """Images per process and step. Unset: 256 on a GPU, 32 on a CPU."""

    accumulate: int = 1
    """Batches whose gradients make up one update."""

    lr: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate. Unset: the paper's 0.1 (MobileNets 0.05) times global batch / 256."""

    momentum: float = 0.9
    """SGD's momentum."""

    weight_decay: Annotated[float | None, arg(aliases=("--wd",), metavar="FLOAT")] = None
    """On all parameters. Unset: the paper's 1e-4 (MobileNets 4e-5)."""

    lr_decay: Literal["cosine", "step", "linear", "schedule"] = "cosine"
    """cosine and linear fall to zero by iteration; step and schedule by --gamma at epochs."""

    step: int = 30
    """Epochs between decays of --lr-decay step."""

    schedule: tuple[int, ...] = (30, 60, 85, 95, 105)
    """Epochs of the decays of --lr-decay schedule."""

    gamma: float = 0.1
    """Factor of a decay of step and schedule."""

    warmup: int = 0
    """Epochs in which the learning rate rises linearly (the paper's option: 5)."""

    clip_grad: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Largest norm of the gradients. Unset: not clipped."""

    kd: bool = True
    """Distil from the ensemble (and the larger sizes) to each size."""

    kd_type: Annotated[Literal["ens_topdown", "ens"], arg(aliases=("-t",))] = "ens_topdown"
    """ens_topdown: ensemble and larger sizes teach; ens: the ensemble alone."""

    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes."""

    normalize: Annotated[Literal["imagenet", "unit"] | None, arg(metavar="{imagenet,unit}")] = None
    """imagenet: mean and std; unit: [0, 1], what the original's checkpoints expect. Unset: imagenet."""

    flip: Literal["independent", "shared"] = "independent"
    """Each size draws its own flip, as in the original, or all share one."""

    amp: Annotated[Literal["bf16", "fp16", "off"] | None, arg(metavar="{bf16,fp16,off}")] = None
    """Mixed precision. Unset: bf16 where the device computes it, else off."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    seed: int = 0
    """Seed of initialisation, order, crops and flips."""

    resume: Annotated[str | None, arg(metavar="auto|PATH")] = None
    """Continue from a checkpoint; auto: the last one of --output, if there is one."""

    evaluate: Annotated[bool, arg(aliases=("-e",))] = False
    """Only evaluate --resume's checkpoint, with its arch, sizes and normalisation unless given."""

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
        for flag, value, fine, rule in _checks(self):
            if value is not None and not fine(value):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"{flag} {shown}".rstrip() + f": {rule}")
        if self.evaluate and self.resume is None:
            raise UsageError(
                "--evaluate: say which checkpoint, with --resume PATH or --resume auto"
            )


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """A `TrainConfig` in which nothing is left unset that the run depends on."""

    arch: str = DEFAULT_ARCH
    sizes: tuple[int, ...] = DEFAULT_SIZES
    epochs: int = 0
    batch_size: int = 0
    lr: float = 0.0
    weight_decay: float = 0.0
    normalize: Literal["imagenet", "unit"] = "imagenet"
    amp: Literal["bf16", "fp16", "off"] = "off"
    output: Path = Path()


def output_of(config: TrainConfig, arch: str) -> Path:
    """The run directory: --output, or one per arch."""
    return config.output or Path("runs", arch.replace("/", "_"))


def resolve(
    config: TrainConfig,
    *,
    world_size: int,
    device_type: Literal["cuda", "cpu"],
    has_bf16: bool,
    trained: Mapping[str, Any] | None = None,
    previous: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Fill in, once, what was left unset: from the checkpoint, then the recipe.

    trained: the checkpoint's description of its network. previous: its run's configuration, if that
    run is to be continued.
    """
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if previous:
        # The learning rate belongs to its batch size: it is taken over with it or scaled anew.
        taken = {"epochs", "weight_decay", "clip_grad"}
        taken |= {"batch_size", "lr"} if config.batch_size is None else set()
        given |= {k: previous[k] for k in taken if given[k] is None}
    known = trained or {}
    arch = config.arch or known.get("arch", DEFAULT_ARCH)
    recipe = recipe_of(arch)
    batch_size = given["batch_size"] or DEFAULT_BATCH_SIZE[device_type]
    global_batch = batch_size * world_size * config.accumulate
    sizes = config.sizes or known.get("sizes", DEFAULT_SIZES)
    defaults = {
        "epochs": recipe.epochs,
        "lr": recipe.lr * global_batch / 256,
        "weight_decay": recipe.weight_decay,
        "normalize": known.get("normalize", "imagenet"),
        "amp": "bf16" if has_bf16 else "off",
        "output": output_of(config, arch),
    }
    fixed = {
        "arch": arch,
        "batch_size": batch_size,
        "sizes": tuple(sorted(sizes, reverse=True)),
    }
    unset = {k: v for k, v in defaults.items() if given[k] is None}
    if config.num_classes is None and "num_classes" in known:
        unset["num_classes"] = known["num_classes"]
    if config.width_mult == 1.0:
        unset["width_mult"] = known.get("width_mult", 1.0)
    return ResolvedConfig(**(given | unset | fixed))


def as_plain(options: Any) -> dict[str, Any]:
    """A dataclass as JSON and `torch.load(weights_only=True)` take it."""
    plain = dataclasses.asdict(options)
    return {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in plain.items()
    }


def _checks(c: TrainConfig) -> list[tuple[str, Any, Any, str]]:
    """(flag, value, predicate, rule) of all that can be checked without data or network."""

    def positive(x: float) -> bool:
        return math.isfinite(x) and x > 0

    def not_negative(x: float) -> bool:
        return math.isfinite(x) and x >= 0

    def share(x: float) -> bool:
        return 0 <= x < 1

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
        ("--clip-grad", c.clip_grad, positive, "must be a positive number"),
        ("--label-smoothing", c.label_smoothing, share, "must be at least 0 and less than 1"),
        ("--seed", c.seed, lambda n: 0 <= n < 2**63, "must be from 0 to 2^63 - 1"),
        ("--log-interval", c.log_interval, positive, "at least 1 step"),
    ]
