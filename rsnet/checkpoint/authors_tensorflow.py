"""The variables of the authors' quantized training code (TensorFlow 1 and tensorpack), read into ours.

Their names: `imagenet/group1/block0/conv1/W`, in its scope `bn224/gamma`, `bn224/mean/EMA` of the size 224
and `weight_quant/basis`; `imagenet/linear/W`; `alpha`. Convolutions are (height, width, in, out), linear
layers (in, out), bases (K, out) or (K, 1), and the images BGR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mode

import torch
from torch import Tensor

from pipelines.utils.errors import DataError
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import BITS, FULL, PREFIX, Mode, ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.preact_resnet import LAYERS
from rsnet.models.quantization.lq_nets import DECAY
from rsnet.models.state_dict import describe_mismatch

SCOPE = "imagenet/"

# The scope of a module within its block or stage; {size} is of a BatchNorm, {last} the last convolution.
_SCOPES = {
    # of torchvision's ResNets
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"bn{i}": f"conv{i}/bn{{size:03}}" for i in (1, 2, 3)},
    "downsample.0": "convshortcut",
    "downsample.1": "convshortcut/bn{size:03}",
    # of `rsnet.models.preact_resnet`
    "before": "quant1",
    "before.bn": "bn-preact{size:03}/bn",
    "before.quant": "quant1",
    **{f"residual.conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"residual.act{i}.bn": f"conv{i}/bn{{size:03}}" for i in (1, 2)},
    **{f"residual.act{i}.quant": f"quant{i + 1}" for i in (1, 2)},
    "residual.bn": "conv{last}/bn{size:03}",
    "shortcut.0": "convshortcut",
    "shortcut.1": "convshortcut/bn{size:03}",
    "last.bn": "bn-last{size:03}/bn",
    "last.quant": "quant_last",
}
_OUTER_SCOPES = {"conv1": "conv0", "bn1": "conv0/bn{size:03}", "fc": "linear"}

_VARIABLES = {
    "weight": "W",
    "bias": "b",
    "basis": "ActivationQuantization/basis",
    "parametrizations.weight.original": "W",
    "parametrizations.weight.0.basis": "weight_quant/basis",
}
_NORM_VARIABLES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "mean/EMA",
    "running_var": "variance/EMA",
}

# Our names: stage, block, module in it, the number of a BatchNorm's size, tensor.
_OURS = re.compile(
    r"network\.(?:layer(\d)\.)?(?:(\d+)\.)?(.+?)\."
    r"(?:by_resolution\.(\d+)\.)?((?:parametrizations\.weight\.(?:0\.)?)?\w+)"
)


def is_of_model(name: str) -> bool:
    """Return whether a variable is the network's, not the optimizer's or a summary's."""
    return name == "alpha" or (name.startswith(SCOPE) and not name.endswith("/Momentum"))


def from_tensorflow(variables: Mapping[str, Tensor]) -> Checkpoint:
    """Return a checkpoint, made of the variables that `is_of_model` picks.

    Which network it is, its bits, sizes and classes are read off their names and shapes.

    Raises DataError if they are of no such network, with names and shapes of what does not fit, or of other
    bits than our networks can have; UsageError for sizes that those cannot have.
    """
    variables = {_without_outer_scope(name): value for name, value in variables.items()}
    config = _describe(variables)
    with torch.device("meta"):
        state = create_model(config).state_dict()
    names = _names(list(state), config.sizes)
    expected = {theirs: _their_shape(state[ours].shape) for ours, theirs in names.items()}
    if "alpha" not in variables:  # trained without distillation
        del expected["alpha"]
    for name in [n for n in expected if n.endswith("/basis")]:
        if any(name + part in variables for part in ("/biased", "/local_step")):
            expected |= {name + "/biased": expected[name], name + "/local_step": ()}
    if problems := describe_mismatch(expected, variables):
        raise DataError(f"the variables do not fit {config.arch}: {problems}")
    return Checkpoint(config, _filled(state, names, variables), of_authors=True)


def _without_outer_scope(name: str) -> str:
    """Remove the scope that TensorFlow repeats for what a moving average keeps: S/S/basis/biased."""
    return re.sub(rf"^{SCOPE}.*/(?={SCOPE}.*/basis/(biased|local_step)$)", "", name)


