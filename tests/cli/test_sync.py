"""`python -m rsnet sync`: afterwards the server has each line of metrics once, whatever happened before."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from rsnet.__main__ import main
from rsnet.loggers import wandb_service, wandb_sync
from rsnet.loggers.wandb_logger import Sent, WandbLogger, read_sent, write_sent
from tests.helpers.wandb_run import append, interrupted, log, rows, write_run

pytestmark = pytest.mark.usefixtures("no_wandb_key")


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the verb in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(wandb_sync, "TIMEOUT_S", 20)

    def run(*paths: Path | str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["sync", *map(str, paths)])
        return code, *capsys.readouterr()

    return run


def _start(mode, run: Path, run_id: str | None = None) -> WandbLogger:
    return WandbLogger(
        mode, run, project="rsnet", name=None, config={}, run_id=run_id, say=lambda _: None
    )


def _lines(run: Path) -> list[dict]:
    """The metrics, without the time."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found]


@pytest.mark.faults
@pytest.mark.slow
def test_a_training_whose_wandb_service_dies_ends_well_and_is_sent_whole(
    wandb_server, tmp_path, call
):
    run = tmp_path / "run"
    run.mkdir()
    said = interrupted("train", run, lambda service: os.kill(service, signal.SIGKILL))
    assert said.count("W&B: lost") == 1
    assert f"python -m rsnet sync {run}" in said
    assert said.splitlines()[-1] == "finished"
    assert "Traceback" not in said
    assert (run / "results.json").exists()
    assert len(_lines(run)) == 6  # four steps, two evaluations
    sent = read_sent(run)
    assert sent
    assert len(wandb_server.metrics(sent.id)) < 6

    assert call(run) == (
        0, f"{run}: 6 lines of metrics sent to {wandb_server.url}/me/rsnet/runs/{sent.id}\n", "",
    )  # fmt: skip
    assert wandb_server.metrics(sent.id) == _lines(run)
    assert f"run-{sent.id}-results" in wandb_server.files
    assert any("accuracy_gmacs" in name for name in wandb_server.files)
    assert wandb_server.exit_codes[sent.id] == 0

    wandb_server.history.clear()
    assert call(run) == (0, f"{run}: W&B has all 6 lines of metrics\n", "")
    assert not wandb_server.history


def test_the_metrics_of_a_run_that_was_never_online_come_with_their_time_and_options(
    wandb_server, tmp_path, call
):
    run = tmp_path / "named_so"
    write_run(run, rows(1, 7))
    code, out, err = call(run)
    assert (code, err) == (0, "")
    sent = read_sent(run)
    assert sent
    assert sent.id in out
    assert sent.lines == 7
    assert wandb_server.metrics(sent.id) == rows(1, 7)
    assert [row["_timestamp"] for row in wandb_server.history[sent.id]] == [
        1.5e9 + step for step in range(1, 8)
    ]
    assert wandb_server.config[sent.id]["global_batch"]["value"] == 8 * 3 * 2
    assert wandb_server.exit_codes[sent.id] == 1  # there is no final table


@pytest.mark.slow
def test_tensorboard_s_files_are_written_too_where_a_run_has_some(wandb_server, tmp_path, call):
    write_run(tmp_path, rows(1, 3))
    assert "TensorBoard" not in call(tmp_path)[1]
    (tmp_path / "tensorboard").mkdir()
    append(tmp_path, rows(4, 4))
    code, out, err = call(tmp_path)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == f"{tmp_path}: 4 lines of metrics written for TensorBoard"
    assert second.startswith(f"{tmp_path}: 4 lines of metrics sent to {wandb_server.url}")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert "TensorBoard" not in call(tmp_path, "--only", "wandb")[1]


def test_a_run_goes_to_the_entity_with_the_tags_that_its_options_say(
    wandb_server, tmp_path, call, monkeypatch
):
    started = []
    start = wandb_service.start

    def noted(*arguments, **options):
        started.append((options["entity"], options["tags"]))
        return start(*arguments, **options)

    monkeypatch.setattr(wandb_service, "start", noted)
    write_run(tmp_path, rows(1, 3))
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"wandb_entity": "me", "wandb_tags": ["night"]}
    (tmp_path / "config.json").write_text(json.dumps(config | names))
    assert call(tmp_path)[0] == 0
    assert started == [("me", ["night"])]
    assert wandb_server.history


