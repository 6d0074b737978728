"""Several processes: they stop at the same step, go on in other numbers, and a lost one is named."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import faults, processes
from tests.helpers.faults import (  # fmt: skip
    UPDATES,
    assert_same_end,
    end,
    finish,
    kill,
    reached,
    saved,
    start,
    torchrun,
    wait_for,
)
from tests.pipelines.sources.conftest import source_of, upload

pytestmark = pytest.mark.faults


def command(data: Path | str, run: Path | str, *more: str | Path) -> list[str]:
    """A training whose sizes change after the first and the second epoch."""
    schedule = ("--size-schedule", "0:16", "1:24,16", "2:all")
    return faults.command(data, run, *schedule, *more)


def _pair(photos: Path, run: Path, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """Two processes with half of the batch each."""
    return torchrun(2, command(photos, run, "-b", "2", *more), *launcher)


@pytest.fixture(scope="module")
def pair(photos, tmp_path_factory) -> Path:
    """A run of two processes that nothing happens to."""
    run = tmp_path_factory.mktemp("pair") / "run"
    finish(_pair(photos, run))
    assert saved(run)["step"] == UPDATES
    return run


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the trainers below a torchrun, which starts them in the order of their ranks."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sorted(int(p) for task in tasks for p in (task / "children").read_text().split())


def _stored(s3) -> int:
    time.sleep(0.05)  # the server that lists them is this process's, and takes uploads meanwhile
    return sum(key.endswith(".pt") for key in s3.keys())  # noqa: SIM118


def _machine(words: list[str], endpoint: int) -> list[str]:
    """One of two torchruns that find each other at a port of this machine, with a process each."""
    launcher = ["--nnodes", "2", "--max-restarts", "3"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{endpoint}"]
    return torchrun(1, words, *launcher)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_ranks_that_are_told_to_stop_stop_at_the_same_step_and_go_on_exactly(
    photos, pair, tmp_path
):
    """SIGTERM to torchrun, which passes it on; each rank's own BatchNorm statistics are kept, too."""
    run = tmp_path / "run"
    process = start(_pair(photos, run))
    wait_for(reached(run, 7), process)
    process.send_signal(signal.SIGTERM)
    _, err = end(process, None)
    assert err.count("stopped by SIGTERM: saved after update") == 1
    assert 7 <= saved(run)["step"] < UPDATES
    # A signal to one rank alone stops all.
    process = start(_pair(photos, run))
    wait_for(reached(run, 12), process)
    os.kill(_ranks(process)[1], signal.SIGUSR1)
    _, err = end(process, None)
    assert err.count("stopped by SIGUSR1: saved after update") == 1
    finish(_pair(photos, run))
    assert_same_end(run, pair)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_a_restart_goes_on_exactly(photos, pair, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run, launcher=("--max-restarts", "1")))
    wait_for(reached(run, 7), process)
    os.kill(_ranks(process)[1], signal.SIGKILL)
    end(process)
    assert_same_end(run, pair)


