"""A release's config.json: its fields, and the bounds that they are checked against."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pipelines.normalize import MEAN_STD
from pipelines.transforms import EVAL_CROP_RATIO, eval_short_side
from pipelines.utils.errors import DataError
from rsnet.config.model_config import BITS, FULL, Mode
from rsnet.losses import ENSEMBLE

FORMAT = 1

# ImageNet-21k's names take 1 MB; parsed JSON of this many bytes fits into any memory.
MAX_BYTES = 4 * 2**20


@dataclass(frozen=True)
class _Rule:
    """A check of one field; `what` completes "must be"."""

    what: str
    holds: Callable[[Any], bool]


def _integer(low: int, high: int) -> _Rule:
    return _Rule(f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def _number(low: float, high: float) -> _Rule:
    """Return a rule for a range of numbers; NaN is in no range."""
    return _Rule(
        f"a number from {low} to {high}", lambda v: type(v) in (int, float) and low <= v <= high
    )


def _one_of(*values: Any) -> _Rule:
    return _Rule(
        " or ".join(map(json.dumps, values)), lambda v: type(v) is type(values[0]) and v in values
    )


def _text(what: str, pattern: str) -> _Rule:
    return _Rule(what, lambda v: isinstance(v, str) and re.fullmatch(pattern, v, re.A) is not None)


def _are_sizes(value: Any) -> bool:
    rule = _integer(1, 4096)
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 32
        and all(map(rule.holds, value))
        and value == sorted(set(value), reverse=True)
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


_OBJECT = _Rule("an object", lambda v: isinstance(v, dict))

_BITS = _Rule("from 1 to 8, or 32", lambda v: type(v) is int and (v in BITS or v == FULL))

_TOP = {
    "network": _OBJECT,
    "preprocessing": _OBJECT,
    "weights": _OBJECT,
    "parameters": _OBJECT,
    "gflops": _OBJECT,
    "accuracy": _Rule("an object or null", lambda v: v is None or isinstance(v, dict)),
    "source": _OBJECT,
    "versions": _OBJECT,
}
_NETWORK = {
    "arch": _text("a name such as parallel_resnet50", r"parallel_[\w./-]{1,100}"),
    "width_mult": _number(0.01, 16),
    "stem": _one_of("imagenet", "small"),
    "norm": _one_of("private", "shared"),
    "blurpool": _one_of(False, True),
    "mode": _one_of(*get_args(Mode)),
    "qw": _BITS,
    "qa": _BITS,
    "tf_padding": _one_of(False, True),
    "sizes": _Rule("up to 32 integers from 1 to 4096, the largest first", _are_sizes),
    "num_classes": _integer(1, 1_000_000),
    "classes": _Rule("a list of names", _are_texts),
    "normalize": _one_of(*MEAN_STD),
    "eval_crop_ratio": _one_of(EVAL_CROP_RATIO),
    "interpolation": _Rule("a text", lambda v: isinstance(v, str)),
}
_WEIGHTS = {
    "sha256": _text("64 hexadecimal digits", "[0-9a-f]{64}"),
    "bytes": _integer(0, 2**50),
    "averaged": _one_of(False, True),
}
_PARAMETERS = {"shared": _integer(0, 2**50), "private": _integer(0, 2**50)}
_ACCURACY = {"top1": _number(0, 100), "top5": _number(0, 100)}


def result_names(network: Mapping[str, Any]) -> list[str]:
    """Return the names of results: every size, the largest first, and the ensemble."""
    return [*map(str, network["sizes"]), ENSEMBLE]


def preprocessing(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return how an evaluation prepares an image; mean and std are of RGB in [0, 1]."""
    mean, std = ([round(v / 255, 6) for v in values] for values in MEAN_STD[network["normalize"]])
    return {
        "short_side": "int(size / crop_ratio)",
        "short_sides": {str(size): eval_short_side(size) for size in network["sizes"]},
        "crop_ratio": network["eval_crop_ratio"],
        "interpolation": network["interpolation"],
        "mean": mean,
        "std": std,
    }


def parse(data: bytes) -> dict[str, Any]:
    """Parse and check a config.json. Raises DataError, in one line, for invalid fields."""
    try:
        config = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})") from error
    _require("it", _OBJECT, config)
    if config.get("format") != FORMAT:
        found = reprlib.repr(config.get("format"))
        raise DataError(f"is of format {found}; this version reads {FORMAT}")
    _require_fields(config, _TOP)
    network = config["network"]
    _require_network(network)
    _require_fields(config["weights"], _WEIGHTS, "weights.")
    _require_fields(config["parameters"], _PARAMETERS, "parameters.")
    names = result_names(network)
    _require_fields(config["gflops"], dict.fromkeys(names, _number(0, 1e9)), "gflops.")
    if config["accuracy"] is not None:
        _require_fields(config["accuracy"], dict.fromkeys(names, _OBJECT), "accuracy.")
        for name in names:
            _require_fields(config["accuracy"][name], _ACCURACY, f"accuracy.{name}.")
    if config["preprocessing"] != preprocessing(network):
        raise DataError("preprocessing is not what this version does for such a network")
    return config  # type: ignore[no-any-return]


def _require_network(network: Mapping[str, Any]) -> None:
    _require_fields(network, _NETWORK, "network.")
    known, outputs = len(network["classes"]), network["num_classes"]
    if known > outputs:
        raise DataError(f"network.classes has {known} names, network.num_classes is {outputs}")


def _require_fields(value: Mapping[str, Any], rules: Mapping[str, _Rule], where: str = "") -> None:
    for name, rule in rules.items():
        if name not in value:
            raise DataError(f"{where}{name} is missing")
        _require(where + name, rule, value[name])


def _require(name: str, rule: _Rule, value: Any) -> None:
    if not rule.holds(value):
        raise DataError(f"{name} is {reprlib.repr(value)}, must be {rule.what}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
