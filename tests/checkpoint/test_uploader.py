"""Runs in object storage: against a real server of S3 on localhost, with faults in between."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path

import pytest

from pipelines.storage import remote as storage
from pipelines.storage.folder import ObjectStore
from pipelines.utils.errors import DataError, RunError, UsageError
from rsnet.checkpoint import remote, uploader
from rsnet.checkpoint.manager import CheckpointManager
from rsnet.checkpoint.remote import RemoteRun, fetch_newest
from rsnet.checkpoint.uploader import Uploader, _TakenOver
from tests.helpers.s3_server import Fault, S3Server

URL = "s3://bucket/runs/a"


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)


class Run:
    """A run directory, whose checkpoints are any bytes, and what was said."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep, self.said = folder, keep, []
        self.manager = CheckpointManager(folder / "checkpoints", keep)
        self.manager.folder.mkdir(parents=True, exist_ok=True)
        self.uploader = Uploader(RemoteRun(URL), folder, keep, self.said.append)

    def save(self, data: bytes, is_best: bool = False) -> None:
        for best in [True, False] if is_best else [False]:
            pending = self.manager.folder / "next.pt"
            pending.write_bytes(data)
            self.manager.take_in(pending, best)

    def upload(self, *contents: bytes, best: bytes = b"") -> None:
        """Save and upload one after the other, to the end."""
        self.uploader.start()
        for epoch, data in enumerate(contents):
            self.save(data, data == best)
            self.uploader.add(epoch, 0)
            self.wait()
        assert self.uploader.close(20) == ""

    def wait(self) -> None:
        while self.uploader._next_place or self.uploader._place:
            threading.Event().wait(0.002)

    def fetch(self) -> None:
        fetch_newest(RemoteRun(URL), self.folder, self.keep, self.said.append)

    def content(self, name: str = "last.pt") -> bytes:
        return (self.manager.folder / name).read_bytes()


def checkpoints(s3) -> list[str]:
    names = s3.keys()
    return [k.removeprefix("runs/a/checkpoints/") for k in names if k.endswith(".pt")]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_last_ones_the_best_and_the_small_files_are_uploaded_and_fetched(s3, tmp_path):
    run = Run(tmp_path / "a")
    (run.folder / "metrics.jsonl").write_text("{}\n")
    (run.folder / "lock").touch()
    run.upload(b"one", b"two", b"three", b"four", best=b"one")
    assert checkpoints(s3) == [
        f"000001-epoch-0-update-0-{sha(b'one')}.pt",  # the best
        f"000003-epoch-2-update-0-{sha(b'three')}.pt",
        f"000004-epoch-3-update-0-{sha(b'four')}.pt",
    ]
    small = set(s3.keys()) - {f"runs/a/checkpoints/{name}" for name in checkpoints(s3)}
    assert small == {"runs/a/checkpoints/best.json", "runs/a/metrics.jsonl"}
    assert not list(run.manager.folder.glob("upload*"))

    other = Run(tmp_path / "b")
    other.fetch()
    assert (other.content(), other.content("best.pt")) == (b"four", b"one")
    assert (other.folder / "metrics.jsonl").read_text() == "{}\n"


def test_a_best_one_that_is_none_of_the_last_is_stored_beside_them(s3, tmp_path):
    run = Run(tmp_path / "a")
    pending = run.manager.folder / "next.pt"
    pending.write_bytes(b"imported")
    run.manager.take_in(pending, is_best=True)
    run.upload(b"one")
    assert f"best-{sha(b'imported')}.pt" in checkpoints(s3)
    other = Run(tmp_path / "b")
    other.fetch()
    assert other.content("best.pt") == b"imported"


def test_a_damaged_one_is_passed_over_with_a_note(s3, tmp_path):
    Run(tmp_path / "a").upload(b"older", b"newer")
    newest = f"runs/a/checkpoints/{checkpoints(s3)[-1]}"
    for i, damaged in enumerate([b"", b"ne", b"newer and"]):
        s3.put(newest, damaged)
        other = Run(tmp_path / str(i))
        other.fetch()
        assert other.content() == b"older"
        assert f"s3://bucket/{newest} is damaged" in other.said[0]


