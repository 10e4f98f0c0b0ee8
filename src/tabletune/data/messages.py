"""The messages in the turns of a conversation.

A turn that has more in it than a role and a text is read right (calls of tools, thinking, weights
of the loss), or it is refused with the name of the key: nothing in it is dropped silently.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tabletune.data.cells import cell_text, is_empty, json_text
from tabletune.data.cleaning import Dropped
from tabletune.data.tools import call_of_function, calls_in
from tabletune.data.turns import ROLE_KEYS, Turn, first_key
from tabletune.data.vocabulary import ROLES, WORDS
from tabletune.errors import StageError

CONTENT_KEYS: list[str] = WORDS["turn_keys"]["content"]
REASONING_KEYS: list[str] = WORDS["turn_keys"]["reasoning"]
LEARN_KEYS: list[str] = WORDS["turn_keys"]["learn"]
DO_NOT_LEARN_KEYS: list[str] = WORDS["turn_keys"]["do_not_learn"]
NOTES = set(WORDS["turn_keys"]["notes"])
CALL_KEYS = ("tool_calls", "function_call", "functionCall")
CALL_ROLES = ("function_call", "tool_call")
TEXT_PARTS = (None, "text", "input_text", "output_text", "summary_text")
THINKING_PARTS = ("thinking", "reasoning")
THINKING_KEYS = ("thinking", "text", "reasoning", "content", "summary")  # of such a part
PART = "a part of the content"
Message = dict[str, Any]


@dataclass
class TurnOptions:
    """How turns are read.

    The parameters of notebook 1, and a count of the keys that were left out.
    """

    thinking: bool = False
    ignore_turn_keys: tuple[str, ...] = ()
    roles: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def messages_in(
    turns: list[Turn], clean: Callable[[str], str], options: TurnOptions
) -> list[Message]:
    """The messages of a conversation.

    Role and content, `tool_calls` where there are, `learn`: False of an answer that is not to be
    learned, `name` and `tool_call_id` where a turn has them.

    Raises Dropped for a row that cannot be read, StageError for a key that says something which is
    not understood.
    """
    messages: list[Message] = []
    for turn in _with_assistant(turns):
        messages += _messages_of_turn(turn, clean, options)
    return messages


def _with_assistant(turns: list[Turn]) -> list[Turn]:
    """The turns, with a "system" as the assistant where nobody else is one.

    So it is in MultiWOZ, whose speakers are a user and a system.
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
    """The messages of a turn: one, or one for each result of a tool and one for the rest.

    Raises Dropped for a role that is not known, and StageError for what the reader must decide.
    """
    role_key = first_key(turn, ROLE_KEYS)
    role_name = str(turn[role_key]) if role_key else ""
    role = options.roles.get(role_name) or ROLES.get(role_name.casefold())
    if role is None:
        raise Dropped("a turn of an unknown role")
    content_key = _content_key(turn)
    content = turn.get(content_key) if content_key else None
    parts = read_content(content)
    # ShareGPT writes a call as the text of a turn of its own
    if role_name.casefold() in CALL_ROLES and parts.text:
        parts.calls += calls_in(parts.text)
        parts.text = ""
    extras = _read_extras(turn, {role_key, content_key}, options)
    calls = parts.calls + extras.calls
    thoughts = dict(extras.thoughts)
    # a part of the content has no key of its own: what is ignored is its type
    if parts.reasoning and "thinking" not in options.ignore_turn_keys:
        thoughts[PART] = parts.reasoning
    text = clean(parts.text)
    if thoughts and role == "assistant":
        reasoning = read_thinking(thoughts, options)
        # in the form in which models with <think> write it themselves
        text = f"<think>\n{clean(reasoning)}\n</think>\n\n{text}"
    elif thoughts:  # of somebody who is not the model
        options.left_out.update(thoughts.keys())
    messages = [{"role": "tool", "content": clean(result)} for result in parts.results]
    # a turn with results of tools alone is only those
    if text or calls or not messages:
        message: Message = {"role": role, "content": text, **extras.names}
        if calls:
            message["tool_calls"] = calls
        if role == "assistant" and not extras.learn:
            message["learn"] = False
        messages.append(message)
    return messages


def read_thinking(thoughts: dict[str, str], options: TurnOptions) -> str:
    """The model's thinking in a turn, of {key: text}; that of PART are parts of its content.

    Raises StageError unless thinking is to be learned, and if two keys have different texts.
    """
    if not options.thinking:
        name = ", ".join(dict.fromkeys("thinking" if key == PART else key for key in thoughts))
        raise StageError(
            f"The turns have {name!r}. Set thinking: true to learn it with the answers, or "
            f"ignore_turn_keys: [{name}] to learn the answers without it."
        )
    keys = [key for key in thoughts if key != PART]
    # the same text under two keys is no contradiction
    if len({thoughts[key] for key in keys}) > 1:
        raise StageError(
            f"A turn has different thinking under {' and '.join(map(repr, keys))}. Remove one of "
            "these keys, or list it in ignore_turn_keys."
        )
    return "\n".join(dict.fromkeys(thoughts.values()))


