"""Tar shards: what webdataset writes is read and the other way round; indices; faults in one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from PIL import Image
from webdataset import tariterators

from pipelines import dali
from pipelines.__main__ import main
from pipelines.batch import LoaderSpec
from pipelines.sources import shards, tar_index
from pipelines.sources import write_shards as writing
from pipelines.sources.folder import scan_folder
from pipelines.sources.options import SplitOptions
from pipelines.sources.shards_options import ShardsOptions, write_shards
from pipelines.sources.splits import announce, kind_of, open_splits
from pipelines.utils import output_folder
from pipelines.utils.errors import DataError, RunError, UsageError
from tests.conftest import write_photo
from tests.pipelines.sources.conftest import source_of, write_table


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("photo") / "a.jpg"
    write_photo(path, 40, 50, seed=0)
    return path.read_bytes()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.parent


def test_what_webdatasets_writer_wrote_is_read(tmp_path, photo):
    """Its keys begin anew in each shard; a label is in .cls, after a byte order mark, too, or in .json."""
    images, mark = [photo + bytes([i]) for i in range(6)], "\ufeff"
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard}.tar")) as writer:
            for i in range(3):
                label = {"cls": f"{mark[:i]}{2 - i}"} if shard else {"json": {"label": 10 + i}}
                writer.write({"__key__": f"{i:04}", "jpg": images[3 * shard + i], **label})
    train, _ = open_splits(
        tmp_path / "train-*.tar", SplitOptions(val_data=tmp_path / "train-0.tar")
    )
    assert train.classes == ["0", "1", "2", "10", "11", "12"]
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert [train.read(i) for i in range(6)] == [*images[:2:-1], *images[:3]]
    assert train.names[0] == "train-1.tar/0002.jpg"


def test_webdataset_reads_what_is_written(photos):
    folder = scan_folder(photos / "train")
    expected = {
        name.rpartition(".")[0]: (label, folder.read(i))
        for i, (name, label) in enumerate(zip(folder.names, folder.labels.tolist(), strict=True))
    }
    paths = sorted(map(str, source_of("shards", photos).glob("train-*.tar")))
    assert len(paths) > 1
    found = {}
    for path in paths:
        with Path(path).open("rb") as stream:
            files = tariterators.tar_file_expander([{"url": path, "stream": stream}])
            for sample in tariterators.group_by_keys(files):
                found[sample["__key__"]] = (int(sample["cls"]), sample["jpeg"])
    assert found == expected
    assert json.loads((source_of("shards", photos) / "classes.json").read_text()) == folder.classes


def test_shards_are_mixed_and_always_the_same(photos, tmp_path):
    assert (
        main(["shards", "-d", str(photos), "-o", str(tmp_path / "s"), "--shard-size", "0.1MB"]) == 0
    )
    first = sorted((tmp_path / "s").glob("train-*.tar"))[0]
    assert len({sample.label for sample in tar_index.samples_of(str(first), 0)}) == 3
    for path in (tmp_path / "s").glob("*.tar"):
        assert path.read_bytes() == (source_of("shards", photos) / path.name).read_bytes()
        assert path.stat().st_size <= 10**5 + 10240  # tar's last block


def test_an_interrupted_command_goes_on_with_the_shard_that_is_missing(
    photos, tmp_path, monkeypatch
):
    options = ShardsOptions(photos, tmp_path / "s", shard_size="100KB")
    write, done = writing._write_shard, []

    def breaking(path, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        write(path, *rest)

    monkeypatch.setattr(writing, "_write_shard", breaking)
    with pytest.raises(KeyboardInterrupt):
        write_shards(options)
    before = {path: path.stat().st_mtime_ns for path in done}
    monkeypatch.setattr(writing, "_write_shard", write)
    assert write_shards(options) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == before
    whole = source_of("shards", photos)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in (tmp_path / "s").iterdir()} == names
    assert all(
        (tmp_path / "s" / n).read_bytes() == (whole / n).read_bytes() for n in names if n[0] != "."
    )


def test_shards_of_other_images_or_size_are_not_mixed(photos, tmp_path, capsys):
    shutil.copytree(source_of("shards", photos), tmp_path / "s")
    command = ["shards", "-d", str(photos), "-o", str(tmp_path / "s"), "--shard-size"]
    assert main([*command, "200KB"]) == 2
    assert "has shards of other images or another size" in capsys.readouterr().err
    (tmp_path / "s" / "shards.json").unlink()
    assert main([*command, "100KB"]) == 2
    assert "has shards already; name an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1", "1XB", "", "nan", "-1GB", "2000TB"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(UsageError, match=r"--shard-size .*: such as 500MB"):
        ShardsOptions(tmp_path, tmp_path, shard_size=size)


def test_names_with_dots_or_twice_become_keys_of_their_own():
    names = ["a/1.2.jpg", "a/1.jpg", "a/1.png", "../b/c.JPEG", "/d.jpg", "e"]
    assert writing._keys(names) == ["a/1_2", "a/1", "a/1_3", "b/c", "d", "e"]


def test_the_index_is_made_once_and_anew_when_a_shard_changes(photos, tmp_path, monkeypatch):
    data = tmp_path / "s"
    shutil.copytree(source_of("shards", photos), data)
    for path in data.glob(".*.parquet"):
        path.unlink()
    names = open_splits(data)[0].names
    scans = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda *given: scans.append(given) or scan(*given))
    assert open_splits(data)[0].names == names
    assert not scans
    os.utime(data / "train-000000.tar")
    assert open_splits(data)[0].names == names
    assert len(scans) == 1
    (index,) = (p for p in data.glob(".*.parquet") if p.stat().st_mtime_ns == max(
        q.stat().st_mtime_ns for q in data.glob(".*.parquet")))  # fmt: skip
    index.write_bytes(b"damaged")
    assert open_splits(data)[0].names == names
    assert len(scans) == 2


def test_where_nothing_can_be_written_the_index_is_made_each_time(
    tmp_path, photo, monkeypatch, capsys
):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"0")])

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shards, "atomic_write", refuse)
    assert len(shards.open_shards(data, "train")) == 1
    assert "note: the index is made anew each time: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.jpg", b"x")], "a.jpg has no label; expected a.cls, or a.json with a label"),
        ([("a.jpg", b"x"), ("a.json", b'{"class": 1}')], "a.jpg has no label"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "a.jpg has no label"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "a has two images, a.jpg and a.png"),
        ([("a.txt", b"x"), ("b.txt", b"x")], r"has no images \(it has txt 2\)"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": ""}')], "a.jpg has no label"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], "a.cls is there twice"),
    ],
)
def test_samples_that_lack_something_are_named(tmp_path, files, message):
    data = write_tar(tmp_path / "s" / "train-0.tar", files)
    with pytest.raises(UsageError, match=message):
        shards.open_shards(data, "train")


def test_what_is_in_no_sample_is_said_with_the_first_of_it_each_time_shards_are_opened(
    tmp_path, photo, capsys
):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"0")])
    orphans = [("b.heic", b"x"), ("b.cls", b"1"), ("c.json", b'{"label": 1}'), ("c.CLS", b"1")]
    write_tar(data / "train-1.tar", [("a.jpg", photo), ("a.cls", b"1"), *orphans])
    seen = [("a.seg.png", b"x"), ("d.v2.jpg", photo), ("d.v3.JPG", photo), ("x/._a.jpg", b"x")]
    write_tar(data / "train-2.tar", [("a.jpg", photo), ("a.cls", b"0"), *seen])
    found = (
        "labels without an image: 2 (the first is b.cls in train-1.tar, beside b.heic); images of no key, as "
        "their names have further dots: 2 (the first is d.v2.jpg in train-2.tar)"
    )
    for _ in range(2):  # the second time by the index
        announce(shards.open_shards(data, "train"))
        assert capsys.readouterr().out == (
            f"{data} (train): 3 images of 2 classes in 3 shards; {found}\n"
        )


@pytest.mark.parametrize("names", [("a.json", "a.cls"), ("a.cls", "a.json")])
def test_the_label_in_cls_is_taken_whatever_json_says_and_stands_first(tmp_path, photo, names):
    contents = {"a.cls": b"3", "a.json": b'{"label": 5}'}
    files = [("a.jpg", photo), *((name, contents[name]) for name in names)]
    source = shards.open_shards(write_tar(tmp_path / "s" / "train-0.tar", files), "train")
    assert source.classes == ["3"]
    assert source.counted.endswith(
        "labels in .json that are other than those in .cls, which are taken: 1 (the first is a in "
        "train-0.tar)"
    )
    contents["a.json"] = b'{"label": "a name"}'
    files = [("a.jpg", photo), *contents.items()]
    source = shards.open_shards(write_tar(tmp_path / "t" / "train-0.tar", files), "train")
    assert source.counted == "1 images of 1 class in 1 shards"


def test_a_damaged_shard_is_named(tmp_path, photo):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"0")])
    shard = data / "train-0.tar"
    whole = shard.read_bytes()
    for content, message in (
        (b"no tar" * 500, "is no tar file, or damaged"),
        (whole[: 512 + len(photo) // 2], "is cut off within a.jpg"),
        (whole[: 512 + -(-len(photo) // 512) * 512] + b"x" * 4096, "is damaged at byte"),
    ):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=rf"train-0\.tar.*({message})"):
            shards.open_shards(data, "train")


def test_classes_without_a_name_are_refused(tmp_path, photo):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"3")])
    for content, message in (
        ('["x", "y"]', r"classes.json has 2 names, but labels are 3"),
        ('{"x": 3}', r"classes.json is damaged .*must be a list of names.*remove it"),
    ):
        (data / "classes.json").write_text(content)
        with pytest.raises(DataError, match=message):
            shards.open_shards(data, "train")


def test_the_pattern_of_the_hubs_imagenet_is_understood(tmp_path, photo):
    for name in ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"):
        write_tar(tmp_path / "s" / name, [("a.jpg", photo), ("a.cls", b"0")])
    train, val = open_splits(tmp_path / "s" / "imagenet1k-{train,validation}-*.tar")
    assert (len(train), len(val)) == (1, 1)


def test_a_training_makes_no_list_of_all_names(photos, monkeypatch):
    """They would be most of the memory that an index of many samples takes in each process."""
    spec = LoaderSpec(source_of("shards", photos), (32,), 4, torch.device("cpu"))
    expected = dali.make_loaders(dali.DaliOptions(), replace(spec, data=photos)).train.state_dict()
    monkeypatch.setattr(shards, "NAMES", 10)  # of 23
    monkeypatch.setattr(shards.TarShards, "names", property(lambda _: pytest.fail("all names")))
    for order in ("random", "shards"):
        found = dali.make_loaders(dali.DaliOptions(order=order), spec).train.state_dict()
        assert found["data"] == expected["data"]


def test_an_index_is_opened_in_little_more_memory_than_it_has():
    """All columns at once would take twice as much while they are decoded."""
    count = 50_000
    numbers = np.random.default_rng(0).integers(0, 2**40, (4, count))
    columns = dict(zip(("shard", "offset", "length", "label"), numbers, strict=True))
    table = pa.table({"name": [f"n{i % 1000:08}_{i}.JPEG" for i in range(count)], **columns})
    data = tar_index.encoded(tar_index.Index(table, ["0"], "", []))
    pool = pa.system_memory_pool()
    before = pool.bytes_allocated()
    found = tar_index.decoded(data)
    assert found is not None
    assert found.table.equals(table)
    assert pool.max_memory() - before < 1.4 * table.nbytes


def test_shards_of_one_name_in_two_folders_have_their_folders_in_the_images_names(tmp_path, photo):
    """webdataset counts keys anew in each shard, so that not even the shard's name tells them apart."""
    for folder in ("p0", "p1"):
        write_tar(tmp_path / folder / "train-0.tar", [("0.jpg", photo), ("0.cls", b"0")])
    for _ in range(2):  # the second time by the index
        train = shards.open_shards(tmp_path / "p*" / "train-0.tar", "train")
        assert train.names == ["p0/train-0.tar/0.jpg", "p1/train-0.tar/0.jpg"]
        assert len(train.stamps()) == 2


