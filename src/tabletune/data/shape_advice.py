"""What to say to a reader whose table is not recognized."""

import re
from typing import Any

from tabletune.data.cells import WrittenNumber, is_empty
from tabletune.data.tables import Table

MOST_COLUMNS = 30
NOT_FOR_A_FIELD = re.compile(
    r"(.*[_\s-])?(id|ids|idx|index|url|link|uri|date|time|timestamp|source|split|"
    r"lang|language|license|hash|"
    r"created|updated|author|file|path|no|nr)",
    re.IGNORECASE,
)
# More words than resources/texts/shapes.yaml has, and parts of words: a wrong guess is only advice
# here, and nothing is learned from it.
LIKE_A_QUESTION = re.compile(
    r"quest|frage|pregunta|ask|problem|issue|title|subject|prompt|input|user|topic", re.IGNORECASE
)
LIKE_AN_ANSWER = re.compile(
    r"answ|antwort|respuesta|repl|solution|body|desc|response|output|text|content", re.IGNORECASE
)


def shown_columns(table: Table) -> list[str]:
    """The first column names, as they are shown in a message.

    Without a header they are cells, of any length.
    """
    return [str(name)[:60] for name in table.columns[:MOST_COLUMNS]]


def headless_hint(table: Table) -> str:
    """What to say where the column names of a table seem to be a row, else ""."""
    return " If its first line is a row, set header: false." if table.looks_headless() else ""


def advice(table: Table, rejected: list[str]) -> str:
    """What to set, in one sentence.

    It names columns that may be a question and an answer, if there are two.
    """
    columns = text_columns(table, rejected)
    if len(columns) > 1:
        question, answer = question_and_answer_of(columns)
        pair = f"{{question: {question[:60]!r}, answer: {answer[:60]!r}}}"
        return f"Say which are which, for instance columns: {pair}."
    if len(columns) == 1:
        name = columns[0][:60]
        return (
            f"Its one column of texts, {name!r}, can be learned as it is: "
            f"shape: text, columns: {{text: {name!r}}}."
        )
    return "It needs a column of questions and one of answers, or one of conversations."


def text_columns(table: Table, rejected: list[str]) -> list[str]:
    """The columns that may be a question or an answer, and fields in objects that may.

    No numbers, names or dates.
    """
    sample = table.sample()
    # fields of objects may be the columns that are meant: "message.text"
    names = [column for column in table.columns if column not in rejected]
    for column in list(names):
        keys: dict[str, None] = {}  # as a set that keeps the order
        for row in sample:
            if isinstance(row.get(column), dict):
                keys |= dict.fromkeys(row[column])
        names += [f"{column}.{key}" for key in keys]
    return [
        name
        for name in names
        if not NOT_FOR_A_FIELD.fullmatch(name) and _holds_texts(table, name, sample)
    ]


def _holds_texts(table: Table, name: str, sample: list[dict[str, Any]]) -> bool:
    values = []
    for row in sample:
        value: Any = row
        for part in table.path_of(name):
            value = value.get(part) if isinstance(value, dict) else None
        if not is_empty(value):
            values.append(value)
    texts = [
        value for value in values if isinstance(value, str) and not isinstance(value, WrittenNumber)
    ]
    return (
        bool(texts)
        and len(texts) == len(values)
        and any(re.search(r"[^\W\d_]", text) for text in texts)
    )


def question_and_answer_of(columns: list[str]) -> tuple[str, str]:
    """Of two or more columns, one that may be the question and another that may be the answer."""
    # the columns by name first, then in the table's order
    questions = [column for column in columns if LIKE_A_QUESTION.search(column)] + columns
    question = questions[0]
    rest = [column for column in columns if column != question]
    answers = [column for column in rest if LIKE_AN_ANSWER.search(column)] + rest
    return question, answers[0]
