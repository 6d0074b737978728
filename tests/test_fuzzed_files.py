"""Whatever is in a file, its reader takes it or refuses it in one line: no traceback, crash or hang."""

from __future__ import annotations

import functools
import io
import json
import lzma
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import verify_report
from pipelines.dali import DaliOptions
from pipelines.utils.errors import DataError
from pipelines.verify_report import SplitReport
from rsnet.checkpoint import authors_tensorflow, tf_checkpoint
from rsnet.checkpoint import io as checkpoint_io
from rsnet.checkpoint.weights import load_weights
from rsnet.config.command_line import parse
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig, require_options
from rsnet.evaluation.compare import read_run
from rsnet.inference import latency
from rsnet.inference.cascade import read_tuned
from rsnet.loggers import wandb_sync
from rsnet.loggers.run_dir import RunDir
from rsnet.loggers.wandb_logger import Sent, read_sent, write_sent
from rsnet.models.factory import create_model
from rsnet.models.safe_load import safe_load
from rsnet.release import config as release_config
from rsnet.training import resume
from rsnet.training.state import load_training_state
from rsnet.training.trainer import make_trainer
from tests.helpers.fuzzing import JUNK, accepts_or_refuses, altered, damaged, efforts
from tests.helpers.written import FOLDER, RUN

