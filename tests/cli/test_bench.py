"""`rsnet bench`: tables, JSON, the model card, files, W&B, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines.utils.errors import DataError
from rsnet.__main__ import main
from rsnet.inference import benchmark as bench_figures
from rsnet.inference import calibration, latency
from rsnet.inference.cascade import CascadeStage, Tuned
from rsnet.release import model_card as release_card
from rsnet.release import package as release
from tests.helpers import releases
from tests.helpers.releases import SIZES
from tests.loggers.test_wandb_logger import _history

TUNED = Tuned({64: 0.5, 48: 2.0, 32: 4.0}, (CascadeStage(32, 0.2), CascadeStage(64)))
MS = {64: 40.0, 48: 20.0, 32: 8.0}


def _sample(_forward, _sizes, repeats):
    """101 times from half to one and a half of MS; a batch of one is faster."""
    factor = 1.0 if repeats == bench_figures.REPEATS["batch"] else 0.25
    return {s: [factor * ms * (0.5 + i / 100) for i in range(101)] for s, ms in MS.items()}


@pytest.fixture(autouse=True)
def _known_latencies(monkeypatch):
    monkeypatch.setattr(latency, "sample", _sample)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return releases.write_photos(tmp_path_factory.mktemp("labelled") / "val")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("bench") / "release")


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "release")


def _bench(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["bench", *map(str, words), "--device", "cpu", "--batch-size", "4"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("drawn_plots")
def test_json_the_table_the_files_and_the_card_agree(folder, data, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    output = tmp_path / "new" / "bench"
    words = [folder, "--data", data, "--dtype", "bfloat16"]
    code, out, _ = _bench(capsys, *words, "--json", "--output", output, "--card")
    assert code == 0
    content = json.loads(out)
    assert content == json.loads((output / "bench.json").read_text())
    assert all(cascade["ladder"] == cascade["cascade"] for cascade in content["cascades"])
    assert content["conditions"]["dtype"] == "torch.bfloat16"
    with Image.open(output / "accuracy_latency.png") as image:
        assert image.format == "PNG"
    card = (folder / "README.md").read_text()
    for size in content["sizes"]:
        assert f"| {size['size']} | {size['top1']:.2f} | {size['top5']:.2f} |" in card
    assert content["conditions"]["device"] in card
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {n for n in after if after[n] != before.get(n)} == {"README.md"}
    assert card.startswith(before["README.md"].decode().rstrip("\n"))
    release.read(folder)
    code, out, _ = _bench(capsys, *words)
    assert code == 0
    for size in content["sizes"]:
        assert re.search(rf"^ +{size['size']} .* {size['top1']:.2f} ", out, re.M)


@pytest.mark.parametrize(
    "card",
    [
        "<!-- bench -->",
        "<!-- end of bench -->",
        "<!-- end of bench --><!-- bench -->",
        "<!-- bench --><!-- bench --><!-- end of bench -->",
    ],
)
def test_markers_that_are_no_pair_are_one_line(folder, data, capsys, card):
    with pytest.raises(DataError, match=r"the section between .* is damaged; remove it"):
        release_card.with_bench(card, "new")
    (folder / "README.md").write_text(card)
    code, out, err = _bench(capsys, folder, "--data", data, "--card")
    assert (code, out) == (1, "")
    assert re.match(r"rsnet bench: error: .*README\.md: the section between .*\n$", err)


@pytest.mark.slow
@pytest.mark.usefixtures("no_wandb_key")
def test_wandb_gets_the_table_and_the_plot(folder, data, tmp_path, capsys):
    output = tmp_path / "bench"
    words = ["--output", output, "--wandb", "offline"]
    code, _, err = _bench(capsys, folder, "--data", data, *words)
    assert code == 0
    assert "W&B: offline in " in err
    (row,) = _history(output)
    assert row["results/nrows"] == len(SIZES)
    assert row["accuracy_latency/_type"] == "image-file"


def test_what_cannot_be_written_is_said_before_anything_is_measured(folder, data, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (folder / "README.md").unlink()
    for words, message in (
        (["--output", tmp_path / "file" / "new"], f"--output: cannot write into {tmp_path}/file"),
        (["--wandb", "offline"], "--wandb: give --output, too, the folder that W&B logs in"),
        (["--output", tmp_path / "there"], f"--output: {tmp_path}/there exists; give another name"),
        (["--card"], f"--card: there is no {folder}/README.md that can be written"),
    ):
        code, out, err = _bench(capsys, folder, "--data", data, *words)
        assert (code, out) == (2, "")
        assert err.startswith(f"rsnet bench: error: {message}")
        assert err.count("\n") == 1


def test_a_damaged_table_of_temperatures_is_said_before_images_are_computed(
    folder, data, monkeypatch, capsys
):
    def compute(*_, **__):
        raise AssertionError

    monkeypatch.setattr(calibration, "collect_logits", compute)
    (folder / "tuned.json").write_text("{")
    code, out, err = _bench(capsys, folder, "--data", data)
    assert (code, out) == (1, "")
    assert f"{folder}/tuned.json" in err


@pytest.mark.usefixtures("drawn_plots")
def test_without_wandb_results_are_written_and_asked_for_it_is_said_at_once(
    folder, data, tmp_path, monkeypatch, capsys
):
    """wandb is in another extra."""
    for name in [n for n in sys.modules if n.startswith("rsnet.loggers.wandb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["--data", data, "--output", tmp_path / "b"]
    code, out, err = _bench(capsys, folder, *words, "--wandb", "offline")
    assert (code, out, "wandb is not installed" in err) == (2, "", True)
    code, out, _ = _bench(capsys, folder, *words)
    assert code == 0
    assert out
    assert (tmp_path / "b" / "bench.json").exists()
