"""Automatic augmentation: torchvision's operations on the one crop, drawn by (seed, epoch, sample) alone."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from pipelines import auto_augment, reference
from pipelines.batch import Loader, LoaderSpec
from pipelines.dali import DaliOptions, make_loaders
from pipelines.dali import graphs as dali_graph
from pipelines.dali import loader as dali
from pipelines.sampler import AUGMENTATION_LANE, crop_params, uniforms
from pipelines.sources.folder import scan_train_val
from pipelines.transforms import random_resized_crop
from tests.conftest import beton_of, needs_ffcv, write_photo
from tests.helpers import betons
from tests.helpers.images import differences
from tests.pipelines.dali.test_loader import devices, with_the_graph_of_a_gpu

SIZES = (64, 32)
TORCHVISION = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
RAND_MAGNITUDE = 9
MAGNITUDES = 31
# DALI's suites have their operations in one and the same order; torchvision's name of each.
OPERATIONS = [
    next(name for name in v2.RandAugment._AUGMENTATION_SPACE if name.lower() == key)
    for key in (a.name.replace("_", "") for a in get_trivial_augment_wide_suite())
]
# Mean absolute difference of an image in 1/255; seen on the CPU: 1.5. Another sign or magnitude is much
# further off, but for Sharpness, which changes little.
TOLERANCE = {"cpu": 2, "cuda": 6}

IDENTITY = np.full(3, 13.5 / 14)


def _numbers(operation: int, magnitude: int, negative: bool) -> np.ndarray:
    """What has to be drawn for it."""
    return (np.array([operation, magnitude, 1 - negative]) + 0.5) / (14, MAGNITUDES, 2)


FFCV = pytest.param("ffcv", marks=needs_ffcv)
FFCV_RAND = pytest.param("ffcv", "rand", marks=needs_ffcv)
kinds = pytest.mark.parametrize("kind", ["trivial", "rand"])
# How the numbers are drawn does not depend on the kind.
random_cases = pytest.mark.parametrize(
    ("backend", "kind"), [("reference", "rand"), ("dali", "trivial"), FFCV_RAND]
)
backends = pytest.mark.parametrize("backend", ["reference", "dali", FFCV])


@pytest.fixture
def spec(photos: Path) -> LoaderSpec:
    device = torch.device("cpu")
    return LoaderSpec(photos, SIZES, 4, device, normalize="unit", flip="shared")


def _loaders(backend: str, spec: LoaderSpec):
    if backend == "ffcv":
        return betons.make(replace(spec, data=beton_of(spec.data)))
    if backend == "dali":
        return make_loaders(DaliOptions(workers=1), spec)
    return reference.make_loaders(reference.ReferenceOptions(), spec)


def _by_sample(loader: Loader, epoch: int) -> dict[int, torch.Tensor]:
    """The largest image of each sample."""
    loader.set_epoch(epoch)
    batches = zip(loader.schedule.batches(epoch), loader, strict=True)
    return {int(i): x for indices, b in batches for i, x in zip(indices, b.images[0], strict=True)}


@kinds
def test_operations_and_magnitudes_are_torchvisions(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (19, 27, 3), dtype=np.uint8)
    crop = Image.fromarray(pixels)
    for operation, name in enumerate(auto_augment.OPERATIONS):
        for level in range(MAGNITUDES) if kind == "trivial" else (0, 9, 30):
            for negative in (False, True):
                numbers = _numbers(operation, level, negative)
                ours = auto_augment.augment(crop, kind, level, np.array([*numbers, *IDENTITY]))
                theirs = _Chosen(kind, name, level, negative, exact=True)(crop)
                assert np.array_equal(ours, theirs), (name, level, negative)


@kinds
def test_operations_are_drawn_as_torchvision_draws_them(kind, monkeypatch):
    drawn: list[tuple[str, float]] = []
    theirs = TORCHVISION[kind]()
    monkeypatch.setattr(
        theirs,
        "_apply_image_or_video_transform",
        lambda image, name, magnitude, **_: drawn.append((name, magnitude)) or image,
    )
    crop, count = Image.new("RGB", (331, 331)), 4000
    for _ in range(count):
        theirs(crop)
    expected, drawn[:] = drawn[:], []
    for name in auto_augment.OPERATIONS:
        monkeypatch.setitem(
            auto_augment.OPERATIONS, name, lambda x, m, name=name: drawn.append((name, m)) or x
        )
    for numbers in uniforms(0, 0, np.arange(count), auto_augment.LANES, AUGMENTATION_LANE):
        auto_augment.augment(crop, kind, RAND_MAGNITUDE, numbers)
    assert len(drawn) == len(expected)
    for name, (_, signed) in theirs._AUGMENTATION_SPACE.items():
        one, two = ([m for n, m in draws if n == name] for draws in (drawn, expected))
        # Five standard errors of the difference of two shares of 1/14.
        assert abs(len(one) - len(two)) < 5 * (2 * len(drawn) * 13) ** 0.5 / 14
        if signed:
            assert abs(np.mean(one) - np.mean(two)) < 5 * np.std(two) * (2 / len(one)) ** 0.5
            assert np.std(one) == pytest.approx(np.std(two), rel=0.15)


@kinds
def test_the_reference_augments_the_crop_by_the_samples_own_numbers(spec, kind):
    images = _by_sample(_loaders("reference", replace(spec, auto_augment=kind)).train, 1)
    assert len(images) == 20
    for index, image in images.items():
        alone = np.array([index])
        params = crop_params(spec.seed, 1, alone, len(SIZES), "shared")
        with Image.open(scan_train_val(spec.data, True)[0].paths[index]) as whole:
            crop = F.crop(whole, *random_resized_crop(whole.height, whole.width, params, 0))
        numbers = uniforms(spec.seed, 1, alone, auto_augment.LANES, AUGMENTATION_LANE)
        for operation, level, sign in numbers.reshape(-1, 3)[: 1 if kind == "trivial" else 2]:
            level = int(level * MAGNITUDES) if kind == "trivial" else RAND_MAGNITUDE
            name = OPERATIONS[int(operation * 14)]
            crop = _Chosen(kind, name, level, sign < 0.5, exact=True)(crop)
        view = F.resize(crop, [64, 64])
        expected = F.hflip(view) if params.flip[0, 0] else view
        assert torch.equal((255 * image).round(), F.pil_to_tensor(expected).float())


@needs_ffcv
@kinds
def test_ffcvs_pictures_are_the_references(spec, kind):
    """The augmented crop is the same to the bit; what differs is the resize, without augmentation, too."""
    spec = replace(spec, auto_augment=kind, flip="independent")
    assert (differences(_loaders("ffcv", spec), spec, "train") < 0.5).all()


def _equalized(channel: Image.Image) -> Image.Image:
    """cv2.equalizeHist: the darkest value becomes 0, the others their share of the other pixels."""
    counts = np.array(channel.histogram())
    darkest = counts[counts.nonzero()[0][0]]
    share = (counts.cumsum() - darkest) / max(counts.sum() - darkest, 1)
    return channel.point(np.rint(255 * share.clip(0)).astype(int).tolist())


class _Chosen:
    """torchvision's one operation, at a magnitude that is not drawn; not exact: as DALI has it."""

    def __init__(
        self, kind: str, name: str, magnitude: int, negative: bool, *, exact: bool = False
    ) -> None:
        self.transform, self.name, self.index = TORCHVISION[kind](), name, magnitude
        self.exact = exact
        # torchvision counts a shear the other way round; its sign is a coin's either way.
        self.sign = -1 if negative != name.startswith("Shear") else 1

    def __call__(self, crop: Image.Image) -> Image.Image:
        if (
            self.name == "Equalize" and not self.exact
        ):  # DALI's is OpenCV's; PIL's is far from even on a small crop
            return Image.merge("RGB", [_equalized(channel) for channel in crop.split()])
        magnitudes, signed = self.transform._AUGMENTATION_SPACE[self.name]
        all_of_them = magnitudes(MAGNITUDES, crop.height, crop.width)
        value = 0.0 if all_of_them is None else float(all_of_them[self.index])
        if self.name.startswith("Translate") and not self.exact:
            value = round(value)  # torchvision cuts to whole pixels, DALI takes the nearest one
        return self.transform._apply_image_or_video_transform(
            crop,
            self.name,
            self.sign * value if signed else value,
            interpolation=self.transform.interpolation,
            fill=self.transform._fill,
        )


