"""Write and read releases: folders with safetensors, config.json and a model card, to publish and load.

Reading needs torch, torchvision and safetensors alone, executes nothing of the folder, and takes no more
memory than the weights that lie there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor

from pipelines.utils.atomic_io import atomic_directory, atomic_write, atomic_write_json
from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from rsnet import __version__
from rsnet.config.model_config import FULL, ModelConfig
from rsnet.models.factory import WeightsOnMeta, create_model
from rsnet.models.quantization.bit_packing import pack_state_dict, unpack_state_dict
from rsnet.models.state_dict import describe_mismatch, select_sizes
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.release import config as release_config
from rsnet.release import hub
from rsnet.release import model_card as release_card

WEIGHTS, CONFIG, TUNED = "model.safetensors", "config.json", "tuned.json"

# What is published of a release's folder; latencies are of one machine.
PUBLISHED = (CONFIG, WEIGHTS, release_card.NAME, TUNED)

# Bytes of the safetensors header of 100,000 tensors.
MAX_HEADER = 16 * 2**20

State = dict[str, Tensor]


@dataclass(frozen=True)
class Release:
    """Content of a release's folder.

    config: the content of config.json, whose "network" describes the network as a checkpoint does.
    state: the network's state dict, on the CPU, with quantized weights as they are applied.
    folder: where it lies, and what is found out about it is kept. prefix: of the names of those files.
    """

    config: dict[str, Any]
    state: State
    folder: Path = Path()
    prefix: str = ""

    def beside(self, name: str) -> Path:
        """Return the path of a file that belongs to these weights, such as tuned.json."""
        return self.folder / (self.prefix + name)


def write(
    folder: str | Path,
    network: Mapping[str, Any],
    model: ResolutionSwitchable,
    *,
    gmacs: Mapping[str, float],
    accuracy: Mapping[str, Mapping[str, float]] | None,
    averaged: bool,
    source: Mapping[str, Any],
    class_names: Sequence[str] = (),
) -> Release:
    """Write the release `folder`, whole or not at all, and return what is read back from it.

    network: the description of `model`, as checkpoints have it. gmacs, accuracy ("top1" and "top5" in %):
    of each size and of the ensemble, by name. averaged: whether the weights are an average over training
    steps. source: where they come from. class_names: readable names of the outputs, if they have other ones
    than the classes of the network.

    Raises UsageError if there is something at `folder`, OSError if it cannot be written.
    """
    folder = Path(folder)
    _require_new(folder)
    config, data = _serialized(
        network, model, gmacs=gmacs, accuracy=accuracy, averaged=averaged, source=source,
        class_names=class_names,
    )  # fmt: skip
    with atomic_directory(folder) as temporary:
        atomic_write(temporary / WEIGHTS, data)
        atomic_write_json(temporary / CONFIG, config)
        atomic_write(
            temporary / release_card.NAME,
            release_card.text(config).encode(errors="backslashreplace"),
        )
        written = read(temporary)
    return dataclasses.replace(written, folder=folder)


def in_memory(
    network: Mapping[str, Any], model: ResolutionSwitchable, folder: Path, prefix: str, **facts: Any
) -> Release:
    """Return the content that `write` would write, and `read` read back, without writing it.

    folder, prefix: of files beside it, see `Release`. facts: `write`'s arguments of those names.
    """
    config, data = _serialized(network, model, **facts)
    state = _on_meta(_unpacked_config(network)).state_dict()
    stored = safetensors.torch.load(data)
    return Release(config, unpack_state_dict(stored, state), folder, prefix)


def copy(release: Release, folder: str | Path, class_names: Sequence[str] = ()) -> Release:
    """Write a release that was read to another `folder`, whole or not at all, and return its content.

    class_names: readable names of the outputs, in place of its own.

    Raises UsageError if there is something at `folder`, OSError if it cannot be written.
    """
    folder = Path(folder)
    _require_new(folder)
    with atomic_directory(folder) as temporary:
        for name in PUBLISHED:
            if (release.folder / name).is_file():
                atomic_write(temporary / name, (release.folder / name).read_bytes())
        if class_names:
            named = release.config | {"class_names": list(class_names)}
            atomic_write_json(temporary / CONFIG, named)
        written = read(temporary)
    return dataclasses.replace(written, folder=folder)


def _require_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"--output: {folder} exists; give another name")


def _serialized(
    network: Mapping[str, Any],
    model: ResolutionSwitchable,
    *,
    gmacs: Mapping[str, float],
    accuracy: Mapping[str, Mapping[str, float]] | None,
    averaged: bool,
    source: Mapping[str, Any],
    class_names: Sequence[str] = (),
) -> tuple[dict[str, Any], bytes]:
    """Return the contents of config.json and of model.safetensors; the arguments are those of `write`."""
    data = safetensors.torch.save(_stored_tensors(model))
    shared, private = model.count_parameters()
    config = {
        "format": release_config.FORMAT,
        "network": dict(network),
        "preprocessing": release_config.preprocessing(network),
        "accuracy": accuracy,
        "gmacs": dict(gmacs),
        "parameters": {"shared": shared, "private": private},
        "weights": {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "averaged": averaged,
        },
        "source": dict(source),
        "versions": {
            "rsnet": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    if class_names:
        config["class_names"] = list(class_names)
    return config, data


def read(folder: str | Path) -> Release:
    """Read the release in `folder`, or at hf://USER/NAME@REVISION on the hub, checked as a whole.

    Raises what `hub.download` does; UsageError if there is no such folder, or the network needs a library
    that is not installed; DataError, in one line, if a file is missing, damaged, manipulated or of another
    version.
    """
    folder = local_folder(folder)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if (folder / "checkpoints").is_dir() and not (folder / WEIGHTS).exists():
        raise UsageError(
            f"{folder} is a run; rsnet release {folder} --output DIR makes a release of it"
        )
    with error_context(str(folder / CONFIG)):
        config = release_config.parse(read_file(folder, CONFIG, release_config.MAX_BYTES))
        network = ModelConfig.from_dict(config["network"])
        written = _on_meta(network)
        expected = _stored_tensors(written)
        unpacked = _unpacked_config(config["network"])
        state = (written if unpacked == network else _on_meta(unpacked)).state_dict()
    with error_context(str(folder / WEIGHTS)):
        tensors = _read_weights(folder, config["weights"], expected)
    return Release(config, unpack_state_dict(tensors, state), folder)


def local_folder(source: str | Path) -> Path:
    """Return the folder of a release, which one on the hub has in the hub's cache, see `hub.download`."""
    return hub.download(source, PUBLISHED) if hub.is_address(source) else Path(source)


