"""The network that --teacher names: opened, identified by its weights, and matched to what is trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.normalize import MEAN_STD
from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from pipelines.utils.location import url_of
from pipelines.utils.text import distinct, first_names
from rsnet.checkpoint import tf_checkpoint
from rsnet.checkpoint.checkpoint import Checkpoint, State
from rsnet.checkpoint.weights import require_finite
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig
from rsnet.config.train_config import TrainConfig
from rsnet.distributed import process_group as distributed
from rsnet.evaluation.class_names import are_imagenets, are_wordnet_ids
from rsnet.losses import ENSEMBLE, LossName
from rsnet.models.autocast import AMP_DTYPES
from rsnet.models.pretrained import MeanStd
from rsnet.models.published import Published, find
from rsnet.models.state_dict import state_digest
from rsnet.models.teacher import Teacher
from rsnet.release import hub
from rsnet.release.source import SavedNetwork, open_source
from rsnet.training.fine_tune import holds_switchable

NONE = "none"
PIN = "@sha256:"  # between what is given and the first digits of the SHA-256 of its weights
DIGITS = 16


@dataclass(frozen=True)
class TeacherSource:
    """What --teacher names, as rank 0 has read it: enough to build it on any rank.

    words: what it is, for a line. classes: the names of its first outputs; none if they are not known.
    loss: by which it was trained, as far as that is known.
    """

    words: str
    network: SavedNetwork | Published
    state: State
    sizes: tuple[int, ...]
    mean_std: MeanStd
    num_classes: int
    classes: tuple[str, ...] = ()
    loss: LossName = "ce"

    @property
    def digest(self) -> str:
        """The first digits of the SHA-256 of the weights, which do not depend on the file that holds them."""
        return state_digest(self.state)[:DIGITS]

    def build(self) -> nn.Module:
        """Build the network with its weights, on the CPU, in eval mode."""
        if isinstance(self.network, SavedNetwork):
            return self.network.build(self.sizes)
        return self.network.load(self.state, self.num_classes).eval()


def read_teacher(
    given: TrainConfig, previous: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[TrainConfig, TeacherSource | None]:
    """Return the options with the teacher's identity and size in them, and the teacher, if there is one.

    previous: the options of the run that is continued, whose teacher goes on if none is given. All ranks
    call it; rank 0 reads, or downloads. say: is told what is taken.

    Raises UsageError or DataError if there is no such teacher, its weights are not those that the run had,
    or it has no such size.
    """
    before = previous.get("teacher") or NONE
    argument = given.teacher or before
    if given.evaluate:
        return given, None
    if argument == NONE:
        for name in ("size", "weight", "temperature"):
            # A recorded command says none, and has values for these, too.
            if given.teacher is None and getattr(given, f"teacher_{name}") is not None:
                raise UsageError(f"--teacher-{name}: there is no teacher; give one by --teacher")
        return given, None
    is_same = argument.partition(PIN)[0] == before.partition(PIN)[0]
    size = given.teacher_size or (previous.get("teacher_size") if is_same else None)
    found, pinned = distributed.run_on_main(lambda: _open(argument, size))
    size = ENSEMBLE if len(found.sizes) > 1 else str(found.sizes[0])
    say(f"--teacher: {found.words}, at {size}, SHA-256 {pinned.partition(PIN)[2]}")
    if given.teacher is not None:
        given = dataclasses.replace(given, teacher=pinned, teacher_size=size)
    return given, found


def make_teacher(
    source: TeacherSource | None,
    config: ResolvedConfig,
    network: ModelConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> Teacher | None:
    """Build the teacher of a run, if it has one, on its device, in its precision. All ranks call it.

    network: the description of the one that is trained.

    Raises UsageError if the teacher has other classes, or does not work at its size.
    """
    if source is None:
        return None
    teacher = distributed.run_on_all(lambda: _make(source, config, network, say))
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    teacher.cast(AMP_DTYPES[config.amp])
    return teacher


def _make(
    source: TeacherSource,
    config: ResolvedConfig,
    network: ModelConfig,
    say: Callable[[str], None],
) -> Teacher:
    name = config.teacher.partition(PIN)[0]
    outputs, note = outputs_for(source, network.classes, network.num_classes, name)
    if note:
        say(note)
    images = config.train_sizes + extra_sizes(source, config.train_sizes)
    built = source.build()
    try:
        teacher = Teacher(built, source.sizes, images)
    except Exception as error:  # libraries raise what they like
        raise UsageError(
            f"--teacher-size {config.teacher_size}: {name} does not work at it ({first_line(error)})"
        ) from error
    teacher.loss = source.loss
    if config.loss == "bce":
        what = "sigmoids" if source.loss == "bce" else "a softmax"
        say(f"--loss bce: the logits of --teacher {name} are taken for those of {what}")
    teacher.renormalize(MEAN_STD[config.normalize], source.mean_std)
    if outputs != list(range(network.num_classes)):
        teacher.outputs = torch.tensor(outputs)
    return teacher


def extra_sizes(source: TeacherSource | None, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes at which the loader has to make images for the teacher alone."""
    return () if source is None else tuple(s for s in source.sizes if s not in sizes)


