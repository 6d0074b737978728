"""`rsnet release`: write a run's network as a folder to publish and to load from, and publish it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from pipelines.utils.errors import RunError, UsageError
from pipelines.utils.output import say
from rsnet.cli.classifier import SOURCE

if TYPE_CHECKING:
    from rsnet.release.package import Release


@dataclass(frozen=True)
class Options:
    """Write a folder with a network's weights, a description and a model card, to publish and load."""

    source: Positional[Annotated[str, arg(metavar=SOURCE)]]
    """Run directory, of which checkpoints/best.pt is taken, checkpoint, file of the original code, or a
    release, which is copied."""

    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder to write. Unset: none, with --push."""

    push: Annotated[str | None, arg(metavar="USER/NAME")] = None
    """Repository on the Hugging Face hub to publish it in, made if there is none."""

    class_names: Annotated[Path | None, arg(metavar="FILE")] = None
    """Readable names: one a line in the order of the classes, or a dict of JSON by class. Unset: ImageNet's
    for its WordNet ids, else the names of the data's folders."""

    def __post_init__(self) -> None:
        if self.output is None and self.push is None:
            raise UsageError("--output: give a folder to write, or --push a repository on the hub")


def run(options: Options) -> int:
    from rsnet.release import hub, package
    from rsnet.release.source import release_folder

    if options.push is not None:
        hub.require_pushable(options.push)
    found = release_folder(package.local_folder(options.source))
    if found and options.output is None and options.class_names is None:
        return _push(found, options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary) / "release"
        _write(folder, options)
        return _push(folder, options)


def _write(folder: Path, options: Options) -> None:
    from rsnet.release.from_run import release_run

    release = release_run(options.source, folder, say, options.class_names)
    if release.config["accuracy"] is None:
        say(
            "note: their accuracies are not known, as there is no evaluation of them in a run directory"
        )
    if options.output is not None:
        say(f"{options.output}: {_described(release)}")


def _described(release: Release) -> str:
    from rsnet.config.model_config import FULL

    network, weights = release.config["network"], release.config["weights"]
    sizes = " ".join(map(str, network["sizes"]))
    full = sum(v.nbytes for v in release.state.values() if v.is_floating_point()) / 1e6
    unpacked = "" if network["qw"] == FULL else f" ({full:.1f} MB in float32)"
    return f"{network['arch']}, sizes {sizes}, {weights['bytes'] / 1e6:.1f} MB{unpacked}"


def _push(folder: Path, options: Options) -> int:
    from rsnet.release import package

    if options.push is None:
        return 0
    try:
        commit = package.push(folder, options.push)
    except (UsageError, RunError) as error:
        if options.output is None:
            raise
        again = f"`rsnet release {options.output} --push {options.push}`"
        raise type(error)(f"{error}; {options.output} is written: {again} pushes it") from error
    say(f"hf://{options.push}@{commit}: pushed; `rsnet predict hf://{options.push} IMAGE` takes it")
    return 0
