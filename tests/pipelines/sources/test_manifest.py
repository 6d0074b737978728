"""Tables of images: labels, columns, and what is wrong with a table in one line."""

from __future__ import annotations

import os

import pytest

from pipelines.sources import manifest
from pipelines.sources.options import SplitOptions
from pipelines.sources.shards import open_shards
from pipelines.sources.splits import announce, kind_of, open_splits
from pipelines.utils.errors import DataError, UsageError
from tests.conftest import write_photo
from tests.pipelines.sources.conftest import write_table


@pytest.fixture
def table(tmp_path):
    """Write a table of rows (path, label, ...), whose photos are there; returns its path."""

    def write(rows, columns=("path", "label", "split"), name="labels.csv", missing=()):
        for row in rows:
            if row[0] and row[0] not in missing:
                write_photo(tmp_path / row[0], 40, 40, seed=len(row[0]))
        return write_table(tmp_path / name, [dict(zip(columns, row, strict=False)) for row in rows])

    return write


def test_numbers_keep_their_order_and_names_are_sorted(table):
    by_number = table([(f"{i}.jpg", label) for i, label in enumerate([10, 9, 0, 9])])
    found = manifest.read(by_number, "train")
    assert found.classes == ["0", "9", "10"]
    assert found.labels.tolist() == [2, 1, 0, 1]
    by_name = table([("a.jpg", "b"), ("b.jpg", "10"), ("c.jpg", "9")])
    assert manifest.read(by_name, "train").classes == ["10", "9", "b"]
    below_zero = table([(f"{i}.jpg", label) for i, label in enumerate([10, -1, 2])])
    assert manifest.read(below_zero, "train").classes == ["-1", "2", "10"]
    padded = table([("a.jpg", "01"), ("b.jpg", "1")])
    assert manifest.read(padded, "train").classes == ["01", "1"]


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.parquet"])
def test_labels_may_be_numbers_of_the_format(table, name):
    found = manifest.read(table([("a.jpg", 11), ("b.jpg", 2)], name=name), "train")
    assert found.classes == ["2", "11"]


def test_a_split_has_the_classes_of_all_rows(table):
    file = table(
        [
            ("a.jpg", "x", "train"),
            ("b.jpg", "y", "train"),
            ("c.jpg", "x", "validation"),
            ("d.jpg", "z", "test"),
        ]
    )
    train, val = open_splits(file)
    assert train.classes == val.classes == ["x", "y", "z"]
    assert (train.names, val.names) == (["a.jpg", "b.jpg"], ["c.jpg"])


def test_two_tables_may_be_given(table):
    train_file = table([("a.jpg", "x"), ("b.jpg", "y")], name="train.csv")
    val_file = table([("c.jpg", "y")], name="val.csv")
    train, val = open_splits(train_file, SplitOptions(val_data=val_file))
    assert val.classes == train.classes == ["x", "y"]
    assert val.labels.tolist() == [1]


def test_a_table_without_splits_needs_validation_images(table):
    with pytest.raises(UsageError, match="has no validation images: add --val-data or --val-frac"):
        open_splits(table([("a.jpg", "x"), ("b.jpg", "y")]))


def test_hugging_faces_column_is_known(table):
    file = table([("a.jpg", 0)], columns=("file_name", "label"), name="metadata.csv")
    assert manifest.read(file, "train").names == ["a.jpg"]


def test_a_class_may_be_called_na_or_null(table):
    file = table([("a.jpg", "NA"), ("b.jpg", "null")])
    assert manifest.read(file, "train").classes == ["NA", "null"]