def test_a_shard_that_a_pattern_names_twice_is_read_once(tmp_path, photo):
    write_tar(tmp_path / "s" / "train-01.tar", [("0.jpg", photo), ("0.cls", b"0")])
    assert len(shards.open_shards(tmp_path / "s" / "train-*{0..1}*.tar", "train")) == 1


def test_a_name_that_is_no_text_is_escaped(tmp_path, photo):
    name = os.fsdecode(b"caf\xe9")
    data = write_tar(
        tmp_path / "s" / "train-0.tar", [(f"{name}.jpg", photo), (f"{name}.cls", b"0")]
    )
    for _ in range(2):
        assert shards.open_shards(data, "train").names == ["caf\\udce9.jpg"]


@pytest.mark.parametrize("name", ["out[1]", "a{b", "a*"])
def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(photos, tmp_path, name):
    output = tmp_path / name
    assert main(["shards", "-d", str(photos), "-o", str(output), "--shard-size", "100KB"]) == 0
    assert len(open_splits(output)[0]) == len(open_splits(photos)[0])
    assert kind_of(shutil.copytree(photos, tmp_path / f"{name}-images")) == "folder"


@pytest.mark.parametrize("own", ["classes.json", "shards.json"])
def test_files_of_the_users_in_the_folder_are_left_alone(photos, tmp_path, capsys, own):
    (tmp_path / own).write_text('["mine"]')
    assert main(["shards", "-d", str(photos), "-o", str(tmp_path)]) == 2
    assert "name an empty folder" in capsys.readouterr().err
    assert (tmp_path / own).read_text() == '["mine"]'
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("changed", ["size", "label", "class"])
def test_shards_are_not_gone_on_with_from_images_that_changed(photo, tmp_path, capsys, changed):
    """By the sizes it is decided what is in which shard: an image would be there twice, or not at all."""
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.jpg").write_bytes(photo)

    def write(label: str = "ant", other: str = "bee") -> int:
        rows = [
            {"path": f"{name}.jpg", "label": label if name == "a" else other, "split": split}
            for split, names in (("train", "abc"), ("val", "d"))
            for name in names
        ]
        table = write_table(tmp_path / "labels.csv", rows)
        return main(["shards", "-d", str(table), "-o", str(tmp_path / "s"), "--shard-size", "10KB"])

    assert write() == 0
    (tmp_path / "s" / "train-000001.tar").unlink()
    assert write() == 0
    if changed == "size":
        (tmp_path / "a.jpg").write_bytes(photo + bytes(3000))
    names = {"size": (), "label": ("bee",), "class": ("ant", "bear")}[changed]
    (tmp_path / "s" / "train-000001.tar").unlink()
    assert write(*names) == 2
    assert "has shards of other images or another size" in capsys.readouterr().err


