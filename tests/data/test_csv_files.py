"""data.csv_files."""

import gzip
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_helpers import GOOD, HEADER, NAMES, as_csv, examples, formatted, opened, pairs, write

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
    assert table.columns == NAMES and list(table.rows(NAMES)) == [("", ["a", "b, c"])]


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
    assert report["rows_in"] == 12 and ("Remark 0 was so.", "neg") in pairs(splits)
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
    try:
        assert len(list(opened(tmp_path / "t.csv").rows(NAMES))) == len(rows)
    except StageError as error:
        assert re.search("double quote|cells", str(error))
