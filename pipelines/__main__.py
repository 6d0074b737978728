"""`python -m pipelines VERB`: images verified, converted to .beton files or tar shards, made for a demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipelines.utils.cli import Verb, verb_command

VERBS = {
    "verify": Verb(
        "pipelines.dali.verify",
        "find the images that cannot be decoded",
        "VerifyOptions",
        "verify",
        extra="train",
        trains=True,
    ),
    "convert": Verb(
        "pipelines.ffcv",
        "convert images to .beton files",
        "ConvertOptions",
        "convert_or_verify",
        extra="ffcv",
    ),
    "shards": Verb(
        "pipelines.sources.shards_options",
        "write images as tar shards",
        "ShardsOptions",
        "write_shards",
        extra="train",
    ),
    "demo": Verb("pipelines.demo", "render a small data set", "DemoOptions", "write_demo"),
}


def main(words: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    return verb_command("pipelines", VERBS, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