def test_if_none_is_whole_a_new_run_does_not_begin_in_its_place(s3, tmp_path):
    Run(tmp_path / "a").upload(b"one")
    s3.put(f"runs/a/checkpoints/{checkpoints(s3)[0]}", b"other")
    with pytest.raises(DataError, match="no checkpoint that is whole; give another --output"):
        Run(tmp_path / "b").fetch()


def test_a_damaged_newest_one_never_pushes_out_whole_ones(s3, tmp_path):
    Run(tmp_path / "a").upload(b"one", b"two")
    s3.put(f"runs/a/checkpoints/{checkpoints(s3)[-1]}", b"other")
    run = Run(tmp_path / "b")
    run.fetch()
    run.upload(b"three")
    assert sha(b"one") in checkpoints(s3)[0]
    again = Run(tmp_path / "b")
    again.upload(b"four", b"five")
    assert [name[-67:-3] for name in checkpoints(s3)] == [sha(b"four"), sha(b"five")]


def test_what_is_here_and_newer_stays(s3, tmp_path):
    here, elsewhere = Run(tmp_path / "a"), Run(tmp_path / "b")
    here.upload(b"one")
    here.save(b"two")
    here.fetch()
    assert (here.content(), here.content("last-1.pt")) == (b"two", b"one")
    elsewhere.fetch()
    elsewhere.upload(b"three")
    Run(tmp_path / "c").upload(b"four")  # goes on from three
    old = Run(tmp_path / "d")
    old.save(b"three")
    (old.folder / "log.txt").write_text("of here")
    s3.put("runs/a/log.txt", b"of there")
    old.fetch()
    assert (old.content(), old.content("last-1.pt")) == (b"four", b"three")
    assert (old.folder / "log.txt").read_text() == "of there"
    assert (old.folder / "log.txt.local").read_text() == "of here"


@pytest.mark.parametrize("name", ["_fetch_best", "_fetch_small_files", "atomic_write"])
@pytest.mark.usefixtures("s3")
def test_a_fetch_that_was_killed_is_done_again_to_its_end(tmp_path, monkeypatch, name):
    first = Run(tmp_path / "a")
    (first.folder / "metrics.jsonl").write_text("{}\n")
    first.upload(b"one", b"two", best=b"one")
    run = Run(tmp_path / "b")
    (run.folder / "metrics.jsonl").write_text("of here")
    with monkeypatch.context() as patch:
        patch.setattr(remote, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.fetch()
    run.fetch()
    assert (run.content(), run.content("best.pt")) == (b"two", b"one")
    assert (run.folder / "metrics.jsonl").read_text() == "{}\n"
    assert (run.folder / "metrics.jsonl.local").read_text() == "of here"


def test_a_run_that_was_not_uploaded_is_not_mixed_with_another_one(s3, tmp_path):
    Run(tmp_path / "a").upload(b"one", b"two")
    run = Run(tmp_path / "b")
    remote.require_of_run(RemoteRun(URL), run.folder)  # nothing is here
    for data in (b"two", b"three"):  # two was fetched
        run.save(data)
        remote.require_of_run(RemoteRun(URL), run.folder)
    run.save(b"four")
    with pytest.raises(UsageError, match=f"holds a run, and {URL} another one"):
        remote.require_of_run(RemoteRun(URL), run.folder)
    remote.require_of_run(RemoteRun("s3://bucket/new"), run.folder)
    assert len(checkpoints(s3)) == 2


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "PUT", "status": 503, "times": 3},
        {"method": "GET", "status": 503, "times": 4},
        {"method": "GET", "key": ".pt", "cut": 2},
    ],
    ids=str,
)
def test_faults_in_between_lose_nothing(s3, tmp_path, fault):
    s3.faults.append(Fault(**fault))
    run = Run(tmp_path / "a")
    run.upload(b"one", b"two", best=b"two")
    Run(tmp_path / "b").fetch()
    assert (tmp_path / "b/checkpoints/last.pt").read_bytes() == b"two"
    assert run.said == []
    assert len(checkpoints(s3)) == 2


