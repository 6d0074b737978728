"""`rsnet export --format onnx --int8`: what the files compute, what is said of them, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from pipelines.utils.errors import DataError
from rsnet.__main__ import main
from rsnet.export import int8
from rsnet.inference import latency
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.inference.onnx_runner import OnnxRunner
from tests.helpers import releases
from tests.helpers.releases import CLASSES

pytestmark = pytest.mark.slow  # to calibrate an export takes 6 s

SIZES = (48, 32)
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return releases.write_photos(tmp_path_factory.mktemp("int8") / "val")


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory) -> Path:
    """The release beside the export; drawn at random, its accuracy may do anything."""
    folder = tmp_path_factory.mktemp("exported")
    source = releases.write(folder / "release", sizes=list(SIZES))
    words = ["--format", "onnx", "--int8", "--calibrate", str(data), "--max-drop", "100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "has_bf16", lambda _: True)
        assert main(["export", str(source), "--output", str(folder / "int8"), *words]) == 0
    return folder / "int8"


@functools.cache
def _graph(path: Path) -> tuple[list, dict[str, np.ndarray]]:
    graph = onnx.load(path).graph
    return list(graph.node), {v.name: numpy_helper.to_array(v) for v in graph.initializer}


@functools.cache
def _inputs(data: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All photos as an evaluation prepares them, by PIL and NumPy alone; and their labels."""
    paths = sorted(data.glob("*/*.jpg"))
    pixels = np.stack([releases.pixels(path, size).numpy() for path in paths])
    labels = np.array([CLASSES.index(path.parent.name) for path in paths])
    return ((np.float32(pixels) / 255 - MEAN) / STD).transpose(0, 3, 1, 2), labels


def _logits(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize("size", SIZES)
def test_every_convolution_has_weights_of_seven_bits_and_a_scale_for_each_channel(exported, size):
    nodes, values = _graph(exported / f"model-{size}.onnx")
    made_by = {node.output[0]: node for node in nodes}
    convs = [node for node in nodes if node.op_type == "Conv"]
    assert len(convs) == 12
    for conv in convs:
        dequantize = made_by[conv.input[1]]
        assert dequantize.op_type == "DequantizeLinear"
        weight, scale = (values[name] for name in dequantize.input[:2])
        assert weight.dtype == np.int8
        assert 60 <= np.abs(weight.astype(int)).max() <= 64  # two products of more overflow 16 bits
        assert scale.shape == (len(weight),)
        assert len(np.unique(scale)) > 1
        assert made_by[conv.input[0]].op_type == "DequantizeLinear"


def _input_scale(path: Path) -> float:
    nodes, values = _graph(path)
    (node,) = (n for n in nodes if n.op_type == "QuantizeLinear" and n.input[0] == "images")
    return float(values[node.input[1]])


@pytest.mark.parametrize("size", SIZES)
def test_ranges_are_those_of_images_prepared_as_for_predict(exported, data, size):
    images, _ = _inputs(data, size)
    expected = (images.max() - images.min()) / 255
    assert _input_scale(exported / f"model-{size}.onnx") == pytest.approx(expected, rel=1e-5)


def test_each_size_has_scales_of_its_own(exported):
    def scales(size: int) -> list[float]:
        nodes, values = _graph(exported / f"model-{size}.onnx")
        found = (values[n.input[1]] for n in nodes if n.op_type == "QuantizeLinear")
        return [float(s) for s in found]

    first, second = map(scales, SIZES)
    assert len(first) == len(second) > 12
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 10


@pytest.mark.parametrize("size", SIZES)
def test_the_report_compares_the_precisions_on_the_given_images(exported, data, size):
    report = json.loads((exported / "export.json").read_text())
    assert report["dtype"] == "int8"
    assert (report["calibration_images"], report["comparison_images"]) == (70, 70)
    found = report["comparison"][str(size)]
    assert list(found) == ["float32", "bfloat16", "int8"]
    assert all(one["ms"] > 0 and 0 <= one["top1"] <= 100 for one in found.values())
    images, labels = _inputs(data, size)
    right = _logits(exported / f"model-{size}.onnx", images).argmax(axis=1) == labels
    assert found["int8"]["top1"] == pytest.approx(100 * right.mean())
    model = SwitchableClassifier.load(exported.parent / "release").model
    with torch.no_grad():
        answers = model(torch.from_numpy(images), size).argmax(dim=1).numpy()
    # Of 70 images, two may have two classes that are equally likely but for rounding.
    assert found["float32"]["top1"] == pytest.approx(100 * (answers == labels).mean(), abs=3)


def test_the_accuracies_by_which_a_size_is_chosen_are_those_of_eight_bits(exported, data):
    """config.json has those of the network in float32."""
    classifier = SwitchableClassifier.load(exported)
    for size in SIZES:
        images, labels = _inputs(data, size)
        right = _logits(exported / f"model-{size}.onnx", images).argmax(1) == labels
        assert classifier.accuracy[str(size)] == {"top1": pytest.approx(100 * right.mean())}


def test_onnx_runtimes_lack_of_memory_is_one_error(exported, monkeypatch):
    classifier = SwitchableClassifier.load(exported)

    class Session:
        def run(self, *_):
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(
                "Failed to allocate memory for requested buffer of size 9"
            )

    monkeypatch.setattr(OnnxRunner, "_open", lambda *_: Session())
    with pytest.raises(DataError, match="1 images at size 32 do not fit into the memory of cpu"):
        classifier.logits(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), 32)


