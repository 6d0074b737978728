"""uv, which builds and installs the package as a user's pip does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")


def uv(*words: str) -> str:
    """Run uv in the repository's root and return its stdout; skips where it or the network is missing."""
    if shutil.which(UV) is None:
        pytest.skip("uv is not installed; ./install.sh brings it")
    done = subprocess.run([UV, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode and any(
        w in done.stderr for w in ("Failed to fetch", "dns error", "offline")
    ):
        pytest.skip(f"no network: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return done.stdout
