"""DALI's graphs: paths or encoded images, and random numbers, in. The only module that imports DALI.

On a GPU the normalised images of every size come out, on the CPU decoded bytes, which `dali.loader` resizes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali import backend, fn, math, pipeline_def, types
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from nvidia.dali.pipeline import do_not_convert

from pipelines.auto_augment import MAGNITUDES, OPERATIONS_OF
from pipelines.batch import LoaderSpec
from pipelines.dali.options import DaliOptions
from pipelines.normalize import MEAN_STD
from pipelines.transforms import CROP_RATIO, CROP_TRIES, eval_short_side

# Called once a batch; returns the outputs of the graph's external source, or raises StopIteration.
Feed = Callable[[], list[Any]]

# do_not_convert: in a graph with conditionals DALI rewrites the source of every function that it calls.
# These have no `if` over a part of a batch, and rewriting all of them took five seconds at each start.
_SUITES = {
    kind: [do_not_convert(functools.partial(operation)) for operation in suite]
    for kind, suite in {
        "trivial": get_trivial_augment_wide_suite(),
        "rand": get_rand_augment_suite(use_shape=True, max_translate_rel=150 / 331),
    }.items()
}


def build(
    graph: Any, feed: Feed, options: DaliOptions, spec: LoaderSpec, with_paths: bool = True
) -> Any:
    """Build the pipeline of one of the four graphs below. with_paths: DALI reads the files itself."""
    on_gpu = spec.device.type == "cuda"
    # Augmentation needs `if` over a part of a batch, which makes DALI rewrite the graph's source.
    conditional = graph in (training_graph, crop_graph) and spec.auto_augment is not None
    pipeline = pipeline_def(graph, enable_conditionals=conditional)(
        feed,
        options,
        spec,
        with_paths,
        batch_size=spec.batch_size,
        num_threads=options.workers,
        device_id=(spec.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=options.prefetch,
    )
    with warnings.catch_warnings():
        # Of NPP and cuFFT, which are installed apart; no graph here uses them.
        warnings.filterwarnings("ignore", "nvidia-dali-.* no longer shipped with CUDA runtime")
        pipeline.build()
    return pipeline


def crop_graph(
    feed: Feed, options: DaliOptions, spec: LoaderSpec, with_paths: bool
) -> tuple[Any, Any]:
    """Give training's crops as bytes, (height, width, 3), and int32 flips, one of each size."""
    # The decoder reads the rectangle only, which saves most of the inverse transform and all of the copy.
    decode = functools.partial(fn.decoders.image_slice, **_decoder(options, spec.device))
    return _training_crop(feed, spec, with_paths, decode)


def training_graph(
    feed: Feed, options: DaliOptions, spec: LoaderSpec, with_paths: bool
) -> tuple[Any, ...]:
    """Give training's normalised images, (s, s, 3) of each size."""

    def decode(encoded: Any, **rectangle: Any) -> Any:
        # Decode the whole image, as in evaluation. With an nvJPEG before 13.2, such as CUDA 12's,
        # nvImageCodec 0.9 decodes rectangles of chroma-subsampled JPEGs, which most are, on the CPU, with a
        # warning each time; on some GPUs, H100s among them, decoding rectangles is reported to fail or crash.
        return fn.slice(fn.decoders.image(encoded, **_decoder(options, spec.device)), **rectangle)

    crop, flips = _training_crop(feed, spec, with_paths, decode)
    return tuple(
        _normalized(_resized(crop, [size, size]), spec, mirror=flips[i])
        for i, size in enumerate(spec.all_sizes)
    )


def image_graph(feed: Feed, options: DaliOptions, spec: LoaderSpec, with_paths: bool) -> tuple[Any]:
    """Give evaluation's images as bytes, (height, width, 3)."""
    (images,) = fn.external_source(source=feed, num_outputs=1, batch=True)
    return (_whole(_encoded(images, with_paths), **_decoder(options, spec.device))[1],)


