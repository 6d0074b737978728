"""What every kind of source promises: the folder's samples, order, crops, pixels, errors and conversions."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import dali, reference
from pipelines.__main__ import main
from pipelines.batch import LoaderSpec
from pipelines.sources.options import NO_OPTIONS, SplitOptions
from pipelines.sources.shards import TarShards
from pipelines.sources.splits import open_splits
from pipelines.utils.errors import DataError, RunError, UsageError
from tests.conftest import needs_ffcv, write_folder
from tests.pipelines.sources.conftest import many_shards, source_of, upload

KINDS = ["csv", "shards", "s3"]  # what differs behind the table's format


def spec_of(data: Path) -> LoaderSpec:
    return LoaderSpec(data, (48, 32), batch_size=4, device=torch.device("cpu"))


def loaders_of(data: Path, splits: SplitOptions = NO_OPTIONS, **options):
    return dali.make_loaders(
        dali.DaliOptions(workers=2, **options), replace(spec_of(data), splits=splits)
    )


def equal(one, other) -> bool:
    return torch.equal(one.labels, other.labels) and all(map(torch.equal, one.images, other.images))


@pytest.fixture(params=KINDS)
def own(request, tmp_path, as_kind) -> tuple[Path, Path | str]:
    """A folder of five images of a class, of which train/ant/002 is broken, and what lists them."""
    for split, seed in (("train", 1), ("val", 2)):
        write_folder(tmp_path / "own" / split, {"ant": 5, "bee": 5}, seed)
    (tmp_path / "own" / "train" / "ant" / "002.JPEG").write_bytes(b"no image")
    return tmp_path / "own", as_kind(request.param, tmp_path / "own")


def test_splits_have_the_folders_images_labels_and_classes(data, photos):
    for found, expected in zip(open_splits(data), open_splits(photos), strict=True):
        assert found.classes == expected.classes
        assert found.labels.tolist() == expected.labels.tolist()
        assert [found.read(i) for i in range(len(found))] == [
            expected.read(i) for i in range(len(expected))
        ]
        assert len(set(found.names)) == len(found)


def test_dali_and_the_reference_give_the_folders_batches_bit_for_bit(data, photos):
    for make, options in (
        (dali.make_loaders, dali.DaliOptions(workers=2)),
        (reference.make_loaders, reference.ReferenceOptions()),
    ):
        ours, folders = make(options, spec_of(data)), make(options, spec_of(photos))
        for one, other in zip(ours[:2], folders[:2], strict=True):
            one.set_epoch(3)
            other.set_epoch(3)
            assert all(equal(a, b) for a, b in zip(one, other, strict=True))
        ours.close()
        folders.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_goes_on_where_it_was_left(photos, kind, as_kind):
    data = as_kind(kind, photos)
    whole = list(loaders_of(data).train)
    first = loaders_of(data).train
    next(iter(first))
    again = loaders_of(data).train
    again.load_state_dict(first.state_dict())
    rest = list(again)
    assert len(rest) == len(whole) - 1
    assert all(equal(a, b) for a, b in zip(rest, whole[1:], strict=True))


@pytest.mark.parametrize("kind", ["shards", "s3"])
def test_shards_of_a_folder_go_on_with_the_folders_run(photos, kind, as_kind):
    state = loaders_of(photos).train.state_dict()
    loaders_of(as_kind(kind, photos)).train.load_state_dict(state)


def test_a_broken_image_is_named_with_the_command_that_finds_all(own):
    _, data = own
    with pytest.raises(
        DataError, match=r"broken image .*ant/002\.JPEG: cannot identify.*rsnet verify"
    ):
        list(loaders_of(data).train)
    with pytest.raises(DataError, match=r"broken image .*ant/002\.JPEG: cannot identify"):
        list(reference.make_loaders(reference.ReferenceOptions(), spec_of(data)).train)


def test_verify_lists_broken_images_and_skip_bad_leaves_them_out(own, capsys):
    folder, data = own
    with pytest.raises(UsageError, match="--skip-bad: there is no report"):
        loaders_of(data, skip_bad=True)
    assert main(["verify", str(data)]) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"ant/002\.JPEG: cannot identify image", out)) == 1
    loaders = loaders_of(data, skip_bad=True)
    assert "left out 1 of 10 images of train" in capsys.readouterr().out
    assert sum(len(batch.labels) for batch in loaders.val) == 10
    assert len(list(loaders.train)) == 2
    assert main(["verify", str(data), "--move-to", str(folder.parent / "bad")]) == 2
    assert "--move-to: only of a folder's images" in capsys.readouterr().err


@needs_ffcv
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_writes_the_folders_bytes(photos, tmp_path, kind, as_kind):
    for name, data in (("one", photos), ("other", as_kind(kind, photos))):
        assert main(["convert", "--data", str(data), "--output", str(tmp_path / name)]) == 0
    for split in ("train", "val"):
        one, other = (
            hashlib.sha256((tmp_path / name / f"{split}.beton").read_bytes()).hexdigest()
            for name in ("one", "other")
        )
        assert one == other


@pytest.mark.parametrize("kind", ["folder", "csv", "shards"])
def test_a_share_of_the_training_images_validates_by_their_names_alone(tmp_path, kind):
    write_folder(tmp_path / "all" / "train", {"ant": 30, "bee": 30})
    if kind == "shards":
        write_folder(tmp_path / "all" / "val", {"ant": 1, "bee": 1})
        data = Path(f"{source_of(kind, tmp_path / 'all')}/train-*.tar")
    else:
        data = source_of(kind, tmp_path / "all")
    if kind == "csv":
        data.write_text(data.read_text().replace("split", "other"))
    options = SplitOptions(val_fraction=0.25)
    train, val = open_splits(data, options)
    assert train is not None
    assert not set(train.names) & set(val.names)
    assert len(train) + len(val) == 60
    assert 7 <= len(val) <= 23
    assert (train.split, val.split) == ("train", "val")
    only_val = open_splits(data, options, with_train=False)
    assert only_val[0] is None
    assert only_val[1].names == val.names
    if kind == "folder":  # a class more moves no image
        write_folder(tmp_path / "all" / "train", {"cat": 30})
        assert set(val.names) <= set(open_splits(data, options)[1].names)


def test_validation_images_of_their_own_have_the_training_datas_classes(photos, tmp_path):
    shutil.copytree(photos / "val" / "cat", tmp_path / "mine" / "cat")
    train, val = open_splits(source_of("shards", photos), SplitOptions(tmp_path / "mine"))
    assert train is not None
    assert val.classes == train.classes == ["ant", "bee", "cat"]
    assert val.labels.tolist() == [2] * 5
    (tmp_path / "mine" / "cat").rename(tmp_path / "mine" / "dog")
    with pytest.raises(UsageError, match="differ: only in val: dog"):
        open_splits(photos, SplitOptions(tmp_path / "mine"))


def test_a_split_that_is_there_is_not_made_anew(data):
    with pytest.raises(
        UsageError, match="has validation images of its own: leave out --val-fraction"
    ):
        open_splits(data, SplitOptions(val_fraction=0.5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.tfrecord", "is no folder, no table"),
        ("nothing", "--data: there is no folder"),
        ("nothing-*.tar", "no shards of train match"),
    ],
)
def test_what_is_no_source_is_refused_in_a_line(tmp_path, name, message):
    if name.startswith("data"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=message):
        open_splits(tmp_path / name, SplitOptions(val_fraction=0.5))
    with pytest.raises(UsageError, match=message):
        open_splits(tmp_path / name)


def test_a_shard_that_shrinks_under_a_run_is_named(photos, tmp_path):
    data = tmp_path / "shards"
    shutil.copytree(source_of("shards", photos), data)
    loaders = loaders_of(data)
    for path in data.glob("train-*.tar"):
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        RunError, match=r"train-\d+\.tar changed after the command began to read it"
    ):
        list(loaders.train)


def test_loaders_tell_a_source_which_samples_they_read_next_in_their_order(photos, monkeypatch):
    expected, read, original = [], [], TarShards.read
    monkeypatch.setattr(TarShards, "expect", lambda _, rows, _all: expected.append(rows.tolist()))
    monkeypatch.setattr(TarShards, "read", lambda self, i: read.append(i) or original(self, i))
    spec = spec_of(source_of("shards", photos))
    for make, options in (
        (dali.make_loaders, dali.DaliOptions(workers=1)),
        (reference.make_loaders, reference.ReferenceOptions()),
    ):
        loader = make(options, spec).train
        loader.load_state_dict(loader.state_dict() | {"epoch": 2, "position": 8})
        list(loader)
        assert [read] == expected
        assert len(read) == (5 - 2) * 4
        read.clear()
        expected.clear()


def in_windows(data, window=2, cache=None, **more):
    """The training loader of an order by shards; the photos' are three."""
    options = dali.DaliOptions(workers=1, order="shards", order_window=window, cache=cache)
    return dali.make_loaders(options, replace(spec_of(data), **more)).train


