"""One resolution of a switchable network as an ordinary network, with BatchNorm folded into convolutions."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.utils.errors import UsageError
from rsnet.models.quantization.lq_nets import ActivationQuantizer
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d

# timm's, which have a dropout and an activation of their own, and that of `layers.fused_batchnorm`.
_NORMS_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct", "FusedBatchNorm2d")


def plain(model: ResolutionSwitchable, size: int) -> nn.Module:
    """Return the network of one size, (N, 3, size, size) -> (N, classes), in eval mode, with the model's
    own tensors.

    Raises ValueError if the model has no such size.
    """
    model.select(size)
    copies: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for norm in model.network.modules():
        if isinstance(norm, SwitchableBatchNorm2d):
            copies[id(norm)] = copy.deepcopy(norm.by_resolution[norm.active], copies)
    network: nn.Module = copy.deepcopy(model.network, copies)
    return network.eval()


@torch.inference_mode(False)  # in it, a convolution is another operation
@torch.no_grad()
def fold_batchnorm(model: ResolutionSwitchable, size: int) -> nn.Module:
    """Return `plain` without the BatchNorms that follow a convolution, which gets new weights instead.

    Which ones do is seen in a forward, so that any network will do. A BatchNorm stays that follows something
    else, as DenseNet's and those of pre-activation ResNets, or a convolution whose output or weight is used
    elsewhere, too, or whose weight is computed in each forward.

    Raises ValueError if the model has no such size, UsageError if its activations are quantized, because
    rounding errors would move some by a whole level.
    """
    require_foldable(model)
    network = plain(model, size)
    convs = _convolution_before(network, size)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in convs:
            network.set_submodule(name, _without_statistics(module))
    for norm, conv in convs.items():
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
        )  # fmt: skip
    return network


def is_foldable(model: nn.Module) -> bool:
    """Return whether `fold_batchnorm` accepts the model."""
    return not any(isinstance(m, ActivationQuantizer) for m in model.modules())


def require_foldable(model: nn.Module) -> None:
    """Raise the UsageError of `fold_batchnorm` if it does not accept the model."""
    if not is_foldable(model):
        raise UsageError(
            "fold: this network's activations are quantized, and rounding would move some by a level"
        )


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the inputs and outputs of each operation, and keeps them alive, so that their ids differ."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, given = (
            [t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), result)
        )
        self.calls.append((func, read, given))
        return result


def _convolution_before(network: nn.Module, size: int) -> dict[Any, nn.Conv2d]:
    """Return {BatchNorm: the convolution that it can be folded into}, as a forward shows."""
    first = next(network.parameters())
    with _untimed(), torch.autocast(first.device.type, enabled=False), _Uses() as uses:
        network(torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device))
    count = Counter(id(t) for _, read, _ in uses.calls for t in read)
    convs = {id(m.weight): m for m in network.modules() if isinstance(m, nn.Conv2d)}
    norms = {id(m.running_mean): m for m in network.modules() if _can_be_folded(m)}
    made: dict[int, nn.Conv2d] = {}  # by the id of the output
    found = {}
    for operation, read, given in uses.calls:
        if operation is torch.ops.aten.convolution.default:
            weight = read[1] if read[1]._base is None else read[1]._base  # some take a slice of it
            if id(weight) in convs and count[id(weight)] == 1 == count[id(given[0])]:
                made[id(given[0])] = convs[id(weight)]
        for norm in (norms[id(t)] for t in read if id(t) in norms):
            if id(read[0]) in made and count[id(norm.running_mean)] == 1:
                found[norm] = made[id(read[0])]
    return found


@contextmanager
def _untimed() -> Iterator[None]:
    """Let cuDNN choose without timing: that takes seconds, for a forward that is thrown away."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, False
    try:
        yield
    finally:
        cudnn.benchmark = before


def _can_be_folded(module: Any) -> bool:
    return type(module) is nn.BatchNorm2d or type(module).__name__ in _NORMS_WITH_ACTIVATION


def _without_statistics(norm: Any) -> nn.Module:
    return norm.act if hasattr(norm, "act") else nn.Identity()
