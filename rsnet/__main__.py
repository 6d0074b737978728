"""`rsnet VERB`, or `python -m rsnet VERB`. A verb's module is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipelines.__main__ import VERBS as PIPELINE_VERBS
from pipelines.utils.cli import Verb, verb_command
from pipelines.utils.output import guard_output, say
from rsnet import __version__

VERBS = {
    "train": Verb(
        "rsnet.cli.train", "train, evaluate or profile a network", None, extra="train", trains=True
    ),
    "list": Verb(
        "rsnet.cli.list_networks", "list the networks, their costs and weights", prints=True
    ),
    "verify": PIPELINE_VERBS["verify"],
    "convert": PIPELINE_VERBS["convert"],
    "shards": PIPELINE_VERBS["shards"],
    "import": Verb("rsnet.cli.import_checkpoint", "read a checkpoint of the original code"),
    "import-tf": Verb(
        "rsnet.cli.import_tensorflow",
        "read a quantized checkpoint of the original code",
        extra="tensorflow",
    ),
    "export": Verb(
        "rsnet.cli.export", "write ONNX, torch.export, or a checkpoint for the original code"
    ),
    "evaluate": Verb(
        "rsnet.cli.evaluate",
        "evaluate a network on labelled images, in detail",
        extra="train",
        prints=True,
        trains=True,
    ),
    "report": Verb("rsnet.cli.report", "compare finished runs in a table and a plot", prints=True),
    "add-resolution": Verb(
        "rsnet.cli.add_resolution",
        "add a resolution to a trained network",
        extra="train",
        trains=True,
    ),
    "release": Verb("rsnet.cli.release", "write a trained network as a folder to publish"),
    "predict": Verb("rsnet.cli.predict", "classify images with a trained network", prints=True),
    "tune": Verb("rsnet.cli.tune", "find a cascade for an accuracy or a latency"),
    "bench": Verb("rsnet.cli.bench", "measure a trained network on this device", prints=True),
    "serve": Verb(
        "rsnet.cli.serve", "serve a trained network: web page and JSON API", extra="serve"
    ),
    "sync": Verb(
        "rsnet.cli.sync",
        "send W&B what it lacks, and write TensorBoard's files",
        extra="train",
    ),
}
ALIASES = {"calibrate": "add-resolution"}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's, and return its exit code."""
    words = sys.argv[1:] if words is None else words
    if words and words[0] in ("--version", "-V", "-v", "version"):
        guard_output(False)
        say(f"rsnet {__version__}")
        return 0
    return verb_command("rsnet", VERBS, words, ALIASES)


if __name__ == "__main__":
    sys.exit(main())
