"""FFCV's loader: its images against PIL's, broken samples, its threads, and the quasi-random order."""

from __future__ import annotations

import contextlib
import gc
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

from pipelines.demo import ODD_KINDS, render
from pipelines.ffcv import FfcvOptions
from pipelines.utils.errors import DataError, RunError, UsageError
from pipelines.windows import Windows, WindowSchedule
from tests.conftest import beton_of, needs_ffcv, write_folder, write_photo
from tests.helpers.betons import (
    convert_to,
    damage_sample,
    edit_sidecar,
    loaders_of,
    make,
    spec_of,
    table_of,
)
from tests.helpers.images import differences

pytestmark = needs_ffcv
ROOT = Path(__file__).parents[3]
# Mean absolute difference of an image in 1/255: seen 0.31 for the worst of 500 ImageNet photos.
TOLERANCE = 0.5


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("write_mode", ["jpg", "raw"])
def test_every_size_is_pils_image_of_the_same_rectangle(photos, tmp_path, split, write_mode):
    beton = convert_to(photos, tmp_path / "beton", write_mode=write_mode)
    worst = differences(loaders_of(beton), spec_of(photos), split).max(dim=1).values
    assert (worst < TOLERANCE).all(), worst


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_gpu_gets_the_same_batches_as_the_cpu(photos, split, dtype):
    beton = beton_of(photos)
    spec = spec_of(beton, dtype=dtype, batch_size=8)
    on_gpu = replace(spec, device=torch.device("cuda"))
    pairs = [make(s) for s in (spec, on_gpu)]
    for a, b in zip(*(getattr(loaders, split) for loaders in pairs), strict=True):
        assert torch.equal(a.labels, b.labels.cpu())
        for x, y in zip(a.images, b.images, strict=True):
            assert y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(x, y.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_that_is_behind_reads_whole_batches(photos):
    """Copies of later batches are done by then, and the memory of read ones is used again."""
    spec = spec_of(beton_of(photos), batch_size=4, device=torch.device("cuda"))

    def sums(cycles: int) -> torch.Tensor:
        found = []
        for batch in make(spec).train:
            torch.cuda._sleep(cycles)  # of the device, as a step would take
            found.append(torch.stack([x.double().sum() for x in batch.images]))
        return torch.stack(found).cpu()

    assert torch.equal(sums(50_000_000), sums(0))


def test_odd_files_decode_to_the_same_image(tmp_path):
    """Grayscale, progressive, EXIF-rotated and PNG exactly; CMYK is encoded anew, once."""
    for split in ("train", "val"):
        for i, save in enumerate(ODD_KINDS):
            folder = tmp_path / "odd" / split / str(i)
            folder.mkdir(parents=True)
            save(folder / "x.JPEG", render("ring_vertical", np.random.default_rng(i)))
    beton = convert_to(tmp_path / "odd", tmp_path / "beton", jpeg_quality=100)
    spec = replace(spec_of(tmp_path / "odd"), batch_size=1)
    loaders = make(replace(spec, data=beton))
    assert (differences(loaders, spec, "val") < 3 * TOLERANCE).all()


@pytest.mark.parametrize(("height", "width"), [(20, 300), (300, 20), (7, 5), (1, 1)])
def test_extreme_shapes_get_the_references_rectangle(tmp_path, height, width):
    for split in ("train", "val"):
        for i in range(8):
            write_photo(tmp_path / "a" / split / "a" / f"{i}.JPEG", height, width, seed=i)
    beton = convert_to(tmp_path / "a", tmp_path / "beton")
    for split in ("train", "val"):
        assert (differences(loaders_of(beton), spec_of(tmp_path / "a"), split) < TOLERANCE).all()


@pytest.mark.parametrize("index", [0, 7, 16])
def test_a_sample_that_does_not_decode_is_named(beton, index):
    damage_sample(beton, index)
    with pytest.raises(DataError, match=rf"val.beton: sample {index} \(class \w+\) is broken"):
        list(loaders_of(beton).val)


@pytest.mark.parametrize("kind", [None, "trivial"])
def test_a_training_sample_that_does_not_decode_is_named(beton, kind):
    damage_sample(beton, 4, "train")
    train = make(spec_of(beton, auto_augment=kind, batch_size=23)).train
    with pytest.raises(DataError, match=r"train.beton: sample 4 \(class \w+\) is broken"):
        next(iter(train))


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("by", [-8, 3, 100])
def test_a_jpeg_of_another_size_than_the_table_says_is_broken(beton, side, by):
    """libjpeg would fill a part of the image and leave old memory in the rest."""
    edit_sidecar(beton / "val.beton", lambda content: content.pop("table_sha256"))
    column = table_of(beton / "val.beton")["f0"][side]
    column[5] = int(column[5]) + by
    with pytest.raises(DataError, match=r"sample 5 \(class \w+\) is broken"):
        list(loaders_of(beton).val)


def test_a_loader_closed_while_it_is_read_says_so(beton):
    train = loaders_of(beton).train
    batches = iter(train)
    next(batches)
    train.close()
    with pytest.raises(RuntimeError, match="closed while it was read"):
        next(batches)
    assert len(list(train)) == len(train)  # and can be used again


def test_a_file_that_shrinks_while_it_is_read_is_noticed(beton):
    val = loaders_of(beton).val
    os.truncate(beton / "val.beton", (beton / "val.beton").stat().st_size // 2 + 4_200_000)
    with pytest.raises(RunError, match=r"val\.beton changed after the command began to read it"):
        list(val)
    val._beton = replace(val._beton, stamp=None)  # as if it shrank within the epoch
    with pytest.raises(DataError, match="is broken: the file ends before it does"):
        list(val)


def test_a_file_that_is_written_over_between_epochs_ends_the_run(beton):
    val = loaders_of(beton).val
    list(val)
    os.utime(beton / "val.beton", ns=(0, 0))
    with pytest.raises(RunError, match=r"val\.beton changed after the command began to read it"):
        list(val)
    val.close()


def test_an_exception_in_a_thread_reaches_the_caller(beton, monkeypatch):
    from pipelines.ffcv import decode as ffcv_decode

    def views(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(ffcv_decode, "training_views", views)
    train = loaders_of(beton).train
    with pytest.raises(MemoryError, match="no more"):
        next(iter(train))
    train.close()


def _resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


@pytest.mark.slow
def test_fifty_broken_off_epochs_leak_neither_thread_nor_memory(tmp_path):
    folder = write_folder(tmp_path / "a" / "train", {"ant": 40})
    shutil.copytree(folder, tmp_path / "a" / "val")
    beton = convert_to(tmp_path / "a", tmp_path / "beton")
    spec = replace(spec_of(beton), sizes=(224, 192), batch_size=8)  # 8.3 MB a batch
    train = make(spec).train

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
    from pipelines.ffcv import decode as ffcv_decode

    calls = []

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.05)
        arguments[1].status[:] = ffcv_decode.FINE

    monkeypatch.setattr(ffcv_decode, "training_views", slow)
    batches = iter(loaders_of(beton, prefetch=6).train)  # two threads, seven tasks
    next(batches)
    batches.close()
    time.sleep(0.5)
    assert len(calls) < 6


def test_close_ends_the_threads(beton):
    train = loaders_of(beton).train
    next(iter(train))
    train.close()
    assert not any(t.name.startswith("ffcv") for t in threading.enumerate())


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


@pytest.mark.slow
def test_a_file_by_ffcvs_own_writer_is_read(photos, tmp_path):
    """What users have from elsewhere; FFCV encodes it anew, hence the tolerance."""
    # In a process group that is ended: FFCV's workers, which are forked, may never exit.
    process = subprocess.Popen(
        [sys.executable, "-c", _FFCVS_WRITER, photos, tmp_path],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.wait(timeout=120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    loaders = loaders_of(tmp_path)
    assert loaders.classes == ["0", "1", "2"]
    assert (differences(loaders, spec_of(photos), "val") < 3).all()


@pytest.mark.parametrize("os_cache", [True, False])
def test_pages_are_read_ahead_and_dropped_when_done(tmp_path, monkeypatch, os_cache):
    """The advice given to the kernel; what it makes of it depends on its version and file system."""
    from pipelines.ffcv import beton as beton_file

    monkeypatch.setattr(beton_file, "PAGE_SIZE", 4096)
    folder = write_folder(tmp_path / "a" / "train", {"ant": 40})
    shutil.copytree(folder, tmp_path / "a" / "val")
    beton = convert_to(tmp_path / "a", tmp_path / "beton")
    calls = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: calls.append(call[1:]))
    for split in ("train", "val"):
        calls.clear()
        loaders = loaders_of(beton, order="quasi-random", os_cache=os_cache)
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


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["train_ffcv.py", "--data", "x"], marks=pytest.mark.slow),
        ["-m", "pipelines.beton", "--verify", "x"],
    ],
)
def test_a_machine_without_ffcv_is_told_so_in_one_line(tmp_path, command):
    (tmp_path / "ffcv.py").write_text('raise ImportError("No module named ffcv")')
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "FFCV cannot be imported (No module named 'ffcv'); install it with make install" in line


