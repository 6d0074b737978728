"""A first layer for small images, such as CIFAR's of 32 pixels, in place of ImageNet's."""

from __future__ import annotations

from torch import nn


def use_small_stem(network: nn.Module) -> None:
    """Make the first convolution of `network` one of 3 x 3 with stride 1, and leave out the first max
    pool, in place.

    He et al. 2016 (section 4.2) start so on CIFAR-10. A convolution larger than 3 x 3 is replaced, and
    starts with Kaiming's fan-out.
    """
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if max(first.kernel_size) > 3:
        conv = nn.Conv2d(
            first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        network.set_submodule(name, conv)
    else:
        first.stride = (1, 1)
    pools = (n for n, m in network.named_modules() if isinstance(m, nn.MaxPool2d))
    if pool := next(pools, None):
        network.set_submodule(pool, nn.Identity())
