"""Recipes (`--recipe paper|short|strong`): defaults of the training options that are not given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

RecipeName = Literal["paper", "short", "strong"]

# What version 0.1.0 called them.
FORMER_NAMES: dict[str, RecipeName] = {"modern": "short"}


def by_new_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options, as a file has them, with the names of today."""
    named = {"opt" if name == "sgd" else name: value for name, value in options.items()}
    new = FORMER_NAMES.get(str(named.get("recipe")))
    return named | {"recipe": new} if new else named


@dataclass(frozen=True)
class Recipe:
    """Every field is an option of the same name, which overrides it. `lr` is for 256 images an update."""

    epochs: int
    lr: float
    weight_decay: float
    lr_decay: Literal["cosine", "step", "linear", "schedule"] = "cosine"
    warmup: int = 0
    label_smoothing: float = 0.0
    decay: Literal["all", "weights"] = "all"
    opt: Literal["plain", "nesterov"] = "plain"
    ema: float = 0.0
    flip: Literal["independent", "shared"] = "independent"
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: Literal["none", "trivial", "rand"] = "none"
    random_erase: float = 0.0
    ra_reps: int = 1
    train_size_scale: float = 1.0


# Wang et al. 2020, section 4.1, and the authors' code: weight decay on every parameter, no warm-up.
PAPER = Recipe(epochs=120, lr=0.1, weight_decay=1e-4)
PAPER_MOBILENET = Recipe(epochs=150, lr=0.05, weight_decay=4e-5)
# The authors' code for quantized networks: with --schedule, a tenth at epochs 30, 60, 85, 95 and 105.
PAPER_QUANTIZED = Recipe(
    epochs=120, lr=0.1, weight_decay=5e-5, lr_decay="schedule", decay="weights", opt="nesterov"
)

# By the epochs that it is at least for. Label smoothing 0.1, warm-up of 5 epochs and no decay of
# norms, biases (and here alpha): He et al. 2019 ("Bag of Tricks"), sections 3.1 and 5.2. The short
# schedules are ffcv-imagenet's (Leclerc et al. 2023, rn50_configs): peak at epoch 2, then linearly to
# zero, blurred strided convolutions (Zhang 2019). Averaged weights: Polyak & Juditsky 1992, as timm and
# torchvision's references have them. None of these has been measured on ImageNet with this trainer.
SHORT_SCHEDULES: dict[int, tuple[int, Literal["cosine", "linear"]]] = {
    0: (0, "cosine"),  # epochs: warm-up epochs, decay
    8: (1, "linear"),
    16: (2, "linear"),
    30: (2, "linear"),
    88: (5, "cosine"),
    120: (5, "cosine"),
}

# torchvision's new recipe (Vryniotis 2021, "How to Train State-Of-The-Art Models Using TorchVision's Latest
# Primitives"; references/classification, README, ResNet50_Weights.IMAGENET1K_V2): 600 epochs, 0.5 for 1,024
# images an update, 5 of warm-up, weight decay 2e-5 but none on norms, label smoothing 0.1, mixup 0.2 and
# CutMix 1.0, one of them each batch, TrivialAugmentWide, random erasing 0.1, repeated augmentation 4, weights
# averaged, and training at 176 for tests at 224. Chosen over timm's A2 (Wightman et al. 2021: LAMB, BCE, 300
# epochs), because it keeps the paper's SGD and cross-entropy, with which its losses are balanced. All
# sizes see one picture, so they share its flip. Otherwise than there, biases do not decay either, the warm-up
# begins at 0, and the average is that of `short`.
STRONG_EPOCHS, STRONG_LR, STRONG_WEIGHT_DECAY = 600, 0.125, 2e-5
STRONG: dict[str, Any] = {
    "lr_decay": "cosine",
    "warmup": 5,
    "flip": "shared",
    "mixup": 0.2,
    "cutmix": 1.0,
    "auto_augment": "trivial",
    "random_erase": 0.1,
    "ra_reps": 4,
    "train_size_scale": 176 / 224,
}

# Share of an update's images, of ImageNet's in a training of 120 epochs at 256 images an update, that the
# averaged weights take over: 1 / 10,000 (timm's --model-ema-decay 0.9999 for such batches).
EMA_STEP = 1e-4
EMA_BATCH, EMA_EPOCHS = 256, 120


def get_recipe(
    name: RecipeName, arch: str, epochs: int | None, global_batch: int, quantized: bool = False
) -> Recipe:
    """Return the recipe for an arch; MobileNets and quantized networks have their own paper recipes.

    epochs: None for the recipe's own.

    short and strong fit the averaging to epochs and batch, short its warm-up and decay to the epochs.
    """
    paper = PAPER_MOBILENET if "mobilenet" in arch else PAPER
    if quantized:
        paper = PAPER_QUANTIZED
    if name == "paper":
        return paper
    is_strong = name == "strong"
    epochs = epochs or (STRONG_EPOCHS if is_strong else paper.epochs)
    # The average reaches back over the same share of the training whatever its length and batch size,
    # as torchvision's references scale it: 2 epochs of 120.
    step = EMA_STEP * global_batch / EMA_BATCH * EMA_EPOCHS / epochs
    warmup, decay = SHORT_SCHEDULES[max(e for e in SHORT_SCHEDULES if e <= epochs)]
    short = Recipe(
        epochs=epochs,
        lr=paper.lr,
        weight_decay=paper.weight_decay,
        lr_decay=decay,
        warmup=warmup,
        label_smoothing=0.1,
        decay="weights",
        opt=paper.opt,
        ema=round(1 - min(step, 0.1), 6),
    )
    if not is_strong:
        return short
    lr = STRONG_LR if paper is PAPER else paper.lr
    return replace(short, lr=lr, weight_decay=STRONG_WEIGHT_DECAY, **STRONG)
