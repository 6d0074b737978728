"""Defaults of unset options: the checkpoint's values, then the recipe's. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Never

from pipelines.sources.options import SplitOptions
from pipelines.sources.patterns import is_pattern
from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.location import Location, Url, location, url_of
from pipelines.utils.schema import read_json
from rsnet.config import size_schedule
from rsnet.config.model_config import DEFAULT_SIZES, FULL, MODEL_DEFAULTS, ModelConfig
from rsnet.config.optimizers import (
    LR_AND_WEIGHT_DECAY,
    OptName,
    is_of_other_optimizer,
    rate_and_decay,
)
from rsnet.config.recipes import RecipeName, get_recipe
from rsnet.config.run_topics import DEFAULT_KEEP
from rsnet.config.size_schedule import Phase
from rsnet.config.topics import DEFAULT_ARCH, DEFAULT_BATCH_SIZE
from rsnet.config.train_config import TrainConfig, TrainOptions

# Options that a resumed run takes from its earlier part, unless they are given again; those of a recipe only
# as long as that stays the same.
OF_A_RECIPE = {
    "auto_augment",
    "cutmix",
    "decay",
    "ema",
    "flip",
    "label_smoothing",
    "lr_decay",
    "mixup",
    "opt",
    "ra_reps",
    "random_erase",
    "train_size_scale",
    "warmup",
}
TAKEN_OVER = OF_A_RECIPE | {
    "balanced_sampling", "bce_target_thresh", "class_weights", "clip_grad", "drop_path", "epochs",
    "fixed_qa", "freeze", "gamma", "kd", "kd_type", "keep", "layer_decay", "loss", "momentum",
    "norm_lr_mult", "on_nonfinite", "pretrained", "ra_magnitude", "recipe", "schedule", "seed",
    "size_schedule", "sizes_per_step", "step", "teacher", "teacher_size", "teacher_temperature",
    "teacher_weight", "val_data", "val_fraction", "weight_decay",
}  # fmt: skip

# Options that no recipe sets.
DEFAULTS: dict[str, Any] = {
    "seed": 0, "clip_grad": 0.0, "ra_magnitude": 9, "freeze": "none", "layer_decay": 1.0, "norm_lr_mult": 1.0,
    "loss": "ce", "bce_target_thresh": 0.0, "teacher": "none", "teacher_weight": 1.0,
    "teacher_temperature": 1.0, "size_schedule": size_schedule.WITHOUT, "momentum": 0.9,
    "kd": True, "kd_type": "ens_topdown", "balanced_sampling": False, "fixed_qa": False, "keep": DEFAULT_KEEP,
    "on_nonfinite": ("stop",), "step": 30, "schedule": (30, 60, 85, 95, 105), "gamma": 0.1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainOptions[Never]):
    """Options of a run, with a value for each `... | Unset`."""

    def global_batch(self, world_size: int) -> int:
        """Return the images of an update."""
        return self.batch_size * world_size * self.accumulate

    def model_config(self, classes: Sequence[str], num_classes: int) -> ModelConfig:
        """Return the description of this run's network. `num_classes` may exceed the known `classes`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ModelConfig.from_dict(values | {"classes": classes, "num_classes": num_classes})

    @property
    def placed(self) -> SplitOptions:
        """Where the validation images are."""
        return SplitOptions(self.val_data, self.val_fraction)

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Sizes of the training images, in the order of `sizes`, whose BatchNorm they go through."""
        if self.train_size_scale == 1:
            return self.sizes
        scaled = (size * self.train_size_scale for size in self.sizes)
        # Composer's multiple in progressive resizing; a half is rounded down, so that 16 * 0.875 becomes 12.
        nearest = (max(4 * math.ceil(size / 4 - 0.5), 4) for size in scaled)
        return tuple(map(min, nearest, self.sizes))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the training, by the sizes that take part in its steps."""
        return size_schedule.phases_of(self.size_schedule, self.sizes)

    @property
    def has_all_sizes(self) -> bool:
        """Whether every step trains all sizes."""
        always = all(phase.sizes == self.sizes for phase in self.phases)
        return always and self.sizes_per_step == len(self.sizes)

    @property
    def folder(self) -> Path:
        """The run directory on this machine."""
        return _folder(self.output)

    @property
    def is_quantized(self) -> bool:
        """Whether weights or activations are quantized."""
        return self.qw != FULL or self.qa != FULL

    @property
    def never_decays(self) -> bool:
        """Whether the training ends before the schedule of its learning rate begins."""
        return self.lr_decay == "schedule" and self.epochs <= min(self.schedule, default=0)

    @property
    def most_skipped(self) -> int:
        """Updates in a row that may be left out because a loss or gradient is not finite."""
        return int(self.on_nonfinite[1]) if self.on_nonfinite[0] == "skip" else 0


