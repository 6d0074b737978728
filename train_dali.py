#!/usr/bin/env python
"""Train an RS-Net on an image folder, read by DALI on the GPU (or on the CPU, without one)."""

import sys

from pipelines.utils.cli import exit_if_not_installed

with exit_if_not_installed("train_dali.py", extra="train"):
    from pipelines.dali import DaliOptions, make_loaders
    from rsnet.train import main

if __name__ == "__main__":
    sys.exit(main("train_dali.py", DaliOptions, make_loaders))