def push(folder: str | Path, name: str) -> str:
    """Publish the release in `folder` on the hub as `name`, USER/NAME, and return the hash of the commit.

    The card there loads it by its address. Raises what `read` and `hub.push` do.
    """
    folder = Path(folder)
    network = read(folder).config["network"]
    contents: dict[str, bytes | Path | None] = {
        file: folder / file if (folder / file).is_file() else None for file in PUBLISHED
    }
    if contents[release_card.NAME] is not None:
        card = (folder / release_card.NAME).read_bytes()
        contents[release_card.NAME] = release_card.for_hub(card, name)
    return hub.push(contents, name, f"{network['arch']}, by rsnet {__version__}")


def load(folder: str | Path, sizes: Sequence[int] | None = None) -> ResolutionSwitchable:
    """Load the network of a release, at all of its sizes or some, on the CPU, in eval mode.

    folder: its folder, or its address on the hub, hf://USER/NAME or hf://USER/NAME@REVISION.

    Raises what `read` does, and UsageError for sizes that it does not have.
    """
    release = read(folder)
    known = release.config["network"]["sizes"]
    wanted = known if sizes is None else sizes
    if not set(wanted) <= set(known):
        there, here = (" ".join(map(str, s)) for s in (known, wanted))
        raise UsageError(f"--sizes is {there} in {folder} and {here} here")
    return build(release, wanted)