@pytest.mark.slow
def test_a_killed_rank_without_restarts_ends_all(photos, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run))
    wait_for(reached(run, 7), process)
    os.kill(_ranks(process)[1], signal.SIGKILL)
    _, err = end(process, None)
    assert process.returncode != 0
    assert "rank      : 1" in err  # torchrun's report
    assert "rank 1 ended, hung, or lost the connection" in err
    assert "[rank0]: Traceback" not in err
    log = (run / "log.txt").read_text()
    assert "RunError: rank 1 ended, hung" in log
    assert re.search(
        "^(RuntimeError|torch.distributed.Dist.*Error): ", log, re.M
    )  # what led to that


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_time_and_is_named(photos, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run, "--timeout", "8"))
    wait_for(reached(run, 7), process)
    stopped = _ranks(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    _, err = end(process, None)
    assert process.returncode != 0
    assert "rank 1 ended, hung, or lost the connection" in err
    assert not Path(f"/proc/{stopped}").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(photos, pair, tmp_path, before, after):
    """The images of every update stay the same, so the weights are those of the run with two: not to the
    bit, as one process with two batches adds up in another order."""
    run = tmp_path / "run"
    commands = {
        1: command(photos, run, "-b", "2", "--accumulate", "2"),
        2: _pair(photos, run),
    }
    process = start(commands[before])
    wait_for(reached(run, 7), process)
    process.send_signal(signal.SIGTERM)
    end(process, None)
    words = commands[after]
    while "-b" in words or "--accumulate" in words:  # left to what keeps the images of an update
        i = next(i for i, w in enumerate(words) if w in ("-b", "--accumulate"))
        words = words[:i] + words[i + 2 :]
    out, _ = finish(words)
    assert f"{before} processes then, {after} now" in out
    ended, expected = saved(run), saved(pair)
    assert ended["step"] == expected["step"]
    torch.testing.assert_close(
        ended["model"]["alpha"], expected["model"]["alpha"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_another_number_of_images_in_an_update_is_refused(photos, pair):
    words = command(photos, pair, "-b", "4", "--accumulate", "2")
    _, err = finish(words, 2)
    assert "other options (--lr 0.0015625 -> 0.003125, global batch 4 -> 8)" in err
    _, err = finish([*words, "--resume", "auto"], 2)
    assert "global batch 4 -> 8: the run would not go on with the images that come next" in err
    assert "--allow-change global-batch" in err


@pytest.mark.slow
def test_processes_that_are_killed_leave_none_behind(photos, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run))
    wait_for(reached(run, 3), process)
    ranks = _ranks(process)
    assert len(ranks) == 2
    kill(process, signal.SIGKILL)
    end(process, None)
    deadline = time.monotonic() + 30
    while any(map(_lives, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, ranks))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


GRADIENTS = """
import sys, torch
from torch import nn
from rsnet.distributed import process_group as distributed

device = distributed.setup("cpu")
torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
)
images, labels = torch.randn(8, 3, 16, 16), torch.randint(4, (8,))
rank, world = distributed.rank(), distributed.world_size()
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
wrapped = distributed.wrap_ddp(network, device, compress="bf16" in sys.argv)
for _ in range(2):  # a static graph is known after the first
    network.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(wrapped(images[mine]), labels[mine]).backward()
if distributed.is_main():
    torch.save([p.grad for p in network.parameters()], sys.argv[1])
assert distributed.all_gather_object(rank) == list(range(world))
assert distributed.run_on_main(lambda: rank) == 0
ballot = distributed.StepVote()
assert [ballot.cast(10 * rank), ballot.count(), ballot.count()] == [0, 10, 0]
distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_both_batches(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    found = {}
    for name, count, more in (("one", 1, []), ("two", 2, []), ("half", 2, ["bf16"])):
        path = tmp_path / f"{name}.pt"
        words = torchrun(count, [sys.executable, str(script), str(path), *more])
        if count == 1:
            code = GRADIENTS.replace("[0, 10, 0]", "[0, 0, 0]")
            words = [sys.executable, "-c", code, str(path)]
        finish(words)
        found[name] = torch.load(path)
    for one, two, half in zip(found["one"], found["two"], found["half"], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(half, one, rtol=2e-2, atol=2e-3)
        assert not torch.equal(half, two)


@pytest.mark.slow
def test_two_machines_train_one_run_also_when_one_is_lost(photos, pair, tmp_path):
    """As two torchruns that find each other: rank 1 is another machine's first process. When it is lost,
    both begin anew, though their torchruns count restarts differently."""
    run = tmp_path / "run"
    words = _machine(command(photos, run, "-b", "2"), _free_port())
    machines = [start(words), start(words)]
    wait_for(reached(run, 7), machines[0])
    # Torchruns of one host are ordered by their process ids.
    (second,) = _ranks(max(machines, key=lambda machine: machine.pid))
    os.kill(second, signal.SIGKILL)
    for machine in machines:
        end(machine)
    assert "rank 1 ended, hung" in (run / "log.txt").read_text()
    assert_same_end(run, pair)


@pytest.mark.slow
def test_torchrun_starts_the_command_as_the_script(photos, pair, tmp_path):
    """As README.md has it. Ranks are fresh interpreters."""
    run = tmp_path / "run"
    _, _, *options = command(photos, run, "-b", "2")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out, _ = finish([sys.executable, *launcher, "-m", "rsnet", "train", *options])
    assert "4 = 2 images x 2 processes x 1 accumulated" in out
    assert_same_end(run, pair)


@pytest.mark.slow
def test_a_machine_that_is_lost_with_its_disk_is_replaced_and_the_bucket_has_the_run(
    s3, photos, pair, tmp_path
):
    """Two torchruns with folders and caches of their own, data and run in a bucket; one is lost."""
    data = upload(s3, source_of("shards", photos))
    port = _free_port()

    def machine(name: str) -> subprocess.Popen[str]:
        folder = tmp_path / name
        folder.mkdir()
        words = command(data, "s3://bucket/runs/run", "-b", "2", "--cache", folder / "cache")
        words = _machine(words, port)
        alone = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see examples/clusters/torchrun.sh
        return processes.start(words, {"UNDRAWN_PLOTS": "1", **alone}, cwd=folder)

    def has_rendezvous() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("localhost", port)) == 0

    first = machine("a")
    wait_for(has_rendezvous, first)
    second = machine("b")
    wait_for(lambda: _stored(s3) >= 2, first)
    (lost,) = _ranks(second)
    kill(second)
    with contextlib.suppress(ProcessLookupError):
        os.kill(lost, signal.SIGKILL)  # in a session of its own
    second.communicate()
    shutil.rmtree(tmp_path / "b")
    third = machine("c")
    for process in (first, third):
        end(process)
    with_run = [tmp_path / name / "runs/run" for name in ("a", "c")]
    (ended,) = (run for run in with_run if (run / "results.json").exists())
    assert_same_end(ended, pair)
    newest = sorted(key for key in list(s3.keys()) if "-epoch-" in key)[-1]
    assert s3.get(newest) == (ended / "checkpoints/last.pt").read_bytes()


@pytest.mark.slow
def test_processes_without_torchrun_find_each_other(photos, pair, tmp_path):
    """As under Slurm, which sets what the script makes of it, and signals the processes themselves."""
    run = tmp_path / "run"
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}

    def launch() -> list[subprocess.Popen[str]]:
        ranks = ({**place, "RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": "2"} for r in ("0", "1"))
        return [start(command(photos, run, "-b", "2"), environ) for environ in ranks]

    processes = launch()
    wait_for(reached(run, 7), processes[0])
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    for process in processes:
        end(process, 138)
    for process in launch():
        end(process)
    assert_same_end(run, pair)


@pytest.mark.slow
def test_two_nodes_in_order_of_shards_go_on_where_they_were_killed(photos, tmp_path):
    """Each a process, numbered as torchrun does. A single node has another order, and is refused."""
    data = source_of("shards", photos)
    order = [
        "--order",
        "shards",
        "--order-window",
        "1",
        "--epochs",
        "2",
        "--size-schedule",
        "0:all",
    ]

    def launch(run: Path) -> list[subprocess.Popen[str]]:
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
        place |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        ranks = ({**place, "RANK": r, "GROUP_RANK": r} for r in ("0", "1"))
        return [start(command(data, run, "-b", "2", *order), environ) for environ in ranks]

    runs = [tmp_path / "whole", tmp_path / "killed"]
    for process in launch(runs[0]):
        out, _ = end(process)
        assert not out or "; order shards, 1 of 3 at a time on 2 nodes (" in out
    processes = launch(runs[1])
    wait_for(reached(runs[1], 7), processes[0])
    for process in processes:
        kill(process)
        process.communicate()
    _, err = finish(command(data, runs[1], "-b", "4", *order), 2)
    assert "order shards, 1 of 3 at a time on 2 nodes (" in err
    assert "add --allow-change data" in err
    for process in launch(runs[1]):
        end(process)
    assert_same_end(runs[1], runs[0])
