"""Recomputation: the same bits, less memory."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from rsnet.config.model_config import ModelConfig
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.factory import create_model
from rsnet.training.objective import Objective

SIZES = (48, 32)


def _step(model, amp: bool):
    """Gradients, buffers, and the bytes that the backward keeps of feature maps."""
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.ndim == 4 and tensor.shape[0] == 4:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 3, s, s, generator=generator) for s in SIZES]
    images = tuple(x.contiguous(memory_format=torch.channels_last) for x in images)
    labels = torch.tensor([0, 1, 2, 0])
    objective = Objective(model.train(), "ens_topdown")
    torch.manual_seed(7)  # of dropout
    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # The outputs of convolutions, which "norm" keeps, pass by these hooks: they are not in the bytes.
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=False):
            terms = objective(images, labels)
        terms["total"].backward()
    state = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return state, sum(kept.values())


@pytest.mark.parametrize(
    ("arch", "amp", "what"),
    [
        ("parallel_resnet18", True, "norm"),
        ("parallel_resnet18", False, "blocks"),
        ("parallel_mobilenetv2", True, "norm"),
        ("parallel_mobilenetv2", True, "blocks"),
        # half a minute
        pytest.param("parallel_densenet121", False, "norm", marks=pytest.mark.slow),
    ],
)
def test_gradients_and_statistics_are_the_same_bits(arch, amp, what):
    torch.manual_seed(0)
    width_mult = 1.0 if "densenet" in arch else 0.25
    config = ModelConfig(arch, 3, SIZES, width_mult=width_mult)
    plain = create_model(config).to(memory_format=torch.channels_last)
    again = copy.deepcopy(plain)
    assert convert_to_checkpointed(again.network, what) > 0
    assert list(again.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        expected, more = _step(plain, amp)
        found, less = _step(again, amp)
        assert found.keys() == expected.keys()
        different = [
            name for name, value in expected.items() if not torch.equal(found[name], value)
        ]
        assert different == []
    assert less < 0.6 * more  # the stem is in no block


def test_dropout_is_drawn_once():
    torch.manual_seed(0)
    plain = create_model(ModelConfig("parallel_mobilenetv2", 3, SIZES, width_mult=0.25))
    for module in plain.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.register_forward_hook(lambda _m, _i, y: torch.nn.functional.dropout(y, 0.5))
    again = copy.deepcopy(plain)
    convert_to_checkpointed(again.network, "blocks")
    for block in again.modules():
        if hasattr(block, "checkpointed_random"):
            block.checkpointed_random = True  # of a hook, which no module shows
    expected, _ = _step(plain, False)
    found, _ = _step(again, False)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_it_evaluates_and_copies_as_before():
    torch.manual_seed(0)
    plain = create_model(ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.25))
    again = copy.deepcopy(plain)
    convert_to_checkpointed(again.network, "blocks")
    again = copy.deepcopy(again).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), plain.eval()(x))
