"""`rsnet release`: write a run's network as a folder to publish and to load from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pipelines.utils.output import say
from rsnet.cli.classifier import SOURCE


@dataclass(frozen=True)
class Options:
    """Write a folder with a network's weights, a description and a model card, to publish and load."""

    source: Positional[Annotated[str, arg(metavar=SOURCE)]]
    """Run directory, of which checkpoints/best.pt is taken, checkpoint, file of the original code, or a
    release, which is copied."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Folder to write."""

    class_names: Annotated[Path | None, arg(metavar="FILE")] = None
    """Readable names: one a line in the order of the classes, or a dict of JSON by class. Unset: ImageNet's
    for its WordNet ids, else the names of the data's folders."""


def run(options: Options) -> int:
    from rsnet.config.model_config import FULL
    from rsnet.release.from_run import release_run

    release = release_run(options.source, options.output, say, options.class_names)
    network, weights = release.config["network"], release.config["weights"]
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
