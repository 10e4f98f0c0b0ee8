"""data.safety_rows."""

import json
import re
from collections import Counter

import pandas as pd
import pytest
import table_helpers
from conftest import ROOT, TABLE, TINY
from table_helpers import NAMES, formatted, pairs, write

from tabletune.chat.tokenizer import load_tokenizer
from tabletune.errors import StageError


def safety_rows():
    """Our rows: what an emergency is called ("" for an everyday complaint), a question, an
    answer.
    """
    text = (ROOT / "src" / "tabletune" / "resources" / "texts" / "safety_rows.txt").read_text(
        encoding="utf-8"
    )
    return [tuple(map(str.strip, line.split("|"))) for line in text.splitlines()]


def test_safety_rows_send_emergencies_to_get_help():
    rows = safety_rows()
    emergencies = [row for row in rows if row[0]]
    everyday = [row for row in rows if not row[0]]
    assert len(emergencies) >= 60
    assert len(everyday) >= 20
    assert all(len({row[i] for row in emergencies}) == len(emergencies) for i in range(3))
    assert len({row[1] for row in rows}) == len(rows)
    help_at_once = "ambulance|hospital|doctor|emergency (number|services|department|clinic)|poison centre|crisis line"
    help_at_once += "|maternity (unit|ward)"
    pantry = "ginger|honey|turmeric|lemon|garlic|tea|oil|vinegar|milk|salt|tulsi|compress|yoga|aloe|onion|clove|herb"
    for _, question, answer in emergencies:
        assert re.search(rf"\b({help_at_once})\b", answer), answer
        named = set(re.findall(rf"\b({pantry})\b", answer)) - set(re.findall(pantry, question))
        assert not named - {"oil"}, answer
        assert len(answer.split()) < 50
    for _, _, answer in everyday:
        assert re.search(r"See a (doctor|dentist) if", answer)
    table = {text.casefold() for text in pd.read_csv(TABLE, keep_default_na=False)["Health Issue"]}
    assert not table & {row[0].casefold() for row in emergencies}


def test_safety_rows_are_mixed_into_training_only(tmp_path):
    report, splits = formatted(tmp_path / "with", TABLE, safety_rows=True, max_length=256)
    without, plain = formatted(tmp_path / "without", TABLE, max_length=256)
    rows = safety_rows()
    number = len(rows) + sum(
        bool(named) for named, _, _ in rows
    )  # an emergency in free words and in the template's
    assert report["safety_rows"] == number
    assert without["safety_rows"] == 0
    assert report["splits"]["train"] == without["splits"]["train"] + number == len(splits["train"])
    assert report["rows_out"] == without["rows_out"]
    assert report["fingerprint"] != without["fingerprint"]
    assert splits["validation"] == plain["validation"]
    assert splits["test"] == plain["test"]
    assert splits["train"][:-number] == plain["train"]
    asked = {prompt[0]["content"] for prompt, _ in splits["train"]}
    assert "I am suffering from a knife stuck in my side. Please suggest a home remedy." in asked
    assert {answer for _, answer in splits["train"][-number:]} == {answer for _, _, answer in rows}


@pytest.mark.parametrize(("length", "wanted", "fewest"), [(256, 20, 20), (96, True, 1)])
def test_some_safety_rows_of_both_kinds(tmp_path, length, wanted, fewest):
    """As many as asked for, of both kinds; and none that is too long."""
    report, splits = formatted(
        tmp_path, TABLE, safety_rows=wanted, max_length=length, max_dropped=1
    )
    assert fewest <= report["safety_rows"] < 186
    assert report["tokens"]["max"] <= length
    kinds = {answer: bool(named) for named, _, answer in safety_rows()}
    chosen = Counter(kinds[answer] for _, answer in splits["train"][-report["safety_rows"] :])
    assert chosen[True] > 10
    assert chosen[False] >= 2


@pytest.mark.parametrize("number", [-1, 100_000, 0.5, "yes", None])
def test_bad_number_of_safety_rows_is_refused(tmp_path, number):
    with pytest.raises(
        StageError, match=r"safety_rows=.*: use true, false, or a number up to \d+\."
    ):
        formatted(tmp_path, TABLE, safety_rows=number)


def test_safety_questions_are_not_in_held_out_splits(tmp_path):
    """A table with all of our questions, in capitals: those that fall into a held-out split are not
    trained on.
    """
    rows = [(question.upper(), f"Answer {i}.") for i, (_, question, _) in enumerate(safety_rows())]
    report, splits = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows), safety_rows=True)
    asked = {
        name: {question.casefold() for question, _ in pairs({name: split})}
        for name, split in splits.items()
    }
    held_out = asked["validation"] | asked["test"]
    assert 0 < report["safety_rows"] == len(rows) - len(held_out)
    assert not held_out & asked["train"]


def test_held_out_safety_questions_are_not_in_training_where_answers_are_split(tmp_path):
    rows = [(question.upper(), f"Answer {i}.") for i, (_, question, _) in enumerate(safety_rows())]
    table = write(tmp_path / "t.csv", NAMES, rows)
    _, splits = formatted(tmp_path, table, safety_rows=True, split_by="row")
    asked = {
        name: {question.casefold() for question, _ in pairs({name: split})}
        for name, split in splits.items()
    }
    assert not (asked["validation"] | asked["test"]) & asked["train"]


def test_a_safety_row_that_the_template_refuses_is_left_out(tmp_path, monkeypatch):
    refused = safety_rows()[0][1]
    tokenizer, stop_token_ids = load_tokenizer(str(TINY))
    condition = f"{{% if messages[0]['content'] == {json.dumps(refused)} %}}"
    refusal = condition + "{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    monkeypatch.setattr(table_helpers, "tokenizer_of", lambda _: (tokenizer, stop_token_ids))
    _, splits = formatted(tmp_path, TABLE, safety_rows=True, max_length=256)
    assert refused not in {question for question, _ in pairs(splits)}
