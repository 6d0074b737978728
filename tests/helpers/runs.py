"""Run directories of a tiny network, and the releases of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from pipelines.utils.cli import exit_code
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.release import package as release
from tests.helpers import releases

SIZES = [64, 48, 32]
NETWORK = releases.NETWORK | {
    "sizes": SIZES, "num_classes": 3, "classes": ["ant", "bee", "cat"],
}  # fmt: skip


def trained(network: dict, seed: int) -> dict[str, torch.Tensor]:
    """A state dict in which no two BatchNorms, and no two networks, are alike; channels-last."""
    torch.manual_seed(seed)
    model = create_model(ModelConfig.from_dict(network))
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.uniform_(0.5, 1.5)
            norm.num_batches_tracked += 7
        model.alpha.uniform_(-1, 1)
    return model.to(memory_format=torch.channels_last).state_dict()


def write_run(path: Path, network: dict = NETWORK, **content: object) -> Path:
    """A run directory whose best checkpoint is of epoch 2; three epochs were evaluated."""
    checkpoint.save(
        path / "checkpoints" / "best.pt",
        Checkpoint(ModelConfig.from_dict(network), trained(network, 1), epoch=2, **content),
    )
    lines = [{"step": 5, "epoch": 2.0, "train/total": 1.0}]
    for epoch in (1, 2, 3):
        names = [*map(str, network["sizes"]), "ensemble"]
        top1 = {f"val/top1@{name}": 10.0 * epoch + i for i, name in enumerate(names)}
        top5 = {f"val/top5@{name}": 50.0 + epoch + i for i, name in enumerate(names)}
        lines.append({"step": 5 * epoch, "epoch": epoch, **top1, **top5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"step": 2')  # cut short by a crash
    return path


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def rewrite_weights(folder: Path, data: bytes) -> None:
    """Other weights, of which config.json has the size and the hash."""
    (folder / "model.safetensors").write_bytes(data)
    config = read_config(folder)
    config["weights"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path, capsys) -> tuple[int, str]:
    """Exit code and the only line on stderr."""
    code = exit_code("x", lambda: len(release.load(folder).sizes))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 1500
    return code, err


def reference(found: Checkpoint) -> nn.Module:
    """The network of a checkpoint, with the weights that are released."""
    model = create_model(found.network)
    model.load_state_dict(found.eval_weights, strict=True)
    return model.eval()


def assert_same_logits(model: nn.Module, expected: nn.Module, sizes=SIZES) -> None:
    with torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, size, size)
            assert torch.equal(model(images), expected(images, size))
