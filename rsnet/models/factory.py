"""`parallel_<name>`: torchvision's and timm's networks with BatchNorm, by name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model_builder
from torchvision.models import list_models as list_torchvision_models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipelines.utils.errors import UsageError, first_line
from rsnet.config.model_config import (
    AUTHORS_NAMES,
    FULL,
    PREFIX,
    TIMM_PREFIX,
    WEIGHT_FIELDS,
    Mode,
    ModelConfig,
    NormalizeName,
    canonical_arch,
)
from rsnet.models import preact_resnet
from rsnet.models.layers.activations import convert_activations
from rsnet.models.layers.conv import convert_to_blurpool, convert_to_same_padding
from rsnet.models.layers.drop_path import convert_to_drop_path
from rsnet.models.layers.onednn_workarounds import (
    convert_depthwise_convs,
    convert_pointwise_convs,
    convert_single_pixel_convs,
)
from rsnet.models.preact_resnet import init_classifier
from rsnet.models.pretrained import expected_normalize, load_pretrained, require_timm, timm_tags
from rsnet.models.quantization.lq_nets import init_quantizers_from_weights, quantize
from rsnet.models.resnet import LAYERS, convert_to_small_stem, scaled_resnet
from rsnet.models.shapes import check_sizes
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d

# torchvision's names of networks that the original spells differently.
_ALIASES = {theirs: name for name, theirs in AUTHORS_NAMES.items()}

# Configurations whose sizes were checked already: a command may build a network three times.
_checked: set[tuple[object, ...]] = set()

# Networks without BatchNorm; or, like MaxViT, that work only at the one size that their attention windows
# divide.
_UNFIT = re.compile(r"alexnet|convnext|maxvit|squeezenet|swin|vgg\d+$|vit_")

# The original trains without dropout; auxiliary heads would be private to nothing.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {"dropout": 0.0},
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def list_models() -> list[str]:
    """Return the names of torchvision's networks that can be made switchable, without building any."""
    names = {
        n for n in list_torchvision_models(module=torchvision.models) if not _UNFIT.match(n)
    } | set(LAYERS)
    return sorted(map(canonical_arch, names))


def create_model(
    config: ModelConfig,
    pretrained: str | None = None,
    fixed_qa: bool = False,
    say: Callable[[str], None] = lambda _: None,
    *,
    drop_path: float | None = None,
) -> ResolutionSwitchable:
    """Build the network that `config` describes, with private BatchNorm per size.

    It is initialised as its library does it. torchvision's ResNets and MobileNetV2 start as the authors' do:
    Kaiming fan-out convolutions, no zero gamma, MobileNetV2's linear layer N(0, 0.01) with bias 0 (a test
    compares the formulas). The last BatchNorm of a quantized ResNet's blocks starts at zero, as the authors',
    but not of a pre-activation one; the classifier of both starts as tensorpack's.

    pretrained: weights of the ordinary network to start from, see `rsnet.models.pretrained`.
    fixed_qa: see `rsnet.models.quantization.lq_nets.quantize`. say: called with a message about weights
    that are not used.
    drop_path: the largest rate of stochastic depth, see `rsnet.models.layers.drop_path`; None: the library's
    own, 0 of almost all.

    Raises UsageError for an unknown arch, a width or a mode that it does not have, sizes too small for it, or
    a `drop_path` without branches to drop.
    """
    network = build_ordinary(config, drop_path)
    if config.stem == "small":
        convert_to_small_stem(network)
    if pretrained is not None:
        _load_ordinary(network, config, pretrained, say)
    if config.blurpool:
        convert_to_blurpool(network)
    if config.tf_padding:
        convert_to_same_padding(network)
    convert_single_pixel_convs(network)
    convert_pointwise_convs(network)
    convert_depthwise_convs(network)
    convert_activations(network)
    if config.mode == "resnet" and config.qw != FULL and pretrained is None:
        _init_as_authors_quantized(network)
    if not convert_to_drop_path(network, drop_path) and drop_path:
        raise UsageError(
            f"--drop-path {drop_path}: {config.arch} has no residual branches that can be dropped; leave it "
            "out"
        )
    try:
        quantize(network, config.qw, config.qa, fixed_qa=fixed_qa)
        if pretrained is not None:
            init_quantizers_from_weights(network)
        model = ResolutionSwitchable(network, config.sizes, shared_norm=config.norm == "shared")
    except ValueError as error:
        raise UsageError(f"--arch {config.arch}: {error}") from error
    shapes = (config.sizes, *(getattr(config, name) for name in WEIGHT_FIELDS))
    if shapes not in _checked:
        check_sizes(model, config.arch)
        _checked.add(shapes)
    return model


