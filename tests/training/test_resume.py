"""What --resume PATH names, beside the checkpoints that the tests of faults resume from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipelines.utils.errors import UsageError
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights
from rsnet.config.model_config import ModelConfig
from rsnet.config.train_config import TrainConfig
from rsnet.models.factory import create_model
from rsnet.release.from_run import release_run
from rsnet.training.resume import Start, find_start
from tests.helpers.runs import NETWORK, trained, write_run


def _start(path: Path, lines: list[str], evaluate: bool = False) -> Start:
    config = TrainConfig(data=Path("x"), output=Path("y"), resume=str(path), evaluate=evaluate)
    return find_start(config, lines.append)


def test_a_run_is_evaluated_at_its_best_and_goes_on_from_its_last(tmp_path):
    run = write_run(tmp_path / "run")
    last = run / "checkpoints" / "last.pt"
    io.save(last, Checkpoint(ModelConfig.from_dict(NETWORK), trained(NETWORK, 2), epoch=3))
    lines: list[str] = []
    assert _start(run, lines).source == last
    assert _start(run, lines, evaluate=True).source == run / "checkpoints" / "best.pt"
    assert [line.rpartition(" ")[2] for line in lines] == ["last.pt", "best.pt"]
    assert all(line.startswith(f"--resume: run {run}: ") for line in lines)


def test_the_same_command_goes_on_from_what_it_has_trained(tmp_path):
    """A launcher that starts it again changes nothing of it; another command begins where it says."""
    other, output = write_run(tmp_path / "other"), tmp_path / "output"
    config = TrainConfig(data=Path("x"), output=output, resume=str(other))
    io.save(
        other / "checkpoints" / "last.pt",
        Checkpoint(ModelConfig.from_dict(NETWORK), trained(NETWORK, 2), epoch=3),
    )
    first = find_start(config, lambda _: None, "rsnet train a")
    assert (first.checkpoint.epoch, first.continues) == (3, False)
    _save_last(output, str(other))
    (output / "command.txt").write_text(
        "# typed: rsnet train b\n...\n# typed: rsnet train a\n...\n"
    )
    again = find_start(config, lambda _: None, "rsnet train a")
    assert (again.checkpoint.epoch, again.continues, again.must_be_same) == (5, True, False)
    for typed, evaluate in (("rsnet train b", False), ("", False), ("rsnet train a", True)):
        changed = dataclasses.replace(config, evaluate=evaluate)
        found = find_start(changed, lambda _: None, typed)
        assert found.checkpoint.epoch == (2 if evaluate else 3)
    # What the directory had before, of another command that saved last, is not what this one has trained.
    _save_last(output, None)
    assert find_start(config, lambda _: None, "rsnet train a").checkpoint.epoch == 3
    (output / "checkpoints" / "last.pt").write_bytes(b"damaged")
    assert find_start(config, lambda _: None, "rsnet train a").checkpoint.epoch == 3


def _save_last(run: Path, resume: str | None) -> None:
    network = ModelConfig.from_dict(NETWORK)
    found = Checkpoint(network, trained(NETWORK, 3), epoch=5, config={"resume": resume})
    io.save(run / "checkpoints" / "last.pt", found)


def test_a_release_is_evaluated_also_a_quantized_one_and_no_training_goes_on_with_it(tmp_path):
    network = NETWORK | {"mode": "preact", "qw": 2, "qa": 2}
    release = tmp_path / "release"
    release_run(write_run(tmp_path / "run", network), release)
    found = _start(release, [], evaluate=True).checkpoint
    assert found is not None
    assert (found.network.qw, found.network.qa) == (32, 2)  # the weights as they are applied
    load_weights(create_model(found.network), found.eval_weights, found.network.sizes)
    with pytest.raises(
        UsageError, match="which has no optimizer's state to go on with; start from"
    ):
        _start(release, [])