def test_what_an_interrupted_command_left_before_its_first_shard_is_no_obstacle(
    photos, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_shards(ShardsOptions(photos, tmp_path / "s", shard_size="1GB"))
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["classes.json", "shards.json"]
    assert write_shards(ShardsOptions(photos, tmp_path / "s", shard_size="100KB")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole + whole, "goes on behind its end at byte"),
        (lambda whole: whole[:-1024] + bytes(4096) + whole, "goes on behind its end at byte"),
        (lambda whole: whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512), "is cut off"),
    ],
)
def test_a_tar_that_ends_before_its_file_does_or_not_at_all_is_named(
    tmp_path, photo, change, message
):
    """tarfile says nothing of what stands behind the first block of zeros."""
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"0")])
    shard = data / "train-0.tar"
    assert len(shards.open_shards(data, "train")) == 1
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(DataError, match=rf"train-0\.tar {message}"):
        shards.open_shards(data, "train")


def test_a_hard_link_in_a_shard_is_the_image_or_label_that_it_leads_to(tmp_path, photo):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"ant")])
    with tarfile.open(data / "train-0.tar", "a") as tar:
        for name, target in (("b.jpg", "a.jpg"), ("b.cls", "a.cls")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
    found = shards.open_shards(data, "train")
    assert found.names == ["a.jpg", "b.jpg"]
    assert [found.read(i) for i in range(2)] == [photo, photo]


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        (tarfile.SYMTYPE, "a.jpg", "b.jpg is a link to a.jpg: write the shard with tar -h"),
        (tarfile.LNKTYPE, "gone.jpg", "b.jpg is a link to gone.jpg: write the shard with tar -h"),
        (tarfile.GNUTYPE_SPARSE, "", "b.jpg is stored sparse: write it without tar -S"),
    ],
)
def test_a_link_that_leads_nowhere_here_or_a_file_with_holes_is_named(
    tmp_path, photo, kind, target, message
):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"ant")])
    with tarfile.open(data / "train-0.tar", "a") as tar:
        member = tarfile.TarInfo("b.jpg")
        member.type, member.linkname = kind, target
        tar.addfile(member)
    with pytest.raises(DataError, match=message):
        shards.open_shards(data, "train")


