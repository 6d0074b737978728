"""docs/getting-started.md, as a new user walks it: from the installation to a release on a hub."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_server import TOKEN, USER, HubServer
from tests.helpers.packages import ROOT, uv

# A walk in a minute: smaller data and a narrower network.
SMALLER = {
    "python -m pipelines.demo": ["--train", "10", "--val", "2"],
    "rsnet train": [
        "--epochs", "1", "--warmup", "0", "--batch-size", "10", "--width-mult", "0.25", "--workers", "1",
        "--device", "cpu", "--wandb", "disabled",
    ],
    "rsnet predict": ["--device", "cpu"],
}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.stop()


def _commands() -> list[str]:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    section = page.partition("## From an installation to a published network")[2]
    return re.search(r"```sh\n(.*?)```", section, re.S).group(1).splitlines()


def _run(command: str, folder: Path, **environ: str) -> str:
    """Run a command where the package is installed in folder/site, and nothing of the checkout is seen."""
    words = shlex.split(command.replace("USER/", f"{USER}/"))
    more = next((w for start, w in SMALLER.items() if command.startswith(start)), [])
    site = folder / "site"
    path = os.pathsep.join(
        [str(site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    done = subprocess.run(
        [*words, *more], cwd=folder, capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"} | environ,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_walk_leads_to_a_release_on_the_hub_that_classifies(hub, tmp_path):
    environ = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    said = {}
    install, *commands = _commands()
    assert install == 'pip install ".[train,hub]"'
    # What it requires is in the environment of the tests.
    uv("pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(ROOT))
    for command in commands:
        if command != "hf auth login":  # HF_TOKEN stands for that
            said[command] = _run(command, tmp_path, **environ)
    files = next(reversed(hub.repositories[f"{USER}/shapes"].commits.values()))
    assert files["model.safetensors"] == (tmp_path / "release" / "model.safetensors").read_bytes()
    *_, pushed, fetched = said
    assert pushed.endswith("--push USER/shapes")
    rows = said[fetched].splitlines()[1:]
    assert len(rows) == 20
    assert all(row.split()[:2] == [row.split()[0], "48"] for row in rows)
    hub.stop()
    again = _run(fetched, tmp_path, **environ, HF_HUB_OFFLINE="1")
    names = [[line.split()[0], line.split()[3]] for line in again.splitlines()[1:]]
    assert names == [[row.split()[0], row.split()[3]] for row in rows]
