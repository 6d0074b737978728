"""best.pt after every kind of resume: its score is known just where it exists, and is its weights'."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from pipelines.synthetic import SyntheticOptions, make_loaders
from rsnet.checkpoint import io, manager
from rsnet.evaluation import report
from rsnet.train import main
from rsnet.training import run as session

# Top-1 at the largest size after each epoch, and of what is evaluated beside; the weights decide it.
TOP1 = [40.0, 60.0, 50.0]
UPDATES = 2  # an epoch
LINE = [
    "--arch", "parallel_resnet10", "--width-mult", "0.125", "--stem", "small", "--sizes", "16", "8",
    "-b", "4", "--epochs", "3", "--amp", "off", "--wandb", "disabled", "--device", "cpu", "--data", "none",
    "--train-images", "8", "--val-images", "4", "--classes", "3", "--checkpoint-every", "1",
]  # fmt: skip


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train in `tmp_path/run`; `stop_at`: the update at which SIGTERM comes. Returns the exit code."""
    monkeypatch.chdir(tmp_path)
    scores: dict[float, float] = {}

    def evaluate(_context, model, after_batch=lambda: None):
        after_batch()
        mark = (model.alpha.sum() + model.network.fc.weight.sum()).item()
        top1 = scores.setdefault(mark, TOP1[min(len(scores), 2)])
        names = [*map(str, model.sizes), "ensemble"]
        return {name: {"top1": top1, "top5": 90.0, "loss": 1.0} for name in names}

    monkeypatch.setattr(session, "evaluate_with_progress", evaluate)
    monkeypatch.setattr(report, "plot", lambda *_: None)

    def call(*words: str, stop_at: int | None = None) -> tuple[int, str]:
        real = session.TrainingRun._after_update

        def after_update(self):
            if self.trainer.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            real(self)

        with monkeypatch.context() as patch:
            patch.setattr(session.TrainingRun, "_after_update", after_update)
            code = main(
                "rsnet train", SyntheticOptions, make_loaders, [*LINE, "--output", "run", *words]
            )
        return code, "".join(capsys.readouterr())

    return call


CHECKPOINTS = Path("run", "checkpoints")


def _load(name: str):
    return io.load(CHECKPOINTS / name)


def _require_best_known_and_there() -> None:
    known, there = _load("last.pt").best, (CHECKPOINTS / "best.pt").exists()
    assert bool(known) == there
    if there:
        assert _load("best.pt").best == known


def _nothing() -> None:
    pass


def _killed_between_the_two_files() -> None:
    (CHECKPOINTS / "last-1.pt").replace(CHECKPOINTS / "last.pt")
    (CHECKPOINTS / "last-1.pt.sha256").unlink()
    (CHECKPOINTS / "last.pt.sha256").unlink()


def _last_is_damaged() -> None:
    (CHECKPOINTS / "last.pt").write_bytes(b"cut")


def _best_is_damaged() -> None:
    (CHECKPOINTS / "best.pt").write_bytes(b"cut")


def _best_is_gone() -> None:
    (CHECKPOINTS / "best.pt").unlink()


def _of_version_0_1() -> None:
    for name in ("last.pt", "best.pt"):
        if (CHECKPOINTS / name).exists():
            old = dataclasses.replace(_load(name), best=[130.0, 130.0], best_by=None)
            io.save(CHECKPOINTS / name, old)


FAULTS = [
    _nothing, _killed_between_the_two_files, _last_is_damaged, _best_is_damaged, _best_is_gone,
    _of_version_0_1,
]  # fmt: skip
# In each of the epochs; in the first there is no best one yet. Two runs of a second each.
CASES = [(1, _nothing), (1, _of_version_0_1), *((n, fault) for n in (3, 5) for fault in FAULTS)]
FAST = [(3, _killed_between_the_two_files), (5, _of_version_0_1)]


@pytest.mark.parametrize(
    ("stop_at", "fault"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_the_best_is_known_and_there_after_every_resume(train, stop_at, fault):
    assert train(stop_at=stop_at)[0] == 143
    _require_best_known_and_there()
    fault()
    assert train()[0] == 0
    _require_best_known_and_there()
    best = _load("best.pt")
    # Where the best of before was lost, the best of what is left.
    is_lost = stop_at == 5 and fault in (_best_is_damaged, _best_is_gone)
    assert best.best[0] == (50 if is_lost else 60)
    assert best.epoch == (3 if is_lost else 2)


def test_a_best_that_cannot_be_written_is_not_believed(train, monkeypatch):
    real = manager._copy

    def copy(source, target):
        if target.name == "best.pt" and not (target.parent / "best.pt").exists():
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(manager, "_copy", copy)
    code, out = train("--on-save-error", "continue")
    assert code == 0
    assert "No space left on device; the checkpoint before it stays" in out
    _require_best_known_and_there()
    assert _load("last.pt").best == []


def test_the_best_has_the_highest_top1_at_the_largest_size_and_the_mean_of_all_decides_ties():
    def score(*top: tuple[float, float]) -> list[float]:
        results = {
            str(s): {"top1": one, "top5": five} for s, (one, five) in enumerate(reversed(top))
        }
        return session.score(results, range(len(top))[::-1])

    assert score((50, 90), (10, 20)) > score((49.999, 99), (49, 99))
    assert score((50, 90), (10, 21)) > score((50, 90), (10, 20))
    assert score((50, 90), (10, 20)) == [50, 42.5]


def test_epochs_between_two_evaluations_have_none_but_the_last_one_has(train):
    """The best is then among those: the second epoch's 60 % is not seen."""
    assert train("--val-interval", "5", "--log-interval", "100")[0] == 0
    lines = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "val/top1@16" in line] == [3]
    assert _load("last.pt").best[0] == _load("best.pt").best[0] == TOP1[0]


@pytest.mark.slow
def test_of_equally_good_epochs_the_first_is_the_best(train, monkeypatch):
    monkeypatch.setitem(globals(), "TOP1", [60.0] * 3)
    assert train()[0] == 0
    assert _load("best.pt").epoch == 1
