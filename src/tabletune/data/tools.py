"""Tools and calls of tools, brought into the one form that chat templates take."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabletune.chat.caching import cached_per_template
from tabletune.chat.markers import break_markers
from tabletune.chat.templates import MARK, USER, around, render
from tabletune.data.cells import WrittenNumber, json_text, map_numbers
from tabletune.data.cleaning import Dropped
from tabletune.errors import StageError

NO_PLACE = (
    "which this model's chat template has no place for. Leave them out, or take another base_model."
)


# characters for private use, around a number that has to keep its text
NUMBER_MARKS = ("\ue001", "\ue002")


def parse_json(text: str) -> Any:
    """The value of a JSON text, its numbers as they are written.

    Raises ValueError or RecursionError.
    """
    return json.loads(text, parse_float=WrittenNumber, parse_int=WrittenNumber)


def calls_in(value: Any) -> list[dict[str, Any]]:
    """The calls in a value: a list of them, one, or JSON of either.

    Raises Dropped if it is none of these.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError) as error:
            raise Dropped("a tool call that is not JSON") from error
    calls = value if isinstance(value, list) else [value]
    return [call_of_function(call) for call in calls]


def call_of_function(call: Any) -> dict[str, Any]:
    """A call as chat templates take it.

    {"type": "function", "function": {"name", "arguments": a dict}}, perhaps "id".

    OpenAI has the arguments as JSON in a text, Gemini calls them `args`. Raises Dropped if it is no
    call.
    """
    if not isinstance(call, dict):
        raise Dropped("a tool call without a name")
    function: dict[str, Any] = call
    if isinstance(call.get("function"), dict):
        function = call["function"]
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Dropped("a tool call without a name")
    arguments = next(
        (function[key] for key in ("arguments", "args", "parameters") if key in function), None
    )
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise Dropped("tool-call arguments that are not JSON") from error
    if not isinstance(arguments, (dict, type(None))):
        raise Dropped("tool-call arguments that are not an object")
    result = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def tools_text(value: Any) -> str:
    """The tools of a row as JSON, each {"type": "function", "function": {...}}.

    "" if there are none. OpenAI's older `functions` and ShareGPT's tools are bare functions, and
    are put into that form. Raises Dropped if the value is no list of tools.
    """
    if isinstance(value, str):
        if not value.strip():
            return ""
        try:
            value = parse_json(value)
        except (ValueError, RecursionError) as error:
            raise Dropped("tools that are not JSON") from error
    if value is None or value == []:
        return ""
    tools = value if isinstance(value, list) else [value]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Dropped("tools that are not objects")
    wrapped = []
    for tool in tools:
        is_bare = "name" in tool and "function" not in tool
        wrapped.append({"type": "function", "function": tool} if is_bare else tool)
    return json_text(wrapped)


def text_of_calls(message: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes for a message that calls tools. Raises StageError if it cannot.

    Most templates take the arguments as an object, some only as JSON in a text.
    """
    try:
        return _rendered_calls(message, tokenizer)
    except StageError:
        calls = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json_text(call["function"]["arguments"]),
                },
            }
            for call in message["tool_calls"]
        ]
        return _rendered_calls({**message, "tool_calls": calls}, tokenizer)


def _rendered_calls(message: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    _, before, after = around([USER], tokenizer)
    # 1.50 would become 1.5 on its way through the template: such numbers travel as marked texts
    message_with_marks = map_numbers(message, _number_for_template)
    safe = json.loads(break_markers(json.dumps(message_with_marks, ensure_ascii=False), tokenizer))
    rendered = _without_marks(render([USER, safe], tokenizer, False))
    text = rendered[len(before) : len(rendered) - len(after)].strip()
    if not text or not (rendered.startswith(before.rstrip()) and rendered.endswith(after)):
        raise StageError(f"The table has tool_calls, {NO_PLACE}")
    return text


def _number_for_template(number: WrittenNumber) -> Any:
    """A number as a template takes it.

    A number that JSON would write in another way (1.50, 1e6) becomes a marked text.
    """
    value = json.loads(number)
    if json.dumps(value) == number:
        return value
    return NUMBER_MARKS[0] + number + NUMBER_MARKS[1]


def _without_marks(text: str) -> str:
    """A rendered text with marked numbers as numbers, without the quotes of a text."""
    opening, closing = NUMBER_MARKS
    for quote in ('"', "'", ""):
        text = re.sub(f"{quote}{opening}([^{closing}]*){closing}{quote}", r"\1", text)
    return text


@cached_per_template
def shows_tool_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a place for what a tool has answered."""
    turns = [USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": MARK}]
    try:
        return MARK in render(turns, tokenizer)
    except StageError:
        return False


@cached_per_template
def writes_key(tokenizer: PreTrainedTokenizerBase, role: str, key: str) -> bool:
    """Whether the chat template writes what a message has under a key, such as `name`.

    That may depend on the message's role.
    """
    name = "tabletune_probe"
    call = {"id": "callabcde", "type": "function", "function": {"name": "x", "arguments": {}}}
    # some templates accept a tool's turn only after a call
    before: list[dict[str, Any]] = [USER]
    if role == "tool":
        before += [{"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        return name in render(
            [*before, {"role": role, "content": "x", key: name}], tokenizer, False
        )
    except StageError:
        return False
