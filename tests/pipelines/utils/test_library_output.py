"""What libraries print does not reach the console, and explains errors."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings

import pytest

from pipelines.utils import library_output
from pipelines.utils.library_output import apart_from_libraries, keep_library_output
from pipelines.utils.output import guard_output
from tests.helpers import processes

BEGIN = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from pipelines.utils.library_output import apart_from_libraries, keep_library_output
path = Path(sys.argv[-1])
"""


def _run(code: str, path) -> tuple[int, list[str], list[str]]:
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(code), path]
    done = processes.run(command, cwd=processes.ROOT)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_what_libraries_print_goes_to_the_file_and_what_we_say_to_the_console(tmp_path):
    path = tmp_path / "libraries.log"
    path.write_text("of the run before\n")
    code, out, err = _run(
        """
        print("before")
        with apart_from_libraries():
            os.write(1, b"a C library on 1\\n")
            os.write(2, b"a C library on 2\\n")
            print("ours")
            keep_library_output(path)
            subprocess.run(["sh", "-c", "echo a child; echo its error >&2"])
            warnings.warn("a warning")
            logging.getLogger("library").warning("a record")
            print("ours, too", file=sys.stderr)
        print("after")
        os.write(2, b"nobody's\\n")
        """,
        path,
    )
    assert (code, out) == (0, ["before", "ours", "after"])
    assert err == ["ours, too", "nobody's"]
    text = path.read_text()
    lines = [line for line in text.splitlines() if "warning" not in line and "warn(" not in line]
    assert lines == [
        "of the run before", "a C library on 1", "a C library on 2", "a child", "its error", "a record",
    ]  # fmt: skip
    assert text.count("UserWarning: a warning") == 1


@pytest.mark.parametrize("keeps", [True, False], ids=["with a file", "without one"])
def test_an_error_comes_with_what_libraries_printed(tmp_path, keeps):
    path = tmp_path / "libraries.log"
    path.write_text("of the run before\n")
    code, out, err = _run(
        f"""
        with apart_from_libraries():
            os.write(2, b"assertion failed in kernel\\n")
            {"keep_library_output(path)" if keeps else ""}
            raise RuntimeError("device-side assert")
        """,
        path,
    )
    assert (code, out) == (1, [])
    assert err[0] == (
        f"the output of libraries is in {path}" if keeps else "assertion failed in kernel"
    )
    assert err[1].startswith("Traceback")
    assert err[-1] == "RuntimeError: device-side assert"


def test_a_crash_of_a_library_is_seen_on_the_console(tmp_path):
    code, _, err = _run("with apart_from_libraries():\n    os.abort()", tmp_path / "x")
    assert code == -6
    assert err[0] == "Fatal Python error: Aborted"
    assert any("<string>" in line for line in err)


def test_without_such_output_there_is_no_file_and_every_stream_is_as_before(tmp_path):
    guard_output(False)
    before = sys.stdout, sys.stderr, warnings.showwarning, len(os.listdir("/proc/self/fd"))
    with apart_from_libraries():
        keep_library_output(tmp_path / "libraries.log")
        assert (tmp_path / "libraries.log").exists()
    assert not list(tmp_path.iterdir())
    after = sys.stdout, sys.stderr, warnings.showwarning, len(os.listdir("/proc/self/fd"))
    assert after == before
    assert library_output._taken is None


def test_a_folder_that_takes_no_file_changes_nothing(tmp_path):
    with apart_from_libraries():
        keep_library_output(tmp_path / "none" / "libraries.log")
        os.write(2, b"chatter\n")
    assert not list(tmp_path.iterdir())
