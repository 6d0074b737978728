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
from functools import partial
from pathlib import Path

import numpy as np

from pipelines import verify_report
from pipelines.dali.decoder import Decoder, Messages, decoder_messages
from pipelines.dali.options import VerifyOptions
from pipelines.image_formats import DECODES_WITH_ERRORS
from pipelines.sources.folder import ImageFolder
from pipelines.sources.source import Source
from pipelines.sources.splits import announce, open_each
from pipelines.utils.cli import EXIT_FAILED
from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from pipelines.utils.progress import ProgressBar, format_bytes
from pipelines.utils.reading import Stamp, cannot_read, file_state
from pipelines.utils.thread_map import ordered_map
from pipelines.verify_report import SplitReport

BATCH = 16  # images; a fifth faster than one by one, but each is decoded again if one is bad


def verify(options: VerifyOptions) -> int:
    """Verify the splits of `options.data`; return 0 if no bad image is left, else 1.

    Raises UsageError for a mistake in the options, DataError if all images of a class are bad, RunError if
    an image or a folder cannot be read: then nothing is recorded.
    """
    sources = open_each(options.data, options)
    for source in sources:
        _check_target(source, options.move_to)
    by_split = {source.split: source for source in sources}
    announce(by_split.get("train"), by_split.get("val"))
    reports = {source.split: options.report or source.report for source in sources}
    known = {report: verify_report.read(report) for report in reports.values()}
    left = [_verify_split(s, known[reports[s.split]], reports[s.split], options) for s in sources]
    for source, rest in zip(sources, left, strict=True):
        verify_report.require_every_class(source, rest)
    with_bad: dict[Path, None] = {}  # each report once, in order
    for source in sources:
        report = reports[source.split]
        if known[report][_key(source, options)].bad:
            with_bad[report] = None
    if not with_bad:
        return 0
    move = "; verify --move-to moves it" if isinstance(sources[0], ImageFolder) else ""
    listed = " and ".join(map(str, with_bad))
    say(f"--skip-bad of a training leaves out what {listed} lists{move}")
    return EXIT_FAILED


def _key(source: Source, options: VerifyOptions) -> str:
    return verify_report.key(source, options.report is not None)


def _check_target(source: Source, move_to: Path | None) -> None:
    """Raise UsageError if bad images cannot be moved there."""
    if move_to is None:
        return
    if not isinstance(source, ImageFolder):
        raise UsageError(f"--move-to: only of a folder's images, which {source.place} are not")
    if move_to.resolve().is_relative_to(source.root.resolve()):
        raise UsageError(f"--move-to: {move_to} lies among the images of {source.root}")


def _verify_split(
    source: Source, known: dict[str, SplitReport], report: Path, options: VerifyOptions
) -> Source:
    """Return the split without its bad images; update `known`, by split, and the report."""
    key = _key(source, options)
    place, stamps = source.place, source.stamps()
    # Taken before decoding, so that a file that changes meanwhile is noticed.
    fingerprint = verify_report.fingerprint(stamps)
    if _is_known(known.get(key), fingerprint, options):
        say(f"{place}: has not changed since {report} was written")
    else:
        _check_writable(report)  # before it takes hours
        bad, faulty = _decode(source, stamps, options)
        known[key] = SplitReport(fingerprint, len(stamps), bad, faulty, options.max_megapixels)
        verify_report.write(report, known)
    bad, faulty = known[key].bad, known[key].faulty or {}
    found = {
        name: source.locate(i) for i, name in enumerate(stamps) if name in bad or name in faulty
    }
    for name, reason in bad.items():
        say(f"{found[name]}: {reason}")
    for name, words in faulty.items():
        say(f"{found[name]}: {DECODES_WITH_ERRORS}: {words}")
    say(f"{place}: {len(bad)} of {len(stamps)} images are bad")
    if faulty:
        say(f"{place}: {len(faulty)} more decode with errors; --skip-bad --strict leaves them out")
    if bad and options.move_to and isinstance(source, ImageFolder):
        _move(source, bad, options.move_to / source.split)
        stamps = {name: stamp for name, stamp in stamps.items() if name not in bad}
        known[key] = dataclasses.replace(
            known[key], fingerprint=verify_report.fingerprint(stamps), images=len(stamps), bad={}
        )
        verify_report.write(report, known)
    return verify_report.without(source, bad)


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
    source: Source, stamps: dict[str, Stamp], options: VerifyOptions
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what is wrong with each bad image, and with those that decode with errors.

    By name.
    """
    bad: dict[str, str] = {}
    heard: list[int] = []
    names, size, started = list(stamps), 0, time.perf_counter()
    with (
        decoder_messages() as messages,
        contextlib.closing(_reasons(source, options, messages)) as found,
        ProgressBar(source.split, len(stamps)) as progress,
    ):
        results = zip(stamps.items(), found, strict=True)
        for done, ((name, stamp), (reason, message)) in enumerate(results):
            if reason is not None:
                _require_there(source, done, stamp)
                bad[name] = reason
            elif message:
                heard.append(done)
            size += stamp[0] if stamp else 0
            progress.update(done + 1, size, len(bad))
        # Several threads decoded at once; decoding one image at a time tells which one a message is about.
        decoder = Decoder(max_megapixels=options.max_megapixels)
        words = {names[i]: decoder.words(source.locate(i), source.read(i), messages) for i in heard}
    speed = len(stamps) / (time.perf_counter() - started)
    say(f"{source.place}: {len(stamps)} images, {format_bytes(size)}, {speed:.0f} images/s")
    return bad, {name: said for name, said in words.items() if said}


def _require_there(source: Source, index: int, stamp: Stamp) -> None:
    """Raise RunError if a file is gone that was there before: the disk or network of all may be."""
    place = source.locate(index)
    if source.has_files and stamp is not None and file_state(place) is None:
        raise cannot_read(place, "it was there a moment ago")


def _reasons(
    source: Source, options: VerifyOptions, messages: Messages
) -> Generator[tuple[str | None, bool]]:
    """Yield for each of the images what is wrong with it, None if nothing is.

    And whether decoders said something meanwhile, perhaps of another one.
    """
    local = threading.local()

    def check(batch: range) -> list[tuple[str | None, bool]]:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(BATCH, options.max_megapixels)
        before = messages.size
        images = [(source.locate(i), partial(source.read, i)) for i in batch]
        found: list[str | None] = local.decoder.reasons(images)
        heard = messages.size > before
        return [(reason, heard) for reason in found]

    every = range(len(source))
    source.expect(np.arange(len(source)))
    batches = (every[i : i + BATCH] for i in range(0, len(every), BATCH))
    for found in ordered_map(check, batches, options.workers, source.stop):
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
