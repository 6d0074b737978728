"""What is run on a machine with a GPU, on the CPU with tiny settings."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvidia.dali import fn

from benchmarks.gpu import loader_sweep, measure, smoke, trace
from benchmarks.gpu.opened import opened
from pipelines.batch import Batch, Loaders, LoaderSpec
from pipelines.dali import DaliOptions
from pipelines.utils.errors import DataError, UsageError
from tests.helpers import processes
from tests.helpers.servers import until
from tests.pipelines.dali.test_loader import with_the_graph_of_a_gpu

ROOT = Path(__file__).parents[2]
TINY = {"sizes": (32, 24), "workers": 1}
SHORT = ("pictures-cuda", "pictures-bf16", "pictures-val", "epochs", "late-reading")


@pytest.fixture
def options(photos, tmp_path) -> smoke.Options:
    tiny = {"arch": "parallel_resnet10", "batch_size": 4, "batches": 2}
    return smoke.Options(photos, tmp_path / "smoke", SHORT, **tiny, **TINY)


def test_the_smoke_test_runs_and_finds_all_well(options, capsys):
    assert smoke.run(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "smoke: all well"
    assert {line.split(": ")[0] for line in lines} >= set(SHORT)
    with pytest.raises(UsageError, match="smoke: there is such a file or folder already"):
        smoke.run(options)


def test_a_check_that_fails_is_named_and_the_others_are_done(options, monkeypatch, capsys):
    def fail(_o):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(smoke, "ACTIONS", {"train": fail, "evaluate": lambda _: "done"})
    assert smoke.run(smoke.Options(options.data, options.output, ("train", "evaluate"))) == 1
    _, train, evaluate, last = capsys.readouterr().out.splitlines()
    assert train.startswith("train: FAILED: RuntimeError: no kernel image (")
    assert evaluate.startswith("evaluate: done (")
    assert last == "smoke: failed: train"


@pytest.mark.parametrize(
    ("darker", "other_label", "complaint"),
    [(0, 0, None), (2, 0, None), (4, 0, r"worst \[4.0, 4.0\] of 255"), (0, 1, "other labels")],
)
def test_pictures_that_differ_by_more_than_rounding_fail(
    options, monkeypatch, darker, other_label, complaint
):
    images = [torch.rand(4, 3, s, s).to(memory_format=torch.channels_last) for s in (32, 24)]
    exact = Batch(tuple(images), torch.arange(4))
    one = torch.tensor([0, 0, 0, 1.0]).reshape(4, 1, 1, 1)  # the last picture of each size
    other = Batch(
        tuple(x - one * darker / 255 for x in images),
        exact.labels + other_label * one.flatten().long(),
    )
    given = iter([other, exact])

    @contextmanager
    def loaders(*_):
        batch = next(given)
        yield Loaders([batch], [batch], [])  # type: ignore[list-item]

    monkeypatch.setattr(smoke, "loaders", loaders)
    if complaint is None:
        smoke.pictures(options, "train", 0.65)
    else:
        with pytest.raises(AssertionError, match=complaint):
            smoke.pictures(options, "train", 0.65)


def test_every_setting_of_the_loader_is_tried_until_the_time_is_over(photos, capsys):
    o = loader_sweep.Options(photos, batch_size=4, batches=1, **TINY)
    assert loader_sweep.run(o) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["images_per_s"]
    assert {"default", "default again", "prefetch 1", "evaluation"} <= set(found)
    late = loader_sweep.Options(photos, seconds=-1, batch_size=4, batches=1, **TINY)
    assert loader_sweep.run(late) == 1
    assert "not tried: out of time" in capsys.readouterr().out


def test_the_crop_that_a_decoder_makes_is_the_one_that_a_gpus_graph_cuts_from_the_photo(
    photos, monkeypatch
):
    spec = LoaderSpec(photos, (32, 24), 4, torch.device("cpu"))

    def batches() -> list[Batch]:
        with opened(spec, DaliOptions(workers=2)) as loaders:
            return list(with_the_graph_of_a_gpu(loaders).train)

    with loader_sweep.crop_decoded_alone():
        alone = batches()
    monkeypatch.setattr(fn.decoders, "image_slice", None)  # which a GPU's graph does without
    for a, b in zip(alone, batches(), strict=True):
        assert all(map(torch.equal, a.tensors, b.tensors))


def test_the_best_setting_is_taken_only_if_it_is_faster_than_the_default():
    sweep = loader_sweep.Sweep(loader_sweep.Options(ROOT))
    sweep.found = {
        "default again": 100.0,
        "workers 2": 90.0,
        "workers 4": 120.0,
        "prefetch 4": 99.0,
    }
    assert sweep.best("workers", 3) == 4
    assert sweep.best("prefetch", 2) == 2
    assert sweep.best("decoder-hw-load", 0.65) == 0.65


def test_parts_are_measured_in_order_until_the_time_is_over(photos, tmp_path, monkeypatch, capsys):
    """The words are run by a Python of their own, as those of a part are."""
    scripts = {
        "good": "print('fast')",
        "bad": "raise SystemExit(3)",
        "slow": "import time; time.sleep(600)",
    }
    run = tmp_path / "run.py"
    run.write_text("import sys; exec(sys.argv[1])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kinds = {name: (9.0, lambda _o, text=text: ["run", text]) for name, text in scripts.items()}
    kinds["slow"] = (0.3, kinds["slow"][1])
    monkeypatch.setattr(measure, "KINDS", kinds)
    o = measure.Options(photos, tmp_path / "out", parts=("good", "bad", "slow"), **TINY)
    assert measure.run(o) == 1
    text = (o.output / "results.md").read_text()
    head, good, bad, slow = text.split("\n## ")
    for name in ("date: 20", "GPU: ", "commit: ", "command: `python -m benchmarks.gpu.measure"):
        assert f"\n- {name}" in head
    assert good.startswith("good\n\n```\n$ python -m run 'print('")
    assert "fast\nexit code 0, " in good
    assert "exit code 3, " in bad
    assert slow.endswith("ended after 0 s: out of time\n```\n")
    late = measure.Options(photos, tmp_path / "late", parts=("good",), seconds=1, **TINY)
    assert measure.run(late) == 0
    assert "not begun: out of time" in (late.output / "results.md").read_text()
    assert "== bad: exit code 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("speed", "there is no such part; one of smoke sweep profile"),
        ("profile:resnet50", "is written as profile:ARCH:BATCH:SWITCHES"),
        ("step", "is written as step:ARCH:BATCH"),
        ("sweep:64:2", "is written as sweep:BATCH"),
    ],
)
def test_a_part_that_is_none_ends_it_before_anything_is_measured(tmp_path, part, said):
    o = measure.Options(tmp_path, tmp_path / "out", parts=("smoke", part), **TINY)
    with pytest.raises(UsageError, match=f"--parts {part}: {said}"):
        measure.run(o)
    assert not o.output.exists()


def test_data_without_its_folders_is_one_line_before_anything_is_begun(tmp_path):
    (tmp_path / "train").mkdir()
    for run in (
        lambda: smoke.run(smoke.Options(tmp_path, tmp_path / "out")),
        lambda: loader_sweep.run(loader_sweep.Options(tmp_path)),
        lambda: measure.run(measure.Options(tmp_path, tmp_path / "out")),
    ):
        with pytest.raises(
            UsageError, match=r"--data .*: there is no folder .*/val; it takes train/"
        ):
            run()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # processes that import torch and DALI, a compiler
def test_parts_run_in_processes_of_their_own(photos, tmp_path, monkeypatch):
    popen = partial(processes.ForkedPopen, env=os.environ | {"OMP_NUM_THREADS": "1"})
    monkeypatch.setattr(
        measure, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen})
    )
    parts = ("smoke:4", "profile:resnet10:4:no-kd")
    o = measure.Options(photos, tmp_path / "out", parts=parts, rounds=1, **TINY)
    assert measure.run(o) == 0
    text = (o.output / "results.md").read_text()
    assert text.count("\nexit code 0, ") == len(parts)
    assert "smoke: all well" in text
    assert (o.output / "profile-resnet10-4-no-kd" / "profile" / "profile.json").exists()


def test_a_part_is_ended_with_the_processes_that_it_started():
    script = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    part = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert part.stdout is not None
    with part.stdout:
        child = Path("/proc") / part.stdout.readline().decode().strip() / "stat"
        assert child.exists()
        measure._end(part)
        # A signal takes a moment.
        until(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] in "XZ")


@pytest.mark.slow  # processes that import torch and DALI
def test_its_part_ends_with_it_when_timeout_ends_it(photos, tmp_path):
    words = ["--data", str(photos), "--output", str(tmp_path / "out"), "--parts", "smoke:4"]
    measuring = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.measure", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    printed = tmp_path / "out" / "printed.txt"
    until(lambda: measuring.poll() is not None or (printed.exists() and printed.stat().st_size))
    part = Path(f"/proc/{measuring.pid}/task/{measuring.pid}/children").read_text().split()[0]
    measuring.terminate()
    _, err = measuring.communicate(timeout=60)
    assert err.decode() == "benchmarks.gpu.measure: interrupted\n"
    assert not (Path("/proc") / part).exists()


def write_trace(path: Path, *events: dict) -> Path:
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": list(events)}).encode()))
    return path


def test_a_traces_kernels_and_gaps_are_those_of_all_streams(tmp_path, capsys):
    events = [
        {"cat": "kernel", "name": name, "ts": start, "dur": length}
        for name, start, length in (
            ("conv", 130, 10), ("relu", 100, 20), ("conv", 110, 20),  # two streams; until 140
            ("copy", 145, 1), ("relu", 150, 2),
        )
    ]  # fmt: skip
    other = [{"cat": "cpu_op", "name": "aten::relu", "ts": 0, "dur": 900}, {"name": "a flow"}]
    path = write_trace(tmp_path / "trace.json.gz", *events, *other)
    kernels = trace.read(path)
    assert trace.longest(kernels) == [("conv", 2, 30), ("relu", 2, 22), ("copy", 1, 1)]
    assert trace.gaps_of(kernels) == [(5, "conv", "copy"), (4, "copy", "relu")]
    assert trace.run(trace.Options(path, most=1)) == 0
    out = capsys.readouterr().out
    assert "5 kernels in 0.1 ms; idle for 17.3 %, in 2 gaps" in out  # 9 of 52 us
    assert "copy" in out
    assert out.count("relu") == 0


def test_a_trace_of_a_cpu_has_no_kernels(tmp_path):
    path = write_trace(
        tmp_path / "trace.json.gz", {"cat": "cpu_op", "name": "x", "ts": 0, "dur": 9}
    )
    with pytest.raises(DataError, match="no kernel of a GPU is in it"):
        trace.read(path)
