"""Small image folders that tests make themselves, and a clean process state."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.util
import os
import re
import shutil
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# All else is imported where it is used: pytest-xdist's own process, which runs no test, reads this file, too.
from pipelines.utils.cli import command
from tests.helpers import processes
from tests.helpers.clock import Clock

os.environ.setdefault("WANDB_MODE", "disabled")

# A shell's background job, or nohup, has them ignored, and then so do the commands that tests interrupt.
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)

# Where a module that is missing is a fault, and no library that is not installed.
OWN = {"benchmarks", "examples", "pipelines", "rsnet", "scripts", "tests"}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With `-m gpu`, leave out the files that need a library which is not installed on this machine."""
    report = yield
    found = re.search(
        r"ModuleNotFoundError: (?:No module named '|import of )(\w+)", str(report.longrepr)
    )
    is_gpu = collector.config.option.markexpr == "gpu"
    if is_gpu and report.failed and found and found[1] not in OWN:
        report.outcome = "skipped"
        report.longrepr = str(collector.path), 0, f"Skipped: {found[1]} is not installed"
    return report


# Of what is imported nothing is garbage: to look through it was an eighth of the tests' time.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Start the fork server that pytest-xdist's processes share."""
    if getattr(config.option, "numprocesses", None):
        processes.share()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(10_000)  # the default, 700, took some 2 % of the tests' time
    gc.enable()


# At the very end: else nanobind reports as leaked what is never collected.
atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed notes the stack for GPUs: 1.7 ms


@pytest.fixture(scope="session", autouse=True)
def _undrawn_plots() -> Iterator[dict[str, Any]]:
    """Draw no plots, see tests.helpers.plots; yields the methods that would, by their names."""
    if importlib.util.find_spec("matplotlib") is None:
        yield {}
        return
    from tests.helpers import plots

    with pytest.MonkeyPatch.context() as patch:
        yield plots.leave_undrawn(patch.setattr)


@pytest.fixture(scope="session", autouse=True)
def _kept_parsers() -> Iterator[None]:
    """Read each class of options once, see tests.helpers.parsers."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("tyro") is not None:
            from tests.helpers.parsers import keep_parsers

            keep_parsers(patch.setattr)
        yield


@pytest.fixture
def drawn_plots(_undrawn_plots: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw plots after all, for the tests that look at them."""
    from matplotlib.figure import Figure

    for name, method in _undrawn_plots.items():
        monkeypatch.setattr(Figure, name, method)


def write_photo(path: Path, height: int, width: int, seed: int, quality: int = 90) -> None:
    """A smooth random image with some noise: what a JPEG decoder and a resize filter can get wrong."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy).save(path, "JPEG", quality=quality)


def write_folder(root: Path, per_class: dict[str, int], seed: int = 0) -> Path:
    """`per_class[name]` photos of 40 to 200 pixels a side in root/name."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for name, count in per_class.items():
        for i in range(count):
            height, width = (int(n) for n in rng.integers(40, 201, 2))
            write_photo(root / name / f"{i:03}.JPEG", height, width, seed=seed * 1000 + i)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three classes: 23 training and 17 validation photos."""
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "train", {"ant": 9, "bee": 8, "cat": 6}, seed=1)
    write_folder(root / "val", {"ant": 5, "bee": 7, "cat": 5}, seed=2)
    return root


@pytest.fixture(scope="session")
def whole(photos, tmp_path_factory) -> Path:
    """A run that nothing happens to, for the tests of faults; not to be changed."""
    from tests.helpers import faults

    run = tmp_path_factory.mktemp("whole") / "run"
    faults.finish(faults.command(photos, run))
    assert faults.saved(run)["step"] == faults.UPDATES
    return run


@pytest.fixture(scope="session")
def _s3_server():
    from tests.helpers.s3_server import S3Server

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(_s3_server, monkeypatch):
    """An S3 server on localhost (tests.helpers.s3_server), which this process and its children find."""
    from s3fs import S3FileSystem

    _s3_server.reset()
    for name, value in _s3_server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    return _s3_server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An endpoint that this process's huggingface_hub talks to, with a token and an empty cache."""
    from huggingface_hub import constants

    from tests.helpers.hub_server import TOKEN, HubServer

    server = HubServer()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield server
    server.stop()


needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None,
    reason="FFCV is not installed; ./install.sh says which system packages it is built with",
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The demo set, with its CMYK, PNG, grayscale, EXIF-rotated and progressive files."""
    from pipelines.demo import DemoOptions, write

    folder = tmp_path_factory.mktemp("demo") / "data"
    write(DemoOptions(folder, train=3, val=2))
    return folder


@pytest.fixture
def convert(capsys):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""
    from pipelines.ffcv import ConvertOptions, convert_or_verify

    def call(*arguments: object) -> tuple[int, str, str]:
        code = command(
            "pipelines.beton", ConvertOptions, convert_or_verify, [str(a) for a in arguments]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@functools.cache
def beton_of(folder: Path) -> Path:
    """The .beton files of an image folder, beside it."""
    from pipelines.ffcv import ConvertOptions
    from pipelines.ffcv.convert import convert

    output = folder.with_name(folder.name + "_beton")
    convert(ConvertOptions(workers=2), folder, output)
    return output


@pytest.fixture
def beton(photos, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(beton_of(photos), tmp_path / "beton"))


@pytest.fixture(autouse=True)
def _close_loaders():
    from tests.helpers import betons

    yield
    betons.close_all()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """What the profiler and its sweep look at."""
    from rsnet.profiler import step_profiler, sweep

    clock = Clock()
    for module in (step_profiler, sweep):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def no_wandb_key(monkeypatch, tmp_path):
    """A machine on which W&B was never set up, and a process in which it never ran."""
    import wandb  # not needed for the tests on a GPU

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def wandb_server(no_wandb_key, monkeypatch):  # noqa: ARG001
    """A server for which there is a key; nothing waits long for it."""
    from tests.helpers.wandb_server import WandbServer

    server = WandbServer()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "3")
    yield server
    server.stop()
