"""An alias: `python -m pipelines.folder verify DIR` is `python -m pipelines verify DIR`."""

import sys

from pipelines.__main__ import VERBS
from pipelines.utils.cli import verb_command

if __name__ == "__main__":
    sys.exit(verb_command("pipelines.folder", {"verify": VERBS["verify"]}, sys.argv[1:]))
