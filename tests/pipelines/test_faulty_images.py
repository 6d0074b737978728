"""JPEGs that decode with a warning: listed, encoded anew with a word, left out on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.utils.errors import UsageError
from tests.conftest import needs_ffcv, write_photo
from tests.helpers.bad_images import loaders_of, truncate
from tests.helpers.betons import sidecar_of
from tests.helpers.formats import SAME

WORDS = "Corrupt JPEG data: premature end of data segment"


def _hole(path: Path) -> None:
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def _half_is_zeros(path: Path) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(half - 2) + b"\xff\xd9")


def _half_is_missing(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff\xd9")


def _bytes_too_many(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2] + bytes(5) + b"\xff\xd9")


DAMAGES = (_hole, _half_is_zeros, _half_is_missing, _bytes_too_many)
NAMES = [f"ant/{i:03}.JPEG" for i in range(0, 4 * len(DAMAGES), 4)]


@pytest.fixture
def faulty(data) -> Path:
    for name, damage in zip(NAMES, DAMAGES, strict=True):
        damage(data / "train" / name)
    return data


def _listed(data: Path) -> dict[str, str]:
    return json.loads((data / "verified.json").read_text())["splits"]["train"]["faulty"]


@pytest.mark.parametrize("workers", [1, 3])
def test_verify_lists_what_decodes_with_errors_in_the_decoders_words(faulty, run, workers):
    truncate(faulty / "train" / "ant" / "001.JPEG")
    code, out, err = run(faulty, "--workers", workers)
    assert (code, err) == (1, "")
    assert list(_listed(faulty)) == NAMES
    assert all(words.startswith("Corrupt JPEG data: ") for words in _listed(faulty).values())
    assert f"{faulty}/train/{NAMES[2]}: decodes with errors: {WORDS}\n" in out
    assert f"{faulty}/train: 1 of 25 images are bad\n" in out
    assert (
        f"{faulty}/train: 4 more decode with errors; --skip-bad --strict leaves them out\n" in out
    )
    assert run(faulty)[1].count("decodes with errors") == 4  # from the report


def test_what_decodes_with_errors_is_not_bad(faulty, run):
    assert run(faulty)[0] == 0


def test_other_formats_warnings_are_of_no_pixels(data, run):
    (data / "val" / "ant" / "odd.png").write_bytes(SAME["png turned"])
    _hole(data / "val" / "ant" / "000.JPEG")
    run(data)
    content = json.loads((data / "verified.json").read_text())["splits"]["val"]
    assert list(content["faulty"]) == ["ant/000.JPEG"]


def test_strict_leaves_out_both_lists(faulty, run, capsys):
    truncate(faulty / "train" / "ant" / "001.JPEG")
    run(faulty)
    assert loaders_of(faulty, skip_bad=True).train.schedule.samples == 24
    capsys.readouterr()
    assert loaders_of(faulty, skip_bad=True, strict=True).train.schedule.samples == 20
    assert "left out 5 of 25 images of train" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--strict: add --skip-bad"):
        loaders_of(faulty, strict=True)


def test_a_report_of_the_first_version_serves_without_strict(faulty, run):
    run(faulty)
    report = faulty / "verified.json"
    content = json.loads(report.read_text())
    content["version"] = 1
    for split in content["splits"].values():
        del split["faulty"], split["max_megapixels"]
    report.write_text(json.dumps(content))
    assert loaders_of(faulty, skip_bad=True).train.schedule.samples == 25
    with pytest.raises(UsageError, match="does not say which images decode with errors; rsnet"):
        loaders_of(faulty, skip_bad=True, strict=True)
    run(faulty)
    assert list(_listed(faulty)) == NAMES


def test_another_limit_is_verified_anew(data, run):
    assert run(data)[0] == 0
    code, out, _ = run(data, "--max-megapixels", 0.0001)
    assert code == 1
    assert "pixels are more than 0.0001 megapixels" in out
    assert run(data)[0] == 0


@needs_ffcv
def test_the_converter_names_what_it_encoded_anew_and_why(faulty, tmp_path, convert):
    write_photo(faulty / "train" / "bee" / "x.JPEG", 60, 60, seed=3)
    (faulty / "train" / "bee" / "x.JPEG").write_bytes(SAME["jpeg cmyk"])
    (faulty / "train" / "bee" / "y.png").write_bytes(SAME["png"])
    code, out, _ = convert("--data", faulty, "--output", tmp_path / "b")
    assert code == 0
    assert "train.beton: decoded and stored anew: 4 (decodes with errors: ant/000.JPEG, " in out
    assert "train.beton: decoded and stored anew: 1 (PNG RGB: bee/y.png)" in out
    encoded = sidecar_of(tmp_path / "b" / "train.beton")["encoded"]
    assert encoded["JPEG CMYK"] == ["bee/x.JPEG"]
    assert NAMES[2] in encoded[f"decodes with errors: {WORDS}"]
    assert "(PNG RGB" in convert("--data", faulty, "--output", tmp_path / "b")[1]


@needs_ffcv
def test_a_strict_conversion_leaves_them_out(faulty, tmp_path, convert):
    arguments = ["--data", faulty, "--output", tmp_path / "b"]
    assert "--strict: add --skip-bad" in convert(*arguments, "--strict")[2]
    assert convert(*arguments)[0] == 0
    code, _, err = convert(*arguments, "--skip-bad", "--strict")
    assert code == 2
    assert "train.beton exists already, with 4 images that decode with errors" in err
    code, out, _ = convert("--data", faulty, "--output", tmp_path / "c", "--skip-bad", "--strict")
    assert code == 0
    assert "lacks 4 of 25 images" in out
    skipped = sidecar_of(tmp_path / "c" / "train.beton")["skipped"]
    assert [entry["image"] for entry in skipped] == NAMES
    assert skipped[2]["reason"] == f"decodes with errors: {WORDS}"
