"""Object storage: what is asked of it, faults in between, and errors in one line."""

from __future__ import annotations

import http.server
import re
import threading
from functools import partial
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.sources import remote_reader, shard_cache
from pipelines.sources.cache_options import CacheOptions
from pipelines.sources.options import SplitOptions
from pipelines.sources.splits import open_split, open_splits
from pipelines.storage import remote
from pipelines.utils.errors import RunError, UsageError
from tests.helpers.s3_server import Fault
from tests.pipelines.sources.conftest import contents, upload

pytestmark = pytest.mark.usefixtures("no_long_waits")


@pytest.fixture
def url(s3, local) -> str:
    found = upload(s3, local)
    s3.requests.clear()
    return found


def gets(server, suffix: str = ".tar") -> list[str]:
    return sorted(
        Path(path).name
        for method, path in server.requests
        if method == "GET" and path.endswith(suffix)
    )


def indices(server) -> list[str]:
    keys = server.keys()
    return [key for key in keys if key.endswith(".parquet")]


def test_the_index_of_rsnet_shards_is_used_and_each_shard_asked_for_once(s3, url, cache, local):
    train = open_split(url, "train", cache)
    assert gets(s3) == []
    expected = open_split(local, "train")
    assert contents(train) == contents(expected)
    assert gets(s3) == sorted(Path(path).name for path in expected.shards)
    assert contents(open_split(url, "train", cache)) == contents(expected)
    assert len(gets(s3)) == len(expected.shards)


def test_shards_without_an_index_are_fetched_once_for_it_and_it_stays_beside_them(
    s3, url, cache, local
):
    for key in indices(s3):
        s3.client.delete_object(Bucket="bucket", Key=key)
    train = open_split(url, "train", cache)
    contents(train)
    assert len(gets(s3)) == len(train.shards)
    assert len(indices(s3)) == 1
    s3.requests.clear()
    again = open_split(url, "train", CacheOptions(cache=cache.folder / "other", cache_size="1GB"))
    assert gets(s3) == []
    assert again.names == open_split(local, "train").names


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=500, times=3), Fault(status=503, times=3), Fault(status=429, times=1)],
        [Fault(cut=1000, times=5)],
        [Fault(delay=1.0, key="train-000000.tar")],
        [Fault(cut=0, times=2), Fault(status=500, key=".parquet", times=2)],
    ],
    ids=["errors", "cut bodies", "a stalled answer", "empty bodies"],
)
def test_faults_that_pass_change_nothing(s3, url, cache, local, faults):
    s3.faults.extend(faults)
    assert contents(open_split(url, "train", cache)) == contents(open_split(local, "train"))
    assert all(fault.times == 0 for fault in faults)


def test_a_fault_that_stays_ends_in_one_line_that_names_the_object(s3, url, cache):
    train = open_split(url, "train", cache)
    s3.faults.append(Fault(key="train-000001.tar", status=503, times=99))
    with pytest.raises(
        RunError, match=r"cannot read s3://\S+train-000001.tar: 8 tries failed.*503"
    ):
        contents(train)
    assert s3.faults[0].times == 99 - remote.TRIES
    assert not [*(cache.folder / "shards").glob("*.partial")]


def test_a_shard_that_changes_under_a_run_ends_it(s3, url, cache):
    train = open_split(url, "train", cache)
    s3.put(
        "shards/train-000000.tar", s3.get("shards/train-000000.tar")
    )  # the same: nothing happens
    data = bytearray(s3.get("shards/train-000001.tar"))
    data[600] ^= 1
    s3.put("shards/train-000001.tar", bytes(data))
    with pytest.raises(RunError, match=r"s3://bucket/shards/train-000001\.tar has changed"):
        contents(train)
    with pytest.raises(RunError, match=r"train-000001\.tar has another content than its index"):
        contents(open_split(url, "train", cache))


def test_a_full_disk_and_a_changed_shard_are_no_broken_images(s3, url, cache, capsys, monkeypatch):
    words = ["verify", url, "--cache", str(cache.folder), "--cache-size", "1GB"]
    with monkeypatch.context() as patch:
        patch.setattr(shard_cache, "free_space", lambda _: 1)
        assert main(words) == 1
    assert re.search("error: .*--cache: cannot write .*No space left", capsys.readouterr().err)
    data = bytearray(s3.get("shards/train-000001.tar"))
    data[600] ^= 1
    s3.put("shards/train-000001.tar", bytes(data))
    assert main(words) == 1
    assert re.search(r"error: s3://\S+train-000001\.tar has another", capsys.readouterr().err)
    assert not [*cache.folder.glob("*.json")]  # a report


