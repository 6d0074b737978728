"""Checkpoint files that are cut, overwritten, foreign or malicious; kills in the middle of a save."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from pipelines.utils.errors import DataError, RunError
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.manager import CheckpointManager
from rsnet.config.model_config import ModelConfig
from rsnet.training import run as training
from tests.helpers import processes

pytestmark = pytest.mark.faults

NETWORK = ModelConfig("parallel_resnet18", 3, (32,))


def _content(step: int) -> Checkpoint:
    return Checkpoint(NETWORK, {"w": torch.full((5000,), float(step))}, step=step)


@pytest.fixture
def store(tmp_path) -> CheckpointManager:
    """Of a run that saved twice."""
    store = CheckpointManager(tmp_path / "checkpoints")
    store.save(_content(1), is_best=True)
    store.save(_content(2))
    return store


class _Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def _offsets(size: int) -> list[int]:
    draws = random.Random(0)
    return sorted(draws.randrange(size) for _ in range(20))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    **{
        f"truncated {i}": lambda p, i=i: os.truncate(p, _offsets(p.stat().st_size)[i])
        for i in range(20)
    },
    "empty": lambda p: p.write_bytes(b""),
    "NULs": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "HTML": lambda p: p.write_text("<html>503 Service Unavailable</html>"),
    "flipped bit": _flip,
    "malicious zip": lambda p: torch.save({"format": 1, "model": _Evil()}, p),
    "malicious legacy": lambda p: torch.save(
        {"format": 1, "model": _Evil()}, p, _use_new_zipfile_serialization=False
    ),
    "malicious pickle": lambda p: p.write_bytes(pickle.dumps(_Evil())),
}


@pytest.mark.parametrize("has_hash", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_is_used(
    store, tmp_path, monkeypatch, damage, has_hash
):
    monkeypatch.chdir(tmp_path)
    if not has_hash:
        (store.folder / "last.pt.sha256").unlink()
        if damage == "flipped bit":
            return  # in a tensor it cannot be noticed without a hash
    DAMAGES[damage](store.last)
    broken = store.last.read_bytes()
    said: list[str] = []
    found = store.newest(said.append)
    assert found is not None
    assert found[0].name == "last-1.pt"
    assert found[1].step == 1
    problem, moved = said
    assert str(store.last) in problem
    assert problem.endswith("; an older one is tried")
    assert moved.endswith("last.pt is now last.pt.damaged")
    assert not any("\n" in line for line in said)
    assert (store.folder / "last.pt.damaged").read_bytes() == broken
    assert not (tmp_path / "pwned").exists()
    store.save(_content(3))
    assert checkpoint.load(store.last).step == 3
    assert checkpoint.load(store.folder / "last-1.pt").step == 1


def test_a_run_of_which_nothing_is_whole_is_an_error(store):
    for name in ("last.pt", "last-1.pt"):
        (store.folder / name).write_bytes(b"")
    for _ in range(2):  # and stays one: the best is not overwritten by a new beginning
        with pytest.raises(
            DataError, match=r"no last checkpoint that is whole; .* --resume .*best\.pt"
        ):
            store.newest(lambda _: None)
    for name in ("last.pt", "last-1.pt"):
        (store.folder / name).unlink()
    with pytest.raises(DataError, match=r"best\.pt"):
        store.newest(lambda _: None)


def test_a_look_at_a_run_moves_nothing(store):
    store.last.write_bytes(b"")
    found = store.newest(lambda _: None, moves=False)
    assert found is not None
    assert found[0].name == "last-1.pt"
    assert store.last.exists()


def test_as_many_are_kept_as_asked_for_and_the_best_besides(tmp_path):
    store = CheckpointManager(tmp_path, keep=3)
    for step in range(6):
        store.save(_content(step), is_best=step == 1)
    names = sorted(p.name for p in tmp_path.glob("*.pt"))
    assert names == ["best.pt", "last-1.pt", "last-2.pt", "last.pt"]
    steps = {name: checkpoint.load(tmp_path / name).step for name in names}
    assert steps == {"best.pt": 1, "last-2.pt": 3, "last-1.pt": 4, "last.pt": 5}
    for name in names:
        words = ["sha256sum", "--check", "--status", f"{name}.sha256"]
        subprocess.run(words, cwd=tmp_path, check=True)


def test_a_file_system_without_links_is_served_by_copies(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    store = CheckpointManager(tmp_path)
    for step in range(3):
        store.save(_content(step), is_best=True)
    assert [checkpoint.load(tmp_path / n).step for n in ("last.pt", "last-1.pt", "best.pt")] == [
        2, 1, 2,
    ]  # fmt: skip


SAVER = """
import sys, torch
from pathlib import Path
from rsnet.checkpoint.manager import CheckpointManager
from tests.training.test_faults_files import _content
store, first = CheckpointManager(Path(sys.argv[1])), int(sys.argv[2])
for step in range(first, first + 100000):
    store.save(_content(step), is_best=step % 3 == 0)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    """At random moments of a process that does nothing but save: between any two of its steps."""
    draws = random.Random(12)
    done = 0
    for _ in range(12):
        words = [sys.executable, "-c", SAVER, str(tmp_path), str(done + 1)]
        with processes.start(words) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draws.uniform(0, 0.05))
            process.kill()
            reported = [int(line) for line in process.stdout.read().split()]
        found = CheckpointManager(tmp_path).newest(lambda line: pytest.fail(line))
        assert found is not None
        done = found[1].step
        assert done >= max(reported, default=0)
        for name in ("last-1.pt", "best.pt"):
            if (tmp_path / name).exists():
                checkpoint.load(tmp_path / name)  # whole, too


@pytest.mark.parametrize("has_older", [False, True])
@pytest.mark.parametrize("reaction", ["stop", "continue"])
def test_a_full_disk_is_told_with_the_checkpoint_before_it_if_there_is_one(
    tmp_path, monkeypatch, reaction, has_older
):
    def full(*_: object) -> None:
        raise OSError(28, "Full")

    if has_older:
        (tmp_path / "last.pt").touch()
    for name in ("Checkpoint", "training_state", "to_plain_dict"):
        monkeypatch.setattr(training, name, lambda *_, **__: {})
    run = mock.MagicMock(manager=CheckpointManager(tmp_path))
    run.config.on_save_error = reaction
    monkeypatch.setattr(run.manager, "save", full)
    with pytest.raises(RunError) if reaction == "stop" else nullcontext() as error:
        training.TrainingRun._save(run)
    said = str(error.value) if error else run.console.say.call_args[0][0]
    older = "the checkpoint before it" if has_older else "there is no checkpoint yet"
    assert said.startswith(f"cannot save to {tmp_path}: Full; {older}")
    assert ("the checkpoint before it" in said) == has_older
