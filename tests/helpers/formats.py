"""One picture in many formats, and those that decoders do not agree on."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

H, W = 36, 52
_ROWS, _COLUMNS = np.mgrid[:H, :W]
_RGB = np.stack(
    [255 * _COLUMNS / (W - 1), 255 * _ROWS / (H - 1), 127 + 99 * np.sin((_COLUMNS + _ROWS) / 5)], -1
).astype(np.uint8)
PICTURE = Image.fromarray(_RGB)
GRAY = PICTURE.convert("L")
_L = np.asarray(GRAY)
_L16 = _L.astype(np.uint16) * 256 + (_COLUMNS % 256).astype(np.uint16)
_RGB16 = _RGB.astype(np.uint16) * 256 + (_COLUMNS[..., None] % 256).astype(np.uint16)
_ALPHA = Image.fromarray((2 * _COLUMNS).astype(np.uint8))
_TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(_ALPHA)
    return image


def _png(rows: np.ndarray, depth: int, color: int) -> bytes:
    """rows: (H, bytes of a row)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", W, H, depth, color, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def _pnm(kind: int, pixels: np.ndarray, maximum: int) -> bytes:
    wide = pixels.astype(">u2" if maximum > 255 else np.uint8)
    return f"P{kind}\n{W} {H}\n{maximum}\n".encode() + wide.tobytes()


def _bmp16(masks: tuple[int, ...]) -> bytes:
    start = 54 + 4 * len(masks)
    red, green, blue = (_RGB[::-1, :, i].astype(np.uint16) >> 3 for i in range(3))
    pixels = (red << 11 | green << 6 | blue) if masks else (red << 10 | green << 5 | blue)
    return (
        struct.pack("<2sIHHI", b"BM", start + 2 * H * W, 0, 0, start)
        + struct.pack("<IiiHHIIiiII", 40, W, H, 1, 16, 3 if masks else 0, 2 * H * W, 0, 0, 0, 0)
        + struct.pack(f"<{len(masks)}I", *masks)
        + pixels.astype("<u2").tobytes()
    )


def _without_adobes_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


_PALETTE, _CMYK = PICTURE.quantize(64), PICTURE.convert("CMYK")
SAME = {
    "jpeg gray": _saved(GRAY, "JPEG"),
    "jpeg": _saved(PICTURE, "JPEG"),
    "jpeg 4:4:4 progressive": _saved(PICTURE, "JPEG", subsampling=0, progressive=True),
    "jpeg rgb": _saved(PICTURE, "JPEG", keep_rgb=True),
    "jpeg cmyk": _saved(_CMYK, "JPEG"),
    "jpeg turned": _saved(PICTURE, "JPEG", exif=_TURNED),
    "png": _saved(PICTURE, "PNG"),
    "png gray": _saved(GRAY, "PNG"),
    "png 1 bit": _saved(GRAY.convert("1"), "PNG"),
    "png 4 bits": _png(_L[:, ::2] & 240 | _L[:, 1::2] >> 4, 4, 0),
    "png palette": _saved(_PALETTE, "PNG"),
    "png palette, transparent": _saved(_PALETTE, "PNG", transparency=3),
    "png alpha": _saved(_with_alpha(PICTURE), "PNG"),
    "png gray, alpha": _saved(_with_alpha(GRAY), "PNG"),
    "png gray 16": _png(_L16.astype(">u2"), 16, 0),
    "png rgb 16": _png(_RGB16.astype(">u2").reshape(H, -1), 16, 2),
    "png turned": _saved(PICTURE, "PNG", exif=_TURNED),
    "pgm": _pnm(5, _L, 255),
    "ppm": _pnm(6, _RGB, 255),
    "pgm 16": _pnm(5, _L16, 65535),
    "ppm 16": _pnm(6, _RGB16, 65535),
    "pbm": _saved(GRAY.convert("1"), "PPM"),
    "bmp": _saved(PICTURE, "BMP"),
    "bmp palette": _saved(_PALETTE, "BMP"),
    "bmp alpha": _saved(_with_alpha(PICTURE), "BMP"),
    "tiff": _saved(PICTURE, "TIFF"),
    "tiff lzw": _saved(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff gray 16": _saved(Image.fromarray(_L16), "TIFF"),
    "tiff cmyk": _saved(_CMYK, "TIFF"),
    "tiff palette": _saved(_PALETTE, "TIFF"),
    "tiff alpha": _saved(_with_alpha(PICTURE), "TIFF"),
    "webp": _saved(PICTURE, "WEBP"),
    "webp alpha": _saved(_with_alpha(PICTURE), "WEBP", lossless=True),
    "webp turned": _saved(PICTURE, "WEBP", exif=_TURNED),
}
# A file, and words of the reason.
REFUSED = {
    "jpeg cmyk, no marker": (_without_adobes_marker(_saved(_CMYK, "JPEG")), "Adobe's marker"),
    "pgm 4 bits": (_pnm(5, _L >> 4, 15), "a maximum of 15"),
    "pgm 10 bits": (_pnm(5, _L16 >> 6, 1023), "a maximum of 1023"),
    "ppm 5 bits": (_pnm(6, _RGB >> 3, 31), "a maximum of 31"),
    "pfm": (f"Pf\n{W} {H}\n-1.0\n".encode() + (_L / 255).astype("<f4").tobytes(), "mode F"),
    "bmp 555": (_bmp16(()), "16 bits a pixel"),
    "bmp 565": (_bmp16((0xF800, 0x7E0, 0x1F)), "16 bits a pixel"),
    "tiff float": (_saved(Image.fromarray(_L.astype(np.float32)), "TIFF"), "mode F"),
    "tiff 32": (_saved(Image.fromarray(_L.astype(np.int32)), "TIFF"), "mode I"),
    "tiff gray, alpha": (_saved(_with_alpha(GRAY), "TIFF"), "grayscale with alpha"),
    "tiff upside down": (_saved(PICTURE, "TIFF", tiffinfo={274: 3}), "TIFF's orientation"),
    "tiff turned": (_saved(PICTURE, "TIFF", tiffinfo={274: 6}), "TIFF's orientation"),
    "jpeg 2000": (_saved(PICTURE, "JPEG2000"), "cannot identify image file"),
}