def outputs_for(
    source: TeacherSource, classes: Sequence[str], num_classes: int, name: str
) -> tuple[list[int], str]:
    """Return the teacher's output for each of the outputs that are trained, and a note if that is a guess.

    classes: the names of the data's, of the first outputs. name: the teacher's, for messages.

    Raises UsageError if the classes are others.
    """
    known, theirs = list(source.classes), source.num_classes
    if theirs != num_classes:
        raise UsageError(
            f"--teacher {name} has {theirs} classes, and the network that is trained {num_classes}; train "
            "the teacher on these classes first (--arch NAME --pretrained default), and give its run"
        )
    if not known and are_wordnet_ids(classes) and not are_imagenets(classes):
        raise UsageError(
            f"--teacher {name} does not name its {theirs} classes, and those of --data are not ImageNet's"
        )
    in_order = list(range(num_classes))
    if not known:
        return _unnamed(source, classes, in_order, name)
    if lacking := sorted(set(classes) ^ set(known)):
        raise UsageError(
            f"--teacher {name} has other classes than --data: {first_names(list(map(distinct, lacking)))}"
        )
    place = {c: i for i, c in enumerate(known)}
    return [place[c] for c in classes] + in_order[len(classes) :], ""


def _unnamed(
    source: TeacherSource, classes: Sequence[str], in_order: list[int], name: str
) -> tuple[list[int], str]:
    """Return what `outputs_for` does of a teacher that does not name its classes."""
    numbers = [int(c) if re.fullmatch("[0-9]{1,7}", c) else -1 for c in classes]
    outputs, taken = in_order, "they are taken to be --data's, in their order"
    if sorted(numbers) == in_order:
        outputs, taken = numbers, "the folders' names are taken for the numbers of its outputs"
    is_ours = isinstance(source.network, SavedNetwork)
    if are_wordnet_ids(classes):
        if not is_ours:  # a library's thousand are ImageNet's
            return outputs, ""
        taken = "they are taken to be ImageNet's, in the order of their WordNet ids"
    if is_ours:
        taken += f"; its accuracy shows whether they are: rsnet evaluate {name} --data DATA"
    return outputs, f"note: --teacher {name} does not name its classes: {taken}"


def _open(argument: str, size: str | None) -> tuple[TeacherSource, str]:
    """Return the teacher, and what names it with its weights."""
    name, _, wanted = argument.partition(PIN)
    path = Path(name)
    looks_so = path.suffix in (".pt", ".pth", ".tar") or name.startswith((".", "/"))
    has_file = ":" in name  # NAME:FILE
    with error_context(f"--teacher {name}"):
        is_address = hub.is_address(name) or url_of(name) is not None
        is_ours = is_address or path.exists() or tf_checkpoint.is_tf_checkpoint(path)
        found = _switchable(name, size) if is_ours or (looks_so and not has_file) else None
    if found is None:
        found = _published(name, size)
    with error_context(f"--teacher {name}"):
        require_finite(found.state)
        digest = found.digest
        if not digest.startswith(wanted[:DIGITS]):
            raise UsageError(
                f"its weights are not those that are asked for: their SHA-256 begins with {digest}, not "
                f"{wanted}"
            )
    return found, name + PIN + digest


def _switchable(name: str, size: str | None) -> TeacherSource:
    try:
        source = open_source(name)
    except DataError as error:
        if not Path(name).is_file():
            raise
        raise DataError(
            f"{error}; if these are an ordinary network's weights, give NAME:{name}"
        ) from error
    network = source.network
    if size == ENSEMBLE and len(network.sizes) == 1:
        size = None
    if size not in (None, ENSEMBLE, *map(str, network.sizes)):
        known = " ".join(map(str, network.sizes))
        raise UsageError(f"--teacher-size {size}: it has {known}")
    sizes = network.sizes if size == ENSEMBLE else (int(size or network.sizes[0]),)
    state = source.checkpoint.eval_weights
    return TeacherSource(
        source.lines()[0],
        dataclasses.replace(source, checkpoint=Checkpoint(network, state)),
        state,
        sizes,
        MEAN_STD[network.normalize],
        network.num_classes,
        network.classes,
        source.checkpoint.loss,
    )


def _published(name: str, size: str | None) -> TeacherSource:
    network = find(name, "--teacher")
    try:
        state, classes = network.read("--teacher")
    except (UsageError, DataError) as error:
        file = Path(name.partition(":")[2])
        if file.is_file() and holds_switchable(file):
            raise UsageError(f"--teacher {name}: it holds an RS-Net; give {file} alone") from error
        raise
    if size == ENSEMBLE:
        raise UsageError(f"--teacher-size ensemble: {name} has one size; give it in pixels")
    words = f"{network.library}'s {network.name}, weights {network.weights}"
    sizes = (int(size or network.size),)
    return TeacherSource(words, network, state, sizes, network.mean_std, classes, loss=network.loss)
