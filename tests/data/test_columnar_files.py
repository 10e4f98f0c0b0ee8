"""data.columnar_files."""

from datetime import timedelta

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_helpers import opened

from tabletune.errors import StageError


def test_columns_of_other_types(tmp_path):
    """Whole numbers beside a null stay whole numbers; a column that is not used may hold
    anything.
    """
    table = {"q": [1, None, 3], "a": [[1, None], [], None], "image": [b"\xff\xfe"] * 3}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert [cells for _, cells in opened(tmp_path / "t.parquet").rows(["q", "a"])] == [
        ["1", "[1, null]"], ["", "[]"], ["3", ""]
    ]  # fmt: skip
    with pytest.raises(StageError, match="the column 'image' contains bytes that are not text"):
        list(opened(tmp_path / "t.parquet").rows(["image"]))


def first_texts(path, column="a"):
    return [cells[0] for _, cells in opened(path).rows([column])]


@pytest.mark.parametrize(
    ("values", "data_type", "texts"),
    [
        ([0.1, 0.3, 12.5, 2.0], pa.float32(), ["0.1", "0.3", "12.5", "2.0"]),
        ([[0.1, 0.2]], pa.list_(pa.float32()), ["[0.1, 0.2]"]),
        ([{"x": 0.3}], pa.struct([("x", pa.float32())]), ['{"x": 0.3}']),
        ([[("x", 1)]], pa.map_(pa.string(), pa.int64()), ['{"x": 1}']),
        (
            [{"x": 1}, {"y": 2}],
            pa.struct([("x", pa.int64()), ("y", pa.int64())]),
            ['{"x": 1}', '{"y": 2}'],
        ),
        ([True], pa.bool_(), ["true"]),
        ([timedelta(hours=30)], pa.duration("s"), ["30:00:00"]),
        ([[1, None]], pa.list_(pa.int64()), ["[1, null]"]),
    ],
)
def test_values_are_those_of_the_source(tmp_path, values, data_type, texts):
    pq.write_table(pa.table({"a": pa.array(values, data_type)}), tmp_path / "t.parquet")
    assert first_texts(tmp_path / "t.parquet") == texts


def labels():
    features = datasets.Features({"a": datasets.ClassLabel(names=["world", "sport"])})
    return datasets.Dataset.from_dict({"a": [1, 0, -1]}, features=features)


def test_class_labels_have_their_names_in_parquet(tmp_path):
    labels().to_parquet(tmp_path / "t.parquet")
    assert first_texts(tmp_path / "t.parquet") == ["sport", "world", ""]


def test_class_labels_have_their_names_in_arrow(tmp_path):
    labels().save_to_disk(tmp_path / "saved")
    assert first_texts(tmp_path / "saved") == ["sport", "world", ""]


def test_class_labels_in_lists_have_their_names(tmp_path):
    features = datasets.Features({"a": [datasets.ClassLabel(names=["world", "sport"])]})
    rows = datasets.Dataset.from_dict({"a": [[1, 0]]}, features=features)
    rows.to_parquet(tmp_path / "t.parquet")
    assert first_texts(tmp_path / "t.parquet") == ['["sport", "world"]']


def test_saved_folder_adds_no_fields(tmp_path):
    rows = datasets.Dataset.from_list([{"a": {"x": 1}}, {"a": {"y": 2}}])
    rows.save_to_disk(tmp_path / "saved")
    assert first_texts(tmp_path / "saved") == ['{"x": 1}', '{"y": 2}']
