"""Latencies of the sizes: how they are measured and kept, and which size a budget buys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.utils.errors import DataError, UsageError
from rsnet.__main__ import main
from rsnet.inference import latency
from rsnet.inference.classifier import SwitchableClassifier
from tests.helpers import releases
from tests.helpers.releases import SIZES

IMAGE = np.zeros((40, 50, 3), np.uint8)
# The smallest is the most accurate; 64 and 48 are alike.
ACCURACY = {
    name: {"top1": top1, "top5": 90.0}
    for name, top1 in (("64", 60.0), ("48", 60.0), ("32", 70.0), ("ensemble", 80.0))
}
TABLE = {
    64: {"median": 8.0, "p95": 9.0},
    48: {"median": 4.0, "p95": 5.0},
    32: {"median": 2.0, "p95": 3.0},
}


class _Clock:
    """Time passes in forwards alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_median_and_p95_are_those_of_the_turns_after_the_warm_up(monkeypatch):
    clock, turns = _Clock(), []
    monkeypatch.setattr(latency, "time", clock)

    def forward(size: int) -> None:
        turns.append(size)
        turn = (len(turns) - 1) // 2 - latency.WARM_UP
        clock.now += 100 if turn < 0 else size * (turn + 1) / 1000

    table = latency.measure(forward, (2, 1))
    assert turns == [2, 1] * (latency.WARM_UP + latency.REPEATS)
    times = np.arange(1, latency.REPEATS + 1)
    for size in (1, 2):
        assert table[size]["median"] == pytest.approx(size * np.median(times))
        assert table[size]["p95"] == pytest.approx(size * np.percentile(times, 95))


@pytest.mark.parametrize(
    ("budget", "accuracy", "size"),
    [(9.0, None, 64), (8.9, None, 48), (3.0, None, 32), (9.0, ACCURACY, 32)],
)
def test_a_budget_buys_the_most_accurate_size_whose_p95_fits(budget, accuracy, size):
    assert latency.best_size(TABLE, budget, accuracy) == size


def test_of_sizes_alike_the_faster_is_bought():
    slow = TABLE | {32: {"median": 20.0, "p95": 20.0}}
    assert latency.best_size(slow, 10.0, ACCURACY) == 48


def test_a_budget_that_is_too_small_is_told_what_the_fastest_takes():
    message = r"no size fits into 2.9 ms: size 32 takes 3.00 ms in 95 of 100 batches"
    with pytest.raises(UsageError, match=message):
        latency.best_size(TABLE, 2.9, None)


def test_a_table_is_read_back_for_the_same_conditions_alone(tmp_path):
    path = tmp_path / latency.file_name("NVIDIA H100 / 80GB")
    assert path.name == "latency-NVIDIA-H100-80GB.json"
    assert latency.load(path, {"batch_size": 4}, SIZES) is None
    latency.save(path, {"batch_size": 4}, TABLE)
    assert latency.load(path, {"batch_size": 4}, SIZES) == TABLE
    assert latency.load(path, {"batch_size": 1}, SIZES) is None


def _table_with(ms: float) -> str:
    return json.dumps({"conditions": {}, "ms": {str(s): {"median": 1, "p95": ms} for s in SIZES}})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, '{"conditions": {}, "ms": {"64": 3}}', _table_with(10**400)],
    ids=["empty", "list", "deep", "number", "digits"],
)
def test_a_file_that_is_no_table_is_named(tmp_path, text):
    (tmp_path / "latency-cpu.json").write_text(text)
    with pytest.raises(DataError, match=r"latency-cpu\.json is damaged \(.*\); remove it"):
        latency.load(tmp_path / "latency-cpu.json", {}, SIZES)