def test_a_shard_that_is_written_anew_under_a_training_ends_it(tmp_path, photo):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"ant")])
    found = shards.open_shards(data, "train")
    assert found.read(0) == photo
    write_tar(data / "train-0.tar", [("b.jpg", photo[::-1]), ("b.cls", b"ant")])
    os.utime(data / "train-0.tar", ns=(0, 0))
    with pytest.raises(RunError, match=r"train-0\.tar changed after the command began to read it"):
        found.read(0)


def test_images_without_a_suffix_become_shards_that_are_read_back(tmp_path, capsys):
    """A phone's JPEG of several pictures is MPO by its content; the shards' reader goes by suffixes."""
    photos = [Image.new("RGB", (40, 30), (90 * i, 0, 0)) for i in range(3)]
    photos[0].save(tmp_path / "a", "MPO", save_all=True, append_images=photos[1:])
    photos[1].save(tmp_path / "b", "PNG")
    (tmp_path / "t.csv").write_text("path,label,split\na,x,train\nb,y,train\na,x,val\nb,y,val\n")
    words = ["shards", "--data", str(tmp_path / "t.csv"), "--output", str(tmp_path / "s")]
    assert main(words) == 0
    found = shards.open_shards(tmp_path / "s", "train")
    assert found.names == ["a.jpg", "b.png"]
    photos[2].save(tmp_path / "a", "GIF")
    assert main([*words[:-1], str(tmp_path / "other")]) == 1
    assert "shards have no GIF images: save it as PNG" in capsys.readouterr().err


