"""Options and loading of a network, for all verbs that classify with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

from tyro.conf import Positional, arg

from pipelines.utils.output import say

if TYPE_CHECKING:
    from rsnet.inference.classifier import SwitchableClassifier
    from rsnet.release.package import Release
    from rsnet.release.source import SavedNetwork

Dtype = Literal["float32", "bfloat16"]
Engine = Literal["torch", "onnxruntime"]

# What `rsnet.release.source` opens.
SOURCE = "RUN|FILE|RELEASE"


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """Network and computation."""

    source: Positional[Annotated[str, arg(metavar=SOURCE)]]
    """Run directory, checkpoint, release (also hf://USER/NAME on the hub), file of the original code, or what
    `rsnet export --format onnx` wrote."""

    device: str | None = None
    """cpu, cuda, cuda:1, ... Unset: the GPU if there is one."""

    batch_size: int = 32
    """Images that are computed at once; latencies are of such batches."""

    dtype: Dtype = "float32"
    """Precision of the computation."""

    engine: Annotated[Engine | None, arg(metavar="{torch,onnxruntime}")] = None
    """What computes: torch, or onnxruntime what `rsnet export --format onnx` wrote, on the CPU. Unset: by the
    folder."""

    fold: bool = False
    """Fold BatchNorm into the convolutions: faster, with a copy of the weights for each size used."""

    cuda_graphs: bool = False
    """Replay a CUDA graph for each size (not measured yet)."""


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """Latencies."""

    remeasure: bool = False
    """Measure this device's latencies anew, in place of those in the release's latency-DEVICE.json."""


def load_classifier(
    options: ClassifierOptions, top: int = 5
) -> tuple[SwitchableClassifier, SavedNetwork]:
    """Load the network that a verb names, on the device, or on the GPU if none is named and there is one.

    top: classes that a prediction names. Raises what `open_source` and `SwitchableClassifier.load` do.
    """
    import torch

    from rsnet.inference.classifier import SwitchableClassifier
    from rsnet.inference.onnx_runner import is_export
    from rsnet.release.from_run import released
    from rsnet.release.source import of_export, open_source

    source: SavedNetwork | None = None
    content: Path | Release = Path(options.source)
    if not is_export(Path(options.source)) and options.engine != "onnxruntime":
        source = open_source(options.source)
        content = released(source)
    on_gpu = torch.cuda.is_available() and source is not None
    classifier = SwitchableClassifier.load(
        content,
        options.device or ("cuda" if on_gpu else "cpu"),
        torch.bfloat16 if options.dtype == "bfloat16" else None,
        options.batch_size,
        top,
        fold=options.fold,
        cuda_graphs=options.cuda_graphs,
        engine=options.engine,
    )
    if isinstance(options, LatencyOptions) and options.remeasure:
        classifier.calibrate_latency()
    return classifier, source or of_export(classifier.release, classifier.sizes)


def say_source(source: SavedNetwork, file: TextIO | None = None) -> None:
    """Say what was taken; on stderr, once nothing is wrong with the command, if stdout is for results."""
    for line in source.lines():
        say(line, file)
