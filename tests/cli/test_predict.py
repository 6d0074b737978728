"""`python -m rsnet predict`: which images, what is printed, and the exit codes."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from rsnet.__main__ import main
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.release.from_run import release_run
from tests.conftest import write_photo
from tests.helpers import releases, runs


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("predict") / "release")


@pytest.fixture(scope="module")
def classifier(release) -> SwitchableClassifier:
    return SwitchableClassifier.load(release)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch, classifier):
    """All but the options that loading takes are the same in all tests."""

    def load(_folder, device, dtype, batch_size, top, **computed):
        assert device == "cpu" or torch.cuda.is_available()
        assert (dtype, computed) == (None, {"fold": False, "cuda_graphs": False, "engine": None})
        classifier.batch_size, classifier._top = batch_size, top
        return classifier

    monkeypatch.setattr(SwitchableClassifier, "load", load)


@pytest.fixture
def album(tmp_path) -> Path:
    """Three images at two depths, and a text."""
    for i, name in enumerate(("b.jpg", "a.PNG", "deep/er/c.jpeg")):
        write_photo(tmp_path / "album" / name, 60, 80, seed=i)
    (tmp_path / "album" / "notes.txt").write_text("no image")
    return tmp_path / "album"


TAKEN = r"release .+/release: parallel_resnet10, sizes 64 48 32\n"
ALBUM = ["a.PNG", "b.jpg", "deep/er/c.jpeg"]


def _predict(capsys, *words: object) -> tuple[int, list[str], str]:
    """Exit code, lines on stdout, and stderr behind what was taken, which is said if nothing is wrong."""
    code = main(["predict", *map(str, words)])
    captured = capsys.readouterr()
    taken = re.match(TAKEN, captured.err)
    assert code == 2 or taken
    return code, captured.out.splitlines(), captured.err[taken.end() if taken else 0 :]


def test_json_has_what_the_classifier_says(release, classifier, album, capsys):
    code, lines, err = _predict(capsys, release, album, "--json", "--size", 48)
    assert (code, err) == (0, "")
    expected = classifier.classify([album / name for name in ALBUM], size=48)
    for line, name, prediction in zip(lines, ALBUM, expected, strict=True):
        found = json.loads(line)
        assert found.pop("ms") > 0
        assert found == {
            "image": f"{album}/{name}",
            "size": 48,
            "top": [
                {"class": c, "probability": p}
                for c, p in zip(prediction.classes, prediction.probabilities, strict=True)
            ],
        }


def test_dtype_fold_and_graphs_reach_the_classifier(
    release, album, classifier, capsys, monkeypatch
):
    asked = []

    def load(_folder, _device, dtype, _batch_size, _top, **options):
        asked.append({"dtype": dtype} | {k: options[k] for k in ("fold", "cuda_graphs")})
        return classifier

    monkeypatch.setattr(SwitchableClassifier, "load", load)
    _predict(capsys, release, album, "--dtype", "bfloat16")
    _predict(capsys, release, album, "--fold", "--cuda-graphs")
    assert asked == [
        {"dtype": torch.bfloat16, "fold": False, "cuda_graphs": False},
        {"dtype": None, "fold": True, "cuda_graphs": True},
    ]


def test_the_table_has_a_row_an_image_in_their_order(release, classifier, album, capsys):
    code, (head, *rows), err = _predict(capsys, release, album / "b.jpg", album / "a.PNG")
    assert (code, err) == (0, "")
    assert head.split() == ["image", "size", "ms", "classes,", "%"]
    for row, name in zip(rows, ("b.jpg", "a.PNG"), strict=True):
        path, size, ms, top = row.split(maxsplit=3)
        (expected,) = classifier.classify(album / name)
        assert (path, size) == (f"{album}/{name}", "64")
        assert float(ms) > 0
        pairs = zip(expected.classes, expected.probabilities, strict=True)
        assert top == ", ".join(f"{c} {100 * p:.1f}" for c, p in pairs)


def test_an_image_that_is_given_twice_has_two_rows(release, album, capsys):
    code, lines, _ = _predict(capsys, release, album / "b.jpg", album / "b.jpg")
    assert (code, len(lines)) == (0, 3)


def test_a_cascades_table_is_in_the_order_of_the_images(release, classifier, album, capsys):
    paths = [album / name for name in ALBUM]
    best = [p.probabilities[0] for p in classifier.classify(paths, size=32)]
    threshold = sorted(best)[1]  # one image goes on, and is decided after the others
    paths.insert(0, paths.pop(best.index(min(best))))
    words = ["--confidence", threshold, "--batch-size", 3]
    code, (_, *rows), _ = _predict(capsys, release, *paths, *words)
    assert code == 0
    assert [row.split()[0] for row in rows] == list(map(str, paths))
    assert rows[0].split()[1] in ("48", "64")
    assert [row.split()[1] for row in rows[1:]] == ["32", "32"]
    _, lines, _ = _predict(capsys, release, *paths, *words, "--json")
    assert [json.loads(line)["image"] for line in lines] == [*map(str, paths[1:]), str(paths[0])]


def test_a_budget_that_no_size_fits_is_one_line_and_exit_code_2(release, album, capsys):
    code, lines, err = _predict(capsys, release, album, "--budget-ms", 1e-6, "--batch-size", 1)
    assert (code, lines) == (2, [])
    *_, line = err.splitlines()  # behind those about the measurement
    assert line.startswith("rsnet predict: error: no size fits into 1e-06 ms: size ")


def test_as_many_classes_are_named_as_asked_for(release, album, capsys):
    _, lines, _ = _predict(capsys, release, album, "--json", "--top", 2)
    assert [len(json.loads(line)["top"]) for line in lines] == [2, 2, 2]


def test_broken_images_are_named_and_left_out(release, album, capsys):
    (album / "bad.jpg").write_bytes(b"no image")
    (album / "cut.jpg").write_bytes((album / "b.jpg").read_bytes()[:-700])
    code, lines, err = _predict(capsys, release, album, album / "notes.txt", "--json")
    assert code == 1
    assert [json.loads(line)["image"] for line in lines] == [f"{album}/{n}" for n in ALBUM]
    bad = [line.split(": ")[0] for line in err.splitlines()]
    assert bad == [f"{album}/bad.jpg", f"{album}/cut.jpg", f"{album}/notes.txt"]
    code, rows, err = _predict(capsys, release, album)
    assert (code, len(rows), err.count("\n")) == (1, 4, 2)


def test_only_broken_images_give_an_empty_answer(release, album, capsys):
    code, lines, _ = _predict(capsys, release, album / "notes.txt", "--json")
    assert (code, lines) == (1, [])


def test_no_image_is_one_line_and_exit_code_2(release, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, lines, err = _predict(capsys, release, tmp_path / "empty")
    assert (code, lines) == (2, [])
    assert err == f"rsnet predict: error: there is no image in {tmp_path}/empty\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no image in the command"),
        (["nowhere"], "there is no file or folder nowhere"),
        (["album", "--confidence", "8"], "confidence 8.0: must be above 0, and 1 at most"),
        (["album", "--size", "40"], "size 40: this network has 64 48 32"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(release, album, capsys, monkeypatch, words, message):
    monkeypatch.chdir(album.parent)
    code, lines, err = _predict(capsys, release, *words)
    assert (code, lines, err) == (2, [], f"rsnet predict: error: {message}\n")


def test_names_that_would_move_the_cursor_are_escaped_in_the_table(release, album, capsys):
    shutil.move(album / "b.jpg", album / "red\x1b[31m\nzß.jpg")
    _, rows, _ = _predict(capsys, release, album / "red\x1b[31m\nzß.jpg")
    assert rows[1].startswith(f"{album}/red\\x1b[31m\\nzß.jpg ")
    (album / "red\x1b[31m\nzß.jpg").write_bytes(b"")
    _, _, err = _predict(capsys, release, album / "red\x1b[31m\nzß.jpg")
    assert err == f"{album}/red\\x1b[31m\\nzß.jpg: the file is empty\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "count", "bar"),
    [(["album", "--json"], 3, True), (["album"], 4, True), (["album/b.jpg"], 2, False)],
    ids=["folder as JSON", "folder as table", "file"],
)
def test_folders_have_a_progress_bar_which_keeps_off_stdout(
    release, album, capsys, monkeypatch, words, count, bar
):
    monkeypatch.chdir(album.parent)
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["predict", str(release), *words]) == 0
    assert len(capsys.readouterr().out.splitlines()) == count
    drawn = re.sub(rf"{TAKEN}|\x1b\[[\d;]*m", "", terminal.getvalue())
    assert ("3/3" in drawn) if bar else (drawn == "")


def test_no_bar_is_drawn_among_lines_on_the_same_terminal(release, album, monkeypatch):
    out, err = _Terminal(), _Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    assert main(["predict", str(release), str(album), "--json"]) == 0
    assert len(out.getvalue().splitlines()) == 3
    assert re.fullmatch(TAKEN, err.getvalue())


def test_json_is_printed_batch_by_batch(release, album, monkeypatch):
    printed: list[int] = []
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    decode = SwitchableClassifier.decode

    def spy(self, image, *name):
        if isinstance(image, str | Path):
            printed.append(len(out.getvalue().splitlines()))
        return decode(self, image, *name)

    monkeypatch.setattr(SwitchableClassifier, "decode", spy)
    assert main(["predict", str(release), str(album), "--json", "--batch-size", "1"]) == 0
    assert printed == [0, 1, 2]


@pytest.mark.parametrize("name", [".", "checkpoints/best.pt", "../release"])
def test_a_run_and_its_checkpoint_are_classified_with_as_their_release_is(
    album, tmp_path, capsys, monkeypatch, name
):
    """A network of random weights, with the loading that the other tests leave out."""
    monkeypatch.undo()
    run = runs.write_run(tmp_path / "run")
    release_run(run, tmp_path / "release")
    source = run / name
    assert main(["predict", str(source), str(album), "--json", "--size", "48"]) == 0
    out, err = capsys.readouterr()
    assert re.match(rf"(run|checkpoint|release) {source}: parallel_resnet10, sizes 64 48 32", err)
    expected = SwitchableClassifier.load(tmp_path / "release").classify(
        [album / name for name in ALBUM], size=48
    )
    found = [json.loads(line)["top"][0] for line in out.splitlines()]
    assert found == [{"class": p.classes[0], "probability": p.probabilities[0]} for p in expected]
