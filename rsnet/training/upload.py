"""The upload of a run to object storage, where --output names some: begun, fed and waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.utils.errors import RunError, UsageError, error_context
from rsnet.checkpoint.remote import RemoteRun
from rsnet.checkpoint.uploader import Uploader
from rsnet.distributed import process_group as distributed
from rsnet.loggers.run_context import RunContext
from rsnet.training.signals import TrainingInterrupted

LONGEST_WAIT = 300.0  # seconds at the end of a run; half of --timeout if that is less


def make_uploader(context: RunContext, continues: bool) -> Uploader | None:
    """Return what will upload the run, on rank 0; None elsewhere, and of a run that is not uploaded.

    Raises UsageError on all ranks if there is no access, or the URL holds a run that is not continued;
    RunError if the storage does not answer.
    """
    config = context.config
    if config.url is None:
        return None
    url, made = config.url, []

    def make() -> None:
        with error_context("--output"):
            remote = RemoteRun(url)
            if not continues and remote.checkpoints():
                raise UsageError(
                    f"{url} holds a run already; continue it with --resume auto, or give another URL"
                )
            made.append(Uploader(remote, config.folder, config.keep, context.console.say))

    distributed.run_on_main(make)
    return made[0] if made else None


def start_upload(uploader: Uploader | None, context: RunContext) -> None:
    """Take over the URL, once all that may refuse the training has accepted it. Raises as `make_uploader`."""

    def start() -> None:
        with error_context("--output"):
            if uploader is not None:
                uploader.start()

    if context.config.url is not None:
        distributed.run_on_main(start)


def upload(uploader: Uploader | None, context: RunContext, epoch: int, done: int) -> None:
    """Let the checkpoint that was just saved be uploaded, which all ranks call together.

    Raises RunError if that has failed for long and --on-save-error is stop.
    """
    if context.config.url is None:
        return
    problem = distributed.run_on_main(lambda: uploader.add(epoch, done) if uploader else "")
    if problem and context.config.on_save_error == "stop":
        raise RunError(
            f"{problem}; {context.config.folder} has all: run the same command once that is fixed, or train "
            "on with --on-save-error continue"
        )


@contextmanager
def waited_for(uploader: Uploader | None, context: RunContext) -> Iterator[None]:
    """Upload what is left at the end of the block, however it ends.

    Raises RunError if the block ends well and that does not; else it is said.
    """
    if uploader is None:
        yield
        return
    seconds = min(LONGEST_WAIT, context.config.timeout / 2)
    way_out = f"{context.config.folder} has all: run the same command to upload it"
    try:
        yield
    except (Exception, TrainingInterrupted, KeyboardInterrupt):
        if problem := uploader.close(seconds):
            context.console.say(f"{problem}; {way_out}")
        raise
    if problem := uploader.close(seconds):
        raise RunError(f"{problem}; {way_out}")
