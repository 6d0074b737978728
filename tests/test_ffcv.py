"""The FFCV pipeline: PIL's pictures, files that are not whole, threads that fail or are left."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import sidecar
from pipelines.batch import Loaders, LoaderSpec
from pipelines.beton import ConvertOptions
from pipelines.demo import ODD_KINDS, render
from pipelines.errors import DataError, UsageError
from pipelines.ffcv import FfcvOptions, make_loaders
from tests.conftest import beton_of, needs_ffcv, write_folder, write_photo
from tests.pictures import differences

pytestmark = needs_ffcv
ROOT = Path(__file__).parents[1]
SIZES = (64, 48, 32)
# Mean absolute difference of an image in 1/255: seen 0.31 for the worst of 500 ImageNet photos.
TOLERANCE = 0.5


def _spec(data: Path, **more) -> LoaderSpec:
    defaults = {"batch_size": 3, "normalize": "unit", "device": torch.device("cpu")}
    return LoaderSpec(data, SIZES, **(defaults | more))


_OPENED: list[Loaders] = []


def _make(spec: LoaderSpec, **options) -> Loaders:
    _OPENED.append(make_loaders(FfcvOptions(workers=2, **options), spec))
    return _OPENED[-1]


@pytest.fixture(autouse=True)
def _close_all():
    yield
    while _OPENED:
        for loader in _OPENED.pop()[:2]:
            loader.close()


def _loaders(data: Path, **options) -> Loaders:
    return _make(_spec(data), **options)


def _convert(folder: Path, output: Path, **options) -> Path:
    from pipelines.beton_convert import convert

    convert(ConvertOptions(workers=2, **options), folder, output)
    return output


@pytest.fixture
def beton(photos, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(beton_of(photos), tmp_path / "beton"))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("write_mode", ["jpg", "raw"])
def test_every_size_is_pils_picture_of_the_same_rectangle(photos, tmp_path, split, write_mode):
    beton = _convert(photos, tmp_path / "beton", write_mode=write_mode)
    worst = differences(_loaders(beton), _spec(photos), split).max(dim=1).values
    assert (worst < TOLERANCE).all(), worst


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_gpu_gets_the_same_batches_as_the_cpu(photos, split, dtype):
    beton = beton_of(photos)
    spec = _spec(beton, dtype=dtype, batch_size=8)
    on_gpu = replace(spec, device=torch.device("cuda"))
    pairs = [_make(s) for s in (spec, on_gpu)]
    for a, b in zip(*(getattr(loaders, split) for loaders in pairs), strict=True):
        assert torch.equal(a.labels, b.labels.cpu())
        for x, y in zip(a.images, b.images, strict=True):
            assert y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(x, y.cpu(), rtol=1e-2, atol=1e-2)


def test_odd_files_decode_to_the_same_picture(tmp_path):
    """Grayscale, progressive, EXIF-rotated and PNG exactly; CMYK is encoded anew, once."""
    for split in ("train", "val"):
        for i, save in enumerate(ODD_KINDS):
            folder = tmp_path / "odd" / split / str(i)
            folder.mkdir(parents=True)
            save(folder / "x.JPEG", render("ring_vertical", np.random.default_rng(i)))
    beton = _convert(tmp_path / "odd", tmp_path / "beton", jpeg_quality=100)
    spec = replace(_spec(tmp_path / "odd"), batch_size=1)
    loaders = _make(replace(spec, data=beton))
    assert (differences(loaders, spec, "val") < 3 * TOLERANCE).all()


@pytest.mark.parametrize(("height", "width"), [(20, 300), (300, 20), (7, 5), (1, 1)])
def test_extreme_shapes_get_the_references_rectangle(tmp_path, height, width):
    for split in ("train", "val"):
        for i in range(8):
            write_photo(tmp_path / "a" / split / "a" / f"{i}.JPEG", height, width, seed=i)
    beton = _convert(tmp_path / "a", tmp_path / "beton")
    for split in ("train", "val"):
        assert (differences(_loaders(beton), _spec(tmp_path / "a"), split) < TOLERANCE).all()


def _damage(beton: Path, index: int) -> None:
    """Overwrite the middle of one sample of val.beton."""
    from pipelines.beton_file import open_beton

    samples = open_beton(beton / "val.beton").samples
    with (beton / "val.beton").open("r+b") as file:
        file.seek(int(samples.pointer[index]) + 100)
        file.write(bytes(int(samples.size[index]) - 100))


@pytest.mark.parametrize("index", [0, 7, 16])
def test_a_sample_that_does_not_decode_is_named(beton, index):
    _damage(beton, index)
    with pytest.raises(DataError, match=rf"val.beton: sample {index} \(class \w+\) is broken"):
        list(_loaders(beton).val)


def _table(path: Path) -> np.memmap:
    """The file's table of contents, to be changed in place."""
    from ffcv.types import FieldDescType, HeaderType, get_metadata_type

    from pipelines.beton_file import FIELDS

    start = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize
    dtype = get_metadata_type(list(FIELDS.values()))
    return np.memmap(path, dtype, "r+", offset=start, shape=17)


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("by", [-8, 3, 100])
def test_a_jpeg_of_another_size_than_the_table_says_is_broken(beton, side, by):
    """libjpeg would fill a part of the picture and leave old memory in the rest."""
    column = _table(beton / "val.beton")["f0"][side]
    column[5] = int(column[5]) + by
    with pytest.raises(DataError, match=r"sample 5 \(class \w+\) is broken"):
        list(_loaders(beton).val)


