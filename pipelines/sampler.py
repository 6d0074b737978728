"""The order of samples and their random numbers: functions of (seed, epoch, sample index) alone."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from pipelines import erasing
from pipelines.batch import Batch, Flip, LoaderSpec
from pipelines.sources.source import SharedReads, Source
from pipelines.transforms import CropParams
from pipelines.utils.errors import UsageError

Indices = NDArray[np.int64]

# The first of a sample's random numbers that automatic augmentation and random erasing use, behind those of
# crop and flips.
AUGMENTATION_LANE = 1024
ERASING_LANE = 2048

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment


def uniforms(
    seed: int, epoch: int, indices: Indices, lanes: int, first_lane: int = 0
) -> NDArray[np.float64]:
    """Return (N, lanes) numbers in [0, 1) for (N,) sample indices, the same in every batch and process.

    A counter hashed by SplitMix64's finaliser (Steele, Lea, Flood 2014), because numpy's generators
    cannot be started at many counters at once: 20 us per sample instead of 0.2 us.
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed) + _GAMMA) + np.uint64(epoch) * _GAMMA)
        lane = np.arange(first_lane + 1, first_lane + lanes + 1, dtype=np.uint64) * _GAMMA
        bits = _mix(_mix(key + indices.astype(np.uint64)[:, None] * _GAMMA) + lane)
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def crop_params(
    seed: int, epoch: int, indices: Indices, sizes: int, flip: Flip, extra: int = 0
) -> CropParams:
    """Return the crops and flips of N samples at `sizes` resolutions, and at `extra` more with the flip of
    the first.
    """
    numbers = uniforms(seed, epoch, indices, CropParams.lanes(sizes))
    params = CropParams.from_uniforms(numbers, flip)
    return params._replace(flip=np.hstack([params.flip, *[params.flip[:, :1]] * extra]))


def draw_crops(spec: LoaderSpec, epoch: int, indices: Indices) -> CropParams:
    """Return the crops and flips of N training samples at `spec.all_sizes`."""
    return crop_params(spec.seed, epoch, indices, len(spec.sizes), spec.flip, len(spec.extra_sizes))


