"""data.shapes."""

import json

import pytest
from table_helpers import TURNS, formatted, jsonl, opened

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
    assert shape.name == name and sorted(shape.columns.values()) == sorted(used)


def test_shape_and_columns_settings_are_used(tmp_path):
    both = {"text": "t", "label": "l", "prompt": "p", "completion": "c", "chat": TURNS}
    assert shape_of(tmp_path, both).name == "messages"
    assert shape_of(tmp_path, both, shape="text").columns == {"text": "text"}
    assert shape_of(tmp_path, both, shape="prompt_completion").columns == {
        "question": "prompt",
        "answer": "completion",
    }
    named = shape_of(tmp_path, both, columns={"question": "text", "answer": "label"})
    assert named.name == "instruction" and named.columns == {"question": "text", "answer": "label"}
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
