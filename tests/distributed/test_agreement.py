"""Ranks that would not train together on the same end at once, with the first difference."""

from __future__ import annotations

import dataclasses
import re
import shutil
import socket
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from pipelines import dali
from pipelines.batch import LoaderSpec
from pipelines.utils.errors import UsageError
from rsnet.distributed import agreement
from rsnet.distributed import process_group as distributed
from rsnet.train import _options_of_all
from tests.conftest import needs_ffcv, write_folder
from tests.helpers import betons
from tests.helpers.faults import command, end, start


def _agree(monkeypatch, facts: list[dict]) -> None:
    """Let rank 0 compare these facts, one of each rank."""
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "world_size", lambda: len(facts))
        hosts = [(f"node{rank}", its) for rank, its in enumerate(facts)]
        patched.setattr(distributed, "all_gather_object", lambda own: hosts)  # noqa: ARG005
        patched.setattr(distributed, "run_on_all", lambda action: action())
        agreement.require_same("data", lambda: facts[0])


@pytest.fixture
def copies(tmp_path):
    """A function that returns the facts of the data, and of a copy to which something was done."""
    write_folder(tmp_path / "0" / "train", {"ant": 6, "bee": 6}, 1)
    write_folder(tmp_path / "0" / "val", {"ant": 3, "bee": 3}, 2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")

    def facts(change, make=None) -> list[dict]:
        change(tmp_path / "1")
        spec = LoaderSpec(tmp_path, (32,), 4, torch.device("cpu"))
        make = make or (lambda spec: dali.make_loaders(dali.DaliOptions(), spec))
        found = []
        for name in "01":
            loaders = make(dataclasses.replace(spec, data=tmp_path / name))
            found.append(agreement.data_facts(loaders))
            loaders.close()
        return found

    return facts


def _other_name(data) -> None:
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "zebra")


def _one_class_more(data) -> None:
    for split in ("train", "val"):
        shutil.copytree(data / split / "ant", data / split / "cat")


def _images_missing(data) -> None:
    for i in (1, 2):
        (data / "train" / "bee" / f"00{i}.JPEG").unlink()


def _val_image_missing(data) -> None:
    (data / "val" / "bee" / "001.JPEG").unlink()


def _image_of_another_name(data) -> None:
    (data / "val" / "bee" / "001.JPEG").rename(data / "val" / "bee" / "x.JPEG")


CHANGES = {
    _other_name: "classes (number 0) bee there and ant here",
    _one_class_more: "classes 3 there and 2 here",
    _images_missing: "number of train images 10 there and 12 here",
    _val_image_missing: "number of val images 5 there and 6 here",
    _image_of_another_name: "fingerprint of the val images ",
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_difference_in_the_data_is_named(copies, monkeypatch, change):
    same, other = copies(change)
    words = f"rank 2 (on node2) has other data than rank 0 (on node0): {CHANGES[change]}"
    with pytest.raises(UsageError, match=re.escape(words)):
        _agree(monkeypatch, [same, same, other])


def test_the_same_data_in_another_place_is_the_same(copies, monkeypatch):
    _agree(monkeypatch, copies(lambda data: None))  # noqa: ARG005


@needs_ffcv
def test_beton_files_are_compared_too(copies, tmp_path, monkeypatch):
    def convert(data) -> None:
        _image_of_another_name(data)
        betons.convert_to(tmp_path / "0", tmp_path / "0")
        betons.convert_to(data, data, jpeg_quality=50, max_resolution=40)

    same, other = copies(convert, betons.make)
    with pytest.raises(UsageError, match=r"rank 1 .* fingerprint of the train images"):
        _agree(monkeypatch, [same, other])


def _config(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"pretrained": None, "class_weights": None, "output": None, **changes})


def test_files_are_compared_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setattr("rsnet.train.to_plain_dict", vars)
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
    facts = {n: _options_of_all(_config(pretrained=str(tmp_path / n))) for n in "abc"}
    assert facts["a"] == facts["b"] != facts["c"]
    with pytest.raises(UsageError, match=r"--pretrained [0-9a-f]{12}\.\.\. there"):
        _agree(monkeypatch, [facts["a"], facts["c"]])


