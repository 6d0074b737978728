"""`python -m pipelines.folder verify`: what it finds, remembers and moves; and --skip-bad, which reads it."""

from __future__ import annotations

import errno
import io
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
from PIL import Image

from pipelines import dali, reference
from pipelines.__main__ import VERBS
from pipelines.batch import LoaderSpec
from pipelines.dali import verify
from pipelines.demo import ODD_KINDS, render
from pipelines.utils.cli import verb_command
from pipelines.utils.errors import DataError, UsageError
from rsnet.train import main
from tests.conftest import write_folder, write_photo

ROOT = Path(__file__).parents[3]


@pytest.fixture
def data(tmp_path) -> Path:
    """Good images; what a test damages is only read by itself."""
    for split, seed in (("train", 1), ("val", 2)):
        write_folder(tmp_path / "data" / split, {"ant": 20, "bee": 5}, seed)
    return tmp_path / "data"


@pytest.fixture
def run(capsys):
    """Run `python -m pipelines.folder verify` in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        words = ["verify", *map(str, arguments)]
        code = verb_command("pipelines.folder", VERBS, words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _loaders(data: Path, rank: int = 0, with_train: bool = True, **options):
    spec = LoaderSpec(data, (32, 24), 4, torch.device("cpu"), rank=rank, world_size=rank + 1)
    return dali.make_loaders(dali.DaliOptions(workers=2, **options), spec, with_train)


def _bad(report: Path) -> dict[str, dict[str, str]]:
    return {split: s["bad"] for split, s in json.loads(report.read_text())["splits"].items()}


def _pil(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _html(path: Path) -> None:
    path.write_text("<html>404</html>")


def _png_without_its_end(path: Path) -> None:
    file = io.BytesIO()
    _pil(path).save(file, "PNG")
    path.write_bytes(file.getvalue()[:-12])
    _pil(path)


def _gif(path: Path) -> None:
    _pil(path).save(path, "GIF")
    _pil(path)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    _empty: "the file is empty",
    _truncated: "image file is truncated",
    _html: "cannot identify image file",
    _png_without_its_end: "PIL decodes it, but DALI does not",
    _gif: "PIL decodes it, but DALI does not",
    _dangling: "No such file or directory",
    _pipe: "it is no regular file",
}


def _damage_all(data: Path) -> dict[str, str]:
    """One image of each damage in train; returns their paths below train, and the reasons."""
    names = [f"ant/{i:03}.JPEG" for i in range(0, 2 * len(DAMAGES), 2)]
    for name, damage in zip(names, DAMAGES, strict=True):
        damage(data / "train" / name)
    return dict(zip(names, DAMAGES.values(), strict=True))


def _changed_marker(path: Path) -> None:
    """A marker in the middle of the scan that no decoder knows: libjpeg goes on, PIL gives up."""
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    content[at : at + 2] = b"\xff\x13"
    path.write_bytes(content)
    with pytest.raises(OSError, match="broken data stream"):
        _pil(path)


@pytest.mark.parametrize("workers", [1, 4])
def test_exactly_what_dali_does_not_decode_is_listed(data, run, workers):
    expected = _damage_all(data)
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
    assert all(len(list(getattr(_loaders(data), split))) > 0 for split in ("train", "val"))


@pytest.mark.parametrize(
    "name", ["two words.jpg", "été 猫.jpg", os.fsdecode(b"\xff.jpg"), "a\nb.jpg"]
)
def test_any_name_will_do(data, run, name):
    good = data / "train" / "ant" / name
    shutil.copy(data / "train" / "ant" / "000.JPEG", good)
    assert run(data)[0] == 0
    _truncated(good)
    assert run(data)[0] == 1
    assert list(_bad(data / "verified.json")["train"]) == [f"ant/{name}"]
    assert run(data)[0] == 1
    assert _loaders(data, skip_bad=True).train.schedule.samples == 25


def test_a_val_folder_alone_is_verified(data, run):
    shutil.rmtree(data / "train")
    _truncated(data / "val" / "ant" / "000.JPEG")
    assert run(data)[0] == 1
    assert list(_bad(data / "verified.json")) == ["val"]


def test_an_unchanged_folder_is_not_decoded_again(data, run, monkeypatch):
    _truncated(data / "train" / "ant" / "003.JPEG")
    _, first, _ = run(data)
    monkeypatch.setattr(verify, "Decoder", None)
    code, out, _ = run(data)
    assert code == 1
    assert f"{data}/train: has not changed since {data}/verified.json was written" in out
    assert out.splitlines()[1:3] == first.splitlines()[1:3]  # the image, and how many are bad


def _touch(path: Path) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def _grow(path: Path) -> None:
    state = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = {
    "touched": _touch,
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
        _loaders(data, skip_bad=True)
    assert str(refusal.value) == (
        f"--skip-bad: {data}/verified.json is of another state of {data}/train; "
        f"python -m pipelines.folder verify {data} writes it anew"
    )
    code, out, _ = run(data)
    assert code == 0
    assert f"{data}/train: has not changed" not in out
    assert f"{data}/val: has not changed" in out
    after = json.loads((data / "verified.json").read_text())["splits"]
    assert after["val"] == before["val"]
    assert after["train"]["fingerprint"] != before["train"]["fingerprint"]
    _loaders(data, skip_bad=True)


def test_bad_images_are_moved_with_their_paths(data, run, tmp_path, monkeypatch):
    names = _damage_all(data)
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
    assert len(list(_loaders(data, skip_bad=True).train)) == (25 - len(names)) // 4


def test_what_is_known_to_be_bad_is_moved_without_decoding_again(data, run, tmp_path, monkeypatch):
    _truncated(data / "train" / "ant" / "003.JPEG")
    run(data)
    monkeypatch.setattr(verify, "Decoder", None)
    assert run(data, "--move-to", tmp_path / "bad")[0] == 0
    assert (tmp_path / "bad" / "train" / "ant" / "003.JPEG").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_moving_overwrites_nothing(data, run, tmp_path, dangling):
    for name in ("003.JPEG", "004.JPEG"):
        _truncated(data / "train" / "ant" / name)
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
    _truncated(data / "train" / "ant" / "003.JPEG")
    code, _, err = run(data, "--move-to", data / place)
    assert code == 2
    assert f"--move-to: {data}/{place} lies among the images of {data}/{place[:3]}" in err
    assert (data / "train" / "ant" / "003.JPEG").exists()


@pytest.mark.parametrize("move", [False, True])
def test_a_class_of_bad_images_alone_is_named(data, run, tmp_path, move):
    for path in (data / "train" / "bee").iterdir():
        _html(path)
    code, out, err = run(data, *(["--move-to", tmp_path / "bad"] if move else []))
    assert code == 1
    assert f"all images of {data}/train/bee are bad" in err
    assert err.count("\n") == 1
    assert f"{data}/val: 0 of 25 images are bad" in out  # which was not given up
    if not move:
        with pytest.raises(DataError, match=f"all images of {data}/train/bee are bad"):
            _loaders(data, skip_bad=True)


def test_a_report_that_cannot_be_written_is_said_before_decoding(data, run, monkeypatch):
    def read_only(dir: Path) -> None:  # noqa: A002 - tempfile's name for it
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", read_only)
        code, out, err = run(data)
    assert (code, out) == (2, "")
    assert f"cannot write {data}/verified.json: Read-only file system; " in err
    assert "--report FILE" in err
    code, _, err = run(data, "--report", data / "nowhere" / "x.json")
    assert code == 2
    assert f"cannot write {data}/nowhere/x.json: No such file or directory" in err


def test_a_report_elsewhere_is_read_where_it_is(data, run, tmp_path):
    _truncated(data / "train" / "ant" / "003.JPEG")
    assert run(data, "--report", tmp_path / "my report.json")[0] == 1
    assert not (data / "verified.json").exists()
    loaders = _loaders(data, skip_bad=True, skip_bad_report=tmp_path / "my report.json")
    assert loaders.train.schedule.samples == 24
    _touch(data / "train" / "ant" / "000.JPEG")
    with pytest.raises(UsageError) as refusal:
        _loaders(data, skip_bad=True, skip_bad_report=tmp_path / "my report.json")
    advice = f"verify {data} --report '{tmp_path}/my report.json' writes it anew"
    assert str(refusal.value).endswith(advice)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"version": 2, "splits": {}}', '{"version": 1, "splits": {"train": {"fingerprint": "x"}}}',
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


def test_a_report_is_written_as_a_whole_or_not_at_all(data, run, monkeypatch):
    run(data)
    before = (data / "verified.json").read_text()
    _touch(data / "train" / "ant" / "000.JPEG")

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
    bad = [data / "train" / name for name in _damage_all(data)]
    bad.append(data / "val" / "bee" / "001.JPEG")
    _empty(bad[-1])
    without = tmp_path / "without"
    shutil.copytree(
        data, without, ignore=lambda folder, _: [p.name for p in bad if str(p.parent) == folder]
    )
    assert run(data)[0] == 1
    ours, plain = (getattr(_loaders(d, skip_bad=d == data), split) for d in (data, without))
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        plain.set_epoch(epoch)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a.labels, b.labels)
            assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_skip_bad_says_once_how_many_were_left_out(data, run, capsys):
    _damage_all(data)
    run(data)
    _loaders(data, skip_bad=True)
    assert capsys.readouterr().out == (
        f"--skip-bad: left out {len(DAMAGES)} of 25 images of train and 0 of 25 images of val, "
        f"which {data}/verified.json lists\n"
    )
    _loaders(data, rank=1, skip_bad=True)
    assert capsys.readouterr().out == ""


def test_skip_bad_needs_a_report(data):
    with pytest.raises(UsageError) as refusal:
        _loaders(data, skip_bad=True)
    assert str(refusal.value) == (
        f"--skip-bad: there is no report {data}/verified.json; "
        f"python -m pipelines.folder verify {data} writes it"
    )
    with pytest.raises(UsageError, match="--skip-bad-report: add --skip-bad"):
        dali.DaliOptions(skip_bad_report=data / "x.json")


def test_an_evaluation_with_skip_bad_needs_val_alone(data, run):
    run(data)
    _touch(data / "train" / "ant" / "000.JPEG")
    assert len(list(_loaders(data, with_train=False, skip_bad=True).val)) == 7


def _read_epochs(loader, epochs: int) -> None:
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        list(loader)


def test_training_blames_what_dali_does_not_decode(data):
    """PIL decodes the culprit, and does not decode an innocent image of the same batch."""
    _changed_marker(data / "val" / "ant" / "000.JPEG")
    _png_without_its_end(data / "val" / "ant" / "001.JPEG")
    with pytest.raises(
        DataError, match=f"broken image {data}/val/ant/001.JPEG: PIL decodes it, but"
    ):
        list(_loaders(data).val)


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_a_broken_image_met_in_training_names_the_verification(data, backend):
    data = data.rename(data.with_name("my data"))
    bad = data / "train" / "ant" / "003.JPEG"
    _truncated(bad)
    spec = LoaderSpec(data, (32,), 4, torch.device("cpu"))
    loaders = {
        "dali": lambda: dali.make_loaders(dali.DaliOptions(workers=1), spec),
        "reference": lambda: reference.make_loaders(reference.ReferenceOptions(), spec),
    }[backend]()
    with pytest.raises(DataError) as end:
        _read_epochs(loaders.train, 20)  # not each crop reaches the rows that are missing
    assert str(end.value).startswith(f"broken image {bad}: image file is truncated")
    command = shlex.join(["python", "-m", "pipelines.folder", "verify", str(data)])
    assert str(end.value).endswith(f"; {command} finds all broken images")


def _python(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_stderr_has_the_progress_and_nothing_of_the_decoders(data):
    """libjpeg and DALI have lines for these, without the image's name."""
    _truncated(data / "train" / "ant" / "003.JPEG")
    write_photo(data / "val" / "bee" / "marker.JPEG", 200, 200, seed=1)
    _changed_marker(data / "val" / "bee" / "marker.JPEG")
    script = (
        "import sys; from pipelines.dali import verify; from pipelines.utils import progress; "
        "progress.LINE_EVERY = 0.0; "
        "verify.verify(verify.VerifyOptions(verify.Path(sys.argv[1]))); print('end', file=sys.stderr)"
    )
    done = _python("-c", script, data)
    assert "train: 25/25, " in done.stderr
    assert "val: 26/26, " in done.stderr
    assert {line.split(":")[0] for line in done.stderr.splitlines()} == {"train", "val", "end"}


def test_the_command_explains_itself():
    done = _python("-m", "pipelines.folder", "--help")
    assert done.returncode == 0
    assert "verify " in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["verfy"], "pipelines.folder: error: verfy: there is no such verb; one of verify"),
        (["verify", "/nowhere"], "/nowhere has neither a folder train nor a folder val"),
        (["verify", "/nowhere", "--workers", "0"], "--workers 0: at least one thread is needed"),
        (["verify", "/nowhere", "--move", "x"], "did you mean --move-to?"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert verb_command("pipelines.folder", VERBS, words) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


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
    _html(data / "train" / "ant" / "003.JPEG")
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
