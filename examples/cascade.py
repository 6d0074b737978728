"""Classify images by a cascade: small and fast first, larger only where the network is not sure.

    python examples/cascade.py RELEASE DATA [CONFIDENCE]

RELEASE: folder written by `rsnet release`. DATA: labelled images, DATA/CLASS/*.jpg, named like
the folders that it was trained on. CONFIDENCE: probability below which an image goes on to the next larger
size; 0.8 if not given. If `rsnet tune RELEASE --data DATA --target-top1 PERCENT` was run before, the
thresholds that it found are shown, too.

Expected: a table of top-1, computing time and deciding sizes: each size alone, the cascade, the tuned one.
On one half of CIFAR-10's test images, on one of two shared CPU cores
(benchmarks/results/cascade_cifar10_cpu.md): confidence 0.7 had 68.98 % at 0.988 ms an image, size 32 69.02
% at 0.669, tuned thresholds 69.12 % at 0.465. So tune before you rely on a cascade: one confidence for all
sizes can be slower than the largest size alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rsnet.inference.classifier import SwitchableClassifier
from rsnet.release.config import output_names


def main(release: str, data: str, confidence: str = "0.8") -> None:
    classifier = SwitchableClassifier.load(release, batch_size=64)
    paths = sorted(p for p in Path(data).glob("*/*") if p.is_file())
    if not paths:
        sys.exit(f"{data}: there are no images in class folders (DATA/CLASS/*.jpg)")

    # Predictions have readable names, where the release has them.
    folders = classifier.config["network"]["classes"]
    names = dict(zip(folders, output_names(classifier.config), strict=False))
    truth = [names.get(path.parent.name, path.parent.name) for path in paths]

    # One network, one set of weights: each call says how it is to be used.
    calls: dict[str, dict[str, Any]] = {f"size {s}": {"size": s} for s in classifier.sizes}
    calls[f"confidence {confidence}"] = {"confidence": float(confidence)}
    if (Path(release) / "tuned.json").exists():
        calls["tuned"] = {"tuned": True}

    print(f"{'':16} {'top-1 %':>8} {'ms/image':>9}   images decided at each size")
    for name, options in calls.items():
        predictions = classifier.classify(paths, **options)
        right = sum(p.classes[0] == true for p, true in zip(predictions, truth, strict=True))
        # ms: computation alone, summed over all sizes that an image went through.
        ms = sum(p.ms for p in predictions) / len(paths)
        decided = Counter(p.size for p in predictions)
        shown = ", ".join(f"{size}: {decided[size]}" for size in sorted(decided))
        print(f"{name:16} {100 * right / len(paths):8.2f} {ms:9.3f}   {shown}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
