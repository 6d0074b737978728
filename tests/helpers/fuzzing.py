"""Strategies of hypothesis for files that are damaged, or made by somebody who means harm."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pipelines.utils.errors import DataError, RunError, UsageError

# The same examples every time: what fails is found again, and costs the same.
QUICK = settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
efforts = pytest.mark.parametrize(
    "effort",
    [
        pytest.param(QUICK, id="few"),
        pytest.param(settings(QUICK, max_examples=100), id="many", marks=pytest.mark.slow),
    ],
)

JUNK = [None, True, -1, 0, 3, 2**70, 1.5, float("nan"), float("inf"), "x", "a\nb", "\ud800", [], {}]
JUNK += [[[1]], {"x": {}}, [None] * 3]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of a file, some of which are changed, lost, put in or repeated."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        kind = draw(st.sampled_from(["change", "lose", "insert", "repeat", "cut"]))
        length = draw(st.integers(1, 40))
        if kind == "cut":
            del found[at:]
        elif kind == "lose":
            del found[at : at + length]
        elif kind == "repeat":
            found[at:at] = found[max(0, at - length) : at]
        else:
            found[at : at + (length if kind == "change" else 0)] = draw(st.binary(max_size=length))
    return bytes(found)


@st.composite
def altered(draw: st.DrawFn, sound: Callable[[], Any], junk: Sequence[Any] = JUNK) -> Any:
    """Nested dicts and lists, in which one to three values are others, or are not there.

    sound: gives what to copy; a function, because hypothesis prints all arguments.
    """
    changed = copy.deepcopy(sound())
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            return junk[0]
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.integers(0, 4)) == 0:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(junk[draw(st.integers(0, len(junk) - 1))])
    return changed


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (dict or list, key or index) of the nested structure."""
    if isinstance(content, dict):
        keys: Any = list(content)
    elif isinstance(content, list):
        keys = range(len(content))
    else:
        return
    for key in keys:
        yield content, key
        yield from _places(content[key])


def accepts_or_refuses(read: Callable[[], object]) -> None:
    """Call `read`, which may raise the errors that commands end with in one line, and no other."""
    with contextlib.suppress(UsageError, DataError, RunError):
        read()