def test_what_a_killed_command_left_unfinished_does_not_take_the_next_ones_space(
    photos, tmp_path, monkeypatch
):
    words, output = (
        ["shards", "--data", str(photos), "--output", str(tmp_path / "s")],
        tmp_path / "s",
    )
    assert main(words) == 0
    for path in output.glob("val-*.tar"):
        path.unlink()
    (output / "val-000000.tar.partial").write_bytes(bytes(1000))
    (output / "imagenet.tar.partial").write_bytes(bytes(1000))  # somebody's download
    seen = []

    def free(folder):
        seen.append(sorted(path.name for path in folder.glob("*.partial")))
        return 10**9

    monkeypatch.setattr(output_folder, "free_space", free)
    assert main(words) == 0
    assert seen == [["imagenet.tar.partial"]]


def test_a_folder_that_is_refused_keeps_what_it_has(photos, tmp_path):
    (tmp_path / "s").mkdir()
    for name in ("train-000000.tar.partial", "other.tar"):
        (tmp_path / "s" / name).write_bytes(b"x")
    assert main(["shards", "--data", str(photos), "--output", str(tmp_path / "s")]) == 2
    assert (tmp_path / "s" / "train-000000.tar.partial").exists()


def test_links_of_other_files_and_other_names_of_one_path_are_no_fault(tmp_path, photo):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"ant")])
    links = (
        (tarfile.SYMTYPE, "latest", "a.jpg"), (tarfile.LNKTYPE, "latest2", "latest"),
        (tarfile.SYMTYPE, ".jpg", "a.jpg"), (tarfile.LNKTYPE, "x/b.jpg", "./a.jpg"),
        (tarfile.LNKTYPE, "x/b.cls", "/a.cls"),
    )  # fmt: skip
    with tarfile.open(data / "train-0.tar", "a") as tar:
        for kind, name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    found = shards.open_shards(data, "train")
    assert found.names == ["a.jpg", "x/b.jpg"]
    assert [found.read(i) for i in range(2)] == [photo, photo]


@pytest.mark.parametrize(("with_sha256", "is_kept"), [(False, False), (True, True)])
def test_an_index_of_before_is_made_anew_but_of_shards_that_were_written_here(
    tmp_path, photo, monkeypatch, with_sha256, is_kept
):
    data = write_tar(tmp_path / "s" / "train-0.tar", [("a.jpg", photo), ("a.cls", b"ant")])
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "VERSION", b"1")
        shards.open_shards(data, "train", with_sha256=with_sha256)
    (path,) = data.glob("*.parquet") if list(data.glob("*.parquet")) else data.glob(".*")
    before = path.read_bytes()
    shards.open_shards(data, "train")
    assert (path.read_bytes() == before) is is_kept


def test_threads_read_a_few_images_ahead_whatever_a_batch_has(tmp_path, monkeypatch):
    files = [(f"{i:04}.{kind}", b"x") for i in range(600) for kind in ("jpg", "cls")]
    data = write_tar(tmp_path / "s" / "train-0.tar", files)
    spec = LoaderSpec(
        data, (32,), 100, torch.device("cpu"), splits=SplitOptions(val_data=data / "train-0.tar")
    )
    train = dali.make_loaders(dali.DaliOptions(workers=2), spec).train
    read, original = [], shards.TarShards.read
    monkeypatch.setattr(
        shards.TarShards, "read", lambda self, i: read.append(i) or original(self, i)
    )
    batches = train._feed._read(train.schedule.batches(0, 0))
    indices, found = next(batches)
    assert len(indices) == len(found) == 100
    assert len(read) <= 100 + (2 * 7 + 2) * 16  # two batches, and what is under way
    batches.close()
    train.close()


def test_a_shard_that_does_not_read_back_as_it_was_written_is_none(
    photos, tmp_path, monkeypatch, capsys
):
    add = writing._add

    def damaged(tar, name, data):
        add(tar, name, data if name.endswith(".cls") else data[:-1] + b"\0")

    monkeypatch.setattr(writing, "_add", damaged)
    assert main(["shards", "-d", str(photos), "-o", str(tmp_path / "s")]) == 1
    assert "does not read back as it was written" in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("*.tar"))
