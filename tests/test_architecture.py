"""Which room may import which: read from the source, so that no import is overlooked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "pipelines").rglob("*.py"), *(ROOT / "rsnet").rglob("*.py")]
)
ANYONE = {
    "pipelines.batch",
    "pipelines.cli",
    "pipelines.errors",
    "pipelines.files",
    "pipelines.folder",
    "pipelines.parallel",
    "pipelines.picture",
    "pipelines.progress",
}
# What of the project a module of rsnet may import. Those not named are free, as run and session are.
ARROWS = {
    "rsnet.config": {"pipelines.errors", "rsnet.recipes", "rsnet.rules"},
    "rsnet.bits": set(),
    "rsnet.rules": {"rsnet.bits", "rsnet.config"},  # the latter for its type checker
    "rsnet.recipes": set(),
    "rsnet.resolve": {"rsnet.bits", "pipelines.errors", "rsnet.config", "rsnet.recipes"},
    "rsnet.bases": {"rsnet.distributed", "rsnet.models.quantize", "rsnet.models.switchable"},
    "rsnet.pack": {"rsnet.models.quantize"},
    "rsnet.ema": {"rsnet.models.switchable"},
    "rsnet.mixing": {"pipelines.batch"},
    "rsnet.fit": set(),
    "rsnet.original": ANYONE | {"rsnet.config", "rsnet.fit", "rsnet.models.zoo", "rsnet.resolve"},
    "rsnet.original_tf": ANYONE
    | {
        "rsnet.bits",
        "rsnet.bases",
        "rsnet.fit",
        "rsnet.models.preact",
        "rsnet.models.quantize",
        "rsnet.models.zoo",
        "rsnet.resolve",
    },
    "rsnet.tensorflow_file": {"pipelines.errors"},
    "rsnet.compare": ANYONE | {"rsnet.metrics"},
    "rsnet.cli": {"pipelines.cli", "rsnet.config"},
    "rsnet.losses": set(),
    "rsnet.optim": set(),
    "rsnet.distributed": {"pipelines.errors", "rsnet.rendezvous"},
    "rsnet.rendezvous": {"pipelines.errors"},
    "rsnet.objective": {"rsnet.losses", "rsnet.models.switchable"},
    "rsnet.metrics": {"rsnet.distributed", "rsnet.losses"},
    "rsnet.engine": ANYONE
    | {
        "rsnet.bases",
        "rsnet.ema",
        "rsnet.fold",
        "rsnet.forward",
        "rsnet.metrics",
        "rsnet.optim",
        "rsnet.statistics",
        "rsnet.models.switchable",
    },
    "rsnet.checkpoint": ANYONE
    | {
        "rsnet.bits",
        "rsnet.models.quantize",
        "rsnet.models.switchable",
        "rsnet.original",
        "rsnet.resolve",
        "rsnet.torch_file",
    },
    "rsnet.runlog": {"pipelines.errors", "pipelines.files"},
    "rsnet.torch_file": {"pipelines.errors"},
    "rsnet.store": {"pipelines.errors", "pipelines.files", "rsnet.checkpoint"},
    "rsnet.signals": set(),
    "rsnet.profile": ANYONE | {"rsnet.engine", "rsnet.models.switchable"},
    "rsnet.profile_report": {"rsnet.profile", "rsnet.resolve"},
    "rsnet.profile_sweep": {
        "pipelines.errors",
        "rsnet.profile",
        "rsnet.profile_report",
        "rsnet.resolve",
    },
    "rsnet.statistics": set(),
    "rsnet.watchdog": {"pipelines.errors", "rsnet.rendezvous"},
    "rsnet.state": {
        "pipelines.errors",
        "rsnet.checkpoint",
        "rsnet.distributed",
        "rsnet.engine",
        "rsnet.models.switchable",
        "rsnet.optim",
    },
    "rsnet.resume": ANYONE
    | {"rsnet.bits", "rsnet.checkpoint", "rsnet.config", "rsnet.resolve", "rsnet.store"},
    "rsnet.sync": ANYONE | {"rsnet.report", "rsnet.wandb_log", "rsnet.wandb_service"},
    "rsnet.wandb_log": {"pipelines.errors", "pipelines.files", "rsnet.wandb_service"},
    "rsnet.wandb_service": {"pipelines.errors"},
    "rsnet.report": {"rsnet.metrics"},
    "rsnet.models.switchable": {"rsnet.models.once", "rsnet.models.quantize"},
    "rsnet.models.once": set(),
    "rsnet.models.quantize": {"rsnet.bits", "rsnet.models.levels"},
    "rsnet.models.levels": {"rsnet.models.levels_cpu"},
    "rsnet.models.levels_cpu": set(),
    "rsnet.models.preact": {"rsnet.models.quantize"},
    "rsnet.models.same": set(),
    "rsnet.release": {
        "rsnet.bits",
        "pipelines.errors",
        "pipelines.files",
        "rsnet",
        "rsnet.fit",
        "rsnet.models.quantize",
        "rsnet.models.switchable",
        "rsnet.models.zoo",
        "rsnet.pack",
        "rsnet.release_card",
        "rsnet.release_config",
    },
    "rsnet.release_card": {"pipelines.errors"},
    "rsnet.release_config": {
        "rsnet.bits",
        "pipelines.batch",
        "pipelines.errors",
        "rsnet.metrics",
        "rsnet.models.zoo",
    },
    "rsnet.release_run": {
        "rsnet.bits",
        "pipelines.errors",
        "rsnet.checkpoint",
        "rsnet.models.quantize",
        "rsnet.models.zoo",
        "rsnet.release",
        "rsnet.release_config",
        "rsnet.report",
        "rsnet.resolve",
    },
    "rsnet.cascade": {"rsnet.pictures"},
    "rsnet.runtime": {
        "pipelines.batch",
        "pipelines.errors",
        "rsnet.cascade",
        "rsnet.forward",
        "rsnet.latency",
        "rsnet.pictures",
        "rsnet.release",
        "rsnet.tuned",
    },
    "rsnet.tuned": {"pipelines.errors", "pipelines.files", "rsnet.cascade"},
    "rsnet.scores": ANYONE | {"rsnet.pictures", "rsnet.runtime"},
    "rsnet.temperature": set(),
    "rsnet.thresholds": {"rsnet.cascade", "rsnet.scores"},
    "rsnet.memory": set(),
    "rsnet.bench": {
        "pipelines.errors",
        "pipelines.files",
        "rsnet.bench_figures",
        "rsnet.bench_report",
        "rsnet.release",
        "rsnet.release_card",
        "rsnet.runtime",
        "rsnet.scores",
        "rsnet.wandb_log",
    },
    "rsnet.bench_figures": {
        "pipelines.errors",
        "rsnet.cascade",
        "rsnet.latency",
        "rsnet.memory",
        "rsnet.runtime",
        "rsnet.scores",
        "rsnet.temperature",
        "rsnet.thresholds",
        "rsnet.tuned",
    },
    "rsnet.bench_report": {"rsnet.bench_figures"},
    "rsnet.tune": {
        "pipelines.errors",
        "rsnet.cascade",
        "rsnet.runtime",
        "rsnet.scores",
        "rsnet.temperature",
        "rsnet.thresholds",
        "rsnet.tuned",
    },
    "rsnet.forward": {
        "pipelines.errors",
        "rsnet.fold",
        "rsnet.graphs",
        "rsnet.models.switchable",
    },
    "rsnet.fold": {"pipelines.errors", "rsnet.models.quantize", "rsnet.models.switchable"},
    "rsnet.graphs": set(),
    "rsnet.traced": {"rsnet.fold", "rsnet.models.quantize", "rsnet.models.switchable"},
    "rsnet.onnx_file": {"pipelines.errors", "pipelines.files", "rsnet"},
    "rsnet.program_file": set(),
    "rsnet.export": {
        "pipelines.errors",
        "pipelines.files",
        "rsnet.convert",
        "rsnet.models.switchable",
        "rsnet.onnx_file",
        "rsnet.program_file",
        "rsnet.release",
        "rsnet.traced",
    },
    "rsnet.pictures": {"pipelines.batch", "pipelines.errors", "pipelines.picture"},
    "rsnet.latency": {"pipelines.errors", "pipelines.files"},
    "rsnet.predict": {
        "pipelines.cli",
        "pipelines.errors",
        "pipelines.picture",
        "pipelines.progress",
        "rsnet.runtime",
    },
    "rsnet.deadline": set(),
    "rsnet.serve": {
        "pipelines.errors",
        "rsnet.deadline",
        "rsnet.latency",
        "rsnet.runtime",
        "rsnet.server.app",
        "rsnet.server.protocol",
        "rsnet.server.service",
        "rsnet.server.upload",
    },
    "rsnet.server.app": {"rsnet.cascade", "rsnet.server.service"},
    "rsnet.server.service": {
        "pipelines.errors",
        "rsnet.cascade",
        "rsnet.deadline",
        "rsnet.runtime",
        "rsnet.server.batches",
        "rsnet.server.upload",
    },
    "rsnet.server.batches": {"pipelines.errors", "rsnet.cascade"},
    "rsnet.server.upload": {"pipelines.batch", "pipelines.errors", "rsnet.pictures"},
    "rsnet.server.protocol": set(),
    "rsnet.models.single_pixel": set(),
    "rsnet.models.pointwise": set(),
    "rsnet.models.depthwise": {"rsnet.models.single_pixel"},
    "rsnet.models.recompute": {
        "rsnet.models.once",
        "rsnet.models.quantize",
        "rsnet.models.switchable",
    },
    "rsnet.models.stem": set(),
    "rsnet.models.activations": set(),
    "rsnet.models.resnet": set(),
    "rsnet.models.grow": set(),
    "rsnet.models.blurpool": {"rsnet.models.single_pixel"},
    "rsnet.models.pretrained": {"pipelines.errors", "rsnet.fit", "rsnet.torch_file"},
    "rsnet.models.zoo": {
        "rsnet.bits",
        "pipelines.errors",
        *(
            f"rsnet.models.{name}"
            for name in (
                "activations",
                "blurpool",
                "depthwise",
                "pointwise",
                "preact",
                "pretrained",
                "quantize",
                "resnet",
                "same",
                "single_pixel",
                "stem",
                "switchable",
            )
        ),
    },
}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """Absolute names of the imported modules; `from package import module` as package.module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            base = node.module or ""
            for alias in node.names:
                inner = ROOT / base.replace(".", "/") / f"{alias.name}.py"
                found.add(f"{base}.{alias.name}" if inner.exists() else base)
    return found