def test_what_fails_is_said_in_a_line_and_sent_with_the_next_one(s3, tmp_path):
    run = Run(tmp_path / "a")
    run.uploader.start()
    fault = Fault(method="PUT", key=".pt", status=503, times=10**9)
    s3.faults.append(fault)
    problems = []
    for epoch in range(3):
        run.save(b"%d" % epoch)
        problems.append(run.uploader.add(epoch, 0))
        while len(run.said) <= epoch:
            threading.Event().wait(0.002)
    assert all(
        line.startswith(f"cannot upload to {URL}: cannot write {URL}/checkpoints/000001-epoch")
        and line.endswith("it is tried again with the next checkpoint")
        and "\n" not in line
        for line in run.said
    )
    run.save(b"3")
    assert [*map(bool, problems), bool(run.uploader.add(3, 0))] == [False, False, False, True]
    fault.times = 0
    assert run.uploader.close(20) == ""
    assert sha(b"3") in checkpoints(s3)[-1]


def test_a_checkpoint_that_is_gone_ends_no_upload_of_later_ones(s3, tmp_path, monkeypatch):
    run = Run(tmp_path / "a")
    run.uploader.start()
    with monkeypatch.context() as patch:
        patch.setattr(uploader, "link_or_copy", lambda *_: None)
        run.save(b"one")
        run.uploader.add(0, 0)
        while not run.said:
            assert run.uploader._thread.is_alive()
            threading.Event().wait(0.002)
    assert "No such file" in run.said[0]
    run.save(b"two")
    run.uploader.add(1, 0)
    assert run.uploader.close(20) == ""
    assert [name[-67:-3] for name in checkpoints(s3)] == [sha(b"two")]


@pytest.mark.usefixtures("s3")
def test_a_server_that_is_gone_ends_in_one_line(monkeypatch, tmp_path):
    lost = S3Server()  # another address of the same buckets
    monkeypatch.setenv("AWS_ENDPOINT_URL", lost.url)
    run = Run(tmp_path / "a")
    run.uploader.start()
    lost.stop()
    run.save(b"one")
    run.uploader.add(0, 0)
    assert run.uploader.close(20).startswith(f"cannot upload to {URL}: ")
    with pytest.raises(RunError):
        run.fetch()
    assert run.content() == b"one"


def test_the_end_is_waited_for_so_long_and_no_longer(s3, tmp_path):
    run = Run(tmp_path / "a")
    run.uploader.start()
    s3.faults.append(Fault(method="PUT", key=".pt", delay=1))
    run.save(b"one")
    run.uploader.add(0, 0)
    assert "takes more than 0 s" in run.uploader.close(0.1)
    run.uploader._thread.join()


def test_of_two_runs_with_one_url_the_first_stops_uploading(s3, tmp_path):
    first, second = Run(tmp_path / "a"), Run(tmp_path / "b")
    first.uploader.start()
    first.save(b"one")
    first.uploader.add(0, 0)
    first.wait()
    second.uploader.start()
    assert "has not ended here; if it is not lost, it stops uploading now" in second.said[0]
    first.save(b"two")
    first.uploader.add(1, 0)
    assert "has taken it over" in first.uploader.close(20)
    assert "has taken it over" in first.uploader.add(2, 0)  # and ends, unless it is told not to
    second.save(b"three")
    second.uploader.add(1, 0)
    assert second.uploader.close(20) == ""
    assert [sha(b"one"), sha(b"three")] == [name[-67:-3] for name in checkpoints(s3)]
    assert "runs/a/owner.json" not in set(s3.keys())


