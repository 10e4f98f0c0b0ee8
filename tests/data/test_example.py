"""The worked example and the bundled table."""

import json
import re

import pandas as pd
from conftest import TABLE
from table_helpers import formatted, jsonl, opened

from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.data.shapes import with_example
from tabletune.data.splits import question_key
from tabletune.run.parameters import PARAMETERS


def test_bundled_table_comes_out_as_ever(tmp_path):
    """Its rows, in their order, in their splits: README's figures rest on them."""
    report, splits = formatted(tmp_path, TABLE, max_length=256)
    assert report["example"] == "home_remedies"
    assert report["fingerprint"] == "a04d3f9094097544"
    assert report["splits"] == {"train": 213, "validation": 30, "test": 30}
    assert report["questions"]["test"] == 11
    assert report["dropped"] == {
        "no answer": 3,
        "near duplicate": 3,
        "duplicate": 3,
        "no question": 1,
        "too long": 1,
    }
    assert sum(report["dropped"].values()) < 0.1 * report["rows_in"]
    texts = " ".join(answer for split in splits.values() for _, answer in split)
    assert "http" not in texts
    assert "None" not in texts
    assert "nan" not in texts.split()


EXAMPLE = example_settings({"example": "home_remedies"})


def test_example_is_recognized_by_its_columns_only(tmp_path):
    table = opened(TABLE)
    for own in (
        {},
        {"columns": EXAMPLE["columns"]},
        {"columns": EXAMPLE["columns"], "question_template": "{issue}?"},
    ):
        settings, example = with_example(table, {**PARAMETERS["01_format_dataset"], **own})
        assert example == "home_remedies"
        assert settings["strip_addresses"]
        assert settings["columns"] == EXAMPLE["columns"]
    assert settings["question_template"] == "{issue}?"
    for own in ({"columns": {"issue": "Health Issue"}}, {"shape": "text"}):
        settings, example = with_example(table, {**PARAMETERS["01_format_dataset"], **own})
        assert example is None
        assert not settings["strip_addresses"]
        assert not settings["question_template"]
    other = opened(jsonl(tmp_path, {"question": "a", "answer": "b"}))
    assert with_example(other, PARAMETERS["01_format_dataset"]) == (
        PARAMETERS["01_format_dataset"],
        None,
    )


def test_defaults_have_nothing_of_health():
    text = json.dumps(PARAMETERS["01_format_dataset"]).lower()
    assert not re.search(
        "remedy|yoga|suffering|medical|emergency|issue", text.replace("home_remedies", "")
    )
    assert example_settings({"example": None}) == example_settings({}) == {}
    assert "medical" in EXAMPLE["disclaimer"]
    assert "medical" not in NEUTRAL_DISCLAIMER


def test_bundled_table_has_its_columns():
    table = opened(TABLE)
    assert table.columns == ["Name of Item", "Health Issue", "Home Remedy", "Yogasan"]
    issues = [cells[0] for _, cells in table.rows(["Health Issue"])]
    assert len(issues) >= 240
    assert len({question_key([issue]) for issue in issues} - {""}) >= 80


def test_emergencies_are_sent_to_hospital():
    table = pd.read_csv(TABLE, keep_default_na=False)
    emergencies = (
        "Chest Pain|Stroke|Difficulty Breathing|Allergic Reaction|Snake Bite|Poison|"
        "Severe Burns|Heavy Bleeding|Head Injury|Seizure|Newborn|Animal Bite"
    )
    rows = table[table["Health Issue"].str.contains(emergencies)]
    assert rows["Health Issue"].nunique() == 12
    assert rows["Home Remedy"].str.contains("emergency|ambulance|hospital", case=False).all()
    assert not rows["Name of Item"].any()
    assert not rows["Yogasan"].any()
