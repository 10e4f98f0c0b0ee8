"""Conversations as tables have them: which cells hold one, and the messages in it.

A turn that has more in it than a role and a text is read right (calls of tools, thinking, weights
of the loss), or it is refused with the name of the key: nothing in it is dropped silently.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tabletune.data.cells import cell_text, is_empty, json_text
from tabletune.data.cleaning import Dropped
from tabletune.data.rendered import turns_of_rendered_text
from tabletune.data.tools import call_of_function, calls_in
from tabletune.data.vocabulary import ROLES, WORDS
from tabletune.errors import StageError

ROLE_KEYS: list[str] = WORDS["turn_keys"]["role"]
SURE_ROLE_KEYS = ("role", "from", "speaker")  # an author or a sender may be of anything
CONTENT_KEYS: list[str] = WORDS["turn_keys"]["content"]
REASONING_KEYS: list[str] = WORDS["turn_keys"]["reasoning"]
LEARN_KEYS: list[str] = WORDS["turn_keys"]["learn"]
DO_NOT_LEARN_KEYS: list[str] = WORDS["turn_keys"]["do_not_learn"]
NOTES = set(WORDS["turn_keys"]["notes"])
CALL_ROLES = ("function_call", "tool_call")
TEXT_PARTS = (None, "text", "input_text", "output_text")
PYTHON_LIST = re.compile(r"\s*[\[{]\s*(\{\s*)?'")
Turn = dict[str, Any]
Message = dict[str, Any]


@dataclass
class TurnOptions:
    """How turns are read: the parameters of notebook 1, and a count of the keys that were left
    out.
    """

    thinking: bool = False
    ignore_turn_keys: tuple[str, ...] = ()
    roles: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


# Which cells hold a conversation


def turns_in(cell: Any, texts_are_turns: bool = False) -> list[Turn] | None:
    """The turns that a cell holds, dicts with a role; None if it holds none.

    A conversation is a list of turns, also one written as JSON or Python; an object that has one;
    an object of lists; a list of {"human": ..., "assistant": ...}; or a text that is rendered
    already. With `texts_are_turns`, for a column that is called a conversation, also a list of
    texts, or of pairs of texts, in which two take turns.
    """
    if isinstance(cell, str):
        cell = _parsed(cell)
    if isinstance(cell, str):
        return turns_of_rendered_text(cell)
    if isinstance(cell, dict):
        return _turns_of_object(cell)
    if not isinstance(cell, list) or not cell:
        return None
    if all(isinstance(turn, dict) for turn in cell):
        return _turns_of_objects(cell) or (_turns_of_exchanges(cell) if texts_are_turns else None)
    if all(isinstance(item, list) and len(item) == 2 for item in cell):
        return _turns_of_pairs(cell, texts_are_turns)
    if texts_are_turns and all(isinstance(item, str) for item in cell):
        return _alternating(cell)
    return None


def _parsed(text: str) -> Any:
    """The list or object that a text is, in JSON or Python; the text itself if it is none."""
    if not re.match(r"\s*(\[\s*[\[{\"']|\{\s*[\"'])", text):
        return text
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        if PYTHON_LIST.match(text):
            return ast.literal_eval(text.strip())
        return json.loads(text)
    return text


def _turns_of_object(cell: dict[str, Any]) -> list[Turn] | None:
    role_key = _first_key(cell, ROLE_KEYS)
    if role_key and isinstance(
        cell[role_key], list
    ):  # an object of lists, as `datasets` stores a list of objects
        lists = {key: values for key, values in cell.items() if isinstance(values, list)}
        if len({len(values) for values in lists.values()}) == 1:
            return [
                dict(zip(lists, values, strict=True))
                for values in zip(*lists.values(), strict=True)
            ]
        return None
    if role_key in ("role", "from") and str(cell[role_key]).casefold() in ROLES:
        return [cell]
    for name in WORDS["columns"]["chat"]:
        turns = cell.get(name)
        if isinstance(turns, list):
            return turns_in(turns)
    return None


def _turns_of_objects(cell: list[Turn]) -> list[Turn] | None:
    role_key = _first_key(cell[0], ROLE_KEYS)
    if role_key in SURE_ROLE_KEYS or (role_key and str(cell[0][role_key]).casefold() in ROLES):
        return cell
    if all(turn and all(str(key).casefold() in ROLES for key in turn) for turn in cell):
        return [
            {"role": role, "content": text}
            for turn in cell
            for role, text in turn.items()
            if not is_empty(text)
        ]
    return None


def _turns_of_exchanges(cell: list[Turn]) -> list[Turn] | None:
    """The turns of a list of questions with their answers, such as {"input": ..., "output":
    ...}.
    """
    turns = []
    for exchange in cell:
        names = {str(key).casefold(): key for key in exchange}
        question = next(
            (names[name] for name in WORDS["columns"]["question"] if name in names), None
        )
        answer = next((names[name] for name in WORDS["columns"]["answer"] if name in names), None)
        if question is None or answer is None:
            return None
        turns.append({"role": "user", "content": exchange[question]})
        turns.append({"role": "assistant", "content": exchange[answer]})
    return turns


def _turns_of_pairs(cell: list[Any], texts_are_turns: bool) -> list[Turn] | None:
    flat = [item for pair in cell for item in pair]
    if all(isinstance(item, dict) for item in flat) and _first_key(flat[0], ROLE_KEYS):
        return flat
    if texts_are_turns and all(isinstance(item, str) for item in flat):
        return _alternating(flat)
    return None


def _alternating(texts: list[str]) -> list[Turn]:
    """Turns of a user and an assistant in turn."""
    return [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(texts)
    ]


def _first_key(turn: Turn, keys: list[str]) -> str | None:
    """The first of the keys that a turn has."""
    return next((key for key in keys if key in turn), None)


# The messages in it


def messages_in(
    turns: list[Turn], clean: Callable[[str], str], options: TurnOptions
) -> list[Message]:
    """The messages of a conversation: role and content, `tool_calls` where there are, `learn`:
    False of an answer that is not to be learned, `name` and `tool_call_id` where a turn has
    them.

    Raises Dropped for a row that cannot be read, StageError for a key that says something which is
    not understood.
    """
    messages: list[Message] = []
    for turn in _with_assistant(turns):
        messages += _messages_of_turn(turn, clean, options)
    return messages


def _with_assistant(turns: list[Turn]) -> list[Turn]:
    """The turns; where speakers are a user and a "system" alone (as in MultiWOZ), that is the
    assistant.
    """
    if "speaker" not in turns[0]:
        return turns
    roles = {str(turn.get("speaker")).casefold() for turn in turns}
    if "system" not in roles or any(ROLES.get(role) == "assistant" for role in roles):
        return turns
    return [
        {**turn, "speaker": "assistant"} if str(turn["speaker"]).casefold() == "system" else turn
        for turn in turns
    ]


def _messages_of_turn(
    turn: Turn, clean: Callable[[str], str], options: TurnOptions
) -> list[Message]:
    role_key = _first_key(turn, ROLE_KEYS)
    role_name = str(turn[role_key]) if role_key else ""
    role = options.roles.get(role_name) or ROLES.get(role_name.casefold())
    if role is None:
        raise Dropped("a turn of an unknown role")
    content_key = _content_key(turn)
    content = turn.get(content_key) if content_key else None
    parts = read_content(content)
    if role_name.casefold() in CALL_ROLES and parts.text:
        parts.calls += calls_in(parts.text)
        parts.text = ""
    extras = _read_extras(turn, {role_key, content_key}, options)
    calls = parts.calls + extras.calls
    reasoning = "\n".join(filter(None, [extras.reasoning, parts.reasoning]))
    text = clean(parts.text)
    if reasoning and role == "assistant":
        text = f"<think>\n{clean(reasoning)}\n</think>\n\n{text}"
        if not options.thinking:
            keys = (
                ", ".join(key for key in REASONING_KEYS if not is_empty(turn.get(key)))
                or "thinking"
            )
            raise StageError(
                f"The turns have {keys!r}. Set thinking: true to learn it with the answers, or "
                f"ignore_turn_keys: [{keys}] to learn the answers without it."
            )
    messages = [{"role": "tool", "content": clean(result)} for result in parts.results]
    if text or calls or not messages:
        message: Message = {"role": role, "content": text, **extras.names}
        if calls:
            message["tool_calls"] = calls
        if role == "assistant" and not extras.learn:
            message["learn"] = False
        messages.append(message)
    return messages


def _content_key(turn: Turn) -> str | None:
    """The key of a turn's text. Raises StageError if two keys have one."""
    filled = [key for key in CONTENT_KEYS if not is_empty(turn.get(key))]
    if len(filled) > 1 and len({json_text(turn[key]) for key in filled}) > 1:
        raise StageError(
            f"A turn has a text under {' and '.join(map(repr, filled))}. Leave one, or set "
            "ignore_turn_keys."
        )
    return filled[0] if filled else _first_key(turn, CONTENT_KEYS)