def test_a_table_of_other_labels_has_another_fingerprint(table):
    one = manifest.read(table([("a.jpg", "x"), ("b.jpg", "y")]), "train").fingerprint()
    other = manifest.read(table([("a.jpg", "y"), ("b.jpg", "x")]), "train").fingerprint()
    assert one != other


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a.jpg", "x")], ("image", "label"), r"labels.csv has no column path \(it has image, label\)"),
        ([("a.jpg", "x")], ("path", "kind"), r"has no column label \(it has path, kind\)"),
        ([("a.jpg", "x"), ("b.jpg", "")], ("path", "label"), "row 2 has '' in column label; a name or"),
        ([("a.jpg", "x"), ("a.jpg", "y")], ("path", "label"), "rows 1 and 2 have the same path, a.jpg"),
        ([("a.jpg", "x"), ("./a.jpg", "y")], ("path", "label"), "rows 1 and 2 have the same path, "),
        ([("a.jpg", "x"), ("b.jpg", "x ")], ("path", "label"), "row 2 has 'x ' in column label: remove"),
        ([("a.jpg", "x")], ("path", " label"), r"has no column label \(it has path, ' label'\)"),
        ([("a.jpg", "x", "test")], ("path", "label", "split"), "has no rows of split train"),
        ([("a.jpg", "x", True)], ("path", "label", "weight"), "row 1 has the weight True; above 0"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_table_is_one_line(table, rows, columns, message):
    with pytest.raises(UsageError, match=message):
        manifest.read(table(rows, columns), "train")


def test_images_that_are_not_there_are_named(table):
    file = table([("a.jpg", "x"), ("b.jpg", "x")], ("path", "label"), missing=("b.jpg",))
    with pytest.raises(UsageError, match=r"labels.csv lists files that are not there: .*/b\.jpg"):
        manifest.read(file, "train")


def test_a_path_with_a_zero_byte_is_of_no_file(tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"path": "a\\u0000.jpg", "label": "x"}\n')
    with pytest.raises(UsageError, match=r"labels\.jsonl lists files that are not there: "):
        manifest.read(tmp_path / "labels.jsonl", "train")


def test_a_table_that_is_not_there_is_a_mistake_of_the_command(tmp_path):
    for suffix in manifest.SUFFIXES:
        with pytest.raises(UsageError, match=f"^--data: there is no file .*/none{suffix}$"):
            open_splits(tmp_path / f"none{suffix}")


def test_what_is_no_table_is_said(tmp_path):
    for name, content in (("a.parquet", b"x"), ("a.jsonl", b"{"), ("a.csv", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} cannot be read as a table"):
            manifest.read(tmp_path / name, "train")


def test_rows_of_other_splits_are_counted_and_paths_of_both_splits_warned_of(table, capsys):
    rows = [("a.jpg", "x", "train"), ("b.jpg", "x", "train"), ("b.jpg", "x", "val")]
    announce(*open_splits(table([*rows, ("c.jpg", "x", "vall"), ("c.jpg", "x", "test")])))
    out, err = capsys.readouterr()
    assert out.count("; 2 rows of other splits passed over (vall 1, test 1)\n") == 2
    assert "/labels.csv (val) are also training images (b.jpg)\n" in err
    rows = [("a.jpg", "x", "train"), ("./a.jpg", "x", "val")]
    announce(*open_splits(table(rows)))
    assert "are also training images (./a.jpg)\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["path", "label", "split", "weight"])
def test_a_column_that_is_there_twice_is_named(tmp_path, name):
    file = tmp_path / "labels.csv"
    file.write_text(f"path,label,split,weight,{name}\na.jpg,1,train,1,1\n")
    with pytest.raises(UsageError, match=f"labels.csv has the column {name} twice"):
        manifest.read(file, "train")


def test_a_fractional_label_is_refused(table):
    file = table([("a.jpg", 0.5)], ("path", "label"), name="labels.parquet")
    with pytest.raises(UsageError, match=r"row 1 has 0\.5 in column label"):
        manifest.read(file, "train")


def test_lines_of_json_may_have_labels_of_both_kinds_dates_and_columns_of_any(tmp_path):
    write_photo(tmp_path / "a.jpg", 40, 40, seed=0)
    write_photo(tmp_path / "b.jpg", 40, 40, seed=1)
    rows = [
        '{"path": "a.jpg", "label": 1, "age": 7}',
        '{"path": "b.jpg", "label": "2020-01-01", "age": "x"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows, "", ""]))
    found = manifest.read(tmp_path / "t.jsonl", "train")
    assert found.classes == ["1", "2020-01-01"]
    for line, message in (("[1]", "line 3 is no object"), ("{", "line 3: ")):
        (tmp_path / "t.jsonl").write_text("\n".join([*rows, line]))
        with pytest.raises(UsageError, match=rf"t\.jsonl cannot be read as a table: {message}"):
            manifest.read(tmp_path / "t.jsonl", "train")


def test_a_table_in_a_folder_whose_name_looks_like_a_pattern_is_a_table(tmp_path):
    (tmp_path / "st*ar").mkdir()
    write_photo(tmp_path / "st*ar" / "a.jpg", 40, 40, seed=0)
    file = write_table(tmp_path / "st*ar" / "t.csv", [{"path": "a.jpg", "label": "x"}])
    assert kind_of(file) == "manifest"


def test_a_pipe_is_no_table_no_shard_and_no_image(tmp_path):
    """Whoever opens one waits for ever."""
    for name in ("t.csv", "train-0.tar"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=r"there is no file .*/t\.csv"):
        manifest.read(tmp_path / "t.csv", "train")
    with pytest.raises(DataError, match=r"there is no file .*/train-0\.tar"):
        open_shards(tmp_path, "train")
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "u.csv").write_text("path,label\na.jpg,x\n")
    with pytest.raises(UsageError, match=r"u\.csv lists files that are not there: .*a\.jpg"):
        manifest.read(tmp_path / "u.csv", "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"path": "a.jpg", "label": "x", "meta": ' + "[" * 9999 + "]" * 9999 + "}", "line 1: "),
        ('{"path": "a.jpg", "label": "\\ud800"}', "in column label, which is no text"),
        (
            '{"path": "a.jpg", "label": "x", "weight": 1' + "0" * 400 + "}",
            "row 1 has the weight 1000",
        ),
    ],
)
def test_what_python_cannot_hold_is_a_mistake_of_the_table(tmp_path, row, message):
    write_photo(tmp_path / "a.jpg", 40, 40, seed=0)
    (tmp_path / "t.jsonl").write_text(row)
    with pytest.raises(UsageError, match=message):
        manifest.read(tmp_path / "t.jsonl", "train")


def test_a_label_of_thousands_of_digits_is_a_name(tmp_path):
    write_photo(tmp_path / "a.jpg", 40, 40, seed=0)
    (tmp_path / "t.csv").write_text(f"path,label\na.jpg,{'1' * 5000}\n")
    assert manifest.read(tmp_path / "t.csv", "train").classes == ["1" * 5000]
