"""data.workbooks."""

from datetime import datetime, timedelta

import openpyxl
import pytest
from table_helpers import NAMES, formatted, opened

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


def workbook(path, *rows, merged=(), formats=()):
    """A workbook of one sheet with these rows; `formats` are (cell, number format), `merged` are
    ranges.
    """
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for cell, number_format in formats:
        book.active[cell].number_format = number_format
    for cells in merged:
        book.active.merge_cells(cells)
    book.save(path)
    return path


def rows_of(path, **parameters):
    return [cells for _, cells in opened(path, **parameters).rows(["Question", "Answer"])]


NAMED = ["Question", "Answer"]
ROWS = [["Where?", "Here."], ["When?", "Now."]]


def test_cells_are_what_the_sheet_shows(tmp_path):
    rows = [
        ["a", datetime(2026, 3, 1)],
        ["b", 0.15],
        ["c", 12.5],
        ["d", 7],
        ["e", timedelta(hours=30)],
    ]
    formats = ["DD.MM.YYYY", "0%", '#,##0.00 "€"', "000", "[h]:mm"]
    path = workbook(
        tmp_path / "t.xlsx",
        NAMED,
        *rows,
        formats=[(f"B{line}", form) for line, form in enumerate(formats, start=2)],
    )
    assert [answer for _, answer in rows_of(path)] == [
        "01.03.2026",
        "15%",
        "12.50 €",
        "007",
        "30:00",
    ]


@pytest.mark.parametrize(
    "above",
    [
        [["Questions of 2026"]],
        [["Questions of 2026", None], [None, None]],
        [["Desk"], ["Version 3"], []],
        [[], []],
    ],
)
def test_title_rows_are_skipped(tmp_path, above):
    path = workbook(tmp_path / "t.xlsx", *above, NAMED, *ROWS)
    assert rows_of(path) == ROWS
    assert f"column names in row {len(above) + 1}" in opened(path).descriptions[0]


def test_title_over_merged_cells_is_skipped(tmp_path):
    path = workbook(tmp_path / "t.xlsx", ["Questions", None], NAMED, *ROWS, merged=["A1:B1"])
    assert rows_of(path) == ROWS


def test_header_row_can_be_set(tmp_path):
    path = workbook(tmp_path / "t.xlsx", ["a", "b"], ["c", "d"], NAMED, *ROWS)
    assert opened(path).columns == ["a", "b"]
    assert rows_of(path, header_row=3) == ROWS
    with pytest.raises(StageError, match=r"header_row=9.*has no rows from that line on"):
        opened(path, header_row=9)


def test_sheet_with_a_table_is_found_behind_a_cover(tmp_path):
    path = workbook(tmp_path / "t.xlsx", NAMED, *ROWS)
    book = openpyxl.load_workbook(path)
    book.create_sheet("Empty", 0)
    cover = book.create_sheet("Cover", 1)
    cover.append(["All about the desk"])
    cover.append(["Version 3"])
    book.save(path)
    assert rows_of(path) == ROWS
    assert (
        "sheet 'Sheet' of 3 (dataset_config names another: Empty, Cover)"
        in opened(path).descriptions[0]
    )


def test_hidden_sheet_comes_last(tmp_path):
    path = workbook(tmp_path / "t.xlsx", NAMED, ["old", "old"])
    book = openpyxl.load_workbook(path)
    book.active.sheet_state = "hidden"
    sheet = book.create_sheet("New")
    for row in [NAMED, *ROWS]:
        sheet.append(row)
    book.save(path)
    assert rows_of(path) == ROWS


def test_merged_cells_carry_their_value_down(tmp_path):
    rows = [["Where?", "Here."], [None, "There."], [None, "Everywhere."], ["When?", "Now."]]
    path = workbook(tmp_path / "t.xlsx", NAMED, *rows, merged=["A2:A4"])
    assert [question for question, _ in rows_of(path)] == ["Where?"] * 3 + ["When?"]


def test_formula_that_was_never_computed_is_refused(tmp_path):
    path = workbook(tmp_path / "t.xlsx", NAMED, ["Where?", '="He" & "re"'])
    with pytest.raises(
        StageError, match=r"cell B2: the formula .* was never computed. Open the workbook"
    ):
        opened(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    rows = [["Where?", "old", "Here."], ["When?", "old", "Now."]]
    path = workbook(tmp_path / "t.xlsx", ["question", "answer", "answer"], *rows)
    with pytest.raises(StageError, match="more than one column 'answer'"):
        formatted(tmp_path, path)


def test_column_without_a_name_has_its_letter(tmp_path):
    path = workbook(tmp_path / "t.xlsx", ["Question", "Answer", None], ["Where?", "Here.", "x"])
    assert opened(path).columns == ["Question", "Answer", "C"]
