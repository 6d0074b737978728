"""A resolution for a trained network that it was not trained for: the BatchNorm that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.batch import Batch, Loader
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.losses import LossName, distillation, ensemble_logits
from rsnet.models.factory import create_model
from rsnet.models.state_dict import add_size, nearest_size, neighbour_shares
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.loop import train_one_epoch
from rsnet.training.optim import LrSchedule, make_sgd
from rsnet.training.trainer import Trainer

State = dict[str, Tensor]


def candidates(
    checkpoint: Checkpoint,
    size: int,
    train: Loader,
    device: torch.device,
    steps: int = 200,
    lr: float = 0.01,
) -> dict[str, State]:
    """Return the network's state with the new size's BatchNorm, made in each of the four ways.

    train: batches at the trained sizes and the new one, of which `steps` are used.
    lr: of the distillation.
    """
    network, weights = checkpoint.network, dict(checkpoint.eval_weights)
    trained = network.sizes
    shares = neighbour_shares(trained, size)
    states = {
        "nearest": add_size(weights, trained, size, {nearest_size(trained, size): 1.0}),
        "interpolate": add_size(weights, trained, size, shares),
    }
    model = build_network(network, sorted([*trained, size], reverse=True), device)
    batches = _FirstBatches(train, steps)
    for name, tune in (
        ("estimate", _estimate),
        ("distil", partial(_distil, lr=lr, loss=checkpoint.loss)),
    ):
        model.load_state_dict(states["interpolate"])
        tune(model, size, batches)
        states[name] = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    return states


class _Distillation(nn.Module):
    """The ensemble of the trained sizes teaches the new one, of which only BatchNorm learns.

    loss: that of the training: what the logits are of, see `rsnet.losses.distillation`.
    """

    def __init__(self, model: ResolutionSwitchable, size: int, loss: LossName = "ce") -> None:
        super().__init__()
        self.loss: LossName = loss
        self.model = model
        self.size = size
        self.norms = nn.ModuleList(model.norms_of([size]))

    def train(self, mode: bool = True) -> _Distillation:
        super().train(False)
        for norm in self.norms:
            norm.train(mode)
        return self

    def forward(
        self,
        images: tuple[Tensor, ...],
        _labels: Tensor,
        _sizes: None = None,
        _weights: None = None,
        _teacher: None = None,
    ) -> dict[str, Tensor]:
        by_size = dict(zip(self.model.sizes, images, strict=True))
        trained = [s for s in self.model.sizes if s != self.size]
        with torch.no_grad():
            logits = [self.model(by_size[s], s) for s in trained]
            # Indexing with a list would copy it to the device, a synchronisation.
            alphas = zip(self.model.sizes, self.model.alpha.unbind(), strict=True)
            alpha = torch.stack([value for s, value in alphas if s != self.size])
            teacher = ensemble_logits(logits, alpha)
        student = self.model(by_size[self.size], self.size)
        loss = distillation([student], teacher, "ens", loss=self.loss)
        return {"kd": loss, "total": loss}


def _distil(
    model: ResolutionSwitchable, size: int, loader: Loader, lr: float, loss: LossName
) -> None:
    objective = _Distillation(model, size, loss)
    model.requires_grad_(False)
    objective.norms.requires_grad_(True)
    steps = len(loader)
    schedule = LrSchedule(lr, "cosine", steps, steps_per_epoch=steps)
    sgd = make_sgd(objective.norms, lr, momentum=0.9, weight_decay=0.0)
    trainer = Trainer(objective, sgd, schedule, model.alpha.device)
    train_one_epoch(trainer, loader, steps, lambda _: None)
    model.eval()


@torch.no_grad()
def _estimate(model: ResolutionSwitchable, size: int, loader: Loader) -> None:
    norms = cast(list[_BatchNorm], model.norms_of([size]))
    momentum = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    place = model.sizes.index(size)
    for batch in loader:
        model(batch.images[place], size)
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


def build_network(
    network: ModelConfig, sizes: Sequence[int], device: torch.device
) -> ResolutionSwitchable:
    return create_model(network.with_sizes(sizes)).to(device).to(memory_format=torch.channels_last)
