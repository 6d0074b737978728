"""benchmarks/int8.py gives figures of both precisions, and says what the CPU can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import int8


def test_the_machine_is_what_cpuinfo_says(monkeypatch):
    text = "model name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n"
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert int8.machine() == {"cpu": "A CPU", "flags": ["avx2", "avx512f", "avx512_vnni"]}


@pytest.mark.slow
def test_both_precisions_are_measured_beside_each_other(tmp_path):
    options = int8.Options(rounds=2, calibrated=2)
    found = int8.measure("parallel_resnet10", 32, options, tmp_path)
    assert set(found["ms"]) == {"float32", "int8"}
    assert found["times_as_fast"] > 0
    assert 0 < found["difference"] < 0.5
    assert found["megabytes"]["int8"] < found["megabytes"]["float32"] / 3
