"""`rsnet verify DIR`: find the images that would end a training, before it starts.

DALI itself decides, image by image, whether it can decode a file: it is neither as tolerant as PIL nor as
strict. A size limit, and the rule of `image_formats`, come before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Container, Generator, Iterator
from pathlib import Path

from pipelines import verify_report
from pipelines.dali.decoder import Decoder
from pipelines.dali.options import VerifyOptions
from pipelines.image_folder import ImageFolder, scan_folder
from pipelines.utils.cli import EXIT_FAILED
from pipelines.utils.errors import UsageError
from pipelines.utils.output import guard_output
from pipelines.utils.progress import ProgressBar, format_bytes
from pipelines.utils.thread_map import ordered_map
from pipelines.verify_report import SplitReport, Stamp

BATCH = 16  # images; a fifth faster than one by one, but each is decoded again if one is bad


def verify(options: VerifyOptions) -> int:
    """Verify `options.data`/train and /val; return 0 if no bad image is left, else 1.

    Raises UsageError for a mistake in the options, DataError if all images of a class are bad, RunError if
    an image or a folder cannot be read: then nothing is recorded.
    """
    data, report = options.data, options.report or options.data / verify_report.REPORT
    folders = [scan_folder(data / split) for split in ("train", "val") if (data / split).is_dir()]
    if not folders:
        raise UsageError(f"{data} has neither a folder train nor a folder val")
    for folder in folders:
        if options.move_to and options.move_to.resolve().is_relative_to(folder.root.resolve()):
            raise UsageError(f"--move-to: {options.move_to} lies among the images of {folder.root}")
    known = verify_report.read(report)
    left = [_verify_split(folder, known, report, options) for folder in folders]
    for folder in left:
        verify_report.require_every_class(folder)
    if any(known[folder.root.name].bad for folder in folders):
        print(f"train_dali.py --skip-bad leaves out what {report} lists; verify --move-to moves it")
        return EXIT_FAILED
    return 0


def _verify_split(
    folder: ImageFolder, known: dict[str, SplitReport], report: Path, options: VerifyOptions
) -> ImageFolder:
    """Return the folder without its bad images; update `known`, by split, and the report."""
    split, stamps = folder.root.name, verify_report.stamps(folder)
    # Taken before decoding, so that a file that changes meanwhile is noticed.
    fingerprint = verify_report.fingerprint(stamps)
    if split in known and known[split].fingerprint == fingerprint:
        print(f"{folder.root}: has not changed since {report} was written")
    else:
        _check_writable(report)  # before it takes hours
        bad = _decode(folder, stamps, options)
        known[split] = SplitReport(fingerprint, len(stamps), bad)
        verify_report.write(report, known)
    bad = known[split].bad
    for name, reason in bad.items():
        print(f"{folder.root}/{name}: {reason}")
    print(f"{folder.root}: {len(bad)} of {len(stamps)} images are bad")
    if bad and options.move_to:
        _move(folder, bad, options.move_to / split)
        stamps = {name: stamp for name, stamp in stamps.items() if name not in bad}
        known[split] = SplitReport(verify_report.fingerprint(stamps), len(stamps), {})
        verify_report.write(report, known)
    return verify_report.without(folder, bad)


def _check_writable(report: Path) -> None:
    """Raise UsageError if the report cannot be written."""
    try:
        if report.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=report.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write {report}: {error.strerror}; name a file elsewhere with --report FILE"
        ) from None


def _decode(
    folder: ImageFolder, stamps: dict[str, Stamp], options: VerifyOptions
) -> dict[str, str]:
    """Return what is wrong with each bad image, by its path below the folder's root."""
    bad: dict[str, str] = {}
    size, started = 0, time.perf_counter()
    reasons = contextlib.closing(_reasons(folder.paths, options.workers, options.max_megapixels))
    title = folder.root.name
    with (
        _decoder_messages_dropped(),
        reasons as found,
        ProgressBar(title, len(stamps)) as progress,
    ):
        for done, ((name, stamp), reason) in enumerate(zip(stamps.items(), found, strict=True)):
            if reason is not None:
                bad[name] = reason
            size += stamp[0] if stamp else 0
            progress.update(done + 1, size, len(bad))
    speed = len(stamps) / (time.perf_counter() - started)
    print(f"{folder.root}: {len(stamps)} images, {format_bytes(size)}, {speed:.0f} images/s")
    return bad


def _reasons(paths: list[str], workers: int, max_megapixels: float) -> Generator[str | None]:
    """Yield for each of the images what is wrong with it, None if nothing is."""
    local = threading.local()

    def check(batch: list[str]) -> list[str | None]:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(BATCH, max_megapixels)
        found: list[str | None] = local.decoder.reasons(batch)
        return found

    batches = (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
    for found in ordered_map(check, batches, workers):
        yield from found


def _move(folder: ImageFolder, names: Container[str], target: Path) -> None:
    """Move the images of these names. Raises UsageError, before any is moved, if a target exists."""
    moves = [(folder.root / name, target / name) for name in folder.names if name in names]
    for _, to in moves:
        if os.path.lexists(to):
            raise UsageError(
                f"--move-to: {to} exists already; name another folder, or move it away"
            )
    for path, to in moves:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, to)
    print(f"{folder.root}: moved {len(moves)} images to {target}")


@contextlib.contextmanager
def _decoder_messages_dropped() -> Iterator[None]:
    """Drop what libjpeg, libpng and DALI write to file descriptor 2: it does not name the image.

    Python's own stderr still works, through a copy of the descriptor.
    """
    with contextlib.ExitStack() as stack:
        own = os.dup(2)
        stack.callback(os.close, own)
        if sys.stderr is sys.__stderr__:  # else it is redirected already
            stderr = stack.enter_context(os.fdopen(own, "w", buffering=1, closefd=False))
            stack.enter_context(contextlib.redirect_stderr(stderr))
            guard_output(False)  # the copy, too
        with open(os.devnull, "wb") as null:  # noqa: PTH123
            os.dup2(null.fileno(), 2)
        stack.callback(os.dup2, own, 2)
        yield