def output_directory(config: TrainConfig, arch: str) -> Path:
    """Return the run directory on this machine: that of --output, or one per arch and data."""
    if config.output is not None:
        return _folder(config.output)
    name = arch.replace("/", "_")
    older = Path("runs", name)  # version 0.1.0's, where it holds a run of this data
    if _data_of(older / "config.json") == str(location(config.data)):
        return older
    return Path("runs", "-".join(filter(None, (name, _data_name(location(config.data))))))


def _folder(output: str) -> Path:
    """Return the run directory of an --output; of one in object storage, the folder of that name in runs."""
    url = url_of(output)
    return Path("runs", url.name) if url else Path(output)


def _data_name(data: Location) -> str:
    """Return what --data is called: a folder's name, a table's without suffix, the folder of shards."""
    if isinstance(data, Url):
        return data.parent.name if is_pattern(data.name) else data.name
    if data.is_dir() or not data.suffix:
        return data.resolve().name
    return data.resolve().parent.name if data.suffix == ".tar" else data.stem


def _data_of(path: Path) -> Any:
    """Return the --data of the run that a config.json is of; None if it is of none."""
    try:
        noted = read_json(path, "it is left alone")
    except DataError:  # also if there is none
        return None
    return noted.get("data") if isinstance(noted, dict) else None


def wandb_project() -> str:
    """Return the default W&B project: WANDB_PROJECT, else rsnet."""
    return os.environ.get("WANDB_PROJECT") or "rsnet"


def resolve(
    config: TrainConfig,
    *,
    world_size: int,
    device_type: Literal["cuda", "cpu"],
    has_bf16: bool,
    trained: ModelConfig | None = None,
    initial: ModelConfig | None = None,
    previous: Mapping[str, Any] | None = None,
    previous_global_batch: int | None = None,
) -> ResolvedConfig:
    """Fill in what was left unset: from the checkpoint, then the recipe.

    trained: the checkpoint's network. initial: that of the RS-Net of --pretrained. previous: the
    checkpoint's run's configuration, if that run is to be continued, and the images of one of its updates.
    """
    given = _given(config, previous, previous_global_batch, world_size)
    known = _known_network(trained, initial, previous)
    arch = config.arch or known.get("arch", DEFAULT_ARCH)
    batch_size = given["batch_size"] or DEFAULT_BATCH_SIZE[device_type]
    accumulate = given["accumulate"] or 1
    global_batch = batch_size * world_size * accumulate
    is_other = given["lr"] is not None or is_of_other_optimizer(given["opt"], previous or {})
    if previous and previous_global_batch and "lr" in previous and not is_other:
        given["lr"] = previous["lr"] * (global_batch / previous_global_batch)
    recipe_name: RecipeName = given["recipe"] or "paper"
    bits = [given[name] or known.get(name, FULL) for name in ("qw", "qa")]
    recipe = get_recipe(
        recipe_name, arch, given["epochs"], global_batch, quantized=min(bits) < FULL
    )
    own = rate_and_decay(given["opt"] or recipe.opt, recipe)
    sizes = config.sizes or known.get("sizes", DEFAULT_SIZES)
    _check_sizes_per_step(given["sizes_per_step"] or len(sizes), len(sizes))
    defaults = {
        **dataclasses.asdict(recipe),
        **{name: known.get(name, value) for name, value in MODEL_DEFAULTS.items()},
        **DEFAULTS,
        "recipe": recipe_name,
        "lr": own["lr"] * global_batch / 256,
        "weight_decay": own["weight_decay"],
        "sizes_per_step": len(sizes),
        "amp": "bf16" if has_bf16 else "off",
        "output": str(output_directory(config, arch)),
        "num_classes": known.get("num_classes"),
        **_wandb_defaults(),
    }
    # On the command line these are not None where they are not given.
    not_given = {"width_mult": 1.0, "blurpool": False, "tf_padding": False, "wandb_tags": ()}
    unset = {name: value for name, value in defaults.items() if given[name] == not_given.get(name)}
    values = given | unset | {"arch": arch, "batch_size": batch_size, "accumulate": accumulate}
    values["sizes"] = tuple(sorted(sizes, reverse=True))
    values["size_schedule"] = _schedule_of(values)
    for name in ("schedule", "on_nonfinite"):
        values[name] = tuple(values[name])  # a list in a checkpoint
    if values["class_weights"] == "none":
        values["class_weights"] = None
    resolved = ResolvedConfig(**values)
    _check_combinations(resolved)
    if resolved.freeze != "none" and resolved.pretrained is None and trained is None:
        raise UsageError(
            f"--freeze {resolved.freeze}: there is nothing to keep without --pretrained"
        )
    return resolved


