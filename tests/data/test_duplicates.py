"""data.duplicates."""

import pytest
from table_helpers import ANSWER, GOOD, NAMES, formatted, jsonl, row, terminal_rows, write


def test_reasons_to_drop_are_counted(tmp_path):
    rows = [
        row(),
        row(),
        row(remedy="SIP GINGER TEA, twice a day!"),
        row(remedy="Rest in a dark room for an hour."),
        row(issue="Cough"),
        row(issue=""),
        row(remedy=""),
        row(issue="cold "),
        *(row(issue=f"Issue {i}") for i in range(5)),
    ]
    templates = {
        "question_template": "{issue}",
        "answer_template": ANSWER,
        "answer_column": "remedy",
        "max_dropped": 1,
    }
    report, _ = formatted(tmp_path, jsonl(tmp_path, *rows), **templates)
    assert report["dropped"] == {
        "duplicate": 1,
        "near duplicate": 2,
        "no question": 1,
        "no answer": 1,
    }
    assert [shown["reason"] for shown in report["dropped_rows"]][:2] == [
        "duplicate",
        "near duplicate",
    ]
    assert report["dropped_rows"][1]["remedy"] == "SIP GINGER TEA, twice a day!"
    report, _ = formatted(
        tmp_path, jsonl(tmp_path, *rows), **templates, near_duplicate_threshold=1.01
    )
    assert report["dropped"] == {"duplicate": 1, "no question": 1, "no answer": 1}


LONG = "Take {} of the small white tablets with a glass of water in the morning and in the evening, and rest for a week."


LONG_QUESTION = "May I take ginger tea in the morning if I am also on blood thinners?"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("How many?", LONG.format(2)), ("How many?", LONG.format(3))),
        (("How many?", LONG.format("two")), ("How many?", LONG.format("three"))),
        (("Whom?", LONG.format("one") + " Ask Anna."), ("Whom?", LONG.format("one") + " Ask Peter.")),
        (("Is it?", LONG.format("one") + " It is safe."), ("Is it?", LONG.format("one") + " It is not safe.")),
        (("Who pays?", "Anna pays Ben, as she always did."), ("Who pays?", "Ben pays Anna, as she always did.")),
        (("How often?", "दिन में दो बार"), ("How often?", "दान मूं दा बूर")),  # other vowels, the same consonants
        (("Is it good?", "👍"), ("Is it good?", "👎")),
        (("😀", "Smile."), ("🎉", "Smile.")),
        (("?", "Ask a doctor."), ("!", "Ask a doctor.")),
        ((LONG_QUESTION, "Yes."), (LONG_QUESTION, "No.")),
        (("What is 6 * 1?", "Six."), ("What is 6 / 1?", "Six.")),  # only their marks differ, but these mean something
        (("How much?", "Take 50% of it."), ("How much?", "Take 50 of it.")),
        (("How cold?", "It is -5."), ("How cold?", "It is 5.")),
        (("Which?", "C# is fine."), ("Which?", "C is fine.")),
        (("How?", "می‌خواهم"), ("How?", "می_خواهم")),
    ],
)  # fmt: skip
def test_rows_that_differ_are_no_near_duplicates(tmp_path, one, other):
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, [*GOOD, one, other]))
    assert report["rows_out"] == len(GOOD) + 2


def test_table_of_numbers_loses_nothing(tmp_path):
    report, _ = formatted(tmp_path, jsonl(tmp_path, *terminal_rows()[:1500]))
    assert report["rows_out"] == 1500
    assert not report["dropped"]