@devices
@kinds
def test_dalis_operations_are_torchvisions(spec, kind, device, monkeypatch):
    """Each at two magnitudes, of both signs, of four photos or more."""
    cases = [(name, *more) for name in OPERATIONS for more in ((7, False), (23, True))]
    spec = replace(spec, auto_augment=kind, batch_size=23)
    fast = _loaders("dali", replace(spec, device=torch.device(device))).train
    exact = _loaders("reference", spec).train
    for first in range(0, 4 * len(cases), 23):
        of_batch = [cases[(first + i) % len(cases)] for i in range(23)]
        fed, chosen = [], []
        for name, magnitude, negative in of_batch:
            numbers = _numbers(OPERATIONS.index(name), magnitude, negative)
            pair = (IDENTITY, numbers) if kind == "rand" and negative else (numbers, IDENTITY)
            fed.append(np.concatenate(pair))
            level = RAND_MAGNITUDE if kind == "rand" else magnitude
            chosen.append(_Chosen(kind, name, level, negative))
        monkeypatch.setattr(dali, "uniforms", lambda *_, fed=fed: np.stack(fed))
        each = iter(chosen)
        monkeypatch.setattr(reference, "augment", lambda crop, *_, each=each: next(each)(crop))
        a, b = _by_sample(fast, 0), _by_sample(exact, 0)
        for i, case in zip(b, of_batch, strict=True):
            assert 255 * (a[i].cpu() - b[i]).abs().mean() < TOLERANCE[device], case