@pytest.mark.parametrize("kind", ["shards", "s3"])
def test_an_order_by_shards_has_the_folders_images_and_goes_on_where_it_was_left(
    photos, kind, as_kind
):
    data = as_kind(kind, photos)
    one, again = in_windows(data), in_windows(data)
    other = reference.make_loaders(reference.ReferenceOptions(window=2), spec_of(data)).train
    folders = loaders_of(photos).train
    for loader in (one, other, folders):
        loader.set_epoch(3)
    assert one.state_dict() == other.state_dict() | {"pipeline": "DALI"}
    whole = list(one)
    assert [b.labels.tolist() for b in whole] == [b.labels.tolist() for b in other]
    images, expected = (
        {x.numpy().tobytes() for batch in batches for x in batch.images[0]}
        for batches in (whole, folders)
    )
    assert len(images) == 20
    assert len(images & expected) >= 17  # each leaves out three of 23
    again.load_state_dict(one.state_dict() | {"position": 8})
    assert all(equal(a, b) for a, b in zip(again, whole[2:], strict=True))
    for loader in (in_windows(data, window=1), loaders_of(photos).train):
        with pytest.raises(UsageError, match="--resume: the checkpoint's data has order shards, 2"):
            loader.load_state_dict(one.state_dict())
    for loader in (one, again):
        loader.close()


