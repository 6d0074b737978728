"""Two processes by torchrun, over gloo: the same samples, the same weights, exact evaluation."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipelines.utils.errors import RunError, UsageError
from rsnet.distributed import process_group
from tests.helpers import faults, processes

ROOT = processes.ROOT
# A run, and what it leaves: a thread of gloo may abort a Python that is ending.
RUN = """
import sys
from glob import glob
from pathlib import Path
from pipelines.dali import DaliOptions, make_loaders
from rsnet.train import main
code = main("train_dali.py", DaliOptions, make_loaders)
threads = [Path(path).read_text().strip() for path in glob("/proc/self/task/*/comm")]
assert not [name for name in threads if "gloo" in name], threads
sys.exit(code)
"""


@pytest.mark.slow  # half a minute; .ci/run has it
def test_two_processes_train_and_evaluate_every_image_once(photos, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)

    words = ["--data", photos, "--sizes", "32", "24", "16", "--workers", "1", "--amp", "off"]
    words += ["--arch", "parallel_resnet10", "--width-mult", "0.25", "--epochs", "1"]
    words += ["--wandb", "disabled"]
    two, evaluated = tmp_path / "two", tmp_path / "evaluated"
    # Sizes that sit out a step have no gradients to reduce; averaged weights are what is evaluated.
    # Quantizers' bases follow what both ranks see.
    options = ["--sizes-per-step", "2", "--ema", "0.5", "--recompute", "blocks", "--mode", "preact"]
    options += ["--qw", "2", "--qa", "2", "--checkpoint-every", "1", "--keep", "9", "-b", "4"]
    command = [sys.executable, script, *words, *options, "--output", two]
    done = processes.run(faults.torchrun(2, [*map(str, command)]), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("global batch") == 1  # only one rank speaks
    metrics = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [2, 2]
    # 17 validation images: counted once, accuracies are multiples of 1/17.
    for name in ("32", "24", "16", "ensemble"):
        hits = metrics[-1][f"val/top1@{name}"] * 17 / 100
        assert abs(hits - round(hits)) < 1e-6
    # What was logged is what the saved file gives: statistics are rank 0's on all ranks.
    last = two / "checkpoints" / "last.pt"
    evaluate = ["--evaluate", "--resume", last, "-b", "8", "--output", evaluated]
    done = processes.run([sys.executable, ROOT / "train_dali.py", *words, *evaluate])
    assert done.returncode == 0, done.stderr
    results = json.loads((evaluated / "evaluation.json").read_text())
    for name in ("32", "24", "16", "ensemble"):
        assert abs(results[name]["loss"] - metrics[-1][f"val/loss@{name}"]) < 1e-3
    config = json.loads((two / "config.json").read_text())
    assert abs(config["lr"] - 0.1 * 8 / 256) < 1e-12
    content = torch.load(last, weights_only=True)
    assert not any(key.startswith("module.") for key in content["model"])
    *_, earliest = sorted((two / "checkpoints").glob("last-*.pt"))  # after the first update
    content = torch.load(earliest, weights_only=True)
    first, second = (rank["buffers"] for rank in content["ranks"])
    matrices = [i for i, buffer in enumerate(first) if buffer.ndim == 2]  # BatchNorm has none
    assert len(matrices) > 60
    assert all(torch.equal(first[i], second[i]) for i in matrices)
    assert not all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("kinds", "line"),
    [
        (["cuda", "cuda", "cuda"], None),
        (["cuda", "cuda", "cpu"], "rank 2 (on {host}) computes on cpu, rank 0 (on {host}) on cuda"),
        (["cpu", "cuda", "cpu"], "rank 1 (on {host}) computes on cuda, rank 0 (on {host}) on cpu"),
    ],
)
def test_ranks_with_and_without_a_gpu_end_at_once(kinds, line):
    """Gloo and NCCL would wait for each other."""
    store = torch.distributed.HashStore()

    def join(rank: int) -> str | None:
        try:
            process_group._require_same_device(store, rank, len(kinds), kinds[rank])
        except UsageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(kinds)) as threads:
        found = list(threads.map(join, range(len(kinds))))
    if line is None:
        assert found == [None] * len(kinds)
    else:
        assert len({*found}) == 1
        assert f"--device: {line.format(host=socket.gethostname())}: " in found[0]


VARIABLES = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def start(monkeypatch):
    """Join a process group with these variables instead of torchrun's; None for one that is not set."""

    def call(**changes: str | None) -> None:
        for name, value in (VARIABLES | changes).items():
            monkeypatch.setenv(name, value or "") if value else monkeypatch.delenv(name, False)
        process_group.setup("cpu", 0.25)

    yield call
    process_group.shutdown()


