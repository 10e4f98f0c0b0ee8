"""data.conversations."""

import pytest
from table_helpers import NAMES, formatted, jsonl, pairs, write

from tabletune.errors import StageError


@pytest.mark.parametrize(
    "label", ["None", "NA", "nan", "nil", "-", "null", "false", "0", "N/A", "https://example.org"]
)
def test_labels_that_look_missing_stay(tmp_path, label):
    rows = [(f"Question {i}?", label if i % 2 else "yes") for i in range(8)]
    report, splits = formatted(
        tmp_path, write(tmp_path / "t.csv", NAMES, rows), drop_values=[label, "yes"]
    )
    assert not report["dropped"] and {answer for _, answer in pairs(splits)} == {label, "yes"}


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
