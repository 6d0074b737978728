"""A run that is uploaded to object storage, killed, and continued on a machine without its folder."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from pipelines.dali import DaliOptions, make_loaders
from rsnet.train import main
from tests.helpers import faults, processes
from tests.helpers.s3_server import Fault

pytestmark = [pytest.mark.faults, pytest.mark.slow]

URL = "s3://bucket/runs/run"


def start(photos: Path, machine: Path, *more: str, code: int | None = None):
    """A training in a folder of its own, which stands for a machine; to its end if a code is given."""
    machine.mkdir(exist_ok=True)
    words = faults.command(photos, URL, *more)
    process = processes.start(words, {"PYTHONUNBUFFERED": "1"}, cwd=machine)
    return process if code is None else faults.end(process, code)


def stored(s3) -> int:
    time.sleep(0.05)  # the server that lists them is this process's, and takes uploads meanwhile
    return sum(key.endswith(".pt") for key in list(s3.keys()))


def test_a_run_killed_while_it_uploads_ends_elsewhere_with_the_same_bits(
    s3, photos, whole, tmp_path
):
    first = start(photos, tmp_path / "a")
    faults.wait_for(lambda: stored(s3) >= 2, first)
    s3.faults.append(Fault(method="PUT", key=".pt", delay=1.5, times=1))
    sent = len(s3.requests)
    faults.wait_for(
        lambda: any(m == "PUT" and p.endswith(".pt") for m, p in s3.requests[sent:]), first
    )
    faults.kill(first)
    first.communicate()
    s3.faults.clear()
    assert faults.step(tmp_path / "a/runs/run") < faults.UPDATES

    second = start(photos, tmp_path / "b")
    faults.wait_for(faults.reached(tmp_path / "b/runs/run", 14), second)
    second.send_signal(signal.SIGTERM)
    faults.end(second, 143)
    newest = sorted(key for key in list(s3.keys()) if "-epoch-" in key)[-1]
    ended = (tmp_path / "b/runs/run/checkpoints/last.pt").read_bytes()
    assert s3.get(newest) == ended  # what the signal saved is there before the end

    out, _ = start(photos, tmp_path / "c", code=0)
    assert "uploaded to s3://bucket/runs/run" in out
    faults.assert_same_end(tmp_path / "c/runs/run", whole)
    assert {"runs/run/results.json", "runs/run/log.txt"} <= set(s3.keys())
    assert "runs/run/owner.json" not in set(s3.keys())


def test_a_bucket_that_is_lost_ends_a_run_in_one_line_and_loses_nothing_here(
    s3, photos, whole, tmp_path
):
    # A refusal, which is not tried again: with 503 the tries for three checkpoints take a minute and a half.
    s3.faults.append(Fault(method="PUT", key=".pt", status=403, times=10**9))
    _, err = start(photos, tmp_path / "a", "--on-save-error", "continue", code=1)
    assert "error: cannot upload to s3://bucket/runs/run" in err
    assert "run the same command to upload it" in err
    faults.assert_same_end(tmp_path / "a/runs/run", whole)
    assert (tmp_path / "a/runs/run/results.json").exists()
    s3.faults.clear()
    start(photos, tmp_path / "a", code=0)
    assert stored(s3) > 0


def test_a_start_that_is_refused_does_no_harm_to_the_run_at_the_url(s3, photos, whole, tmp_path):
    """Another machine whose images are others, which is seen once the checkpoint is there."""
    other = tmp_path / "photos"
    shutil.copytree(photos, other)
    image = next((other / "train").rglob("*.JPEG"))
    image.rename(image.with_name("other.JPEG"))
    first = start(photos, tmp_path / "a")
    faults.wait_for(lambda: stored(s3) >= 1, first)
    owner = s3.get("runs/run/owner.json")
    faults.kill(first, signal.SIGSTOP)  # so that it does not end meanwhile
    _, err = start(other, tmp_path / "b", code=2)
    assert "as many images as before, but others" in err
    assert s3.get("runs/run/owner.json") == owner
    faults.kill(first, signal.SIGCONT)
    faults.end(first, 0)
    faults.assert_same_end(tmp_path / "a/runs/run", whole)


@pytest.fixture
def train(monkeypatch, capsys, photos, tmp_path):
    """Train in this process for an epoch; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        words = ["train_dali.py", "--data", photos, *faults.RUN, "--epochs", "1", *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        code = main("train_dali.py", DaliOptions, make_loaders)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_another_run_is_never_mixed_with_the_one_at_the_url(s3, train, tmp_path):
    assert train("--output", URL)[0] == 0
    before = s3.keys()
    code, _, err = train("--output", "s3://bucket/others/run")
    assert code == 2
    assert "holds a run that is uploaded to s3://bucket/runs/run" in err
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    code, _, err = train("--output", URL, "--lr", "0.7")
    assert code == 2
    assert f"{URL} already holds a run with other options (--lr" in err
    checkpoint = str(tmp_path / "elsewhere/run/checkpoints/last.pt")
    (tmp_path / "runs").rename(tmp_path / "fetched")
    code, _, err = train("--output", URL, "--resume", checkpoint, "--epochs", "2")
    assert code == 2
    assert f"{URL} holds a run already; continue it with --resume auto" in err
    assert s3.keys() == before
    (tmp_path / "runs").rename(tmp_path / "again")
    assert train("--output", "runs/run", "--lr", "0.7")[0] == 0
    kept = (tmp_path / "runs/run/checkpoints/last.pt").read_bytes()
    for resume in ([], ["--resume", "auto"], ["--resume", "runs/run"]):
        code, _, err = train("--output", URL, *resume)
        assert code == 2
        assert f"runs/run holds a run, and {URL} another one" in err
    assert (tmp_path / "runs/run/checkpoints/last.pt").read_bytes() == kept
    assert s3.keys() == before
    (tmp_path / "runs").rename(tmp_path / "other")
    code, out, _ = train("--output", URL)
    assert code == 0
    assert "already finished after 1 epochs" in out


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s3://nowhere/run", "there is no such object, or bucket"),
        ("hf://user/run", "a URL of object storage is s3://BUCKET/FOLDER"),
        ("s3://key:secret@bucket/run", "a URL with a password would be written to logs"),
    ],
)
@pytest.mark.usefixtures("s3")
def test_a_url_that_cannot_be_written_ends_the_run_before_it_begins(train, url, line):
    code, _, err = train("--output", url)
    assert code == 2
    assert line in err
    assert "secret" not in err
