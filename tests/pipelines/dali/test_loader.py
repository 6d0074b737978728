"""DALI's loader: its images against PIL's of the same rectangle, broken images, the resizing threads."""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from PIL import Image
from torchvision.transforms import functional as F

from pipelines import dali, reference
from pipelines.batch import Loaders, LoaderSpec
from pipelines.dali import graphs
from pipelines.dali import loader as dali_loader
from pipelines.demo import ODD_KINDS, render
from pipelines.utils.errors import DataError, UsageError
from tests.conftest import beton_of, needs_ffcv, write_photo
from tests.helpers import betons
from tests.helpers.formats import SAME
from tests.helpers.images import differences

SIZES = (64, 48, 32)
WORKERS = 2
# Mean absolute difference of an image in 1/255. Seen for the worst of 500 ImageNet photos: on the CPU 0.26,
# with the GPU's graph on the CPU 0.36.
TOLERANCE = {"cpu": 0.4, "cpu, the graph of a GPU": 0.5, "cuda": 2.0}

devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
            ],
        ),
    ],
)


def _spec(data: Path, device: str = "cpu", **more) -> LoaderSpec:
    defaults = {"batch_size": 3, "normalize": "unit"}
    return LoaderSpec(data, SIZES, device=torch.device(device), **(defaults | more))


def _loaders(spec: LoaderSpec):
    return dali.make_loaders(dali.DaliOptions(workers=WORKERS), spec)


def with_the_graph_of_a_gpu(loaders: Loaders) -> Loaders:
    """The same loaders, but that the CPU runs the graph that resizes within DALI."""
    for loader in loaders[:2]:
        loader._on_gpu = True
    return loaders


def test_dalis_warning_of_libraries_that_no_graph_uses_is_not_shown(monkeypatch, photos):
    """Warnings are errors here. DALI looks for its libraries when a pipeline for a GPU is built."""
    fake = mock.Mock(build=backend.check_cuda_runtime)
    monkeypatch.setattr(graphs, "pipeline_def", lambda *_, **__: lambda *_, **__: fake)
    monkeypatch.setattr(backend, "cuda_checked", False)
    monkeypatch.setattr(backend, "GetCudaVersion", lambda: 13000)
    for name in ("GetCufftVersion", "GetNppVersion"):
        monkeypatch.setattr(backend, name, lambda: -1)
    graphs.build(graphs.eval_graph, None, dali.DaliOptions(), _spec(photos))
    assert backend.cuda_checked


def _differences(spec: LoaderSpec, split: str) -> torch.Tensor:
    return differences(_loaders(spec), spec, split)


def _gpu_graphs_differences(spec: LoaderSpec, split: str) -> torch.Tensor:
    return differences(with_the_graph_of_a_gpu(_loaders(spec)), spec, split)


@devices
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_size_is_pils_image_of_the_same_rectangle(photos, split, device):
    worst = _differences(_spec(photos, device), split).max(dim=1).values
    assert (worst < TOLERANCE[device]).all(), worst


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_graph_of_a_gpu_gives_pils_images_on_the_cpu_too(photos, split):
    worst = _gpu_graphs_differences(_spec(photos), split).max()
    assert worst < TOLERANCE["cpu, the graph of a GPU"]


def test_the_tolerance_would_notice_a_crop_that_is_one_pixel_off(photos):
    path = next((photos / "val" / "ant").iterdir())
    with Image.open(path) as image:
        views = [F.resized_crop(image.convert("RGB"), y, 5, 30, 30, [32, 32]) for y in (4, 5)]
    a, b = (np.asarray(view, dtype=np.float64) for view in views)
    assert np.abs(a - b).mean() > 2 * TOLERANCE["cuda"]


@devices
def test_odd_files_decode_to_the_same_image(tmp_path, device):
    """CMYK, PNG named .JPEG, grayscale, EXIF-rotated (which is not applied), progressive."""
    for split in ("train", "val"):
        for i, save in enumerate(ODD_KINDS):
            (tmp_path / split / str(i)).mkdir(parents=True)
            save(
                tmp_path / split / str(i) / "x.JPEG",
                render("ring_vertical", np.random.default_rng(i)),
            )
    spec = _spec(tmp_path, device, batch_size=1)
    for split in ("train", "val"):
        assert (_differences(spec, split) < TOLERANCE[device]).all()


