"""The report of a verification: when it is valid, and --skip-bad, which reads it."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pipelines import dali, verify_report
from pipelines.__main__ import main as folder_main
from pipelines.sources.options import SplitOptions
from pipelines.sources.splits import open_splits
from pipelines.utils.errors import UsageError
from rsnet.train import main
from tests.helpers.bad_images import (
    DAMAGES,
    damage_all,
    empty,
    loaders_of,
    touch,
    truncate,
    write_html,
)


def _grow(path: Path) -> None:
    state = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = {
    "touched": touch,
    "grown, with its old time": _grow,
    "renamed": lambda path: path.rename(path.with_name("007x.JPEG")),  # at the same place
    "removed": Path.unlink,
    "copied": lambda path: shutil.copy2(path, path.with_name("other.JPEG")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_folder_is_noticed(data, run, change):
    run(data)
    before = json.loads((data / "verified.json").read_text())["splits"]
    change(data / "train" / "ant" / "007.JPEG")
    with pytest.raises(UsageError) as refusal:
        loaders_of(data, skip_bad=True)
    assert str(refusal.value) == (
        f"--skip-bad: {data}/verified.json is of another state of {data}/train; "
        f"rsnet verify {data} writes it anew"
    )
    code, out, _ = run(data)
    assert code == 0
    assert f"{data}/train: has not changed" not in out
    assert f"{data}/val: has not changed" in out
    after = json.loads((data / "verified.json").read_text())["splits"]
    assert after["val"] == before["val"]
    assert after["train"]["fingerprint"] != before["train"]["fingerprint"]
    loaders_of(data, skip_bad=True)


def test_a_report_elsewhere_is_read_where_it_is(data, run, tmp_path):
    truncate(data / "train" / "ant" / "003.JPEG")
    assert run(data, "--report", tmp_path / "my report.json")[0] == 1
    assert not (data / "verified.json").exists()
    loaders = loaders_of(data, skip_bad=True, skip_bad_report=tmp_path / "my report.json")
    assert loaders.train.schedule.samples == 24
    touch(data / "train" / "ant" / "000.JPEG")
    with pytest.raises(UsageError) as refusal:
        loaders_of(data, skip_bad=True, skip_bad_report=tmp_path / "my report.json")
    advice = f"verify {data} --report '{tmp_path}/my report.json' writes it anew"
    assert str(refusal.value).endswith(advice)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"version": 3, "splits": {}}', '{"version": 1, "splits": {"train": {"fingerprint": "x"}}}',
     '{"version": 1, "splits": {"train": {"fingerprint": "x", "images": 1, "bad": ["x"]}}}',
     '{"samples": 3}', "\xff"],
)  # fmt: skip
def test_another_file_is_not_overwritten(data, run, tmp_path, content):
    other = tmp_path / "other.json"
    other.write_text(content, encoding="latin-1")
    code, _, err = run(data, "--report", other)
    assert code == 2
    assert f"{other} is no report of a verification" in err
    assert err.count("\n") == 1
    assert other.read_text(encoding="latin-1") == content


def test_a_report_that_was_changed_is_noticed(data, run):
    """One image more is left out than verify found bad."""
    run(data)
    report = data / "verified.json"
    splits = verify_report.read(report)
    content = json.loads(report.read_text())
    content["splits"]["train"]["bad"]["ant/001.JPEG"] = "no"
    report.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="was changed since it was written"):
        verify_report.read(report)
    verify_report.write(report, splits)
    assert verify_report.read(report) == splits


def test_a_report_is_written_as_a_whole_or_not_at_all(data, run, monkeypatch):
    run(data)
    before = (data / "verified.json").read_text()
    touch(data / "train" / "ant" / "000.JPEG")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "verified.json")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(data)
    assert code == 1
    assert "No space left on device" in err
    assert (data / "verified.json").read_text() == before
    assert sorted(os.listdir(data)) == ["train", "val", "verified.json"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_skip_bad_gives_the_batches_of_a_folder_without_the_bad_images(data, run, tmp_path, split):
    bad = [data / "train" / name for name in damage_all(data)]
    bad.append(data / "val" / "bee" / "001.JPEG")
    empty(bad[-1])
    without = tmp_path / "without"
    shutil.copytree(
        data, without, ignore=lambda folder, _: [p.name for p in bad if str(p.parent) == folder]
    )
    assert run(data)[0] == 1
    ours, plain = (getattr(loaders_of(d, skip_bad=d == data), split) for d in (data, without))
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        plain.set_epoch(epoch)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a.labels, b.labels)
            assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_skip_bad_says_once_how_many_were_left_out(data, run, capsys):
    damage_all(data)
    run(data)
    loaders_of(data, skip_bad=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "--skip-bad" in line]
    assert said == [
        f"--skip-bad: left out {len(DAMAGES)} of 25 images of train, which {data}/verified.json lists",
        f"--skip-bad: left out 0 of 25 images of val, which {data}/verified.json lists",
    ]
    loaders_of(data, rank=1, skip_bad=True)
    assert capsys.readouterr().out == ""


def test_skip_bad_needs_a_report(data):
    with pytest.raises(UsageError) as refusal:
        loaders_of(data, skip_bad=True)
    assert str(refusal.value) == (
        f"--skip-bad: there is no report {data}/verified.json; rsnet verify {data} writes it"
    )
    with pytest.raises(UsageError, match="--skip-bad-report: add --skip-bad"):
        dali.DaliOptions(skip_bad_report=data / "x.json")


def test_an_evaluation_with_skip_bad_needs_val_alone(data, run):
    run(data)
    touch(data / "train" / "ant" / "000.JPEG")
    assert len(list(loaders_of(data, with_train=False, skip_bad=True).val)) == 7


@pytest.mark.slow
def test_a_run_that_a_broken_image_ended_goes_on_without_it(
    data, run, tmp_path, monkeypatch, capsys
):
    def train(*options: object) -> tuple[int, str, str]:
        words = f"--data {data} --arch parallel_resnet18 --sizes 32 24 -b 8 --workers 1 --wandb disabled"
        words = ["train_dali.py", *words.split(), "--output", tmp_path / "run", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        code = main("train_dali.py", dali.DaliOptions, dali.make_loaders)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    assert train("--epochs", 1)[0] == 0
    write_html(data / "train" / "ant" / "003.JPEG")
    code, _, err = train("--epochs", 2, "--resume", "auto", "--skip-bad")
    assert code == 2
    assert "--skip-bad: there is no report" in err
    assert err.count("\n") == 1
    assert run(data)[0] == 1
    words = ("--epochs", 2, "--resume", "auto", "--skip-bad")
    code, _, err = train(*words)
    assert code == 2
    assert "samples 25 -> 24" in err  # other images come next: that has to be allowed
    code, out, _ = train(*words, "--allow-change", "data")
    assert code == 0
    assert "--skip-bad: left out 1 of 25 images of train" in out
    assert "after epoch 1" in out


def _places(data: Path) -> dict[str, tuple[Path | str, SplitOptions]]:
    """The same images in other ways: (--data, where the validation images are)."""
    pattern = f"{data}-shards"
    for split in ("train", "val"):
        shutil.copytree(data / split, f"{data}-{split}-images")
    assert folder_main(["shards", "-d", str(data), "-o", pattern]) == 0
    for split in ("train", "val"):
        (Path(pattern) / split).mkdir()
        shutil.copy(f"{pattern}/{split}-000000.tar", f"{pattern}/{split}/000000.tar")
    for split in ("train", "val"):
        rows = [
            f"{path.relative_to(data)},{path.parent.name}\n"
            for path in sorted((data / split).rglob("*.JPEG"))
        ]
        (data / f"{split}.csv").write_text("path,label\n" + "".join(rows))
    return {
        "tables": (data / "train.csv", SplitOptions(val_data=data / "val.csv")),
        "patterns": (f"{pattern}/train-*.tar", SplitOptions(val_data=f"{pattern}/val-*.tar")),
        "folders of shards": (f"{pattern}/{{train,val}}/*.tar", SplitOptions()),
        "folders": (f"{data}-train-images", SplitOptions(val_data=f"{data}-val-images")),
        "a share": (f"{data}-train-images", SplitOptions(val_fraction=0.5)),
        "splits as data": (data / "train", SplitOptions(val_data=data / "val")),
    }


@pytest.mark.parametrize(
    "how", ["tables", "patterns", "folders of shards", "folders", "a share", "splits as data"]
)
def test_wherever_images_are_what_is_advised_makes_skip_bad_work(data, run, how):
    truncate(data / "train" / "ant" / "003.JPEG")
    truncate(data / "val" / "bee" / "001.JPEG")
    given, options = _places(data)[how]
    bad = 1 if how == "a share" else 2

    def skipping() -> int:
        lost = 0

        def prepare(source):
            nonlocal lost
            left = verify_report.skip_bad(source, None)
            lost += len(source) - len(left)
            return left

        open_splits(given, options, prepare=prepare)
        return lost

    for _ in range(2):  # one command for each split's images, at most
        with pytest.raises(UsageError, match="--skip-bad: ") as end:
            skipping()
        (command,) = re.findall(r"; (rsnet verify .*) writes it", str(end.value))
        assert run(*shlex.split(command)[2:])[0] == 1
        if how in ("folders of shards", "a share", "splits as data"):
            break
    assert skipping() == bad


@pytest.mark.parametrize("how", ["tables", "folders"])
def test_one_report_may_be_of_several_data_sets(data, run, tmp_path, how):
    truncate(data / "train" / "ant" / "003.JPEG")
    truncate(data / "val" / "bee" / "001.JPEG")
    given, options = _places(data)[how]
    report, left = tmp_path / "report.json", []
    for place in (given, options.val_data):
        assert run(place, "--report", report)[0] == 1
    open_splits(
        given,
        options,
        prepare=lambda source: left.append(verify_report.skip_bad(source, report)) or left[-1],
    )
    assert [len(source) for source in left] == [24, 24]


def test_a_folder_whose_name_looks_like_a_pattern_has_a_result_for_each_split(data, run):
    truncate(data / "train" / "ant" / "003.JPEG")
    shards = data.with_name("fold{1}")
    assert folder_main(["shards", "-d", str(data), "-o", str(shards)]) == 0
    assert run(shards)[0] == 1
    assert set(verify_report.read(shards / "verified.json")) == {"train", "val"}
