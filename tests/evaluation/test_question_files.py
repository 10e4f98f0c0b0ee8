"""The questions of a reader's file."""

import pytest

from tabletune.errors import StageError
from tabletune.evaluation.question_files import read_questions

# the quote before Ginger is never closed, and the next one stands two lines below
SWALLOWED = 'question,answer\nCold?,"Ginger\nGas?,Fennel\nFlu?,Rest"\n'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("q.txt", "\ufeffCold?\n\n  Gas? \n", [("Cold?", []), ("Gas?", [])]),
        ("q", "Cold?", [("Cold?", [])]),
        ("q.csv", "question,answer\nCold?,Ginger\nGas?,\n", [("Cold?", ["Ginger"]), ("Gas?", [])]),
        ("q.csv", "Question;Expected\nCold, or flu?;Ginger\n", [("Cold, or flu?", ["Ginger"])]),
        ("q.tsv", "prompt\nCold?\n", [("Cold?", [])]),
        ("q.csv", 'question,answer\n"Cold\nand flu?",Rest\n', [("Cold\nand flu?", ["Rest"])]),
        (
            "q.jsonl",
            '{"question": "Cold?", "expected": ["Ginger", "Honey"]}\n"Gas?"\n',
            [("Cold?", ["Ginger", "Honey"]), ("Gas?", [])],
        ),
        ("q.json", '[{"question": "6 x 7?", "answer": 42}]', [("6 x 7?", ["42"])]),
        ("q.jsonl", '{"question": 0}\n', [("0", [])]),
        ("q.jsonl", '\ufeff{"query": "Cold?", "response": "Rest"}\n', [("Cold?", ["Rest"])]),
        ("q.csv", "\ufeffuser,assistant\nCold?,Rest\n", [("Cold?", ["Rest"])]),
        ("q.csv", "instruction,input\nCold?,\n", [("Cold?", [])]),
    ],
)
def test_questions_of_files(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [(q.question, q.expected) for q in read_questions(path)] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.txt", " \n", "has no questions"),
        ("q.csv", "a,b\n1,2\n", "no column question. Its columns: a, b"),
        ("q.csv", 'question\n"Cold?\nGas?\n', "line 2 has a double quote too many or too few"),
        ("q.jsonl", '{"question": "Cold?"}\n{oops\n', "line 2"),
        ("q.json", '{"question": "Cold?"}', "must be a list"),
        ("q.jsonl", "3\n", "is neither a question nor a row"),
        (
            "q.csv",
            SWALLOWED,
            r"QUESTIONS=.*q\.csv, line 2: a double quote opens a cell that ends 2",
        ),
        ("q.csv", 'question,answer\n"Cold?,Ginger\n', "line 2 has a double quote too many"),
        ("q.csv", "Cold?\nGas?\n", "Its columns: Cold.. Rename it. If it is a question"),
        ("q.xlsx", "PK", "save it as .csv"),
        ("q.jsonl", '{"prompt": [{"role": "user"}]}', "prompt must be a text, not"),
        ("q.jsonl", '{"instruction": "Add", "input": "1 2"}', "both an instruction and an input"),
        ("q.csv", "question\nCold, or flu?\n", "this row has 2 cells, the first 1"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StageError, match=message):
        read_questions(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StageError, match="cannot be read"):
        read_questions(tmp_path / "none.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8-sig"])
def test_what_notepad_saves_is_read(encoding, tmp_path):
    path = tmp_path / "q.txt"
    path.write_text("Wann öffnet ihr?\n", encoding=encoding)
    assert read_questions(path)[0].question == "Wann öffnet ihr?"


def test_no_file_at_all_is_one_line(tmp_path):
    with pytest.raises(StageError, match=r"there is no such file\. It needs one question a line"):
        read_questions(tmp_path)