@dataclass(frozen=True)
class Schedule:
    """The samples of each step of one rank.

    Training: one global shuffle an epoch; step t takes the next `batch_size * world_size` samples and
    gives each rank its slice, so that the order does not depend on the number of ranks. Samples that do
    not fill a global batch are dropped, other ones each epoch. Evaluation: a contiguous share of the
    samples for each rank, each exactly once; the last batch may be smaller.

    repeats: crops of each image of an epoch (repeated augmentation, Hoffer et al. 2019), next to each
    other, so that one global step has all of them. The epoch keeps its length and has fewer images, as in
    torchvision's RASampler. As there, the ranks take turns, so that the crops of an image are spread over
    ranks.
    """

    samples: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    training: bool
    _: KW_ONLY
    repeats: int = 1

    order_name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        if self.training and self.samples < self.global_batch:
            raise UsageError(
                f"--batch-size: one step takes {self.global_batch} images "
                f"({self.batch_size} x {self.world_size} processes), but there are only "
                f"{self.samples} training images"
            )

    def rows(self, indices: Indices) -> Indices:
        """Return the samples of the source that a batch's indices stand for.

        The k-th repeat of sample i has the index i + k * `samples`, and thereby a crop of its own.
        """
        return indices % self.samples

    @property
    def order_text(self) -> str:
        """The order, as a state has it: another one cannot be continued."""
        return self.order_name + (f", {self.repeats} of an image" if self.repeats > 1 else "")

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def ranks(self) -> list[int]:
        """The ranks that take their batches from one order, of `order`: all of them."""
        return list(range(self.world_size))

    @property
    def share(self) -> range:
        """The evaluation samples of this rank."""
        first, last = (self.samples * r // self.world_size for r in (self.rank, self.rank + 1))
        return range(first, last)

    @property
    def steps(self) -> int:
        if self.training:
            return self.samples // self.global_batch
        return -(-len(self.share) // self.batch_size)

    def order(self, epoch: int) -> Indices:
        """Return the training samples of an epoch in the order in which the steps of `ranks` take them."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.samples)

    def rows_of(self, batches: Sequence[Indices]) -> Indices:
        """Return the samples of the source that these steps take, in their order."""
        return self.rows(np.concatenate([np.empty(0, np.int64), *batches]))

    def reads_of(self, ranks: Sequence[int], epoch: int, first_step: int = 0) -> SharedReads:
        """Return the reads of these ranks, of which this is one, interleaved step by step."""
        order = self._order_of_all(epoch)
        each = [[*replace(self, rank=rank)._batches(order, first_step)] for rank in ranks]
        steps = [
            (rank, batch)
            for step in itertools.zip_longest(*each)
            for rank, batch in zip(ranks, step, strict=True)
            if batch is not None
        ]
        is_own = np.repeat([rank == self.rank for rank, _ in steps], [len(b) for _, b in steps])
        rows = self.rows_of([batch for _, batch in steps])
        return SharedReads(rows, np.flatnonzero(is_own), len(ranks))

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Indices]:
        """Yield the sample indices of each step from `first_step` on."""
        yield from self._batches(self._order_of_all(epoch), first_step)

    def _order_of_all(self, epoch: int) -> Indices:
        """Return what all of `ranks` take, with repeats; an evaluation's samples as they lie.

        It is drawn once for all that have a part of it: that takes 1 s of 14 million samples.
        """
        order = self._in_use.get(epoch)
        if order is None:
            order = self._in_use[epoch] = self._drawn_order(epoch)
        return order

    @cached_property
    def _in_use(self) -> WeakValueDictionary[int, Indices]:
        """The orders of which somebody has a part, by epoch."""
        return WeakValueDictionary()

    def _drawn_order(self, epoch: int) -> Indices:
        if not self.training:
            return np.arange(self.samples)
        order = self.order(epoch)
        if self.repeats == 1:
            return order
        images = order[: -(-len(order) // self.repeats)]
        return (images[:, None] + self.samples * np.arange(self.repeats)).ravel()

    def _batches(self, order: Indices, first_step: int) -> Iterator[Indices]:
        if not self.training:
            for first in self.share[first_step * self.batch_size :: self.batch_size]:
                yield order[first : min(first + self.batch_size, self.share.stop)]
            return
        ranks = self.ranks
        place, stride = ranks.index(self.rank), len(ranks) * self.batch_size
        for step in range(first_step, self.steps):
            of_all = order[step * stride :][:stride]
            if self.repeats == 1:
                yield of_all[place * self.batch_size :][: self.batch_size]
            else:
                own = of_all[place :: len(ranks)]
                # Mixup and CutMix mix neighbours: keep the repeats of an image apart.
                yield own[np.argsort(own // self.samples, kind="stable")]


@dataclass(frozen=True)
class BalancedSchedule(Schedule):
    """The same number of samples of every class in an epoch, up to one; those of small classes repeat. All
    samples of a class are drawn before any is drawn again. An epoch is as long as the number of samples.
    """

    labels: NDArray[np.int64]

    order_name = "balanced"

    def order(self, epoch: int) -> Indices:
        rng = np.random.default_rng((self.seed, epoch))
        present, counts = np.unique(self.labels, return_counts=True)
        shares = np.full(len(present), self.samples // len(present))
        shares[rng.permutation(len(present))[: self.samples % len(present)]] += 1
        by_class = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(counts)[:-1])
        drawn = []
        for members, share in zip(by_class, shares.tolist(), strict=True):
            for repeat in range(-(-share // len(members))):
                again = rng.permutation(members)[: share - repeat * len(members)]
                drawn.append(again + repeat * self.samples)
        return rng.permutation(np.concatenate(drawn))


class ScheduledLoader(ABC):
    """A `Loader` over a `Schedule`: keeps the epoch and the position; a backend adds `_read`."""

    pipeline = ""  # what reads the images, as users know it

    def __init__(self, spec: LoaderSpec, schedule: Schedule) -> None:
        self._spec, self.schedule = spec, schedule
        self.sample_weights: NDArray[np.float32] | None = None
        self._epoch = 0
        self._step = 0  # batches of this epoch that were yielded
        self._first_step = 0  # of the next iteration

    @abstractmethod
    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Yield the batches of `schedule.batches(epoch, first_step)`."""

    def __len__(self) -> int:
        return self.schedule.steps

    def __iter__(self) -> Iterator[Batch]:
        self._step, self._first_step = self._first_step, 0
        batches = self._read(self._epoch, self._step)
        if self._spec.random_erase and self.schedule.training:
            batches = self._erased(batches, self._epoch, self._step)
        for batch in batches:
            self._step += 1
            yield batch

    def _erased(self, batches: Iterator[Batch], epoch: int, first_step: int) -> Iterator[Batch]:
        """Erase a box of the samples whose own numbers say so."""
        spec = self._spec
        for indices, batch in zip(self.schedule.batches(epoch, first_step), batches, strict=True):
            numbers = uniforms(spec.seed, epoch, indices, erasing.LANES, ERASING_LANE)
            boxes = erasing.Boxes.from_uniforms(numbers, spec.random_erase)
            erasing.erase(batch, boxes, draw_crops(spec, epoch, indices).flip)
            yield batch

    def _expect(self, source: Source, epoch: int, first_step: int) -> list[Indices]:
        """Return the indices of an epoch's steps, and announce them to the source, which may have to
        prefetch them.
        """
        batches = list(self.schedule.batches(epoch, first_step))
        # Without the nodes of the ranks it is not known who reads here.
        ranks = self._spec.local_ranks if self._spec.node_of_rank else []
        of_machine = partial(self.schedule.reads_of, ranks, epoch, first_step)
        source.expect(self.schedule.rows_of(batches), of_machine if len(ranks) > 1 else None)
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` with the next iteration."""
        self._epoch, self._step, self._first_step = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, position in samples of all ranks, and the data and order that they belong to."""
        return {
            "epoch": self._epoch,
            "position": self._step * self.schedule.global_batch,
            "seed": self.schedule.seed,
            "samples": self.schedule.samples,
            "data": self.fingerprint,
            "pipeline": self.pipeline,
            "order": self.schedule.order_text,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was yielded when `state` was taken.

        Raises UsageError if `state` is of other samples, another seed or order, or if its position is
        in the middle of one of this schedule's steps.
        """
        own = self.state_dict()
        if state["samples"] == own["samples"] and state["data"] != own["data"]:
            raise UsageError("--resume: the checkpoint's data has other images than this run's")
        for field in ("seed", "samples", "order"):
            if state[field] != own[field]:
                raise UsageError(
                    f"--resume: the checkpoint's data has {field} {state[field]}, "
                    f"this run's {own[field]}"
                )
        step, rest = divmod(state["position"], self.schedule.global_batch)
        if rest:
            raise UsageError(
                f"--resume: the checkpoint is at sample {state['position']} of its epoch, which is "
                f"no multiple of the global batch {self.schedule.global_batch} (--batch-size)"
            )
        self._epoch, self._step, self._first_step = state["epoch"], step, step

    @property
    def sample_names(self) -> Sequence[str]:
        """Where each sample of all ranks lies, in the order of the evaluation."""
        return [str(index) for index in range(self.schedule.samples)]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names or sizes, not of the files' content, by which changed data is noticed."""
        return self._fingerprint()

    def _fingerprint(self) -> str:
        return ""

    def close(self) -> None:  # noqa: B027 - most backends have nothing to close
        """End threads and processes, and free memory; a later iteration starts them again."""


def make_schedule(
    spec: LoaderSpec, samples: int, training: bool, labels: NDArray[np.int64] | None = None
) -> Schedule:
    """Return the schedule of the rank that `spec` describes. labels: (samples,), to balance classes."""
    repeats = spec.repeats if training else 1
    schedule = Schedule(
        samples, spec.batch_size, spec.rank, spec.world_size, spec.seed, training, repeats=repeats
    )
    if training and spec.balanced_sampling and labels is not None:
        return BalancedSchedule(**vars(schedule), labels=labels)
    return schedule


def _mix(z: Any) -> Any:
    """Hash uint64 counters by SplitMix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
