"""What an argument of a command names: a run, a checkpoint, a release, or a file of the original code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.utils.errors import UsageError, error_context
from pipelines.utils.location import url_of
from rsnet.checkpoint import io, tf_checkpoint
from rsnet.checkpoint.authors_pytorch import assumed_sizes
from rsnet.checkpoint.authors_tensorflow import from_tensorflow, is_of_model
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights, require_finite
from rsnet.config.model_config import FULL, ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.release import bucket, hub, package

Kind = Literal["run", "checkpoint", "release", "original", "export"]

BEST, LAST = "best.pt", "last.pt"


@dataclass(frozen=True)
class SavedNetwork:
    """A network with its weights, and what they were read from.

    path: as it was given. file: the checkpoint or original's file that was read, or the release's folder.
    checkpoint: all that the file holds; of a release the network and its weights, quantized ones as they are
    applied. release: its content, if it is one.
    """

    kind: Kind
    path: str | Path
    file: Path
    checkpoint: Checkpoint
    release: package.Release | None = None

    @property
    def network(self) -> ModelConfig:
        """The description of the network."""
        return self.checkpoint.network

    @property
    def run_dir(self) -> Path | None:
        """The run directory that the checkpoint lies in, if it does."""
        folder = self.file.resolve().parent
        is_of_run = self.kind in ("run", "checkpoint") and folder.name == "checkpoints"
        return folder.parent if is_of_run else None

    def lines(self) -> list[str]:
        """Return what was taken, in words, and what is not known of it."""
        network, found = self.network, self.checkpoint
        bits = [
            f"{bits}-bit {what}"
            for what, bits in (("weights", network.qw), ("activations", network.qa))
            if bits != FULL
        ]
        weights = "averaged weights" if found.ema is not None else "weights"
        epoch = f"{weights} after epoch {found.epoch}" if found.epoch else weights
        where = f" in {self.file.name}" if self.kind == "run" else ""
        taken = [] if self.release else [f"{epoch}{where}"]
        kind = "file of the original code" if self.kind == "original" else self.kind
        sizes = f"sizes {' '.join(map(str, network.sizes))}"
        line = f"{kind} {self.path}: {', '.join([network.arch, *bits, sizes, *taken])}"
        if not found.assumes_sizes:
            return [line]
        return [line, assumed_sizes(self.path, network, is_start=True)]

    def build(self, sizes: Sequence[int] | None = None) -> ResolutionSwitchable:
        """Build the network at some of its sizes, all by default, on the CPU, in eval mode.

        Its weights are the averaged ones, if there are any. Raises DataError if they do not fit.
        """
        wanted = self.network.sizes if sizes is None else sizes
        if self.release is not None:
            return package.build(self.release, wanted)
        with error_context(str(self.file)):
            require_finite(self.checkpoint.eval_weights)
            model = create_model(self.network.with_sizes(wanted))
            load_weights(model, self.checkpoint.eval_weights, self.network.sizes)
        return model.eval()


def open_source(
    argument: str | Path,
    arch: str | None = None,
    sizes: Sequence[int] | None = None,
    *,
    newest: bool = False,
) -> SavedNetwork:
    """Read what the argument of a command names; nothing in it is executed.

    argument: a run directory or a checkpoint, also in object storage (`rsnet.release.bucket`), a release,
    also one on the hub (`rsnet.release.hub`), or a file of the authors' code: PyTorch's, or what
    `tf_checkpoint.read` takes. newest: of a run, take the last checkpoint before the best one.
    arch, sizes: what an original's file may not say of its network, see `rsnet.checkpoint.authors_pytorch`.

    Raises UsageError if there is no such thing, DataError if it is damaged.
    """
    path = Path(argument)
    if (url := url_of(argument)) and not hub.is_address(argument):
        kind: Kind = "checkpoint" if url.endswith(".pt") else "run"
        with bucket.local_copy(url, newest) as file:
            return SavedNetwork(kind, url, file, io.load(file))
    if folder := release_folder(package.local_folder(argument)):
        content = package.read(folder)
        network = ModelConfig.from_dict(content.config["network"])
        return SavedNetwork("release", path, folder, Checkpoint(network, content.state), content)
    if tf_checkpoint.is_tf_checkpoint(path):
        variables = tf_checkpoint.read(path, is_of_model)
        with error_context(str(path)):
            return SavedNetwork("original", path, path, from_tensorflow(variables))
    if path.is_dir():
        file = _checkpoint_of_run(path, newest)
        return SavedNetwork("run", path, file, io.load(file))
    if not path.is_file():
        raise UsageError(f"there is no run, checkpoint or release {path}")
    found = io.load(path, arch, sizes)
    return SavedNetwork("original" if found.of_authors else "checkpoint", path, path, found)


def of_export(release: package.Release, sizes: Sequence[int]) -> SavedNetwork:
    """Return what was opened where a folder holds a release as other programs compute it, at these sizes."""
    network = ModelConfig.from_dict(release.config["network"]).with_sizes(sizes)
    return SavedNetwork("export", release.folder, release.folder, Checkpoint(network, {}), release)


def release_folder(path: Path) -> Path | None:
    """Return the folder of the release that a path names: it, or a file in it. None if it is none.

    A folder with no checkpoints that has one of a release's files is one, whatever is wrong with it.
    """
    if path.is_dir():
        has_files = any((path / name).is_file() for name in (package.CONFIG, package.WEIGHTS))
        is_run = _is_run(path) or (path / "metrics.jsonl").is_file()
        return path if has_files and not is_run else None
    is_file = path.name in (package.CONFIG, package.WEIGHTS) and path.is_file()
    return path.parent if is_file and _is_described(path.parent) else None


def _is_described(folder: Path) -> bool:
    """Return whether a folder has the config.json of a release, and not, for instance, one of timm's."""
    try:
        content = json.loads((folder / package.CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "network" in content


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or any((folder / n).is_file() for n in (BEST, LAST))


def _checkpoint_of_run(path: Path, newest: bool) -> Path:
    """Return the checkpoint of a run directory, or of the folder of its checkpoints."""
    names = (LAST, BEST) if newest else (BEST, LAST)
    for file in (folder / name for folder in (path / "checkpoints", path) for name in names):
        if file.is_file():
            return file
    raise UsageError(f"{path} holds neither a run with checkpoints/{BEST} nor a release")
