"""`rsnet evaluate`: a training's own numbers, its files, label sets, and what it refuses."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.evaluation import label_sets
from tests.conftest import beton_of, needs_ffcv
from tests.helpers import faults, processes
from tests.helpers.runs import NETWORK, SIZES, trained, write_run
from tests.loggers.test_wandb_logger import _history

NAMES = [*map(str, SIZES), "ensemble"]
AS_TRAINING = ["--batch-size", "4", "--amp", "off", "--device", "cpu", "--workers", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", NETWORK | {"normalize": "unit"})


@pytest.fixture
def evaluate(capsys):
    """Run the verb in this process; returns (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main(["evaluate", *map(str, words), *AS_TRAINING])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _of_training(run: Path, data: Path, output: Path, *more: object) -> dict:
    words = ["train", "--evaluate", "--resume", run / "checkpoints" / "best.pt", "--data", data]
    assert main([*map(str, [*words, "--output", output, *more]), *AS_TRAINING]) == 0
    return json.loads((output / "evaluation.json").read_text())


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("drawn_plots")
def test_the_results_are_those_of_a_trainings_evaluation_and_the_files_agree(
    run, photos, tmp_path, evaluate
):
    output = tmp_path / "new" / "evaluation"
    answers = output / "answers.parquet"
    code, out, err = evaluate(
        run, "--data", photos, "--json", "--output", output, "--predictions", answers
    )
    assert code == 0
    assert err.startswith(f"run {run}: parallel_resnet10, sizes 64 48 32, weights after epoch 2 in")
    content = json.loads(out)
    assert content == json.loads((output / "evaluation.json").read_text())
    expected = _of_training(run, photos, tmp_path / "trained")
    for name in NAMES:
        assert content["results"][name].items() >= expected[name].items()
    table = pq.read_table(answers).to_pydict()
    assert table["path"] == [f"{photos}/val/{c}/{i:03}.JPEG" for c, n in
                             (("ant", 5), ("bee", 7), ("cat", 5)) for i in range(n)]  # fmt: skip
    right = {
        name: [a[0] == y for a, y in zip(table[f"classes@{name}"], table["label"], strict=True)]
        for name in NAMES
    }
    for name in NAMES:
        assert content["results"][name]["top1"] == pytest.approx(100 * np.mean(right[name]))
    at_sizes = np.array([right[name] for name in NAMES[:-1]])
    everywhere = [p for p, r in zip(table["path"], at_sizes.T, strict=True) if not r.any()]
    small = [p for p, r in zip(table["path"], at_sizes.T, strict=True) if not r[0] and r.any()]
    assert content["wrong_at_every_size"] == everywhere
    assert content["right_only_when_small"] == small != []
    assert [row["path"] for row in _rows(output / "right_only_when_small.csv")] == small
    of_class = {row["class"]: row for row in _rows(output / "per_class.csv")}
    assert [row["images"] for row in of_class.values()] == ["5", "7", "5"]
    bees = [r for r, y in zip(right["48"], table["label"], strict=True) if y == 1]
    assert float(of_class["bee"]["top1@48"]) == pytest.approx(100 * np.mean(bees))
    pairs = _rows(output / "confusion.csv")
    assert sum(int(row["64"]) for row in pairs) == 17
    assert sum(int(row["64"]) for row in pairs if row["label"] == row["answer"]) == sum(right["64"])
    with Image.open(output / "confusion.png") as image:
        assert image.format == "PNG"


def test_the_tables_have_sizes_hard_classes_and_confusions(run, photos, evaluate):
    code, out, _ = evaluate(run / "checkpoints" / "best.pt", "--data", photos, "--sizes", 32, 32)
    assert code == 0
    sizes, classes, confusions, last = out.split("\n\n")
    _, head, *rows = sizes.splitlines()
    assert head.split() == ["size", "top-1", "%", "top-5", "%", "loss", "ECE", "%"]
    assert [row.split()[0] for row in rows] == ["32", "ensemble"]
    assert [line.split()[0] for line in classes.splitlines()[1:]] != []
    assert classes.startswith("hardest classes at 32")
    assert confusions.startswith("most confused at 32")
    assert last.startswith("of 17 images, ")


@pytest.mark.slow  # numba compiles what reads the file
@needs_ffcv
def test_beton_files_give_what_a_training_on_them_does(run, photos, tmp_path, evaluate):
    data = beton_of(photos)
    code, out, _ = evaluate(run, "--data", data, "--json")
    assert code == 0
    content = json.loads(out.splitlines()[-1])  # behind what the conversion said
    expected = _of_training(run, data, tmp_path / "trained")
    for name in NAMES:
        assert content["results"][name].items() >= expected[name].items()
    hard = content["right_only_when_small"] + content["wrong_at_every_size"]
    assert {path.rpartition("#")[0] for path in hard} == {f"{data}/val.beton"}
    code, _, err = evaluate(run, "--data", data, "--skip-bad")
    assert (code, err.count("--skip-bad: a .beton file has no image")) == (2, 1)


def test_some_classes_in_a_folder_without_val_are_compared_among_themselves(
    run, photos, tmp_path, evaluate
):
    for name in ("ant", "cat"):
        shutil.copytree(photos / "val" / name, tmp_path / "some" / name)
    logits, top = tmp_path / "logits.parquet", tmp_path / "top.parquet"
    code, out, _ = evaluate(
        run, "-d", tmp_path / "some", "--predictions", logits, "--logits", "--sizes", 48
    )
    assert code == 0
    assert "labels: the data has 2 of 3 classes: answers are chosen among these" in out
    evaluate(run, "-d", tmp_path / "some", "--predictions", top, "--sizes", 48)
    (found, answers) = (pq.read_table(path).to_pydict() for path in (logits, top))
    assert found["label"] == answers["label"] == [0] * 5 + [2] * 5
    for z, classes in zip(found["logits@48"], answers["classes@48"], strict=True):
        assert len(z) == 3
        assert classes == sorted([0, 2], key=lambda c: -z[c])


def test_numbered_folders_and_imagenet_reals_labels(run, photos, tmp_path, evaluate, monkeypatch):
    """Label 2 of an image is right if any of ReaL's labels is; those without labels are left out."""
    names = {}
    for number, name in ((2, "ant"), (0, "cat")):
        for i, path in enumerate(sorted((photos / "val" / name).iterdir())):
            names[len(names) + 1] = tmp_path / "v2" / str(number) / path.name
            (tmp_path / "v2" / str(number)).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, names[len(names)])
            real = tmp_path / "val" / "any" / f"ILSVRC2012_val_{5 * (number == 0) + i + 1:08}.JPEG"
            real.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, real)
    answers = [tmp_path / f"{i}.parquet" for i in range(2)]
    code, out, _ = evaluate(run, "-d", tmp_path / "v2", "--predictions", answers[0])
    assert code == 0
    assert "labels: the class folders are numbers" in out
    assert sorted(pq.read_table(answers[0])["label"].to_pylist()) == [0] * 5 + [2] * 5
    lists = [[1], [0, 2], [], [2], [0, 1, 2], [1, 0], [2], [], [0], [0]]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    words = ["-d", tmp_path, "--real", tmp_path / "real.json"]
    code, _, err = evaluate(run, *words)
    assert code == 2
    assert "--real: the network's classes are not ImageNet's, by their WordNet ids" in err
    monkeypatch.setattr(label_sets, "are_imagenets", lambda _: True)
    code, out, err = evaluate(
        run, "-d", tmp_path, "--real", tmp_path / "real.json", "--predictions", answers[1], "--json",
        "--output", tmp_path / "new",
    )  # fmt: skip
    assert code == 0
    content = json.loads(out)
    assert content["images"] == 8
    assert content["labels"] == f"{tmp_path}/real.json has labels of 8 of the 10 images"
    assert f"labels: {content['labels']}" in err
    table = pq.read_table(answers[1]).to_pydict()
    assert table["label"] == [row for row in lists if row]
    right = [a[0] in y for a, y in zip(table["classes@64"], table["label"], strict=True)]
    assert content["results"]["64"]["top1"] == pytest.approx(100 * np.mean(right))
    assert "loss" not in content["results"]["64"]
    assert not (tmp_path / "new" / "confusion.csv").exists()
    assert len(_rows(tmp_path / "new" / "per_class.csv")) == 3