@dataclass
class Extras:
    """What a turn has besides its role and its content."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""
    learn: bool = True
    names: dict[str, str] = field(default_factory=dict)


def _read_extras(turn: Turn, read: set[str | None], options: TurnOptions) -> Extras:
    """What is under the other keys of a turn. Raises StageError for a key that is not
    understood.
    """
    extras = Extras()
    for key, value in turn.items():
        if key in read or value is None or key in options.ignore_turn_keys or key in CONTENT_KEYS:
            continue
        if key in LEARN_KEYS:
            extras.learn = _weight(key, value)
        elif key in DO_NOT_LEARN_KEYS:
            extras.learn = not _weight(key, value)
        elif is_empty(value):
            continue
        elif key in ("tool_calls", "function_call", "functionCall"):
            extras.calls += calls_in(value)
        elif key in REASONING_KEYS:
            extras.reasoning = read_content(value).text
        elif key in ("name", "tool_call_id"):
            extras.names[key] = str(value)
        elif key in NOTES:
            options.left_out[key] += 1
        else:
            raise StageError(
                f"A turn has {key!r} ({cell_text(value)[:60]!r}), which is not read here. Remove "
                "it, or read the turns "
                f"without it: ignore_turn_keys: [{key}]."
            )
    return extras


def _weight(key: str, value: Any) -> bool:
    """Whether a weight means that an answer is learned. Raises StageError if it is neither 0 nor
    1.
    """
    text = cell_text(value).strip().casefold()
    if text in ("1", "1.0", "true", "yes"):
        return True
    if text in ("0", "0.0", "false", "no"):
        return False
    raise StageError(
        f"A turn has {key}: {cell_text(value)[:60]}. Only 0 and 1, false and true are understood "
        "there."
    )


@dataclass
class Content:
    """What the content of a turn says: its text, calls of tools, results of tools, and thinking."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    reasoning: str = ""


