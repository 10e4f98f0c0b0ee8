"""data.workbooks."""

import openpyxl
import pytest
from table_helpers import NAMES, opened

from tabletune.errors import StageError


def test_sheet_is_read_and_chosen(tmp_path):
    book = openpyxl.Workbook()
    for row in [
        ["question", "answer"],
        ["a", 7],
        ["b", 1.5],
        [None, None],
        ["c", "007"],
        ["NA", None],
    ]:
        book.active.append(row)
    book.create_sheet("Other").append(["q", "a"])
    book["Other"].append(["x", "y"])
    book.save(tmp_path / "t.xlsx")
    table = opened(tmp_path / "t.xlsx")
    assert [cells for _, cells in table.rows(NAMES)] == [
        ["a", "7"],
        ["b", "1.5"],
        ["c", "007"],
        ["NA", ""],
    ]
    assert "'Sheet' of 2" in table.descriptions[0]
    assert list(opened(tmp_path / "t.xlsx", dataset_config="Other").rows(["q", "a"])) == [
        ("", ["x", "y"])
    ]
    with pytest.raises(StageError, match=r"no such sheet. It has: Sheet, Other"):
        opened(tmp_path / "t.xlsx", dataset_config="Othr")
    assert opened(tmp_path / "t.xlsx", header=False).columns == ["1", "2"]
