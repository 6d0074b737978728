"""Tar shards in object storage: whole shards are copied to a local cache ahead of their use."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.sources import tar_index
from pipelines.sources.cache_options import CacheOptions
from pipelines.sources.patterns import expanded, has_splits, is_pattern, of_split
from pipelines.sources.remote_reader import ShardReader
from pipelines.sources.shard_cache import ShardCache
from pipelines.sources.shards import CLASSES, PATTERN, TarShards, class_names, columns, write_index
from pipelines.sources.source import REPORT, SharedReads
from pipelines.sources.tar_index import Index, ShardNote
from pipelines.storage.kinds import remote_of
from pipelines.storage.remote import Remote, RemoteObject
from pipelines.utils.atomic_io import sha256_file
from pipelines.utils.errors import RunError, UsageError, first_line
from pipelines.utils.location import WRITABLE, Url
from pipelines.utils.output import note_once, say
from pipelines.utils.progress import format_bytes
from pipelines.utils.reading import Stamp
from pipelines.utils.text import first_names


@dataclass(frozen=True, kw_only=True)
class RemoteShards(TarShards):
    """The images of one split. shards: URLs."""

    reader: ShardReader

    @property
    def place(self) -> str:
        """The folder, and the split."""
        return f"{self._url} ({self.split})"

    @property
    def report(self) -> Path:
        """In the cache: nothing is written beside the shards."""
        name = hashlib.sha256(str(self.data).encode()).hexdigest()[:12]
        return self.reader.cache.folder / f"{name}.{REPORT}"

    @property
    def _url(self) -> str:
        return self.shards[0].rpartition("/")[0]

    def stamps(self) -> dict[str, Stamp]:
        """Return each image's length, and a number that its shard's tag gives."""
        tags = [
            int.from_bytes(hashlib.sha256(item.state.encode()).digest()[:7], "big")
            for item in self.reader.items
        ]
        rows = zip(self.names, self.length.tolist(), self.shard.tolist(), strict=True)
        return {name: (length, tags[shard]) for name, length, shard in rows}

    def expect(
        self,
        rows: NDArray[np.int64],
        of_machine: Callable[[], SharedReads] | None = None,
    ) -> None:
        """Fetch the shards of these samples, in this order, as far ahead as the cache is large.

        Raises UsageError if the cache cannot hold what is open at once.
        """
        reads = None if of_machine is None else of_machine()
        self.reader.expect(self.shard[rows], reads and reads._replace(what=self.shard[reads.what]))

    def stop(self) -> None:
        """Fetch no more."""
        self.reader.stop()

    def _read_range(self, shard: int, offset: int, length: int) -> bytes:
        return self.reader.read(shard, offset, length)

    @property
    def counted(self) -> str:
        """What was found, and where it is kept, as text."""
        cache = self.reader.cache
        return f"{super().counted}; cache {cache.folder}, up to {format_bytes(cache.limit)}"


class _Opened(NamedTuple):
    """An index, and its file in the cache; None if it lies beside the shards."""

    known: Index
    kept: Path | None


def has_remote_split(data: Url, split: str) -> bool:
    """Return whether there are shards of that split, and others are not. Raises UsageError, RunError."""
    pattern = _pattern(data)
    return has_splits(pattern) and bool(_listed(remote_of(data), pattern, split))


def list_remote(data: Url, split: str) -> list[RemoteObject]:
    """Return the shards of a split. Raises UsageError if there are none, and as `has_remote_split`."""
    pattern = _pattern(data)
    items = _listed(remote_of(data), pattern, split)
    if not items:
        raise UsageError(
            f"no shards of {split} match {pattern}; folders of images, tables and .beton files are read from "
            "this machine alone: rsnet shards writes shards of them"
        )
    return items


def open_remote(data: Url, split: str, options: CacheOptions) -> RemoteShards:
    """Return the images of a split. The index is made if there is none of these shards.

    Raises UsageError if there are no shards, or they cannot be reached; as `open_shards` beside that.
    """
    remote, items = remote_of(data), list_remote(data, split)
    urls = [item.url for item in items]
    folder = urls[0].rpartition("/")[0]
    cache = ShardCache(options.folder, options.size)
    reader = ShardReader(remote, items, cache)
    opened = _index(remote, items, reader, f"{folder}/{tar_index.file_name(_names(items))}")
    index, kept = opened
    reader.check = lambda number, path: _check(items[number], number, path, opened)
    if kept is None and index.shards:
        shas = [note.sha256 for note in index.shards]
        reader.items = [replace(i, sha256=sha) for i, sha in zip(items, shas, strict=True)]
    elif not all(item.tag for item in items):
        note_once(
            f"untagged {folder}",
            f"{folder}: the server gives neither ETag nor Last-Modified: a shard that is replaced by one of "
            f"the same size is not noticed; after that, remove {cache.folder}",
        )
    classes = f"{folder}/{CLASSES}"
    names = class_names(classes, remote.content(classes), index.labels)
    return RemoteShards(data=data, split=split, shards=urls, reader=reader, **columns(index, names))


def _pattern(data: Url) -> str:
    return data if is_pattern(data) else f"{data}/{PATTERN}"


def _names(items: list[RemoteObject]) -> list[str]:
    return tar_index.short_names([item.url for item in items])


def _listed(remote: Remote, pattern: str, split: str) -> list[RemoteObject]:
    patterns = expanded(of_split(pattern, split))
    found = remote.find(patterns)
    missing = [one for one, items in zip(patterns, found, strict=True) if not items]
    if 0 < len(missing) < len(patterns):
        raise UsageError(f"{pattern} names shards that are not there: {first_names(missing)}")
    return list({item.url: item for items in found for item in items}.values())


def _index(remote: Remote, items: list[RemoteObject], reader: ShardReader, url: str) -> _Opened:
    """Return the index: that in the cache, or beside the shards, or one that is made now and kept there.

    The shards are fetched whole for it, as the training needs them anyhow: headers alone would take a request
    for each image.
    """
    names = _names(items)
    states = [(name, i.size, i.tag) for name, i in zip(names, items, strict=True)]
    fingerprint = tar_index.fingerprint_of(states)
    sizes = [(name, size) for name, size, _ in states]
    kept = reader.cache.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.index.parquet"
    has_tags = all(item.tag for item in items)
    # Without tags nothing tells whether the cache's is of these shards; that beside them may.
    for in_cache in (True, False) if has_tags else (False, True):
        data = (kept.read_bytes() if kept.exists() else None) if in_cache else remote.content(url)
        found = tar_index.decoded(data)
        # One that `rsnet shards` wrote knows the shards by their content, which is checked as they come.
        if found and (
            found.fingerprint == fingerprint
            or [(note.name, note.size) for note in found.shards] == sizes
        ):
            return _Opened(found, kept if in_cache else None)
    say(
        f"{url.rpartition('/')[0]}: {len(items)} shards are fetched to make their index", sys.stderr
    )
    urls, notes = [item.url for item in items], []

    @contextmanager
    def held(shard: int) -> Iterator[str]:
        with reader.held(shard) as path:
            if not has_tags:  # so that a copy that comes later is known for another one
                notes.append(ShardNote(*sizes[shard], sha256_file(Path(path))))
            yield path

    reader.expect(np.arange(len(items)))
    index = tar_index.scan(urls, held, fingerprint)._replace(shards=notes)
    reader.stop()
    write_index(kept, index)
    if Url(url).scheme in WRITABLE:
        try:
            remote.put(url, tar_index.encoded(index))
        except (OSError, RunError, UsageError) as error:
            say(f"note: the index is kept in {kept.parent} alone: {first_line(error)}", sys.stderr)
    return _Opened(index, kept)


def _check(item: RemoteObject, number: int, path: Path, opened: _Opened) -> None:
    """Raise RunError if a shard's file is not the one that the index describes, where it has a SHA-256."""
    index, kept = opened
    if index.shards and sha256_file(path) != index.shards[number].sha256:
        place = kept or "a hidden file beside them"
        raise RunError(
            f"{item.url} has another content than its index says; upload the shards and their index "
            f"anew, or remove the index, {place}"
        )
