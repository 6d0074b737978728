#!/usr/bin/env python
"""Train an RS-Net on .beton files, read by FFCV; `rsnet convert` makes them from a folder."""

import sys

from pipelines.utils.cli import exit_if_not_installed

with exit_if_not_installed("train_ffcv.py", extra="train"):
    from pipelines.ffcv import FfcvOptions, make_loaders
    from rsnet.train import main

if __name__ == "__main__":
    sys.exit(main("train_ffcv.py", FfcvOptions, make_loaders))
