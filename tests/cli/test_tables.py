"""Plain-text tables."""

from __future__ import annotations

from rsnet.cli.tables import text_table


def test_columns_are_as_wide_as_their_cells_and_lines_end_without_blanks():
    rows = [["a/long/path.jpg", "64", "ant 99.0"], ["b.jpg", "128", ""]]
    assert text_table(["image", "size", "classes"], rows, left=(0, 2)).splitlines() == [
        "image            size  classes",
        "a/long/path.jpg    64  ant 99.0",
        "b.jpg             128",
    ]


def test_long_cells_are_neither_cut_nor_wrapped_and_markup_is_plain_text():
    cell = "[bold]" + "x" * 5000
    assert text_table(["a", "b"], [[cell, "1"]], left=(0,)).splitlines()[1] == f"{cell}  1"


def test_control_characters_are_escaped():
    assert text_table(["a"], [["red\x1b[31m\n"]]).splitlines()[1] == "red\\x1b[31m\\n"
