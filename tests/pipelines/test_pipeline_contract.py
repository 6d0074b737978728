"""What every backend promises, checked on each: a new backend only adds itself to BACKENDS."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import dali, ffcv, reference, synthetic
from pipelines.batch import Loaders, LoaderSpec
from pipelines.erasing import LANES, Boxes
from pipelines.sampler import ERASING_LANE, crop_params, uniforms
from pipelines.utils.errors import UsageError
from tests.conftest import beton_of, needs_ffcv

SIZES = (64, 48, 32)
# As many synthetic images as there are photos, with the same number of classes.
BACKENDS: dict[str, Callable[..., Loaders]] = {
    "reference": lambda spec, *a: reference.make_loaders(reference.ReferenceOptions(), spec, *a),
    "dali": lambda spec, *a: dali.make_loaders(dali.DaliOptions(workers=2), spec, *a),
    "ffcv": lambda spec, *a: ffcv.make_loaders(
        ffcv.FfcvOptions(workers=2), replace(spec, data=beton_of(spec.data)), *a
    ),
    "quasi-random": lambda spec, *a: ffcv.make_loaders(
        ffcv.FfcvOptions(workers=2, order="quasi-random", os_cache=False),
        replace(spec, data=beton_of(spec.data)),
        *a,
    ),
    "synthetic": lambda spec, *a: synthetic.make_loaders(
        synthetic.SyntheticOptions(train_images=23, val_images=17, classes=3), spec, *a
    ),
}
FFCV = ("ffcv", "quasi-random")
NAMES = [pytest.param(n, marks=needs_ffcv) if n in FFCV else n for n in BACKENDS]
READERS = NAMES[:-1]


@pytest.fixture
def spec(photos: Path) -> LoaderSpec:
    return LoaderSpec(photos, SIZES, batch_size=4, device=torch.device("cpu"))


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest) -> Any:
    """The backend's factory; what it makes is closed after the test."""
    made: list[Loaders] = []

    def factory(*arguments: Any) -> Loaders:
        made.append(BACKENDS[request.param](*arguments))
        return made[-1]

    yield factory
    for loaders in made:
        for loader in (loaders.train, loaders.val):
            if loader is not None:
                loader.close()


readers_only = pytest.mark.parametrize("make", READERS, indirect=True)
# All that is drawn for a sample.
AUGMENTED = {
    "auto_augment": "rand", "random_erase": 0.5, "repeats": 2, "train_sizes": (56, 40, 28),
}  # fmt: skip


def epoch_of(loader, epoch=0):
    loader.set_epoch(epoch)
    return list(loader)


def test_images_are_channels_last_of_every_size(make, spec):
    for loader in make(spec)[:2]:
        batch = epoch_of(loader)[0]
        assert [tuple(x.shape) for x in batch.images] == [(4, 3, s, s) for s in SIZES]
        for x in batch.images:
            assert x.dtype == torch.float32
            assert x.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        assert batch.labels.shape == (4,)


def test_training_images_may_be_smaller(make, spec):
    sizes = (56, 40, 28)
    train, val, _ = make(replace(spec, train_sizes=sizes))
    for one, other in zip(
        epoch_of(train), epoch_of(make(replace(spec, sizes=sizes)).train), strict=True
    ):
        assert [x.shape[-1] for x in one.images] == list(sizes)
        assert all(torch.equal(x, y) for x, y in zip(one.images, other.images, strict=True))
    assert [x.shape[-1] for x in epoch_of(val)[0].images] == list(SIZES)


@pytest.mark.parametrize("make", [NAMES[1], NAMES[2]], indirect=True)  # others make all
def test_what_an_epoch_does_not_use_is_empty_and_changes_nothing_else(make, spec):
    """Also in an epoch that is gone on with in its middle; the evaluation has all sizes."""
    spec = replace(spec, extra_sizes=(40,), random_erase=0.5)
    every, _, _ = make(spec)
    train, val, _ = make(replace(spec, used=((0, (2,)), (1, (0, 2)))))
    assert [x.shape[-1] for x in epoch_of(val)[0].images] == list(SIZES)
    for epoch, places in enumerate([(2,), (0, 2), (0, 2)]):
        batches = epoch_of(train, epoch)
        if epoch == 1:
            train.load_state_dict(train.state_dict() | {"position": 4})
            batches[1:] = list(train)
        for one, other in zip(batches, epoch_of(every, epoch), strict=True):
            for place, (x, y) in enumerate(zip(one.images, other.images, strict=True)):
                is_used = place in places or place == len(SIZES)
                assert torch.equal(x, y) if is_used else x.shape == (4, 3, 0, 0)


