"""Tables as plain text."""

from __future__ import annotations

from pipelines.utils.tables import text_table


def test_columns_are_aligned_and_no_cell_is_cut_or_taken_for_markup():
    rows = [["[b]x[/b]", "1.50"], ["y" * 300, "12.25"]]
    header, *lines = text_table(["name", "top-1 %"], rows, left=(0,)).splitlines()
    width = 300 + 2
    assert header == f"{'name':{width}}top-1 %"
    assert lines == [f"{name:{width}}{value:>7}" for name, value in rows]


def test_numbers_end_below_each_other():
    text = text_table(["size", "loss"], [["224", "1.5"], ["ensemble", "10.25"]])
    assert text.splitlines() == ["    size   loss", "     224    1.5", "ensemble  10.25"]


def test_control_characters_are_escaped():
    assert text_table(["a"], [["red\x1b[31m\n"]]).splitlines()[1] == "red\\x1b[31m\\n"
