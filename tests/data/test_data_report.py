"""data.report."""

import re

import pytest
from table_helpers import GOOD, NAMES, formatted, jsonl, pairs, write

from tabletune.data.report import (
    changes_table,
    first_rows,
    rows_table,
    sentences_on_test_split,
    splits_table,
)
from tabletune.data.tables import open_table
from tabletune.errors import StageError


def test_first_rows_are_those_of_the_table_with_long_texts_cut(tmp_path):
    rows = [("007", "a" * 200), ("", "None"), ("x", "y"), ("fourth", "row")]
    table = open_table(write(tmp_path / "t.csv", ["code", "text"], rows))
    shown = first_rows(table)
    assert list(shown["code"]) == ["007", "", "x"]
    assert list(shown["text"]) == ["a" * 90 + "…", "None", "y"]


def test_first_rows_of_a_wide_table_have_names_so_that_columns_stand_below_another(tmp_path):
    columns = [f"c{i}" for i in range(9)]
    table = open_table(write(tmp_path / "t.csv", columns, [columns[::-1], columns[::-1]]))
    assert list(first_rows(table).index) == ["row 1", "row 2"]


def test_rows_table_adds_up_from_the_first_line_to_what_is_left(tmp_path):
    rows = [(f"Question {i % 10}?", f"Answer {i % 10} \u00a0.") for i in range(30)]
    table = write(tmp_path / "t.csv", NAMES, rows)
    report, _ = formatted(tmp_path, table, collapse_spaces=True)
    counts = rows_table(report)["rows"]
    left = list(counts.index).index("left")
    assert counts.iloc[:left].sum() == counts["left"] == 10
    assert counts["changed: spaces"] == 30


def test_an_example_of_a_change_is_cut_at_a_whole_word_and_says_so(tmp_path):
    rows = [(f"Question {i}?", f"Answer  {i} " + "of many words " * 9) for i in range(8)]
    report, _ = formatted(
        tmp_path, write(tmp_path / "t.csv", NAMES, rows), collapse_spaces=True, max_length=256
    )
    before, after = changes_table(report).loc["spaces"]
    assert before.startswith("'Answer  0 of many words")
    for text in (before, after):
        assert text.endswith((" of' …", " many' …", " words' …"))


def test_splits_table_counts_rows_and_questions(tmp_path):
    rows = [(f"Question {i % 20}?", f"Answer {i}.") for i in range(40)]
    report, splits = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    counts = splits_table(report)
    assert counts["rows"].to_dict() == {name: len(split) for name, split in splits.items()}
    assert counts["questions"].sum() == 20


def test_html_is_noted(tmp_path):
    rows = [{"question": f"How {i}?", "answer": f"<p>Hold {i} &amp; press.</p>"} for i in range(8)]
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows))
    assert "8 texts look like HTML" in report["notes"][0]
    assert all("<p>" in answer for _, answer in pairs(splits))
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows), html_to_text=True)
    assert ("How 1?", "Hold 1 & press.") in pairs(splits)
    assert report["changed"]["HTML to text"]["rows"] == 8


def test_losing_a_tenth_stops_with_the_setting_that_keeps_them(tmp_path):
    rows = [(f"Question {i}?", f"Answer {i}. " * (40 if i % 4 == 0 else 1)) for i in range(40)]
    table = write(tmp_path / "t.csv", NAMES, rows)
    with pytest.raises(
        StageError, match=r"10 of 40 rows would be lost.*10 too long \(max_length: \d+ keeps 95%\)"
    ) as caught:
        formatted(tmp_path, table, max_length=64)
    keeps = int(re.search(r"max_length: (\d+)", str(caught.value))[1])
    assert formatted(tmp_path, table, max_length=keeps)[0]["rows_out"] >= 38
    share = float(re.search(r"max_dropped: ([\d.]+)\.", str(caught.value))[1])
    report, _ = formatted(tmp_path, table, max_length=64, max_dropped=share)
    assert report["dropped"] == {"too long": 10}
    assert report["tokens"]["over_max_length"] == 10
    assert report["tokens"]["max"] <= 64
    assert report["rows_out"] == 30


