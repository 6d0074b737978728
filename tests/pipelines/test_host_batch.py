"""Batches that threads make: order, bounds and errors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipelines import host_batch as host
from pipelines.batch import Batch, LoaderSpec
from pipelines.utils.errors import UsageError


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def _batch(number: int) -> Batch:
    return Batch((), torch.tensor([number]))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 17])
def test_every_sample_is_filled_exactly_once(pool, count):
    filled: list[int] = []
    work = host.HostBatch(
        pool, count, lambda first, last: filled.extend(range(first, last)), lambda: _batch(0)
    )
    work.result()
    assert sorted(filled) == list(range(count))


def test_batches_come_in_order_with_a_bounded_number_in_progress(pool):
    begun = 0

    def works():
        nonlocal begun
        for number in range(6):
            begun += 1
            yield host.HostBatch(pool, 1, lambda *_: None, lambda n=number: _batch(n))

    seen = []
    for taken, batch in enumerate(host.iterate_finished(works(), ahead=2), 1):
        seen.append(batch.labels.item())
        assert begun == min(taken + 2, 6)
    assert seen == list(range(6))


def test_what_a_thread_raises_is_raised_to_the_reader(pool):
    def fail(first: int, last: int) -> None:
        raise ValueError(f"{first} to {last}")

    work = host.HostBatch(pool, 3, fail, lambda: _batch(0))
    with pytest.raises(ValueError, match="0 to 3"):
        list(host.iterate_finished([work], ahead=1))


def test_leaving_early_cancels_what_has_not_begun():
    begun, held = [], threading.Event()

    def fill(first: int, _last: int) -> None:
        begun.append(first)
        if len(begun) > 1:
            held.wait()

    with ThreadPoolExecutor(1) as pool:
        works = [
            host.HostBatch(pool, count, fill, lambda: _batch(0)) for count in (1, 5 * host.CHUNK)
        ]
        batches = host.iterate_finished(works, ahead=1)
        next(batches)
        batches.close()
        held.set()
    assert len(begun) <= 2  # of six


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_into_a_block_is_in_the_channels_last_image(dtype):
    spec = LoaderSpec(Path(), (5, 4), 3, torch.device("cpu"), dtype, "unit")
    blocks, table = host.allocate_blocks((5, 4), 3, dtype), host.pixel_table(spec)
    for block in blocks:
        host.as_array(block)[:] = table[0, 255]
        host.as_array(block)[2, 1, 3 * 2 + 1] = table[1, 0]  # image 2, row 1, column 2, green
    for size, image in zip(spec.sizes, host.as_images(blocks), strict=True):
        expected = torch.ones(3, 3, size, size, dtype=dtype)
        expected[2, 1, 1, 2] = 0
        assert torch.equal(image, expected)
        assert image.is_contiguous(memory_format=torch.channels_last)


def test_sizes_below_those_that_the_resize_takes_are_refused():
    spec = LoaderSpec(Path(), (8, 3), 1, torch.device("cpu"))
    with pytest.raises(UsageError, match="--sizes 3: at least 4 pixels"):
        host.check_sizes(spec)