def test_images_come_in_the_compute_dtype(make, spec):
    for loader in make(replace(spec, dtype=torch.bfloat16))[:2]:
        assert {x.dtype for x in epoch_of(loader)[0].images} == {torch.bfloat16}


@readers_only
@pytest.mark.parametrize(("normalize", "low", "high"), [("unit", 0, 1), ("imagenet", -2.2, 2.7)])
def test_values_are_normalised(make, spec, normalize, low, high):
    for loader in make(replace(spec, normalize=normalize))[:2]:
        values = torch.cat([x.flatten() for batch in epoch_of(loader) for x in batch.images])
        assert low <= values.min() < low + 0.4 * (high - low)
        assert high - 0.4 * (high - low) < values.max() <= high


@readers_only
@pytest.mark.parametrize("flip", ["independent", "shared"])
def test_extra_sizes_are_the_same_crop_flipped_as_the_largest_in_training_alone(make, spec, flip):
    """As a loader of that size alone makes it: the first size's flip is the first number."""
    spec = replace(spec, flip=flip)
    train, val, _ = make(replace(spec, extra_sizes=(40, 72)))
    plain, alone = make(spec).train, [make(replace(spec, sizes=(s,))).train for s in (40, 72)]
    for batch, ours, *others in zip(*map(epoch_of, (train, plain, *alone)), strict=True):
        expected = [*ours.images, *(other.images[0] for other in others)]
        assert len(batch.images) == len(expected) == 5
        assert all(torch.equal(x, y) for x, y in zip(batch.images, expected, strict=True))
    assert [x.shape[-1] for x in epoch_of(val)[0].images] == list(SIZES)


