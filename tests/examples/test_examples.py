"""The examples run as their headers say, on tiny data, and do what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from rsnet.__main__ import main as verbs
from rsnet.inference.cascade import CascadeStage, Tuned, write_tuned
from rsnet.inference.preprocess import decode, eval_pixels
from rsnet.release import package as release
from tests.helpers import processes, releases
from tests.helpers.releases import CLASSES, SIZES

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("examples") / "release")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return releases.write_photos(tmp_path_factory.mktemp("labelled"))


def _export(folder: Path, name: str, *options: str) -> Path:
    output = folder.parent / name
    assert (
        verbs(["export", str(folder), "--format", "onnx", *options, "--output", str(output)]) == 0
    )
    return output


@pytest.fixture(scope="module")
def onnx(folder) -> Path:
    """One file of two resolutions."""
    return _export(folder, "onnx", "--one-file", "--sizes", "64", "32") / "model.onnx"


def _functions(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


# The console command, as a fork: see tests.helpers.processes.
RSNET = f"""#!{sys.executable}
import sys
from tests.helpers import processes
words = [sys.executable, "-m", "rsnet", *sys.argv[1:]]
sys.exit(processes.start(words, stdin=None, stdout=None, stderr=None).wait())
"""


def _run(command: list[str | Path], programs: Path) -> str:
    """Run a command from the repository's root, with those of a folder before others; returns its stdout."""
    processes.run([sys.executable, "-c", ""])  # starts the server, which the command then finds
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_index_lists_every_example_and_nothing_else():
    listed = re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text())
    there = [p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh")]
    assert sorted(listed) == sorted(there)


@pytest.mark.slow  # a training, a release, a prediction
def test_train_cifar10_trains_and_releases_five_resolutions(photos, tmp_path):
    fast = ["--epochs", "1", "--batch-size", "8", "--wandb", "disabled"]
    rsnet = tmp_path / "bin" / "rsnet"
    rsnet.parent.mkdir()
    rsnet.write_text(RSNET)
    rsnet.chmod(0o755)
    out = _run([EXAMPLES / "train_cifar10.sh", photos, tmp_path / "out", *fast], rsnet.parent)
    model = release.load(tmp_path / "out" / "release")
    assert model.sizes == (32, 28, 24, 20, 16)
    assert re.search(r"\.JPEG.*(ant|bee|cat)", out.splitlines()[-1])


@pytest.mark.slow  # two trainings
def test_fine_tune_starts_from_a_release_of_other_classes(folder, photos, tmp_path, monkeypatch):
    """At a learning rate of next to nothing, the convolutions are those of the release."""
    same = ["--arch", "parallel_resnet10", "--width-mult", "0.25", "--sizes", "48", "32"]
    fast = ["--epochs", "1", "--batch-size", "8", "--lr", "1e-9", "--wandb", "disabled"]
    words = [photos, folder, tmp_path / "out", *same, *fast]
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", *map(str, words)])
    monkeypatch.setattr(subprocess, "run", lambda words, check: processes.run(words, cwd=ROOT))  # noqa: ARG005
    runpy.run_path(str(EXAMPLES / "fine_tune.py"), run_name="__main__")
    tuned_model, before = release.load(tmp_path / "out" / "release"), release.load(folder)
    assert tuned_model.network.fc.out_features == 3
    for name, layer in tuned_model.network.named_modules():
        if isinstance(layer, nn.Conv2d):
            torch.testing.assert_close(layer.weight, before.network.get_submodule(name).weight)


def test_own_loop_trains_private_batchnorm_and_shared_convolutions(photos, capsys):
    loop, network = _functions("own_loop.py"), "timm/test_resnet"
    assert isinstance(loop["make_network"]("resnet18", 3), torchvision.models.ResNet)
    model = loop["main"](str(photos), network)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"]
    assert all(f"{size}: " in lines[-1] for size in loop["SIZES"])

    torch.manual_seed(0)
    untrained = loop["make_network"](network, 3)
    before = dict(untrained.named_parameters())
    convolutions = [n for n, p in before.items() if p.ndim == 4]
    after = dict(model.network.named_parameters())
    assert not any(torch.equal(before[name], after[name]) for name in convolutions)
    norms = [m for m in model.modules() if hasattr(m, "by_resolution")]
    assert norms
    for a, b, c in (norm.by_resolution for norm in norms):
        assert not torch.equal(a.running_mean, b.running_mean)
        assert not torch.equal(b.running_mean, c.running_mean)


def _table(out: str) -> dict[str, tuple[str, dict[int, int]]]:
    """{name of a row: (top-1, {size: images decided there})}."""
    rows = {}
    for line in out.splitlines()[1:]:
        name, top1, _, decided = re.fullmatch(r"(.{16}) +(\S+) +(\S+)   (.*)", line).groups()
        pairs = (pair.split(": ") for pair in decided.split(", "))
        rows[name.strip()] = top1, {int(size): int(count) for size, count in pairs}
    return rows


@torch.no_grad()
def test_cascade_shows_what_each_way_answers(folder, labelled, capsys):
    sha256 = release.read(folder).config["weights"]["sha256"]
    stages = (CascadeStage(32, 0.0), CascadeStage(64))
    write_tuned(folder, sha256, Tuned(dict.fromkeys(SIZES, 1.0), stages), {})
    _functions("cascade.py")["main"](str(folder), str(labelled), "1.0")
    rows = _table(capsys.readouterr().out)
    model = release.load(folder)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    paths = sorted(labelled.glob("*/*"))
    for size in SIZES:
        pixels = torch.stack([releases.pixels(path, size) for path in paths])
        images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
        answers = model(images, size).argmax(dim=1).tolist()
        names = [*CLASSES, "7"]
        right = sum(names[a] == p.parent.name for a, p in zip(answers, paths, strict=True))
        assert rows[f"size {size}"] == (f"{100 * right / len(paths):.2f}", {size: 70})
    # No answer is certain: all images come to the largest size.
    assert rows["confidence 1.0"] == rows["size 64"]
    # All of them pass a threshold of 0.
    assert rows["tuned"] == rows["size 32"]


def test_cascade_knows_folders_whose_classes_have_readable_names(folder, labelled, capsys):
    main = _functions("cascade.py")["main"]
    main(str(folder), str(labelled))
    expected = _table(capsys.readouterr().out)
    named = folder.parent / "named"
    release.copy(release.read(folder), named, [f"a {name}" for name in [*CLASSES, "7"]])
    main(str(named), str(labelled))
    assert _table(capsys.readouterr().out) == expected
    assert max(float(top1) for top1, _ in expected.values()) > 0


@pytest.mark.slow
def test_onnx_inference_needs_no_torch_and_gives_the_probabilities_of_predict(
    folder, labelled, capsys
):
    """From a file of one resolution."""
    model = _export(folder, "onnx-48", "--sizes", "48") / "model-48.onnx"
    capsys.readouterr()
    photos = sorted(labelled.glob("*/*"))[:3]
    without = ["torch", "torchvision", "rsnet", "pipelines"]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({without})); sys.argv.pop(0);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [sys.executable, "-c", code, EXAMPLES / "onnx_inference.py", model, "48", *photos]
    lines = _run(words, Path(sys.executable).parent).splitlines()
    assert verbs(["predict", str(folder), *map(str, photos), "--size", "48", "--top", "1"]) == 0
    expected = capsys.readouterr().out
    for line, photo in zip(lines, photos, strict=True):
        name, percent = re.fullmatch(rf"{re.escape(str(photo))}: (\S+) (\S+) %", line).groups()
        assert name in expected
        assert percent in expected