def test_a_label_that_no_data_set_has_is_refused(beton):
    for split in ("train", "val"):
        sidecar.path_of(beton / f"{split}.beton").unlink()
    _table(beton / "val.beton")["f1"][5] = 1 << 40
    with pytest.raises(DataError, match="sample 5 has an impossible shape or label"):
        _loaders(beton, trust=True)


def test_a_loader_closed_while_it_is_read_says_so(beton):
    train = _loaders(beton).train
    batches = iter(train)
    next(batches)
    train.close()
    with pytest.raises(RuntimeError, match="closed while it was read"):
        next(batches)
    assert len(list(train)) == len(train)  # and can be used again


def test_sizes_too_small_for_the_resize_are_refused(beton):
    with pytest.raises(UsageError, match="--sizes 3: at least 4 pixels"):
        _make(replace(_spec(beton), sizes=(32, 3)))


def test_a_file_that_shrinks_while_it_is_read_is_noticed(beton):
    val = _loaders(beton).val
    os.truncate(beton / "val.beton", (beton / "val.beton").stat().st_size // 2 + 4_200_000)
    with pytest.raises(DataError, match="is broken: the file ends before it does"):
        list(val)


def test_an_exception_in_a_thread_reaches_the_caller(beton, monkeypatch):
    from pipelines import ffcv_decode

    def views(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(ffcv_decode, "training_views", views)
    train = _loaders(beton).train
    with pytest.raises(MemoryError, match="no more"):
        next(iter(train))
    train.close()


def _resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def test_fifty_broken_off_epochs_leak_neither_thread_nor_memory(tmp_path):
    folder = write_folder(tmp_path / "a" / "train", {"ant": 40})
    shutil.copytree(folder, tmp_path / "a" / "val")
    beton = _convert(tmp_path / "a", tmp_path / "beton")
    spec = replace(_spec(beton), sizes=(224, 192), batch_size=8)  # 8.3 MB a batch
    train = _make(spec).train

    def break_off(epoch: int) -> None:
        train.set_epoch(epoch)
        next(iter(train))

    for epoch in range(10):
        break_off(epoch)
    threads, memory = threading.active_count(), _resident_mb()
    for epoch in range(50):
        break_off(epoch)
    assert threading.active_count() == threads
    # Each epoch starts four batches: 1,650 MB if they leaked, 400 MB if one of them did. What threads
    # still hold, and what malloc keeps, was once more than 50 MB on a busy machine.
    assert _resident_mb() - memory < 250
    train.close()


def test_leaving_an_epoch_cancels_what_has_not_begun(beton, monkeypatch):
    from pipelines import ffcv_decode

    calls = []

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.05)
        arguments[-1][:] = ffcv_decode.FINE

    monkeypatch.setattr(ffcv_decode, "training_views", slow)
    batches = iter(_loaders(beton, prefetch=6).train)  # two threads, seven tasks
    next(batches)
    batches.close()
    time.sleep(0.5)
    assert len(calls) < 6


def test_close_ends_the_threads(beton):
    train = _loaders(beton).train
    next(iter(train))
    train.close()
    assert not any(t.name.startswith("ffcv") for t in threading.enumerate())


def _missing_file(beton):
    (beton / "val.beton").unlink()
    return f"there is no file {beton}/val.beton"


def _another_version(beton):
    _edit(beton / "val.beton.json", version=99)
    return "val.beton.json: written by version 99 of the converter, this is version 1; convert"


def _damaged_sidecar(beton):
    (beton / "val.beton.json").write_text('{"version": 1, "sam')
    return "val.beton.json is damaged"


def _sidecar_without_a_field(beton):
    content = json.loads((beton / "val.beton.json").read_text())
    del content["classes"]
    (beton / "val.beton.json").write_text(json.dumps(content))
    return "val.beton.json is damaged .TypeError.*classes"


def _wrong_types(beton):
    _edit(beton / "val.beton.json", samples="17")
    return "val.beton.json is damaged .TypeError: samples is no int"


def _numbered_classes(beton):
    _edit(beton / "val.beton.json", classes=[0, 1, 2])
    return "val.beton.json is damaged .TypeError: classes are no strings"


def _endless_nesting(beton):
    (beton / "val.beton.json").write_text("[" * 200_000)
    return "val.beton.json is damaged"


def _folder_for_a_sidecar(beton):
    (beton / "val.beton.json").unlink()
    (beton / "val.beton.json").mkdir()
    return "val.beton.json is damaged .IsADirectoryError"


def _other_size(beton):
    _edit(beton / "val.beton.json", bytes=5)
    return "val.beton has [0-9]+ bytes and 17 samples, its sidecar says 5 and 17"


def _other_classes(beton):
    _edit(beton / "val.beton.json", classes=["ant", "bee", "dog"])
    return "classes of .*train.beton and .*val.beton differ: cat, dog"


def _classes_in_another_order(beton):
    _edit(beton / "val.beton.json", classes=["bee", "ant", "cat"])
    return "classes of .*train.beton and .*val.beton differ in their order"


def _too_few_classes(beton):
    for split in ("train", "val"):
        _edit(beton / f"{split}.beton.json", classes=["ant", "bee"])
    return "there is a label 2, but 2 classes"


def _cut_off(beton):
    os.truncate(beton / "val.beton", (beton / "val.beton").stat().st_size - 1000)
    return "val.beton: it is cut off"


def _half_written(beton):
    with (beton / "val.beton").open("r+b") as file:
        file.seek(16)
        file.write(bytes(8))  # the allocation table's place, which is written last
    return "val.beton: it was not written to its end"


def _something_else(beton):
    (beton / "val.beton").write_bytes(b"PK" * 5000)
    return "val.beton: it is no FFCV file"


def _empty(beton):
    (beton / "val.beton").write_bytes(b"")
    return "val.beton: it has 0 bytes only"


def _zeroed_table(beton):
    path = beton / "val.beton"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 24)
        file.write(bytes(24))
    return "its samples and its allocation table do not agree"


