"""What the trainings of a study cost, in operations: forward GMACs by size, as runs count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile

from pipelines.dali import DaliOptions
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig, resolve
from rsnet.config.size_schedule import Phase, as_words, mean_cost, step_cost
from rsnet.models.factory import create_model
from rsnet.models.shapes import all_gmacs

# A backward is twice a forward: gradients of inputs and of weights.
FORWARDS = 3
CLASSES = 10  # the last layer costs the same at all sizes


@cache
def size_costs(
    arch: str, stem: str, width_mult: float, sizes: tuple[int, ...]
) -> Mapping[int, float]:
    """Return the GMACs of a forward of one image at each size."""
    words = {"arch": arch, "stem": stem, "width_mult": width_mult, "sizes": sizes}
    model = create_model(ModelConfig.from_dict(words | {"num_classes": CLASSES, "classes": ()}))
    return dict(zip(sizes, all_gmacs(model, sizes), strict=True))


def training_gmacs(options: Sequence[str]) -> float:
    """Return the GMACs that an image costs in a training with these options, without a teacher's."""
    c = configuration(options)
    at = size_costs(c.arch, c.stem, c.width_mult, tuple(dict.fromkeys(c.train_sizes)))
    costs = {size: at[pixels] for size, pixels in zip(c.sizes, c.train_sizes, strict=True)}
    return FORWARDS * mean_cost(costs, c.phases, c.sizes_per_step, c.epochs)


@cache
def _configuration(options: tuple[str, ...]) -> ResolvedConfig:
    config, _ = parse(DaliOptions, ["--data", ".", *options])
    return resolve(config, world_size=1, device_type="cpu", has_bf16=False)


def configuration(options: Sequence[str]) -> ResolvedConfig:
    """Return what a run's options come to."""
    return _configuration(tuple(options))


def epochs_of(budget: float, costs: Mapping[int, float], k: int) -> int:
    """Return the epochs of `k` sizes a step that cost as much as `budget`, in steps' costs, at most."""
    return max(1, int(budget / step_cost(costs, list(costs), k)))


def schedule_of(budget: float, costs: Mapping[int, float]) -> tuple[int, tuple[str, ...]]:
    """Return (epochs, --size-schedule) of as many parts of equal length as there are sizes.

    The first trains the smallest size, each further one the next larger, too, the last all of them. It is
    the longest that costs no more than `budget`, in steps' costs.
    """
    least = max(1, int(budget / sum(costs.values())))
    longer = range(least, int(budget / min(costs.values())) + 2)
    fit = takewhile(
        lambda n: n == least or n * mean_cost(costs, _parts(n, costs), len(costs), n) <= budget,
        longer,
    )
    epochs = max(fit)
    return epochs, as_words(_parts(epochs, costs), list(costs))


def _parts(epochs: int, costs: Mapping[int, float]) -> list[Phase]:
    sizes = sorted(costs)
    # Of parts that have no epoch, the one with the most sizes stays.
    starts = {min(round(epochs * i / len(sizes)), epochs - 1): i + 1 for i in range(len(sizes))}
    return [Phase(start, tuple(sizes[:count][::-1])) for start, count in starts.items()]