def test_a_node_fetches_its_shards_alone_whatever_its_processes(photos, as_kind, s3, tmp_path):
    data = as_kind("s3", photos)

    def fetched(name: str, batch_size: int, nodes: tuple[int, ...], node: int) -> list[str]:
        loaders = [
            in_windows(
                data, 1, tmp_path / name, batch_size=batch_size, rank=rank,
                world_size=len(nodes), node_of_rank=nodes,
            )
            for rank in range(len(nodes))
            if nodes[rank] == node
        ]  # fmt: skip
        s3.requests.clear()
        for _ in zip(*loaders, strict=True):
            pass
        for loader in loaders:
            loader.close()
        return sorted(path for method, path in s3.requests if method == "GET" and ".tar" in path)

    alone = [fetched(f"alone{node}", 4, (0, 1), node) for node in (0, 1)]
    pairs = [fetched(f"pair{node}", 2, (0, 0, 1, 1), node) for node in (0, 1)]
    assert alone == pairs
    assert [len(found) for found in alone] == [1, 2]  # of what each takes, none is on the border
    assert len({*alone[0], *alone[1]}) == 3


@pytest.fixture
def many(tmp_path, s3) -> tuple[str, Path]:
    """Shards in a bucket and in a folder."""
    folder = many_shards(tmp_path)
    return upload(s3, folder), folder


@pytest.mark.slow
@pytest.mark.parametrize("fit", [2, 3])
def test_processes_of_a_node_fetch_as_one_does_where_the_cache_has_less_than_the_data(
    many, s3, tmp_path, fit
):
    """They take their steps together, as in a training, and evaluate a part each."""
    url, folder = many
    size = max(path.stat().st_size for path in folder.glob("train-*.tar"))

    def run(data, count: int, cache: Path) -> tuple[list[bytes], list[str]]:
        images: dict[tuple[int, int], bytes] = {}
        together = threading.Barrier(count)

        def work(rank: int) -> None:
            options = dali.DaliOptions(
                workers=1, order="shards", order_window=2, cache=cache, cache_size=str(fit * size)
            )
            spec = replace(
                spec_of(data), batch_size=6 // count, rank=rank, world_size=count,
                node_of_rank=(0,) * count,
            )  # fmt: skip
            loaders = dali.make_loaders(options, spec)
            for step, batch in enumerate(loaders.train):
                together.wait(60)
                images[step, rank] = batch.images[0].numpy().tobytes()
            list(loaders.val)
            together.wait(60)
            for loader in (loaders.train, loaders.val):
                loader.close()

        s3.requests.clear()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))
        gets = [path for method, path in s3.requests if method == "GET" and ".tar" in path]
        steps = sorted({step for step, _ in images})
        return [b"".join(images[s, r] for r in range(count)) for s in steps], sorted(gets)

    expected, _ = run(folder, 1, tmp_path / "none")
    for count in (1, 2, 3):
        found, gets = run(url, count, tmp_path / str(count))
        assert found == expected
        assert len(gets) == len(set(gets)) == len([*folder.glob("*.tar")])


def test_only_shards_are_ordered_by_shards(photos):
    with pytest.raises(UsageError, match=r"--order shards: .*train is no tar shards"):
        in_windows(photos)
