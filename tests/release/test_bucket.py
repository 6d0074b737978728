"""Commands that take a run take one in object storage, too, or say that they do not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.utils import locks
from pipelines.utils.cli import parse_options
from pipelines.utils.errors import DataError, UsageError
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.remote import RemoteRun, Stored
from rsnet.cli import add_resolution, report
from rsnet.config.model_config import ModelConfig
from rsnet.config.train_config import TrainConfig
from rsnet.loggers.run_dir import run_directory
from rsnet.models.factory import create_model
from rsnet.release import bucket
from rsnet.release.source import open_source
from rsnet.training.fine_tune import read_switchable
from rsnet.training.teacher import read_teacher
from tests.helpers.s3_server import Fault

URL = "s3://bucket/runs/a"
CONFIG = ModelConfig("parallel_resnet18", 3, (32,), width_mult=0.0625, stem="small")


@pytest.fixture
def run(s3, tmp_path, monkeypatch) -> RemoteRun:
    """Checkpoints after epochs 1 and 2, of which the first is the best."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote, model = RemoteRun(URL), create_model(CONFIG)
    for epoch in (1, 2):
        file = tmp_path / "last.pt"
        io.save(file, Checkpoint(CONFIG, model.state_dict(), epoch=epoch))
        name = Stored(epoch, epoch, 0, io.sha256(file)).name
        remote.store.put(name, file)
        if epoch == 1:
            remote.note_best(name)
    s3.put("runs/a/metrics.jsonl", b"{}\n")
    return remote


def test_a_run_its_newest_and_a_checkpoint_are_opened_and_read_once(s3, run, tmp_path):
    best, last = open_source(URL), open_source(Path(URL), newest=True)
    assert (best.checkpoint.epoch, last.checkpoint.epoch) == (1, 2)
    assert best.lines()[0].startswith(f"run {URL}: parallel_resnet18")
    assert (last.run_dir / "metrics.jsonl").read_text() == "{}\n"
    assert last.run_dir.name == "a"
    name = run.checkpoints()[0].name
    before = len(s3.requests)
    assert open_source(f"{URL}/{name}").checkpoint.epoch == 2
    assert not [path for _, path in s3.requests[before:] if path.endswith(".pt")]
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1

    last.file.write_bytes(b"damaged")  # in the cache
    assert open_source(URL, newest=True).checkpoint.epoch == 2
    s3.put(f"runs/a/{name}", b"damaged")
    last.file.unlink()
    assert open_source(URL, newest=True).checkpoint.epoch == 1
    with pytest.raises(DataError, match="is damaged: its SHA-256 is not that of its name"):
        open_source(f"{URL}/{name}")
    with pytest.raises(UsageError, match="s3://bucket/x is no run with checkpoints"):
        open_source("s3://bucket/x")


def test_what_killed_commands_left_goes_and_files_of_the_users_stay(run):
    folder = open_source(URL).file.parent
    name = Path(run.checkpoints()[0].name).name
    for part in (folder / f"{name}.part", folder / "4711.part"):  # the second of earlier versions
        part.write_bytes(b"half")
    mine = folder / f"{Path(run.best()).stem}-48.pt"
    mine.write_bytes(b"mine")
    assert open_source(URL, newest=True).checkpoint.epoch == 2
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, mine.name])


@pytest.mark.usefixtures("run")
def test_a_copy_stays_until_it_is_read_and_another_command_waits_for_that(monkeypatch, capsys):
    monkeypatch.setattr(locks, "MOMENT", 0.01)
    with ThreadPoolExecutor(1) as pool:
        with bucket.local_copy(URL, newest=False) as best:
            other = pool.submit(open_source, URL, newest=True)
            while not (err := capsys.readouterr().err):
                wait([other], timeout=0.01)
            assert err == f"note: {URL}: another command is reading it; this one waits\n"
            assert io.load(best).epoch == 1
        assert other.result().checkpoint.epoch == 2
    assert not best.exists()


def test_a_best_that_is_replaced_while_a_command_waits_is_no_error(s3, run, monkeypatch):
    """The training that goes on stores another best and removes the old one."""
    alone = bucket.exclusive_lock

    @contextmanager
    def waiting(*arguments, **more):
        with alone(*arguments, **more):
            old, new = run.best(), run.checkpoints()[0].name
            run.note_best(new)
            run.store.remove(old)
            yield

    monkeypatch.setattr(bucket, "exclusive_lock", waiting)
    assert open_source(URL).checkpoint.epoch == 2
    assert len([key for key in s3.keys() if key.endswith(".pt")]) == 1  # noqa: SIM118


def test_a_storage_that_fails_leaves_no_part_of_a_copy(s3, run, tmp_path):
    s3.faults.append(Fault(key=run.best(), status=403, times=9))
    with pytest.raises(UsageError, match="access is denied"):
        open_source(URL)
    assert not [*(tmp_path / "cache").rglob("*.p*t")]


@pytest.mark.usefixtures("run")
def test_a_run_there_teaches_and_is_started_from_as_one_of_this_machine():
    options = TrainConfig(data="d", teacher=URL)
    pinned, teacher = read_teacher(options, {}, lambda _: None)
    assert teacher.words.startswith(f"run {URL}: parallel_resnet18")
    again, _ = read_teacher(TrainConfig(data="d"), vars(pinned), lambda _: None)
    assert again.teacher is None  # the run's own goes on
    assert read_switchable(URL, None, None).epoch == 1


def test_what_does_not_take_a_url_says_so():
    with pytest.raises(UsageError, match="s3://b/x: this command reads runs of this machine alone"):
        run_directory(Path("s3://b/x"))
    with pytest.raises(UsageError, match="--output gs://b/x: this command writes on this machine"):
        parse_options(report.Options, [report.Options], ["a", "--output", "gs://b/x"])
    for source in ("s3://b/x", "hf://me/x"):
        with pytest.raises(UsageError, match=f"--output: name a file, as {source} is not on this"):
            add_resolution.run(add_resolution.Options(source, 48, "d"))