def _edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "damage",
    [
        _missing_file, _another_version, _damaged_sidecar, _sidecar_without_a_field, _wrong_types,
        _numbered_classes, _endless_nesting, _folder_for_a_sidecar, _other_size, _other_classes,
        _classes_in_another_order, _too_few_classes, _cut_off, _half_written, _something_else,
        _empty, _zeroed_table,
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_before_training(beton, damage):
    message = damage(beton)
    with pytest.raises((UsageError, DataError), match=message):
        _loaders(beton)


def test_without_a_sidecar_every_sample_is_checked(beton, capsys):
    sidecar.path_of(beton / "val.beton").unlink()
    assert _loaders(beton).classes == ["ant", "bee", "cat"]
    assert "val.beton has no sidecar: checking all 17 samples" in capsys.readouterr().err
    _damage(beton, 5)
    with pytest.raises(DataError, match=r"sample 5 \(class 1\) is broken"):
        _loaders(beton)


def test_each_rank_checks_its_share(beton):
    sidecar.path_of(beton / "val.beton").unlink()
    _damage(beton, 5)
    spec = replace(_spec(beton), world_size=2)
    _make(replace(spec, rank=0))
    with pytest.raises(DataError, match="sample 5"):
        _make(replace(spec, rank=1))


def test_trust_leaves_the_check_out(beton):
    for split in ("train", "val"):
        sidecar.path_of(beton / f"{split}.beton").unlink()
    _damage(beton, 5)
    assert _loaders(beton, trust=True).classes == ["0", "1", "2"]


_FFCVS_WRITER = """
import os, sys
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder

class LabelFirst(ImageFolder):
    def __getitem__(self, index):
        return super().__getitem__(index)[::-1]

source, target = sys.argv[1:]
image, label = RGBImageField(write_mode="jpg", jpeg_quality=100), IntField()
train = DatasetWriter(f"{target}/train.beton", {"image": image, "label": label}, num_workers=1)
train.from_indexed_dataset(ImageFolder(f"{source}/train"), chunksize=50)
val = DatasetWriter(f"{target}/val.beton", {"label": label, "image": image}, num_workers=1)
val.from_indexed_dataset(LabelFirst(f"{source}/val"), chunksize=50)
os._exit(0)
"""


def test_a_file_by_ffcvs_own_writer_is_read(photos, tmp_path):
    """What users have from elsewhere; FFCV encodes it anew, hence the tolerance."""
    # In a process group that is ended: FFCV's workers, which are forked, may wait for ever at their exit.
    process = subprocess.Popen(
        [sys.executable, "-c", _FFCVS_WRITER, photos, tmp_path],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.wait(timeout=120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    loaders = _loaders(tmp_path)
    assert loaders.classes == ["0", "1", "2"]
    assert (differences(loaders, _spec(photos), "val") < 3).all()


@pytest.mark.parametrize("os_cache", [True, False])
def test_pages_are_read_ahead_and_dropped_when_done(tmp_path, monkeypatch, os_cache):
    """The advice given to the kernel; what it makes of it depends on its version and file system."""
    from pipelines import beton_file

    monkeypatch.setattr(beton_file, "PAGE_SIZE", 4096)
    folder = write_folder(tmp_path / "a" / "train", {"ant": 40})
    shutil.copytree(folder, tmp_path / "a" / "val")
    beton = _convert(tmp_path / "a", tmp_path / "beton")
    calls = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: calls.append(call[1:]))
    for split in ("train", "val"):
        calls.clear()
        loaders = _loaders(beton, order="quasi-random", os_cache=os_cache)
        list(getattr(loaders, split))
        table = beton_file.open_beton(beton / f"{split}.beton")
        indices = [i for batch in getattr(loaders, split).schedule.batches(0) for i in batch]
        pages = {(p * table.page_size, table.page_size) for p in table.pages[indices].tolist()}
        assert len(pages) > 5
        wanted = [c[:2] for c in calls if c[2] == os.POSIX_FADV_WILLNEED]
        dropped = [c[:2] for c in calls if c[2] == os.POSIX_FADV_DONTNEED]
        assert sorted(wanted) == sorted(pages)
        assert sorted(dropped) == ([] if os_cache else sorted(pages))
        for page in dropped:
            assert calls.index((*page, os.POSIX_FADV_WILLNEED)) < calls.index(
                (*page, os.POSIX_FADV_DONTNEED)
            )


def test_dropping_pages_in_random_order_is_refused():
    with pytest.raises(UsageError, match=r"--no-os-cache: .* add --order quasi-random"):
        FfcvOptions(os_cache=False)


def test_importing_ffcv_leaves_pytorchs_threads_alone():
    code = (
        "import torch; torch.set_num_threads(2); import pipelines.ffcv_loader; "
        "print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "2"


@pytest.mark.parametrize(
    "command", [["train_ffcv.py", "--data", "x"], ["-m", "pipelines.beton", "--verify", "x"]]
)
def test_a_machine_without_ffcv_is_told_so_in_one_line(tmp_path, command):
    (tmp_path / "ffcv.py").write_text('raise ImportError("No module named ffcv")')
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "FFCV cannot be imported (No module named ffcv); install it with ./install.sh" in line


@pytest.mark.parametrize(
    ("flag", "options"), [("--workers 0", {"workers": 0}), ("--prefetch 0", {"prefetch": 0})]
)
def test_options_out_of_range_are_refused(flag, options):
    with pytest.raises(UsageError, match=flag):
        FfcvOptions(**options)
