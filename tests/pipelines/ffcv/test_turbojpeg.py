"""TurboJPEG: one image's fate never depends on the images decoded before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.utils.errors import DataError
from tests.conftest import needs_ffcv
from tests.helpers.betons import sidecar_of
from tests.helpers.fuzzed import fuzzed_jpegs, small_jpeg, with_broken_huffman_table

pytestmark = needs_ffcv


def _decoded(jpeg: bytes) -> bytes | str:
    from pipelines.ffcv.turbojpeg import decode_jpeg

    try:
        return decode_jpeg(np.frombuffer(jpeg, np.uint8)).tobytes()
    except DataError as error:
        return str(error)


def test_no_damaged_jpeg_changes_what_a_sound_one_decodes_to():
    sound = small_jpeg(1)
    expected = _decoded(sound)
    for jpeg in fuzzed_jpegs(200):
        _decoded(jpeg)
        assert _decoded(sound) == expected


@pytest.mark.parametrize("before", [{}, {"quality": 10}, {"progressive": True}])
def test_a_damaged_jpeg_does_not_borrow_the_tables_of_the_image_before_it(before):
    for jpeg in fuzzed_jpegs(200):
        alone = _decoded(jpeg)
        _decoded(small_jpeg(2, **before))
        assert _decoded(jpeg) == alone


def _write_samples(path: Path, jpegs: list[bytes]) -> None:
    from pipelines.ffcv.beton import JPG, BetonWriter, Stored

    with path.open("wb") as file:
        writer = BetonWriter(file, len(jpegs))
        for jpeg in jpegs:
            writer.add(Stored(JPG, 64, 64, np.frombuffer(jpeg, np.uint8)), label=0)
        writer.finish()


def test_a_jpeg_of_tables_alone_is_damaged_whatever_the_memory_held_before(monkeypatch):
    """libjpeg-turbo calls its header read, and says nothing of its size."""
    from pipelines.ffcv import turbojpeg

    jpeg = small_jpeg(0)
    frame = jpeg.index(b"\xff\xc0")
    tables = np.frombuffer(jpeg[:frame] + bytes(len(jpeg) - frame), np.uint8)
    empty = np.empty

    def used(shape, dtype):
        numbers = empty(shape, dtype)
        numbers.fill(-7 if dtype is np.int32 else 0)
        return numbers

    monkeypatch.setattr(np, "empty", used)
    with pytest.raises(DataError):
        turbojpeg.decode_jpeg(tables)


def test_the_compiled_decoder_gives_a_sample_the_same_pixels_in_any_order(tmp_path):
    from pipelines.ffcv.beton import open_beton
    from pipelines.ffcv.decode import FINE, Job, eval_views

    jpegs = [f for pair in zip(fuzzed_jpegs(60), [small_jpeg(1)] * 60, strict=True) for f in pair]
    _write_samples(tmp_path / "x.beton", jpegs)
    samples = open_beton(tmp_path / "x.beton").samples

    def views(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out, status = np.zeros((len(order), 64, 192), np.uint8), np.empty(len(order), np.uint8)
        with (tmp_path / "x.beton").open("rb") as file:
            job = Job(samples.take(order), None, (out,), status)
            eval_views(file.fileno(), job, 0, len(order))
        back = np.argsort(order)
        return out[back], status[back]

    forward, backward, mixed = map(
        views,
        (np.arange(120), np.arange(120)[::-1], np.random.default_rng(0).permutation(120)),
    )
    for pixels, status in (backward, mixed):
        np.testing.assert_array_equal(status, forward[1])
        np.testing.assert_array_equal(pixels, forward[0])
    assert (forward[1][1::2] == FINE).all()  # every sound one
    assert 0 < (forward[1][::2] == FINE).sum() < 60


def test_a_conversion_leaves_out_the_damaged_jpeg_alone(tmp_path, convert):
    """The first file of a thread broke its decoder for all that followed."""
    folder = tmp_path / "a" / "val" / "x"
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{i:02}.jpg").write_bytes(small_jpeg(i))
    (folder / "00.jpg").write_bytes(with_broken_huffman_table(small_jpeg(0)))
    for workers in (1, 3):
        code, out, _ = convert(
            "--data", tmp_path / "a", "--output", tmp_path / str(workers), "--splits", "val",
            "--skip-bad", "--workers", workers,
        )  # fmt: skip
        assert code == 0
        assert "11 copied" in out
    one, three = (sidecar_of(tmp_path / w / "val.beton") for w in "13")
    assert [skipped["image"] for skipped in one["skipped"]] == ["x/00.jpg"]
    assert one["sha256"] == three["sha256"]


def test_verify_finds_the_damaged_sample_alone(tmp_path, convert):
    jpegs = [small_jpeg(i) for i in range(12)]
    jpegs[3] = with_broken_huffman_table(jpegs[3])
    _write_samples(tmp_path / "x.beton", jpegs)
    code, out, _ = convert("--verify", tmp_path / "x.beton", "--workers", 1)
    assert code == 1
    assert "sample 3 " in out
    assert "11 of 12 samples are sound" in out
