"""DALI's loader where there is no GPU: what the threads behind its graph do."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import dali
from pipelines.batch import LoaderSpec
from pipelines.dali import loader as dali_host
from pipelines.utils.errors import DataError, UsageError
from tests.conftest import beton_of, needs_ffcv, write_photo
from tests.helpers import betons

SIZES = (64, 48, 32)
WORKERS = 2


@pytest.fixture
def spec(photos: Path) -> LoaderSpec:
    return LoaderSpec(photos, SIZES, batch_size=4, device=torch.device("cpu"))


def _loaders(spec: LoaderSpec):
    return dali.make_loaders(dali.DaliOptions(workers=WORKERS), spec)


def _assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


@needs_ffcv
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dali_and_ffcv_give_the_same_bits(spec, split, dtype):
    spec = replace(spec, dtype=dtype)
    theirs = betons.make(replace(spec, data=beton_of(spec.data)))
    _assert_same(getattr(_loaders(spec), split), getattr(theirs, split))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_consumers_thread_resizes_nothing(spec, split, monkeypatch):
    threads = set()

    def resize(*_):
        threads.add(threading.current_thread())

    monkeypatch.setattr(dali_host, "resize", resize)
    list(getattr(_loaders(spec), split))
    assert 1 <= len(threads) <= WORKERS
    assert threading.current_thread() not in threads


def test_a_batch_is_resized_while_the_one_before_it_is_used(spec, monkeypatch):
    resized = []
    monkeypatch.setattr(dali_host, "resize", lambda *_: resized.append(None))
    batches = iter(_loaders(spec).train)
    next(batches)
    for _ in range(100):
        if len(resized) == 2 * spec.batch_size * len(SIZES):
            break
        time.sleep(0.05)
    assert len(resized) == 2 * spec.batch_size * len(SIZES)


def test_dali_does_not_reuse_the_memory_of_crops_that_wait(spec, monkeypatch):
    expected = list(_loaders(spec).train)
    real = dali_host.resize

    def slow(*arguments):
        time.sleep(0.01)  # DALI is far ahead when the picture is read
        real(*arguments)

    monkeypatch.setattr(dali_host, "resize", slow)
    _assert_same(_loaders(spec).train, expected)


def test_a_broken_image_ends_the_threads(tmp_path):
    for split in ("train", "val"):
        for i in range(6):
            write_photo(tmp_path / split / "a" / f"{i}.JPEG", 60, 60, seed=i)
    (tmp_path / "val" / "a" / "4.JPEG").write_bytes(b"")
    val = _loaders(LoaderSpec(tmp_path, SIZES, 2, torch.device("cpu"))).val
    with pytest.raises(DataError, match=r"4\.JPEG"):
        list(val)
    assert not [t for t in threading.enumerate() if t.name.startswith("dali-resize")]


def test_what_a_thread_raises_reaches_the_reader(spec, monkeypatch):
    def fail(*_):
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(dali_host, "resize", fail)
    loader = _loaders(spec).train
    with pytest.raises(MemoryError, match="no room"):
        list(loader)
    loader.close()


def test_sizes_that_the_resize_cannot_make_are_refused(spec):
    with pytest.raises(UsageError, match="--sizes 2: at least 4 pixels"):
        _loaders(replace(spec, sizes=(64, 2)))
