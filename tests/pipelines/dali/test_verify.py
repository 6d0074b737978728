"""`python -m pipelines.folder verify`: what it finds and moves, and what a training says of bad images."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import dali, reference
from pipelines.__main__ import VERBS
from pipelines.batch import LoaderSpec
from pipelines.dali import verify
from pipelines.demo import ODD_KINDS, render
from pipelines.utils.cli import verb_command
from pipelines.utils.errors import DataError
from tests.conftest import write_photo
from tests.helpers.bad_images import (
    DAMAGES,
    damage_all,
    decode_with_pil,
    loaders_of,
    truncate,
    write_html,
    write_png_without_its_end,
)

ROOT = Path(__file__).parents[3]


def _bad(report: Path) -> dict[str, dict[str, str]]:
    return {split: s["bad"] for split, s in json.loads(report.read_text())["splits"].items()}


def _changed_marker(path: Path) -> None:
    """A marker in the middle of the scan that no decoder knows: libjpeg goes on, PIL gives up."""
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    content[at : at + 2] = b"\xff\x13"
    path.write_bytes(content)
    with pytest.raises(OSError, match="broken data stream"):
        decode_with_pil(path)


@pytest.mark.parametrize("workers", [1, 4])
def test_exactly_what_dali_does_not_decode_is_listed(data, run, workers):
    expected = damage_all(data)
    code, out, err = run(data, "--workers", workers)
    assert (code, err) == (1, "")
    found = _bad(data / "verified.json")
    assert list(found["train"]) == list(expected)
    assert found["val"] == {}
    for name, reason in expected.items():
        assert reason in found["train"][name]
        assert f"{data}/train/{name}: {found['train'][name]}\n" in out
    assert f"{data}/train: {len(expected)} of 25 images are bad" in out
    assert sorted(os.listdir(data)) == ["train", "val", "verified.json"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_bad_image_among_good_ones_is_found(data, run, damage):
    damage(data / "train" / "bee" / "002.JPEG")
    assert run(data)[0] == 1
    assert list(_bad(data / "verified.json")["train"]) == ["bee/002.JPEG"]


def test_odd_images_that_dali_decodes_are_not_listed(data, run):
    """CMYK, PNG named .JPEG, grayscale, EXIF-rotated, progressive; and a JPEG that PIL does not decode."""
    for i, save in enumerate(ODD_KINDS):
        save(
            data / "val" / "bee" / f"odd{i}.JPEG", render("ring_vertical", np.random.default_rng(i))
        )
    write_photo(data / "val" / "bee" / "marker.JPEG", 200, 200, seed=1)
    _changed_marker(data / "val" / "bee" / "marker.JPEG")
    code, out, _ = run(data)
    assert code == 0
    assert f"{data}/val: 0 of 31 images are bad" in out
    assert all(len(list(getattr(loaders_of(data), split))) > 0 for split in ("train", "val"))


@pytest.mark.parametrize(
    "name", ["two words.jpg", "été 猫.jpg", os.fsdecode(b"\xff.jpg"), "a\nb.jpg"]
)
def test_any_name_will_do(data, run, name):
    good = data / "train" / "ant" / name
    shutil.copy(data / "train" / "ant" / "000.JPEG", good)
    assert run(data)[0] == 0
    truncate(good)
    assert run(data)[0] == 1
    assert list(_bad(data / "verified.json")["train"]) == [f"ant/{name}"]
    assert run(data)[0] == 1
    assert loaders_of(data, skip_bad=True).train.schedule.samples == 25


def test_a_val_folder_alone_is_verified(data, run):
    shutil.rmtree(data / "train")
    truncate(data / "val" / "ant" / "000.JPEG")
    assert run(data)[0] == 1
    assert list(_bad(data / "verified.json")) == ["val"]


def test_an_unchanged_folder_is_not_decoded_again(data, run, monkeypatch):
    truncate(data / "train" / "ant" / "003.JPEG")
    _, first, _ = run(data)
    monkeypatch.setattr(verify, "Decoder", None)
    code, out, _ = run(data)
    assert code == 1
    assert f"{data}/train: has not changed since {data}/verified.json was written" in out
    assert out.splitlines()[3:5] == first.splitlines()[3:5]  # the image, and how many are bad


def test_bad_images_are_moved_with_their_paths(data, run, tmp_path, monkeypatch):
    names = damage_all(data)
    content = (data / "train" / "ant" / "004.JPEG").read_bytes()
    left = {
        p
        for p in data.rglob("*.JPEG")
        if f"{p.parent.name}/{p.name}" not in names or "val" in p.parts
    }
    code, out, _ = run(data, "--move-to", tmp_path / "bad ones")
    assert code == 0
    assert f"moved {len(names)} images to {tmp_path}/bad ones/train" in out
    moved = tmp_path / "bad ones" / "train"
    assert sorted(str(p.relative_to(moved)) for p in moved.rglob("*.JPEG")) == sorted(names)
    assert (moved / "ant" / "004.JPEG").read_bytes() == content
    assert set(data.rglob("*.JPEG")) == left
    monkeypatch.setattr(verify, "Decoder", None)
    code, out, _ = run(data)
    assert code == 0
    assert f"{data}/train: has not changed" in out
    assert f"{data}/train: 0 of {25 - len(names)} images are bad" in out
    assert len(list(loaders_of(data, skip_bad=True).train)) == (25 - len(names)) // 4


def test_what_is_known_to_be_bad_is_moved_without_decoding_again(data, run, tmp_path, monkeypatch):
    truncate(data / "train" / "ant" / "003.JPEG")
    run(data)
    monkeypatch.setattr(verify, "Decoder", None)
    assert run(data, "--move-to", tmp_path / "bad")[0] == 0
    assert (tmp_path / "bad" / "train" / "ant" / "003.JPEG").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_moving_overwrites_nothing(data, run, tmp_path, dangling):
    for name in ("003.JPEG", "004.JPEG"):
        truncate(data / "train" / "ant" / name)
    there = tmp_path / "bad" / "train" / "ant" / "004.JPEG"
    there.parent.mkdir(parents=True)
    if dangling:
        there.symlink_to("nowhere")
    else:
        there.write_text("mine")
    code, _, err = run(data, "--move-to", tmp_path / "bad")
    assert code == 2
    assert f"--move-to: {there} exists already" in err
    assert there.is_symlink() if dangling else there.read_text() == "mine"
    assert os.listdir(there.parent) == ["004.JPEG"]  # nor was the other one moved
    assert len(_bad(data / "verified.json")["train"]) == 2
    assert run(data, "--move-to", tmp_path / "bad2")[0] == 0


@pytest.mark.parametrize("place", ["train", "val/ant/bad"])
def test_moving_among_the_images_is_refused(data, run, place):
    truncate(data / "train" / "ant" / "003.JPEG")
    code, _, err = run(data, "--move-to", data / place)
    assert code == 2
    assert f"--move-to: {data}/{place} lies among the images of {data}/{place[:3]}" in err
    assert (data / "train" / "ant" / "003.JPEG").exists()


@pytest.mark.parametrize("move", [False, True])
def test_a_class_of_bad_images_alone_is_named(data, run, tmp_path, move):
    for path in (data / "train" / "bee").iterdir():
        write_html(path)
    code, out, err = run(data, *(["--move-to", tmp_path / "bad"] if move else []))
    assert code == 1
    assert f"all images of {data}/train/bee are bad" in err
    assert err.count("\n") == 1
    assert f"{data}/val: 0 of 25 images are bad" in out  # which was not given up
    if not move:
        with pytest.raises(DataError, match=f"all images of {data}/train/bee are bad"):
            loaders_of(data, skip_bad=True)


def test_a_report_that_cannot_be_written_is_said_before_decoding(data, run, monkeypatch):
    def read_only(dir: Path) -> None:  # noqa: A002 - tempfile's name for it
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", read_only)
        code, out, err = run(data)
    assert code == 2
    assert "images/s" not in out
    assert f"cannot write {data}/verified.json: Read-only file system; " in err
    assert "--report FILE" in err
    code, _, err = run(data, "--report", data / "nowhere" / "x.json")
    assert code == 2
    assert f"cannot write {data}/nowhere/x.json: No such file or directory" in err


def _read_epochs(loader, epochs: int) -> None:
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        list(loader)


def test_training_names_the_image_that_dali_does_not_decode(data):
    """PIL decodes that image, and does not decode another one of the same batch, which DALI does."""
    _changed_marker(data / "val" / "ant" / "000.JPEG")
    write_png_without_its_end(data / "val" / "ant" / "001.JPEG")
    with pytest.raises(
        DataError, match=f"broken image {data}/val/ant/001.JPEG: PIL decodes it, but"
    ):
        list(loaders_of(data).val)


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_a_broken_image_met_in_training_names_the_verification(data, backend):
    data = data.rename(data.with_name("my data"))
    bad = data / "train" / "ant" / "003.JPEG"
    truncate(bad)
    spec = LoaderSpec(data, (32,), 4, torch.device("cpu"))
    loaders = {
        "dali": lambda: dali.make_loaders(dali.DaliOptions(workers=1), spec),
        "reference": lambda: reference.make_loaders(reference.ReferenceOptions(), spec),
    }[backend]()
    with pytest.raises(DataError) as end:
        _read_epochs(loaders.train, 20)  # not each crop reaches the rows that are missing
    assert str(end.value).startswith(f"broken image {bad}: image file is truncated")
    command = shlex.join(["rsnet", "verify", str(data)])
    assert str(end.value).endswith(f"; {command} finds all broken images")


def _python(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow  # a fresh interpreter
def test_stderr_has_the_progress_and_nothing_of_the_decoders(data):
    """libjpeg and DALI have lines for these, without the image's name."""
    truncate(data / "train" / "ant" / "003.JPEG")
    write_photo(data / "val" / "bee" / "marker.JPEG", 200, 200, seed=1)
    _changed_marker(data / "val" / "bee" / "marker.JPEG")
    script = (
        "import sys; from pipelines.dali import verify; from pipelines.utils import progress; "
        "progress.LINE_EVERY = 0.0; "
        "from pipelines.utils.cli import exit_code; "
        "exit_code('x', lambda: verify.verify(verify.VerifyOptions(verify.Path(sys.argv[1])))); "
        "print('end', file=sys.stderr)"
    )
    done = _python("-c", script, data)
    assert "train: 1/25, " in done.stderr
    assert "val: 1/26, " in done.stderr
    assert {line.split(":")[0] for line in done.stderr.splitlines()} == {"train", "val", "end"}


def test_the_command_explains_itself():
    done = _python("-m", "pipelines.folder", "--help")
    assert done.returncode == 0
    assert "verify " in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["verfy"], "pipelines.folder: error: verfy: there is no such verb; did you mean verify?"),
        (["verify", "/nowhere"], "there is no folder /nowhere"),
        (["verify", "/nowhere", "--workers", "0"], "--workers 0: at least one thread is needed"),
        (["verify", "/nowhere", "--move", "x"], "did you mean --move-to?"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert verb_command("pipelines.folder", VERBS, words) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