def test_samples_whose_shard_has_not_come_are_read_by_range(s3, url, cache, local, monkeypatch):
    monkeypatch.setattr(remote_reader, "PATIENCE", 0.0)
    train = open_split(url, "train", cache)
    for shard in train.shards:
        s3.faults.append(Fault(key=f"{shard.rpartition('/')[2]}", delay=0.3))
    assert contents(train) == contents(open_split(local, "train"))
    assert len(gets(s3)) > len(train.shards)


def test_what_is_missing_or_denied_is_told_in_one_line(s3, url, cache, monkeypatch):
    with pytest.raises(UsageError, match=r"s3://nowhere.*there is no such object, or bucket"):
        open_splits("s3://nowhere/shards", cache=cache)
    for opened in (open_splits, partial(open_split, split="train")):
        with pytest.raises(
            UsageError, match=r"no shards of train match s3://bucket/other/\{train,val\}"
        ):
            opened("s3://bucket/other", cache=cache)
    with pytest.raises(
        UsageError, match=r"shards that are not there: s3://bucket/shards/train-000003"
    ):
        open_split(f"{url}/train-{{000000..000003}}.tar", "train", cache)
    s3.faults.append(Fault(key="/bucket", status=403))
    with pytest.raises(UsageError, match=r"access is denied.*AWS_PROFILE"):
        open_split(url, "train", cache)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(cache.folder))
    with pytest.raises(UsageError, match=r"[Cc]redentials.*AWS_PROFILE"):
        open_split(url, "train", cache)


def test_no_secret_is_written(s3, url, cache, capsys, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-mine")
    assert main(["verify", url, "--cache", str(cache.folder)]) == 0
    s3.faults.append(Fault(key="/bucket", status=403, times=9))
    assert main(["verify", url, "--cache", str(cache.folder)]) == 2
    captured = capsys.readouterr()
    files = [path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()]
    assert "access is denied" in captured.err
    assert files
    for text in (captured.out.encode(), captured.err.encode(), *files):
        assert b"a-secret-of-mine" not in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("https://me:secret@host/train-{0..3}.tar", "a URL with a password"),
        ("https://host/train-{0..3}.tar?token=secret", "a URL with a query"),
        ("ftp://host/shards", r"URLs can begin with s3://"),
        ("https://127.0.0.1:1/train-*.tar", "a web server cannot list"),
        ("s3://bucket/train-{5..3}.tar", "is no range"),
    ],
)
def test_urls_that_cannot_be_read_are_refused_without_their_secrets(data, message, cache):
    with pytest.raises(UsageError, match=message) as error:
        open_split(data, "train", cache)
    assert "secret" not in str(error.value)


def test_a_library_that_is_missing_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    assert main(["verify", "gs://bucket/shards"]) == 2
    assert 'gcsfs is not installed: pip install "rsnet-trainer[gs]"' in capsys.readouterr().err


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None: ...


class _Ranges(_Files):
    """Answers requests for a part, as most servers do and Python's does not."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found or not path.is_file():
            return super().do_GET()
        data, first, last = path.read_bytes(), int(found[1]), int(found[2])
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'W/"{path.stat().st_mtime_ns}"')
        self.end_headers()
        self.wfile.write(part)
        return None


@pytest.mark.parametrize("handler", [_Files, _Ranges])
def test_a_web_servers_shards_are_named_by_ranges(local, cache, monkeypatch, handler):
    monkeypatch.setattr(remote, "PART", 40_000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=local))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_port}"
    try:
        val = f"{host}/val-{{000000..000001}}.tar"
        found = open_splits(f"{host}/train-{{000000..000002}}.tar", SplitOptions(val), cache=cache)
        for ours, expected in zip(found, open_splits(local), strict=True):
            assert ours.classes == expected.classes
            assert contents(ours) == contents(expected)
        with pytest.raises(UsageError, match=r"not there: http://\S+val-000002.tar"):
            open_split(f"{host}/val-{{000000..000002}}.tar", "val", cache)
    finally:
        server.shutdown()
        server.server_close()


def test_ranges_name_local_shards_too(local):
    assert open_split(f"{local}/train-{{000000..000002}}.tar", "train").shards == sorted(
        str(path) for path in local.glob("train-*.tar")
    )
    both = f"{local}/{{train-{{000000..000002}},val-{{000000..000001}}}}.tar"
    assert [s.names for s in open_splits(both)] == [s.names for s in open_splits(local)]
    with pytest.raises(UsageError, match=r"not there: \S+train-000003.tar"):
        open_split(f"{local}/train-{{000000..000003}}.tar", "train")