def test_a_run_that_ends_leaves_the_claim_of_one_that_began_meanwhile(s3, tmp_path, monkeypatch):
    """The second starts while the first uploads for the last time."""
    first, second = Run(tmp_path / "a"), Run(tmp_path / "b")
    first.uploader.start()
    first.save(b"one")
    send = first.uploader._send

    def begin_meanwhile(*arguments) -> None:
        send(*arguments)
        second.uploader.start()

    monkeypatch.setattr(first.uploader, "_send", begin_meanwhile)
    with first.uploader._changed:  # so that what is added is the last
        first.uploader.add(0, 0)
        first.uploader._is_closing = True
    assert first.uploader.close(20) == ""
    second.uploader._require_own()
    assert second.uploader.close(20) == ""
    assert "runs/a/owner.json" not in set(s3.keys())


@pytest.mark.usefixtures("s3")
def test_what_was_never_started_uploads_nothing(tmp_path):
    run = Run(tmp_path / "a")
    run.save(b"one")
    assert run.uploader.close(20) == ""
    assert run.uploader.remote.checkpoints() == []


def test_what_was_not_stored_as_it_was_sent_is_not_taken_for_stored(s3, tmp_path, monkeypatch):
    run = Run(tmp_path / "a")
    store = run.uploader.remote.store
    (tmp_path / "file").write_bytes(b"right")
    fs = store._remote.fs
    put = fs._put_file
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"wrong")
    monkeypatch.setattr(fs, "_put_file", lambda _, name, **kw: put(str(wrong), name, **kw))
    with pytest.raises(RunError, match="what is stored is not what was sent"):
        store.put("x", tmp_path / "file")
    assert s3.keys() == []


def test_a_file_of_several_parts_is_verified_by_its_checksum(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.Remote, "part", 5 << 20)
    file = tmp_path / "file"
    file.write_bytes(os.urandom(11 << 20))
    store = ObjectStore(URL)
    store.put("x", file)
    assert store._remote.info(f"{URL}/x").tag.strip('"').endswith("-3")
    assert [m for m, path in s3.requests if path.startswith("/bucket/runs/a/x")].count("GET") == 0
    assert s3.get("runs/a/x") == file.read_bytes()


def test_no_bucket_and_no_access_are_said_at_once(s3):
    with pytest.raises(UsageError, match=r"s3://nowhere/a.*no such object, or bucket"):
        ObjectStore("s3://nowhere/a").write("x", b"")
    s3.faults.append(Fault(method="PUT", status=403))
    with pytest.raises(UsageError, match="access is denied"):
        ObjectStore(URL).write("x", b"")


def test_damaged_notes_of_the_owner_and_of_the_best_are_none(s3, tmp_path):
    run = Run(tmp_path / "a")
    for damaged in [b"", b"[]", b"{", b"\xff", b'{"name": "../../x"}', b'{"name": 1}']:
        s3.put("runs/a/owner.json", damaged)
        s3.put("runs/a/checkpoints/best.json", damaged)
        with contextlib.suppress(_TakenOver):
            run.uploader._require_own()
        assert run.uploader.remote.best() is None


@pytest.mark.usefixtures("s3")
def test_metrics_are_uploaded_however_many_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(uploader, "MAX_BYTES", 10)
    run = Run(tmp_path / "run")
    for name in ("metrics.jsonl", "notes.json"):
        (run.folder / name).write_text("a line of more\n")
    run.upload(b"1")
    assert run.uploader.remote.store.read("metrics.jsonl") == b"a line of more\n"
    assert run.uploader.remote.store.read("notes.json") is None


def test_a_run_that_was_taken_over_removes_nothing_of_the_others(s3, tmp_path, monkeypatch):
    first, second = Run(tmp_path / "a", keep=1), Run(tmp_path / "b", keep=1)
    first.uploader.start()
    first.save(b"one")
    first.uploader.add(0, 0)
    first.wait()
    send = first.uploader._send

    def begin_meanwhile(*arguments) -> None:
        send(*arguments)
        second.uploader.start()

    monkeypatch.setattr(first.uploader, "_send", begin_meanwhile)
    first.save(b"two")
    first.uploader.add(1, 0)
    first.uploader.close(20)
    assert any(sha(b"one") in name for name in checkpoints(s3))
    second.uploader.close(20)
