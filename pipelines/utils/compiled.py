"""Functions compiled by numba, whose code is kept on disk: compiling takes seconds at each start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import njit

_CONFIG: Any = numba.config  # which has what NUMBA_... says, by names that are made at run time


def compiler(*sources: str | None) -> Callable[[Any], Any]:
    """Return what compiles functions without the GIL, once for all processes if their code can be kept.

    sources: the functions' own file, beside which code is kept unless NUMBA_CACHE_DIR is set, and those of
    all that they call. numba looks at the date of the first alone, and would go on with older code of the
    others; here each state of the files has a folder of its own.
    """
    paths = [Path(str(source)) for source in sources]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    beside = Path(_CONFIG.CACHE_DIR or paths[0].parent / "__pycache__")
    folders = (folder / f"numba-{digest}" for folder in (beside, Path(home) / "numba"))
    kept = next(filter(_is_writable, folders), None)

    def compiled(function: Any) -> Any:
        if kept is None:
            return njit(nogil=True)(function)
        with _cache_folder(str(kept)):
            return njit(nogil=True, cache=True)(function)

    return compiled


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _cache_folder(path: str) -> Iterator[None]:
    before = _CONFIG.CACHE_DIR
    _CONFIG.CACHE_DIR = path
    try:
        yield
    finally:
        _CONFIG.CACHE_DIR = before
