"""data.columnar_files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_helpers import opened

from tabletune.errors import StageError


def test_columns_of_other_types(tmp_path):
    """Whole numbers beside a null stay whole numbers; a column that is not used may hold anything."""
    table = {"q": [1, None, 3], "a": [[1, None], [], None], "image": [b"\xff\xfe"] * 3}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert [cells for _, cells in opened(tmp_path / "t.parquet").rows(["q", "a"])] == [
        ["1", "[1, null]"], ["", "[]"], ["3", ""]
    ]  # fmt: skip
    with pytest.raises(StageError, match="the column 'image' holds bytes that are no text"):
        list(opened(tmp_path / "t.parquet").rows(["image"]))