def pretrained_normalize(arch: str, pretrained: str) -> NormalizeName | None:
    """Return how images are normalised for an ordinary network's weights, see `create_model`; None if in a
    way that has no name here, or the network is unknown.
    """
    known = list_models()
    if arch.startswith(TIMM_PREFIX) and importlib.util.find_spec("timm") is None:
        return None
    if not arch.startswith(TIMM_PREFIX) and arch not in known:
        return None
    return expected_normalize(*library_name(arch), pretrained)


def classifier_names(config: ModelConfig) -> frozenset[str]:
    """Return the names, in the ordinary network, of the parameters whose shapes the classes decide."""
    with WeightsOnMeta():
        here, other = (
            build_ordinary(dataclasses.replace(config, num_classes=config.num_classes + more))
            for more in (0, 1)
        )
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    return frozenset(n for n, value in here.state_dict().items() if shapes.get(n) != value.shape)


class WeightsOnMeta(TorchFunctionMode):
    """Makes torch.empty, by which layers make their weights, allocate on the meta device.

    `with torch.device("meta")` would also move what builders compute with, as RegNet's does.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **(kwargs or {}) | on_meta)


def synchronize_batchnorm(model: ResolutionSwitchable, arch: str) -> None:
    """Convert every BatchNorm to SyncBatchNorm, over the batches of all processes, in place.

    They stay private to each size. PyTorch computes this on GPUs alone.
    """
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    if arch.startswith(TIMM_PREFIX):
        import timm

        # It keeps the activations of timm's BatchNormAct2d.
        convert = timm.layers.convert_sync_batchnorm  # type: ignore[attr-defined]
    model.network = convert(model.network)


def fuse_batchnorm(model: ResolutionSwitchable, arch: str) -> str:
    """Fuse BatchNorms with what follows, see `layers.fused_batchnorm`, in place; return which, in a line.

    Raises UsageError if the network has none that can be.
    """
    from rsnet.models.layers.fused_batchnorm import convert_to_fused_batchnorm  # defines operations

    norms = [n for n, m in model.network.named_modules() if isinstance(m, SwitchableBatchNorm2d)]
    fused = convert_to_fused_batchnorm(model.network)
    if not fused:
        raise UsageError(f"--fused-bn: {arch} has no BatchNorm that can be fused; leave it out")
    others = [name for name in norms if name not in fused]
    shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
    alone = f", on their own: {shown}" if others else ""
    return f"--fused-bn: {len(fused)} of {len(norms)} BatchNorm layers are fused{alone}"


def build_ordinary(config: ModelConfig, drop_path: float | None = None) -> nn.Module:
    """Return the network of one resolution. drop_path: passed to its library where that knows it."""
    arguments = config.arch, config.num_classes, config.width_mult
    if config.mode != "resnet":
        return _build_preact(*arguments, config.mode)
    if config.arch.startswith(TIMM_PREFIX):
        return _build_timm(*arguments, drop_path)
    return _build_torchvision(*arguments, drop_path)


def _build_torchvision(
    arch: str, num_classes: int, width_mult: float, drop_path: float | None
) -> nn.Module:
    if arch not in list_models():
        raise UsageError(f"--arch {arch}: unknown; {_suggest(arch, list_models())}")
    _, name = library_name(arch)
    if is_variant(name, width_mult):
        return scaled_resnet(name, num_classes, width_mult)
    builder = get_model_builder(name)
    parameters = inspect.signature(_network_class(builder)).parameters
    if width_mult != 1.0 and "width_mult" not in parameters:
        raise UsageError(f"--width-mult {width_mult}: {arch} has no width to multiply")
    options = builder_options(arch, num_classes, width_mult)
    if drop_path is not None and "stochastic_depth_prob" in parameters:
        options["stochastic_depth_prob"] = drop_path
    network: nn.Module = builder(weights=None, **options)
    return network


def builder_options(arch: str, num_classes: int, width_mult: float) -> dict[str, Any]:
    """Return what the network's library is asked for besides its name."""
    library, name = library_name(arch)
    others = dict(_OVERRIDES.get(name, {})) if library == "torchvision" else {}
    if width_mult != 1.0:
        others["width_mult"] = width_mult
    return {"num_classes": num_classes, **others}