@devices
def test_every_format_that_verify_accepts_is_the_same_picture(tmp_path, device):
    """A GPU has decoders of its own for some, which `verify` does not try."""
    for i, data in enumerate(SAME.values()):
        for split in ("train", "val"):
            (tmp_path / split / f"{i:03}").mkdir(parents=True)
            (tmp_path / split / f"{i:03}" / "x.jpg").write_bytes(data)
    off = _differences(_spec(tmp_path, device), "val").max(dim=0).values.tolist()
    limit = 1 + TOLERANCE[device]  # decoders may round each pixel the other way
    assert not {name: d for name, d in zip(SAME, off, strict=True) if d >= limit}


@devices
@pytest.mark.parametrize(("height", "width"), [(20, 300), (300, 20), (7, 5), (1, 1)])
def test_extreme_shapes_get_the_references_rectangle(tmp_path, height, width, device):
    for split in ("train", "val"):
        for i in range(8):
            write_photo(tmp_path / split / "a" / f"{i}.JPEG", height, width, seed=i)
    for split in ("train", "val"):
        assert (_differences(_spec(tmp_path, device), split) < TOLERANCE[device]).all()
        limit = TOLERANCE["cpu, the graph of a GPU"]
        assert (_gpu_graphs_differences(_spec(tmp_path), split) < limit).all()


def _html(path: Path) -> None:
    path.write_text("<html>404</html>")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", [_html, _empty, _truncated])
@pytest.mark.parametrize("backend", ["dali", "reference"])
@devices
def test_a_broken_image_is_named(tmp_path, backend, damage, split, device):
    for part in ("train", "val"):
        for i in range(6):
            write_photo(tmp_path / part / "a" / f"{i}.JPEG", 120, 120, seed=i)
    bad = tmp_path / split / "a" / "4.JPEG"
    damage(bad)
    spec = _spec(tmp_path, device)
    if backend == "dali":
        loaders = _loaders(spec)
    else:
        loaders = reference.make_loaders(reference.ReferenceOptions(), spec)
    with pytest.raises(DataError, match=f"broken image {bad}"):
        list(getattr(loaders, split))


@pytest.mark.parametrize("graph", [lambda loaders: loaders, with_the_graph_of_a_gpu])
def test_a_broken_image_that_an_epoch_was_left_before_is_named_by_the_next(tmp_path, graph):
    for split in ("train", "val"):
        for i in range(9):
            write_photo(tmp_path / split / "a" / f"{i}.JPEG", 60, 60, seed=i)
    bad = tmp_path / "val" / "a" / "7.JPEG"
    bad.write_bytes(b"")
    val = graph(_loaders(_spec(tmp_path))).val
    next(iter(val))  # the third batch, which has it, is on its way
    batches = iter(val)
    next(batches)
    with pytest.raises(DataError, match=f"broken image {bad}"):
        list(batches)


def _of_dali(reason: str) -> RuntimeError:
    return RuntimeError(
        f"Critical error in pipeline:\nError in GPU operator, encountered:\n\n{reason}"
    )


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            torch.OutOfMemoryError,
            "CUDA out of memory",
        ),
        (torch.AcceleratorError("CUDA error: 700"), torch.AcceleratorError, "CUDA error: 700"),
        (
            _of_dali("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"),
            torch.OutOfMemoryError,
            r"DALI: CUDA runtime API error cudaErrorMemoryAllocation \(2\)",
        ),
        (
            _of_dali("CUDA allocation failed"),
            torch.OutOfMemoryError,
            "DALI: CUDA allocation failed",
        ),
        (
            _of_dali("Can't allocate 67108864 bytes on device 0."),
            torch.OutOfMemoryError,
            "DALI: Can't allocate 67108864 bytes on device 0",
        ),
        (
            _of_dali("CUDA driver API error CUDA_ERROR_LAUNCH_FAILED (719)"),
            RuntimeError,
            "^Critical error in pipeline",
        ),
        (_of_dali("cannot decode"), DataError, "cannot read one of .*: cannot decode"),
    ],
)
def test_an_error_of_the_gpu_is_not_taken_for_an_unreadable_image(
    spec, monkeypatch, error, expected, message
):
    def fail(**_):
        raise error

    graph = mock.MagicMock(empty=lambda: True, share_outputs=fail)
    monkeypatch.setattr(dali_loader, "build", lambda *_: graph)
    loader = _loaders(spec).train
    monkeypatch.setattr(loader, "_drain", lambda: loader._feed.in_flight.append(np.arange(2)))
    with pytest.raises(expected, match=message) as raised:
        list(loader)
    assert raised.type is expected


