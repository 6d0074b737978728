"""`python -m pipelines.folder verify DIR`: finds the images that would end a training, before it starts.

DALI itself decides, image by image, what it cannot decode: it is neither as forgiving as PIL nor as strict.


Whether DALI can decode a file, and if not, why not."""

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
from typing import Any

from pipelines import verify_report as verified
from pipelines.dali.graphs import build_decoder, path_batch
from pipelines.dali.options import VerifyOptions
from pipelines.image_folder import ImageFolder, dali_error_line, decode_error, scan_folder
from pipelines.utils.cli import EXIT_FAILED
from pipelines.utils.errors import UsageError
from pipelines.utils.progress import ProgressBar, format_bytes
from pipelines.utils.thread_map import ordered_map
from pipelines.verify_report import Stamp, Verified

BATCH = 16  # images: a fifth faster than one by one; a bad one costs the decoding of 16 anew


def verify(options: VerifyOptions) -> int:
    """Returns the exit code. Raises UsageError or DataError, in one line."""
    data, report = options.data, options.report or options.data / verified.REPORT
    folders = [scan_folder(data / split) for split in ("train", "val") if (data / split).is_dir()]
    if not folders:
        raise UsageError(f"{data} has neither a folder train nor a folder val")
    for folder in folders:
        if options.move_to and options.move_to.resolve().is_relative_to(folder.root.resolve()):
            raise UsageError(f"--move-to: {options.move_to} lies among the images of {folder.root}")
    known = verified.read(report)
    left = [_verify_split(folder, known, report, options) for folder in folders]
    for folder in left:
        verified.require_every_class(folder)
    if any(known[folder.root.name].bad for folder in folders):
        print(f"train_dali.py --skip-bad leaves out what {report} lists; verify --move-to moves it")
        return EXIT_FAILED
    return 0


def _verify_split(
    folder: ImageFolder, known: dict[str, Verified], report: Path, options: VerifyOptions
) -> ImageFolder:
    """The folder without its bad images. `known`, by split, and the report are brought up to date."""
    split, stamps = folder.root.name, verified.stamps(folder)
    # From before decoding: it is not that of a file that changes meanwhile.
    fingerprint = verified.fingerprint(stamps)
    if split in known and known[split].fingerprint == fingerprint:
        print(f"{folder.root}: has not changed since {report} was written")
    else:
        _check_writable(report)  # before it takes hours
        bad = _decode(folder, stamps, options.workers)
        known[split] = Verified(fingerprint, len(stamps), bad)
        verified.write(report, known)
    bad = known[split].bad
    for name, reason in bad.items():
        print(f"{folder.root}/{name}: {reason}")
    print(f"{folder.root}: {len(bad)} of {len(stamps)} images are bad")
    if bad and options.move_to:
        _move(folder, bad, options.move_to / split)
        stamps = {name: stamp for name, stamp in stamps.items() if name not in bad}
        known[split] = Verified(verified.fingerprint(stamps), len(stamps), {})
        verified.write(report, known)
    return verified.without(folder, bad)


def _check_writable(report: Path) -> None:
    try:
        if report.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=report.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write {report}: {error.strerror}; name a file elsewhere with --report FILE"
        ) from None


def _decode(folder: ImageFolder, stamps: dict[str, Stamp], workers: int) -> dict[str, str]:
    """What is wrong with each of the bad images, by the path below the folder's root."""
    bad: dict[str, str] = {}
    size, started = 0, time.perf_counter()
    reasons = contextlib.closing(_reasons(folder.paths, workers))
    title = folder.root.name
    with (
        _without_decoders_messages(),
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


def _reasons(paths: list[str], workers: int) -> Generator[str | None]:
    """For each of the images what is wrong with it, None if nothing is."""
    local = threading.local()

    def check(batch: list[str]) -> list[str | None]:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(BATCH)
        found: list[str | None] = local.decoder.reasons(batch)
        return found

    batches = (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
    for found in ordered_map(check, batches, workers):
        yield from found


def _move(folder: ImageFolder, names: Container[str], target: Path) -> None:
    """Move the images of these names. Raises UsageError, before any is moved, if one is there already."""
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
def _without_decoders_messages() -> Iterator[None]:
    """Drop what libjpeg, libpng and DALI write to file descriptor 2: it does not name the image.

    Python's own stderr goes on, through a copy of the descriptor.
    """
    with contextlib.ExitStack() as stack:
        own = os.dup(2)
        stack.callback(os.close, own)
        if sys.stderr is sys.__stderr__:  # else it is somebody else's, who knows where it leads
            stderr = stack.enter_context(os.fdopen(own, "w", buffering=1, closefd=False))
            stack.enter_context(contextlib.redirect_stderr(stderr))
        with open(os.devnull, "wb") as null:  # noqa: PTH123
            os.dup2(null.fileno(), 2)
        stack.callback(os.dup2, own, 2)
        yield


class Decoder:
    """Tries whether DALI's decoder of the CPU takes files as a whole. For one thread at a time.

    In 3000 damaged files, training's crop of a file never failed where the whole of it had decoded; PIL,
    asked instead, had let 8 bad ones pass, and had turned away 170 that DALI reads.
    """

    def __init__(self, batch_size: int = 1) -> None:
        self._batch_size = batch_size
        self._pipeline: Any = None

    def reasons(self, paths: list[str]) -> list[str | None]:
        """For each of these, at most `batch_size`, what is wrong with it; None if nothing is."""
        # DALI would wait for ever for a pipe.
        if all(map(os.path.isfile, paths)) and self._failure(paths) is None:
            return [None] * len(paths)
        return [self.reason(path) for path in paths]

    def reason(self, path: str) -> str | None:
        """What is wrong with the file; None if nothing is."""
        if not os.path.isfile(path):  # noqa: PTH113 - pathlib is slow on a million files
            return decode_error(path) or "it was no file a moment ago"
        error = self._failure([path])
        if error is None:
            return None
        # PIL says what is wrong in words, DALI by numbers.
        return (
            decode_error(path)
            or f"PIL decodes it, but DALI does not ({dali_error_line(error)}); save it anew"
        )

    def _failure(self, paths: list[str]) -> Exception | None:
        """What DALI says if it cannot decode them all."""
        if self._pipeline is None:  # none is valid after an error; a new one takes 5 ms
            self._pipeline = build_decoder(self._batch_size)
        try:
            self._pipeline.run(paths=path_batch(paths))
        except (RuntimeError, MemoryError) as error:
            self._pipeline = None
            return error
        return None