@pytest.mark.parametrize("ms", [0, -1, float("nan"), float("inf")])
def test_a_time_that_no_forward_takes_is_refused(tmp_path, ms):
    path = tmp_path / "latency-cpu.json"
    path.write_text(_table_with(ms))
    with pytest.raises(DataError, match=r"latency-cpu\.json has a latency that is none; remove it"):
        latency.load(path, {}, SIZES)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: AMD EPYC 9654\nmodel name\t: no\n", "cpu AMD EPYC 9654"),
        ("Hardware: none\n", "cpu"),
        (None, "cpu"),
    ],
)
def test_a_cpu_goes_by_its_models_name(tmp_path, monkeypatch, text, name):
    monkeypatch.setattr(latency, "CPU_INFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert latency.device_name(torch.device("cpu")) == name


@pytest.fixture
def folder(tmp_path) -> Path:
    return releases.write(tmp_path / "release", ACCURACY)


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """The images of each batch that was computed for a table, which is TABLE."""
    images: list[int] = []

    def measure(forward, sizes):
        assert sizes == SIZES
        images.extend(len(forward(size)) for size in sizes)
        return TABLE

    monkeypatch.setattr(latency, "measure", measure)
    return images


def test_whole_batches_are_measured_once_and_kept_beside_the_release(folder, measured):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):
        classifier = SwitchableClassifier.load(folder, batch_size=3)
        assert classifier.classify(IMAGE, budget_ms=9.0)[0].size == 32
        assert classifier.classify(IMAGE, budget_ms=3.0)[0].size == 32
    assert measured == [3, 3, 3]
    (file,) = folder.glob("latency-cpu*.json")
    kept = json.loads(file.read_text())
    assert kept["ms"]["48"] == TABLE[48]
    assert kept["conditions"]["batch_size"] == 3
    assert {n: (folder / n).read_bytes() for n in before} == before
    SwitchableClassifier.load(folder, batch_size=2).classify(IMAGE, budget_ms=9.0)
    assert measured[3:] == [2, 2, 2]


@pytest.mark.usefixtures("measured")
def test_that_a_device_is_measured_is_said(folder, capsys):
    classifier = SwitchableClassifier.load(folder, batch_size=3)
    for _ in range(2):
        classifier.classify(IMAGE, budget_ms=9.0)
    assert capsys.readouterr().err == "measuring batches of 3 at sizes 64 48 32 on cpu\n"


BUSY = {
    64: {"median": 8.0, "p95": 9.0},
    48: {"median": 4.0, "p95": 8.4},
    32: {"median": 2.0, "p95": 3.0},
}


def test_what_a_busy_machine_measured_is_said_and_not_stored(folder, monkeypatch, capsys):
    monkeypatch.setattr(latency, "measure", lambda *_: BUSY)
    classifier = SwitchableClassifier.load(folder)
    assert classifier.latencies() == BUSY
    said = capsys.readouterr().err.splitlines()[-1]
    reason = "at size 48, one of twenty batches took 2.1 times as long as usual"
    assert said == f"these latencies are not stored: {reason}"
    assert not list(folder.glob("latency-*"))


def test_a_stored_table_of_a_busy_machine_is_measured_anew(folder, measured):
    classifier = SwitchableClassifier.load(folder, batch_size=3)
    latency.save(classifier._latency_file, classifier.conditions, BUSY)
    assert classifier.latencies() == TABLE
    assert measured == [3, 3, 3]
    assert SwitchableClassifier.load(folder, batch_size=3).latencies() == TABLE
    assert measured == [3, 3, 3]


def test_a_budget_that_stored_latencies_refuse_names_the_file_and_how_to_measure_anew(
    folder, monkeypatch, capsys
):
    """Not where this process has measured, and to no client of a server."""
    monkeypatch.setattr(latency, "measure", lambda *_: TABLE)
    words = [str(folder), str(folder / "a.png"), "--device", "cpu", "--budget-ms", "2.9"]
    Image.fromarray(IMAGE).save(folder / "a.png")
    for advice in (False, True):
        assert main(["predict", *words]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        (file,) = folder.glob("latency-*")
        end = f"; says {file}: --remeasure, or calibrate_latency(), measures anew" if advice else ""
        assert error.endswith(f": size 32 takes 3.00 ms in 95 of 100 batches{end}")
    monkeypatch.setattr(
        latency, "measure", lambda *_: {s: {"median": 1.0, "p95": 1.0} for s in SIZES}
    )
    assert main(["predict", *words, "--remeasure"]) == 0
    assert json.loads(file.read_text())["ms"]["64"]["p95"] == 1.0


def test_milliseconds_an_image_are_the_median_batchs(folder, measured):
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    assert classifier.ms_per_image() == {s: ms["median"] / 4 for s, ms in TABLE.items()}
    assert all(ms["median"] != ms["p95"] for ms in TABLE.values())
    assert measured == [4, 4, 4]


def test_a_release_that_cannot_be_written_to_is_measured_in_each_process(
    folder, measured, monkeypatch
):
    def fail(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(latency, "atomic_write_json", fail)
    classifier = SwitchableClassifier.load(folder, batch_size=3)
    for _ in range(2):
        assert classifier.classify(IMAGE, budget_ms=9.0)[0].size == 32
    assert measured == [3, 3, 3]


@pytest.mark.parametrize("other", [{"size": 64}, {"confidence": 0.5}])
def test_a_budget_stands_alone(folder, other):
    classifier = SwitchableClassifier.load(folder)
    with pytest.raises(UsageError, match="give one of size, confidence and budget_ms"):
        classifier.classify(IMAGE, budget_ms=1.0, **other)
