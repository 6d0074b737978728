"""The classifier of a release: its pixels, its logits, what it costs to switch, what it refuses."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import reference
from pipelines.batch import LoaderSpec
from pipelines.utils.errors import DataError, UsageError
from rsnet.inference.classifier import Prediction, SwitchableClassifier
from rsnet.release import package as release
from tests.helpers import releases
from tests.helpers.releases import CLASSES, SIZES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("runtime") / "release")


@pytest.fixture(scope="module")
def loaded(folder) -> SwitchableClassifier:
    return SwitchableClassifier.load(folder, batch_size=4)


@pytest.fixture
def classifier(loaded):
    """Without the hooks of other tests."""
    yield loaded
    loaded.model._forward_hooks.clear()
    loaded.model._forward_pre_hooks.clear()


def _photo(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One file of each kind that ImageNet and phones have, in a class folder."""
    root = tmp_path_factory.mktemp("files") / "val" / "odd"
    root.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated
    _photo(0).save(root / "rgb.jpg")
    _photo(1).convert("L").save(root / "gray.jpg")
    _photo(2).convert("CMYK").save(root / "cmyk.jpg")
    rgba = _photo(3)
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    rgba.save(root / "rgba.png")
    _photo(4).save(root / "exif.jpg", exif=exif)
    _photo(5, 61, 150).quantize(16).save(root / "palette.png")
    return {path.stem: path for path in sorted(root.iterdir())}


def _seen(classifier: SwitchableClassifier) -> list[torch.Tensor]:
    """What the network gets from now on, batch by batch."""
    batches: list[torch.Tensor] = []
    classifier.model.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    return batches


def _logits(classifier: SwitchableClassifier) -> list[torch.Tensor]:
    """What the network gives from now on, batch by batch."""
    batches: list[torch.Tensor] = []
    classifier.model.register_forward_hook(lambda _, __, out: batches.append(out))
    return batches