def read_content(content: Any) -> Content:
    """What a turn's content says: a text, a number, or a list of parts. Raises Dropped if it is
    anything else.
    """
    if isinstance(content, dict) and isinstance(content.get("parts"), list):
        content = content["parts"]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return Content(cell_text(content))
    result = Content()
    texts: list[str] = []
    for part in content:
        if isinstance(part, dict):
            _read_part(part, texts, result)
        elif isinstance(part, str):
            texts.append(part)
        elif not is_empty(part):
            raise Dropped("a turn that is no text")
    result.text = "\n".join(texts)
    return result


def _read_part(part: dict[str, Any], texts: list[str], result: Content) -> None:
    """Add what a part of a content says to the texts and the result. Raises Dropped for a picture,
    a sound, a file.
    """
    kind = part.get("type")
    if kind == "tool_use":
        result.calls.append(
            call_of_function({"name": part.get("name"), "arguments": part.get("input")})
        )
    elif kind == "tool_result":
        result.results.append(read_content(part.get("content")).text)
    elif kind in ("thinking", "reasoning"):
        result.reasoning += cell_text(part.get("thinking") or part.get("text"))
    elif not is_empty(part.get("functionCall")):
        result.calls += calls_in(part["functionCall"])
    elif not is_empty(part.get("functionResponse")):
        result.results.append(cell_text(part["functionResponse"].get("response")))
    elif kind in TEXT_PARTS:
        text = next(
            (part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)),
            None,
        )
        if text is None:
            raise Dropped("a turn that is no text")
        texts.append(text)
    else:
        raise Dropped(f"a turn with a part of the type {kind!r}")
