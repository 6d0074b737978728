"""A release's config.json: which fields are needed, and what is refused."""

from __future__ import annotations

import copy
import json
import re

import pytest

from pipelines.utils.errors import DataError
from rsnet.release import config as release_config
from tests.helpers.runs import (
    read_config,
    refusal,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"format": NaN}', "is no JSON (NaN is no number of JSON)"),
        ('{"format": ' + "9" * 5000 + "}", "is no JSON"),
        (b"\xff\xfe\xfd", "is no JSON"),
        ("[]", "it is [], must be an object"),
        ("{}", "is of format None; this version reads 1"),
        ('{"format": 2}', "is of format 2; this version reads 1"),
        ('{"format": 1}', "network is missing"),
        (" " * (2**26 + 1), "has 67108865 bytes, more than the 67108864"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, capsys, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(data)
    code, line = refusal(folder, capsys)
    assert code == 1
    assert f"{folder}/config.json: " in line
    assert message in line


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"arch": "parallel_os.system"}, 2, "unknown; did you mean|unknown; an example is"),
        ({"arch": "parallel_timm/hf-hub:x/y"}, 1, "must be a name such as parallel_resnet50"),
        ({"arch": "parallel_timm/../../x", "width_mult": 1.0}, 2, "unknown to timm"),
        ({"arch": "parallel_resnet18\n"}, 1, "must be a name such as parallel_resnet50"),
        ({"arch": "parallel_resnet18"}, 1, "does not fit the network in config.json"),
        ({"sizes": [-64, -96]}, 1, "must be up to 32 integers from 1 to 4096, the largest first"),
        ({"sizes": [32, 48, 64]}, 1, "the largest first"),
        ({"sizes": [64, 48, 48]}, 1, "the largest first"),
        ({"sizes": []}, 1, "the largest first"),
        ({"sizes": [10**9, 48, 32]}, 1, "integers from 1 to 4096"),
        ({"sizes": list(range(132, 99, -1))}, 1, "up to 32 integers"),
        ({"sizes": [64.0, 48.0, 32.0]}, 1, "must be up to 32 integers"),
        ({"sizes": [64, 48]}, 1, "gmacs|preprocessing|does not fit"),
        ({"num_classes": 10**9}, 1, "is 1000000000, must be an integer from 1 to 1000000"),
        ({"num_classes": -1}, 1, "must be an integer from 1 to 1000000"),
        ({"num_classes": True}, 1, "must be an integer from 1 to 1000000"),
        ({"num_classes": 2}, 1, "network.classes has 3 names, network.num_classes is 2"),
        ({"width_mult": 1e6}, 1, "must be a number from 0.01 to 16"),
        ({"width_mult": 0.5}, 1, "does not fit the network in config.json"),
        (
            {"normalize": "none"},
            1,
            'must be "imagenet" or "unit" or "inception" or "clip" or "dpn"',
        ),
        ({"normalize": "unit"}, 1, "preprocessing is not what this version does"),
        ({"eval_crop_ratio": 0.5}, 1, "must be 0.875"),
        ({"stem": "large"}, 1, 'must be "imagenet" or "small"'),
        ({"classes": [["ant"]] * 3}, 1, "must be a list of names"),
    ],
)
def test_a_description_that_is_not_the_networks_is_refused(folder, capsys, changes, code, message):
    config = read_config(folder)
    config["network"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    found, line = refusal(folder, capsys)
    assert found == code
    assert re.search(message, line)


def _fields(value: object, path: tuple = ()):
    """The paths of all fields that a description's reader needs."""
    if isinstance(value, dict) and path not in (("source",), ("versions",)):
        for name, inner in value.items():
            yield (*path, name)
            yield from _fields(inner, (*path, name))


def _parse_changed(config: dict, path: tuple, change) -> None:
    changed = copy.deepcopy(config)
    holder = changed
    for name in path[:-1]:
        holder = holder[name]
    change(holder, path[-1])
    release_config.parse(json.dumps(changed).encode())


def test_every_field_is_needed_and_has_its_type(folder):
    config = read_config(folder)
    release_config.parse(json.dumps(config).encode())
    paths = list(_fields(config))
    assert len(paths) > 40
    for path in paths:
        with pytest.raises(DataError, match=path[0] if path != ("format",) else "format"):
            _parse_changed(config, path, lambda holder, name: holder.pop(name))
        for wrong in (-1, float("inf"), float("nan"), [None], 10**30):
            with pytest.raises(DataError):
                _parse_changed(config, path, lambda h, n, wrong=wrong: h.update({n: wrong}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ant", "class_names is 'ant', must be a list of names"),
        ([1], "class_names is [1], must be a list of names"),
        (["a", "b", "c", "d"], "class_names has 4 names, network.num_classes is 3"),
    ],
)
def test_readable_names_that_are_none_are_refused(folder, capsys, names, message):
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"class_names": names}))
    code, line = refusal(folder, capsys)
    assert code == 1
    assert message in line


def test_outputs_go_by_readable_names_then_classes_then_numbers():
    config = {"network": {"classes": ["n1", "n2"], "num_classes": 3}}
    assert release_config.output_names(config) == ["n1", "n2", "2"]
    assert release_config.output_names(config | {"class_names": ["cat", "dog"]}) == [
        "cat", "dog", "2",
    ]  # fmt: skip