def test_eight_bits_are_near_the_network_and_a_quarter_of_its_size(exported, data):
    images, _ = _inputs(data, 48)
    model = SwitchableClassifier.load(exported.parent / "release").model
    with torch.no_grad():
        expected = model(torch.from_numpy(images), 48).numpy()
    off = np.abs(_logits(exported / "model-48.onnx", images) - expected).max()
    assert 0 < off < 0.1 * np.abs(expected).max()
    (file, _) = json.loads((exported / "export.json").read_text())["files"]
    assert file["bytes"] == (exported / "model-48.onnx").stat().st_size
    assert file["bytes"] < file["float32_bytes"] / 3


@pytest.fixture
def steady(monkeypatch) -> None:
    monkeypatch.setattr(latency, "sample", lambda _, sizes, n: {s: [1.0] * n for s in sizes})


@pytest.mark.usefixtures("steady")
def test_predict_and_tune_compute_with_the_files(exported, data, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "int8")
    photo = data / "ant" / "0.jpg"
    words = ["predict", str(folder), str(photo), "--json", "--size", "32", "--device", "cpu"]
    assert main([*words, "--engine", "onnxruntime"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    images, _ = _inputs(data, 32)
    at = sorted(data.glob("*/*.jpg")).index(photo)
    logits = torch.from_numpy(_logits(folder / "model-32.onnx", images[at : at + 1]))
    best = [one["probability"] for one in json.loads(line)["top"]]
    np.testing.assert_allclose(best, logits.softmax(1)[0].topk(5).values, rtol=1e-4)
    tuned = ["tune", str(folder), "--data", str(data), "--target-ms", "1000", "--device", "cpu"]
    assert main(tuned) == 0
    assert (folder / "tuned.json").is_file()
    latencies = next(folder.glob("latency-*.json"))
    conditions = json.loads(latencies.read_text())["conditions"]
    assert conditions["dtype"] == "int8"
    assert conditions["engine"] == f"ONNX Runtime {onnxruntime.__version__}"


@pytest.mark.usefixtures("steady")
def test_bench_says_what_computed(exported, data, capsys):
    words = ["bench", str(exported), "--data", str(data), "--engine", "onnxruntime"]
    assert main([*words, "--device", "cpu"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(f"int8, ONNX Runtime {onnxruntime.__version__}")
    assert main([*words, "--device", "cpu", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["sizes"]
    assert [(s["size"], s["peak_mb"]) for s in sizes] == [(48, None), (32, None)]


@pytest.fixture
def _no_work(monkeypatch, exported):
    """All of an export but what is done with the accuracies, which fall by 1.5 points at size 32."""
    comparison = {
        "48": {"float32": {"top1": 80.0, "ms": 2.0}, "bfloat16": None, "int8": {"top1": 81.0, "ms": 1.0}},
        "32": {"float32": {"top1": 70.0, "ms": 2.0}, "bfloat16": None, "int8": {"top1": 68.5, "ms": 1.0}},
    }  # fmt: skip
    whole = json.loads((exported / "export.json").read_text())
    kept = {"comparison_images": 70, "comparison_conditions": whole["comparison_conditions"]}

    def export(_source, output, _format, sizes):  # noqa: ARG001
        shutil.copytree(exported, output)
        report = whole | {"bound": 1e-3}
        (output / "export.json").write_text(json.dumps(report))

    monkeypatch.setattr(int8, "export_release", export)
    monkeypatch.setattr(int8, "quantize", lambda source, target, _: shutil.copy(source, target))
    monkeypatch.setattr(int8, "_compare", lambda *_: {"comparison": comparison, **kept})


@pytest.mark.usefixtures("_no_work")
def test_a_fall_of_the_accuracy_is_refused_and_may_be_allowed(exported, data, tmp_path, capsys):
    words = ["export", str(exported.parent / "release"), "--format", "onnx", "--int8"]
    words += ["--calibrate", str(data), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    expected = "--int8: at size 32 top-1 falls from 70.00 to 68.50 %, by more than --max-drop 1;"
    assert expected in err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--max-drop", "1.5"]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.strip().startswith("32"))
    assert row == ["32", "70.00", "68.50", "2.00", "1.00"]  # no bfloat16 on this machine


@pytest.mark.usefixtures("_no_work")
def test_a_network_that_cannot_be_quantized_is_one_line(
    exported, data, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("no such operation\nin ONNX Runtime")

    monkeypatch.setattr(int8, "quantize", fail)
    words = ["export", str(exported.parent / "release"), "--format", "onnx", "--int8"]
    assert main([*words, "--calibrate", str(data), "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.endswith("--int8: parallel_resnet10 cannot be quantized (no such operation)")
    assert list(tmp_path.iterdir()) == []


def test_quantized_networks_say_why_not(data, tmp_path, capsys):
    source = releases.write(tmp_path / "release", sizes=[32], qw=2)
    words = ["export", str(source), "--format", "onnx", "--int8", "--calibrate", str(data)]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "--int8: this network is quantized already (--qw 2 --qa 32): 8 bits would round" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx", "--int8"], "--int8: give --calibrate, too, the folder of labelled"),
        (["--format", "onnx", "--calibrate", "x"], "--calibrate and --max-drop are of --int8"),
        (["--format", "onnx", "--max-drop", "2"], "--calibrate and --max-drop are of --int8"),
        (["--format", "timm", "--int8", "--calibrate", "x"], "--int8 is of --format onnx, a file for"),
        (["--format", "onnx", "--int8", "--one-file"], "--int8 is of --format onnx, a file for each"),
        (["--format", "onnx", "--int8", "--calibrate", "x", "--max-drop", "-1"],
         "--max-drop -1.0: must be from 0 to 100 percentage points"),
        (["--format", "onnx", "--int8", "--calibrate", "nowhere"], "--calibrate: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(exported, tmp_path, capsys, words, message):
    source = str(exported.parent / "release")
    assert main(["export", source, "--output", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def _damage(folder: Path, how: str) -> None:
    path = folder / "export.json"
    report = json.loads(path.read_text())
    if how == "bytes":
        model = folder / "model-48.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"x")
    elif how == "missing":
        (folder / "model-48.onnx").unlink()
    elif how == "junk":
        path.write_text("{")
    elif how == "old":
        del report["dtype"]
    elif how == "path":
        report["files"][0]["file"] = "../model-48.onnx"
    elif how == "size":
        report["files"][0]["sizes"] = [40]
    if how != "junk":
        path.write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("bytes", r"model-48.onnx: is damaged: its SHA-256 is not that in export.json"),
        ("missing", r"model-48.onnx: there is no such file"),
        ("junk", r"export.json: is no JSON"),
        ("old", r"export.json: is of an earlier version of rsnet; export the release again"),
        ("path", r"export.json: files.file is '../model-48.onnx', must be model.onnx or model-SIZE.onnx"),
        ("size", r"export.json has other sizes than .*config.json"),
    ],
)  # fmt: skip
def test_a_damaged_export_is_one_line(exported, data, tmp_path, capsys, how, message):
    folder = shutil.copytree(exported, tmp_path / "int8")
    _damage(folder, how)
    photo = str(data / "ant" / "0.jpg")
    assert main(["predict", str(folder), photo, "--device", "cpu"]) in (1, 2)
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("rsnet predict: error: ")
    assert message.replace(".*", str(folder) + "/") in err


def test_a_file_that_onnx_runtime_does_not_take_is_one_error(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "int8")
    report = json.loads((folder / "export.json").read_text())
    (folder / "model-48.onnx").write_bytes(b"junk")
    report["files"][0] |= {"bytes": 4, "sha256": hashlib.sha256(b"junk").hexdigest()}
    (folder / "export.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match=r"model-48.onnx: ONNX Runtime does not take it"):
        OnnxRunner(folder)(torch.zeros(1, 3, 48, 48), 48)


@pytest.mark.parametrize("words", [["--dtype", "bfloat16"], ["--fold"], ["--cuda-graphs"]])
def test_what_the_files_decide_is_no_option(exported, data, capsys, words):
    photo = str(data / "ant" / "0.jpg")
    assert main(["predict", str(exported), photo, *words]) == 2
    assert "--engine onnxruntime: the files say how they are computed" in capsys.readouterr().err


def test_a_release_is_no_export(exported, data, capsys):
    photo = str(data / "ant" / "0.jpg")
    source = exported.parent / "release"
    assert main(["predict", str(source), photo, "--engine", "onnxruntime", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert f"{source} holds no export.json; write a folder for it by `rsnet export" in err


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_neither_rounded_nor_cut_off(exported, data, size):
    nodes, _ = _graph(exported / f"model-{size}.onnx")
    (last,) = (node for node in nodes if "logits" in node.output)
    assert last.op_type == "Gemm"
    images, _ = _inputs(data, size)
    logits = _logits(exported / f"model-{size}.onnx", images * 3)  # beyond the calibrated range
    assert len(np.unique(logits)) > 256


def test_images_to_calibrate_with_are_spread_over_all():
    assert int8._spread([*"abcdefghi"], 3) == ["a", "d", "g"]


def test_logits_stay_in_float_also_where_shapes_change_behind_the_classifier():
    """As of timm's networks that classify by a convolution."""

    def pair(before: str, after: str) -> list[onnx.NodeProto]:
        names = [f"{before}_scale", f"{before}_zero"]
        return [
            onnx.helper.make_node("QuantizeLinear", [before, *names], [f"{before}_q"]),
            onnx.helper.make_node("DequantizeLinear", [f"{before}_q", *names], [after]),
        ]

    nodes = [
        onnx.helper.make_node("Conv", ["images", "weight"], ["conv"]),
        *pair("conv", "conv_back"),
        onnx.helper.make_node("Flatten", ["conv_back"], ["flat"]),
        *pair("flat", "logits"),
    ]
    constants = {"weight": np.ones((3, 3, 1, 1), np.float32)}
    for name in ("conv", "flat"):
        constants |= {f"{name}_scale": np.float32(0.5), f"{name}_zero": np.uint8(0)}
    graph = onnx.helper.make_graph(
        nodes,
        "toy",
        [onnx.helper.make_tensor_value_info("images", 1, [1, 3, 1, 1])],
        [onnx.helper.make_tensor_value_info("logits", 1, [1, 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    int8._leave_output_in_float(graph)
    assert [node.op_type for node in graph.node] == ["Conv", "Flatten"]
    assert [value.name for value in graph.initializer] == ["weight"]
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (logits,) = session.run(None, {"images": np.full((1, 3, 1, 1), 0.123, np.float32)})
    assert logits == pytest.approx(np.full((1, 3), 0.369), rel=1e-5)
