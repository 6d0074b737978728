"""Command lines: checked dataclasses in, one clear line for a mistake, an exit code out."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import inspect
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from pipelines.utils import complaints
from pipelines.utils.config_file import Ignored, completed, flag_of, split_config
from pipelines.utils.errors import DataError, RunError, UsageError, os_error_line, way_out
from pipelines.utils.location import url_of
from pipelines.utils.memory import is_out_of_memory, memory_line, require_memory
from pipelines.utils.option_docs import OptionDoc, flags, help_page, topics, usage
from pipelines.utils.output import guard_output, lost_output, say
from pipelines.utils.synonyms import advice

Options = TypeVar("Options")


class Verb(NamedTuple):
    """A subcommand.

    module: where its options, a dataclass, and `run` are, which takes them and returns the exit code.
    options: None where `run` takes the words of the command line and parses them itself.
    extra: of pyproject.toml; it installs all that the verb always needs.
    trains: whether it needs a training's memory.
    prints: whether its result is what it prints, without which there is no reason to go on.
    """

    module: str
    summary: str
    options: str | None = "Options"
    run: str = "run"
    extra: str = "cli"
    prints: bool = False
    trains: bool = False


EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE = 1, 130, 141

# The extra of pyproject.toml that installs a library.
EXTRAS = {
    "aiohttp": "http",
    "fastapi": "serve",
    "ffcv": "ffcv",
    "filelock": "train",
    "fsspec": "http",
    "gcsfs": "gs",
    "huggingface_hub": "hub",
    "matplotlib": "cli",
    "numba": "train",
    "nvidia": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "prometheus_client": "serve",
    "pyarrow": "train",
    "python_multipart": "serve",
    "rich": "cli",
    "s3fs": "s3",
    "tensorboard": "train",
    "tensorflow": "tensorflow",
    "timm": "timm",
    "tyro": "cli",
    "uvicorn": "serve",
    "wandb": "train",
    "yaml": "cli",
}


def _not_installed(error: ModuleNotFoundError, extra: str) -> UsageError | None:
    """Return the message for a library that an extra installs; None for any other module.

    extra: what to install for a library of every command line.
    """
    library = (error.name or "").split(".")[0]
    if library not in EXTRAS:
        return None
    wanted = extra if EXTRAS[library] == "cli" else EXTRAS[library]
    return UsageError(f'{library} is not installed: pip install "rsnet-trainer[{wanted}]"')


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt in place of an error that follows a Ctrl-C which a library has swallowed.

    As torch does while it imports NumPy: whatever needs the half-imported module fails later.
    """
    is_pressed = False

    def press(_number: int, _frame: object) -> None:
        nonlocal is_pressed
        is_pressed = True
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if is_pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is press:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def exit_if_not_installed(name: str, extra: str) -> Iterator[None]:
    """End the script `name`, which needs `extra`, with one line if a library that it imports is missing, or
    the memory for a training, or if it is interrupted meanwhile.
    """
    try:
        require_memory()
        with _interrupts_kept():
            yield
    except KeyboardInterrupt:
        say(f"{name}: interrupted", sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except UsageError as error:
        say(f"{name}: error: {error}", sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if (message := _not_installed(error, extra)) is None:
            raise
        say(f"{name}: error: {message}", sys.stderr)
        sys.exit(message.exit_code)


def parse_options(
    options_type: type[Options],
    groups: Sequence[Any],
    argv: Sequence[str] | None = None,
    program: str = "",
) -> Options:
    """Return the command line as an instance; `groups`: the dataclasses whose fields are the options.

    program: the command as users type it.

    Raises UsageError, in one line, for what is mistyped; prints the help and exits for --help.
    """
    arguments = expand_home(sys.argv[1:] if argv is None else argv)
    exit_with_help(arguments, program, groups)
    _reject_empty(arguments)
    arguments = _by_todays_names(arguments, getattr(options_type, "FORMER", {}))
    arguments = with_config(arguments, groups)
    _reject_empty(arguments)
    _reject_unknown([word for word in arguments if word.startswith("--")], groups)
    options, extra = _parsed(options_type, arguments, program, groups)
    if extra:
        typed = [flag_of(word) for word in arguments]
        raise UsageError(complaints.of_extra(extra, _docs(groups), typed))
    output = getattr(options, "output", None)
    if isinstance(output, Path) and (url := url_of(output)):
        raise UsageError(
            f"--output {url}: this command writes on this machine alone: give a folder"
        )
    return options


def _parsed(
    options_type: type[Options], words: Sequence[str], program: str, groups: Sequence[Any]
) -> tuple[Options, list[str]]:
    """Return a command line as an instance, and its words that belong to no option."""
    import tyro  # most verbs are found and listed without it; it takes 0.2 s

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                options_type,
                prog=program or None,
                args=words,
                return_unknown_args=True,
                config=(tyro.conf.HelptextFromCommentsOff,),  # help_page shows the docstrings
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    docs = _docs(groups)
    lacking = complaints.missing(complaint.getvalue(), docs)
    if not lacking:
        raise UsageError(complaints.in_plain_words(complaint.getvalue()))
    extra: list[str] = []
    # tyro finds the words that are too many only once nothing is missing: parse again with made-up values.
    if not any(option.is_positional for option in lacking):
        anything = [word for o in lacking for word in (o.names[0], "1")]
        with contextlib.suppress(UsageError):  # of other options
            _, extra = _parsed(options_type, [*words, *anything], program, groups)
    raise UsageError(complaints.of_missing(lacking, extra, usage(_name(program), docs)))


def _name(program: str) -> str:
    return program or Path(sys.argv[0]).name


def _docs(groups: Sequence[Any]) -> list[OptionDoc]:
    return [option for group in groups for _, options in topics(group) for option in options]


def exit_with_help(words: Sequence[str], program: str, groups: Sequence[Any]) -> None:
    """Print what the options are, by topic, and exit, if a command line asks for that."""
    if not {"-h", "--help"} & set(words):
        return
    titled: dict[str, list[OptionDoc]] = {}
    for group in groups:
        for title, options in topics(group):
            titled.setdefault(title, []).extend(options)
    print(help_page(_name(program), _about(groups[0]), titled))
    raise SystemExit(0)


def _about(options: type[Any]) -> str:
    """Return what a command does: its options' docstring, or, if they have none, that of their script."""
    text = inspect.getdoc(options) or ""
    is_made = text.startswith(f"{options.__name__}(")  # by `dataclass`, of the fields
    return inspect.getdoc(sys.modules[options.__module__]) or "" if is_made else text


def with_config(
    words: Sequence[str], groups: Sequence[Any], ignored: Ignored = lambda *_: ()
) -> list[str]:
    """Return a command line with the options that the file of its --config gives, and it does not.

    ignored: see `completed`.
    """
    rest, path = split_config(words)
    if path is None:
        return rest
    return expand_home(completed(rest, path, _fields(groups), ignored))


def command(
    name: str,
    options_type: type[Options],
    run: Callable[[Options], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command line and return the exit code. A user's mistake is one line on stderr."""
    return exit_code(name, lambda: run(parse_options(options_type, [options_type], argv, name)))


def verb_command(
    program: str,
    verbs: Mapping[str, Verb],
    words: Sequence[str],
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a verb of `program` and return the exit code. words: from the verb on."""
    guard_output(False)
    verb, *rest = words or ["--help"]
    if verb == "help" and rest:
        verb, *rest = rest[0], "--help"
    verb = aliases.get(verb, verb)
    if verb in verbs:
        return run_verb(f"{program} {verb}", verbs[verb], rest)
    if verb in ("--help", "-h", "help"):
        say(f"{program if program == 'rsnet' else f'python -m {program}'} VERB --help")
        width = max(map(len, verbs))
        for name, listed in verbs.items():
            say(f"  {name:{width}}  {listed.summary}")
        return 0
    say(f"{program}: error: {complaints.unknown_verb(verb, verbs, aliases)}", sys.stderr)
    return UsageError.exit_code


def run_verb(name: str, verb: Verb, words: Sequence[str]) -> int:
    """Run a verb with its arguments and return the exit code. name: what begins its messages."""

    def action() -> int:
        if verb.trains and not {"-h", "--help"} & {*words}:
            require_memory()
        module = importlib.import_module(verb.module)
        run: Callable[[Any], int] = getattr(module, verb.run)
        if verb.options is None:
            return run(words)
        options_type = getattr(module, verb.options)
        return run(parse_options(options_type, [options_type], words, name))

    return exit_code(name, action, extra=verb.extra, prints=verb.prints)


def exit_code(
    name: str,
    action: Callable[[], int],
    *,
    extra: str = "cli",
    prints: bool = False,
) -> int:
    """Return what `action` returns, or, after one line on stderr, the code of the error that ended it.

    extra, prints: as of a `Verb`.
    """
    guard_output(prints)
    try:
        with _interrupts_kept():
            code = action()
        sys.stdout.flush()
        return code
    except (UsageError, DataError, RunError) as error:
        say(f"{name}: error: {error}", sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (message := _not_installed(error, extra)) is None:
            raise
        say(f"{name}: error: {message}", sys.stderr)
        return message.exit_code
    except (MemoryError, ImportError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say(f"{name}: error: {memory_line(error)}", sys.stderr)
        return EXIT_FAILED
    except OSError as error:  # a disk or folder that does not let us; the message names the path
        if error is lost_output():
            if error.errno == errno.EPIPE:  # as of `| head`, which has all that it wants
                return EXIT_PIPE
            error = OSError(f"cannot write to stdout: {error.strerror}")
        say(f"{name}: error: {os_error_line(error)}{way_out(error)}", sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        say(f"{name}: interrupted", sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        guard_output(False)  # at the end of Python nothing can be told any longer


def expand_home(words: Sequence[str]) -> list[str]:
    """Return a command line with the home folder for `~`, also where no shell did that, as in --data=~/x."""
    return ["=".join(map(os.path.expanduser, word.split("=", 1))) for word in words]


def _by_todays_names(words: Sequence[str], former: Mapping[str, str]) -> list[str]:
    """Return a command line with the names that options have now, "" for an argument without a name."""
    renamed = []
    for word in words:
        flag, _, value = word.partition("=")
        if flag not in former:
            renamed.append(word)
            continue
        now = former[flag]
        say(f"note: {flag} is now {now or 'an argument without a name'}", sys.stderr)
        renamed += [part for part in (now, value) if part]
    return renamed


def _reject_empty(words: Sequence[str]) -> None:
    """Raise UsageError for an option without a value, which would be taken for its default or for `.`."""
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if not word or (flag.startswith("--") and equals and not value):
            name = flag or (before if before.startswith("-") else "an argument")
            raise UsageError(f"{name}: the value is empty")


def _reject_unknown(words: Sequence[str], groups: Sequence[Any]) -> None:
    """Raise UsageError for the first of the flags that the command does not have."""
    known = _fields(groups)
    for word in words:
        if flag_of(word) not in known:
            flag = word.split("=", 1)[0]
            raise UsageError(f"{flag}: there is no such option; {advice(flag, known)}")


def _fields(groups: Sequence[Any]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of dataclasses by the names that their options have on a command line."""
    return {flag: field for group in groups for flag, field in flags(group).items()}
