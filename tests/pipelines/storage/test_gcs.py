"""Google Cloud Storage: against a server on localhost, with faults in between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.sources.splits import open_split
from pipelines.storage import remote
from pipelines.storage.folder import ObjectStore
from pipelines.storage.kinds import remote_of
from pipelines.utils.errors import RunError, UsageError
from rsnet.checkpoint.remote import RemoteRun, fetch_newest
from rsnet.checkpoint.uploader import Uploader
from tests.helpers.gcs_server import GcsServer
from tests.helpers.storage_server import Fault
from tests.pipelines.sources.conftest import contents

pytest.importorskip("gcsfs", reason="the extra gs is not installed")

URL = "gs://bucket/shards"


@pytest.fixture
def gcs(monkeypatch, tmp_path, no_long_waits):  # noqa: ARG001
    """A server that gcsfs finds by the usual variables, without credentials."""
    server = GcsServer()
    for name, value in {
        "STORAGE_EMULATOR_HOST": server.url,
        "NO_GCE_CHECK": "true",
        "NO_PROXY": "127.0.0.1",
        "HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


@pytest.fixture
def stored(local, gcs) -> Path:
    """The shards of `local`, which are in the bucket, too."""
    for path in local.iterdir():
        gcs.put(f"shards/{path.name}", path.read_bytes())
    return Path(local)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(key="none"),
        Fault(key="train-000000.tar", status=503, times=3),
        Fault(key="/o", status=429, times=2),
        Fault(key="train-000001.tar", cut=1000, times=2),
        Fault(key="train-000000.tar", delay=1.0),
    ],
    ids=lambda fault: str(fault.status or fault.cut or fault.delay),
)
def test_a_split_has_the_local_shards_images_whatever_passes(gcs, cache, stored, fault):
    gcs.faults.append(fault)
    found = open_split(URL, "train", cache)
    assert contents(found) == contents(open_split(stored, "train"))
    assert main(["verify", URL, "--cache", str(cache.folder)]) == 0


@pytest.mark.usefixtures("stored")
def test_a_changed_shard_ends_a_run_with_its_name(gcs, cache):
    train = open_split(URL, "train", cache)
    data = bytearray(gcs.objects["shards/train-000001.tar"][1])
    data[600] ^= 1
    gcs.put("shards/train-000001.tar", bytes(data))
    with pytest.raises(RunError, match=r"gs://bucket/shards/train-000001\.tar changed after"):
        contents(train)
    with pytest.raises(RunError, match=r"train-000001\.tar has another content than its index"):
        contents(open_split(URL, "train", cache))


@pytest.mark.usefixtures("stored")
def test_what_is_missing_denied_or_down_is_told_in_one_line(gcs, cache):
    for data in ("gs://bucket/other", "gs://nowhere/shards"):
        with pytest.raises(UsageError, match=r"no shards of train match gs://|no such object"):
            open_split(data, "train", cache)
    for status in (401, 403):
        gcs.faults.append(Fault(key="/o", status=status))
        with pytest.raises(UsageError, match=r"access is denied .*gcloud auth application-default"):
            open_split(URL, "train", cache)
    gcs.faults.append(Fault(key="/o", status=500, times=99))
    with pytest.raises(RunError, match=r"cannot read gs://\S+: 8 tries failed.*500"):
        open_split(URL, "train", cache)
    assert gcs.faults[-1].times == 99 - remote.TRIES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # of aiohttp
def test_objects_are_written_verified_listed_and_removed(gcs, tmp_path):
    store, file = ObjectStore("gs://bucket/runs/a"), tmp_path / "file"
    file.write_bytes(os.urandom(20 << 20))  # two parts
    assert store.list() == []
    gcs.faults.append(Fault(method="POST", key="/uploads/0", status=503))
    store.put("checkpoints/x", file)
    store.write("small", b"data")
    assert gcs.objects["runs/a/checkpoints/x"][1] == file.read_bytes()
    assert store.list() == ["checkpoints/x", "small"]
    assert (store.read("small"), store.read("none")) == (b"data", None)
    store.get("checkpoints/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    for _ in range(2):
        store.remove("small")
    assert store.list() == ["checkpoints/x"]
    with pytest.raises(UsageError, match="no such object, or bucket"):
        ObjectStore("gs://nowhere/a").write("x", b"")


def test_a_run_is_uploaded_and_fetched(gcs, tmp_path):
    run, said = tmp_path / "run", []
    checkpoint = run / "checkpoints" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"one")
    uploader = Uploader(RemoteRun("gs://bucket/runs/a"), run, 1, said.append)
    uploader.start()
    uploader.add(1, 0)
    assert uploader.close(30) == ""
    assert len([name for name in gcs.objects if name.endswith(".pt")]) == 1
    fetch_newest(RemoteRun("gs://bucket/runs/a"), tmp_path / "other", 1, said.append)
    assert (tmp_path / "other" / "checkpoints" / "last.pt").read_bytes() == b"one"


@pytest.mark.usefixtures("stored")
def test_no_request_is_made_twice_by_the_library_itself(gcs):
    gcs.faults.append(Fault(key="/o", status=503, times=1))
    assert len(remote_of(URL).find([f"{URL}/train-*.tar"])[0]) == 3
    assert len([request for request in gcs.requests if request.endswith("/o")]) == 2
