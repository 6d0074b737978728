"""`python -m rsnet VERB`: what is to be done with networks and runs besides training."""

from __future__ import annotations

import sys

from pipelines.batch import Loaders, LoaderSpec
from pipelines.utils.cli import Verbs, verb_command
from rsnet.cli import bench, predict, sync, tune
from rsnet.cli import import_checkpoint as convert
from rsnet.cli import release as release_run
from rsnet.evaluation import compare
from rsnet.export import writer as export
from rsnet.serving import server as serve
from rsnet.training import add_resolution as calibrate


def _loaders(spec: LoaderSpec, train: bool) -> Loaders:
    """Of .beton files, if --data has them, else of an image folder."""
    if any(spec.data.glob("*.beton")):
        from pipelines import ffcv

        return ffcv.make_loaders(ffcv.FfcvOptions(), spec, train)
    from pipelines import dali

    return dali.make_loaders(dali.DaliOptions(), spec, train)


VERBS: Verbs = {
    "import": (convert.ImportOptions, convert.import_original, "a file of the original code"),
    "import-tf": (
        convert.ImportTensorFlowOptions,
        convert.import_tensorflow,
        "a checkpoint of the original quantized training code",
    ),
    "export": (export.Options, export.run, "a network for other programs, or the original code"),
    "report": (compare.ReportOptions, compare.report, "table and plot of finished runs"),
    "calibrate": (
        calibrate.Options,
        lambda options: calibrate.run(options, _loaders),
        "a resolution that was not trained",
    ),
    "release": (release_run.Options, release_run.run, "a folder to publish and to load from"),
    "predict": (predict.Options, predict.run, "what a release says of images"),
    "tune": (tune.Options, tune.run, "a cascade for an accuracy or a latency"),
    "bench": (bench.Options, bench.run, "what the sizes are worth on this device"),
    "serve": (serve.Options, serve.run, "a web page and JSON for a release"),
    "sync": (sync.Options, sync.run, "metrics that W&B lacks"),
}


def main(words: list[str]) -> int:
    return verb_command("rsnet", VERBS, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
