"""Quasi-random orders: what lies together, in a page of a file or a shard, is read together.

The parts of the data are shuffled, and then the samples of each window of parts. webdataset shuffles within a
buffer of samples, FFCV's quasi-random order within pages, MosaicML Streaming's py1e within blocks of shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.batch import LoaderSpec
from pipelines.sampler import Indices, Schedule, make_schedule
from pipelines.sources.source import Source
from pipelines.utils.errors import UsageError


class Windows(NamedTuple):
    """How an order keeps together what lies together.

    parts: (samples,) the number of the page or shard that each sample is in. size: parts that are mixed.
    """

    parts: NDArray[np.int64]
    size: int


@dataclass(frozen=True)
class WindowSchedule(Schedule):
    """The quasi-random order: parts of the data are shuffled, and then the samples of each window of parts.

    It depends on (seed, epoch) alone; all ranks share it, so that a machine reads a part once.
    """

    windows: Windows

    order_name = "quasi-random"

    def order(self, epoch: int) -> Indices:
        place, numbers = self._drawn(epoch)
        return np.lexsort((numbers, place // self.windows.size))

    def _drawn(self, epoch: int) -> tuple[Indices, NDArray[np.float64]]:
        """Return for each sample the place of its part among the shuffled ones, and a number to sort by."""
        rng = np.random.default_rng((self.seed, epoch))
        part = self._part
        return rng.permutation(part.max() + 1)[part], rng.random(self.samples)

    @cached_property
    def _part(self) -> Indices:
        """The part of each sample, numbered without gaps."""
        is_there = np.bincount(self.windows.parts) > 0
        return (np.cumsum(is_there) - 1)[self.windows.parts]


@dataclass(frozen=True)
class ShardSchedule(WindowSchedule):
    """The quasi-random order of several nodes, of which each reads a run of the epoch's shuffled shards.

    A step takes as many samples of each node, and its processes share them as those of a single node do: the
    order depends on (seed, epoch) and the nodes. All nodes have as many samples, up to one: a shard on the
    border of two nodes' runs is read by both, but no sample is.

    node_of_rank: (world_size,) numbers from 0. Raises UsageError if nodes have different numbers of ranks.
    """

    node_of_rank: tuple[int, ...]

    order_name = "shards"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = np.bincount(self.node_of_rank)
        if counts.min() < counts.max():
            raise UsageError(
                f"--order shards: nodes have {counts.min()} to {counts.max()} processes; start as many on "
                "each"
            )

    @property
    def nodes(self) -> int:
        """Their number."""
        return max(self.node_of_rank) + 1

    @property
    def ranks(self) -> list[int]:
        """Those of this node."""
        own = self.node_of_rank[self.rank]
        return [rank for rank, node in enumerate(self.node_of_rank) if node == own]

    @cached_property
    def order_text(self) -> str:
        """The order, with a hash of what lies in which shard, on which it depends."""
        shards, digest = int(self._part.max()) + 1, hashlib.sha256(self._part.tobytes()).hexdigest()
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        mixed = min(self.windows.size, shards)
        return f"{super().order_text}, {mixed} of {shards} at a time{nodes} ({digest[:6]})"

    def order(self, epoch: int) -> Indices:
        # Laid end to end in their shuffled order, the shards take the positions starts[i] to ends[i] - 1.
        place, numbers = self._drawn(epoch)
        ends = np.cumsum(np.bincount(place))
        starts = np.concatenate([[0], ends[:-1]])
        # This node reads the positions from `first` on. Only the shards that reach into them are sorted:
        # all would take 8 s for 14 million samples.
        share = self.samples // self.nodes
        first = self.node_of_rank[self.rank] * share
        overlaps = (ends > first) & (starts < first + share)
        candidates = np.flatnonzero(overlaps[place])
        by_shard = candidates[np.lexsort((numbers[candidates], place[candidates]))]
        own = by_shard[first - starts[overlaps][0] :][:share]
        # Then the samples of each window of shards are shuffled.
        window = (place[own] - place[own[0]]) // self.windows.size
        return own[np.lexsort((numbers[own], window))]


def quasi_random(schedule: Schedule, spec: LoaderSpec, windows: Windows) -> WindowSchedule:
    """Return the quasi-random order of a training. Raises UsageError with --balanced-sampling."""
    _require_unbalanced(spec)
    return WindowSchedule(**vars(schedule), windows=windows)


def source_schedule(
    spec: LoaderSpec, source: Source, training: bool, window: int | None = None
) -> Schedule:
    """Return the schedule of a source's samples. window: shards that a training mixes; None for all data.

    Raises UsageError if the source has no shards, or with --balanced-sampling.
    """
    schedule = make_schedule(spec, len(source), training, source.labels)
    if not training or window is None:
        return schedule
    _require_unbalanced(spec)
    if source.shard is None:
        raise UsageError(
            f"--order shards: {source.place} is no tar shards; leave it out, or let rsnet shards write some"
        )
    windows = Windows(source.shard, window)
    return ShardSchedule(**vars(schedule), windows=windows, node_of_rank=spec.nodes)


def _require_unbalanced(spec: LoaderSpec) -> None:
    if spec.balanced_sampling:
        raise UsageError("--balanced-sampling: with --order random alone")
