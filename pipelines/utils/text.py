"""Text for messages: names of others made safe for a terminal, told apart, and cut short."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """Escape what would move the terminal's cursor: paths and a release's names are others' texts."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(text: str) -> str:
    """Escape the bytes of a file's name that are no UTF-8, which neither Parquet nor JSON takes."""
    return text.encode(errors="backslashreplace").decode()


def distinct(name: str) -> str:
    """Return a name such that no other looks the same: with its code points, if it is not plain ASCII."""
    plain = name.isascii() and name.isprintable() and name == name.strip()
    return name if plain else f"{printable(name)} ({name!a})"


def first_names(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are, as text."""
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
