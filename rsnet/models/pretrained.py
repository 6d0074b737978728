"""Pretrained weights of ordinary networks, of one resolution, as the start of switchable ones."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from pipelines.normalize import MEAN_STD
from pipelines.utils.errors import DataError, UsageError, first_line
from pipelines.utils.text import first_names
from rsnet.config.model_config import NormalizeName
from rsnet.models.safe_load import safe_load
from rsnet.models.state_dict import describe_mismatch

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]

# Where files keep their weights, the averaged ones first: timm's and torchvision's references.
STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


def load_pretrained(
    network: nn.Module,
    library: Literal["torchvision", "timm"],
    name: str,
    weights: str,
    classifier: Callable[[], Collection[str]],
) -> str:
    """Load `weights` into `network`, which is not switchable yet, so that each of the private BatchNorms
    will start as a copy of the ordinary one.

    weights: "default" or a name that the library has for network `name` (torchvision: IMAGENET1K_V1,
    timm: a1_in1k), which is downloaded once, or the path of a file with a state dict (.pth, .safetensors).
    classifier: returns the names of the parameters whose shapes the classes decide. They keep their
    initialisation if there is another number of classes, or no classifier, which the line that is returned
    says; "" if all is taken.

    Raises UsageError if there are no such weights, DataError, with names and shapes, if they do not fit.
    """
    loaded = read_state(library, name, weights)
    own = network.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    state = OrderedDict(cleaned(loaded, expected))
    # The layers' versions, without which MNASNet does not load; safetensors keep none.
    versions = getattr(loaded, "_metadata", None) or own._metadata  # type: ignore[attr-defined]
    state._metadata = {_name(k): v for k, v in versions.items()}  # type: ignore[attr-defined]
    note = ""
    problems = describe_mismatch(expected, state)
    if problems and (names := classifier()) and (what := _other_classifier(names, expected, state)):
        note = f"--pretrained: {weights}: the classifier starts anew: {what}"
        for key in names:
            state.pop(key, None)
            expected.pop(key)
        problems = describe_mismatch(expected, state)
    if problems:
        raise DataError(f"--pretrained: {weights} does not fit {name}: {problems}")
    network.load_state_dict(state, strict=False)
    return note


def read_state(
    library: Literal["torchvision", "timm"], name: str, weights: str, option: str = "--pretrained"
) -> Mapping[str, Any]:
    """Return the state dict of such `weights`, as it is. option: names them in errors.

    Raises UsageError if there is no such one, DataError if it cannot be had.
    """
    if is_path(weights):
        return _read(Path(weights), option)
    return _download(library, name, weights, option)


def cleaned(loaded: Mapping[str, Any], expected: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict under the names of a network, `expected`, without what inference does not need."""
    return {
        _name(k): v
        for k, v in loaded.items()
        if isinstance(k, str) and isinstance(v, Tensor) and (k in expected or not _is_extra(k))
    }


def expected_normalize(
    library: Literal["torchvision", "timm"], name: str, weights: str
) -> NormalizeName | None:
    """Return how images are normalised for a library's weights, or for a file of its network; None if by a
    mean and standard deviation that have no name here.
    """
    there = [value for values in expected_mean_std(library, name, weights) for value in values]
    names: tuple[NormalizeName, ...] = get_args(NormalizeName)
    for known in names:
        here = (value for values in MEAN_STD[known] for value in values)
        if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(there, here, strict=True)):
            return known
    return None


def expected_mean_std(library: Literal["torchvision", "timm"], name: str, weights: str) -> MeanStd:
    """Return the mean and standard deviation of RGB in 0..255 of which `expected_normalize` is the name."""
    if library == "torchvision":
        # These, with weights, turn ImageNet's normalisation into this one (transform_input).
        return MEAN_STD["inception" if name in ("googlenet", "inception_v3") else "imagenet"]
    import timm

    full = tagged_name(name, weights)
    try:
        config = timm.models.get_pretrained_cfg(full, allow_unregistered=True)
    except RuntimeError as error:  # there is no such tag
        raise UsageError(
            f"--pretrained: timm has no weights {full} ({first_line(error)}); it has {timm_tags(name)}"
        ) from error
    if config is None:
        return MEAN_STD["imagenet"]
    mean, std = (tuple(255 * value for value in values) for values in (config.mean, config.std))
    return mean, std


def require_timm(option: str) -> Any:
    """Return the module timm. Raises UsageError, which names `option`, if it is not installed."""
    try:
        import timm
    except ImportError:
        raise UsageError(
            f'{option}: timm is not installed: pip install "rsnet-trainer[timm]"'
        ) from None
    return timm


def tagged_name(name: str, weights: str) -> str:
    """Return a network's name with that of its weights, as timm writes it; files and defaults have none."""
    return name if weights == "default" or is_path(weights) else f"{name}.{weights}"


def timm_tags(name: str) -> str:
    """Return the weights that timm has of a network as text. name: with a tag or without."""
    import timm

    return first_names(timm.list_pretrained(f"{name.partition('.')[0]}.*"))


def _name(key: str) -> str:
    """Return a parameter's name without what DDP, torch.compile and older versions put into it."""
    key = key.removeprefix("module.").removeprefix("_orig_mod.")
    # torchvision's DenseNets are published with such names as denselayer1.norm.1.weight.
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])(?=\.|$)", r"\1\2", key)


def _other_classifier(
    names: Collection[str], expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]
) -> str:
    """Return in words how the classifier of `state` differs from the expected; "" if it does not."""
    there = {name: tuple(state[name].shape) for name in names if name in state}
    if not there:
        return "there is none"
    if any(len(shape) != len(expected[name]) or not shape for name, shape in there.items()):
        return ""  # another network's
    name, shape = next(iter(there.items()))
    if shape == expected[name]:
        return ""
    return f"{shape[0]} classes there, {expected[name][0]} here"


def _is_extra(key: str) -> bool:
    """Return whether inference does not need a key.

    These are the count of torch's AveragedModel, and auxiliary classifiers, which torchvision builds only for
    training (GoogLeNet, Inception).
    """
    return key == "n_averaged" or key.split(".")[0] in ("aux1", "aux2", "AuxLogits")


def is_path(weights: str) -> bool:
    """Return whether --pretrained names a file, and not weights of a library."""
    has_suffix = Path(weights).suffix in (".pth", ".pt", ".tar", ".safetensors")
    is_there = weights != "default" and Path(weights).is_file()
    return "/" in weights or has_suffix or is_there


def _read(path: Path, option: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise UsageError(f"{option}: there is no file {path}")
    try:
        is_safe = path.suffix == ".safetensors"
        content: Any = load_file(path) if is_safe else safe_load(path)
    except Exception as error:  # safetensors documents no common class
        raise DataError(f"{option}: {path} has no readable weights: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{option}: {path} holds no state dict")
    inner = (content[key] for key in STATE_KEYS if isinstance(content.get(key), dict))
    return next(inner, content)


def _download(library: str, name: str, weights: str, option: str) -> Mapping[str, Any]:
    try:
        if library == "timm":
            import timm

            return dict(timm.create_model(tagged_name(name, weights), pretrained=True).state_dict())
        known = get_model_weights(name).__members__
        if member := known.get("DEFAULT" if weights == "default" else weights):
            return dict(member.get_state_dict(check_hash=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{option} {weights}: cannot get {library}'s weights of {name} "
            f"({first_line(error)}); or give a file"
        ) from error
    choices = " ".join(known) or "none"
    raise UsageError(f"{option} {weights}: torchvision's {name} has {choices}; or give a file")
