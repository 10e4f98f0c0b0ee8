"""Conversations as tables have them: which cells hold one, and its turns."""

import ast
import json
import re
from contextlib import suppress
from typing import Any

from tabletune.data.cells import is_empty
from tabletune.data.rendered import turns_of_rendered_text
from tabletune.data.vocabulary import ROLES, WORDS

ROLE_KEYS: list[str] = WORDS["turn_keys"]["role"]
SURE_ROLE_KEYS = ("role", "from", "speaker")  # an author or a sender may be of anything
PYTHON_LIST = re.compile(r"\s*[\[{]\s*(\{\s*)?'")
Turn = dict[str, Any]


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
        # as pandas writes a list into a CSV: with single quotes, which JSON does not have
        if PYTHON_LIST.match(text):
            return ast.literal_eval(text.strip())
        return json.loads(text)
    return text


def _turns_of_object(cell: dict[str, Any]) -> list[Turn] | None:
    role_key = first_key(cell, ROLE_KEYS)
    if role_key and isinstance(cell[role_key], list):
        # an object of lists, as `datasets` stores a list of objects
        lists = {key: values for key, values in cell.items() if isinstance(values, list)}
        if len({len(values) for values in lists.values()}) == 1:
            return [
                dict(zip(lists, values, strict=True))
                for values in zip(*lists.values(), strict=True)
            ]
        return None
    # one turn alone, not in a list
    if role_key in ("role", "from") and str(cell[role_key]).casefold() in ROLES:
        return [cell]
    for name in WORDS["columns"]["chat"]:
        turns = cell.get(name)
        if isinstance(turns, list):
            return turns_in(turns)
    return None


def _turns_of_objects(cell: list[Turn]) -> list[Turn] | None:
    role_key = first_key(cell[0], ROLE_KEYS)
    if role_key in SURE_ROLE_KEYS or (role_key and str(cell[0][role_key]).casefold() in ROLES):
        return cell
    if all(turn and all(str(key).casefold() in ROLES for key in turn) for turn in cell):
        turns: list[Turn] = []
        for turn in cell:
            for role, text in turn.items():
                if not is_empty(text):
                    turns.append({"role": role, "content": text})
        return turns
    return None


def _turns_of_exchanges(cell: list[Turn]) -> list[Turn] | None:
    """The turns of a list of questions with their answers.

    Each item is an object such as {"input": ..., "output": ...}.
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
    flat: list[Any] = []
    for pair in cell:
        flat += pair
    if all(isinstance(item, dict) for item in flat) and first_key(flat[0], ROLE_KEYS):
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


def first_key(turn: Turn, keys: list[str]) -> str | None:
    """The first of the keys that a turn has."""
    return next((key for key in keys if key in turn), None)
