"""Runs side by side, from run directories that the test writes."""

from __future__ import annotations

import json
import statistics

import pytest

from pipelines.utils.errors import DataError, UsageError
from rsnet.__main__ import main
from rsnet.evaluation.compare import differing_options, plot, read_run, tables


def _run(path, top1: dict[str, float], seed=0, step_time=0.5, steps=(10, 14)):
    """A finished run of batches of 32 images; its metrics speak of steps up to each of `steps`."""
    path.mkdir(parents=True)
    results = {"gmacs": {}, "parameters": {"shared": 1000, "private": 24}}
    for i, (name, value) in enumerate(top1.items()):
        results["gmacs"][name] = 4.0 / (i + 1)
        results[name] = {"top1": value, "top5": value + 5, "loss": 1.0}
    (path / "results.json").write_text(json.dumps(results))
    (path / "config.json").write_text(json.dumps({"seed": seed}))
    lines = [
        {
            "step": s,
            "epoch": s / 10,
            "perf/step_time": step_time,
            "perf/images_per_s": 32 / step_time,
        }
        for s in steps
    ]
    lines.append({"step": steps[-1], "epoch": 1, "val/top1@32": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _rows(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line]


def test_a_run_is_summarised_from_its_files(tmp_path):
    run = read_run(_run(tmp_path / "a", {"32": 70.0, "24": 65.0, "ensemble": 71.0}))
    assert run.sizes == ["32", "24"]
    assert run.top1["ensemble"] == 71
    assert run.seconds == pytest.approx(14 * 0.5)
    assert run.images == pytest.approx(14 * 32)
    assert (run.shared, run.private) == (1000, 24)


def test_a_run_that_went_on_with_other_batches_has_the_time_of_its_steps(tmp_path):
    """One epoch of 10 steps of 0.5 s, then, with batches twice as large, one of 5 steps of 0.8 s."""
    path = _run(tmp_path / "a", {"32": 70.0}, steps=(4, 10))
    line = {"perf/step_time": 0.8, "perf/images_per_s": 64 / 0.8}
    with (path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps({"step": s, "epoch": s / 5, **line}) + "\n" for s in (8, 10)))
    run = read_run(path)
    assert run.seconds == pytest.approx(10 * 0.5 + 5 * 0.8)
    assert run.images == pytest.approx(10 * 32 + 5 * 64)


def test_a_run_that_began_with_anothers_checkpoint_has_the_time_of_its_own_epochs(tmp_path):
    """From epoch 100 on, of 10 steps each."""
    path = _run(tmp_path / "a", {"32": 70.0})
    line = {"perf/step_time": 0.5, "perf/images_per_s": 64.0}
    with (path / "metrics.jsonl").open("w") as file:
        for step in (1004, 1010, 1020):
            file.write(json.dumps({"step": step, "epoch": step / 10, **line}) + "\n")
    run = read_run(path)
    assert run.seconds == pytest.approx(20 * 0.5)
    assert run.images == pytest.approx(20 * 32)


def test_a_table_has_mean_and_deviation_over_seeds(tmp_path):
    values = [70.0, 72.0, 71.5]
    runs = [
        read_run(_run(tmp_path / str(i), {"32": v, "24": v - 3, "ensemble": v + 1}, seed=i))
        for i, v in enumerate(values)
    ]
    rows = _rows(tables({"private": runs}))
    assert rows[0] == ["top-1 %", "32", "24", "ensemble"]
    cell = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert rows[2][:2] == ["private", cell]
    assert rows[5] == ["private", "4 2", "1,000", "24", "64", "0.1"]


def test_networks_of_one_size_each_are_counted_together(tmp_path):
    runs = [
        read_run(_run(tmp_path / f"{size}-{seed}", {size: 60.0, "ensemble": 60.0}, seed=seed))
        for size in ("32", "24", "16")
        for seed in (0, 1)
    ]
    rows = _rows(tables({"individual": runs}))
    assert rows[0] == ["top-1 %", "32", "24", "16"]  # the ensemble of one size is no ensemble
    label, _, shared, private, speed, minutes = rows[5]
    assert (label, shared, private) == ("individual", "3,000", "72")
    assert float(speed) == pytest.approx(64 / 3, abs=1)  # all three for each image
    assert float(minutes) == pytest.approx(3 * 7 / 60, abs=0.06)


def test_runs_of_different_sizes_share_a_table(tmp_path):
    one = read_run(_run(tmp_path / "1", {"32": 70.0, "24": 65.0, "ensemble": 71.0}))
    two = read_run(_run(tmp_path / "2", {"28": 68.0, "ensemble": 68.0}))
    rows = _rows(tables({"one": [one], "two": [two]}))
    assert rows[0][1:] == ["32", "28", "24", "ensemble"]
    assert rows[2][1:] == ["70.00", "", "65.00", "71.00"]
    assert rows[3][1:] == ["", "68.00", "", ""]


@pytest.mark.usefixtures("drawn_plots")
def test_a_plot_is_a_picture(tmp_path):
    run = read_run(_run(tmp_path / "a", {"32": 70.0, "24": 65.0, "ensemble": 71.0}))
    plot(
        tmp_path / "plot.png", {"a": [run], "b": [run, run]} | {key: [run] for key in "cdefghijkl"}
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_report_prints_the_table_and_writes_it(tmp_path, capsys):
    runs = [str(_run(tmp_path / n, {"32": 70.0, "ensemble": 70.0})) for n in ("a", "b")]
    assert main(["report", *runs, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(run in out for run in runs)
    assert (tmp_path / "out" / "report.md").read_text() == out
    assert (tmp_path / "out" / "report.png").exists()


def test_what_is_no_finished_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert (
        f"{tmp_path}: no results.json; is it the directory of a finished run?"
        in capsys.readouterr().err
    )
    with pytest.raises(UsageError):
        read_run(tmp_path / "none")
    run = _run(tmp_path / "a", {"32": 70.0})
    (run / "metrics.jsonl").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl: No such file"):
        read_run(run)


def test_a_run_whose_costs_are_in_gflops_is_read_in_gmacs(tmp_path):
    """As version 0.1 wrote them, two for a multiply-accumulate."""
    run = _run(tmp_path / "run", {"64": 70.0, "32": 60.0, "ensemble": 71.0})
    written = json.loads((run / "results.json").read_text())
    before = {name: 2 * value for name, value in written.pop("gmacs").items()}
    (run / "results.json").write_text(json.dumps(written | {"gflops": before}))
    assert read_run(run).gmacs == {"64": 4.0, "32": 2.0, "ensemble": pytest.approx(4 / 3)}


def test_the_options_that_differ_are_said(tmp_path, capsys):
    both = {
        "seed": 0,
        "sizes": [32, 24],
        "lr": 0.1,
        "amp": "bf16",
        "output": "a",
        "wandb_name": "x",
    }
    others = {"sizes": [32, 16], "lr": 0.2, "output": "b", "wandb_name": "y", "workers": 4}
    runs = []
    for name, options in (("a", both), ("b", both | others), ("c", both)):
        runs.append(_run(tmp_path / name, {"32": 70.0, "ensemble": 71.0}))
        (runs[-1] / "config.json").write_text(json.dumps(options))
    a, b, c = map(str, runs)
    assert main(["report", a, b]) == 0
    *_, table = capsys.readouterr().out.split("\n\n")
    assert _rows(table) == [
        ["option", a, b],
        ["-" * len(cell) for cell in table.splitlines()[1].strip("|").split("|")],
        ["`--sizes`", "32 24", "32 16"],
        ["`--lr`", "0.1", "0.2"],
    ]
    assert main(["report", a, c]) == 0
    assert capsys.readouterr().out.endswith("\n\nThe runs have the same options.\n")
    assert main(["report", a]) == 0
    assert "| option" not in capsys.readouterr().out


def test_an_option_that_a_run_does_not_have_is_a_dash(tmp_path):
    runs = {}
    for name, options in (("a", {"workers": 4}), ("b", {}), ("c", {"workers": 8})):
        path = _run(tmp_path / name, {"32": 70.0, "ensemble": 71.0})
        (path / "config.json").write_text(json.dumps({"seed": 0} | options))
        runs[name] = read_run(path)
    assert _rows(differing_options(runs))[2:] == [["`--workers`", "4", "-", "8"]]
