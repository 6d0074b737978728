"""Trainings from object storage: killed, by several processes, and without an answer."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.helpers.faults import (
    assert_same_end,
    command,
    end,
    finish,
    kill,
    reached,
    start,
    torchrun,
    wait_for,
)
from tests.helpers.hub_server import TOKEN, Repository
from tests.helpers.s3_server import Fault
from tests.pipelines.sources.conftest import source_of, upload

# Several processes of nine seconds each.
pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture
def url(s3, photos) -> str:
    found = upload(s3, source_of("shards", photos))
    s3.requests.clear()
    return found


def fetched(server) -> list[str]:
    return sorted(
        Path(path).name for method, path in server.requests if method == "GET" and ".tar" in path
    )


def test_a_run_that_was_killed_goes_on_from_the_bucket_to_the_folders_end(s3, url, whole, tmp_path):
    words = command(url, tmp_path / "run", "--cache", tmp_path / "cache")
    s3.faults += [Fault(key="train-000001.tar", delay=2.0), Fault(status=503, times=3)]
    process = start(words)
    wait_for(reached(tmp_path / "run", 7), process)
    kill(process)
    process.communicate()
    s3.faults.append(Fault(key="val-000000.tar", cut=1000))
    out, _ = finish(words)
    assert f"cache {tmp_path / 'cache'}, up to " in out
    assert_same_end(tmp_path / "run", whole)
    assert len(fetched(s3)) <= 5 + 4  # five shards, each once, but for the answers that failed


def test_processes_of_a_machine_fetch_each_shard_once(s3, url, photos, tmp_path):
    more = ["-b", "2", "--epochs", "2", "--cache", tmp_path / "cache"]
    finish(torchrun(2, command(url, tmp_path / "run", *more)))
    shards = [path.name for path in source_of("shards", photos).glob("*.tar")]
    assert fetched(s3) == sorted(shards)
    finish(torchrun(2, command(photos, tmp_path / "other", "-b", "2", "--epochs", "2")))
    assert_same_end(tmp_path / "run", tmp_path / "other")


def test_a_run_that_waits_for_storage_can_be_stopped(s3, url, tmp_path):
    s3.faults.append(Fault(key="train-000001.tar", delay=60.0, times=9))
    process = start(command(url, tmp_path / "run", "--cache", tmp_path / "cache"))
    wait_for(lambda: "train-000001.tar" in fetched(s3), process)
    kill(process, signal.SIGINT)
    time.sleep(1)  # else the kernel makes one of two
    kill(process, signal.SIGINT)  # which ends it at once
    _, err = end(process, None)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err


def test_a_training_from_the_hub_ends_as_the_folders(hub, photos, whole, tmp_path):
    files = {path.name: path.read_bytes() for path in source_of("shards", photos).iterdir()}
    hub.repositories["datasets/me/pets"] = pets = Repository(is_private=True)
    pets.commit(files)
    hub.faults.append(Fault(key="train-000001.tar", status=503, times=2))
    words = command("hf://datasets/me/pets", tmp_path / "run", "--cache", tmp_path / "cache")
    process = start(words)
    wait_for(reached(tmp_path / "run", 2), process)
    pets.commit({"README.md": b"none any longer"})
    out, err = end(process)
    assert_same_end(tmp_path / "run", whole)
    assert TOKEN not in out + err + (tmp_path / "run/config.json").read_text()
