"""Checks of what a file says before it is used: fields, their types and their ranges."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.utils.errors import DataError, RunError, UsageError, first_line, os_error_line

# Counters in files are exact as long as a float64 can hold them.
MAX_COUNT = 2**53


class FieldError(DataError):
    """A field that is missing, or for which its rule does not hold; the file is not named."""


@dataclass(frozen=True)
class Rule:
    """A check of one field; `what` completes "must be"."""

    what: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.what} or {other.what}", lambda v: self.holds(v) or other.holds(v))


def integer(low: int, high: int = MAX_COUNT) -> Rule:
    """Return a rule for a range of integers; True is none."""
    return Rule(f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float) -> Rule:
    """Return a rule for a range of numbers; NaN is in no range."""
    return Rule(
        f"a number from {low} to {high}", lambda v: type(v) in (int, float) and low <= v <= high
    )


def one_of(*values: Any) -> Rule:
    """Return a rule for some values, all of one type."""
    return Rule(
        " or ".join(map(json.dumps, values)), lambda v: type(v) is type(values[0]) and v in values
    )


def pattern(what: str, expression: str) -> Rule:
    """Return a rule for a text that matches a regular expression as a whole."""
    return Rule(
        what, lambda v: isinstance(v, str) and re.fullmatch(expression, v, re.A) is not None
    )


def list_of(what: str, item: Rule) -> Rule:
    """Return a rule for a list (or tuple) whose items all hold."""
    return Rule(what, lambda v: isinstance(v, list | tuple) and all(map(item.holds, v)))


def dict_of(what: str, item: Rule) -> Rule:
    """Return a rule for a dict of names whose values all hold."""
    return Rule(
        what,
        lambda v: isinstance(v, dict) and all(isinstance(k, str) and item.holds(v[k]) for k in v),
    )


TEXT = Rule("a text", lambda v: isinstance(v, str))
OBJECT = Rule("an object", lambda v: isinstance(v, dict))
NOTHING = Rule("null", lambda v: v is None)


def require(name: str, rule: Rule, value: Any) -> None:
    """Raise FieldError if a rule does not hold."""
    if not rule.holds(value):
        raise FieldError(f"{name} is {reprlib.repr(value)}, must be {rule.what}")


def require_fields(value: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """Raise FieldError that names the first field which is missing, or for which its rule does not hold."""
    for name, rule in rules.items():
        if name not in value:
            raise FieldError(f"{where}{name} is missing")
        require(where + name, rule, value[name])


def read_json(path: Path, remedy: str) -> Any:
    """Return what a JSON file holds. Raises as `parsing` does."""
    with parsing(path, remedy):
        return json.loads(path.read_bytes())


@contextmanager
def parsing(path: Path | str, remedy: str) -> Iterator[None]:
    """Turn whatever a damaged file makes of the block that reads it into one DataError.

    remedy: what to do, after a semicolon. Errors of this project pass as they are.
    """
    try:
        yield
    except FieldError as error:
        raise DataError(f"{path} is damaged ({error}); {remedy}") from error
    except (UsageError, DataError, RunError):
        raise
    except OSError as error:
        raise DataError(os_error_line(error)) from error
    except (
        ValueError,  # no JSON, no UTF-8, a number that is none
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{path} is damaged ({reason}); {remedy}") from error
