"""`python -m rsnet import-tf`: files of the original's quantized training code."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.dali import DaliOptions, make_loaders
from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.authors_tensorflow import from_tensorflow, is_of_model
from rsnet.train import main as train
from tests.helpers.tensorflow_graph import Graph, saved

SIZES = (64, 33)


def _write(path: Path, variables) -> Path:
    """As tensorpack's `dump_session_params` names them."""
    np.savez(path, **{f"{name}:0": value.numpy() for name, value in variables.items()})
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tensorpack") / "model.npz"
    return _write(path, saved(Graph(18, "resnet", qw=2, qa=32), SIZES))


@pytest.fixture
def npz(written, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copy(written, tmp_path / "model.npz")


def test_an_imported_run_is_evaluated(npz, photos, tmp_path, monkeypatch, capsys):
    assert main(["import-tf", str(npz), "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    assert "parallel_resnet18 --mode resnet --qw 2 --qa 32, 10 classes, sizes 64 33," in out
    assert f"--evaluate --resume {best}" in out
    assert "cubic" in out
    assert "nearest neighbour" in out
    content = checkpoint.load(best)
    for name in ("weight", "bias"):
        content.model[f"network.fc.{name}"] = content.model[f"network.fc.{name}"][:3]
    three = dataclasses.replace(content.network, num_classes=3)  # as the photos have
    checkpoint.save(tmp_path / "three.pt", dataclasses.replace(content, network=three))
    words = [
        "--data",
        photos,
        "--evaluate",
        "--resume",
        tmp_path / "three.pt",
        "-c",
        tmp_path / "e",
    ]
    monkeypatch.setattr(sys, "argv", ["train_dali.py", *map(str, words)])
    assert train("train_dali.py", DaliOptions, make_loaders) == 0
    assert "--sizes 64 33" in capsys.readouterr().out
    assert (tmp_path / "e" / "evaluation.json").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["imported"], config["qw"]) == (str(npz), 2)


def _refused(capsys, path: Path, output: Path, code: int) -> str:
    assert main(["import-tf", str(path), "--output", str(output)]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert not (output / "checkpoints" / "best.pt").exists() or "holds a run already" in err
    return err


def test_a_mistake_is_one_line(npz, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "there is no file" in _refused(capsys, tmp_path / "none.npz", output, 2)
    assert "there is no checkpoint" in _refused(capsys, tmp_path / "model-7", output, 2)
    assert "there is no checkpoint in" in _refused(capsys, empty, output, 2)
    others = _write(tmp_path / "others.npz", {"global_step": torch.tensor(7)})
    assert "no network of the original's" in _refused(capsys, others, output, 1)
    (empty / "model-7.index").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "rsnet-trainer[tensorflow]" in _refused(capsys, empty, output, 2)
    assert main(["import-tf", str(npz), "--output", str(output)]) == 0
    capsys.readouterr()
    assert "holds a run already" in _refused(capsys, npz, output, 2)


def test_a_damaged_npz_is_one_line(npz, tmp_path, capsys):
    data = npz.read_bytes()
    for damaged in (b"", b"PK", data[: len(data) // 2], data[:3000] + bytes(4000) + data[7000:]):
        npz.write_bytes(damaged)
        assert f"{npz} cannot be read: " in _refused(capsys, npz, tmp_path / "run", 1)


class _Malicious:
    def __reduce__(self):
        return print, ("pwned",)


def test_nothing_in_an_npz_is_executed(tmp_path, capsys):
    objects = np.array([_Malicious()], dtype=object)
    np.savez(tmp_path / "model.npz", **{"imagenet/conv0/W": objects})
    assert main(["import-tf", str(tmp_path / "model.npz"), "--output", str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert "pwned" not in out
    assert err.count("\n") == 1


def test_a_checkpoint_of_tensorflow_is_read(tmp_path, capsys):
    """Two, written by TensorFlow: by name; of a folder the one that was noted last, else the highest step."""
    tensorflow = pytest.importorskip(
        "tensorflow", reason="TensorFlow is not installed (the extra tensorflow)"
    )
    variables = saved(Graph(18, "preact", qw=2, qa=2), SIZES, debiased=6)
    folder = tmp_path / "train_log"
    folder.mkdir()
    for step in (1000, 500):
        variables["alpha"] = torch.tensor([step / 1000, 0.0])
        _save(tensorflow.compat.v1, folder / f"model-{step}", variables)
    expected = {"model-1000.index": 1.0, "model-1000": 1.0, "model-500": 0.5, "": 0.5}
    for number, (name, alpha) in enumerate(expected.items()):
        run = tmp_path / f"run{number}"
        assert main(["import-tf", str(folder / name), "--output", str(run)]) == 0
        content = checkpoint.load(run / "checkpoints" / "best.pt")
        assert content.model["alpha"][0] == alpha
    theirs = from_tensorflow({k: v for k, v in variables.items() if is_of_model(k)})
    assert content.network == theirs.network
    for name, value in theirs.model.items():
        assert torch.equal(content.model[name], value), name
    (folder / "checkpoint").unlink()
    command = [sys.executable, "-m", "rsnet", "import-tf", folder, "--output", tmp_path / "highest"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # TensorFlow has nothing to add
    content = checkpoint.load(tmp_path / "highest" / "checkpoints" / "best.pt")
    assert content.model["alpha"][0] == 1.0
    capsys.readouterr()
    data = folder / "model-500.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:1000])
    assert "cannot be read" in _refused(capsys, folder / "model-500", tmp_path / "damaged", 1)


def _save(tf, prefix: Path, variables) -> None:
    """As tensorpack's ModelSaver does it, with `checkpoint` beside it."""
    with tf.Graph().as_default(), tf.Session() as session:
        made = [tf.Variable(value.numpy(), name=name) for name, value in variables.items()]
        session.run(tf.variables_initializer(made))
        tf.train.Saver(made).save(session, str(prefix))


@pytest.mark.slow
def test_import_takes_the_same_files(npz, tmp_path, capsys):
    assert main(["import-tf", str(npz), "--output", str(tmp_path / "a")]) == 0
    expected = capsys.readouterr().out.replace(f"{tmp_path}/a/", f"{tmp_path}/b/")
    assert main(["import", str(npz), "--output", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == expected
    assert main(["import", str(npz), "--output", str(tmp_path / "c"), "--sizes", "64"]) == 2
    assert "is of the quantized training code, and names them" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "a"), "--output", str(tmp_path / "c")]) == 2
    assert "a: this is a run of this trainer already" in capsys.readouterr().err
