"""Networks of torchvision and timm as they are, with their published weights, or those of a file."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights
from torchvision.models import list_models as list_torchvision_models

from pipelines.utils.errors import DataError, UsageError
from rsnet.config.model_config import PREFIX, TIMM_PREFIX, canonical_arch
from rsnet.losses import LossName
from rsnet.models.factory import WeightsOnMeta, builder_options, library_name
from rsnet.models.pretrained import (
    MeanStd,
    cleaned,
    expected_mean_std,
    is_path,
    read_state,
    require_timm,
    tagged_name,
)
from rsnet.models.state_dict import describe_mismatch


class Published(NamedTuple):
    """A network of a library. weights: "default", a name that the library has for it, or a file's path."""

    library: Literal["torchvision", "timm"]
    name: str
    weights: str

    @property
    def mean_std(self) -> MeanStd:
        """How its images are normalised: mean and standard deviation of RGB in 0..255."""
        return expected_mean_std(*self)

    @property
    def loss(self) -> LossName:
        """The loss that it was trained by, as far as the name says it; of a file it is not known.

        timm's A1, A2 and A3 are the recipes of that name, of binary cross-entropy (Wightman et al. 2021).
        """
        if self.library != "timm" or is_path(self.weights):
            return "ce"
        import timm

        config = timm.models.get_pretrained_cfg(self.tagged, allow_unregistered=True)
        return "bce" if config and re.match(r"a[123]h?_", config.tag or "") else "ce"

    @property
    def size(self) -> int:
        """The size of the images that it was trained or is evaluated with, in pixels."""
        if self.library == "timm":
            import timm

            config = timm.models.get_pretrained_cfg(self.tagged, allow_unregistered=True)
            return int(config.input_size[-1]) if config else 224
        known = get_model_weights(self.name)
        member = known["DEFAULT" if is_path(self.weights) else self.weights]
        return int(member.transforms.keywords["crop_size"])

    @property
    def tagged(self) -> str:
        """The name with that of its weights, as timm writes it."""
        return tagged_name(self.name, self.weights)

    def build(self, num_classes: int) -> nn.Module:
        """Build the network, with random weights."""
        options = builder_options(_arch(self.library, self.name), num_classes, 1.0)
        if self.library == "timm":
            import timm

            network: nn.Module = timm.create_model(self.name, pretrained=False, **options)
            return network
        return get_model_builder(self.name)(weights=None, **options)  # type: ignore[no-any-return]

    def read(self, option: str) -> tuple[dict[str, Tensor], int]:
        """Return its state dict, and the number of its classes. option: names it in errors.

        Raises UsageError if there are no such weights, DataError if they cannot be had, or do not fit.
        """
        loaded = read_state(*self, option)
        with WeightsOnMeta():
            one, other = (self.build(classes).state_dict() for classes in (1000, 1001))
        state = cleaned(loaded, one)
        heads = [n for n in one if n in state and one[n].shape != other[n].shape]
        if not heads or not state[heads[0]].ndim:
            raise DataError(f"{option} {self.weights}: there is no classifier of {self.name} in it")
        classes = len(state[heads[0]])
        with WeightsOnMeta():
            expected = {k: tuple(v.shape) for k, v in self.build(classes).state_dict().items()}
        if problems := describe_mismatch(expected, state):
            raise DataError(f"{option} {self.weights} does not fit {self.name}: {problems}")
        return state, classes

    def load(self, state: Mapping[str, Tensor], num_classes: int) -> nn.Module:
        """Build the network with the weights that `read` returned."""
        network = self.build(num_classes)
        versioned = OrderedDict(state)
        # The layers' versions, without which MNASNet does not load.
        versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        network.load_state_dict(versioned, strict=False)  # counts of batches may be missing
        return network


def find(text: str, option: str) -> Published:
    """Return the network that NAME, NAME.WEIGHTS or NAME:FILE names, NAME being torchvision's or timm/NAME.

    Raises UsageError if there is none, or timm is not installed. option: names it in errors.
    """
    named, _, file = text.partition(":")
    bare, _, tag = named.partition(".")
    library, name = library_name(canonical_arch(bare))
    weights = file or tag or "default"
    if file and not is_path(file):
        weights = f"./{file}"
    names: list[str] = list_torchvision_models(module=torchvision.models)
    if library == "timm":
        names = require_timm(f"{option} {text}").list_models()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "an example is timm/resnet50"
        raise UsageError(
            f"{option} {text}: there is no such run, checkpoint or release, nor a network of {library} of "
            f"that name; {hint}"
        )
    return Published(library, name, weights)


def _arch(library: str, name: str) -> str:
    return (TIMM_PREFIX if library == "timm" else PREFIX) + name
