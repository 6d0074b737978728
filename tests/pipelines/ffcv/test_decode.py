"""The compiled decoding: bytes for a GPU, looked-up values for the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import needs_ffcv

pytestmark = needs_ffcv
SIZES = (48, 32)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_table_replaces_the_bytes_that_come_without_one(beton, split):
    """The loader gives no table where a GPU normalises."""
    from pipelines.ffcv.beton import open_beton
    from pipelines.ffcv.decode import FINE, Job, eval_views, training_views
    from pipelines.sampler import crop_params

    table = np.arange(3 * 256, dtype=np.float32).reshape(3, 256)
    indices = np.array([3, 0, 11, 7])
    views, params = eval_views, ()
    if split == "train":
        views, params = training_views, (crop_params(0, 0, indices, len(SIZES), "independent"),)
    contents = open_beton(beton / f"{split}.beton")

    def written(table, dtype) -> list[np.ndarray]:
        outs = tuple(np.zeros((4, s, 3 * s), dtype) for s in SIZES)
        status = np.full(4, 99, np.uint8)
        job = Job(contents.samples.take(indices), table, outs, status)
        with contents.path.open("rb") as file:
            views(file.fileno(), job, 0, 3, *params)
        assert status.tolist() == [FINE] * 3 + [99]
        assert not any(out[3].any() for out in outs)  # the last sample was not asked for
        return [out[:3].reshape(3, s, s, 3) for s, out in zip(SIZES, outs, strict=True)]

    for values, bytes_ in zip(written(table, np.float32), written(None, np.uint8), strict=True):
        assert bytes_.std() > 10
        np.testing.assert_array_equal(values, bytes_ + np.float32([0, 256, 512]))


def test_the_code_of_a_batch_is_kept_for_the_next_process():
    from pipelines.ffcv import decode

    for function in (decode.training_views, decode.eval_views, decode.decode):
        assert "numba-" in str(function.stats.cache_path)
