"""`rsnet VERB`, or `python -m rsnet VERB`. A verb's module is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipelines.__main__ import VERBS as PIPELINE_VERBS
from pipelines.utils.cli import Verb, verb_command
from rsnet import __version__

VERBS = {
    "train": Verb(
        "rsnet.cli.train", "a network, on an image folder or .beton files", None, extra="train"
    ),
    "verify": PIPELINE_VERBS["verify"],
    "convert": PIPELINE_VERBS["convert"],
    "import": Verb("rsnet.cli.import_checkpoint", "a file of the original code"),
    "import-tf": Verb(
        "rsnet.cli.import_tensorflow",
        "a checkpoint of the original quantized training code",
        extra="tensorflow",
    ),
    "export": Verb("rsnet.cli.export", "a network for other programs, or the original code"),
    "report": Verb("rsnet.cli.report", "table and plot of finished runs"),
    "add-resolution": Verb(
        "rsnet.cli.add_resolution", "a resolution that was not trained", extra="train"
    ),
    "release": Verb("rsnet.cli.release", "a folder to publish and to load from"),
    "predict": Verb("rsnet.cli.predict", "what a release says of images"),
    "tune": Verb("rsnet.cli.tune", "a cascade for an accuracy or a latency"),
    "bench": Verb("rsnet.cli.bench", "what the sizes are worth on this device"),
    "serve": Verb("rsnet.cli.serve", "a web page and JSON for a release", extra="serve"),
    "sync": Verb("rsnet.cli.sync", "metrics that W&B lacks", extra="train"),
}
ALIASES = {"calibrate": "add-resolution"}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's, and return its exit code."""
    words = sys.argv[1:] if words is None else words
    if words and words[0] == "--version":
        print(f"rsnet {__version__}")
        return 0
    return verb_command("rsnet", VERBS, words, ALIASES)


if __name__ == "__main__":
    sys.exit(main())
