"""Whatever bytes an image file has: all decoders see the same picture, or `verify` lists the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from pipelines.dali.decoder import Decoder, decoder_messages
from pipelines.dali.graphs import build_decoder
from pipelines.ffcv import ConvertOptions
from pipelines.image_formats import decode_rgb
from pipelines.utils.errors import DataError
from rsnet.inference import preprocess
from tests.conftest import needs_ffcv
from tests.helpers.formats import SAME
from tests.helpers.fuzzed import fuzzed_jpegs
from tests.helpers.fuzzing import damaged, efforts

KINDS = [
    "jpeg",
    "jpeg 4:4:4 progressive",
    "jpeg cmyk",
    "png",
    "png gray 16",
    "tiff",
    "pgm",
    "bmp",
    "webp",
]


def _by_pil(decode, path: Path) -> np.ndarray | None:
    try:
        return np.asarray(decode(path)).astype(int)
    except DataError:
        return None


def _check(path: Path, data: bytes) -> bool:
    """Whether `verify` finds the file sound; then all decoders give the same picture."""
    from pipelines.ffcv.encoder import Encoded, Encoder

    path.write_bytes(data)
    with decoder_messages() as messages:
        decoder = Decoder()
        sound = decoder.reason_of(str(path), data) is None and not decoder.words(
            str(path), data, messages
        )
        encoded = Encoder(ConvertOptions(write_mode="raw"))(str(path), path.read_bytes, 0)
        by_pil = _by_pil(lambda p: decode_rgb(p.read_bytes()), path)
        by_predict = _by_pil(lambda p: preprocess.decode(p, "x", 32), path)
        if not sound:
            return False
        images = build_decoder(1).run(files=[np.frombuffer(data, np.uint8)])[1]
    expected = np.asarray(images[0]).astype(int)
    assert by_pil is not None
    assert isinstance(encoded, Encoded)
    pictures = [by_pil, encoded.stored.data.reshape(expected.shape)]
    pictures += [by_predict] if by_predict is not None else []  # else a row is too long for it
    for picture in pictures:
        assert np.abs(picture - expected).max() <= 1
    return True


@needs_ffcv
@efforts
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_the_same_picture_for_all_or_is_listed(tmp_path, kind, effort):
    @effort
    @given(damaged(SAME[kind]))
    def check(data: bytes) -> None:
        _check(tmp_path / "x.jpg", data)

    check()


@needs_ffcv
def test_damaged_tables_are_listed_or_of_no_effect(tmp_path):
    sound = [_check(tmp_path / "x.jpg", data) for data in fuzzed_jpegs(60, seed=1)]
    assert 0 < sum(sound) < 60
