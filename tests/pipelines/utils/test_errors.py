"""The errors of a command: their kinds, exit codes and messages."""

from __future__ import annotations

import pytest

from pipelines.utils.errors import DataError, RunError, UsageError, error_context, first_line


@pytest.mark.parametrize(("kind", "code"), [(UsageError, 2), (DataError, 1), (RunError, 1)])
def test_a_context_names_the_file_and_keeps_the_kind_of_error(kind, code):
    with pytest.raises(kind) as end, error_context("x.json"):
        raise kind("it is damaged")
    assert type(end.value) is kind
    assert str(end.value) == "x.json: it is damaged"
    assert end.value.exit_code == code


def test_a_context_leaves_a_fault_of_the_program_alone():
    with pytest.raises(KeyError) as end, error_context("x.json"):
        raise KeyError("field")
    assert end.value.args == ("field",)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (KeyError(), "KeyError"), (OSError(" \n"), "OSError")],
)
def test_the_first_line_of_an_error_is_never_empty(error, line):
    assert first_line(error) == line