@pytest.mark.slow
def test_a_run_that_was_resumed_offline_is_one_run_there(wandb_server, tmp_path, call):
    write_run(tmp_path, [])
    first = _start("offline", tmp_path)
    log(first, tmp_path, rows(1, 3))
    first.finish()
    again = _start("offline", tmp_path, first.run_id)
    log(again, tmp_path, rows(4, 5))
    again.finish()
    assert call(tmp_path)[0] == 0
    assert list(wandb_server.history) == [first.run_id]
    assert wandb_server.metrics(first.run_id) == rows(1, 5)


@pytest.mark.slow
def test_what_was_logged_before_a_run_was_resumed_comes_before_it(wandb_server, tmp_path, call):
    write_run(tmp_path, [])
    first = _start("online", tmp_path)
    log(first, tmp_path, rows(1, 3))
    first.log({1: 2})  # type: ignore[dict-item]  # W&B takes no such key, and is lost
    log(first, tmp_path, rows(4, 6))
    first.finish()
    again = _start("online", tmp_path, first.run_id)
    log(again, tmp_path, rows(7, 8))
    again.finish()
    assert wandb_server.metrics(first.run_id) == rows(1, 3) + rows(7, 8)
    assert call(tmp_path)[0] == 0
    assert wandb_server.metrics(first.run_id) == rows(1, 8)


def test_lines_that_came_since_are_sent(wandb_server, tmp_path, call):
    write_run(tmp_path, rows(1, 3))
    assert call(tmp_path)[0] == 0
    append(tmp_path, rows(4, 6))
    assert call(tmp_path)[0] == 0
    (run_id,) = wandb_server.history
    assert wandb_server.metrics(run_id) == rows(1, 6)


def test_a_line_that_a_crash_cut_short_is_left_out(wandb_server, tmp_path, call):
    write_run(tmp_path, rows(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.5, "ste')
    assert "3 lines of metrics sent" in call(tmp_path)[1]
    (run_id,) = wandb_server.history
    assert wandb_server.metrics(run_id) == rows(1, 3)


def test_without_a_key_it_says_how_to_get_one(tmp_path, call):
    write_run(tmp_path, rows(1, 3))
    code, out, err = call(tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        f"rsnet sync: error: {tmp_path}: W&B is offline (no key is configured); unset WANDB_MODE, call "
        "`wandb login`, or set WANDB_API_KEY\n"
    )


@pytest.mark.slow
def test_a_server_that_is_away_costs_nothing_but_a_line(wandb_server, tmp_path, call, monkeypatch):
    write_run(tmp_path, rows(1, 3))
    write_sent(tmp_path, Sent("abc", None, 0))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
    code, out, err = call(tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(f"rsnet sync: error: {tmp_path}: W&B did not take it (")
    assert err.endswith("); the same command tries again\n")
    assert err.count("\n") == 1
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    assert call(tmp_path)[0] == 0
    assert wandb_server.metrics("abc") == rows(1, 3)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuses", "Fatal error while uploading data"),
        pytest.param("is silent", "", marks=[pytest.mark.faults, pytest.mark.slow]),
    ],
)
def test_metrics_that_the_server_does_not_take_are_not_counted_as_sent(
    wandb_server, tmp_path, call, mode, reason
):
    write_run(tmp_path, rows(1, 3))
    wandb_server.mode = mode
    code, out, err = call(tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert reason in err
    wandb_server.mode = "answers"
    assert "3 lines of metrics sent" in call(tmp_path)[1]
    assert len(wandb_server.history) == 1


def test_a_folder_without_metrics_is_refused(tmp_path, call):
    (tmp_path / "metrics.jsonl").touch()
    assert call(tmp_path)[0] == 2
    none = tmp_path / "none"
    complaint = f"{none}: there are no metrics; is it the directory of a run?"
    assert call(none) == (2, "", f"rsnet sync: error: {complaint}\n")
    assert call()[0] == 2


@pytest.mark.parametrize("name", ["wandb.json", "config.json", "env.json", "metrics.jsonl"])
def test_a_damaged_file_is_said_in_a_line(tmp_path, call, name):
    write_run(tmp_path, rows(1, 3))
    (tmp_path / name).write_text("{]\n")
    code, out, err = call(tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "damaged" in err
