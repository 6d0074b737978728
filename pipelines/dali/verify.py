"""`rsnet verify DIR`: find the images that would end a training, before it starts.

DALI itself decides, image by image, whether it can decode a file: it is neither as tolerant as PIL nor as
strict. A size limit, and the rule of `image_formats`, come before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Container, Generator
from pathlib import Path

from pipelines import verify_report
from pipelines.dali.decoder import Decoder, Messages, decoder_messages
from pipelines.dali.options import VerifyOptions
from pipelines.image_folder import ImageFolder, announce, scan_folder
from pipelines.image_formats import DECODES_WITH_ERRORS
from pipelines.utils.cli import EXIT_FAILED
from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from pipelines.utils.progress import ProgressBar, format_bytes
from pipelines.utils.reading import cannot_read, file_state
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
    announce(*folders)
    known = verify_report.read(report)
    left = [_verify_split(folder, known, report, options) for folder in folders]
    for folder in left:
        verify_report.require_every_class(folder)
    if any(known[folder.root.name].bad for folder in folders):
        say(f"train_dali.py --skip-bad leaves out what {report} lists; verify --move-to moves it")
        return EXIT_FAILED
    return 0


def _verify_split(
    folder: ImageFolder, known: dict[str, SplitReport], report: Path, options: VerifyOptions
) -> ImageFolder:
    """Return the folder without its bad images; update `known`, by split, and the report."""
    split, stamps = folder.root.name, verify_report.stamps(folder)
    # Taken before decoding, so that a file that changes meanwhile is noticed.
    fingerprint = verify_report.fingerprint(stamps)
    if _is_known(known.get(split), fingerprint, options):
        say(f"{folder.root}: has not changed since {report} was written")
    else:
        _check_writable(report)  # before it takes hours
        bad, faulty = _decode(folder, stamps, options)
        known[split] = SplitReport(fingerprint, len(stamps), bad, faulty, options.max_megapixels)
        verify_report.write(report, known)
    bad, faulty = known[split].bad, known[split].faulty or {}
    for name, reason in bad.items():
        say(f"{folder.root}/{name}: {reason}")
    for name, words in faulty.items():
        say(f"{folder.root}/{name}: {DECODES_WITH_ERRORS}: {words}")
    say(f"{folder.root}: {len(bad)} of {len(stamps)} images are bad")
    if faulty:
        say(
            f"{folder.root}: {len(faulty)} more decode with errors; --skip-bad --strict leaves them out"
        )
    if bad and options.move_to:
        _move(folder, bad, options.move_to / split)
        stamps = {name: stamp for name, stamp in stamps.items() if name not in bad}
        known[split] = dataclasses.replace(
            known[split], fingerprint=verify_report.fingerprint(stamps), images=len(stamps), bad={}
        )
        verify_report.write(report, known)
    return verify_report.without(folder, bad)


def _is_known(known: SplitReport | None, fingerprint: str, options: VerifyOptions) -> bool:
    """Return whether the report answers for the folder in this state."""
    return (
        known is not None
        and known.fingerprint == fingerprint
        and known.faulty is not None
        and known.max_megapixels == options.max_megapixels
    )


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
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what is wrong with each bad image, and with those that decode with errors.

    By path below the folder's root.
    """
    bad: dict[str, str] = {}
    heard: list[str] = []
    size, started = 0, time.perf_counter()
    with (
        decoder_messages() as messages,
        contextlib.closing(_reasons(folder.paths, options, messages)) as found,
        ProgressBar(folder.root.name, len(stamps)) as progress,
    ):
        results = zip(stamps.items(), found, strict=True)
        for done, ((name, stamp), (reason, message)) in enumerate(results):
            if reason is not None:
                _require_there(folder.root / name, stamp)
                bad[name] = reason
            elif message:
                heard.append(name)
            size += stamp[0] if stamp else 0
            progress.update(done + 1, size, len(bad))
        # Threads decoded at once: only now can a message be told to be of an image.
        decoder = Decoder(max_megapixels=options.max_megapixels)
        words = {name: decoder.words(str(folder.root / name), messages) for name in heard}
    speed = len(stamps) / (time.perf_counter() - started)
    say(f"{folder.root}: {len(stamps)} images, {format_bytes(size)}, {speed:.0f} images/s")
    return bad, {name: said for name, said in words.items() if said}


def _require_there(path: Path, stamp: Stamp) -> None:
    """Raise RunError if a file is gone that was there before: the disk or network of all may be."""
    if stamp is not None and file_state(str(path)) is None:
        raise cannot_read(path, "it was there a moment ago")


def _reasons(
    paths: list[str], options: VerifyOptions, messages: Messages
) -> Generator[tuple[str | None, bool]]:
    """Yield for each of the images what is wrong with it, None if nothing is.

    And whether decoders said something meanwhile, perhaps of another one.
    """
    local = threading.local()

    def check(batch: list[str]) -> list[tuple[str | None, bool]]:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(BATCH, options.max_megapixels)
        before = messages.size
        found: list[str | None] = local.decoder.reasons(batch)
        heard = messages.size > before
        return [(reason, heard) for reason in found]

    batches = (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
    for found in ordered_map(check, batches, options.workers):
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
    say(f"{folder.root}: moved {len(moves)} images to {target}")
