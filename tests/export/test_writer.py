"""`python -m rsnet export --format onnx|torch.export`: what the files compute, say and refuse."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipelines.utils.errors import DataError, UsageError
from rsnet.__main__ import main
from rsnet.config.model_config import ModelConfig
from rsnet.export import onnx_export, writer
from rsnet.export.torch_export import Levels
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.models.factory import create_model
from rsnet.models.quantization.lq_nets import ActivationQuantizer
from rsnet.release import package as release
from tests.helpers import releases
from tests.helpers.releases import CLASSES, SIZES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("export") / "release")


def _export(source: Path, output: Path, *words: str) -> Path:
    assert main(["export", str(source), "--output", str(output), *words]) == 0
    return output


@pytest.fixture(scope="module")
def files(folder) -> Path:
    return _export(folder, folder.parent / "onnx", "--format", "onnx", "--sizes", "48")


@pytest.fixture(scope="module")
def one_file(folder) -> Path:
    return _export(folder, folder.parent / "one", "--format", "onnx", "--one-file")


@pytest.fixture(scope="module")
def programs(folder) -> Path:
    return _export(folder, folder.parent / "pt2", "--format", "torch.export", "--sizes", "48")


_load = functools.cache(release.load)


def _expected(folder: Path, images: np.ndarray, size: int) -> np.ndarray:
    with torch.no_grad():
        return _load(folder)(torch.from_numpy(images), size).numpy()


@functools.cache
def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def _run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    return _session(path).run(["logits"], inputs)[0]


@functools.cache
def _program(path: Path) -> torch.nn.Module:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _noise(count: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, 3, size, size)).astype(np.float32)


def test_an_onnx_export_computes_its_size_for_any_batch(files, folder):
    for count in (1, 5):
        images = _noise(count, 48)
        logits = _run(files / "model-48.onnx", images=images)
        np.testing.assert_allclose(logits, _expected(folder, images, 48), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_one_onnx_export_computes_the_size_that_is_named(one_file, folder, size):
    for count in (1, 5):
        images = _noise(count, size)
        logits = _run(one_file / "model.onnx", images=images, size=np.array(size))
        np.testing.assert_allclose(logits, _expected(folder, images, size), atol=1e-5)


@pytest.mark.slow
def test_one_onnx_export_has_each_shared_weight_once(one_file, folder):
    graph = onnx.load(one_file / "model.onnx").graph
    stored = [v.raw_data for v in graph.initializer if len(v.raw_data) > 1000]
    weights = release.read(folder).state.values()
    assert len(stored) == len(set(stored))
    assert sum(map(len, stored)) == sum(v.nbytes for v in weights if v.nbytes > 1000)
    others = sum(v.nbytes for v in weights if v.nbytes <= 1000)
    assert (one_file / "model.onnx").stat().st_size < sum(map(len, stored)) + 2 * others + 50_000


def _classify_alike(one: Path, other: Path, sizes: Sequence[int]) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (70, 60, 3), dtype=np.uint8)
    exported, written = (SwitchableClassifier.load(path) for path in (one, other))
    for size in sizes:
        (found,), (expected,) = (c.classify(photo, size) for c in (exported, written))
        assert found.classes == expected.classes
        np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-4)


def test_an_onnx_export_classifies_as_the_release_does(files, folder):
    _classify_alike(files, folder, [48])


@pytest.mark.slow
def test_one_onnx_export_classifies_as_the_release_does(one_file, folder):
    _classify_alike(one_file, folder, SIZES)


def test_other_exports_are_not_computed_by_onnx_runtime(programs):
    with pytest.raises(UsageError, match="computes exports of --format onnx alone"):
        SwitchableClassifier.load(programs)


@pytest.mark.slow
def test_one_onnx_export_refuses_a_size_that_it_does_not_have(one_file):
    with pytest.raises(Exception, match="reshape"):
        _run(one_file / "model.onnx", images=_noise(1, 40), size=np.array(40))


def test_an_exported_program_computes_its_size_for_any_batch(programs, folder):
    program = _program(programs / "model-48.pt2")
    for count in (1, 5):
        images = _noise(count, 48)
        logits = program(torch.from_numpy(images)).detach().numpy()
        np.testing.assert_allclose(logits, _expected(folder, images, 48), atol=1e-5)


def test_the_report_has_the_files_and_how_far_they_are_off(files):
    report = json.loads((files / "export.json").read_text())
    assert {"config.json", "export.json", *(f["file"] for f in report["files"])} == {
        path.name for path in files.iterdir()
    }
    assert [f["sizes"] for f in report["files"]] == [[48]]
    assert report["bound"] == 1e-3
    for file in report["files"]:
        data = (files / file["file"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        (errors,) = file["max_abs_error"].values()
        assert errors.keys() == {"1", "3"}
        assert all(0 <= error < 1e-4 for error in errors.values())


@pytest.mark.slow
def test_a_file_says_how_its_input_is_made_and_what_the_logits_are_of(
    files, one_file, programs, folder
):
    config = json.loads((folder / "config.json").read_text())
    about = []
    for path in (files / "model-48.onnx", one_file / "model.onnx"):
        properties = onnx.load(path).metadata_props
        about.append({p.key: json.loads(p.value) for p in properties})
    extra = {"about.json": ""}
    torch.export.load(programs / "model-48.pt2", extra_files=extra)
    about.append(json.loads(extra["about.json"]))
    assert [a.get("size", a.get("sizes")) for a in about] == [48, list(SIZES), 48]
    for found in about:
        assert found["preprocessing"] == config["preprocessing"]
        assert found["classes"] == CLASSES


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_a_file(files, one_file, programs):
    with zipfile.ZipFile(programs / "model-48.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents += [p.read_bytes() for p in (files / "model-48.onnx", one_file / "model.onnx")]
    for content in contents:
        assert b"site-packages" not in content
        assert str(ROOT).encode() not in content


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"arch": "parallel_mobilenetv2", "sizes": [32]}, ("--format", "torch.export")),
        ({"mode": "preact", "qw": 2, "qa": 2, "sizes": [32]}, ("--format", "onnx")),
        pytest.param(
            {"arch": "parallel_mobilenetv2", "sizes": [48, 32]},
            ("--format", "onnx", "--one-file"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"mode": "preact_typeA", "qw": 2, "qa": 4, "sizes": [32]},
            ("--format", "torch.export"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mobilenetv2", "quantized", "mobilenetv2 in one file", "quantized program"],
)
@pytest.mark.slow
def test_other_networks_are_exported(tmp_path, network, words, capsys):
    source = releases.write(tmp_path / "release", **network)
    output = _export(source, tmp_path / os.fsdecode(b"out\xff\n"), *words)
    assert "32, " in capsys.readouterr().out
    images = _noise(2, 32)
    if "--one-file" in words:
        logits = _run(output / "model.onnx", images=images, size=np.array(32))
    elif "onnx" in words:
        logits = _run(output / "model-32.onnx", images=images)
    else:
        program = _program(output / "model-32.pt2")
        logits = program(torch.from_numpy(images)).detach().numpy()
    expected = _expected(source, images, 32)
    np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_search_for_levels_gives_what_the_quantizer_does(bits):
    quantizer = ActivationQuantizer(bits).eval()
    quantizer.basis.mul_(torch.rand(bits) + 0.5)
    search = Levels(quantizer)
    on_thresholds = search.thresholds[1:]
    values = torch.cat(
        [torch.randn(3000) * 2, on_thresholds, on_thresholds.nextafter(torch.ones(()))]
    )
    assert torch.equal(search(values), quantizer(values))
    assert len(search(values).unique()) == 2**bits


def _refused(words: list[str], code: int, capsys, tmp_path: Path) -> str:
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", *words]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_a_file_that_computes_something_else_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "write", lambda path, *_: path.write_bytes(b"something"))
    found = release.load(folder)
    monkeypatch.setattr(
        onnx_export, "load", lambda _: lambda x, size: found(x, size) + (0.01 if size == 48 else 0)
    )
    words = [str(folder), "--format", "onnx", "--output", str(tmp_path / "out")]
    err = _refused(words, 1, capsys, tmp_path)
    assert re.search(r"model-48.onnx computes something else: at size 48 .* off by 1.0e-02", err)


def test_a_network_that_cannot_be_exported_is_one_line(folder, tmp_path, monkeypatch, capsys):
    def fail(*_):
        try:
            raise ValueError("no such operation in ONNX")
        except ValueError as error:
            raise RuntimeError("a page\nof advice") from error

    monkeypatch.setattr(onnx_export, "write", fail)
    words = [str(folder), "--format", "onnx", "--output", str(tmp_path / "out")]
    err = _refused(words, 1, capsys, tmp_path)
    assert "parallel_resnet10 cannot be exported (no such operation in ONNX)" in err


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_library_is_named(folder, tmp_path, monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    words = [str(folder), "--format", "onnx", "--output", str(tmp_path / "out")]
    err = _refused(words, 2, capsys, tmp_path)
    assert f'{library} is not installed: pip install "rsnet-trainer[onnx]"' in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RELEASE", "--format", "onnx", "--output", "TAKEN"], "taken exists; give another name"),
        (["RELEASE", "--format", "onnx", "--output", "OUT", "--sizes", "40"],
         "--sizes 40: give some of 64 48 32, each once"),
        (["RELEASE", "--format", "onnx", "--output", "OUT", "--sizes", "64", "64"],
         "--sizes 64 64: give some of 64 48 32, each once"),
        (["RELEASE", "--format", "onnx", "--output", "OUT", "--one-file", "--sizes", "64"],
         "--one-file is for two sizes or more"),
        (["RELEASE", "--format", "torch.export", "--output", "OUT", "--one-file"],
         "--one-file is of --format onnx"),
        (["RELEASE", "--output", "onnx"], "--output onnx: give --format onnx, too"),
        (["RELEASE", "--output", "model.onnx"], "--output model.onnx: give --format onnx, too"),
        (["RUN", "--format", "onnx", "--output", "OUT"], "holds neither a run with checkpoints/best.pt"),
        (["NONE", "--format", "onnx", "--output", "OUT"], "there is no run, checkpoint or release"),
        (["RELEASE", "--format", "tflite", "--output", "OUT"], "tflite"),
        (["RELEASE", "--output", "OUT"], "the original has no parallel_resnet10 with width_mult"),
        (["NONE", "--output", "OUT"], "there is no run, checkpoint or release"),
        (["NONE", "--output", "OUT", "--sizes", "64"], "--sizes and --one-file: --format original takes"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, tmp_path, capsys, words, message):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    paths = {"RELEASE": folder} | {n.upper(): tmp_path / n for n in ("taken", "out", "run", "none")}
    assert message in _refused([str(paths.get(w, w)) for w in words], 2, capsys, tmp_path)


def test_a_damaged_release_is_named_and_leaves_nothing(folder, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:-1])
    words = [str(damaged), "--format", "torch.export", "--output", str(tmp_path / "out")]
    assert "config.json" in _refused(words, DataError.exit_code, capsys, tmp_path)


def test_an_export_that_gives_nan_computes_something_else():
    model = create_model(
        ModelConfig("parallel_resnet10", 3, (32,), width_mult=0.125, stem="small")
    ).eval()

    def exported(images, _size):
        return torch.full((len(images), 3), torch.nan)

    with pytest.raises(DataError, match=r"x\.onnx computes something else"):
        writer._errors(model, exported, Path("x.onnx"), 32)
