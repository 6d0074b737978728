"""W&B runs: read back from disk, and without a server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from wandb.proto import wandb_internal_pb2
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from pipelines.utils.errors import UsageError
from rsnet.loggers import wandb_service
from rsnet.loggers.run_dir import RunDir
from rsnet.loggers.wandb_logger import Sent, WandbLogger, known_run_id, read_sent, write_sent
from tests.helpers.wandb_run import interrupted, log, rows

pytestmark = pytest.mark.usefixtures("no_wandb_key")


def _start(directory: Path, mode, said: list[str], run_id=None) -> WandbLogger:
    return WandbLogger(
        mode,
        directory,
        project="rsnet",
        name=None,
        config={"lr": 0.1},
        run_id=run_id,
        say=said.append,
    )


def _records(run: Path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB."""
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def _history(run: Path) -> list[dict]:
    rows = []
    for record in _records(run):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            )
    return rows


def test_an_offline_run_can_be_read_back_also_of_a_folder_whose_name_is_no_text(tmp_path):
    said: list[str] = []
    tmp_path = tmp_path / os.fsdecode(b"run\xff\n")
    tmp_path.mkdir()
    log = _start(tmp_path, "offline", said)
    log.log({"step": 1, "epoch": 0.5, "train/total": 2.5, "lr": 0.1})
    log.log({"step": 2, "epoch": 1, "val/top1@64": 71.25})
    log.finish()
    rows = _history(tmp_path)
    assert rows[0]["train/total"] == 2.5
    assert rows[1]["val/top1@64"] == 71.25
    assert len(said) == 1
    assert said[0].startswith(f"W&B: offline in {tmp_path}/wandb/offline-run-")
    kinds = [r.WhichOneof("record_type") for r in _records(tmp_path)]
    assert kinds.count("metric") >= 4
    configs = [i for r in _records(tmp_path) for i in r.run.config.update]
    assert any(i.key == "lr" and json.loads(i.value_json) == 0.1 for i in configs)


@pytest.mark.parametrize("mode", [None, "online"])
def test_without_a_key_a_run_is_offline(tmp_path, mode):
    said: list[str] = []
    _start(tmp_path, mode, said).finish()
    assert "offline" in said[0]
    assert "no key is configured" in said[0]


def test_an_option_counts_more_than_the_environment(wandb_server, tmp_path, monkeypatch):  # noqa: ARG001
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said: list[str] = []
    _start(tmp_path, "online", said).finish()
    assert said[0].startswith("W&B: online at ")
    assert said[0].endswith("(--wandb)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_INIT_TIMEOUT", "abc"),
        ("WANDB_FINISH_TIMEOUT", "-1"),
        ("WANDB_FINISH_TIMEOUT", "nan"),
        ("WANDB_MODE", "bogus"),
        ("WANDB_BASE_URL", "nonsense"),
        ("WANDB_TAGS", "x" * 65),
        ("WANDB_PROJECT", "a/b"),
        ("WANDB_RUN_ID", "a/b"),
    ],
)
def test_a_variable_of_the_environment_that_is_wrong_is_named(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name} {value}: "):
        _start(tmp_path, None, [])


def test_a_project_that_wandb_does_not_take_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--wandb-project a/b: W&B does not take it: "):
        WandbLogger(
            "offline", tmp_path, project="a/b", name=None, config={}, run_id=None, say=print
        )


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"entity": "a/b"}, "--wandb-entity a/b: no name of a W&B team or user has a '/'"),
        ({"tags": ["x", "y" * 65]}, f"--wandb-tags {'y' * 65}: W&B does not take it: "),
    ],
    ids=["entity", "tag"],
)
def test_an_entity_or_tag_that_wandb_does_not_take_is_refused(tmp_path, names, line):
    with pytest.raises(UsageError, match=re.escape(line)):
        WandbLogger(
            "offline", tmp_path, project="p", name=None, config={}, run_id=None, say=print, **names
        )


def test_an_entity_and_tags_that_are_given_count_more_than_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_ENTITY", "my-team")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    WandbLogger(
        "offline", tmp_path, project="p", name=None, config={}, run_id=None, say=print,
        entity="theirs", tags=["c", "d\udcff"],
    ).finish()  # fmt: skip
    runs = [r.run for r in _records(tmp_path) if r.WhichOneof("record_type") == "run"]
    assert runs[0].entity == "theirs"
    assert set(runs[0].tags) == {"c", "d\\udcff"}


