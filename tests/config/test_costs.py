"""Costs in files of this version and of those before."""

from __future__ import annotations

import pytest

from rsnet.config.costs import require_gmacs


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"gflops": {"224": 8.18, "ensemble": 20}}, {"gmacs": {"224": 4.09, "ensemble": 10.0}}),
        ({"gmacs": {"224": 4.09}}, {"gmacs": {"224": 4.09}}),
        ({"gflops": {"224": "8"}}, {"gmacs": {"224": "8"}}),
        ({"gflops": 8.18}, {"gflops": 8.18}),
        ({}, {}),
    ],
    ids=["before", "today", "no number", "no table", "none"],
)
def test_gflops_of_earlier_files_are_read_as_half_as_many_gmacs(before, after):
    require_gmacs(before)
    assert before == after
