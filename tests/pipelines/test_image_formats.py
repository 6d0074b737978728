"""One file is one picture: a table of formats and decoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags

from pipelines.dali import verify
from pipelines.dali.decoder import Decoder
from pipelines.dali.graphs import build_decoder
from pipelines.ffcv import ConvertOptions
from pipelines.image_formats import check_image, decode_error, decode_rgb, open_image, to_rgb
from pipelines.utils.errors import DataError, UsageError
from rsnet.inference import preprocess
from tests.conftest import needs_ffcv
from tests.helpers.bad_images import loaders_of
from tests.helpers.formats import GRAY, PICTURE, REFUSED, SAME, H, W
from tests.helpers.fuzzed import jpeg_with_scans, small_jpeg


def _encoder(max_megapixels: float = 100):
    from pipelines.ffcv.encoder import Encoder

    return Encoder(ConvertOptions(write_mode="raw", max_megapixels=max_megapixels))


def _by_dali(path: Path) -> np.ndarray:
    return np.asarray(build_decoder(1).run(files=[np.fromfile(path, np.uint8)])[1][0])


def _by_converter(path: Path) -> np.ndarray:
    stored = _encoder()(str(path), path.read_bytes, 0).stored
    return stored.data.reshape(stored.height, stored.width, 3)


def _by_predict(path: Path) -> np.ndarray:
    return np.asarray(preprocess.decode(path, "x", 32))


DECODERS = [_by_dali, pytest.param(_by_converter, marks=needs_ffcv), _by_predict]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "x.jpg"


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_the_same_picture(path, decoder):
    for name, data in SAME.items():
        path.write_bytes(data)
        expected = np.asarray(decode_rgb(data)).astype(int)
        pixels = decoder(path)
        assert pixels.shape == expected.shape == (H, W, 3), name
        assert np.abs(pixels - expected).max() <= 1, name


def test_every_format_is_close_to_the_picture_it_was_made_of():
    for name, data in SAME.items():
        gray = any(word in name for word in ("gray", "pgm", "4 bits"))
        original = np.asarray((GRAY if gray else PICTURE).convert("RGB")).astype(int)
        if "1 bit" not in name and name != "pbm":
            assert np.abs(np.asarray(decode_rgb(data)) - original).mean() < 15, name


def test_verify_accepts_what_all_decode_alike_and_no_more():
    decoder = Decoder()
    for name, data in SAME.items():
        assert decoder.reason_of("x", data) is None, name
    for name, (data, words) in REFUSED.items():
        assert words in (decoder.reason_of("x", data) or ""), name


@needs_ffcv
def test_what_decoders_see_differently_is_refused_by_all(path):
    encoder = _encoder()
    for name, (data, words) in REFUSED.items():
        path.write_bytes(data)
        assert words in (decode_error(path, path.read_bytes()) or ""), name
        assert words in str(encoder(str(path), path.read_bytes, 0)), name
        with pytest.raises(DataError, match=words):
            preprocess.decode(path, "x", 32)


def test_verify_finds_a_difference_that_no_rule_knows(monkeypatch):
    data, _ = REFUSED["tiff upside down"]
    monkeypatch.setattr("pipelines.image_formats._seen_differently", lambda image: None)  # noqa: ARG005
    reason = Decoder().reason_of("x", data)
    assert "DALI and PIL decode it to different pictures" in (reason or "")


@pytest.mark.parametrize(
    ("value", "byte"), [(0, 0), (128, 0), (129, 1), (25700, 100), (65535, 255)]
)
def test_16_bits_are_rounded_to_8(value, byte):
    image = Image.fromarray(np.full((2, 2), value, np.uint16))
    assert to_rgb(image).getpixel((0, 0)) == (byte,) * 3


def _huge(side: int) -> bytes:
    jpeg = bytearray(small_jpeg(1))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = side.to_bytes(2, "big") * 2
    return bytes(jpeg)


@needs_ffcv
def test_a_size_beyond_the_limit_is_refused_before_anything_is_decoded(path, monkeypatch):
    path.write_bytes(_huge(12000))
    monkeypatch.setattr("pipelines.dali.decoder.build_decoder", None)
    monkeypatch.setattr("pipelines.ffcv.encoder.decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "convert", None)
    words = "12000 x 12000 pixels are more than 100 megapixels"
    assert Decoder().reason_of(str(path), path.read_bytes()) == words
    assert str(_encoder()(str(path), path.read_bytes, 0)) == words
    assert decode_error(path, path.read_bytes()) == words
    with pytest.raises(DataError, match=words):
        preprocess.decode(path, "x", 32)


def test_the_limit_can_be_moved(path):
    path.write_bytes(SAME["png"])
    assert Decoder(max_megapixels=H * W / 1e6).reason_of("x", path.read_bytes()) is None
    with open_image(path.read_bytes()) as image, pytest.raises(DataError, match="megapixels"):
        check_image(image, H * W / 1e6 - 1e-6)
    for limit in (0.0, -1.0, float("nan"), 179.0):
        with pytest.raises(UsageError, match=r"--max-megapixels .*: above 0, and at most 178"):
            verify.VerifyOptions(path, max_megapixels=limit)


def test_training_unverified_formats_says_that_decoders_differ(data, run, capsys):
    (data / "val" / "ant" / "x.tif").write_bytes(SAME["tiff"])
    loaders_of(data)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: decoders do not agree on all of .tif 1; ")
    run(data)
    loaders_of(data, skip_bad=True)
    assert not capsys.readouterr().err


def test_a_tiff_whose_metadata_pil_cannot_read_is_refused(path):
    """Its XMP is text, where PIL takes bytes: EXIF's orientation is looked for there, too."""
    entries = TiffImagePlugin.ImageFileDirectory_v2()
    entries.tagtype[700] = TiffTags.ASCII
    entries[700] = "x"
    Image.new("RGB", (8, 8)).save(path, "TIFF", tiffinfo=entries)
    assert decode_error(path, path.read_bytes()) is not None


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    """Each of a few bytes takes libjpeg as long as all of the pixels do: megabytes take hours."""
    assert decode_error("", jpeg_with_scans(20)) is None
    assert decode_error("", jpeg_with_scans(100)) == "more than 100 scans; save it anew"


def test_scans_are_counted_in_linear_time_and_none_is_hidden_by_a_marker_without_a_length():
    """Such as FF 01, which decoders step over; what seems to be its length would hide what follows."""
    data = small_jpeg(0, progressive=True)
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    hidden = data[:end] + b"\xff\x01\xff\xff" + data[last:end] * 101 + data[end:]
    assert decode_error("", hidden) == "more than 100 scans; save it anew"
    few = data[:end] + b"\xff" * 10**6 + b"\x00" + data[end:] + b"\xff\xda" * 200
    assert decode_error("", few) is None
