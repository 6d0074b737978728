"""Description of a switchable network, without its weights. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from pipelines.transforms import EVAL_CROP_RATIO, RESIZE_FILTER

# resnet: the network as its library has it; preact: `rsnet.models.preact_resnet`, with shortcut B or A.
Mode = Literal["resnet", "preact", "preact_typeA"]
Stem = Literal["imagenet", "small"]
Norm = Literal["private", "shared"]
NormalizeName = Literal["imagenet", "unit", "inception", "clip", "dpn"]

BITS = range(1, 9)
FULL = 32  # bits of what is not quantized
DEFAULT_SIZES = (224, 192, 160, 128, 96)

PREFIX = "parallel_"
TIMM_PREFIX = PREFIX + "timm/"

# The original's names of networks that torchvision spells differently.
AUTHORS_NAMES = {"mobilenet_v2": "mobilenetv2"}


def canonical_arch(name: str) -> str:
    """Return the name under which a network is recorded, the authors', of its library's or its bare one.

    parallel_mobilenetv2 is that of parallel_mobilenet_v2, mobilenetv2 and mobilenet_v2.
    """
    bare = name.removeprefix(PREFIX)
    return PREFIX + AUTHORS_NAMES.get(bare, bare)


@dataclass(frozen=True)
class ModelConfig:
    """A network and the images that it expects: enough to build it and to feed it.

    Checkpoints and releases keep it under "network". Every field is an option of training, too.
    """

    arch: str
    """parallel_<torchvision name> or parallel_timm/<timm name>; without parallel_ it is completed."""

    num_classes: int
    sizes: tuple[int, ...]
    """Input sizes in pixels; kept from the largest to the smallest."""

    _: KW_ONLY
    width_mult: float = 1.0
    stem: Stem = "imagenet"
    norm: Norm = "private"
    blurpool: bool = False
    mode: Mode = "resnet"
    qw: int = FULL
    qa: int = FULL
    tf_padding: bool = False
    classes: tuple[str, ...] = ()
    """Names of the classes; empty if they are not known."""

    normalize: NormalizeName = "imagenet"
    eval_crop_ratio: float = EVAL_CROP_RATIO
    interpolation: str = RESIZE_FILTER
    calibrated: Mapping[str, str] = field(default_factory=dict, hash=False)  # no dict has one
    """Sizes that were added after the training, and how their BatchNorm was made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", canonical_arch(self.arch))
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes, reverse=True)))
        object.__setattr__(self, "classes", tuple(self.classes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Return what `to_dict` gave, or an object that has such attributes among others.

        What is missing has its default: earlier versions did not write every field.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, as checkpoints and JSON keep them."""
        values = {**dataclasses.asdict(self), "sizes": list(self.sizes)}
        values["classes"] = list(self.classes)
        if not self.calibrated:
            del values["calibrated"]
        return values

    def with_sizes(self, sizes: Iterable[int]) -> ModelConfig:
        """Return the same network at other sizes."""
        return dataclasses.replace(self, sizes=tuple(sizes))

    @property
    def is_quantized(self) -> bool:
        """Whether weights or activations are quantized."""
        return self.qw != FULL or self.qa != FULL


# Fields that must be the same for a network to load the weights of another.
WEIGHT_FIELDS = (
    "arch", "width_mult", "stem", "norm", "blurpool", "mode", "qw", "qa", "tf_padding", "num_classes",
)  # fmt: skip

# What a network is if a checkpoint of an earlier version does not say.
MODEL_DEFAULTS: dict[str, Any] = {
    f.name: f.default
    for f in dataclasses.fields(ModelConfig)
    if f.name in (*WEIGHT_FIELDS, "normalize") and f.default is not dataclasses.MISSING
}
