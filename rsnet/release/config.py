"""A release's config.json: its fields, and the bounds that they are checked against."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from pipelines.normalize import MEAN_STD
from pipelines.transforms import eval_short_side
from pipelines.utils.errors import DataError
from pipelines.utils.schema import (
    NOTHING,
    OBJECT,
    TEXT,
    integer,
    list_of,
    number,
    one_of,
    pattern,
    require,
    require_fields,
)
from rsnet.config.costs import require_gmacs
from rsnet.config.model_rules import require_network
from rsnet.losses import ENSEMBLE

FORMAT = 1

# ImageNet-21k's names take 1 MB, those of a million classes 16; parsed, they fit into any memory.
MAX_BYTES = 64 * 2**20

_TOP = {
    "network": OBJECT,
    "preprocessing": OBJECT,
    "weights": OBJECT,
    "parameters": OBJECT,
    "gmacs": OBJECT,
    "accuracy": OBJECT | NOTHING,
    "source": OBJECT,
    "versions": OBJECT,
}
_WEIGHTS = {
    "sha256": pattern("64 hexadecimal digits", "[0-9a-f]{64}"),
    "bytes": integer(0, 2**50),
    "averaged": one_of(False, True),
}
_PARAMETERS = {"shared": integer(0, 2**50), "private": integer(0, 2**50)}
_ACCURACY = {"top1": number(0, 100), "top5": number(0, 100)}


def result_names(network: Mapping[str, Any]) -> list[str]:
    """Return the names of results: every size, the largest first, and the ensemble."""
    return [*map(str, network["sizes"]), ENSEMBLE]


def output_names(config: Mapping[str, Any]) -> list[str]:
    """Return the readable names of all outputs; one without a name goes by its index."""
    network = config["network"]
    known = config.get("class_names") or network["classes"]
    return [*known, *map(str, range(len(known), network["num_classes"]))]


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
    require("it", OBJECT, config)
    if config.get("format") != FORMAT:
        found = reprlib.repr(config.get("format"))
        raise DataError(f"is of format {found}; this version reads {FORMAT}")
    require_gmacs(config)
    require_fields(config, _TOP)
    network = config["network"]
    require_network(network, "network.")
    require_fields(config["weights"], _WEIGHTS, "weights.")
    require_fields(config["parameters"], _PARAMETERS, "parameters.")
    names = result_names(network)
    require_fields(config["gmacs"], dict.fromkeys(names, number(0, 1e9)), "gmacs.")
    if config["accuracy"] is not None:
        require_fields(config["accuracy"], dict.fromkeys(names, OBJECT), "accuracy.")
        for name in names:
            require_fields(config["accuracy"][name], _ACCURACY, f"accuracy.{name}.")
    if "class_names" in config:
        require("class_names", list_of("a list of names", TEXT), config["class_names"])
        if (known := len(config["class_names"])) > network["num_classes"]:
            outputs = network["num_classes"]
            raise DataError(f"class_names has {known} names, network.num_classes is {outputs}")
    if config["preprocessing"] != preprocessing(network):
        raise DataError("preprocessing is not what this version does for such a network")
    return config  # type: ignore[no-any-return]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
