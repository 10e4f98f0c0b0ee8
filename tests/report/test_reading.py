"""What a page about a run says of the rows of its table."""

from tabletune.report.reading import right_answers, row_counts

REPORT = {
    "rows_in": 1_200,
    "dropped": {"no answer": 3, "too long": 1},
    "rows_out": 1_196,
    "splits": {"train": 1_000, "validation": 1, "test": 195},
}


def test_row_counts_say_one_row_in_the_singular():
    counts = row_counts(REPORT)
    assert counts["dropped: too long"] == "−1 row"
    assert counts["dropped: no answer"] == "−3 rows"
    assert counts["of these, validation"] == "1 row"


def test_row_counts_call_the_split_train_training():
    counts = row_counts(REPORT)
    assert counts["of these, training"] == "1,000 rows"
    assert "of these, train" not in counts


def test_questions_that_are_asked_in_the_same_words_are_told_apart():
    lines = [
        {"asked": "And for children?", "group": "a", "right": True},
        {"asked": "And for children?", "group": "b", "right": False},
        {"asked": "Cough?", "group": "c", "right": True},
    ]
    assert right_answers(lines) == {
        "And for children? [a]": True,
        "And for children? [b]": False,
        "Cough?": True,
    }