def eval_graph(
    feed: Feed, options: DaliOptions, spec: LoaderSpec, with_paths: bool
) -> tuple[Any, ...]:
    """Give evaluation's normalised images, (s, s, 3) of each size."""
    (images,) = fn.external_source(source=feed, num_outputs=1, batch=True)
    shape, image = _whole(_encoded(images, with_paths), **_decoder(options, spec.device))
    outputs = []
    for size in spec.sizes:
        lengths = [_long_or_short(shape[axis], shape[1 - axis], size) for axis in (0, 1)]
        starts = [_center_start(length, size) for length in lengths]
        outputs.append(
            _normalized(
                _resized(image, fn.cast(fn.stack(*lengths), dtype=types.FLOAT)),
                spec,
                crop=(size, size),
                # DALI wants a share of the margin; rounding gives the whole number back.
                crop_pos_y=starts[0] / math.max(lengths[0] - size, 1),
                crop_pos_x=starts[1] / math.max(lengths[1] - size, 1),
                rounding="round",
            )
        )
    return tuple(outputs)


def build_decoder(batch_size: int) -> Any:
    """Build the pipeline that decodes whole files on the CPU: `run(files=...)`, at most `batch_size`.

    It takes their bytes: DALI's error does not say whether it could not read or not decode a file.
    """
    pipeline = pipeline_def(_decoding_graph)(
        batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1
    )
    pipeline.build()
    return pipeline


def release_memory() -> None:
    """Return to the GPU what DALI keeps of pipelines that are gone, which it alone could use again."""
    with contextlib.suppress(RuntimeError):  # of a GPU that has failed, which is told already
        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]


def path_batch(paths: list[str]) -> list[Any]:
    """Return the paths as `fn.io.file.read` takes them."""
    return [np.frombuffer(os.fsencode(path), np.uint8) for path in paths]


def _training_crop(
    feed: Feed, spec: LoaderSpec, with_paths: bool, decode: Callable[..., Any]
) -> tuple[Any, Any]:
    """Give what `crop_graph` does. decode: (encoded, start, shape, axes) -> a rectangle of the image."""
    images, area, ratio, position, flips, *numbers = fn.external_source(
        source=feed, num_outputs=5 if spec.auto_augment is None else 6, batch=True
    )
    encoded = _encoded(images, with_paths)
    start, shape = _crop_rectangle(encoded, area, ratio, position)
    crop = decode(encoded, start=start, shape=shape, axes=[0, 1])
    if spec.auto_augment is not None:
        crop = _augmented(crop, shape, numbers[0], spec)
    return crop, flips


def _encoded(images: Any, with_paths: bool) -> Any:
    return fn.io.file.read(images) if with_paths else images


def _decoding_graph() -> tuple[Any, Any]:
    encoded = fn.external_source(name="files", batch=True)
    return _whole(encoded, **_decoder(DaliOptions(), torch.device("cpu")))


def _whole(encoded: Any, **decoder: Any) -> tuple[Any, Any]:
    """Decode whole files; give (height, width, channels) and the pixels of each."""
    shape = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT32)
    return shape, fn.decoders.image(encoded, **decoder)


