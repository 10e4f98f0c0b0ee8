"""data.tools."""

import copy
import json

import base_models
import datasets
import pytest
from conftest import TINY
from table_helpers import chats, formatted, jsonl, opened, tokenizer_of

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
    assert (
        'CALL {"name": "add", "arguments": {"a": 1}}' in example["text"]
        and "TOOLS [{" in example["text"]
    )


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