@pytest.mark.slow
def test_onnx_inference_sees_the_pixels_of_an_evaluation(onnx, demo):
    """Of CMYK, grayscale, PNG, progressive and rotated files, too."""
    functions = _functions("onnx_inference.py")
    about = functions["read_metadata"](functions["onnxruntime"].InferenceSession(str(onnx)))
    files = sorted((demo / "val").glob("*/*"))
    modes = set()
    for path in files:
        with Image.open(path) as image:
            modes.add(image.mode)
        for size in SIZES:
            pixels = functions["load_pixels"](str(path), size, about)
            expected = eval_pixels(decode(path, "", SIZES[0]), size).numpy()
            np.testing.assert_array_equal(pixels, expected)
    assert modes == {"CMYK", "L", "RGB"}


@pytest.mark.slow
@torch.no_grad()
def test_onnx_inference_computes_the_logits_of_the_network(onnx, folder, demo):
    functions = _functions("onnx_inference.py")
    session = functions["onnxruntime"].InferenceSession(str(onnx))
    about = functions["read_metadata"](session)
    paths = sorted((demo / "val").glob("*/*"))[:4]
    for size in (64, 32):
        pixels = [functions["load_pixels"](str(path), size, about) for path in paths]
        images = np.stack([functions["normalize"](p, about) for p in pixels])
        logits = functions["run"](session, images, size)
        expected = release.load(folder)(torch.from_numpy(images), size).numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["cascade.py", "fine_tune.py", "onnx_inference.py", "own_loop.py"])
def test_without_arguments_an_example_shows_its_header(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match=f"python examples/{name}"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_onnx_inference_names_the_resolutions_of_the_file(onnx):
    with pytest.raises(SystemExit, match=r"size 40: .*model\.onnx has 64 32"):
        _functions("onnx_inference.py")["main"](str(onnx), "40", "photo.jpg")