def _describe(variables: Mapping[str, Tensor]) -> ModelConfig:
    """Read off the variables which network they are of."""
    norms = [re.fullmatch(rf"{SCOPE}conv0/bn(\d+)/gamma", name) for name in variables]
    sizes = {int(m[1]) for m in norms if m}
    classifier = variables.get(f"{SCOPE}linear/W")
    if not sizes or classifier is None or classifier.ndim != 2:
        raise DataError(
            f"this is no network of the original's: {SCOPE}conv0/bn224/gamma, of this or other sizes, or "
            f"{SCOPE}linear/W (in, classes) is missing"
        )
    return ModelConfig(
        arch=PREFIX + _resnet(variables),
        num_classes=classifier.shape[1],
        sizes=tuple(sizes),
        mode=_mode(variables),
        qw=_bits(variables, "weight_quant/basis"),
        qa=_bits(variables, "ActivationQuantization/basis"),
        tf_padding=True,
    )


def _resnet(variables: Mapping[str, Tensor]) -> str:
    blocks = [re.match(rf"{SCOPE}group(\d)/block(\d+)/", name) for name in variables]
    counts = [
        max((1 + int(m[2]) for m in blocks if m and int(m[1]) == i), default=0) for i in range(4)
    ]
    bottleneck = any(name.endswith("/conv3/W") for name in variables)
    for name, layers in LAYERS.items():
        if layers == (counts, bottleneck):
            return name
    raise DataError(
        f"groups of {' '.join(map(str, counts))} blocks of {2 + bottleneck} convolutions are of no ResNet "
        "of the original's"
    )


def _mode(variables: Mapping[str, Tensor]) -> Mode:
    if not any(f"{SCOPE}group0/bn-last" in name for name in variables):
        return "resnet"
    has_b = any("/convshortcut/" in name for name in variables)
    return "preact" if has_b else "preact_typeA"


def _bits(variables: Mapping[str, Tensor], basis: str) -> int:
    """Return the length of most bases (K, ...) of a kind, FULL if there are none.

    Raises DataError above 8.
    """
    lengths = [len(v) for name, v in variables.items() if name.endswith(basis) and v.ndim > 0]
    bits = mode(lengths) if lengths else FULL
    if bits not in BITS and lengths:
        raise DataError(
            f"bases {basis} of {bits} numbers: from {BITS[0]} to {BITS[-1]} bits are known"
        )
    return bits


def _names(ours: Sequence[str], sizes: Sequence[int]) -> dict[str, str]:
    """Return {our name: theirs} of what is a variable of theirs."""
    last = 3 if any("conv3" in name for name in ours) else 2
    names = {"alpha": "alpha"}
    for name in ours:
        if (parts := _OURS.fullmatch(name)) is None:
            continue
        stage, block, module, index, tensor = parts.groups()
        variable = (_VARIABLES if index is None else _NORM_VARIABLES).get(tensor)
        if variable is None:  # a count of batches, or what a moving average is made of
            continue
        size = sizes[int(index)] if index else 0
        scope = (_SCOPES if stage else _OUTER_SCOPES)[module].format(size=size, last=last)
        group = f"group{int(stage) - 1}/" if stage else ""
        inner = f"block{block}/" if block else ""
        names[name] = f"{SCOPE}{group}{inner}{scope}/{variable}"
    return names


def _filled(
    empty: Mapping[str, Tensor], names: Mapping[str, str], variables: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return our state dict; what they do not have is as in a new network."""
    state = {name: torch.zeros_like(value, device="cpu") for name, value in empty.items()}
    state["alpha"] += 1
    for ours, theirs in names.items():
        if theirs in variables:
            state[ours] = _our_layout(variables[theirs])
        if ours.endswith(".basis"):
            average = ours.removesuffix("basis")
            state[average + "total"], state[average + "rest"] = _average(theirs, variables)
    state["network.conv1.weight"] = state["network.conv1.weight"].flip(1)  # BGR -> RGB
    return state


def _average(basis: str, variables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a quantizer's `total` and `rest`, from which its moving average continues."""
    if f"{basis}/local_step" not in variables:
        # After the many updates of a whole training, the start weighs nothing.
        return _our_layout(variables[basis]), torch.zeros(())
    return _our_layout(variables[f"{basis}/biased"]), DECAY ** variables[f"{basis}/local_step"]


def _our_layout(value: Tensor) -> Tensor:
    """Transpose convolutions (h, w, in, out) -> (out, in, h, w), and matrices."""
    return (value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t()).contiguous()


def _their_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) == 4:
        out, channels, height, width = shape
        return height, width, channels, out
    return tuple(reversed(shape))
