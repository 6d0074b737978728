"""Options and loading of a release, for all verbs that compute with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from rsnet.inference.classifier import SwitchableClassifier

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """A release, and how it is computed."""

    release: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder that `rsnet release` wrote."""

    device: str | None = None
    """cpu, cuda, cuda:1, ... Unset: the GPU if there is one."""

    batch_size: int = 32
    """Images that are computed at once; latencies are of such batches."""

    dtype: Dtype = "float32"
    """Precision of the computation."""


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """Of verbs that choose by latencies."""

    remeasure: bool = False
    """Measure this device's latencies anew, in place of those in the release's latency-DEVICE.json."""


def load_classifier(
    release: Path,
    device: str | None,
    batch_size: int,
    dtype: Dtype = "float32",
    *,
    remeasure: bool = False,
    **options: Any,
) -> SwitchableClassifier:
    """Load a release on the device, or on the GPU if none is named and there is one.

    remeasure: measure its latencies. options: further ones of `SwitchableClassifier.load`, which says what
    is raised.
    """
    import torch

    from rsnet.inference.classifier import SwitchableClassifier

    classifier = SwitchableClassifier.load(
        release,
        device or ("cuda" if torch.cuda.is_available() else "cpu"),
        torch.bfloat16 if dtype == "bfloat16" else None,
        batch_size,
        **options,
    )
    if remeasure:
        classifier.calibrate_latency()
    return classifier