def _known_network(
    trained: ModelConfig | None, initial: ModelConfig | None, previous: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the fields of the network that are decided already: by the checkpoint, by a run that has none
    yet, or by the RS-Net of --pretrained, whose number of classes may change."""
    if trained:
        return trained.to_dict()
    if previous:
        names = ("arch", "num_classes", "sizes", *MODEL_DEFAULTS)
        return {name: previous[name] for name in names if name in previous}
    known = initial.to_dict() if initial else {}
    known.pop("num_classes", None)
    return known


def _wandb_defaults() -> dict[str, Any]:
    """Return the defaults of W&B's options, which environment variables may set."""
    return {
        "wandb_project": wandb_project(),
        "wandb_name": os.environ.get("WANDB_NAME") or None,
        "wandb_entity": os.environ.get("WANDB_ENTITY") or None,
        "wandb_tags": tuple(filter(None, os.environ.get("WANDB_TAGS", "").split(","))),
    }


def _check_combinations(c: ResolvedConfig) -> None:
    """Raise UsageError for options that exclude each other once they are resolved."""
    _check_quantization(c)
    _check_cuda_graphs(c)
    if c.bce_target_thresh and c.loss != "bce":
        raise UsageError(
            f"--bce-target-thresh {c.bce_target_thresh}: needs --loss bce; give 0, or that loss"
        )


def recipe_defaults(config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    """Return the value that each option has where none is given, for the network and batches of `config`.

    Learning rate and averaging follow the images of an update, short's and strong's parts the epochs.
    """
    global_batch, quantized = config.global_batch(world_size), config.is_quantized
    own, fitted = (
        get_recipe(config.recipe, config.arch, epochs, global_batch, quantized=quantized)
        for epochs in (None, config.epochs)
    )
    optimizers = rate_and_decay(config.opt, fitted)
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    return (
        fields
        | MODEL_DEFAULTS
        | DEFAULTS
        | dataclasses.asdict(fitted)
        | {
            "recipe": "paper",
            "epochs": own.epochs,
            "lr": optimizers["lr"] * global_batch / 256,
            "weight_decay": optimizers["weight_decay"],
            "sizes": DEFAULT_SIZES,
            "sizes_per_step": len(config.sizes),
            "wandb_project": wandb_project(),
        }
    )


def of_its_own(run: Mapping[str, Any], opt: OptName | None, recipe: str | None) -> set[str]:
    """Return the options of a run that are replaced because another optimizer or recipe, or other sizes,
    are given.

    opt, recipe: those that are given; None for the run's.
    """
    found: set[str] = set()
    if recipe not in (None, run.get("recipe")):
        found |= OF_A_RECIPE
        if run.get("opt") in LR_AND_WEIGHT_DECAY:  # which is no recipe's
            found.remove("opt")
    if is_of_other_optimizer(opt, run):
        found.add("weight_decay")
    if run.get("sizes_per_step") == len(run.get("sizes", ())):
        found.add("sizes_per_step")  # all, also of other --sizes
    return found


def _given(
    config: TrainConfig,
    previous: Mapping[str, Any] | None,
    previous_global_batch: int | None,
    world_size: int,
) -> dict[str, Any]:
    """Return the options as given, with those that a resumed run takes from its earlier part."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if previous:
        taken = TAKEN_OVER - of_its_own(previous, config.opt, config.recipe)
        if config.val_data or config.val_fraction or "data" in config.allow_change:
            taken = taken - {"val_data", "val_fraction"}  # one of them; of the data
        if config.sizes and {*config.sizes} != {*previous.get("sizes", config.sizes)}:
            # It names those; a network refuses others, and says so.
            taken = taken - {"size_schedule"}
        given |= {k: previous.get(k) for k in taken if given[k] is None}
        if config.batch_size is None and config.accumulate is None:
            given |= _spread(previous_global_batch, world_size, previous)
    return given


def _check_sizes_per_step(k: int, sizes: int) -> None:
    if k > sizes:
        raise UsageError(f"--sizes-per-step {k}: --sizes has only {sizes}")
    if k == 1 < sizes:
        raise UsageError(
            "--sizes-per-step 1: only the largest size would be trained; give at least 2"
        )


def _schedule_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return --size-schedule in one spelling, whatever the order of its sizes. Raises UsageError."""
    words, sizes = values["size_schedule"], values["sizes"]
    if not size_schedule.is_schedule(words):  # of a file that was changed
        raise UsageError(f"--size-schedule {' '.join(map(str, words))}: is none; give another")
    size_schedule.require_valid(words, sizes, values["epochs"])
    return size_schedule.as_words(size_schedule.phases_of(words, sizes), sizes)


def _check_quantization(c: ResolvedConfig) -> None:
    if c.qa != FULL and c.mode == "resnet":
        raise UsageError(
            f"--qa {c.qa}: activations are quantized in --mode preact or preact_typeA; in --mode resnet "
            "the weights alone, as in the original"
        )
    if c.fixed_qa and c.qa == FULL:
        raise UsageError("--fixed-qa: there are no quantized activations without --qa")
    if c.fixed_qa and not all(c.sizes[0] in phase.sizes for phase in c.phases):
        raise UsageError(
            f"--fixed-qa: levels follow the largest size, which --size-schedule {' '.join(c.size_schedule)} "
            "leaves out at times; leave out one of them"
        )
    if c.blurpool and c.qa != FULL:
        raise UsageError(
            f"--blurpool: blurring moves activations off the levels of --qa {c.qa}; give only one of the two"
        )
    if c.freeze != "none" and c.is_quantized:
        raise UsageError(f"--freeze {c.freeze}: the quantizers of --qw and --qa follow the weights")


def _check_cuda_graphs(c: ResolvedConfig) -> None:
    if c.cuda_graphs and not c.has_all_sizes:
        fewer = (
            f"--sizes-per-step {c.sizes_per_step}"
            if c.sizes_per_step < len(c.sizes)
            else f"--size-schedule {' '.join(c.size_schedule)}"
        )
        raise UsageError(f"--cuda-graphs: a graph has all sizes in it, not {fewer}")
    if c.cuda_graphs and c.is_quantized:
        raise UsageError("--cuda-graphs: not with the quantizers of --qw and --qa; leave it out")


def _spread(
    global_batch: int | None, world_size: int, previous: Mapping[str, Any]
) -> dict[str, int | None]:
    """Return batch size and accumulation with which an update keeps its images on so many processes.

    The batch is the largest possible, up to what it was. What cannot be divided stays, and is refused later.
    """
    batch_size: int | None = previous.get("batch_size")
    if not global_batch or not batch_size or batch_size < 1 or global_batch % world_size:
        return {"batch_size": batch_size, "accumulate": previous.get("accumulate")}
    share = global_batch // world_size
    largest = max(n for n in range(1, batch_size + 1) if share % n == 0)
    return {"batch_size": largest, "accumulate": share // largest}