def test_the_entity_and_tags_of_the_environment_count(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_ENTITY", "my-team")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    _start(tmp_path, "offline", []).finish()
    runs = [r.run for r in _records(tmp_path) if r.WhichOneof("record_type") == "run"]
    assert runs[0].entity == "my-team"
    assert list(runs[0].tags) == ["a", "b"]


def test_a_malformed_key_is_said_and_the_run_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    said: list[str] = []
    _start(tmp_path, None, said).finish()
    assert "offline" in said[0]
    assert "the key is not usable" in said[0]


def test_an_unreachable_server_falls_back_to_offline(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    said: list[str] = []
    log = _start(tmp_path, None, said)
    log.log({"step": 1, "train/total": 1.5})
    log.finish()
    assert "offline" in said[0]
    assert "(no run online: " in said[0]
    assert _history(tmp_path)[0]["train/total"] == 1.5


def test_options_that_are_no_text_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--data", "a\udcff"])
    config = {"data": "a\udcff", "n": 3, "schedule": ["\udcff", 1], "none": None}
    log = WandbLogger(
        "offline", tmp_path, project="p", name="b\udcff\n", config=config, run_id=None, say=print
    )
    log.finish()
    runs = [r.run for r in _records(tmp_path) if r.WhichOneof("record_type") == "run"]
    assert runs[0].display_name == "b\\udcff\\n"
    found = {i.key: json.loads(i.value_json) for i in runs[0].config.update}
    assert {k: found[k] for k in config} == config | {
        "data": "a\\udcff",
        "schedule": ["\\udcff", 1],
    }


def test_a_disabled_run_writes_nothing(tmp_path):
    said: list[str] = []
    log = _start(tmp_path, "disabled", said)
    log.log({"step": 1})
    log.finish()
    assert log.run_id is None
    assert not list(tmp_path.glob("wandb*"))


def test_a_run_keeps_its_id_when_it_is_continued(tmp_path):
    first = _start(tmp_path, "offline", [])
    run_id = first.run_id
    first.finish()
    again = _start(tmp_path, "offline", [], run_id)
    assert again.run_id == run_id
    again.finish()


def test_an_online_run_has_everything_on_the_server(wandb_server, tmp_path):
    said: list[str] = []
    run = _start(tmp_path, None, said)
    assert run.run_id
    log(run, tmp_path, rows(1, 5))
    run.finish()
    assert wandb_server.metrics(run.run_id) == rows(1, 5)
    assert wandb_server.exit_codes == {run.run_id: 0}
    assert said == [
        f"W&B: online at {wandb_server.url}/me/rsnet/runs/{run.run_id} (a key is configured)"
    ]
    sent = read_sent(tmp_path)
    assert sent
    assert (sent.id, sent.entity, sent.lines) == (run.run_id, "me", 5)


def _break(fault: str, server, service: int) -> None:
    if fault == "service killed":
        os.kill(service, signal.SIGKILL)
    elif fault == "service stopped":
        os.kill(service, signal.SIGSTOP)
    elif fault == "server gone":
        server.stop()
    else:
        server.mode = fault.removeprefix("server ")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("service killed", "its service has ended"),
        ("server is silent", "Timed out finishing run"),
        ("service stopped", "no answer in 2 s"),
        ("server gone", "Timed out finishing run"),
        ("server closes", "Timed out finishing run"),
        ("server refuses", "Fatal error while uploading data"),
    ],
)
def test_a_run_that_loses_wandb_says_it_in_a_line_and_ends(wandb_server, tmp_path, fault, reason):
    run = tmp_path / "run"
    run.mkdir()
    services = []

    def break_it(service: int) -> None:
        services.append(service)
        _break(fault, wandb_server, service)

    try:
        said = interrupted("log", run, break_it)
    finally:
        if fault == "service stopped":
            os.kill(services[0], signal.SIGKILL)
    start, *lost, end = said.splitlines()
    assert start.startswith("W&B: online at ")
    assert lost == [f"W&B: lost ({reason}); `python -m rsnet sync {run}` sends the metrics later"]
    assert end == "finished"
    sent = read_sent(run)
    assert sent
    assert sent.lines == 0


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "reset"),
        ConnectionResetError("lost"),
        BrokenPipeError(32, "pipe"),
        MailboxClosedError(),
        HandleAbandonedError(),
    ],
)
def test_each_error_of_a_service_that_died_is_said_in_the_same_words(error):
    def fail():
        raise error

    with pytest.raises(RuntimeError, match="its service has ended"):
        wandb_service.within(5, fail)


