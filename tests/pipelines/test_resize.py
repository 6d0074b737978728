"""The compiled resize against PIL's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import resize as resample
from pipelines.transforms import Rectangle, View, eval_view
from tests.conftest import write_photo


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Image.Image:
    path = tmp_path_factory.mktemp("photo") / "x.JPEG"
    write_photo(path, 200, 330, seed=3)
    return Image.open(path).convert("RGB")


def _resized(image, box, view, size, mirror=False):
    pixels = np.asarray(image)
    out = np.empty((size, 3 * size), np.uint8)
    resample.resize(pixels.reshape(len(pixels), -1), box, view, mirror, None, out)
    return out.reshape(size, size, 3)


def _difference(ours, theirs):
    return np.abs(ours.astype(int) - np.asarray(theirs).astype(int))


BOXES = [(0, 0, 200, 330), (10, 20, 100, 90), (150, 300, 50, 30), (199, 329, 1, 1), (3, 4, 2, 300)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [16, 17, 31, 96, 224])
def test_a_crop_is_pils_crop(photo, box, size):
    top, left, height, width = box
    crop = photo.crop((left, top, left + width, top + height))
    theirs = crop.resize((size, size), Image.Resampling.BILINEAR)
    difference = _difference(_resized(photo, Rectangle(*box), View(size, size, 0, 0), size), theirs)
    assert difference.mean() < 0.4
    assert difference.max() <= 2


@pytest.mark.parametrize("shape", [(200, 330), (330, 200), (50, 40), (400, 33)])
@pytest.mark.parametrize("size", [30, 64, 97])
def test_a_view_is_cut_from_pils_resized_image(photo, shape, size):
    image = photo.resize(shape[::-1])
    view = eval_view(*shape, size)
    resized = image.resize((view.width, view.height), Image.Resampling.BILINEAR)
    theirs = resized.crop((view.left, view.top, view.left + size, view.top + size))
    difference = _difference(_resized(image, Rectangle(0, 0, *shape), view, size), theirs)
    assert difference.mean() < 0.4
    assert difference.max() <= 2


def test_a_mirrored_image_is_the_image_mirrored(photo):
    box, view = Rectangle(5, 7, 120, 111), View(50, 50, 0, 0)
    straight = _resized(photo, box, view, 50)
    np.testing.assert_array_equal(_resized(photo, box, view, 50, mirror=True), straight[:, ::-1])


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
@pytest.mark.parametrize("shape", [(301, 453), (20, 30)])
def test_a_flat_area_stays_as_it_is(value, shape):
    image = np.full((*shape, 3), value, np.uint8)
    out = _resized(image, Rectangle(0, 0, *shape), View(96, 96, 0, 0), 96)
    assert (out == value).all()


def test_channels_do_not_mix():
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 1] = 255
    out = _resized(image, Rectangle(0, 0, 64, 64), View(32, 32, 0, 0), 32)
    assert (out == [0, 255, 0]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_table_replaces_each_channels_bytes(photo, dtype):
    table = np.arange(3 * 256).reshape(3, 256).astype(dtype)
    box, view = Rectangle(0, 0, 200, 330), View(32, 32, 0, 0)
    out = np.empty((32, 96), dtype)
    pixels = np.asarray(photo)
    resample.resize(pixels.reshape(200, -1), box, view, False, table, out)
    expected = _resized(photo, box, view, 32).astype(int) + np.array([0, 256, 512])
    np.testing.assert_array_equal(out.reshape(32, 32, 3), expected)


@pytest.mark.slow
def test_without_a_place_for_a_cache_it_still_compiles():
    code = (
        "from numba.core import caching; "
        "caching.CompileResultCacheImpl._locator_classes = []; "
        "from pipelines import resize as resample; "
        "resample._taps(8, 4, 0, 4)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