@pytest.fixture
def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"GROUP_RANK": "3", "SLURM_NODEID": "5"}, "3"),
        ({"SLURM_NODEID": "5"}, "5"),
        ({}, "a host"),
    ],
)
def test_a_node_is_torchruns_or_slurms_or_a_host(start, free_port, monkeypatch, variables, name):
    """The ranks of a node need not follow each other: Slurm can deal them out."""
    names: list[str] = []

    def gather(own: str) -> list[str]:
        names.append(own)
        return [own, "another", own, "a third"]

    for variable in ("GROUP_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(variable, False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "a host")
    monkeypatch.setattr(process_group, "all_gather_object", gather)
    assert process_group.node_of_rank() == (0,)
    start(MASTER_PORT=free_port)
    assert names == [name]
    assert process_group.node_of_rank() == (0, 1, 0, 2)
    process_group.shutdown()
    assert process_group.node_of_rank() == (0,)


@pytest.mark.parametrize(("backend", "code"), [("nccl", 0), ("gloo", 1), ("nccl", 2)])
def test_after_an_error_the_processs_end_is_nccls(start, free_port, monkeypatch, backend, code):
    """To leave, NCCL waits until all ranks have come, who wait for this one's gradients."""
    at_exit, destroyed, ended = [], [], []
    start(MASTER_PORT=free_port)
    with monkeypatch.context() as patch:
        patch.setattr(process_group.dist, "get_backend", lambda: backend)
        patch.setattr(process_group.dist, "destroy_process_group", lambda: destroyed.append(True))
        patch.setattr(process_group.atexit, "register", lambda *call: at_exit.append(call))
        patch.setattr(process_group.os, "_exit", ended.append)
        process_group.shutdown(code)
        assert bool(destroyed) != bool(at_exit)
        for function, *given in at_exit:
            function(*given)
    assert ended == ([code] if backend == "nccl" and code else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "RANK is not set, although WORLD_SIZE is"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": None}, "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0: a number from 1 to "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE two: a number from 1 to "),
        ({"RANK": "1"}, "RANK 1: a number from 0 to 0 is needed"),
        ({"RANK": "-1"}, "RANK -1: a number from 0 to 0 is needed"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK x: a number from 0 to "),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT 70000: a number from 1 to 65535 is needed"),
        ({"MASTER_PORT": "1e3"}, "MASTER_PORT 1e3: a number from 1 to 65535 is needed"),
        ({"MASTER_ADDR": "a..b"}, r"MASTER_ADDR a\.\.b: no name of a host"),
    ],
)
def test_a_variable_of_torchrun_that_is_missing_or_wrong_is_named(start, changes, message):
    with pytest.raises(UsageError, match=message):
        start(**changes)


def test_a_host_that_nobody_knows_is_named(start, monkeypatch):
    def getaddrinfo(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(UsageError, match=r"MASTER_ADDR 127\.0\.0\.1: Name or service not known"):
        start()


def test_a_port_that_is_taken_is_named(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"MASTER_PORT {port}: Address already in use; give"):
            start(MASTER_PORT=str(port))


def test_a_first_process_that_is_not_there_is_said(start, free_port):
    match = f"nothing answers at MASTER_ADDR 127.0.0.1, MASTER_PORT {free_port} .*RANK 0 run there"
    with pytest.raises(RunError, match=match):
        start(RANK="1", WORLD_SIZE="2", MASTER_PORT=free_port)


def test_a_network_that_is_not_there_is_said(start, free_port, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(RunError, match="rank 0 cannot connect to the other processes: "):
        start(MASTER_PORT=free_port)


def test_one_process_with_all_variables_starts(start, free_port):
    start(MASTER_PORT=free_port)
    assert (process_group.rank(), process_group.world_size()) == (0, 1)


def test_a_process_that_is_shown_its_own_gpu_alone_takes_it_without_a_local_rank(monkeypatch):
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UsageError, match=r"process 3 has no GPU .*; .* or leave LOCAL_RANK unset"):
        process_group.setup("auto")
    monkeypatch.delenv("LOCAL_RANK")
    assert process_group.setup("auto") == torch.device("cuda", 0)
    assert taken == [torch.device("cuda", 0)]


def test_slurms_ports_are_none_that_the_system_gives_away():
    """Linux gives away those from 32768 on, by default."""
    (line,) = (
        line
        for line in (ROOT / "scripts" / "slurm.sh").read_text().splitlines()
        if line.startswith("MASTER_PORT=")
    )
    for job in (1, 19_999, 20_000, 12_345_678):
        code = f"SLURM_JOB_ID={job}; {line}; echo $MASTER_PORT"
        port = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert 1024 < int(port.stdout) < 32768
