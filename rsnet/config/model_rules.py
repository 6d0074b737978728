"""Bounds that the fields of a `ModelConfig` in a file are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pipelines.transforms import EVAL_CROP_RATIO
from pipelines.utils.errors import DataError
from pipelines.utils.schema import (
    TEXT,
    Rule,
    integer,
    list_of,
    number,
    one_of,
    pattern,
    require,
    require_fields,
)
from rsnet.config.bounds import MAX_PIXELS, MAX_SIZES, MAX_WIDTH, MIN_WIDTH
from rsnet.config.model_config import BITS, FULL, Mode, NormalizeName

_BITS = Rule("from 1 to 8, or 32", lambda v: type(v) is int and (v in BITS or v == FULL))


def _are_sizes(value: Any) -> bool:
    rule = integer(1, MAX_PIXELS)
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_SIZES
        and all(map(rule.holds, value))
        and value == sorted(set(value), reverse=True)
    )


_NETWORK = {
    "arch": pattern("a name such as parallel_resnet50", r"parallel_[\w./-]{1,100}"),
    "width_mult": number(MIN_WIDTH, MAX_WIDTH),
    "stem": one_of("imagenet", "small"),
    "norm": one_of("private", "shared"),
    "blurpool": one_of(False, True),
    "mode": one_of(*get_args(Mode)),
    "qw": _BITS,
    "qa": _BITS,
    "tf_padding": one_of(False, True),
    "sizes": Rule("up to 32 integers from 1 to 4096, the largest first", _are_sizes),
    "num_classes": integer(1, 1_000_000),
    "classes": list_of("a list of names", TEXT),
    "normalize": one_of(*get_args(NormalizeName)),
    "eval_crop_ratio": one_of(EVAL_CROP_RATIO),
    "interpolation": TEXT,
}


def require_network(network: Mapping[str, Any], where: str = "") -> None:
    """Check a network's fields, as `ModelConfig.to_dict` writes them. Raises DataError that names the field.

    where: what to put before the field's name.
    """
    require_fields(network, _NETWORK, where)
    sizes = set(map(str, network["sizes"]))
    added = Rule(
        "an object of some of the sizes", lambda v: isinstance(v, dict) and v.keys() <= sizes
    )
    require(where + "calibrated", added, network.get("calibrated", {}))
    known, outputs = len(network["classes"]), network["num_classes"]
    if known > outputs:
        raise DataError(f"{where}classes has {known} names, {where}num_classes is {outputs}")
