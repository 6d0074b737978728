"""Automatic augmentation: torchvision's operations on the one crop, drawn by (seed, epoch, sample) alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from pipelines import ffcv, reference
from pipelines.batch import Loader, LoaderSpec
from pipelines.dali import DaliOptions, make_loaders
from pipelines.dali import graphs as dali_graph
from pipelines.dali import loader as dali
from pipelines.sampler import AUGMENTATION_LANE, crop_params, uniforms
from pipelines.sources.folder import scan_train_val
from pipelines.transforms import random_resized_crop
from pipelines.utils.errors import UsageError
from tests.conftest import write_photo
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

kinds = pytest.mark.parametrize("kind", ["trivial", "rand"])
# How the numbers are drawn does not depend on the kind.
random_cases = pytest.mark.parametrize(
    ("backend", "kind"), [("reference", "rand"), ("dali", "trivial")]
)
backends = pytest.mark.parametrize("backend", ["reference", "dali"])


@pytest.fixture
def spec(photos: Path) -> LoaderSpec:
    device = torch.device("cpu")
    return LoaderSpec(photos, SIZES, 4, device, normalize="unit", flip="shared")


def _loaders(backend: str, spec: LoaderSpec):
    if backend == "dali":
        return make_loaders(DaliOptions(workers=1), spec)
    return reference.make_loaders(reference.ReferenceOptions(), spec)


def _by_sample(loader: Loader, epoch: int) -> dict[int, torch.Tensor]:
    """The largest image of each sample."""
    loader.set_epoch(epoch)
    batches = zip(loader.schedule.batches(epoch), loader, strict=True)
    return {int(i): x for indices, b in batches for i, x in zip(indices, b.images[0], strict=True)}


@kinds
def test_the_reference_gives_torchvisions_augmentation_of_the_crop(spec, kind):
    images = _by_sample(_loaders("reference", replace(spec, auto_augment=kind)).train, 1)
    assert len(images) == 20
    for index, image in images.items():
        alone = np.array([index])
        params = crop_params(spec.seed, 1, alone, len(SIZES), "shared")
        with Image.open(scan_train_val(spec.data, True)[0].paths[index]) as whole:
            crop = F.crop(whole, *random_resized_crop(whole.height, whole.width, params, 0))
        torch.manual_seed(int(uniforms(spec.seed, 1, alone, 1, AUGMENTATION_LANE).item() * 2**53))
        view = F.resize(TORCHVISION[kind]()(crop), [64, 64])
        expected = F.hflip(view) if params.flip[0, 0] else view
        assert torch.equal((255 * image).round(), F.pil_to_tensor(expected).float())


def test_the_reference_leaves_pytorchs_generator_alone(spec):
    states = []
    for kind in (None, "trivial"):
        torch.manual_seed(0)
        _by_sample(_loaders("reference", replace(spec, auto_augment=kind)).train, 0)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def _equalized(channel: Image.Image) -> Image.Image:
    """cv2.equalizeHist: the darkest value becomes 0, the others their share of the other pixels."""
    counts = np.array(channel.histogram())
    darkest = counts[counts.nonzero()[0][0]]
    share = (counts.cumsum() - darkest) / max(counts.sum() - darkest, 1)
    return channel.point(np.rint(255 * share.clip(0)).astype(int).tolist())


class _Chosen:
    """torchvision's one operation, at a magnitude that is not drawn."""

    def __init__(self, kind: str, name: str, magnitude: int, negative: bool) -> None:
        self.transform, self.name, self.index = TORCHVISION[kind](), name, magnitude
        # torchvision counts a shear the other way round; its sign is a coin's either way.
        self.sign = -1 if negative != name.startswith("Shear") else 1

    def __call__(self, crop: Image.Image) -> Image.Image:
        if self.name == "Equalize":  # DALI's is OpenCV's; PIL's is far from even on a small crop
            return Image.merge("RGB", [_equalized(channel) for channel in crop.split()])
        magnitudes, signed = self.transform._AUGMENTATION_SPACE[self.name]
        all_of_them = magnitudes(MAGNITUDES, crop.height, crop.width)
        value = 0.0 if all_of_them is None else float(all_of_them[self.index])
        if self.name.startswith("Translate"):
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
    spec = replace(spec, auto_augment=kind, batch_size=23)
    fast = _loaders("dali", replace(spec, device=torch.device(device))).train
    exact = _loaders("reference", spec).train
    for operation, name in enumerate(OPERATIONS):
        for negative, magnitude in ((False, 7), (True, 23)):
            numbers = (np.array([operation, magnitude, 1 - negative]) + 0.5) / (14, MAGNITUDES, 2)
            identity = np.full(3, 13.5 / 14)
            pair = (identity, numbers) if kind == "rand" and negative else (numbers, identity)
            fed = np.tile(np.concatenate(pair), (23, 1))
            monkeypatch.setattr(dali, "uniforms", lambda *_, fed=fed: fed)
            chosen = _Chosen(kind, name, RAND_MAGNITUDE if kind == "rand" else magnitude, negative)
            monkeypatch.setitem(reference._AUGMENTATIONS, kind, lambda chosen=chosen: chosen)
            a, b = _by_sample(fast, 0), _by_sample(exact, 0)
            errors = torch.stack([255 * (a[i].cpu() - b[i]).abs().mean() for i in b])
            assert errors.max() < TOLERANCE[device], (name, negative, errors)