@pytest.mark.parametrize(
    ("flag", "options"), [("--workers 0", {"workers": 0}), ("--prefetch 0", {"prefetch": 0})]
)
def test_options_out_of_range_are_refused(flag, options):
    with pytest.raises(UsageError, match=flag):
        FfcvOptions(**options)


def test_without_a_sidecar_every_sample_is_checked(beton, capsys):
    (beton / "val.beton.json").unlink()
    assert loaders_of(beton).classes == ["ant", "bee", "cat"]
    assert "val.beton has no sidecar: checking all 17 samples" in capsys.readouterr().err
    damage_sample(beton, 5)
    with pytest.raises(DataError, match=r"sample 5 \(class 1\) is broken"):
        loaders_of(beton)


def test_each_rank_checks_its_share(beton):
    (beton / "val.beton.json").unlink()
    damage_sample(beton, 5)
    spec = replace(spec_of(beton), world_size=2)
    make(replace(spec, rank=0))
    with pytest.raises(DataError, match="sample 5"):
        make(replace(spec, rank=1))


def test_trust_leaves_the_check_out(beton):
    for split in ("train", "val"):
        (beton / f"{split}.beton.json").unlink()
    damage_sample(beton, 5)
    assert loaders_of(beton, trust=True).classes == ["0", "1", "2"]


