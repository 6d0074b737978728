"""The files for clusters have the fields that their programs know, and commands that the trainer takes.

They are checked, not run: there is no cluster here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml

from pipelines.dali import DaliOptions
from rsnet.config.command_line import parse
from rsnet.models.factory import list_models

CLUSTERS = Path(__file__).parents[2] / "examples" / "clusters"
URL = "s3://bucket/runs/first"


def _read(name: str) -> Any:
    return yaml.safe_load((CLUSTERS / name).read_text())


def _require_fields(value: dict[str, Any], needed: set[str], others: set[str]) -> None:
    assert needed <= set(value) <= needed | others


def _require_training(words: list[str]) -> None:
    """`torchrun ... -m rsnet train ...`."""
    config, _ = parse(DaliOptions, words[words.index("rsnet") + 2 :])
    assert config.arch in list_models()
    assert (str(config.data), config.url) == ("s3://bucket/imagenet", URL)


def _torchrun_options(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args([re.sub(r"\$\w+", "2", w) for w in words[1:]])
    assert (words[0].rpartition("/")[2], args.module, args.training_script) == (
        "torchrun",
        True,
        "rsnet",
    )


def test_the_pytorchjob_is_one_of_kubeflow_v1():
    job = _read("pytorchjob.yaml")
    _require_fields(job, {"apiVersion", "kind", "metadata", "spec"}, set())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    _require_fields(spec, {"pytorchReplicaSpecs"}, {"elasticPolicy", "nprocPerNode", "runPolicy"})
    policy = spec["elasticPolicy"]
    known = {"rdzvBackend", "minReplicas", "maxReplicas", "maxRestarts", "rdzvId", "rdzvPort"}
    _require_fields(policy, set(), known)
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    (kind, replicas) = next(iter(spec["pytorchReplicaSpecs"].items()))
    assert kind in ("Master", "Worker")
    _require_fields(replicas, {"replicas", "restartPolicy", "template"}, set())
    assert policy["minReplicas"] == policy["maxReplicas"] == replicas["replicas"]
    assert replicas["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")


def test_the_pods_mount_what_they_have_and_run_a_training():
    pod = _read("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    _require_fields(pod, {"containers", "volumes", "terminationGracePeriodSeconds"}, set())
    (container,) = pod["containers"]
    known = {"command", "env", "envFrom", "resources", "volumeMounts", "workingDir"}
    _require_fields(container, {"name", "image"}, known)
    assert container["name"] == "pytorch"
    mounts = container["volumeMounts"]
    assert {m["name"] for m in mounts} == {v["name"] for v in pod["volumes"]}
    assert container["workingDir"] in {m["mountPath"] for m in mounts}
    assert all(isinstance(word, str) for word in container["command"])
    assert all(isinstance(variable["value"], str) for variable in container["env"])
    _torchrun_options(container["command"])
    _require_training(container["command"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc_per_node={gpus}" in container["command"]


def test_the_task_for_skypilot_has_its_fields_and_runs_a_training():
    task = _read("skypilot.yaml")
    known = {"envs", "name", "num_nodes", "resources", "setup", "workdir"}
    _require_fields(task, {"run"}, known)
    _require_fields(task["resources"], {"accelerators"}, {"use_spot", "job_recovery", "disk_size"})
    variables = set(re.findall(r"\$(SKYPILOT_\w+)", task["run"]))
    names = {"NODE_IPS", "NODE_RANK", "NUM_NODES", "NUM_GPUS_PER_NODE"}
    assert variables == {f"SKYPILOT_{name}" for name in names}
    words = shlex.split(task["run"].splitlines()[-1])
    _torchrun_options(words[1:])
    _require_training(words[1:])


def test_the_script_for_torchrun_is_bash_and_runs_a_training():
    script = CLUSTERS / "torchrun.sh"
    subprocess.run(["bash", "-n", script], check=True)
    words = shlex.split(script.read_text().splitlines()[-1])
    assert words.pop(0) == "exec"
    _torchrun_options(words)
    _require_training(words)
