"""`python -m rsnet calibrate`: give a trained network a resolution that it was not trained for."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tyro.conf import arg

from pipelines.batch import Batch, Loader, Loaders, LoaderSpec
from pipelines.utils.errors import UsageError, blame
from rsnet.checkpoint import io as checkpoint
from rsnet.distributed import process_group as distributed
from rsnet.losses import distillation, ensemble_logits
from rsnet.models.factory import rebuild
from rsnet.models.state_dict import add_size, neighbours
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d, select_sizes
from rsnet.training.optim import LrSchedule, make_sgd
from rsnet.training.trainer import Trainer, evaluate, train_one_epoch

State = dict[str, Tensor]
MakeLoaders = Callable[[LoaderSpec, bool], Loaders]


@dataclass(frozen=True)
class Options:
    """Add a resolution to a trained network; the other sizes' outputs stay as they are, bit for bit."""

    checkpoint: Annotated[Path, arg(metavar="CHECKPOINT.pt")]
    """A checkpoint of a run."""

    size: int
    """The new resolution, in pixels."""

    data: Annotated[Path, arg(aliases=("-d",), metavar="DIR")]
    """Folder with train/ and val/, or train.beton and val.beton."""

    how: Literal["interpolate", "estimate", "distil"] = "distil"
    """The BatchNorm to save: the neighbours' interpolated; that, with statistics estimated from training
    images; or that, trained to give the ensemble's outputs."""

    output: Annotated[Path | None, arg(metavar="FILE.pt")] = None
    """File to write. Unset: CHECKPOINT-SIZE.pt."""

    steps: int = 200
    """Batches of training images, for estimate and for distil; at most one epoch."""

    batch_size: Annotated[int, arg(aliases=("-b",))] = 64
    """Images a batch."""

    lr: float = 0.01
    """Learning rate of distil."""

    seed: int = 0
    """Seed of order and crops."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("size", self.size, 1), ("steps", self.steps, 1), ("batch-size", self.batch_size, 2),
            ("seed", self.seed, 0),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"--{flag} {value}: at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr {self.lr}: must be a positive number")


def run(options: Options, make_loaders: MakeLoaders) -> int:
    content = checkpoint.load(options.checkpoint)
    network = content["network"]
    output = options.output or options.checkpoint.with_name(
        f"{options.checkpoint.stem}-{options.size}.pt"
    )
    _require_sense(options, network, output)
    device = distributed.setup("auto")
    sizes = sorted([*network["sizes"], options.size], reverse=True)
    spec = LoaderSpec(
        options.data, tuple(sizes), options.batch_size, device,
        normalize=network["normalize"], seed=options.seed,
    )  # fmt: skip
    with blame(f"--size {options.size}"):
        _network(network, sizes, device)
    with ExitStack() as stack:
        loaders = make_loaders(spec, True)
        assert loaders.train is not None
        stack.enter_context(closing(loaders.train))
        stack.enter_context(closing(loaders.val))
        _require_classes(options, network, loaders.classes)
        val = make_loaders(dataclasses.replace(spec, sizes=(options.size,)), False).val
        stack.enter_context(closing(val))
        states = candidates(content, options, loaders.train, device)
        results = {}
        for name, state in states.items():
            single = _network(network, [options.size], device)
            single.load_state_dict(select_sizes(state, sizes, [options.size]))
            results[name] = evaluate(single, val, device)[str(options.size)]
    print(f"size {options.size}      top-1 %  top-5 %     loss")
    for name, r in results.items():
        chosen = "  saved" if name == options.how else ""
        print(f"{name:12}  {r['top1']:7.2f}  {r['top5']:7.2f}  {r['loss']:7.4f}{chosen}")
    calibrated = {**network.get("calibrated", {}), str(options.size): options.how}
    described = {**network, "sizes": sizes, "calibrated": calibrated}
    checkpoint.save(output, {"network": described, "model": states[options.how]})
    print(f"{output}: sizes {' '.join(map(str, sizes))}")
    return 0


def candidates(
    content: Mapping[str, Any], options: Options, train: Loader, device: torch.device
) -> dict[str, State]:
    """The network's state with the new size's BatchNorm, made in each of the four ways."""
    network, size = content["network"], options.size
    trained: list[int] = network["sizes"]
    weights: State = content.get("ema", content["model"])
    shares = neighbours(trained, size)
    nearest = max(shares, key=lambda s: (shares[s], s))
    states = {
        "nearest": add_size(weights, trained, size, {nearest: 1.0}),
        "interpolate": add_size(weights, trained, size, shares),
    }
    model = _network(network, sorted([*trained, size], reverse=True), device)
    for name, tune in (("estimate", _estimate), ("distil", _distil)):
        model.load_state_dict(states["interpolate"])
        tune(model, options, _FirstBatches(train, options.steps))
        states[name] = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    return states


class _Distillation(nn.Module):
    """The ensemble of the trained sizes teaches the new one, of which only BatchNorm learns."""

    def __init__(self, model: ResolutionSwitchable, size: int) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.norms = nn.ModuleList(_norms_of(model, size))

    def train(self, mode: bool = True) -> _Distillation:
        super().train(False)
        for norm in self.norms:
            norm.train(mode)
        return self

    def forward(
        self, images: tuple[Tensor, ...], _labels: Tensor, _sizes: None = None
    ) -> dict[str, Tensor]:
        by_size = dict(zip(self.model.sizes, images, strict=True))
        trained = [s for s in self.model.sizes if s != self.size]
        with torch.no_grad():
            logits = [self.model(by_size[s], s) for s in trained]
            alpha = self.model.alpha[[s != self.size for s in self.model.sizes]]
            teacher = ensemble_logits(logits, alpha)
        student = self.model(by_size[self.size], self.size)
        loss = distillation([student], teacher, "ens")
        return {"kd": loss, "total": loss}


def _distil(model: ResolutionSwitchable, options: Options, loader: Loader) -> None:
    objective = _Distillation(model, options.size)
    model.requires_grad_(False)
    objective.norms.requires_grad_(True)
    steps = len(loader)
    schedule = LrSchedule(options.lr, "cosine", steps, steps_per_epoch=steps)
    sgd = make_sgd(objective.norms, options.lr, momentum=0.9, weight_decay=0.0)
    trainer = Trainer(objective, sgd, schedule, model.alpha.device)
    train_one_epoch(trainer, loader, steps, lambda _: None)
    model.eval()


@torch.no_grad()
def _estimate(model: ResolutionSwitchable, options: Options, loader: Loader) -> None:
    norms = _norms_of(model, options.size)
    momentum = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    place = model.sizes.index(options.size)
    for batch in loader:
        model(batch.images[place], options.size)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    model.eval()


class _FirstBatches:
    """The first `steps` batches of a loader."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self._loader = loader
        self._steps = steps

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._loader), self._steps)

    def __len__(self) -> int:
        return min(self._steps, len(self._loader))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _require_sense(options: Options, network: Mapping[str, Any], output: Path) -> None:
    if options.size in network["sizes"]:
        raise UsageError(f"--size {options.size}: {options.checkpoint} has it already")
    if network.get("norm", "private") == "shared":
        raise UsageError(
            f"{options.checkpoint}: one BatchNorm serves all sizes; there is none to add"
        )
    if output.exists():
        raise UsageError(f"--output: {output} exists; give another name")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"--output: cannot write into {output.parent}")


def _require_classes(options: Options, network: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raise UsageError if the data is not what the network tells apart; an original names no classes."""
    if (network["classes"] or classes) != classes or len(classes) > network["num_classes"]:
        raise UsageError(f"--data {options.data} has other classes than the checkpoint")


def _norms_of(model: ResolutionSwitchable, size: int) -> list[_BatchNorm]:
    """The BatchNorm layers that `size` has for itself."""
    index = model.sizes.index(size)
    layers = (m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d))
    return [cast(_BatchNorm, layer.by_resolution[index]) for layer in layers]


def _network(
    network: Mapping[str, Any], sizes: list[int], device: torch.device
) -> ResolutionSwitchable:
    return rebuild(network, sizes).to(device).to(memory_format=torch.channels_last)
