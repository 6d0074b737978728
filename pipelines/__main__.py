"""`python -m pipelines VERB`: image folders verified, converted to .beton files, and made for a demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipelines.dali.options import VerifyOptions
from pipelines.demo import DemoOptions, write_demo
from pipelines.ffcv import ConvertOptions, convert_or_verify
from pipelines.utils.cli import Verbs, verb_command


def verify(options: VerifyOptions) -> int:
    """Find the images that would end a training; returns the exit code."""
    from pipelines.dali.verify import verify  # DALI takes a second to import

    return verify(options)


VERBS: Verbs = {
    "verify": (VerifyOptions, verify, "find the images that would end a training"),
    "convert": (ConvertOptions, convert_or_verify, "an image folder to .beton files for FFCV"),
    "demo": (DemoOptions, write_demo, "a small rendered data set"),
}


def main(words: Sequence[str]) -> int:
    return verb_command("pipelines", VERBS, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