@kinds
@backends
def test_all_sizes_show_the_same_augmented_crop(spec, backend, kind):
    for batch in _loaders(backend, replace(spec, auto_augment=kind)).train:
        large, small = batch.images
        again = torch.nn.functional.interpolate(large, small.shape[-2:], mode="area")
        assert (again - small).abs().mean(dim=(1, 2, 3)).max() < 0.03


@kinds
@backends
def test_validation_is_not_augmented(spec, backend, kind):
    plain, other = (_loaders(backend, replace(spec, auto_augment=a)).val for a in (None, kind))
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a.images[0], b.images[0])


@random_cases
def test_a_samples_augmentation_does_not_depend_on_its_batch(spec, backend, kind):
    spec = replace(spec, auto_augment=kind)
    fours = _by_sample(_loaders(backend, spec).train, 3)
    loader = _loaders(backend, replace(spec, batch_size=5)).train
    _by_sample(loader, 0)
    fives = _by_sample(loader, 3)
    assert len(fours.keys() & fives.keys()) == 20
    assert all(torch.equal(fours[i], fives[i]) for i in fives)


@random_cases
def test_a_loader_continues_with_the_same_augmentations(spec, backend, kind):
    spec = replace(spec, auto_augment=kind)
    train = _loaders(backend, spec).train
    expected = list(train)
    next(iter(train))
    again = _loaders(backend, spec).train
    again.load_state_dict(train.state_dict())
    for a, b in zip(again, expected[1:], strict=True):
        assert torch.equal(a.images[1], b.images[1])


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}])
@random_cases
def test_epoch_and_seed_draw_another_augmentation(spec, backend, kind, other, monkeypatch):
    module = {"dali": dali, "reference": reference}[backend]
    # The same crops and flips throughout: what differs is the augmentation.
    monkeypatch.setattr(
        module, "crop_params", lambda _seed, _epoch, *rest: crop_params(0, 0, *rest)
    )
    spec = replace(spec, auto_augment=kind)
    one = _by_sample(_loaders(backend, spec).train, 0)
    seed, epoch = other.get("seed", 0), other.get("epoch", 0)
    two = _by_sample(_loaders(backend, replace(spec, seed=seed)).train, epoch)
    both = one.keys() & two.keys()
    assert sum(torch.equal(one[i], two[i]) for i in both) < len(both) / 3


@kinds
@backends
def test_crops_of_a_few_pixels_are_augmented(tmp_path, backend, kind, recwarn):
    for i, (height, width) in enumerate([(1, 1), (1, 7), (7, 1), (2, 300), (300, 2), (3, 3)]):
        for split in ("train", "val"):
            write_photo(tmp_path / split / "a" / f"{i}.JPEG", height, width, seed=i)
    spec = LoaderSpec(tmp_path, SIZES, 6, torch.device("cpu"), auto_augment=kind)
    train = _loaders(backend, spec).train
    assert all(len(_by_sample(train, epoch)) == 6 for epoch in range(20))
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


@kinds
def test_ffcv_refuses_before_it_looks_for_the_data(spec, kind):
    spec = replace(spec, data=Path("nowhere"), auto_augment=kind)
    with pytest.raises(UsageError) as caught:
        ffcv.make_loaders(ffcv.FfcvOptions(), spec)
    assert str(caught.value) == (
        f"--auto-augment {kind}: train_ffcv.py has no automatic augmentation; "
        "use train_dali.py, or leave it out"
    )


def test_ffcv_evaluates_a_model_that_was_trained_with_augmentation(spec, monkeypatch):
    monkeypatch.setitem(sys.modules, "pipelines.ffcv.loader", None)
    spec = replace(spec, auto_augment="trivial")
    with pytest.raises(
        UsageError, match="FFCV cannot be imported"
    ):  # which comes after the refusal
        ffcv.make_loaders(ffcv.FfcvOptions(), spec, with_train=False)
