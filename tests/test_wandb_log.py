"""W&B runs: read back from disk, and without a server."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from rsnet.wandb_log import WandbLog


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    """A machine on which W&B was never set up, and a process in which it never ran."""
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _start(directory: Path, mode, said: list[str], run_id=None) -> WandbLog:
    return WandbLog(mode, directory, "rsnet", None, {"lr": 0.1}, run_id, said.append)


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


def test_an_offline_run_can_be_read_back(tmp_path):
    said: list[str] = []
    log = _start(tmp_path, "offline", said)
    log.log({"step": 1, "epoch": 0.5, "train/total": 2.5, "lr": 0.1})
    log.log({"step": 2, "epoch": 1, "val/top1@64": 71.25})
    log.finish()
    rows = _history(tmp_path)
    assert rows[0]["train/total"] == 2.5
    assert rows[1]["val/top1@64"] == 71.25
    assert len(said) == 1
    assert said[0].startswith("W&B: offline in ")
    kinds = [r.WhichOneof("record_type") for r in _records(tmp_path)]
    assert kinds.count("metric") >= 4
    configs = [i for r in _records(tmp_path) for i in r.run.config.update]
    assert any(i.key == "lr" and json.loads(i.value_json) == 0.1 for i in configs)


def test_without_a_key_a_run_is_offline(tmp_path):
    said: list[str] = []
    _start(tmp_path, None, said).finish()
    assert "offline" in said[0]
    assert "no key is configured" in said[0]


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
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    said: list[str] = []
    log = _start(tmp_path, None, said)
    log.log({"step": 1, "train/total": 1.5})
    log.finish()
    assert "offline" in said[0]
    assert "the server did not answer" in said[0]
    assert _history(tmp_path)[0]["train/total"] == 1.5


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
