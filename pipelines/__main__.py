"""`python -m pipelines VERB`: verify image folders, convert them to .beton files, render a demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipelines.utils.cli import Verb, verb_command

VERBS = {
    "verify": Verb(
        "pipelines.dali.verify",
        "find the images that would end a training",
        "VerifyOptions",
        "verify",
    ),
    "convert": Verb(
        "pipelines.ffcv", "an image folder to .beton files", "ConvertOptions", "convert_or_verify"
    ),
    "demo": Verb("pipelines.demo", "a small rendered data set", "DemoOptions", "write_demo"),
}


def main(words: Sequence[str]) -> int:
    """Run the verb that `words` begin with; return the exit code."""
    return verb_command("pipelines", VERBS, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
