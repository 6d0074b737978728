"""The network of a run: the weights that it starts from, and how it is built and given them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from pipelines.utils.errors import UsageError, error_context
from rsnet.checkpoint.authors_pytorch import assumed_sizes
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights, require_finite, require_match
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig
from rsnet.config.topics import DEFAULT_ARCH
from rsnet.config.train_config import TrainConfig
from rsnet.distributed import process_group as distributed
from rsnet.loggers.run_context import RunContext
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.factory import (
    create_model,
    fuse_batchnorm,
    pretrained_normalize,
    synchronize_batchnorm,
)
from rsnet.models.shapes import check_sizes
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.fine_tune import read_switchable, start_from
from rsnet.training.resume import Start


def read_initial(
    config: TrainConfig, start: Start, say: Callable[[str], None]
) -> Checkpoint | None:
    """Return the RS-Net that the training starts from, if it is one and there is no checkpoint to resume."""
    source = config.pretrained or start.config.get("pretrained")
    if source is None or start.checkpoint is not None or config.evaluate:
        return None
    found = distributed.run_on_main(lambda: read_switchable(source, config.arch, config.sizes, say))
    if found is not None and found.assumes_sizes:
        say(assumed_sizes(source, found.network, is_start=True))
    return found


def normalized_as_pretrained(
    config: TrainConfig, start: Start, initial: Checkpoint | None, say: Callable[[str], None]
) -> TrainConfig:
    """Return `config` with the --normalize of an ordinary network's weights, if it starts from some."""
    source = config.pretrained or start.config.get("pretrained")
    if source is None or initial is not None or start.checkpoint is not None:
        return config
    arch = config.arch or start.config.get("arch", DEFAULT_ARCH)
    theirs = pretrained_normalize(arch, source)
    if config.normalize is None and theirs not in (None, "imagenet"):
        say(f"--pretrained: images are normalised as for these weights: --normalize {theirs}")
        return dataclasses.replace(config, normalize=theirs)
    if theirs != (config.normalize or "imagenet"):
        say(
            f"note: the weights of --pretrained expect images normalised by {theirs or 'other values'}, not "
            f"--normalize {config.normalize or 'imagenet'}"
        )
    return config


def build_network(
    config: ResolvedConfig,
    network: ModelConfig,
    start: Start,
    initial: Checkpoint | None,
    say: Callable[[str], None],
) -> ResolutionSwitchable:
    """Return the network of a run, on the CPU; with the weights of an ordinary one, if it starts from these.

    network: its description. initial: the RS-Net that it starts from. say: is told what is not as usual.

    Raises UsageError if the options do not fit it.
    """
    is_ordinary = start.checkpoint is None and initial is None
    pretrained = config.pretrained if is_ordinary else None
    model = create_model(network, pretrained, config.fixed_qa, say, drop_path=config.drop_path)
    if config.train_size_scale != 1 and not config.evaluate:
        option = f"--train-size-scale {config.train_size_scale}"
        check_sizes(model, config.arch, config.train_sizes, option)
    if config.sync_bn:
        synchronize_batchnorm(model, config.arch)
    if config.recompute != "off":
        count = convert_to_checkpointed(model.network, config.recompute)
        if count == 0 and not config.evaluate:
            raise UsageError(
                f"--recompute {config.recompute}: {config.arch} has no blocks that could be computed again; "
                "leave it out"
            )
    if config.fused_bn and not config.evaluate:
        say(fuse_batchnorm(model, config.arch))
    return model


def load_start(context: RunContext, start: Start, initial: Checkpoint | None) -> None:
    """Give the model the weights of the checkpoint to resume or evaluate, or those of --pretrained."""
    config, model, checkpoint = context.config, context.model, start.checkpoint
    if checkpoint is not None:
        training = not config.evaluate
        flag = "--resume: " if context.config.resume else ""
        with error_context(f"{flag}{start.source} does not fit"):
            require_match(checkpoint.network, context.network, training)
            weights = checkpoint.model if training else checkpoint.eval_weights
            if not training:
                require_finite(weights)
            load_weights(model, weights, checkpoint.network.sizes)
        if not checkpoint.network.classes:
            taken = "they are taken to be --data's, in their order"
            context.console.say(f"note: {start.source} does not name its classes: {taken}")
        if training:
            model.complete_alpha()
    elif initial is not None:
        source = str(config.pretrained)
        notes = distributed.run_on_all(lambda: start_from(model, context.network, initial, source))
        for line in notes:
            context.console.say(line)
    if checkpoint is None:
        _mark_trained(model, initial.network.sizes if initial else ())


def _mark_trained(model: ResolutionSwitchable, sizes: Collection[int]) -> None:
    """Count a batch for the BatchNorms of these sizes and none for others, as --size-schedule looks at that.

    The counters of weights to start from are another training's; releases have none.
    """
    for name, counter in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            counter.zero_()
    for norm in model.norms_of([size for size in model.sizes if size in sizes]):
        counter = norm.get_buffer("num_batches_tracked")
        counter.fill_(1)