def test_an_epoch_has_as_many_batches_as_its_length_says(make, spec):
    train, val, _ = make(spec)
    assert len(epoch_of(train)) == len(train) == 23 // 4
    assert len(epoch_of(val)) == len(val) == -(-17 // 4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_validation_image_counts_exactly_once(make, spec, batch_size, world_size):
    labels: list[int] = []
    for rank in range(world_size):
        part = replace(spec, batch_size=batch_size, rank=rank, world_size=world_size)
        val = make(part, False).val
        labels += [y for batch in epoch_of(val) for y in batch.labels.tolist()]
    whole = [y for b in epoch_of(make(spec, False).val) for y in b.labels.tolist()]
    assert labels == whole
    assert len(labels) == 17


@readers_only
def test_the_names_of_samples_are_in_the_order_of_the_evaluation(make, spec, photos):
    paths = [str(p) for c in ("ant", "bee", "cat") for p in sorted((photos / "val" / c).iterdir())]
    for rank in range(2):
        names = make(replace(spec, rank=rank, world_size=2), False).val.sample_names
        file = beton_of(photos) / "val.beton" if "#" in names[0] else None
        assert names == (paths if file is None else [f"{file}#{i}" for i in range(17)])


def test_without_training_there_is_no_training_loader(make, spec):
    assert make(spec, False).train is None


def test_two_epochs_come_in_different_orders(make, spec):
    train = make(spec).train
    first, second = ([b.labels.tolist() for b in epoch_of(train, e)] for e in (0, 1))
    assert first != second


def test_the_same_seed_gives_the_same_batches(make, spec):
    one, two = make(spec).train, make(spec).train
    for a, b in zip(epoch_of(one, 3), epoch_of(two, 3), strict=True):
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


@readers_only
def test_another_seed_gives_other_batches(make, spec):
    a = epoch_of(make(spec).train)[0]
    b = epoch_of(make(replace(spec, seed=1)).train)[0]
    assert not torch.equal(a.images[0], b.images[0])


@readers_only
@pytest.mark.parametrize("more", [{}, AUGMENTED])
def test_two_ranks_split_the_batches_of_one(make, spec, more):
    spec = replace(spec, **more)
    whole = epoch_of(make(replace(spec, batch_size=8)).train)
    parts = [epoch_of(make(replace(spec, rank=r, world_size=2)).train) for r in (0, 1)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for i in range(len(SIZES)):
            together = torch.cat([half.images[i] for half in halves])
            one, two = (
                sorted(x.numpy().tobytes() for x in xs) for xs in (batch.images[i], together)
            )
            assert one == two


def test_an_image_comes_again_with_its_label_and_another_crop(make, spec):
    train = make(replace(spec, repeats=2, flip="shared")).train
    for indices, batch in zip(train.schedule.batches(0), epoch_of(train), strict=True):
        assert (
            train.schedule.rows(indices).tolist() == 2 * train.schedule.rows(indices)[:2].tolist()
        )
        assert len({x.numpy().tobytes() for x in batch.images[0]}) == 4
        assert torch.equal(batch.labels[:2], batch.labels[2:])


@readers_only
def test_all_sizes_show_the_same_crop(make, spec):
    train = make(replace(spec, flip="shared", normalize="unit")).train
    for batch in epoch_of(train):
        small = batch.images[-1]
        for x in batch.images[:-1]:
            again = torch.nn.functional.interpolate(x, small.shape[-2:], mode="area")
            assert (again - small).abs().mean() < 0.03


@readers_only
def test_sizes_flip_independently_unless_shared(make, spec):
    def disagreements(flip):
        train = make(replace(spec, flip=flip, normalize="unit")).train
        count = 0
        for batch in [b for e in range(3) for b in epoch_of(train, e)]:
            small = batch.images[-1]
            x = torch.nn.functional.interpolate(batch.images[0], small.shape[-2:], mode="area")
            straight = (x - small).abs().mean(dim=(1, 2, 3))
            mirrored = (x.flip(3) - small).abs().mean(dim=(1, 2, 3))
            count += int((mirrored < straight).sum())
        return count

    assert disagreements("shared") == 0
    assert 15 <= disagreements("independent") <= 45  # of 60, about half


@readers_only
def test_the_same_part_of_the_picture_is_erased_at_every_size(make, spec):
    erased, plain = make(replace(spec, random_erase=0.5)).train, make(spec).train
    count = 0
    for indices, one, other in zip(
        erased.schedule.batches(1), epoch_of(erased, 1), epoch_of(plain, 1), strict=True
    ):
        places, edges = Boxes.from_uniforms(uniforms(0, 1, indices, LANES, ERASING_LANE), 0.5)
        boxes = dict(zip(places.tolist(), edges.tolist(), strict=True))
        flip = crop_params(0, 1, indices, len(SIZES), spec.flip).flip
        count += len(boxes)
        for k, (size, x, expected) in enumerate(zip(SIZES, one.images, other.images, strict=True)):
            for i, picture in enumerate(expected):
                top, left, bottom, right = (round(e * size) for e in boxes.get(i, [0] * 4))
                as_cropped = picture.flip(2) if flip[i, k] else picture
                as_cropped[:, top:bottom, left:right] = 0
                assert torch.equal(x[i].flip(2) if flip[i, k] else x[i], as_cropped)
    assert 5 <= count <= 15  # of 20


@readers_only
def test_validation_images_are_as_they_are(make, spec):
    for a, b in zip(
        *(epoch_of(make(s, False).val) for s in (spec, replace(spec, **AUGMENTED))), strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_a_broken_off_epoch_does_not_leak_into_the_next(make, spec):
    train = make(spec).train
    expected = epoch_of(train, 1)
    train.set_epoch(0)
    next(iter(train))
    for a, b in zip(epoch_of(train, 1), expected, strict=True):
        assert torch.equal(a.images[0], b.images[0])


@pytest.mark.parametrize("more", [{}, AUGMENTED])
def test_a_loader_continues_where_its_state_was_taken(make, spec, more):
    spec = replace(spec, **more)
    train = make(spec).train
    expected = epoch_of(train, 2)
    train.set_epoch(2)
    batches = iter(train)
    next(batches)
    next(batches)
    state = train.state_dict()
    again = make(spec).train
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(expected) - 2
    assert all(
        torch.equal(a.images[1], b.images[1]) for a, b in zip(rest, expected[2:], strict=True)
    )


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 5), ("samples", 99), ("order", "alphabetical")]
)
def test_a_state_of_other_data_is_refused(make, spec, field, value):
    train = make(spec).train
    with pytest.raises(UsageError, match=f"{field} {value}"):
        train.load_state_dict(train.state_dict() | {field: value})


def test_a_batch_larger_than_the_data_is_refused(make, spec):
    with pytest.raises(UsageError, match=r"--batch-size.* 24 images.* only 23"):
        make(replace(spec, batch_size=24))


def test_close_leaves_no_thread_behind(make, spec):
    def threads():
        gc.collect()
        return len(os.listdir("/proc/self/task")), threading.active_count()

    epoch_of(make(spec).val)  # starts what PyTorch itself keeps
    warm = make(spec)
    epoch_of(warm.train)
    for loader in warm[:2]:
        loader.close()
    before = threads()
    train, val, _ = make(spec)
    next(iter(train))
    epoch_of(val)
    train.close()
    val.close()
    for _ in range(300):
        if threads() <= before:
            break
        time.sleep(0.1)
    assert threads() <= before