SIZES = (32, 24, 16)
CONDITIONS = {"batch_size": 4}
SHA256 = json.loads((FOLDER / "release" / "tuned.json").read_bytes())["sha256"]

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a release": ("config.json", lambda path: release_config.parse(path.read_bytes())),
    "a tuned cascade": ("tuned.json", lambda path: read_tuned(path.parent, SHA256, SIZES)),
    "latencies": ("latency.json", lambda path: latency.load(path, CONDITIONS, SIZES)),
    "a verification": ("verified.json", verify_report.read),
    "W&B's run": ("wandb.json", lambda path: read_sent(path.parent)),
    "a run's options": ("run/config.json", resume._noted),
    "options to compare": ("run/config.json", lambda path: read_run(path.parent)),
    "results to compare": ("run/results.json", lambda path: read_run(path.parent)),
    "metrics to compare": ("run/metrics.jsonl", lambda path: read_run(path.parent)),
    "metrics to send": ("run/metrics.jsonl", lambda path: wandb_sync.send_run(path.parent)),
    "options to send": ("run/config.json", lambda path: wandb_sync.send_run(path.parent)),
    "metrics to go on with": (
        "run/metrics.jsonl",
        lambda path: RunDir(path.parent, continues=True, active=True).rewind(1.5, 1),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """One sound file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("config.json", "tuned.json"):
        shutil.copy(FOLDER / "release" / name, folder)
    table = {size: {"median": size / 8, "p95": size / 4} for size in SIZES}
    latency.save(folder / "latency.json", CONDITIONS, table)
    splits = {"train": SplitReport("0" * 64, 9, {"ant/0.png": "no image"})}
    verify_report.write(folder / "verified.json", splits)
    write_sent(folder, Sent("abc", "me", 3))
    shutil.copytree(FOLDER / "run", folder / "run")
    names = (*map(str, SIZES), "ensemble")
    results = {name: {"top1": 50.0, "top5": 90.0, "loss": 1.0} for name in names}
    results |= {"gmacs": dict.fromkeys(names, 0.1), "parameters": {"shared": 9, "private": 3}}
    (folder / "run" / "results.json").write_text(json.dumps(results))
    return folder


@efforts
@pytest.mark.parametrize("kind", READERS)
def test_a_file_is_read_or_refused_whatever_bytes_are_in_it(files, kind, effort):
    name, read = READERS[kind]
    sound = (files / name).read_bytes()

    @effort
    @given(damaged(sound))
    def check(data: bytes) -> None:
        (files / name).write_bytes(data)
        accepts_or_refuses(lambda: read(files / name))

    _with_file_put_back(files / name, sound, check)


@efforts
@pytest.mark.parametrize("kind", READERS)
def test_a_file_is_read_or_refused_whatever_its_fields_hold(files, kind, effort):
    name, read = READERS[kind]
    sound = (files / name).read_bytes()
    is_lines = name.endswith("jsonl")
    content = list(map(json.loads, sound.splitlines())) if is_lines else json.loads(sound)

    @effort
    @given(altered(lambda: content))
    def check(changed: Any) -> None:
        lines = changed if is_lines and isinstance(changed, list) else [changed]
        (files / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        accepts_or_refuses(lambda: read(files / name))

    _with_file_put_back(files / name, sound, check)


def _with_file_put_back(path: Path, sound: bytes, check: Callable[[], None]) -> None:
    try:
        check()
    finally:
        path.write_bytes(sound)


@functools.cache
def _last() -> dict[str, Any]:
    """The content of a checkpoint of a run with all that has a state of its own."""
    data = lzma.decompress((FOLDER / "run" / "checkpoints" / "last.pt.xz").read_bytes())
    return torch.load(io.BytesIO(data), weights_only=True)


def _go_on(path: Path) -> None:
    """What a resumed run does with a checkpoint until its first update."""
    found = checkpoint_io.load(path)
    require_options(found.config, str(path))
    config, _ = parse(DaliOptions, list(RUN[1:]))
    resolved = resolve(
        config,
        world_size=1,
        device_type="cpu",
        has_bf16=False,
        trained=found.network,
        previous=found.config,
        previous_global_batch=found.global_batch,
    )
    model = create_model(found.network)
    trainer = make_trainer(resolved, model, 3, 6, torch.device("cpu"))
    load_weights(model, found.model, found.network.sizes)
    load_training_state(trainer, model, found)


@efforts
def test_a_checkpoint_resumes_or_is_refused_whatever_its_fields_hold(tmp_path, effort):
    tensors = [
        torch.zeros(()),
        torch.zeros(2, 3),
        torch.zeros(1).expand(10**5),
        torch.eye(2).to_sparse(),
    ]
    path = tmp_path / "last.pt"

    @settings(effort, max_examples=min(effort.max_examples, 40))  # a fifth of a second each
    @given(altered(_last, [*JUNK, *tensors]))
    def check(changed: Any) -> None:
        torch.save(changed, path)
        accepts_or_refuses(lambda: _go_on(path))

    check()


@efforts
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_is_read_or_refused_whatever_bytes_are_in_it(tmp_path, effort, zipped):
    buffer = io.BytesIO()
    torch.save(
        {"format": 1, "model": {"w": torch.ones(3)}}, buffer, _use_new_zipfile_serialization=zipped
    )
    path = tmp_path / "last.pt"

    @effort
    @given(damaged(buffer.getvalue()))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        accepts_or_refuses(lambda: checkpoint_io.load(path))

    check()


@functools.cache
def _of_the_original() -> dict[str, Any]:
    """The content of a checkpoint of the original code."""
    data = lzma.decompress((FOLDER / "original.pth.tar.xz").read_bytes())
    with tempfile.NamedTemporaryFile(suffix=".pth.tar") as file:
        file.write(data)
        file.flush()
        content: dict[str, Any] = safe_load(Path(file.name))
    return content


@efforts
def test_an_originals_file_is_read_or_refused_whatever_its_fields_hold(tmp_path, effort):
    tensors = [torch.zeros(()), torch.zeros(2, 3), torch.eye(2).to_sparse()]
    path = tmp_path / "model.pth.tar"

    @settings(effort, max_examples=min(effort.max_examples, 60))
    @given(altered(_of_the_original, [*JUNK, *tensors]))
    def check(changed: Any) -> None:
        torch.save(changed, path)
        accepts_or_refuses(lambda: checkpoint_io.load(path, "parallel_mobilenetv2", (32, 24)))

    check()


FLAGS = [f"--{f.name.replace('_', '-')}" for t in (TrainConfig, DaliOptions) for f in fields(t)]
WORDS = [
    "0",
    "-1",
    "1",
    "1e999",
    "nan",
    "10" * 200,
    "",
    " ",
    "x",
    "\0",
    "\ud800",
    "32 24",
    "auto",
    "--",
    "=",
]


@efforts
def test_options_are_taken_or_refused_whatever_words_are_there(effort):
    """Also by what resolves them; without a run to resume."""

    def resolved(words: list[str]) -> None:
        config, _ = parse(DaliOptions, ["--data", "d", *words])
        resolve(config, world_size=1, device_type="cpu", has_bf16=False)

    @effort
    @given(st.lists(st.sampled_from([*FLAGS, *WORDS]), min_size=1, max_size=6))
    def check(words: list[str]) -> None:
        accepts_or_refuses(lambda: resolved(words))

    check()


@efforts
def test_tensorpacks_file_is_read_or_refused_whatever_bytes_are_in_it(tmp_path, effort):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{"imagenet/linear/W": np.ones((2, 3), np.float32)})
    path = tmp_path / "model.npz"

    @effort
    @given(damaged(buffer.getvalue()))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        is_ours = authors_tensorflow.is_of_model
        accepts_or_refuses(
            lambda: authors_tensorflow.from_tensorflow(tf_checkpoint.read(path, is_ours))
        )

    check()


@pytest.mark.parametrize("name", ["bomb.pt", "bomb.npz"])
def test_a_file_that_would_fill_the_memory_is_refused(tmp_path, name):
    """Eight million bytes in some thousands: torch.save compresses nothing."""
    with (tmp_path / name).open("wb") as file:
        np.savez_compressed(file, **{"imagenet/linear/W": np.zeros((1000, 1000))})
    read = {
        ".pt": checkpoint_io.load,
        ".npz": lambda path: tf_checkpoint.read(path, authors_tensorflow.is_of_model),
    }[Path(name).suffix]
    with pytest.raises(DataError, match="claim to hold 8000"):
        read(tmp_path / name)
