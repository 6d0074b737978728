"""Words of a command line that are missing, too many, or hardly meant: what is typed instead, in a line."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from typing import Annotated, Any, get_type_hints

import pytest
from tyro.conf import Positional, arg

from pipelines.__main__ import VERBS as PIPELINE_VERBS
from pipelines.utils.cli import parse_options, verb_command
from pipelines.utils.errors import UsageError
from rsnet.__main__ import ALIASES, VERBS, main

SEVERAL = ("list", "predict", "report", "sync")  # take any number of arguments
TO_LIST = " (--help lists all options)"


def _options(verb: str) -> Any:
    """The dataclass of its options; of train, the one option that is needed."""
    found = VERBS[verb]
    if found.options is None:
        found = VERBS["shards"]
    return getattr(importlib.import_module(found.module), found.options)


def _needed(verb: str) -> dict[str, str]:
    """By its name, a value of each option without a default; of an argument, the value alone."""
    if verb == "train":
        return {"--data": "x"}
    options = _options(verb)
    hints = get_type_hints(options, include_extras=True)
    found = {}
    for field in dataclasses.fields(options):
        if field.default is field.default_factory is dataclasses.MISSING:
            is_argument = "Positional" in str(getattr(hints[field.name], "__metadata__", ""))
            value = "8" if hints[field.name] is int else "x"
            found[field.name if is_argument else f"--{field.name.replace('_', '-')}"] = value
    return found


@pytest.mark.parametrize(
    "verb", [verb for verb in VERBS if _needed(verb) and verb not in ("report", "sync")]
)
def test_what_a_verb_needs_is_named_with_its_usage_and_nothing_else(verb, capsys):
    assert main([verb]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    names, _, usage = line.removeprefix(f"rsnet {verb}: error: ").partition(" missing; usage: ")
    assert usage.startswith(f"rsnet {verb} ")
    assert usage.endswith(f" [options]{TO_LIST}")
    flags = {name for name in _needed(verb) if name.startswith("--")}
    assert {name for name in names.replace(",", "").split() if name.startswith("--")} == flags
    assert all(f" {flag} " in usage for flag in flags)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in SEVERAL])
def test_a_word_that_is_too_much_is_named(verb, capsys):
    given = [w for name, value in _needed(verb).items() for w in (name, value) if w[0] in "-x8"]
    more = {"release": ["--output", "y"], "tune": ["--target-ms", "5"]}.get(verb, [])
    assert main([verb, *given, *more, "7"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"rsnet {verb}: error: 7: it belongs to no option or argument{TO_LIST}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train mydata", "--data is missing; did you mean --data mydata?"),
        ("train -a resnet50 'my data'", "--data is missing; did you mean --data 'my data'?"),
        ("evaluate run mydata", "--data is missing; did you mean --data mydata?"),
        ("shards in out", "--data, --output are missing; did you mean --data in --output out?"),
        ("shards in", "--data, --output are missing; did you mean --data in --output DIR?"),
        ("add-resolution run d 176",
         "--size, --data are missing; did you mean --size 176 --data d?"),
        ("convert in out",
         "in: it belongs to no option or argument; did you mean --data in --output out?"),
        ("train --data d --epochs 3 4", "4: it belongs to no option or argument"),
        ("train --data a.tar b.tar",
         "b.tar: it belongs to no option or argument; a pattern needs quotes"),
        ("train --data d new", "new: it belongs to no option or argument; did you mean --output new?"),
        ("train --data d .", ".: it belongs to no option or argument"),
        ("train --data d --evaluate best.pt",
         "best.pt: it belongs to no option or argument; did you mean --resume best.pt?"),
        ("train --data a b c d", "b: it belongs to no option or argument"),
    ],
)  # fmt: skip
def test_a_word_without_its_option_is_answered_with_the_option(line, said, capsys):
    words = shlex.split(line)
    assert main(words) == 2
    assert capsys.readouterr().err == f"rsnet {words[0]}: error: {said}{TO_LIST}\n"


@dataclasses.dataclass(frozen=True)
class _Own:
    photos: Positional[Annotated[str, arg(metavar="PHOTOS")]]
    """Photos."""


@dataclasses.dataclass(frozen=True)
class _Both(_Own):
    masks: Positional[Annotated[str, arg(metavar="MASKS")]]
    """Masks."""


def test_arguments_are_in_the_order_of_the_command_line(capsys):
    with pytest.raises(UsageError, match="usage: name PHOTOS MASKS "):
        parse_options(_Both, [_Both], [], "name")
    with pytest.raises(SystemExit):
        parse_options(_Both, [_Both], ["--help"], "name")
    assert capsys.readouterr().out.startswith("usage: name PHOTOS MASKS [options]\n")
    assert parse_options(_Both, [_Both], ["a", "b"], "name") == _Both("a", "b")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian", "train"),
        ("Train", "train"),
        ("--trian", "train"),
        ("eval", "evaluate"),
        ("fit", "train"),
        ("add_resolution", "add-resolution"),
        ("calibrat", "add-resolution"),
        ("benchmark", "bench"),
        ("xyz", None),
    ],
)
def test_a_mistyped_verb_is_answered_with_the_nearest(typed, meant, capsys):
    said = f"did you mean {meant}?" if meant else f"one of {' '.join(VERBS)}"
    for words in ([typed, "--data", "x"], ["help", typed]):
        assert main(words) == 2
        assert capsys.readouterr().err == f"rsnet: error: {typed}: there is no such verb; {said}\n"


def test_an_option_before_the_verb_is_one_line(capsys):
    assert main(["--data", "x"]) == 2
    line = f"rsnet: error: --data: options follow a verb, one of {' '.join(VERBS)}\n"
    assert capsys.readouterr().err == line


def test_help_is_a_verb_too(capsys):
    assert main(["help"]) == 0
    listed = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == listed
    texts = []
    for words in (["help", "calibrate"], ["calibrate", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert ALIASES["calibrate"] in texts[0].splitlines()[0]
    assert verb_command("pipelines", PIPELINE_VERBS, ["help"]) == 0
    assert "verify" in capsys.readouterr().out
