"""C functions that code compiled by numba calls by name, so that what is compiled can be kept on disk.

numba keeps no code with a ctypes pointer in it: the address is another in every process.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding
from numba.core import types
from numba.core.typing.templates import Signature

from pipelines.ffcv.turbojpeg import lib

_INT, _LONG, _ULONG, _ADDRESS = types.intc, types.int64, types.uint64, types.uintp


def _external(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """Return a C function for compiled code, under a name that no other library has."""
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"rsnet_{name}", address)
    signature = Signature(result, arguments, recvr=None)  # type: ignore[no-untyped-call]
    return types.ExternalFunction(f"rsnet_{name}", signature)


# (file descriptor, where to, bytes, position) -> bytes that were read
pread = _external(ctypes.CDLL(None), "pread", _LONG, _INT, _ADDRESS, _ULONG, _LONG)

# As in `turbojpeg`, with addresses for pointers.
decompress = _external(
    lib, "tjDecompress2", _INT,
    _ADDRESS, _ADDRESS, _ULONG, _ADDRESS, _INT, _INT, _INT, _INT, _INT,
)  # fmt: skip
read_header = _external(
    lib, "tjDecompressHeader3", _INT,
    _ADDRESS, _ADDRESS, _ULONG, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS,
)  # fmt: skip
open_handle = _external(lib, "tjInitDecompress", _ADDRESS)
close_handle = _external(lib, "tjDestroy", _INT, _ADDRESS)