def test_sizes_too_small_for_the_resize_are_refused(beton):
    with pytest.raises(UsageError, match="--sizes 3: at least 4 pixels"):
        make(replace(spec_of(beton), sizes=(32, 3)))


PAGES = np.repeat(np.arange(7, 37), 10)  # 30 pages of 10 samples; the first pages hold none


@pytest.fixture
def page_order():
    """The quasi-random order of `PAGES` in groups of four pages, by epoch and seed."""

    def order(epoch: int = 0, seed: int = 0) -> np.ndarray:
        windows = Windows(PAGES, 4)
        return WindowSchedule(300, 10, 0, 1, seed, training=True, windows=windows).order(epoch)

    return order


def test_each_sample_comes_once(page_order):
    np.testing.assert_array_equal(np.sort(page_order()), np.arange(300))


def test_a_group_of_pages_is_finished_before_the_next_begins(page_order):
    groups = np.split(PAGES[page_order()], range(40, 300, 40))
    seen = [set(group.tolist()) for group in groups]
    assert [len(s) for s in seen] == [4] * 7 + [2]
    assert len(set.union(*seen)) == 30


def test_samples_are_shuffled_within_a_group(page_order):
    pages = PAGES[page_order()][:40]
    assert (np.diff(pages) != 0).sum() > 20
    assert not np.array_equal(np.sort(page_order()[:40]), page_order()[:40])


def test_pages_come_in_an_order_of_their_own_each_epoch_and_seed(page_order):
    first = {
        (e, s): set(PAGES[page_order(e, s)][:40].tolist()) for e, s in [(0, 0), (1, 0), (0, 1)]
    }
    assert first[0, 0] != first[1, 0]
    assert first[0, 0] != first[0, 1]
    np.testing.assert_array_equal(page_order(3), page_order(3))


def test_without_a_sidecar_each_nodes_processes_check_all_of_its_copy(beton, monkeypatch):
    (beton / "val.beton.json").unlink()
    shares = {}

    def note(_beton, share, _workers):
        shares[rank] = share.tolist()
        return [None] * len(share)

    monkeypatch.setattr("pipelines.ffcv.loader.reasons", note)
    for rank in range(5):
        node_of_rank = (0, 1, 0, 1, 1)
        spec = replace(spec_of(beton), rank=rank, world_size=5, node_of_rank=node_of_rank)
        make(spec)
    assert (
        sorted(shares[0] + shares[2]) == sorted(shares[1] + shares[3] + shares[4]) == [*range(17)]
    )