def _content_key(turn: Turn) -> str | None:
    """The key of a turn's text. Raises StageError if two keys have one."""
    filled = [key for key in CONTENT_KEYS if not is_empty(turn.get(key))]
    # the same text under two keys is no contradiction
    if len(filled) > 1 and len({json_text(turn[key]) for key in filled}) > 1:
        raise StageError(
            f"A turn has a text under {' and '.join(map(repr, filled))}. Remove one of these keys, "
            "or list it in ignore_turn_keys."
        )
    return filled[0] if filled else first_key(turn, CONTENT_KEYS)


@dataclass
class Extras:
    """What a turn has besides its role and its content."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    thoughts: dict[str, str] = field(default_factory=dict)  # by key
    learn: bool = True
    names: dict[str, str] = field(default_factory=dict)


def _read_extras(turn: Turn, read: set[str | None], options: TurnOptions) -> Extras:
    """What is under the keys of a turn that are not among those that are `read` already.

    Raises StageError for a key that is not understood.
    """
    skipped = {*read, *options.ignore_turn_keys, *CONTENT_KEYS}
    extras = Extras()
    for key, value in turn.items():
        # null says nothing, and Arrow gives every object the keys of all
        if key in skipped or value is None:
            continue
        # 0 says something here, so empty cells are looked at only afterwards
        if key in LEARN_KEYS:
            extras.learn = _weight(key, value)
        elif key in DO_NOT_LEARN_KEYS:
            extras.learn = not _weight(key, value)
        elif not is_empty(value):
            _read_extra(extras, key, value, options)
    return extras


def _read_extra(extras: Extras, key: str, value: Any, options: TurnOptions) -> None:
    """Add to the extras of a turn what is under one of its keys.

    Raises StageError for a key that is not understood.
    """
    if key in CALL_KEYS:
        extras.calls += calls_in(value)
    elif key in REASONING_KEYS:
        content = read_content(value)
        # as a text, or as a list of parts of which some are of the type "thinking"
        reasoning = "\n".join(filter(None, [content.reasoning, content.text]))
        if reasoning:
            extras.thoughts[key] = reasoning
    elif key in ("name", "tool_call_id"):
        extras.names[key] = str(value)
    elif key in NOTES:
        options.left_out[key] += 1
    else:
        raise StageError(
            f"A turn has the key {key!r} ({cell_text(value)[:60]!r}), which cannot be read "
            f"here. Remove it, or set ignore_turn_keys: [{key}] to read the turns without it."
        )


def _weight(key: str, value: Any) -> bool:
    """Whether a weight means that an answer is learned.

    Raises StageError if it is neither 0 nor 1.
    """
    text = cell_text(value).strip().casefold()
    if text in ("1", "1.0", "true", "yes"):
        return True
    if text in ("0", "0.0", "false", "no"):
        return False
    raise StageError(f"A turn has {key}: {cell_text(value)[:60]}. Use 0 or false, 1 or true.")


@dataclass
class Content:
    """What the content of a turn says: its text, calls of tools, results of tools, and thinking."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    reasoning: str = ""


def read_content(content: Any) -> Content:
    """What a turn's content says: a text, a number, or a list of parts.

    Raises Dropped if it is anything else.
    """
    # Gemini's form
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
            raise Dropped("a turn whose content is not text")
    result.text = "\n".join(texts)
    return result


def _read_part(part: dict[str, Any], texts: list[str], result: Content) -> None:
    """Add what a part of a content says to the texts and the result.

    Raises Dropped for a picture, a sound, a file.
    """
    kind = part.get("type")
    if kind == "tool_use":
        result.calls.append(
            call_of_function({"name": part.get("name"), "arguments": part.get("input")})
        )
    elif kind == "tool_result":
        result.results.append(read_content(part.get("content")).text)
    elif kind in THINKING_PARTS:
        filled = [part[name] for name in THINKING_KEYS if not is_empty(part.get(name))]
        content = read_content(filled[0] if filled else "")
        thoughts = [result.reasoning, content.reasoning, content.text]
        result.reasoning = "\n".join(filter(None, thoughts))
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
            raise Dropped("a turn whose content is not text")
        texts.append(text)
    else:
        raise Dropped(f"a turn with a part of the type {kind!r}")
