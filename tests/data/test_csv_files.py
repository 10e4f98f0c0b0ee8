"""data.csv_files."""

import gzip
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_helpers import GOOD, HEADER, NAMES, as_csv, examples, formatted, opened, pairs, write

from tabletune.data.csv_files import find_delimiter
from tabletune.errors import StageError


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_delimiter_is_found_and_reported(tmp_path, mark, suffix):
    rows = [
        ("Is it a; b | c, or d?", "It is, I think; or not."),
        ("One, two", "a\nb"),
        ("x", "1,5"),
    ]
    text = as_csv(NAMES, rows, mark).encode()
    (tmp_path / f"t{suffix}").write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    table = opened(tmp_path / f"t{suffix}")
    assert [tuple(cells) for _, cells in table.rows(NAMES)] == rows
    assert ("tabs" if mark == "\t" else repr(mark)) in table.descriptions[0]


def test_commas_in_prose_are_no_delimiters(tmp_path):
    (tmp_path / "t.csv").write_text(
        "question, short;answer, long\nWhy, then?;Because, so.\nHow, now?;Thus, hence.\n"
    )
    assert opened(tmp_path / "t.csv").columns == ["question, short", "answer, long"]


def test_delimiter_setting_is_used_and_checked(tmp_path):
    (tmp_path / "t.csv").write_text("a;b,c;d\n1;2,3;4\n")
    assert opened(tmp_path / "t.csv", delimiter=",").columns == ["a;b", "c;d"]
    (tmp_path / "t.csv").write_text("a b~c\n1~2\n")
    assert opened(tmp_path / "t.csv", delimiter="~").columns == ["a b", "c"]
    for tab in ("tab", "\\t", "\t"):
        write(tmp_path / "t.tsv", NAMES, GOOD)
        assert opened(tmp_path / "t.tsv", delimiter=tab).columns == NAMES
    with pytest.raises(StageError, match="delimiter='::'"):
        opened(tmp_path / "t.csv", delimiter="::")


