"""JPEGs with damages of many kinds, the same in every run."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

DQT, DHT = 0xDB, 0xC4


def small_jpeg(seed: int, quality: int = 90, **options) -> bytes:
    """A 64 x 64 JPEG; `options`: those of PIL."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((64, 64), 3).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def without_segments(jpeg: bytes, marker: int) -> bytes:
    """The JPEG without its segments of this marker."""
    kept, at = bytearray(jpeg[:2]), 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] != marker:
            kept += jpeg[at:end]
        at = end
    return bytes(kept) + jpeg[at:]


def with_broken_huffman_table(jpeg: bytes) -> bytes:
    """The JPEG with a table of more codes than there can be."""
    at = jpeg.find(b"\xff\xc4") + 5
    return jpeg[:at] + b"\xff" * 16 + jpeg[at + 16 :]


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG, with its last scan so many times more: libjpeg decodes each."""
    file = io.BytesIO()
    comment = b"\xff\xda" * 200  # no scans
    Image.new("L", (64, 64), 128).save(file, "JPEG", progressive=True, comment=comment)
    data = file.getvalue()
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:end] + data[last:end] * count + data[end:] + comment


def fuzzed_jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Damaged files: missing and broken tables, flipped bytes anywhere, cuts and holes."""
    rng = np.random.default_rng(seed)
    files = [
        damaged
        for options in ({}, {"progressive": True}, {"optimize": True})
        for jpeg in [small_jpeg(len(options), **options)]
        for damaged in (
            without_segments(jpeg, DQT),
            without_segments(jpeg, DHT),
            with_broken_huffman_table(jpeg),
        )
    ]
    while len(files) < count:
        data = bytearray(small_jpeg(int(rng.integers(99)), progressive=bool(rng.integers(2))))
        at, kind = int(rng.integers(2, len(data) - 20)), rng.integers(4)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at : at + 20] = bytes(20)
        else:  # most of a small file is headers
            for place in rng.integers(2, len(data) if kind == 2 else 600, 3):
                data[place] = rng.integers(256)
        files.append(bytes(data))
    return files