def test_max_length_that_leaves_no_row(tmp_path):
    with pytest.raises(StageError, match=r"4 of 4 rows would be lost.*max_length: "):
        formatted(tmp_path, write(tmp_path / "t.csv", NAMES, GOOD), max_length=5)


def test_copies_are_not_lost(tmp_path):
    """What they say is still there."""
    rows = [(f"Question {i % 10}?", f"Answer {i % 10}.") for i in range(30)]
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    assert report["dropped"] == {"duplicate": 20}
    assert report["rows_out"] == 10


def test_rows_longer_than_the_context_are_noted(tmp_path):
    rows = [(f"Question {i}?", "word " * 400) for i in range(6)]
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    assert (
        "6 examples are longer than the 512 tokens that this model was made to read at once."
        in report["notes"]
    )


def test_leaks_are_counted_by_row(tmp_path):
    write(
        tmp_path / "t" / "train.csv", NAMES, [(f"Question {i}?", f"Answer {i}.") for i in range(50)]
    )
    write(tmp_path / "t" / "validation.csv", NAMES, [(f"Other {i}?", "x") for i in range(5)])
    same = [("QUESTION 1", "x"), ("Question 1?", "y"), ("question 2?", "Answer 2."), ("new?", "z")]
    write(tmp_path / "t" / "test.csv", NAMES, same)
    report, _ = formatted(tmp_path, tmp_path / "t")
    assert report["leaks"] == {"test": 3}
    assert report["splits"] == {
        "train": 50,
        "validation": 5,
        "test": 4,
    }
    assert not formatted(tmp_path, tmp_path / "t" / "train.csv")[0]["leaks"]


def test_small_test_split_is_noted(tmp_path):
    notes = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, GOOD))[0]["notes"]
    assert (
        "Too few questions for an interval: validation and test. More rows would make more of them."
        in notes
    )


def test_answers_that_stand_in_training_are_counted(tmp_path):
    """Rows that ask differently and have one answer may be on both sides."""
    rows = [(f"Question {i}?", f"Answer {i // 3}.") for i in range(60)]
    report, splits = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    in_training = {answer for _, answer in splits["train"]}
    for name in ("validation", "test"):
        count = sum(answer in in_training for _, answer in splits[name])
        assert count > 0
        assert report["answer_leaks"][name] == count
        assert any(
            f"{count} of {len(splits[name])} rows of the {name}" in n for n in report["notes"]
        )
    sentences = sentences_on_test_split(report)
    assert "None of them is asked in training." in sentences
    assert (
        f"The answers of {report['answer_leaks']['test']} of these rows stand in training"
        in sentences[-1]
    )


def test_answers_of_their_own_are_no_leaks(tmp_path):
    rows = [(f"Question {i}?", f"Answer {i}.") for i in range(60)]
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    assert report["answer_leaks"] == {}
    assert len(sentences_on_test_split(report)) == 2


def test_questions_that_stand_in_training_are_said(tmp_path):
    for name in ("train", "test"):
        rows = [(f"Question {i}?", f"{name} {i}.") for i in range(20)]
        write(tmp_path / "t" / f"{name}.csv", NAMES, rows)
    report, _ = formatted(tmp_path, tmp_path / "t")
    assert any(
        text.startswith("But ") and "ask what is asked" in text
        for text in sentences_on_test_split(report)
    )


def test_table_of_copies_names_the_setting_that_keeps_them(tmp_path):
    rows = [(f"Question {i % 10}?", f"Answer {i % 10}.") for i in range(30)]
    table = write(tmp_path / "t.csv", NAMES, rows)
    report, _ = formatted(tmp_path, table)
    assert any("keep_duplicates: true" in note for note in report["notes"])
    report, _ = formatted(tmp_path, table, keep_duplicates=True)
    assert report["rows_out"] == 30
    assert not report["dropped"]