def test_places_may_differ_and_what_is_computed_may_not(monkeypatch):
    monkeypatch.setattr("rsnet.train.to_plain_dict", vars)
    first, second = (_options_of_all(_config(data=d, output=d, lr=0.1, sizes=[3])) for d in "ab")
    _agree(monkeypatch, [first, second])
    for name, value, words in (("lr", 0.2, "--lr 0.2 there"), ("sizes", [3, 1], "--sizes 2 there")):
        other = _options_of_all(_config(**({"lr": 0.1, "sizes": [3]} | {name: value})))
        with pytest.raises(UsageError, match=f"has other data than .*: {words}"):
            _agree(monkeypatch, [first, other])


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"output": "s3://bucket/run"}, {"output": "run"}),
        ({"output": "s3://bucket/run"}, {}),
        ({"output": "run"}, {}),
    ],
)
def test_what_is_done_together_for_an_output_may_not_differ(monkeypatch, here, there):
    """Ranks that upload meet where others do not."""
    monkeypatch.setattr("rsnet.train.to_plain_dict", vars)
    facts = [_options_of_all(_config(**changes)) for changes in (here, there)]
    with pytest.raises(UsageError, match=r"has other data than .*: --output "):
        _agree(monkeypatch, facts)


def test_weights_of_samples_are_compared(copies, tmp_path, monkeypatch):
    """They are in no name and no label; of a file, nodes have copies."""

    def make(spec: LoaderSpec):
        file = spec.data.with_suffix(".json")
        file.write_text('{"ant": 1, "bee": 2}' if spec.data.name == "0" else '{"ant": 1, "bee": 3}')
        spec = dataclasses.replace(spec, class_weights=str(file))
        return dali.make_loaders(dali.DaliOptions(), spec)

    same, other = copies(lambda _: None, make)
    with pytest.raises(UsageError, match=r"weights of the train images [0-9a-f]+"):
        _agree(monkeypatch, [same, other])
    monkeypatch.setattr("rsnet.train.to_plain_dict", vars)
    one, another = (
        _options_of_all(_config(class_weights=str(tmp_path / f"{name}.json"))) for name in "01"
    )
    with pytest.raises(UsageError, match=r"--class-weights [0-9a-f]+"):
        _agree(monkeypatch, [one, another])


@pytest.mark.parametrize(
    ("found", "is_refused"), [("10", False), ("11", False), ("00", False), ("01", True)]
)
def test_a_run_that_only_another_rank_has_is_not_begun_anew(
    monkeypatch, tmp_path, found, is_refused
):
    hosts = [(f"node{rank}", has == "1") for rank, has in enumerate(found)]
    monkeypatch.setattr(distributed, "run_on_all", lambda action: action())
    monkeypatch.setattr(distributed, "all_gather_object", lambda own: hosts)  # noqa: ARG005
    last = tmp_path / "last.pt"
    words = f"{last} is on the disk of rank 1 (on node1), but not of rank 0 (on node0)"
    with pytest.raises(UsageError, match=re.escape(words)) if is_refused else nullcontext():
        agreement.require_on_rank_0(last)


def _two_ranks(*commands: list[str]) -> list[str]:
    """Run each rank's command, as torchrun would; return the lines of errors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = ({**place, "RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": "2"} for r in ("0", "1"))
    processes = [start(words, rank) for words, rank in zip(commands, ranks, strict=True)]
    errors = [end(process, code=None)[1] for process in processes]
    return [line for err in errors for line in err.splitlines() if "train_dali.py: error: " in line]


@pytest.mark.slow  # two processes
def test_two_processes_whose_data_differ_end_in_one_line_each(photos, tmp_path):
    for rank in "01":
        shutil.copytree(photos, tmp_path / rank)
    for split in ("train", "val"):
        (tmp_path / "1" / split / "ant").rename(tmp_path / "1" / split / "zebra")
    lines = _two_ranks(*(command(tmp_path / rank, tmp_path / "run") for rank in "01"))
    assert len(lines) == 2
    assert all("error: rank 1 (on " in line for line in lines)
    assert all("has other data than rank 0 (on " in line for line in lines)
    assert all("classes (number 0) bee there and ant here" in line for line in lines)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow  # two processes
def test_two_processes_with_other_options_end_before_they_wait_for_each_other(photos, tmp_path):
    """With --pretrained, rank 1 would do more together with the others than they know of."""
    words = command(photos, tmp_path / "run")
    lines = _two_ranks(words, [*words, "--pretrained", "default"])
    assert len(lines) == 2
    assert all("has other options than rank 0 (on " in line for line in lines)
    assert all("--pretrained default there and None here" in line for line in lines)
