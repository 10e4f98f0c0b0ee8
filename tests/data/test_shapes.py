"""data.shapes."""

import json

import pytest
from table_helpers import CITIES, TURNS, formatted, jsonl, opened, pairs

from tabletune.data.shapes import recognize, with_example
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS


def shape_of(folder, *rows, **settings):
    known = {**PARAMETERS["01_format_dataset"], **settings}
    table = opened(jsonl(folder, *rows))
    chosen, example = with_example(table, known)
    return recognize(table, chosen, example)


SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("columns", "name", "used"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt_completion", ["prompt", "completion"]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion", ["prompt", "completion"]),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction", ["instruction", "input", "output"]),
        ({"Question": "a", "Answer": "b", "id": 1}, "instruction", ["Question", "Answer"]),
        ({"question": "a", "context": "c", "answer": "b"}, "instruction", ["question", "context", "answer"]),
        (
            {"instruction": "a", "context": "", "response": "b", "category": "x"},
            "instruction",
            ["instruction", "context", "response"],
        ),
        ({"input": "a", "output": "b"}, "instruction", ["input", "output"]),
        ({"messages": TURNS}, "messages", ["messages"]),
        ({"prompt": "a", "messages": TURNS}, "messages", ["messages"]),
        ({"dialog": json.dumps(TURNS)}, "messages", ["dialog"]),
        ({"chat": str(TURNS)}, "messages", ["chat"]),
        ({"conversations": SHARED, "system": "s"}, "conversations", ["conversations", "system"]),
        ({"conversations": TURNS, "tools": "[]"}, "messages", ["conversations", "tools"]),
        ({"text": "a"}, "text", ["text"]),
    ],
)  # fmt: skip
def test_shapes_are_recognized(tmp_path, columns, name, used):
    shape = shape_of(tmp_path, columns)
    assert shape.name == name
    assert sorted(shape.columns.values()) == sorted(used)


def test_shape_and_columns_settings_are_used(tmp_path):
    both = {"text": "t", "label": "l", "prompt": "p", "completion": "c", "chat": TURNS}
    assert shape_of(tmp_path, both).name == "messages"
    assert shape_of(tmp_path, both, shape="text").columns == {"text": "text"}
    assert shape_of(tmp_path, both, shape="prompt_completion").columns == {
        "question": "prompt",
        "answer": "completion",
    }
    named = shape_of(tmp_path, both, columns={"question": "text", "answer": "label"})
    assert named.name == "instruction"
    assert named.columns == {"question": "text", "answer": "label"}
    assert shape_of(tmp_path, both, shape="text", columns={"text": "label"}).columns == {
        "text": "label"
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "message"}, "shape='message': use one of .*Did you mean 'messages'"),
        ({"shape": "messages"}, "shape=messages needs a column of lists"),
        ({"shape": "columns"}, "question_template=''.*put at least one column in braces"),
        (
            {"columns": {"question": "Frage", "answer": "Antwrt"}},
            "no column 'Antwrt' for {answer}.*Did you mean 'Antwort'",
        ),
        ({"columns": {"q": "Frage", "a": "Antwort"}}, "not recognized. Say which are which"),
        ({}, "not recognized.*columns: {question: 'Frage', answer: 'Antwort'}"),
        ({"question_template": "{Frage}", "answer_template": "{Antwort"}, "answer_template.*put at least one"),
        ({"question_template": "{Frage}", "answer_template": "{Antwort} {"}, "answer_template has a single brace"),
        (
            {"question_template": "{Frage} {0}", "answer_template": "{Antwort}"},
            r"no column '0'.*written twice: \{\{0\}\}",
        ),
        ({"question_template": "{Frage}", "answer_template": 'Say: { "a": {Antwort} }'}, "single brace"),
        (
            {"question_template": "{Frage}", "answer_template": "{Antwort}", "answer_column": "a"},
            "answer_column='a' is not in",
        ),
        (
            {"question_template": "{Frage}", "answer_template": "{Antwort}", "drop_values": {"F": ["x"]}},
            "drop_values: there is no field 'F'",
        ),
        (
            {"question_template": "{Frage}\n{Antwort}", "answer_template": "{Antwort}", "drop_patterns": ["("]},
            "drop_patterns.*regular expression",
        ),
    ],
)  # fmt: skip
def test_wrong_setting_is_one_line(tmp_path, settings, message):
    rows = [{"Frage": f"q{i}", "Antwort": f"a{i}"} for i in range(5)]
    with pytest.raises(StageError, match=message):
        formatted(tmp_path, jsonl(tmp_path, *rows), **settings)


@pytest.mark.parametrize(
    ("columns", "claimed"),
    [
        (["instruction", "question", "answer"], "'instruction' and 'question'"),
        (["question", "response", "answer"], "'response' and 'answer'"),
        (["question", "Question", "answer"], "'question' and 'Question'"),
        (["query", "prompt", "output"], "'query' and 'prompt'"),
        (["question", "context", "input", "answer"], "'context' and 'input'"),
        (["question", "answer", "system", "system_prompt"], "'system' and 'system_prompt'"),
    ],
)
def test_two_columns_for_one_field_are_refused(tmp_path, columns, claimed):
    rows = [{name: f"{name} {i}" for name in columns} for i in range(5)]
    with pytest.raises(StageError, match=f"columns {claimed} could each be the .*columns: {{"):
        formatted(tmp_path, jsonl(tmp_path, *rows))