def build(release: Release, sizes: Sequence[int]) -> ResolutionSwitchable:
    """Build the network of a release at some of its sizes, on the CPU, in eval mode."""
    network = release.config["network"]
    model = create_model(_unpacked_config(network).with_sizes(sizes))
    model.load_state_dict(
        select_sizes(release.state, network["sizes"], sizes, model.shared_norm), strict=True
    )
    return model.eval()


def _stored_tensors(model: ResolutionSwitchable) -> State:
    """Return the tensors that are stored of a network: contiguous, without counters of training."""
    return {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in pack_state_dict(model).items()
        if not name.endswith(".num_batches_tracked")
    }


def _unpacked_config(network: Mapping[str, Any]) -> ModelConfig:
    """Return the network that a release is read as: quantized weights are stored as their values."""
    return dataclasses.replace(ModelConfig.from_dict(network), qw=FULL)


@functools.lru_cache(maxsize=4)  # what is written is read back
def _on_meta(config: ModelConfig) -> ResolutionSwitchable:
    """Build a network without memory, for the names, shapes and types of its state; not to be changed."""
    try:
        with WeightsOnMeta():
            return create_model(config)
    except UsageError:
        raise
    except Exception as error:  # whatever a library's builder says to what nobody has trained
        raise DataError(f"such a network cannot be built ({first_line(error)})") from error


def _read_weights(folder: Path, noted: Mapping[str, Any], expected: State) -> State:
    """Read model.safetensors, which must be the noted file and hold the expected tensors."""
    size = sum(value.nbytes for value in expected.values())
    data = read_file(folder, WEIGHTS, 8 + MAX_HEADER + size)
    if len(data) != noted["bytes"]:
        raise DataError(f"has {len(data)} bytes, {CONFIG} says {noted['bytes']}")
    if hashlib.sha256(data).hexdigest() != noted["sha256"]:
        raise DataError(f"is damaged: its SHA-256 is not that in {CONFIG}")
    header = int.from_bytes(data[:8], "little")
    if header > min(MAX_HEADER, len(data) - 8):
        raise DataError(f"is no safetensors file: a header of {header} bytes")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the parser raises all kinds of errors for other files
        raise DataError(f"is no safetensors file ({_escaped(str(error))})") from error
    _require_tensors(tensors, expected)
    return tensors


def _require_tensors(tensors: State, expected: State) -> None:
    """Raise DataError unless names, shapes and types are the expected ones, and all numbers finite."""
    problems = describe_mismatch({name: tuple(v.shape) for name, v in expected.items()}, tensors)
    problems = problems or "; ".join(
        f"{name} is {tensors[name].dtype}, not {value.dtype}"
        for name, value in expected.items()
        if tensors[name].dtype != value.dtype
    )
    if problems:
        raise DataError(f"does not fit the network in {CONFIG}: {_escaped(problems)}")
    broken = [name for name, value in tensors.items() if not _is_usable(name, value)]
    if broken:  # all probabilities would be NaN
        raise DataError(f"has numbers that are not finite: {_escaped(', '.join(broken))}")


def _is_usable(name: str, value: Tensor) -> bool:
    """Return whether all numbers are finite; alpha may be -inf, weight 0, of a size that was added."""
    if name == "alpha":
        return bool((value.isfinite() | value.isneginf()).all() and value.isfinite().any())
    return bool(value.isfinite().all())


def _escaped(text: str) -> str:
    """Shorten and escape text from a file, which may be long and hold line breaks."""
    return text[:1000].encode("unicode_escape").decode()


def read_file(folder: Path, name: str, most: int) -> bytes:
    """Read a file of at most `most` bytes that lies in `folder` itself. Raises DataError, not naming it."""
    path = folder / name
    if not path.is_file():
        raise DataError("there is no such file; is the folder a release?")
    if not path.resolve().is_relative_to(_root(folder.resolve())):
        raise DataError("is a link that leads out of the folder; copy the file itself there")
    size = path.stat().st_size
    if size > most:
        raise DataError(f"has {size} bytes, more than the {most} that it may have")
    return path.read_bytes()


def _root(folder: Path) -> Path:
    """Return the folder that links from the release's may lead to: the hub's cache has files beside it."""
    is_cached = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return folder.parents[1] if is_cached else folder