def _crop_rectangle(encoded: Any, area: Any, ratio: Any, position: Any) -> tuple[Any, Any]:
    """Do `transforms.random_resized_crop` as a graph: (top, left) and (height, width), int32.

    In double precision, as there, so that both give the same rectangle.
    """
    shape = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT32)
    height, width = shape[0], shape[1]
    pixels = _float(height) * _float(width)
    heights = _rounded(math.sqrt(area * pixels / ratio))  # (CROP_TRIES,)
    widths = _rounded(math.sqrt(area * pixels * ratio))
    fits = (heights > 0) * (heights <= height) * (widths > 0) * (widths <= width)
    tries = types.Constant(np.arange(CROP_TRIES, dtype=np.int32))
    rank = _int(tries + CROP_TRIES * (1 - _int(fits)))
    first = fn.reductions.min(rank)
    chosen = _int(rank == first) * _int(fits)
    found = _int(first < CROP_TRIES)
    missed = 1 - found

    fallback_h = math.min(height, _rounded(_float(width) / CROP_RATIO[0]))
    fallback_w = math.min(width, _rounded(_float(height) * CROP_RATIO[1]))
    crop_h = found * fn.reductions.max(heights * chosen) + missed * fallback_h
    crop_w = found * fn.reductions.max(widths * chosen) + missed * fallback_w
    margin_h, margin_w = height - crop_h, width - crop_w
    top = found * _int(math.floor(position[0] * (margin_h + 1))) + missed * (margin_h // 2)
    left = found * _int(math.floor(position[1] * (margin_w + 1))) + missed * (margin_w // 2)
    return fn.stack(top, left), fn.stack(crop_h, crop_w)


def _augmented(image: Any, shape: Any, numbers: Any, spec: LoaderSpec) -> Any:
    """Do `auto_augment.augment` by DALI's operations, with torchvision's ranges, border and filter.

    DALI's `trivial_augment_wide` and `rand_augment` are not called, because they draw from the pipeline's
    generators: by place in the batch, anew after --resume.
    """
    assert spec.auto_augment is not None
    suite = _SUITES[spec.auto_augment]
    for i in range(OPERATIONS_OF[spec.auto_augment]):
        operation, magnitude, sign = (numbers[3 * i + k] for k in range(3))
        bin_ = _int(math.floor(magnitude * MAGNITUDES))
        if spec.auto_augment == "rand":
            bin_ = spec.ra_magnitude
        # DALI's suites use two operators that it has renamed, and warn about it despite any filters.
        with warnings.catch_warnings(record=True):
            image = select(
                suite,
                _int(math.floor(operation * len(suite))),
                data=image,
                magnitude_bin=signed_bin(bin_, random_sign=_int(sign < 0.5)),
                num_magnitude_bins=MAGNITUDES,
                shape=shape,
                fill_value=0,
                interp_type=types.INTERP_NN,
            )
    return image


def _long_or_short(length: Any, other: Any, size: int) -> Any:
    """Return a side after torchvision's Resize(`eval_short_side(size)`): the long one is rounded down."""
    short = eval_short_side(size)
    return math.max(short, short * length // other)


def _center_start(length: Any, size: int) -> Any:
    """Return where torchvision's CenterCrop starts: round((length - size) / 2), halves to even."""
    margin = length - size
    half = margin // 2
    return half + (margin - 2 * half) * (half - 2 * (half // 2))


def _decoder(options: DaliOptions, device: torch.device) -> dict[str, Any]:
    """Return the decoder's arguments."""
    # adjust_orientation: PIL ignores EXIF. jpeg_fancy_upsampling: the GPU decodes as the CPU does.
    common = {"output_type": types.RGB, "adjust_orientation": False}
    if device.type != "cuda":
        return common | {"device": "cpu"}
    return common | {
        "device": "mixed",
        "hw_decoder_load": options.decoder_hw_load,
        "jpeg_fancy_upsampling": True,
    }


def _resized(image: Any, size: Any) -> Any:
    """Resize 8-bit values by `transforms.RESIZE_FILTER`."""
    return fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=True)


def _normalized(image: Any, spec: LoaderSpec, **crop_and_mirror: Any) -> Any:
    """Crop, mirror and normalise; give (height, width, 3) in float32 or, for a GPU, half precision."""
    mean, std = MEAN_STD[spec.normalize]
    # DALI has no bfloat16: half precision there, whose rounding is an eighth of bfloat16's.
    half = spec.dtype != torch.float32 and spec.device.type == "cuda"
    return fn.crop_mirror_normalize(
        image,
        mean=mean,
        std=std,
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
        **crop_and_mirror,
    )


def _float(node: Any) -> Any:
    return fn.cast(node, dtype=types.FLOAT64)


def _int(node: Any) -> Any:
    return fn.cast(node, dtype=types.INT32)


def _rounded(node: Any) -> Any:
    return _int(math.floor(node + 0.5))