def test_a_table_is_evaluated_and_what_a_training_left_of_its_images(
    run, photos, tmp_path, evaluate
):
    lines = [f"{photos}/val/{c}/00{i}.JPEG,{c}" for c in ("cat", "ant") for i in range(4)]
    (tmp_path / "some.csv").write_text("\n".join(["path,label", *lines]))
    answers = tmp_path / "answers.parquet"
    code, out, err = evaluate(run, "-d", tmp_path / "some.csv", "--predictions", answers)
    assert code == 0, err
    assert "the data has 2 of 3 classes" in out
    assert sorted(pq.read_table(answers)["label"].to_pylist()) == [0] * 4 + [2] * 4
    words = ["--val-fraction", 0.4]
    code, out, _ = evaluate(run, "-d", photos / "train", *words, "--json")
    assert code == 0
    expected = _of_training(run, photos / "train", tmp_path / "trained", *words)
    content = json.loads(out)
    assert content["images"] < 23
    for name in NAMES:
        assert content["results"][name].items() >= expected[name].items()


def test_classes_are_named_by_a_file_everywhere(run, photos, tmp_path, evaluate):
    (tmp_path / "names.txt").write_text("Formica\nApis\nFelis\n")
    words = [run, "-d", photos, "--sizes", 32, "--class-names", tmp_path / "names.txt"]
    _, out, _ = evaluate(*words)
    assert {"Formica", "Apis", "Felis"} <= set(out.split())
    assert not {"ant", "bee", "cat"} & set(out.split())
    _, out, _ = evaluate(*words, "--json")
    assert [(c["class"], c["name"]) for c in json.loads(out)["per_class"]] == [
        ("ant", "Formica"), ("bee", "Apis"), ("cat", "Felis"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("no_wandb_key")
def test_wandb_gets_the_table_and_the_matrix(run, photos, tmp_path, evaluate):
    output = tmp_path / "new"
    words = [run, "--data", photos, "--output", output, "--wandb", "offline", "--sizes", 32]
    code, _, err = evaluate(*words)
    assert code == 0
    assert "W&B: offline in " in err
    (row,) = _history(output)
    assert row["results/nrows"] == 2
    assert row["confusion/_type"] == "image-file"


@pytest.mark.slow  # torchrun; the joining of ranks is tested in tests/evaluation/test_predictions.py
def test_two_processes_give_the_same_to_the_last_image(run, photos, tmp_path, evaluate):
    answers = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    words = ["evaluate", run, "--data", photos, "--json"]
    code, out, _ = evaluate(*words[1:], "--predictions", answers[0], "--logits")
    assert code == 0
    command = [
        sys.executable,
        faults.ROOT / "rsnet" / "__main__.py",
        *words,
        *AS_TRAINING,
        "--predictions",
        answers[1],
    ]
    done = processes.run(faults.torchrun(2, [*map(str, command), "--logits"]))
    assert done.returncode == 0, done.stderr
    one, two = json.loads(out), json.loads(done.stdout)
    for name in NAMES:
        for what in ("loss", "ece"):  # sums in another order
            expected = one["results"][name].pop(what)
            assert two["results"][name].pop(what) == pytest.approx(expected, rel=1e-5)
    assert one == two
    found, expected = (pq.read_table(path).to_pydict() for path in answers[::-1])
    assert found["path"] == expected["path"]
    for name in NAMES:
        np.testing.assert_allclose(
            found[f"logits@{name}"], expected[f"logits@{name}"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wandb", "offline"], "--wandb: give --output, too, the folder that W&B logs in"),
        (["--logits"], "--logits: give --predictions, too, the file that they go to"),
        (["--batch-size", "0"], "--batch-size 0: at least 1, and 65536 at most"),
        (["--output", "there"], "--output: there exists; give another name"),
        (["--predictions", "there/x"], "--predictions: there/x exists; give another name"),
        (["--predictions", "there/x/y"], "--predictions: cannot write into {here}/there/x"),
        (["--sizes", "64", "20"], "--sizes is 64 48 32 in {run} and 64 20 here"),
        (["--data", "nowhere"], "--data: there is no folder nowhere"),
        (["--data", "there"], "--data: there holds no images; expected there/CLASS/IMAGE.JPEG"),
        (["--data", "dogs"], "--data has classes that are none of the network's 3: dog"),
        (["--class-names", "none"], "--class-names: there is no file none"),
        (["--real", "none.json"], "none.json: No such file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_computed(
    run, photos, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("mine")
    shutil.copytree(photos / "val" / "ant", tmp_path / "dogs" / "dog")
    monkeypatch.setattr("rsnet.evaluation.predictions.batch_logits", None)
    code = main(["evaluate", str(run), "--data", str(photos), *AS_TRAINING, *words])
    err = capsys.readouterr().err.splitlines()
    assert code == (1 if "--real" in words else 2)
    expected = message.format(run=run, here=tmp_path)
    assert err[-1].startswith(f"rsnet evaluate: error: {expected}")
    assert sum(line.startswith("rsnet evaluate: error") for line in err) == 1
    assert (tmp_path / "there" / "x").read_text() == "mine"
    assert os.listdir(tmp_path / "there") == ["x"]


def test_weights_that_are_not_finite_are_refused(tmp_path, photos, evaluate):
    weights = trained(NETWORK, 1)
    weights["network.conv1.weight"][0] = torch.nan
    checkpoint.save(tmp_path / "nan.pt", Checkpoint(ModelConfig.from_dict(NETWORK), weights))
    code, _, err = evaluate(tmp_path / "nan.pt", "--data", photos)
    assert code == 1
    assert "network.conv1.weight has numbers that are not finite" in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("x"), "out of GPU memory; give a smaller --batch-size"),
        (
            RuntimeError("CUDA error: out of memory"),
            "out of GPU memory; give a smaller --batch-size",
        ),
        (RuntimeError("Connection closed by peer [127.0.0.1]:5"), "another process was lost: "),
    ],
)
def test_a_device_or_a_process_that_fails_is_one_line(
    run, photos, monkeypatch, evaluate, error, message
):
    def fail(*_):
        raise error

    monkeypatch.setattr("rsnet.evaluation.predictions.batch_logits", fail)
    monkeypatch.setattr(
        "rsnet.distributed.watchdog.is_collective_error", lambda e: "peer" in str(e)
    )
    code, _, err = evaluate(run, "--data", photos)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"rsnet evaluate: error: {message}")


def test_ranks_have_to_evaluate_the_same_weights_alike(
    run, photos, tmp_path, monkeypatch, evaluate
):
    """Their copies of a run may be of other epochs."""
    found = []
    monkeypatch.setattr(
        "rsnet.distributed.agreement.require_same",
        lambda what, facts: found.append((what, facts())),
    )
    other = tmp_path / "other.pt"
    content = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    for weights in filter(None, (content["model"], content.get("ema"))):
        weights["network.conv1.weight"] += 1
    torch.save(content, other)
    for words in ((run,), (run, "--sizes", "32"), (other,)):
        assert evaluate(words[0], "--data", photos, *words[1:])[0] == 0
    assert main(["evaluate", str(run), "--data", str(photos), *AS_TRAINING, "--amp", "bf16"]) == 0
    networks = [facts for what, facts in found if what == "networks"]
    changed = [[name for name in networks[0] if networks[0][name] != its[name]] for its in networks]
    assert changed == [[], ["--sizes"], ["weights"], ["--amp"]]


def test_a_table_is_not_lost_with_a_full_disk(run, photos, tmp_path, monkeypatch, evaluate):
    def fail(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("rsnet.evaluation.predictions.atomic_write", fail)
    file = tmp_path / "x.parquet"
    code, out, err = evaluate(run, "--data", photos, "--predictions", file, "--sizes", 32)
    assert code == 1
    assert "of 17 images, " in out
    assert f"{file}: No space left on device; free some space there" in err