def test_a_conversation_beside_a_pair_of_turns_is_refused_by_its_name(tmp_path):
    rows = [{"prompt": TURNS[:1], "completion": TURNS[1:2], "dialog": TURNS} for _ in range(5)]
    with pytest.raises(StageError, match="'dialog' holds conversations, too"):
        formatted(tmp_path, jsonl(tmp_path, *rows))
    for columns in ({"question": "prompt", "answer": "completion"}, {"messages": "dialog"}):
        assert shape_of(tmp_path, *rows, columns=columns).name


def test_two_columns_of_conversations_are_refused(tmp_path):
    rows = [{"messages": TURNS, "dialog": TURNS} for _ in range(5)]
    with pytest.raises(StageError, match="'messages' and 'dialog' could each be the messages"):
        formatted(tmp_path, jsonl(tmp_path, *rows))
    assert shape_of(tmp_path, *rows, columns={"messages": "dialog"}).columns == {"chat": "dialog"}


def test_advice_on_two_claims_can_be_followed(tmp_path):
    rows = [{"instruction": "Be short.", "question": f"q{i}", "answer": f"a{i}"} for i in range(6)]
    templates = {"question_template": "{instruction}\n\n{question}", "answer_template": "{answer}"}
    with pytest.raises(StageError) as refusal:
        formatted(tmp_path, jsonl(tmp_path, *rows))
    assert r'question_template: "{instruction}\n\n{question}", answer_template: "{answer}"' in str(
        refusal.value
    )
    assert pairs(formatted(tmp_path, jsonl(tmp_path, *rows), **templates)[1])[0] == (
        "Be short.\n\nq0",
        "a0",
    )


def test_columns_that_are_not_used_are_named(tmp_path):
    row = {"question": "a", "answer": "b", "id": 1, "explanation": "c"}
    shape = shape_of(tmp_path, row)
    assert shape.unused == ["id", "explanation"]
    assert "not used: 'id', 'explanation'" in shape.describe()


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"Frage": "Wo?", "Antwort": "Da."}, "columns: {question: 'Frage', answer: 'Antwort'}"),
        (
            {"id": 7, "reply": "Da.", "issue": "Wo?"},
            "columns: {question: 'issue', answer: 'reply'}",
        ),
        (
            {"id": "x", "body": "Da.", "title": "Wo?"},
            "columns: {question: 'title', answer: 'body'}",
        ),
        ({"text": "Wo?", "label": "good"}, "columns: {question: 'text', answer: 'label'}"),
        (
            {"id": "0", "translation": {"en": "a", "de": "b"}},
            "columns: {question: 'translation.en', answer: 'translation.de'}",
        ),
        ({"story": "Once.", "id": 1}, "shape: text, columns: {text: 'story'}"),
        ({"a": 1, "b": 2}, "It needs a column of questions and one of answers"),
    ],
)
def test_advice_names_columns_that_fit(tmp_path, row, advice):
    with pytest.raises(StageError) as refusal:
        shape_of(tmp_path, row)
    assert advice in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_fields_of_objects_are_columns(tmp_path):
    rows = [{"translation": {"en": f"I live in {c}.", "de": f"Ich wohne in {c}."}} for c in CITIES]
    columns = {"question": "translation.en", "answer": "translation.de"}
    _, splits = formatted(tmp_path, jsonl(tmp_path, *rows), columns=columns)
    assert ("I live in Lima.", "Ich wohne in Lima.") in pairs(splits)


@pytest.mark.parametrize("label", [False, "false", 0])
def test_rows_labelled_false_are_left_out(tmp_path, label):
    """As in KTO: a false label is an answer that was rejected."""
    kept = True if label is False else {"false": "true", 0: 1}[label]
    rows = [
        {"prompt": f"Where is {c}?", "completion": f"{c} {i}", "label": label if i else kept}
        for i in range(2)
        for c in CITIES
    ]
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows))
    assert report["dropped"] == {"labelled as rejected": 12}
    assert all(answer.endswith("0") for _, answer in pairs(splits))


@pytest.mark.parametrize("name", ["label", "kto_tag", "is_correct"])
def test_conversations_labelled_false_are_left_out(tmp_path, name):
    rows = [
        {"messages": [{"role": "user", "content": c}, TURNS[1]], name: i % 3 > 0}
        for i, c in enumerate(CITIES)
    ]
    assert formatted(tmp_path, jsonl(tmp_path, *rows))[0]["dropped"] == {"labelled as rejected": 4}


def test_label_that_is_a_class_drops_nothing(tmp_path):
    rows = [{"question": c, "answer": c, "label": i % 2} for i, c in enumerate(CITIES)]
    assert formatted(tmp_path, jsonl(tmp_path, *rows))[0]["rows_out"] == 12


def test_preferences_are_named(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert (
        "a table of preferences: 'chosen' is learned, 'rejected' is not"
        in shape_of(tmp_path, row).describe()
    )


def test_rejected_conversations_alone_are_refused(tmp_path):
    with pytest.raises(StageError, match="not recognized"):
        shape_of(tmp_path, {"rejected": TURNS})