@kinds
@backends
def test_all_sizes_show_the_same_augmented_crop(spec, backend, kind):
    for batch in _loaders(backend, replace(spec, auto_augment=kind)).train:
        large, small = batch.images
        again = torch.nn.functional.interpolate(large, small.shape[-2:], mode="area")
        assert (again - small).abs().mean(dim=(1, 2, 3)).max() < 0.03


@random_cases
def test_epoch_and_seed_draw_another_augmentation(spec, backend, kind, monkeypatch):
    names = {"dali": "pipelines.dali.loader", "ffcv": "pipelines.ffcv.loader"}
    module = importlib.import_module(names.get(backend, "pipelines.reference"))
    # The same crops and flips throughout: what differs is the augmentation.
    monkeypatch.setattr(
        module,
        "draw_crops",
        lambda spec, _epoch, indices: crop_params(0, 0, indices, len(spec.sizes), spec.flip),
    )
    spec = replace(spec, auto_augment=kind)
    train = _loaders(backend, spec).train
    one = _by_sample(train, 0)
    other_seed = _by_sample(_loaders(backend, replace(spec, seed=1)).train, 0)
    for two in (_by_sample(train, 1), other_seed):
        both = one.keys() & two.keys()
        assert sum(torch.equal(one[i], two[i]) for i in both) < len(both) / 3


@kinds
@backends
def test_crops_of_a_few_pixels_are_augmented(tmp_path, backend, kind, recwarn):
    for i, (height, width) in enumerate([(1, 1), (1, 7), (7, 1), (2, 300), (300, 2), (3, 3)]):
        for split in ("train", "val"):
            for copy in range(5):
                write_photo(tmp_path / split / "a" / f"{i}{copy}.JPEG", height, width, seed=i)
    spec = LoaderSpec(tmp_path, SIZES, 30, torch.device("cpu"), auto_augment=kind)
    train = _loaders(backend, spec).train
    assert all(len(_by_sample(train, epoch)) == 30 for epoch in range(4))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("on_gpu", "training", "evaluation"),
    [(False, "crop_graph", "image_graph"), (True, "training_graph", "eval_graph")],
)
def test_only_augmented_training_pays_for_dalis_conditionals(
    spec, monkeypatch, on_gpu, training, evaluation
):
    built = []
    real = dali_graph.pipeline_def

    def spy(graph, enable_conditionals):
        built.append((graph.__name__, enable_conditionals))
        return real(graph, enable_conditionals=enable_conditionals)

    monkeypatch.setattr(dali_graph, "pipeline_def", spy)
    for each in (spec, replace(spec, auto_augment="trivial")):
        loaders = _loaders("dali", each)
        for loader in (with_the_graph_of_a_gpu(loaders) if on_gpu else loaders)[:2]:
            next(iter(loader))
    assert built == [
        (training, False),
        (evaluation, False),
        (training, True),
        (evaluation, False),
    ]
