"""Object storage: what is asked of it, faults in between, and errors in one line."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.sources import remote_reader, shard_cache
from pipelines.sources.cache_options import CacheOptions
from pipelines.sources.options import SplitOptions
from pipelines.sources.shards import open_shards
from pipelines.sources.splits import open_split, open_splits
from pipelines.storage import remote
from pipelines.utils.errors import RunError, UsageError
from tests.helpers.s3_server import Fault
from tests.helpers.web_server import WebServer
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
    with pytest.raises(RunError, match=r"s3://bucket/shards/train-000001\.tar changed after"):
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


@pytest.fixture
def web(local):
    """Makes a web server of the shards with its index; its URL is that of their folder."""
    servers = []

    def make(**options) -> WebServer:
        servers.append(server := WebServer(**options))
        server.files |= {path.name: path.read_bytes() for path in local.iterdir()}
        return server

    yield make
    for server in servers:
        server.stop()


TRAIN, VAL = "train-{000000..000002}.tar", "val-{000000..000001}.tar"


@pytest.mark.parametrize("options", [{}, {"has_ranges": False}, {"tag": ""}])
def test_a_web_servers_shards_are_named_by_ranges(local, web, cache, monkeypatch, options):
    monkeypatch.setattr(remote, "PART", 40_000)
    host = web(**options).url
    found = open_splits(f"{host}/{TRAIN}", SplitOptions(f"{host}/{VAL}"), cache=cache)
    for ours, expected in zip(found, open_splits(local), strict=True):
        assert ours.classes == expected.classes
        assert contents(ours) == contents(expected)
    with pytest.raises(UsageError, match=r"not there: http://\S+val-000002.tar"):
        open_split(f"{host}/val-{{000000..000002}}.tar", "val", cache)


def replaced(server: WebServer, folder: Path) -> list[bytes]:
    """The images after a byte of the first shard's first image has changed, at the same size."""
    data = bytearray(server.files["train-000000.tar"])
    data[600] ^= 1
    server.files["train-000000.tar"] = bytes(data)
    folder.mkdir()
    for name in server.files:
        if name.startswith("train"):
            (folder / name).write_bytes(server.files[name])
    return contents(open_shards(folder, "train", with_sha256=True))


@pytest.mark.parametrize("tag", ["ETag", ""])
def test_a_shard_replaced_on_a_web_server_with_its_index_is_fetched_anew(
    web, cache, tmp_path, capsys, tag
):
    server = web(tag=tag)
    before = contents(open_split(f"{server.url}/{TRAIN}", "train", cache))
    stamps = open_split(f"{server.url}/{TRAIN}", "train", cache).stamps()
    expected = replaced(server, tmp_path / "new")
    (index,) = (tmp_path / "new").glob(".*.parquet")
    server.files[index.name] = index.read_bytes()
    server.requests.clear()
    source = open_split(f"{server.url}/{TRAIN}", "train", cache)
    assert contents(source) == expected != before
    assert source.stamps() != stamps  # so that a report of `rsnet verify` is of another state
    assert sum(line.endswith(".tar") for line in server.requests) == 3 + 1  # asked for, fetched
    assert "note:" not in capsys.readouterr().err


def test_shards_of_which_nothing_tells_a_change_are_said_once_and_a_mixture_ends_the_run(
    web, cache, tmp_path, capsys
):
    server = web(tag="")
    for name in [name for name in server.files if name.startswith(".")]:
        del server.files[name]
    before = contents(open_split(f"{server.url}/{TRAIN}", "train", cache))
    replaced(server, tmp_path / "new")
    assert contents(open_split(f"{server.url}/{TRAIN}", "train", cache)) == before
    assert capsys.readouterr().err.count("gives neither ETag nor Last-Modified") == 1
    for path in (cache.folder / "shards").iterdir():
        path.unlink()
    with pytest.raises(RunError, match=rf"000000\.tar has another .*, {cache.folder}/\w+\.index"):
        contents(open_split(f"{server.url}/{TRAIN}", "train", cache))


def test_ranges_may_name_folders_of_a_bucket(s3, cache, local):
    """As of local shards and a web server's."""
    shards = sorted(local.glob("train-*.tar"))
    for i, path in enumerate(shards):
        s3.put(f"parts/part-{i % 2}/{path.name}", path.read_bytes())
    names = [path.name.removeprefix("train-").removesuffix(".tar") for path in shards]
    pattern = f"train-{{{names[0]}..{names[-1]}}}.tar"
    for i in range(2):  # each folder has every other one of them
        for path in shards[1 - i :: 2]:
            s3.put(f"parts/part-{i}/{path.name}", path.read_bytes())
    found = open_split(f"s3://bucket/parts/part-{{0..1}}/{pattern}", "train", cache)
    assert len(found) == 2 * len(open_split(local, "train"))


def test_ranges_name_local_shards_too(local):
    assert open_split(f"{local}/train-{{000000..000002}}.tar", "train").shards == sorted(
        str(path) for path in local.glob("train-*.tar")
    )
    both = f"{local}/{{train-{{000000..000002}},val-{{000000..000001}}}}.tar"
    assert [s.names for s in open_splits(both)] == [s.names for s in open_splits(local)]
    with pytest.raises(UsageError, match=r"not there: \S+train-000003.tar"):
        open_split(f"{local}/train-{{000000..000003}}.tar", "train")