def test_a_fault_of_a_kernel_is_not_taken_for_an_unreadable_image(spec, monkeypatch):
    """After it, all that the decoder says is that it cannot decode."""

    def fail(**_):
        raise _of_dali("Failed to decode sample #0 : ")

    def synchronize(_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    graph = mock.MagicMock(empty=lambda: True, share_outputs=fail)
    monkeypatch.setattr(dali_loader, "build", lambda *_: graph)
    loader = _loaders(spec).train
    loader._spec = replace(loader._spec, device=torch.device("cuda"))
    monkeypatch.setattr(loader, "_stream", dict)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        list(loader)


def test_too_little_memory_for_the_graph_of_a_gpu_is_told_as_any_other_is(spec, monkeypatch):
    def build(*_):
        raise _of_dali("Can't allocate 67108864 bytes on device 0.")

    monkeypatch.setattr(dali_loader, "build", build)
    with pytest.raises(torch.OutOfMemoryError, match="DALI: Can't allocate 67108864 bytes"):
        list(_loaders(spec).val)


def test_pytorch_lets_go_what_it_keeps_before_a_graph_for_a_gpu_is_built(spec, monkeypatch):
    done = []
    build = dali_loader.build
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(dali_loader, "build", lambda *a: done.append("built") or build(*a))
    next(iter(with_the_graph_of_a_gpu(_loaders(spec)).val))
    assert done == ["emptied", "built"]


def test_a_closed_loader_of_a_gpu_gives_back_the_memory_of_its_graph(spec, monkeypatch):
    loader = with_the_graph_of_a_gpu(_loaders(spec)).val
    next(iter(loader))
    graph, left = weakref.ref(loader._pipeline), []
    monkeypatch.setattr(dali_loader, "release_memory", lambda: left.append(graph()))
    loader.close()
    assert left == [None]


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--workers 0", {"workers": 0}),
        ("--decoder-hw-load 2", {"decoder_hw_load": 2}),
        ("--prefetch 0", {"prefetch": 0}),
    ],
)
def test_options_out_of_range_are_refused(flag, options):
    with pytest.raises(UsageError, match=flag):
        dali.DaliOptions(**options)


@pytest.fixture
def spec(photos: Path) -> LoaderSpec:
    return _spec(photos, batch_size=4, normalize="imagenet")


def _assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


@needs_ffcv
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dali_and_ffcv_give_the_same_bits(spec, split, dtype):
    spec = replace(spec, dtype=dtype)
    theirs = betons.make(replace(spec, data=beton_of(spec.data)))
    _assert_same(getattr(_loaders(spec), split), getattr(theirs, split))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_consumers_thread_resizes_nothing(spec, split, monkeypatch):
    threads = set()

    def resize(*_):
        threads.add(threading.current_thread())

    monkeypatch.setattr(dali_loader, "resize", resize)
    list(getattr(_loaders(spec), split))
    assert 1 <= len(threads) <= WORKERS
    assert threading.current_thread() not in threads


def test_a_batch_is_resized_while_the_one_before_it_is_used(spec, monkeypatch):
    resized = []
    monkeypatch.setattr(dali_loader, "resize", lambda *_: resized.append(None))
    batches = iter(_loaders(spec).train)
    next(batches)
    for _ in range(100):
        if len(resized) == 2 * spec.batch_size * len(SIZES):
            break
        time.sleep(0.05)
    assert len(resized) == 2 * spec.batch_size * len(SIZES)


def test_dali_does_not_reuse_the_memory_of_crops_that_wait(spec, monkeypatch):
    expected = list(_loaders(spec).train)
    real = dali_loader.resize

    def slow(*arguments):
        time.sleep(0.01)  # DALI is far ahead when the crop is read
        real(*arguments)

    monkeypatch.setattr(dali_loader, "resize", slow)
    _assert_same(_loaders(spec).train, expected)


def test_a_broken_image_ends_the_threads(tmp_path):
    for split in ("train", "val"):
        for i in range(6):
            write_photo(tmp_path / split / "a" / f"{i}.JPEG", 60, 60, seed=i)
    (tmp_path / "val" / "a" / "4.JPEG").write_bytes(b"")
    val = _loaders(LoaderSpec(tmp_path, SIZES, 2, torch.device("cpu"))).val
    with pytest.raises(DataError, match=r"4\.JPEG"):
        list(val)
    assert not [t for t in threading.enumerate() if t.name.startswith("dali-resize")]


def test_what_a_thread_raises_reaches_the_reader(spec, monkeypatch):
    def fail(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr(dali_loader, "resize", fail)
    loader = _loaders(spec).train
    with pytest.raises(MemoryError, match="out of memory"):
        list(loader)
    loader.close()


def test_sizes_that_the_resize_cannot_make_are_refused(spec):
    with pytest.raises(UsageError, match="--sizes 2: at least 4 pixels"):
        _loaders(replace(spec, sizes=(64, 2)))