def _centre(path: Path, size: int) -> Image.Image:
    """The short side to int(size / 0.875), the other in proportion, then the middle."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    short = int(size / 0.875)
    width, height = (short * side // min(image.size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["rgb", "gray", "cmyk", "rgba", "exif", "palette"])
def test_the_network_sees_the_centre_of_the_resized_image(classifier, files, kind, size):
    seen = _seen(classifier)
    classifier.classify(files[kind], size)
    (batch,) = seen
    expected = torch.tensor(np.array(_centre(files[kind], size))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch[0], (expected - mean) / std, atol=1e-6, rtol=1e-6)


def test_the_network_sees_the_evaluations_bits(classifier, files):
    root = files["rgb"].parents[2]
    spec = LoaderSpec(root, SIZES, len(files), torch.device("cpu"))
    (expected,) = reference.make_loaders(reference.ReferenceOptions(), spec, False).val
    for images, size in zip(expected.images, SIZES, strict=True):
        seen = _seen(classifier)
        classifier.classify(sorted(files.values()), size)
        assert torch.equal(torch.cat(seen), images)


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_the_released_networks_bit_for_bit(classifier, folder, files, size):
    seen, logits = _seen(classifier), _logits(classifier)
    predictions = classifier.classify(list(files.values()), size)
    network = release.load(folder).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = [network(images, size) for images in seen]
    assert [len(images) for images in seen] == [4, 2]
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    names = [*CLASSES, "7"]
    for prediction, row in zip(predictions, torch.cat(expected).softmax(1), strict=True):
        best = sorted(range(8), key=lambda i: -row[i])[:5]
        assert prediction.classes == tuple(names[i] for i in best)
        assert prediction.probabilities == tuple(row[best].tolist())
        assert prediction.size == size
        assert prediction.ms > 0


def test_the_unit_normalisation_of_a_release_is_applied(tmp_path, files):
    classifier = SwitchableClassifier.load(releases.write(tmp_path / "r", normalize="unit"))
    seen = _seen(classifier)
    classifier.classify(files["rgb"], 32)
    expected = torch.tensor(np.array(_centre(files["rgb"], 32))).permute(2, 0, 1) / 255
    torch.testing.assert_close(seen[0][0], expected)


def test_the_largest_size_is_taken_if_none_is_named(classifier):
    assert classifier.classify(_photo(0))[0].size == 64


def _without_ms(predictions: list[Prediction]) -> list[tuple]:
    return [(p.classes, p.probabilities, p.size) for p in predictions]


def test_paths_images_arrays_and_tensors_may_be_mixed(classifier, tmp_path):
    image = _photo(7)
    image.save(tmp_path / "a.png")
    array = np.array(image)
    tensor = torch.tensor(array).permute(2, 0, 1)
    mixed = [tmp_path / "a.png", str(tmp_path / "a.png"), image, array, tensor]
    seen = _seen(classifier)
    classifier.classify([*mixed, _photo(8)], size=48)
    *same, other = torch.cat(seen)
    assert all(torch.equal(pixels, same[0]) for pixels in same)
    assert not torch.equal(other, same[0])
    one = _without_ms([classifier.classify(p, size=48)[0] for p in mixed])
    assert len(set(one)) == 1
    assert len(classifier.classify(tuple(mixed), 48)) == 5


def test_switching_the_size_moves_and_copies_no_weights(classifier, monkeypatch):
    parameters = [(n, p.data_ptr()) for n, p in classifier.model.named_parameters()]
    monkeypatch.setattr(release, "read", None)
    answers = [_without_ms(classifier.classify(_photo(0), size)) for size in (64, 32, 48, 64)]
    assert [(n, p.data_ptr()) for n, p in classifier.model.named_parameters()] == parameters
    assert answers[0] == answers[3]
    assert answers[0] != answers[1]


def test_bfloat16_is_autocast_of_the_released_network_bit_for_bit(folder):
    classifier = SwitchableClassifier.load(folder, dtype=torch.bfloat16)
    seen, logits = _seen(classifier), _logits(classifier)
    classifier.classify([_photo(0), _photo(1)], 48)
    network = release.load(folder).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(seen[0], 48)
    assert logits[0].dtype == torch.bfloat16
    assert torch.equal(logits[0], expected)
    norms = [m for m in classifier.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {p.dtype for norm in norms for p in norm.parameters()} == {torch.float32}


def test_no_graph_is_recorded(classifier):
    logits = _logits(classifier)
    classifier.classify(_photo(0))
    assert logits[0].is_inference()


def test_a_prediction_names_as_many_classes_as_asked_for(folder):
    def names(top: int) -> int:
        return len(SwitchableClassifier.load(folder, top=top).classify(_photo(0))[0].classes)

    assert [names(1), names(5), names(20)] == [1, 5, 8]


def test_a_stream_is_read_a_batch_at_a_time(classifier):
    read: list[int] = []

    def photos():
        for i in range(10):
            read.append(i)
            yield f"photo {i}", _photo(i)

    answers = classifier.stream(photos(), 32)
    assert read == []
    assert next(answers)[0] == "photo 0"
    assert read == [0, 1, 2, 3]
    assert [key for key, _ in answers] == [f"photo {i}" for i in range(1, 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "there are no images"),
        ((np.zeros((5, 5, 3), np.uint8), 40), "size 40: this network has 64 48 32"),
        (
            (np.zeros((5, 5), np.uint8),),
            "image 0 is uint8 of shape (5, 5), must be uint8 (H, W, 3)",
        ),
        (
            ([_photo(0), np.zeros((3, 5, 5), np.uint8)],),
            "image 1 is uint8 of shape (3, 5, 5), must be uint8 (H, W, 3)",
        ),
        ((np.zeros((5, 5, 3)),), "image 0 is float64 of shape (5, 5, 3), must be uint8 (H, W, 3)"),
        ((np.zeros((0, 5, 3), np.uint8),), "image 0 is uint8 of shape (0, 5, 3)"),
        (
            (torch.zeros(3, 5, 5),),
            "image 0 is torch.float32 of shape (3, 5, 5), must be uint8 (3, H, W)",
        ),
        (
            (torch.zeros(5, 5, 3, dtype=torch.uint8),),
            "image 0 is torch.uint8 of shape (5, 5, 3), must be uint8 (3, H, W)",
        ),
        ((7,), "image 0 is a int, must be a path, a PIL image, an array or a tensor"),
    ],
)
def test_what_is_no_image_or_size_is_refused(classifier, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        classifier.classify(*arguments)
    assert isinstance(caught.value, UsageError)


def png_of(width: int, height: int) -> bytes:
    """The header of an image of one bit a pixel, without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    size, check = struct.pack(">I", len(header) - 4), struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + size + header + check + b"\0\0\0\0IDAT" + b"\0" * 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"no image", "cannot identify image file"),
        (png_of(9_000, 10_000), "broken PNG file|truncated|broken data"),
        (png_of(10_001, 10_000), "10001 x 10000 pixels are more than 100 megapixels"),
        (png_of(20_000, 20_000), "exceeds limit of 178956970 pixels"),
        (png_of(1, 20_000), "1 x 20000 pixels are too long a row"),
    ],
    ids=["missing", "empty", "text", "truncated", "large", "huge", "long"],
)
def test_a_file_that_cannot_be_decoded_is_named(classifier, tmp_path, content, message):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*({message})") as caught:
        classifier.classify([_photo(0), path])
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(classifier, tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    with pytest.raises(DataError, match="it is no regular file"):
        classifier.classify(path)


def test_an_open_image_without_pixels_is_refused(classifier):
    with pytest.raises(DataError, match="image 0: it has no pixels"):
        classifier.classify(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64: give torch.bfloat16 or None"),
        ({"batch_size": 0}, "batch_size 0: must be from 1 to 65536"),
        ({"batch_size": 10**10}, "batch_size 10000000000: must be from 1 to 65536"),
        ({"top": 0}, "top 0: at least 1"),
        ({"device": "abacus"}, "device abacus: "),
        ({"device": "meta"}, "device meta: "),
        ({"device": "hpu"}, "device hpu: "),
    ],
)
def test_what_cannot_be_computed_with_is_refused(folder, options, message):
    with pytest.raises(UsageError, match=message):
        SwitchableClassifier.load(folder, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_one_line(folder, monkeypatch, error):
    def fail(*_):
        raise error

    classifier = SwitchableClassifier.load(folder, batch_size=7)
    monkeypatch.setattr(classifier, "_forward", fail)
    message = "1 images at size 64 do not fit into the memory of cpu; give a smaller --batch-size"
    with pytest.raises(DataError, match=message):
        classifier.classify(Image.new("RGB", (50, 50)))


def test_threads_that_share_a_classifier_get_the_answers_of_one(folder):
    """The size that is computed is a state of the network."""
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    photos = [_photo(i) for i in range(3)]
    expected = {s: classifier.classify(photos, size=s) for s in SIZES}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            asked = [SIZES[i % len(SIZES)] for i in range(60)]
            found = list(pool.map(lambda size: classifier.classify(photos, size=size), asked))
    finally:
        sys.setswitchinterval(interval)
    for size, answers in zip(asked, found, strict=True):
        for answer, known in zip(answers, expected[size], strict=True):
            assert answer.probabilities == pytest.approx(known.probabilities, rel=1e-4)


def test_a_network_in_training_mode_is_classified_with_as_it_is(folder):
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    (before,) = classifier.classify(_photo(0))
    for part in (classifier.model, classifier.model.network.bn1):
        classifier.model.eval()
        part.train()
        for _ in range(2):
            (after,) = classifier.classify(_photo(0))
            assert after.probabilities == before.probabilities
        assert part.training


def test_a_classifier_is_copied_and_pickled(folder):
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    (expected,) = classifier.classify(_photo(0))
    for other in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert other.classify(_photo(0))[0].probabilities == expected.probabilities


def test_a_stream_takes_what_classify_takes(classifier, files):
    images = [
        _photo(0).convert("YCbCr"),
        files["rgb"],
        np.asarray(_photo(1)),
        _photo(2).convert("RGBA"),
    ]
    expected = classifier.classify(images)
    streamed = dict(classifier.stream(enumerate(images)))
    assert [streamed[i].probabilities for i in range(4)] == [p.probabilities for p in expected]


def test_a_size_of_numpy_is_a_number_of_json(classifier):
    (found,) = classifier.classify(_photo(0), size=np.int64(32))
    assert json.loads(json.dumps(found.to_dict()))["size"] == 32


def test_an_output_that_is_not_finite_is_an_error(folder):
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    with torch.no_grad():
        classifier.model.network.fc.bias.fill_(torch.nan)
    with pytest.raises(DataError, match="the network's output at size 64 is not finite"):
        classifier.classify(_photo(0))