def test_excels_sep_line_sets_the_delimiter(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfsep=;\r\nquestion;answer\r\na;b, c\r\n")
    table = opened(tmp_path / "t.csv")
    assert table.columns == NAMES
    assert list(table.rows(NAMES)) == [("", ["a", "b, c"])]


def test_table_without_header_is_refused_until_header_is_false(tmp_path):
    (tmp_path / "t.csv").write_text(
        "".join(f"{'pos' if i % 2 else 'neg'},Remark {i} was so.\n" for i in range(12))
    )
    for settings_ in (
        {},
        {"columns": {"t": "text"}, "question_template": "{t}", "answer_template": "{t}"},
    ):
        with pytest.raises(StageError, match="set header: false"):
            formatted(tmp_path, tmp_path / "t.csv", **settings_)
    columns = {"question": 2, "answer": 1}
    report, splits = formatted(tmp_path, tmp_path / "t.csv", header=False, columns=columns)
    assert report["rows_in"] == 12
    assert ("Remark 0 was so.", "neg") in pairs(splits)
    by_templates = {
        "columns": {"remark": 2},
        "question_template": "Is this good? {remark}",
        "answer_template": "{1}",
    }
    assert ("Is this good? Remark 0 was so.", "neg") in pairs(
        formatted(tmp_path, tmp_path / "t.csv", header=False, **by_templates)[1]
    )


@examples(60)
@given(row=st.integers(0, 5), column=st.integers(0, 1), position=st.integers(0, 12))
def test_stray_quote_does_not_swallow_rows(tmp_path_factory, row, column, position):
    tmp_path = tmp_path_factory.mktemp("quote")
    rows = [*GOOD, ("\nWhy?", ",because"), ("Where?", "\nthere")]
    lines = [
        [cell if set(cell).isdisjoint(',"\n') else f'"{cell}"' for cell in cells] for cells in rows
    ]
    lines[row][column] = lines[row][column][:position] + '"' + lines[row][column][position:]
    (tmp_path / "t.csv").write_text(HEADER + "".join(",".join(cells) + "\n" for cells in lines))
    message = ""
    rows_read = 0
    try:
        rows_read = len(list(opened(tmp_path / "t.csv").rows(NAMES)))
    except StageError as error:
        message = str(error)
    assert rows_read == len(rows) or re.search("double quote|cells", message)


SWALLOWED = ["\t", ",", ";", "|"]


@pytest.mark.parametrize("mark", SWALLOWED)
@pytest.mark.parametrize("rows_between", [0, 1, 7])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_quote_that_swallowed_rows_is_refused(tmp_path, mark, rows_between, column):
    """It opens as a letter in one row and closes in another, in every column."""
    lines = [
        [f"Q{i}", f"Where is it, no {i}?" if mark != "," else "Where?", f"A{i}."] for i in range(20)
    ]
    lines[3][column] = '"' + lines[3][column]
    lines[4 + rows_between][column] += '"'
    text = "\n".join(mark.join(line) for line in [["id", "question", "answer"], *lines])
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(StageError, match=r"line 5: a double quote opens .* set quotes: letters"):
        list(opened(tmp_path / "t.csv").rows(["answer"]))
    table = opened(tmp_path / "t.csv", quotes="letters")
    assert [cells[0] for _, cells in table.rows(["id"])] == [line[0] for line in lines]
    assert len(list(opened(tmp_path / "t.csv", quotes="cells").rows(["id"]))) == 19 - rows_between


@pytest.mark.parametrize(
    "answer",
    [
        "Take tea, then rest.\nSleep, and drink.",
        "It costs 1,50 euro\nor 2,50 euro",
        "def f(a, b):\n    return a\n\nprint(f(1, 2))",
        "one\ntwo\nthree",
        "\n\nspaced\n\n",
    ],
)
def test_quoted_cells_of_several_lines_are_read(tmp_path, answer):
    rows = [("Where?", answer), ("When?", "Now.")]
    path = write(tmp_path / "t.csv", NAMES, rows)
    assert [tuple(cells) for _, cells in opened(path).rows(NAMES)] == rows


def test_quotes_may_be_letters(tmp_path):
    (tmp_path / "t.tsv").write_text('question\tanswer\n"Why" she asked\t"So" and 5"\n')
    with pytest.raises(StageError, match="set quotes: letters"):
        list(opened(tmp_path / "t.tsv").rows(NAMES))
    table = opened(tmp_path / "t.tsv", quotes="letters")
    assert list(table.rows(NAMES)) == [("", ['"Why" she asked', '"So" and 5"'])]
    with pytest.raises(StageError, match="quotes='none': use one of auto, cells, letters"):
        opened(tmp_path / "t.tsv", quotes="none")


def test_rows_of_empty_cells_are_left_out(tmp_path):
    text = "question,answer,note\na,b,\n,,\n , ,\nc,d,\n" + ",,\n" * 30
    (tmp_path / "t.csv").write_text(text)
    assert list(opened(tmp_path / "t.csv").rows(NAMES)) == [("", ["a", "b"]), ("", ["c", "d"])]


@pytest.mark.parametrize("above", ["FAQ,\n", "FAQ,\n,\n", "FAQ,\nVersion 3,\n\n"])
def test_title_above_the_column_names_is_skipped(tmp_path, above):
    (tmp_path / "t.csv").write_text(above + "question,answer\na,b\nc,d\n")
    table = opened(tmp_path / "t.csv")
    assert list(table.rows(NAMES)) == [("", ["a", "b"]), ("", ["c", "d"])]
    assert "column names in line" in table.descriptions[0]


def test_index_column_without_a_name_is_no_title(tmp_path):
    (tmp_path / "t.csv").write_text(",text\n0,abc\n1,def\n")
    assert opened(tmp_path / "t.csv").columns == ["", "text"]


def test_header_row_can_be_set(tmp_path):
    (tmp_path / "t.csv").write_text("made in 2020\n\nquestion;answer\na;b\n")
    with pytest.raises(StageError, match="set header_row: 3"):
        list(opened(tmp_path / "t.csv", delimiter=";").rows(NAMES))
    table = opened(tmp_path / "t.csv", header_row=3)
    assert list(table.rows(NAMES)) == [("", ["a", "b"])]


@pytest.mark.parametrize("delimiter", ['"', "\n", "\r"])
def test_a_quote_or_the_end_of_a_line_is_no_delimiter(tmp_path, delimiter):
    (tmp_path / "t.csv").write_text("question,answer\na,b\n")
    with pytest.raises(StageError, match="use auto, tab, or one character"):
        opened(tmp_path / "t.csv", delimiter=delimiter)


@pytest.mark.parametrize("first_line", ["sep=", "sep=\n", "sep=\r\n"])
def test_a_line_that_says_no_delimiter_is_passed_over(first_line):
    assert find_delimiter(first_line, tabs_first=False) == ","
    table = f"{first_line.strip()}\nquestion;answer\na;b\n"
    assert find_delimiter(table, tabs_first=False) == ";"


def test_a_title_of_one_cell_does_not_decide_the_delimiter(tmp_path):
    """It has no delimiter at all; a comma in an answer is none either."""
    text = "Remedies 2024\nquestion;answer\nCough;Tea, honey\nCold;Ginger\n"
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(StageError, match=r"line 2: .* has ';' .* set header_row: 2\."):
        list(opened(tmp_path / "t.csv").rows(["Remedies 2024"]))


def test_one_column_stays_one_column():
    assert find_delimiter("text\nTea; honey\nRest\n", tabs_first=False) == ","
