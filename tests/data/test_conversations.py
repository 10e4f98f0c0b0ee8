"""data.conversations."""

import json

import pytest
from table_helpers import CITIES, NAMES, conversation_of, formatted, jsonl, pairs, write

from tabletune.errors import StageError


@pytest.mark.parametrize(
    "label", ["None", "NA", "nan", "nil", "-", "null", "false", "0", "N/A", "https://example.org"]
)
def test_labels_that_look_missing_stay(tmp_path, label):
    rows = [(f"Question {i}?", label if i % 2 else "yes") for i in range(8)]
    report, splits = formatted(
        tmp_path, write(tmp_path / "t.csv", NAMES, rows), drop_values=[label, "yes"]
    )
    assert not report["dropped"]
    assert {answer for _, answer in pairs(splits)} == {label, "yes"}


def test_drop_values_and_patterns_empty_cells(tmp_path):
    """Of the optional fields by a list, of those named by a dictionary."""
    rows = [
        {"q": f"Q{i}", "note": note, "a": "None"}
        for i, note in enumerate(["None", " n/a ", "see p. 7", "kept"])
    ]
    templates = {
        "question_template": "{q}",
        "answer_template": "{a}\n({note})",
        "answer_column": "a",
    }
    given = {"drop_values": ["NONE", "N/A"], "drop_patterns": ["see p\\. \\d+"], **templates}
    _, splits = formatted(tmp_path, jsonl(tmp_path, *rows), **given)
    assert [answer for _, answer in pairs(splits)] == ["None", "None", "None", "None\n(kept)"]
    for values in (["none"], "none"):
        with pytest.raises(StageError, match=r"4 of 4 rows would be lost.*4 no answer"):
            formatted(tmp_path, jsonl(tmp_path, *rows), drop_values={"a": values}, **templates)


CHOICES = ["Peru", "Norway", "Egypt"]
QUESTION = "In which country is Lima?\n\nA. Peru\nB. Norway\nC. Egypt"


@pytest.mark.parametrize(
    "row",
    [
        {"choices": CHOICES, "answer": 0},
        {"choices": CHOICES, "answer": "A"},
        {"choices": CHOICES, "answer": "Peru"},
        {"options": dict(zip("ABC", CHOICES, strict=True)), "answer": "A"},
        {"choices": {"label": ["A", "B", "C"], "text": CHOICES}, "answerKey": "A"},
        {"options": json.dumps(CHOICES), "label": 0},
    ],
)
def test_multiple_choice_has_its_options_in_the_question(tmp_path, row):
    def made(city):
        return {"question": f"In which country is {city}?", **row}

    assert conversation_of(tmp_path, made) == [("user", QUESTION), ("assistant", "A. Peru")]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (3, "an answer that is none of the options"),
        ("Chile", "an answer that is none of the options"),
        ("", "no answer"),
    ],
)
def test_answer_that_is_no_option_is_named(tmp_path, answer, reason):
    rows = [{"question": city, "choices": CHOICES, "answer": answer} for city in CITIES]
    with pytest.raises(StageError, match=f"12 {reason}"):
        formatted(tmp_path, jsonl(tmp_path, *rows))


def test_answer_that_is_an_option_and_a_place_is_refused(tmp_path):
    rows = [{"question": city, "choices": ["2", "1", "0"], "answer": 2} for city in CITIES]
    with pytest.raises(StageError, match="12 an answer that may be an option or its number"):
        formatted(tmp_path, jsonl(tmp_path, *rows))


LISTS = [{"question": f"Where is {city}?", "answer": [f"{city} 1", f"{city} 2"]} for city in CITIES]


def test_list_of_answers_is_refused_until_it_is_said_what_it_is(tmp_path):
    with pytest.raises(
        StageError, match=r"'answer' contains lists, such as \[\"Lima 1\".*answer_lists"
    ):
        formatted(tmp_path, jsonl(tmp_path, *LISTS))
    with pytest.raises(StageError, match="answer_lists='all': use one of first, rows, lines, json"):
        formatted(tmp_path, jsonl(tmp_path, *LISTS), answer_lists="all")


@pytest.mark.parametrize(
    ("setting", "answers"),
    [
        ("first", ["Lima 1"]),
        ("rows", ["Lima 1", "Lima 2"]),
        ("lines", ["Lima 1\nLima 2"]),
        ("json", ['["Lima 1", "Lima 2"]']),
    ],
)
def test_lists_of_answers(tmp_path, setting, answers):
    report, splits = formatted(tmp_path, jsonl(tmp_path, *LISTS), answer_lists=setting)
    assert [answer for question, answer in pairs(splits) if "Lima" in question] == answers
    assert report["answers_apart"] == (12 if setting == "rows" else 0)


def test_list_of_one_answer_is_that_answer(tmp_path):
    rows = [
        {"question": city, "answers": {"text": [city, city], "answer_start": [1, 2]}}
        for city in CITIES
    ]
    assert ("Lima", "Lima") in pairs(formatted(tmp_path, jsonl(tmp_path, *rows))[1])


def test_alpaca_row_may_have_its_question_in_the_input(tmp_path):
    def row(city):
        return {"instruction": "", "input": f"Where is {city}?", "output": f"{city} is a city."}

    assert conversation_of(tmp_path, row) == [
        ("user", "Where is Lima?"),
        ("assistant", "Lima is a city."),
    ]


def test_context_without_a_question_is_dropped(tmp_path):
    rows = [{"question": "", "context": "c", "answer": city} for city in CITIES]
    with pytest.raises(StageError, match="12 no question"):
        formatted(tmp_path, jsonl(tmp_path, *rows))


def test_list_of_questions_is_refused(tmp_path):
    rows = [{"question": [city, "b"], "answer": city} for city in CITIES]
    with pytest.raises(StageError, match=r"'question' contains lists.*A question must be one text"):
        formatted(tmp_path, jsonl(tmp_path, *rows))


def test_row_without_options_is_a_plain_question(tmp_path):
    rows = [
        {"question": city, "choices": CHOICES if i else None, "answer": "Peru"}
        for i, city in enumerate(CITIES)
    ]
    assert ("Lima", "Peru") in pairs(formatted(tmp_path, jsonl(tmp_path, *rows))[1])