def is_variant(name: str, width_mult: float) -> bool:
    """Return whether a network of torchvision's kind is one that torchvision itself does not build."""
    return name in LAYERS and (width_mult != 1.0 or name not in list_torchvision_models())


def library_name(arch: str) -> tuple[Literal["torchvision", "timm"], str]:
    """Return the library of a network, and its name there."""
    if arch.startswith(TIMM_PREFIX):
        return "timm", arch.removeprefix(TIMM_PREFIX)
    name = arch.removeprefix(PREFIX)
    return "torchvision", _ALIASES.get(name, name)


def _network_class(builder: Any) -> Any:
    """Return the class of the networks that a torchvision builder returns, by its annotation."""
    return inspect.signature(builder, eval_str=True).return_annotation


def _build_preact(arch: str, num_classes: int, width_mult: float, mode: Mode) -> nn.Module:
    name = arch.removeprefix(PREFIX)
    if name not in preact_resnet.LAYERS:
        known = " ".join(PREFIX + n for n in preact_resnet.LAYERS)
        raise UsageError(f"--mode {mode}: there is no such {arch}; there are {known}")
    shortcut: preact_resnet.Shortcut = "A" if mode == "preact_typeA" else "B"
    return preact_resnet.PreActResNet(name, num_classes, shortcut, width_mult)


def _load_ordinary(
    network: nn.Module, config: ModelConfig, pretrained: str, say: Callable[[str], None]
) -> None:
    if config.mode != "resnet":
        raise UsageError(
            f"--pretrained: no library has pre-activation ResNets (--mode {config.mode}); train one in full "
            "precision, and give its run"
        )
    library, name = library_name(config.arch)
    classifier = functools.partial(classifier_names, config)
    if note := load_pretrained(network, library, name, pretrained, classifier):
        say(note)


def _init_as_authors_quantized(network: nn.Module) -> None:
    """Do what torchvision's zero_init_residual does (Goyal et al. 2017, section 5.1), and tensorpack."""
    for block in network.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            nn.init.zeros_(last.weight)
    if isinstance(network, ResNet):
        init_classifier(network.fc)


def _build_timm(
    arch: str, num_classes: int, width_mult: float, drop_path: float | None
) -> nn.Module:
    timm = require_timm(f"--arch {arch}")
    if width_mult != 1.0:
        raise UsageError(f"--width-mult {width_mult}: choose a width by its timm name instead")
    _, name = library_name(arch)
    if not timm.is_model(name):
        known = [TIMM_PREFIX + n for n in timm.list_models()]
        raise UsageError(f"--arch {arch}: unknown to timm; {_suggest(arch, known)}")
    options = builder_options(arch, num_classes, width_mult)
    try:  # it leaves out what is None
        network: nn.Module = timm.create_model(name, drop_path_rate=drop_path, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        network = timm.create_model(name, **options)
    except RuntimeError as error:
        if "tag" not in str(error):
            raise
        line = first_line(error)
        raise UsageError(f"--arch {arch}: {line}; timm has {timm_tags(name)}") from error
    return network


def _suggest(arch: str, known: list[str]) -> str:
    """Return the end of a message about an unknown `arch`: names of `known` that are similar."""
    near = difflib.get_close_matches(arch.lower(), known, n=3, cutoff=0.5)
    if _is_of_timm(arch):
        near = [TIMM_PREFIX + arch.removeprefix(PREFIX)]
    found = f"did you mean {' or '.join(near)}?" if near else "an example is parallel_resnet50;"
    return f"{found} `rsnet list` has all"


def _is_of_timm(arch: str) -> bool:
    """Return whether timm has a network of this name, which torchvision has not."""
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(arch.removeprefix(PREFIX)))