def _ours(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] in ("pipelines", "rsnet")}


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_pipelines_know_no_model(path):
    if _module(path).startswith("pipelines"):
        assert not {name for name in _imports(path) if name.split(".")[0] == "rsnet"}


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_rsnet_knows_no_backend(path):
    if _module(path).startswith("rsnet") and _module(path) != "rsnet.__main__":
        assert {name for name in _ours(path) if name.startswith("pipelines")} <= ANYONE


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_only_what_it_may(name):
    (path,) = (p for p in SOURCES if _module(p) == name)
    assert _ours(path) <= ARROWS[name]


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("nvidia", {"pipelines.dali_graph"}),
        ("ffcv", {"pipelines.turbojpeg", "pipelines.beton_file", "pipelines.ffcv_decode"}),
        ("numba", {"pipelines.resample", "pipelines.ffcv_decode", "rsnet.models.levels_cpu"}),
        ("safetensors", {"rsnet.models.pretrained", "rsnet.release"}),
        ("wandb", {"rsnet.wandb_log", "rsnet.wandb_service"}),
        ("tensorflow", {"rsnet.tensorflow_file"}),
        ("fastapi", {"rsnet.serve", *(f"rsnet.server.{n}" for n in ("app", "service", "upload"))}),
        ("uvicorn", {"rsnet.serve", "rsnet.server.protocol"}),
        *((name, {"rsnet.onnx_file"}) for name in ("onnx", "onnxruntime", "onnxscript")),
        ("timm", {"rsnet.models.zoo", "rsnet.models.pretrained"}),
        (
            "tyro",
            {
                f"rsnet.{name}"
                for name in (
                    "bench",
                    "calibrate",
                    "cli",
                    "compare",
                    "config",
                    "convert",
                    "export",
                    "predict",
                    "release_run",
                    "serve",
                    "sync",
                    "tune",
                )
            }
            | {f"pipelines.{name}" for name in ("beton", "cli", "dali_graph", "ffcv", "verify")},
        ),
    ],
)
def test_a_library_is_imported_in_its_own_rooms_only(library, rooms):
    found = {_module(p) for p in SOURCES if any(n.split(".")[0] == library for n in _imports(p))}
    assert found <= rooms


def test_environment_variables_of_torchrun_are_read_in_one_place():
    readers = {
        _module(p)
        for p in SOURCES
        if any(f'"{v}"' in p.read_text() for v in ("RANK", "WORLD_SIZE"))
    }
    assert readers == {"rsnet.distributed"}


def test_there_is_one_backward():
    calls = [p for p in SOURCES for line in p.read_text().splitlines() if ".backward(" in line]
    assert [_module(p) for p in calls] == ["rsnet.engine"]


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=_module)
def test_entry_scripts_only_compose(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 40
    assert _ours(path) <= {"pipelines.dali", "pipelines.ffcv", "rsnet.run"}
    assert not any(
        isinstance(node, ast.For | ast.While | ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(ast.parse(source))
    )
