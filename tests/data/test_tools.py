"""data.tools."""

import copy
import json

import base_models
import datasets
import pytest
from conftest import TINY
from table_helpers import CITIES, chats, formatted, jsonl, opened, tokenizer_of, write_parquet

from tabletune.data.pipeline import format_table
from tabletune.data.shapes import recognize
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "adds", "parameters": {"properties": {}}},
    }
]


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_tools(number=4):
    turns = [
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    return [
        {"messages": [{"role": "user", "content": f"Sum {i}?"}, *turns], "tools": TOOLS}
        for i in range(number)
    ]


def test_tools_are_kept_where_the_template_takes_them(tmp_path):
    tokenizer, stops = tokenizer_of(TINY)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    table = opened(jsonl(tmp_path, *with_tools()))
    settings = {**PARAMETERS["01_format_dataset"], "base_model": str(TINY)}
    format_table(
        table, recognize(table, settings), settings, tokenizer, stops, tmp_path / "dataset"
    )
    example = datasets.load_from_disk(tmp_path / "dataset")["train"][0]
    assert json.loads(example["tools"]) == TOOLS
    assert [turn["role"] for turn in example["prompt"]] == ["user", "assistant", "tool"]
    assert 'CALL {"name": "add", "arguments": {"a": 1}}' in example["text"]
    assert "TOOLS [{" in example["text"]


def test_tools_are_refused_without_a_place_in_the_template(tmp_path):
    with pytest.raises(
        StageError, match="The table has tool_calls, which this model's chat template"
    ):
        formatted(tmp_path, jsonl(tmp_path, *with_tools()))
    plain = [
        {"messages": [turn for turn in row["messages"] if not turn.get("tool_calls")]}
        for row in with_tools()
    ]
    with pytest.raises(
        StageError, match="The table has turns of tools, which this model's chat template"
    ):
        formatted(tmp_path, jsonl(tmp_path, *plain), base_models.cached("gemma"))
    with pytest.raises(StageError, match="The table has tools, which this model's chat template"):
        formatted(tmp_path, jsonl(tmp_path, *chats(4, tools=TOOLS)))


def with_template(template):
    """The tiny model's tokenizer with another chat template, and its stop tokens."""
    tokenizer, stops = tokenizer_of(TINY)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer, stops


def texts_of(folder, path, template=WITH_TOOLS):
    """The texts of the training rows, sorted, under a template with a place for tools."""
    settings = {**PARAMETERS["01_format_dataset"], "base_model": str(TINY), "max_length": 2000}
    table = opened(path)
    shape = recognize(table, settings)
    format_table(table, shape, settings, *with_template(template), folder / "dataset")
    splits = datasets.load_from_disk(folder / "dataset")
    return sorted(row["text"] for split in splits.values() for row in split)


WEATHER = {"name": "weather", "arguments": {"city": "Lima"}}
CALLS = {
    "tool_calls": {"tool_calls": [{"type": "function", "function": WEATHER}]},
    "arguments in a text, as OpenAI has them": {
        "tool_calls": [{"id": "1", "function": {**WEATHER, "arguments": '{"city": "Lima"}'}}]
    },
    "bare": {"tool_calls": [WEATHER]},
    "JSON in a text": {"tool_calls": json.dumps([WEATHER])},
    "function_call": {"function_call": {**WEATHER, "arguments": '{"city": "Lima"}'}},
    "function_call with an object": {"function_call": WEATHER},
    "Anthropic": {
        "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Lima"}}]
    },
    "Gemini": {"parts": [{"functionCall": {"name": "weather", "args": {"city": "Lima"}}}]},
    "ShareGPT": {"role": "function_call", "content": json.dumps(WEATHER)},
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_are_read_in_every_form(tmp_path, form):
    call = {"role": "assistant", "content": None, **CALLS[form]}
    if "parts" in call:
        del call["content"]
    rows = [
        {"messages": [
            {"role": "user", "content": f"Weather, {city}?"}, call,
            {"role": "tool", "content": "22"}, {"role": "assistant", "content": f"{city}: 22."},
        ]}
        for city in CITIES
    ]  # fmt: skip
    texts = texts_of(tmp_path, jsonl(tmp_path, *rows))
    assert all('CALL {"name": "weather", "arguments": {"city": "Lima"}}' in text for text in texts)


