"""One script for each claim, as `python -m benchmarks.NAME`. They need the extra `train`."""

import importlib.util
import sys

from pipelines.utils.cli import exit_if_not_installed

# What scripts import before they look at their options.
LIBRARIES = ("filelock", "matplotlib", "numba", "pyarrow", "rich", "tyro")

if sys.argv[0] == "-m":  # Python looks for the script that it is to run
    with exit_if_not_installed("benchmarks", "train"):
        for library in LIBRARIES:
            if importlib.util.find_spec(library) is None:
                raise ModuleNotFoundError(name=library)
