"""An alias: `python -m pipelines.beton` is `python -m pipelines convert`."""

import sys

from pipelines.__main__ import VERBS
from pipelines.utils.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("pipelines.beton", VERBS["convert"], sys.argv[1:]))