def test_arguments_are_a_text_for_templates_that_want_one(tmp_path):
    """DeepSeek's writes them as they are; an object would be an error there."""
    template = WITH_TOOLS.replace(
        "m.tool_calls[0].function | tojson", "'>' + m.tool_calls[0].function.arguments + '<'"
    )
    texts = texts_of(tmp_path, jsonl(tmp_path, *with_tools()), template)
    assert all('CALL >{"a": 1}<' in text for text in texts)


@pytest.mark.parametrize("number", ["1.50", "1e6", "0.30", "7"])
def test_arguments_keep_the_text_of_their_numbers(tmp_path, number):
    lines = [json.dumps(row).replace('{"a": 1}', f'{{"a": {number}}}') for row in with_tools()]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    texts = texts_of(tmp_path, tmp_path / "n.jsonl")
    assert all(f'"arguments": {{"a": {number}}}' in text for text in texts)


def test_results_of_tools_in_a_users_turn(tmp_path):
    """Anthropic has them there."""
    result = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "22"}]}
    ]
    rows = [
        {"messages": [
            {"role": "user", "content": f"Weather, {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
            {"role": "user", "content": result}, {"role": "assistant", "content": "It is 22."},
        ]}
        for city in CITIES
    ]  # fmt: skip
    assert all("<tool>22</s>" in text for text in texts_of(tmp_path, jsonl(tmp_path, *rows)))


@pytest.mark.parametrize("column", ["tools", "functions"])
def test_bare_functions_become_tools(tmp_path, column):
    """OpenAI's older `functions`, and ShareGPT's tools, which are JSON in a text."""
    function = TOOLS[0]["function"]
    for value in ([function], json.dumps([function])):
        rows = [{"messages": row["messages"], column: value} for row in with_tools()]
        formatted_tools = texts_of(tmp_path, jsonl(tmp_path, *rows))[0].partition("\n")[0]
        assert formatted_tools == f"<s> TOOLS {json.dumps(TOOLS)}"


def test_empty_tools_are_none(tmp_path):
    for value in ([], "[]", "", None):
        report, _ = formatted(tmp_path, jsonl(tmp_path, *chats(6, tools=value)))
        assert report["rows_out"] == 6


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "a tool call without a name"),
        ({"tool_calls": "weather(Lima)"}, "a tool call that is not JSON"),
        (
            {"tool_calls": [{"name": "weather", "arguments": "Lima"}]},
            "tool-call arguments that are not JSON",
        ),
    ],
)
def test_broken_call_is_named(tmp_path, turn, reason):
    rows = [
        {
            "messages": [
                {"role": "user", "content": city},
                {"role": "assistant", "content": "", **turn},
            ]
        }
        for city in CITIES
    ]
    with pytest.raises(StageError, match=f"12 {reason}"):
        formatted(tmp_path, jsonl(tmp_path, *rows))


def test_name_that_the_template_would_write_is_refused(tmp_path):
    template = WITH_TOOLS.replace("<{{ m.role }}>", "<{{ m.role }} {{ m.name }}>")
    rows = with_tools()
    for row in rows:
        row["messages"][2]["name"] = "add"
    assert len(texts_of(tmp_path, jsonl(tmp_path, *rows))) == 4
    with pytest.raises(
        StageError, match=r"Turns of the role tool have the key 'name'\. This model's chat template"
    ):
        texts_of(tmp_path, jsonl(tmp_path, *rows), template)


def test_parquet_adds_no_parameters(tmp_path):
    """One struct for all rows gives each tool and call the parameters of all others, with null."""
    other = {"type": "function", "function": {"name": "see", "arguments": {"place": "x"}}}
    rows = [{"messages": row["messages"]} for row in with_tools(6)]
    for row in rows[::2]:
        row["messages"][1]["tool_calls"] = [other]
    path = write_parquet(tmp_path / "t.parquet", rows)
    texts = texts_of(tmp_path, path)
    assert texts == texts_of(tmp_path / "lines", jsonl(tmp_path, *rows)), "as from the lines"
    assert not any("null" in text for text in texts)
