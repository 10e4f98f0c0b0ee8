"""Our own rows about emergencies, which can be mixed into training (see docs/trust.md)."""

from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np

from tabletune.data.field_templates import fields_of, fill
from tabletune.data.messages import Message
from tabletune.data.splits import question_id, question_key
from tabletune.errors import StageError

Row = dict[str, Any]


def emergency_lines() -> list[list[str]]:
    """The file's lines: [name of the emergency, question, answer].

    The name is empty for an everyday complaint.
    """
    file = resources.files("tabletune").joinpath("resources/texts/safety_rows.txt")
    lines = file.read_text("utf-8").splitlines()
    return [[part.strip() for part in line.split("|")] for line in lines]


def has_own_words(question_template: str) -> bool:
    """Whether a template has one field and words around it."""
    fields = fields_of(question_template)
    return len(fields) == 1 and question_template.strip() != f"{{{fields[0]}}}"


def wordings(emergency: str, question: str, question_template: str) -> list[str]:
    """A question, and the emergency in the words of the template if that has words of its own."""
    if not emergency or not has_own_words(question_template):
        return [question]
    return [question, fill(question_template, {fields_of(question_template)[0]: emergency})]


def emergency_questions(question_template: str) -> list[str]:
    """The questions about emergencies; none about an everyday complaint."""
    questions = []
    for emergency, question, _ in emergency_lines():
        if emergency:
            questions += wordings(emergency, question, question_template)
    return questions


class SafetyRows:
    """Our rows as conversations.

    Each emergency is there in free words, and in those of the question's template, where that has
    one field and words of its own. `with_system` puts the system prompt in front of messages.
    """

    def __init__(
        self, question_template: str, with_system: Callable[[list[Message]], list[Message]]
    ) -> None:
        self.question_template = question_template
        self.with_system = with_system

    def rows(self) -> list[Row]:
        """All rows: prompt, completion, tools, learned, key and group."""
        rows = []
        for emergency, question, answer in emergency_lines():
            for text in wordings(emergency, question, self.question_template):
                rows.append(self.row(text, answer))
        return rows

    def row(self, question: str, answer: str) -> Row:
        """A question and its answer as a conversation."""
        key = question_key([question])
        return {
            "prompt": self.with_system([{"role": "user", "content": question}]),
            "completion": [{"role": "assistant", "content": answer}],
            "tools": "",
            "learned": "",
            "key": key,
            "group": question_id(key),
        }

    @staticmethod
    def choose(rows: list[Row], wanted: Any) -> list[Row]:
        """As many rows as `wanted`, of all kinds; True is all of them.

        Raises StageError if there are not so many.
        """
        number = len(rows) if wanted is True else wanted
        if not isinstance(number, int) or not 0 <= number <= len(rows):
            raise StageError(
                f"safety_rows={wanted!r}: use true, false, or a number up to {len(rows)}."
            )
        # evenly over the file, so that a part of the rows has all kinds
        places = np.linspace(0, len(rows), number, endpoint=False, dtype=int)
        return [rows[place] for place in places]
