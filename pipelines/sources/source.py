"""The interface of a data source: the encoded images of one split by index, with labels and names."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.utils.errors import DataError, first_line
from pipelines.utils.location import Location
from pipelines.utils.reading import Stamp
from pipelines.utils.text import first_names

REPORT = "verified.json"


class SharedReads(NamedTuple):
    """The reads of several processes of a machine, which advance at about the same speed.

    what: the sample, or the shard, of each read, in an order common to all processes. own: the positions of
    this process's reads in it. processes: their number.
    """

    what: NDArray[np.int64]
    own: NDArray[np.int64]
    processes: int


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """The images of one split. A sample's index is its place in `names`, on which its crops depend.

    data: what `rsnet verify` takes: the folder that has the splits, a table, or a pattern of shards. split:
    train or val. classes: their names, in the order of the labels. labels: (N,) int64. weights: (N,) or None.
    shard: (N,) numbers of the shards that the samples are in, or None.
    """

    data: Location
    split: str
    classes: list[str]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None
    shard: NDArray[np.int64] | None = None

    has_files: ClassVar[bool] = False
    """Whether each sample is a file of its own, whose path `locate` returns."""

    @property
    @abstractmethod
    def place(self) -> str:
        """The folder or file that messages name."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The samples' names, each once."""

    def each_name(self) -> Iterator[str]:
        """Yield the samples' names, without a list of all where the source keeps none."""
        yield from self.names

    @property
    @abstractmethod
    def counted(self) -> str:
        """What was found, as text."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return an image's bytes. Raises DataError if there are none, RunError if it cannot be read."""

    def expect(  # noqa: B027 - local sources are there
        self,
        rows: NDArray[np.int64],
        of_machine: Callable[[], SharedReads] | None = None,
    ) -> None:
        """Announce the samples that are read next, in this order, so that remote ones can be prefetched.

        of_machine: returns the reads of all processes of this machine; None if this process reads alone. A
        later call replaces an earlier one. Raises UsageError if they cannot be prepared.
        """

    def stop(self) -> None:  # noqa: B027
        """End what `expect` began: until it is called again, reads may end with an error."""

    @abstractmethod
    def locate(self, index: int) -> str:
        """Return where a sample lies, for messages."""

    @abstractmethod
    def subset(self, kept: Sequence[int], split: str | None = None) -> Self:
        """Return the source with these samples alone, but with all its classes; `split`: its new name."""

    def _take(self, kept: Sequence[int], split: str | None, **columns: Any) -> Self:
        """Return the source with these samples' labels and weights, and with the subclass's columns."""
        rows = np.asarray(kept, np.int64)
        weights = None if self.weights is None else self.weights[rows]
        return dataclasses.replace(
            self, split=split or self.split, labels=self.labels[rows], weights=weights, **columns
        )

    def with_classes(self, classes: list[str]) -> Self:
        """Return the source with labels that are indices into `classes`, which has all of its own."""
        place = {name: i for i, name in enumerate(classes)}
        moved = np.array([place[name] for name in self.classes], np.int64)
        return dataclasses.replace(self, classes=classes, labels=moved[self.labels])

    @property
    @abstractmethod
    def report(self) -> Path:
        """The file to which `rsnet verify` writes what it finds."""

    @abstractmethod
    def stamps(self) -> dict[str, Stamp]:
        """Return the stamp of each sample by name, in order; a changed stamp reveals a changed image.
        Raises RunError.
        """

    def verify_command(self, report: Path | None = None) -> str:
        """Return the command line that finds all broken images. report: the file that it writes, if given."""
        words = ["rsnet", "verify", str(self.data)]
        return shlex.join(words if report is None else [*words, "--report", str(report)])

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the samples' names, in their order."""
        digest, separator = hashlib.sha256(), b""
        for name in self.each_name():
            digest.update(separator + os.fsencode(name))
            separator = b"\n"
        return digest.hexdigest()

    def read_or_explain(self, index: int) -> bytes:
        """Return an image's bytes; raises as `read`, with the image's place."""
        try:
            return self.read(index)
        except DataError as error:
            raise self.explain_failure([index], error, lambda *_: None) from None

    def explain_failure(
        self,
        indices: Sequence[int],
        error: Exception,
        reason_of: Callable[[str, bytes], str | None],
    ) -> DataError:
        """Return the error for samples that could not be decoded: it names the first that is broken.

        reason_of: returns what is wrong with an image's bytes, which lie at a place, if anything. error: what
        the decoder said of all of them. Raises RunError if one cannot be read.
        """
        self.expect(np.asarray(indices, np.int64))
        for index in indices:
            place = self.locate(index)
            try:
                reason = reason_of(place, self.read(index))
            except DataError as fault:
                reason = str(fault)
            if reason:
                what, advice = f"broken image {place}: {reason}", "repair it or remove it; "
                break
        else:
            places = first_names([self.locate(index) for index in indices])
            what, advice = f"cannot read one of {places}: {dali_error_line(error)}", ""
        return DataError(f"{what}; {advice}{self.verify_command()} finds all broken images")


def ordered_classes(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels, sorted; as numbers if all are."""
    names = set(labels)
    are_numbers = all(
        re.fullmatch("-?[0-9]{1,300}", name) and str(int(name)) == name for name in names
    )
    return sorted(names, key=int) if are_numbers else sorted(names)


def indices_of(labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the place of each label in `classes`."""
    place = {name: i for i, name in enumerate(classes)}
    return np.fromiter((place[label] for label in labels), np.int64, len(labels))


def count_text(images: int, classes: int) -> str:
    """Return the numbers of images and classes as text."""
    return f"{images} images of {classes} class{'es' if classes != 1 else ''}"


def dali_error_line(error: Exception) -> str:
    """Return the line of DALI's message that says what went wrong: the one after "encountered:"."""
    lines = str(error).partition("encountered:")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), first_line(error))
