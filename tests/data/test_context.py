"""Rows of the table in the prompt: one function for all who ask."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tabletune.data.context import (
    ContextSettings,
    TableContext,
    answer_with_context,
    load_context,
    threshold_table,
)
from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.errors import StageError

NOTHING = "The table has nothing on that."
TEMPLATE = "Rows:\n{rows}\nQuestion: {question}"
ROWS = [
    TableRow("What is your address?", "14 Harbour Road.", "1"),
    TableRow("How can I pay?", "Cash or card.", "2"),
    TableRow("When are you open?", "From 9 to 18.", "3"),
    TableRow("Do you sell helmets?", "Yes, from 35 euros.", "4"),
]


def context_of(**changes):
    settings = {
        "context_rows": 2,
        "context_characters": 0,
        "context_template": TEMPLATE,
        "unknown_answer": NOTHING,
        "unknown_threshold": 0.1,
        "certain_threshold": 0.9,
    }
    return TableContext(RowIndex.build(ROWS), ContextSettings(**(settings | changes)))


def user(text):
    return {"role": "user", "content": text}


def says(*answers):
    """A `generate` that gives these answers, and remembers what it was asked."""

    def generate(prompts):
        generate.prompts = prompts
        table = pd.DataFrame({"answer": list(answers[: len(prompts)])})
        return table.assign(stopped=True, new_tokens=3), 1.5

    return generate


def test_the_rows_stand_in_the_last_user_turn():
    messages = [
        {"role": "system", "content": "Be brief."},
        user("When are you open?"),
        {"role": "assistant", "content": "From 9 to 18."},
        user("And what is your address?"),
    ]
    prompt = context_of().prompt(messages)
    assert prompt.messages[:3] == messages[:3]
    assert prompt.messages[3]["content"].startswith(
        "Rows:\nWhat is your address?\n14 Harbour Road."
    )
    assert prompt.messages[3]["content"].endswith("Question: And what is your address?")


def test_the_last_user_turn_is_looked_up():
    prompt = context_of().prompt([user("pay"), {"role": "assistant", "content": "x"}, user("open")])
    assert prompt.hits[0].row == ROWS[2]


def test_the_messages_given_stay_as_they_are():
    messages = [user("open")]
    context_of().prompt(messages)
    assert messages == [user("open")]


def test_rows_are_plain_values_with_scores():
    rows = context_of().prompt([user("What is your address?")]).rows
    assert rows[0]["answer"] == "14 Harbour Road."
    assert rows[0]["score"] == 1.0
    assert len(rows) == 2


def test_refused_questions_are_not_put_to_the_model():
    generate = says("14 Harbour Road.")
    questions = [[user("zzz")], [user("your address")]]
    answers, seconds = answer_with_context(context_of(), questions, generate)
    assert len(generate.prompts) == 1
    assert list(answers["answer"]) == [NOTHING, "14 Harbour Road."]
    assert list(answers["refused"]) == [True, False]
    assert list(answers["unknown"]) == [True, False]
    assert seconds == 1.5


def test_what_the_model_refuses_is_unknown():
    answers, _ = answer_with_context(context_of(), [[user("address or so")]], says(NOTHING))
    assert list(answers["unknown"]) == [True]
    assert list(answers["copied"]) == [False]


def test_a_certain_row_is_copied_where_the_model_refuses():
    answers, _ = answer_with_context(context_of(), [[user("How can I pay")]], says(NOTHING))
    assert list(answers["answer"]) == ["Cash or card."]
    assert list(answers["unknown"]) == [False]
    assert list(answers["copied"]) == [True]


def test_rows_of_a_data_set_are_prompts_too():
    generate = says("x")
    answer_with_context(context_of(), [{"prompt": [user("open")], "tools": None}], generate)
    assert generate.prompts[0][0]["content"].startswith("Rows:")


def test_without_a_context_nothing_is_changed():
    generate = says("x")
    answers, _ = answer_with_context(None, [[user("open")]], generate)
    assert generate.prompts == [[user("open")]]
    assert list(answers.columns) == ["answer", "stopped", "new_tokens"]


def test_all_questions_refused_asks_the_model_nothing():
    answers, seconds = answer_with_context(context_of(), [[user("zzz")]], None)
    assert list(answers["answer"]) == [NOTHING]
    assert seconds == 0


def test_an_answer_under_another_question_counts():
    context = context_of()
    assert context.has_answer(["cash or card"])
    assert not context.has_answer(["By invoice."])


def test_both_errors_at_each_threshold():
    table = threshold_table([0.1, 0.5, 0.9, 0.3], [0, 0, 0, 1], [1, 1, 1, 0], [0, 0.4])
    assert list(table["false nothing"]) == pytest.approx([0, 1 / 3])
    assert list(table["not refused"]) == [0, 0]
    assert np.isnan(threshold_table([0.1], [0], [1], [0])["not refused"][0])


def save(folder, context):
    stored = folder / "retrieval"
    for name in ("evaluation", "use"):
        context.index.save(stored / name)
    settings = vars(context.settings) | {"analyzer": context.index.analyzer}
    (stored / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


def test_a_run_without_the_folder_has_no_context(tmp_path):
    assert load_context(tmp_path) is None


def test_a_loaded_context_asks_the_same(tmp_path):
    context = context_of()
    save(tmp_path, context)
    loaded = load_context(tmp_path, "use")
    question = [user("is there a helmet?")]
    assert loaded.prompt(question) == context.prompt(question)
    assert loaded.fingerprint == context.fingerprint


def test_the_reader_can_move_the_threshold(tmp_path):
    save(tmp_path, context_of())
    assert load_context(tmp_path, unknown_threshold=0.5).settings.unknown_threshold == 0.5
    assert load_context(tmp_path, unknown_threshold="auto").settings.unknown_threshold == 0.1


FILES_OF_AN_INDEX = ["use/rows.jsonl", "use/terms.json", "use/vectors.npz", "settings.json"]


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_kind(path):
    path.write_text("[]")


@pytest.mark.parametrize("name", FILES_OF_AN_INDEX)
@pytest.mark.parametrize("damage", [empty, cut, of_another_kind, Path.unlink])
def test_a_damaged_folder_is_one_line(damage, name, tmp_path):
    save(tmp_path, context_of())
    damage(tmp_path / "retrieval" / name)
    with pytest.raises(StageError, match="run 01_format_dataset again") as error:
        load_context(tmp_path, "use")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "terms.json", "vectors.npz"])
def test_files_of_two_indexes_do_not_go_together(name, tmp_path):
    save(tmp_path, context_of())
    folder = tmp_path / "retrieval" / "use"
    RowIndex.build([*ROWS, TableRow("A sauna?", "No.", "5")]).save(tmp_path / "other")
    (tmp_path / "other" / name).replace(folder / name)
    with pytest.raises(StageError, match="run 01_format_dataset again"):
        load_context(tmp_path, "use")


@pytest.mark.parametrize("name", ["unknown_answer", "context_template", "unknown_threshold"])
def test_settings_of_another_kind_are_one_line(name, tmp_path):
    save(tmp_path, context_of())
    path = tmp_path / "retrieval" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: ["x"]}))
    with pytest.raises(StageError, match="run 01_format_dataset again"):
        load_context(tmp_path, "use")
