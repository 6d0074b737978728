"""One-line messages for mistakes on the command line, which say what to type instead."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence

from pipelines.utils.option_docs import OptionDoc
from pipelines.utils.synonyms import VERBS

HELP = "(--help lists all options)"
OFTEN_MEANT = ("--data", "--output")  # by a word without an option's name

# tyro's words, which speak of types and of the None that an unset option has, and what is meant.
_PLAIN = (
    (r"^Error parsing (?:\w+: )?(?=--)", ""),
    (
        r"no type matching (?:\{None\}\|)?(?:\{\[)?(.+?)(?:\]\})? could be instantiated from \[(.*)\]\.$",
        r"\1 is needed, not \2",
    ),
    (r"'None', |, 'None'(?=\))", ""),
)


def in_plain_words(box: str) -> str:
    """Return the message in the box that tyro draws around an error, as one line.

    The box is of lines where stdout can show them, else of dashes, with one under its title, too.
    """
    message: list[str] = []
    for line in _lines(box)[1:]:
        if line.strip(" ─-"):
            message.append(line.strip())
        elif message:
            break
    text = " ".join(message)
    for pattern, plain in _PLAIN:
        text = re.sub(pattern, plain, text)
    return f"{text} {HELP}"


def missing(box: str, options: Sequence[OptionDoc]) -> list[OptionDoc]:
    """Return those of a command's options that tyro says are missing, none for another error."""
    lines = _lines(box)
    if not any(line.strip().startswith("Missing from ") for line in lines):
        return []
    # Names have an indentation of four, what they mean one of eight.
    named = [words for line in lines if re.match(r" {4}\S", line) for words in [line.split()]]
    return [o for o in options if o.is_required and any(o.names[0] in words for words in named)]


def of_missing(lacking: Sequence[OptionDoc], words: Sequence[str], usage: str) -> str:
    """Return the message for options that are missing. words: that belong to no option.

    usage: of the command.
    """
    names = [option.names[0] for option in lacking]
    verb = "is" if len(names) == 1 else "are"
    given = _with_names(lacking, words)
    way_out = f"did you mean {given}?" if given else f"usage: {usage}"
    return f"{', '.join(names)} {verb} missing; {way_out} {HELP}"


def of_extra(words: Sequence[str], options: Sequence[OptionDoc], typed: Collection[str]) -> str:
    """Return the message for words that belong to no option. typed: the flags of the command line."""
    if words[0].startswith("-"):
        return f"{words[0]}: there is no such option; --help lists all options"
    if words[0].endswith(".tar"):
        return f"{words[0]}: it belongs to no option or argument; a pattern needs quotes {HELP}"
    meant: tuple[str, ...] = ("--resume",) if {"--evaluate", "-e"} & {*typed} else OFTEN_MEANT
    if any(map(os.path.exists, words)):  # no name for something new
        meant = tuple(flag for flag in meant if flag != "--output")
    unset = [o for o in options if o.names[0] in meant and not {*o.names} & {*typed}]
    unset.sort(key=lambda option: meant.index(option.names[0]))
    given = _with_names(unset[: len(words)], words)
    way_out = f"; did you mean {given}?" if given else ""
    return f"{words[0]}: it belongs to no option or argument{way_out} {HELP}"


def _with_names(options: Sequence[OptionDoc], words: Sequence[str]) -> str:
    """Return words with the options that they are hardly meant without; "" if one of them fits none."""
    left = list(words)
    pairs = []
    for option in options:
        fitting = [word for word in left if word.isdigit() == (option.values == "INT")]
        if fitting:
            left.remove(fitting[0])
        pairs.append(f"{option.names[0]} {shlex.quote(fitting[0]) if fitting else option.takes}")
    return "" if left or not words else " ".join(pairs)


def _lines(box: str) -> list[str]:
    """Return the lines in a box without its border."""
    return [re.sub(r"[│╭╮╰╯]", " ", line)[2:].rstrip() for line in box.splitlines()]


def unknown_verb(word: str, verbs: Collection[str], aliases: Mapping[str, str]) -> str:
    """Return the message for the first word of a command line that is no verb."""
    name = word.lstrip("-").lower().replace("_", "-")
    meant = [verb for verb, others in VERBS.items() if name in others.split() and verb in verbs]
    meant += [verb for verb in verbs if len(name) > 1 and verb.startswith(name)]
    near = difflib.get_close_matches(name, [*verbs, *aliases], n=1)
    meant += [aliases.get(verb, verb) for verb in near]
    if meant:
        return f"{word}: there is no such verb; did you mean {meant[0]}?"
    if word.startswith("-"):
        return f"{word}: options follow a verb, one of {' '.join(verbs)}"
    return f"{word}: there is no such verb; one of {' '.join(verbs)}"
