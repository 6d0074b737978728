"""`rsnet release`: write a run's network as a folder to publish and to load from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pipelines.utils.output import say


@dataclass(frozen=True)
class Options:
    """Write a folder with a network's weights, a description and a model card, to publish and load."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Run directory, of which checkpoints/best.pt is taken, or a checkpoint."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Folder to write."""


def run(options: Options) -> int:
    from rsnet.config.model_config import FULL
    from rsnet.release.from_run import checkpoint_of, release_run

    release = release_run(options.run, options.output, say)
    network, weights = release.config["network"], release.config["weights"]
    kind = "averaged weights" if weights["averaged"] else "weights"
    say(f"{checkpoint_of(options.run)}: {kind} after epoch {release.config['source']['epoch']}")
    if release.config["accuracy"] is None:
        say(
            "note: their accuracies are not known, as there is no evaluation of them in a run directory"
        )
    sizes = " ".join(map(str, network["sizes"]))
    full = sum(v.nbytes for v in release.state.values() if v.is_floating_point()) / 1e6
    unpacked = "" if network["qw"] == FULL else f" ({full:.1f} MB in float32)"
    megabytes = weights["bytes"] / 1e6
    say(f"{options.output}: {network['arch']}, sizes {sizes}, {megabytes:.1f} MB{unpacked}")
    return 0
