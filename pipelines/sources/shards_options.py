"""The command `rsnet shards`. Importing its options needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from pipelines.sources.cache_options import CacheOptions, size_in_bytes
from pipelines.sources.options import SplitOptions


@dataclass(frozen=True)
class ShardsOptions(CacheOptions):
    """Write tar shards in webdataset's format, to train from or to publish.

    Images are copied byte for byte. An interrupted command continues with the first missing shard.
    """

    data: Annotated[str, arg(aliases=("-d",), metavar="DIR")]
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE, table of paths, or other shards."""

    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")]
    """Folder for the shards; what is in it is not overwritten."""

    shard_size: Annotated[str, arg(metavar="SIZE")] = "1GB"
    """Bytes of a shard, at most: a number with K, M, G or T."""

    val_data: Annotated[str | None, arg(metavar="DIR")] = None
    """Validation images of their own, in place of those in --data."""

    val_fraction: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Share of the training images for validation, chosen by their names, where there are no others."""

    @property
    def shard_bytes(self) -> int:
        """`shard_size` as a number."""
        return size_in_bytes("--shard-size", self.shard_size, "500MB")

    @property
    def placed(self) -> SplitOptions:
        """Where the validation images are."""
        return SplitOptions(self.val_data, self.val_fraction)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.shard_bytes, self.placed  # checks them


def write_shards(options: ShardsOptions) -> int:
    """Write the shards of both splits; return 0.

    Raises UsageError for malformed data or what `write_shards.write_shards` does, and DataError likewise.
    """
    from pipelines.sources import write_shards as writer  # imports torchvision
    from pipelines.sources.folder import require_apart_of_both
    from pipelines.sources.splits import announce, open_splits, warn_of_lost_weights

    train, val = open_splits(options.data, options.placed, cache=options)
    assert train is not None
    announce(train, val)
    warn_of_lost_weights(train)
    require_apart_of_both(options.output, options.data, options.placed)
    writer.write_shards(train, val, options.output, options.shard_bytes)
    return 0
