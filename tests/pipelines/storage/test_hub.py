"""Tar shards in a data set on the Hugging Face hub: against a server on localhost, with faults in between."""

from __future__ import annotations

import re
import shutil

import pytest
from huggingface_hub import constants

from pipelines.__main__ import main
from pipelines.sources.splits import open_split, open_splits
from pipelines.utils.errors import RunError, UsageError
from tests.conftest import write_folder
from tests.helpers.hub_server import TOKEN, HubServer, Repository
from tests.helpers.storage_server import Fault
from tests.pipelines.sources.conftest import contents, source_of

NAME = "datasets/me/pets"
URL = f"hf://{NAME}/shards"


pytestmark = pytest.mark.usefixtures("no_long_waits")


@pytest.fixture
def pets(hub, local) -> HubServer:
    """The hub with the shards of `local`, which are private, at a second commit."""
    repository = hub.repositories[NAME] = Repository(is_private=True)
    repository.commit({"README.md": b"of pets"})
    repository.commit({f"shards/{path.name}": path.read_bytes() for path in local.iterdir()})
    return hub


def change(server: HubServer, file: str, data: bytes | None = None) -> None:
    """A commit, in which one byte of a file is another, or the file has other data."""
    files = dict(server.repositories[NAME].commits[server.repositories[NAME].resolve("main")])
    if data is None:
        changed = bytearray(files[file])
        changed[600] ^= 1
        data = bytes(changed)
    server.repositories[NAME].commit(files | {file: data})


def test_splits_have_the_local_shards_images_by_address_pattern_and_revision(pets, cache, local):
    expected = open_splits(local)
    commit = pets.repositories[NAME].resolve("main")
    for data in (URL, f"{URL}/{{train,val}}-*.tar", f"hf://{NAME}@{commit}/shards"):
        for found, ours in zip(open_splits(data, cache=cache), expected, strict=True):
            assert found.names == ours.names
            assert found.classes == ours.classes
            assert contents(found) == contents(ours)
    assert main(["verify", URL, "--cache", str(cache.folder)]) == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault(key=".tar", status=500, times=3),
        Fault(key=".tar", status=429, times=2),
        pytest.param(Fault(key="/shards", status=503, times=2), marks=pytest.mark.slow),
        Fault(key=".tar", cut=1000, times=3),
        Fault(key="train-000000.tar", delay=0.6),
    ],
    ids=lambda fault: str(fault.status or fault.cut or fault.delay),
)
def test_faults_that_pass_change_nothing(pets, cache, local, fault):
    pets.faults.append(fault)
    assert contents(open_split(URL, "train", cache)) == contents(open_split(local, "train"))
    assert fault.times == 0


def test_a_run_reads_the_commit_that_it_began_with(pets, cache, local):
    train = open_split(URL, "train", cache)
    change(pets, "shards/train-000001.tar")
    assert contents(train) == contents(open_split(local, "train"))
    with pytest.raises(
        RunError, match=r"hf://datasets/me/pets/shards/train-000001\.tar has another content"
    ):
        contents(open_split(URL, "train", cache))


def test_a_broken_image_is_named_with_its_shard(hub, tmp_path, capsys):
    folder = write_folder(tmp_path / "own" / "train", {"ant": 3, "bee": 2})
    (folder / "ant" / "002.JPEG").write_bytes(b"no image")
    shutil.copytree(folder, tmp_path / "own" / "val")
    files = source_of("shards", tmp_path / "own").iterdir()
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({f"shards/{path.name}": path.read_bytes() for path in files})
    assert main(["verify", URL, "--cache", str(tmp_path / "cache")]) == 1
    broken = r"hf://datasets/me/pets/shards/train-000000\.tar: .*ant/002\.JPEG: cannot identify"
    assert re.search(broken, capsys.readouterr().out)


def test_what_a_commit_does_not_change_stays_in_the_cache(pets, cache):
    contents(open_split(URL, "train", cache))
    change(pets, "README.md", b"of many pets")
    pets.requests.clear()
    contents(open_split(URL, "train", cache))
    assert not [request for request in pets.requests if request.endswith(".tar")]


def test_a_fault_that_stays_is_told_in_one_line_that_names_the_shard(pets, cache):
    train = open_split(URL, "train", cache)
    pets.faults.append(Fault(key="train-000001.tar", status=500, times=99))
    with pytest.raises(
        RunError, match=r"cannot read hf://\S+train-000001.tar: 8 tries failed.*500"
    ):
        contents(train)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hf://datasets/me/cats/shards", r"hf://datasets/me/cats.*no such repository, or it is p"),
        (f"hf://{NAME}@dev/shards", "there is no such revision in this repository"),
        (f"hf://{NAME}/other", r"no shards of train match hf://datasets/me/pets/other"),
        ("hf://datasets/me", r"hf://datasets/me\S*: .*"),
        ("hf://buckets/me/pets/x", r"name the shards of hf://datasets/OWNER/NAME"),
    ],
)
@pytest.mark.usefixtures("pets")
def test_what_is_not_there_is_told_in_one_line(data, message, cache):
    with pytest.raises(UsageError, match=message) as error:
        open_split(data, "train", cache)
    assert "\n" not in str(error.value)


def test_who_may_not_read_is_told_to_log_in_without_the_token(pets, cache, capsys, monkeypatch):
    for name, token in (("HF_TOKEN", "hf_wrong"), ("HF_TOKEN", "")):
        monkeypatch.setenv(name, token)
        assert main(["verify", URL, "--cache", str(cache.folder)]) == 2
        said = capsys.readouterr().err
        assert f"{URL}/train-*.tar: there is no such repository, or it is private" in said
        assert "hf auth login" in said
        assert "hf_wrong" not in said
    pets.repositories[NAME].is_private, pets.repositories[NAME].is_gated = False, True
    with pytest.raises(UsageError, match="access has to be requested"):
        open_split(URL, "train", cache)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["verify", URL, "--cache", str(cache.folder)]) == 0
    captured = capsys.readouterr()
    written = [path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()]
    for text in (captured.out.encode(), captured.err.encode(), *written):
        assert TOKEN.encode() not in text


def test_without_the_hub_there_is_one_line(pets, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(pets.requests)
    with pytest.raises(RunError, match=r"hf://\S+: HF_HUB_OFFLINE is set"):
        open_split(URL, "train", cache)
    assert len(pets.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pets.is_down = True
    with pytest.raises(RunError, match=r"cannot read hf://\S+: 8 tries failed.*503"):
        open_split(URL, "train", cache)
