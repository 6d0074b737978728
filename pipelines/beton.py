"""An alias: `python -m pipelines.beton` is `python -m pipelines convert`."""

import sys

from pipelines.ffcv import ConvertOptions, convert_or_verify
from pipelines.utils.cli import command

if __name__ == "__main__":
    sys.exit(command("pipelines.beton", ConvertOptions, convert_or_verify))
