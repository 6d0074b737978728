"""train.beton and val.beton, checked before anything is trained on them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pipelines import sidecar
from pipelines.batch import Loaders, LoaderSpec
from pipelines.beton_file import Beton, broken_sample, open_beton
from pipelines.beton_verify import reasons
from pipelines.errors import DataError, UsageError
from pipelines.ffcv import FfcvOptions
from pipelines.ffcv_loader import FfcvLoader
from pipelines.host import check_sizes


def open_loaders(options: FfcvOptions, spec: LoaderSpec, with_train: bool) -> Loaders:
    """As `ffcv.make_loaders`."""
    if not spec.data.is_dir():
        raise UsageError(f"--data: there is no folder {spec.data}")
    check_sizes(spec)
    paths = [
        spec.data / f"{split}.beton" for split in (("train", "val") if with_train else ("val",))
    ]
    betons = [open_beton(path) for path in paths]
    sidecars = [_checked(options, spec, beton) for beton in betons]
    classes = _common_classes(spec.data, betons, sidecars)
    loaders = [
        FfcvLoader(options, spec, beton, classes, training=beton.path.stem == "train")
        for beton in betons
    ]
    return Loaders(loaders[0] if with_train else None, loaders[-1], classes)


def _checked(options: FfcvOptions, spec: LoaderSpec, beton: Beton) -> sidecar.Sidecar | None:
    """The file's sidecar, which agrees with it; without one every sample is decoded, unless trusted."""
    found = sidecar.read(beton.path)
    if found is not None:
        sidecar.check(found, beton.path, len(beton))
    elif not options.trust:
        if spec.rank == 0:
            print(
                f"warning: {beton.path} has no sidecar: checking all {len(beton)} samples "
                "(--trust leaves that out)",
                file=sys.stderr,
            )
        share = np.arange(spec.rank, len(beton), spec.world_size)
        for index, reason in zip(
            share.tolist(), reasons(beton, share, options.workers), strict=True
        ):
            if reason is not None:
                raise broken_sample(beton, index, str(beton.labels[index]), reason)
    return found


def _common_classes(
    data: Path, betons: list[Beton], sidecars: list[sidecar.Sidecar | None]
) -> list[str]:
    """The class list that all sidecars share; numbers, if there is no sidecar."""
    outputs = max(int(beton.labels.max()) + 1 for beton in betons)
    lists = [found.classes for found in sidecars if found is not None]
    if not lists:
        return [str(label) for label in range(outputs)]
    if any(classes != lists[0] for classes in lists):
        different = sorted(set(lists[0]) ^ set(lists[-1]))
        raise UsageError(
            f"--data: the classes of {data}/train.beton and {data}/val.beton differ"
            + (f": {', '.join(different[:5])}" if different else " in their order")
        )
    if outputs > len(lists[0]):
        raise DataError(f"{data}: there is a label {outputs - 1}, but {len(lists[0])} classes")
    return lists[0]
