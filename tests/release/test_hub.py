"""Releases on the Hugging Face hub: pushed to a local endpoint, loaded from it and from the cache."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import rsnet
from pipelines.utils.errors import DataError, RunError, UsageError
from rsnet.__main__ import main
from rsnet.release import hub as release_hub
from rsnet.release import package
from rsnet.training.fine_tune import read_switchable
from tests.conftest import write_photo
from tests.helpers.hub_server import TOKEN, HubServer

NAME = "me/rs-net"
ADDRESS = f"hf://{NAME}"


@pytest.fixture
def pushed(hub, written) -> HubServer:
    """An endpoint that has the release."""
    package.push(written, NAME)
    return hub


def _files(server: HubServer, name: str = NAME) -> dict[str, bytes]:
    repository = server.repositories[name]
    return repository.commits[repository.resolve("main")]


def test_a_release_is_pushed_in_one_commit_and_loaded_bit_for_bit(hub, folder, capsys):
    (folder / "latency-cpu.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    assert main(["release", str(folder), "--push", NAME]) == 0
    (out,) = capsys.readouterr().out.splitlines()
    files = _files(hub)
    assert files.keys() == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b'rsnet.load("hf://me/rs-net")' in files["README.md"]
    assert len(hub.repositories[NAME].commits) == 2
    commit = hub.repositories[NAME].resolve("main")
    assert out == f"{ADDRESS}@{commit}: pushed; `rsnet predict {ADDRESS} IMAGE` takes it"
    expected = rsnet.load(folder)
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(rsnet.load(ADDRESS)(images), expected(images))
    for address in (f"{ADDRESS}@{commit}", Path(ADDRESS)):
        assert package.local_folder(address) == package.local_folder(ADDRESS)


def test_the_pushed_card_is_what_the_hub_reads_accuracies_from(pushed):
    card = huggingface_hub.ModelCard(_files(pushed)["README.md"].decode())
    assert card.data.license == "mit"
    found = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert found["top-1 % at 64 pixels"] == 20.0
    assert len(found) == 8
    assert {r.dataset_type for r in card.data.eval_results} == {"imagefolder"}
    assert "POST /api/validate-yaml" in pushed.requests


def test_a_verb_takes_an_address(pushed, tmp_path, capsys):  # noqa: ARG001
    write_photo(tmp_path / "a.jpg", 40, 50, seed=1)
    words = [ADDRESS, str(tmp_path / "a.jpg"), "--json", "--size", "32", "--device", "cpu"]
    assert main(["predict", *words]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 32
    found = read_switchable(ADDRESS, None, None)
    assert found.network.sizes == (64, 48, 32)


def test_what_is_in_the_cache_is_taken_without_the_hub(pushed, monkeypatch):
    expected = rsnet.load(ADDRESS)
    asked = len(pushed.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = rsnet.load(ADDRESS)
    assert len(pushed.requests) == asked
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(found(images), expected(images))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pushed.is_down = True
    rsnet.load(ADDRESS)
    with pytest.raises(
        RunError, match=r"hf://me/other: the hub answers 503 \(out for lunch\); try"
    ):
        rsnet.load("hf://me/other")


def test_a_moved_branch_is_followed_and_a_commit_is_not(pushed, folder, capsys):  # noqa: ARG001
    first = pushed.repositories[NAME].resolve("main")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nnew")
    package.push(folder, NAME)
    assert (package.local_folder(ADDRESS) / "README.md").read_text().endswith("new")
    assert (
        not (package.local_folder(f"{ADDRESS}@{first}") / "README.md").read_text().endswith("new")
    )


def _change_weights(server: HubServer) -> None:
    repository = server.repositories[NAME]
    files = dict(_files(server))
    data = files["model.safetensors"]
    repository.commit(files | {"model.safetensors": data[:-1] + bytes([data[-1] ^ 1])})


def test_changed_weights_are_refused_on_the_hub_in_the_cache_and_before_a_push(pushed, folder):
    good = pushed.repositories[NAME].resolve("main")
    _change_weights(pushed)
    with pytest.raises(
        DataError, match=r"model.safetensors: is damaged: its SHA-256 is not that in"
    ):
        rsnet.load(ADDRESS)
    cached = package.local_folder(f"{ADDRESS}@{good}") / "model.safetensors"
    cached.resolve().write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"model.safetensors: has \d+ bytes, config.json says"):
        rsnet.load(f"{ADDRESS}@{good}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    before = len(pushed.requests)
    with pytest.raises(DataError, match="is damaged"):
        package.push(folder, NAME)
    assert len(pushed.requests) == before


def test_a_link_out_of_the_cached_repository_is_refused(pushed, written):  # noqa: ARG001
    cached = package.local_folder(ADDRESS) / "model.safetensors"
    cached.unlink()
    cached.symlink_to(written / "model.safetensors")
    with pytest.raises(DataError, match="is a link that leads out of the folder"):
        package.read(package.local_folder(ADDRESS))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/none", "hf://me/none: there is no such repository, or it is private: log in by"),
        (f"{ADDRESS}@v9", f"{ADDRESS}@v9: there is no such revision in this repository"),
        ("hf://me/private", "hf://me/private: there is no such repository, or it is private"),
        ("hf://me/gated", "hf://me/gated: access has to be requested on its page; do so"),
        ("hf://me/other", "hf://me/other: there is no release in this repository"),
        ("hf://rs-net", "rs-net: an address on the hub is hf://USER/NAME or"),
        ("hf://me/rs-net/tree/main", "an address on the hub is hf://USER/NAME or"),
        ("hf://me/a..b", "hf://me/a..b: Cannot have -- or .. in repo_id: 'me/a..b'"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(pushed, monkeypatch, capsys, address, message):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 30)
    for name in ("private", "gated", "other"):
        repository = pushed.repositories.setdefault(f"me/{name}", type(pushed.repositories[NAME])())
        repository.commit({"model.bin": b"x"})
    pushed.repositories["me/private"].is_private = True
    pushed.repositories["me/gated"].is_gated = True
    assert main(["predict", address, __file__, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_without_a_network_it_is_one_line(hub, written, monkeypatch, capsys):
    hub.stop()
    assert main(["predict", ADDRESS, __file__, "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert f"{ADDRESS}: the hub cannot be reached (" in err
    assert err.count("\n") == 1
    assert main(["release", str(written), "--push", NAME]) == 1
    err = capsys.readouterr().err
    assert f"--push {NAME}: the hub cannot be reached (" in err
    assert err.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["predict", ADDRESS, __file__, "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert f"{ADDRESS}: HF_HUB_OFFLINE is set, and it is not in the cache" in err
    assert main(["release", str(written), "--push", NAME]) == 2
    assert "--push: HF_HUB_OFFLINE is set; unset it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/rs-net", "", "--push: there is no token for the hub: log in by `hf auth login`"),
        ("me/rs-net", "hf_" + "b" * 30, "--push me/rs-net: the hub does not let this token do that"),
        ("rs-net", TOKEN, "--push rs-net: give USER/NAME, a repository on the hub"),
        ("me/rs net", TOKEN, "--push me/rs net: the hub takes no such name ("),
    ],
)  # fmt: skip
def test_what_may_not_be_pushed_is_one_line(
    hub, written, monkeypatch, capsys, name, token, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["release", str(written), "--push", name]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert hub.repositories == {}


def test_a_push_that_fails_keeps_the_folder_which_is_pushed_by_the_next_command(
    hub, run, tmp_path, capsys
):
    output = tmp_path / "release"
    assert main(["release", str(run), "--output", str(output), "--push", "you/rs-net"]) == 2
    err = capsys.readouterr().err
    assert "--push you/rs-net: the hub does not let this token do that (You don't have" in err
    again = f"`rsnet release {output} --push you/rs-net` pushes it"
    assert f"{output} is written: {again}" in err
    assert err.count("\n") == 1
    assert main(["release", str(output), "--push", NAME]) == 0
    assert (output / "config.json").read_bytes() == _files(hub)["config.json"]


def test_a_run_is_pushed_without_a_folder(hub, run, capsys):
    assert main(["release", str(run), "--push", NAME]) == 0
    assert "pushed" in capsys.readouterr().out
    assert set(_files(hub)) > {"config.json", "model.safetensors", "README.md"}
    assert main(["release", str(run)]) == 2
    assert "--output: give a folder to write, or --push" in capsys.readouterr().err


def test_a_push_leaves_nothing_of_an_earlier_releases_tuning(hub, folder):
    (folder / "tuned.json").write_text("{}")
    package.push(folder, NAME)
    assert _files(hub)["tuned.json"] == b"{}"
    (folder / "tuned.json").unlink()
    package.push(folder, NAME)
    assert "tuned.json" not in _files(hub)


def test_a_release_on_the_hub_is_published_under_another_name(pushed):
    assert main(["release", ADDRESS, "--push", "me/copy"]) == 0
    weights = (_files(pushed, name)["model.safetensors"] for name in (NAME, "me/copy"))
    assert len(set(weights)) == 1


def test_a_release_is_pushed_with_other_names_by_any_of_its_files_and_with_its_tuning(
    hub, folder, tmp_path
):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\nthree\n")
    (folder / "tuned.json").write_text("{}")
    assert main(["release", str(folder / "model.safetensors"), "--push", NAME]) == 0
    assert set(_files(hub)) >= {"config.json", "model.safetensors", "README.md", "tuned.json"}
    assert main(["release", str(folder), "--push", NAME, "--class-names", str(names)]) == 0
    assert json.loads(_files(hub)["config.json"])["class_names"] == ["one", "two", "three"]
    assert _files(hub)["tuned.json"] == b"{}"


def test_a_damaged_card_is_not_pushed(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\nnew")
    with pytest.raises(UsageError, match=rf"--push {NAME}: Invalid metadata in README.md"):
        package.push(folder, NAME)
    assert set(_files(hub)) == {".gitattributes"}


def test_a_full_disk_stays_what_it_is(hub, monkeypatch):  # noqa: ARG001
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "/cache/blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left on device"):
        release_hub.download(ADDRESS, package.PUBLISHED)


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r'pip install "rsnet-trainer\[hub\]"'):
        rsnet.load(ADDRESS)


def test_a_folder_that_is_called_like_an_address_is_reached_by_another_path(written, tmp_path):
    shutil.copytree(written, tmp_path / "hf:" / "me" / "net")
    assert package.local_folder(tmp_path / "hf:" / "me" / "net") == tmp_path / "hf:" / "me" / "net"