@pytest.mark.slow
def test_an_offline_run_goes_on_when_the_service_dies(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    said = interrupted("log", run, lambda service: os.kill(service, signal.SIGKILL))
    start, lost, end = said.splitlines()
    assert start.startswith("W&B: offline in ")
    assert "W&B: lost" in lost
    assert end == "finished"


def test_a_service_that_does_not_start_costs_a_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no such program")

    monkeypatch.setattr(wandb_service, "start", fail)
    said: list[str] = []
    run = _start(tmp_path, "offline", said, "abc")
    run.log({"step": 1})
    run.finish()
    assert run.run_id == "abc"
    assert [line.split(";")[0] for line in said] == ["W&B: lost (no such program)"]


def test_a_lost_run_keeps_its_id(tmp_path):
    said: list[str] = []
    run = _start(tmp_path, "offline", said)
    before = run.run_id
    run.log({1: 2})  # type: ignore[dict-item]
    assert "lost" in said[-1]
    assert run.run_id == before is not None


def _go_on_without_earlier_lines(run: Path, run_id: str | None, lines: list[dict]) -> None:
    """The run says so, and does not count as sent whole."""
    said: list[str] = []
    again = _start(run, "online", said, run_id)
    log(again, run, lines)
    again.finish()
    assert "without earlier lines; `python -m rsnet sync" in said[0]
    sent = read_sent(run)
    assert sent
    assert sent.lines == 0


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_server")
def test_an_online_run_whose_earlier_lines_wandb_lacks_says_so(tmp_path):
    first = _start(tmp_path, "offline", [])
    log(first, tmp_path, rows(1, 3))
    first.finish()
    _go_on_without_earlier_lines(tmp_path, first.run_id, rows(4, 6))


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_server")
def test_a_run_that_was_resumed_before_what_wandb_has_says_so(tmp_path):
    """Lines after its last checkpoint are logged again: W&B would have them twice."""
    run_dir = RunDir(tmp_path, continues=False, active=True)
    first = _start(tmp_path, "online", [])
    log(first, tmp_path, rows(1, 6))
    first.finish()
    run_dir.rewind(rows(4, 4)[0]["epoch"], 0)
    _go_on_without_earlier_lines(tmp_path, first.run_id, rows(5, 6))


def test_a_disabled_part_of_a_run_keeps_its_wandb_run(tmp_path):
    assert _start(tmp_path, "disabled", [], "abc").run_id == "abc"
    write_sent(tmp_path, Sent("xyz", None, 0))
    assert known_run_id(tmp_path) == "xyz"
    assert known_run_id(tmp_path / "other") is None


@pytest.mark.slow
def test_a_resumed_online_run_has_all_lines_of_both_parts(wandb_server, tmp_path):
    first = _start(tmp_path, "online", [])
    log(first, tmp_path, rows(1, 3))
    first.finish()
    again = _start(tmp_path, "online", [], first.run_id)
    log(again, tmp_path, rows(4, 6))
    again.finish()
    assert wandb_server.metrics(first.run_id) == rows(1, 6)
    sent = read_sent(tmp_path)
    assert sent
    assert sent.lines == 6


def test_a_process_can_log_another_run_after_one_that_was_lost(wandb_server, tmp_path):
    lost = _start(tmp_path, "online", [])
    lost.log({1: 2})  # type: ignore[dict-item]
    other = tmp_path / "other"
    other.mkdir()
    run = _start(other, None, said := [])
    log(run, other, rows(1, 2))
    run.finish()
    assert run.run_id != lost.run_id
    assert wandb_server.metrics(run.run_id) == rows(1, 2), said


def test_results_without_a_plot_are_a_table_alone():
    logged: list[dict] = []
    run = SimpleNamespace(log=logged.append)
    wandb_service.log_results(run, ["size", "top1"], [["64", 50.0]], None)
    assert list(logged[0]) == ["results"]
    assert logged[0]["results"].data == [["64", 50.0]]
