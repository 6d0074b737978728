"""A release's README.md: what the network is, what it is worth, how to use it; with the Hub's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.utils.errors import DataError

_CARD = """\
---
library_name: rsnet
pipeline_tag: image-classification
tags:
- image-classification
- resolution-switchable
metrics:
- accuracy
---

# {arch} for {sizes} pixels

A Resolution Switchable Network: one CNN that classifies images into {num_classes:,} classes at any of these
resolutions, chosen at run time. They share {shared:,} parameters; {private:,} are private to one of them: its
{what_is_private}.

{table}

{note}

## Loading

With the RS-Net trainer:

```python
from pathlib import Path

import torch

from rsnet import release

model = release.load(Path("."))  # this folder
images = torch.zeros(1, 3, {smallest}, {smallest})  # (N, 3, s, s), s any of {sizes}
with torch.inference_mode():
    logits = model(images)  # (N, {num_classes})
```

`config.json` names the classes in the order of the logits. Nothing in the folder is executed.

## Preprocessing

For a size s: resize the RGB image with the filter "{interpolation}" so that its short side is
int(s / {crop_ratio}) pixels ({short_sides}); take the s x s pixels in the middle; divide by 255, subtract
{mean} and divide by {std}, channel by channel.

## Reference

Wang, Sun, Li and Yao: Resolution Switchable Networks for Runtime Efficient Image Recognition. ECCV 2020.
[arXiv:2007.09558](https://arxiv.org/abs/2007.09558)
"""

# Around what bench writes.
_BEGIN, _END = "<!-- bench -->", "<!-- end of bench -->"


def text(config: Mapping[str, Any]) -> str:
    """The card of the release whose config.json has this content."""
    network, preprocessing = config["network"], config["preprocessing"]
    return _CARD.format(
        arch=network["arch"],
        sizes=", ".join(map(str, network["sizes"])),
        smallest=network["sizes"][-1],
        num_classes=network["num_classes"],
        **config["parameters"],
        what_is_private=_what_is_private(network["norm"]),
        table=_table(config),
        note=_note(config["accuracy"] is not None),
        crop_ratio=preprocessing["crop_ratio"],
        short_sides=", ".join(f"{s}: {side}" for s, side in preprocessing["short_sides"].items()),
        interpolation=preprocessing["interpolation"],
        mean=preprocessing["mean"],
        std=preprocessing["std"],
    )


def with_bench(card: str, section: str) -> str:
    """A card with this section, in place of that of an earlier bench, or at its end; the rest as it is.

    Raises DataError if the markers around the section are not one pair.
    """
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if [card.count(_BEGIN), card.count(_END)] != ([1, 1] if begin and end else [0, 0]):
        raise DataError(f"the section between {_BEGIN} and {_END} is damaged; remove it")
    if not begin:
        before, after = card.rstrip("\n") + "\n\n", "\n"
    return f"{before}{_BEGIN}\n{section}\n{_END}{after}"


def _what_is_private(norm: str) -> str:
    weight = "weight in the ensemble"
    return weight if norm == "shared" else f"BatchNorm, and its {weight}"


def _table(config: Mapping[str, Any]) -> str:
    lines = ["| size | top-1 % | top-5 % | GFLOPs |", "|---|---|---|---|"]
    for name, gflops in config["gflops"].items():
        result = (config["accuracy"] or {}).get(name)
        top1, top5 = (f"{result[k]:.2f}" if result else "" for k in ("top1", "top5"))
        lines.append(f"| {name} | {top1} | {top5} | {gflops:.3f} |")
    return "\n".join(lines)


def _note(is_evaluated: bool) -> str:
    cost = "GFLOPs (2 x multiply-accumulate) are an image's; the ensemble needs all sizes."
    how = "Accuracies are of the validation images of its training run, one centre crop each."
    return f"{how} {cost}" if is_evaluated else f"Its accuracies are not known. {cost}"
