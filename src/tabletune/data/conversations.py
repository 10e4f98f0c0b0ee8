"""The conversation in a row of a table: messages of system, user, assistant and tool."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tabletune.data.cells import cell_text, is_empty, json_text
from tabletune.data.cleaning import Dropped
from tabletune.data.conversation_shape import Shape
from tabletune.data.field_templates import fields_of, fill, is_incomplete
from tabletune.data.messages import Message, TurnOptions, messages_in, read_content
from tabletune.data.turns import turns_in
from tabletune.errors import StageError, suggestion

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_LISTS = ("", "first", "rows", "lines", "json")
Clean = Callable[[str], str]
EmptyCells = Callable[[str, str], str]


@dataclass
class ConversationReader:
    """Makes conversations of rows, {field: value}, by a shape.

    `clean` is called with each text, `empty_cells` with each field and its text (see
    `cell_filter`). `answer_lists` is the parameter of that name.
    """

    shape: Shape
    clean: Clean
    empty_cells: EmptyCells
    turn_options: TurnOptions = field(default_factory=TurnOptions)
    answer_lists: str = ""

    def read(self, row: dict[str, Any]) -> tuple[list[str], list[Message]]:
        """What a row says: (the texts that make its question, its messages).

        Raises Dropped if it teaches nothing.
        """
        if self.shape.name == "text":
            text = self.clean(cell_text(row["text"]))
            return [text], [{"role": "assistant", "content": text}]
        if self.shape.question_template:
            questions, messages = self._read_templates(row)
        else:
            messages = self._read_turns(row)
            questions = [message["content"] for message in messages if message["role"] == "user"]
        system = self.clean(read_content(_parts_or_text(row.get("system"))).text)
        return questions, with_system_column(system, messages)

    def _read_turns(self, row: dict[str, Any]) -> list[Message]:
        """The messages of the columns that hold turns; a text in place of turns is one turn."""
        messages: list[Message] = []
        for field_name, role in (("chat", "user"), ("question", "user"), ("answer", "assistant")):
            cell = row.get(field_name)
            if is_empty(cell):
                continue
            turns = turns_in(cell, texts_are_turns=field_name == "chat")
            if turns is None and field_name != "chat":
                turns = [{"role": role, "content": cell}]
            if turns is None:
                raise Dropped("not a list of turns")
            messages += messages_in(turns, self.clean, self.turn_options)
        return messages

    def _read_templates(self, row: dict[str, Any]) -> tuple[list[str], list[Message]]:
        """The question texts and the messages that the templates make of a row.

        What was said before comes first.
        """
        fields = self._fields()
        texts = {name: self._text(name, value) for name, value in row.items() if name in fields}
        if "options" in texts and is_empty(row["options"]):
            texts["options"] = ""
        elif "options" in texts:
            options = options_in(row["options"])
            texts["options"] = "\n".join(options)
            # written in full, as the letter alone would teach nothing of the table
            texts["answer"] = right_option(cell_text(row["answer"]), row["options"], options)
        question_template = self.shape.question_template
        question_texts = [texts[name] for name in fields_of(question_template)]
        question = fill(question_template, texts)
        answer = fill(self.shape.answer_template, texts)
        # a line of the template that lacks some of its fields would be half a sentence
        lines = question_template.split("\n")
        if not any(question_texts) or any(is_incomplete(line, texts) for line in lines):
            raise Dropped("no question")
        # an Alpaca row may have its question in `input` alone
        is_alpaca = self.shape.columns.get("context", "").casefold() == "input"
        if not question_texts[0] and self.shape.name != "columns" and not is_alpaca:
            raise Dropped("no question")
        if not texts.get(self.shape.answer_column, answer):
            raise Dropped("no answer")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        # earlier questions belong to what is asked: the same question after others is another one
        earlier = self._history(row.get("history"))
        asked_before = [message["content"] for message in earlier if message["role"] == "user"]
        return asked_before + question_texts, earlier + messages

    def _fields(self) -> set[str]:
        return {*fields_of(self.shape.question_template), *fields_of(self.shape.answer_template)}

    def _text(self, field_name: str, value: Any) -> str:
        """A cell as a clean text; a list of answers as `answer_lists` says."""
        if (
            field_name in fields_of(self.shape.answer_template)
            and "options" not in self.shape.columns
        ):
            value = self._one_answer(field_name, value)
        elif self.shape.name != "columns" and field_name == "question" and isinstance(value, list):
            column = self.shape.columns[field_name]
            raise StageError(
                f"The column {column!r} contains lists, such as {json_text(value)[:80]}. A "
                "question must be one text. To learn the lists as JSON, set question_template: "
                f'"{{{column}}}" and an answer_template.'
            )
        return self.empty_cells(field_name, self.clean(cell_text(value)))

    def _one_answer(self, field_name: str, value: Any) -> Any:
        """An answer in place of a list of answers.

        Raises StageError if the reader has not said what a list means.
        """
        answers = answers_in(value)
        if answers is None:
            return value
        # a list of one is that one, whatever the setting
        if len(answers) < 2 or self.answer_lists == "first":
            return answers[0] if answers else ""
        if self.answer_lists == "lines":
            return "\n".join(answers)
        if self.answer_lists == "json":
            return json_text(answers)
        column = self.shape.columns[field_name]
        raise StageError(
            f"The column {column!r} contains lists, such as {json_text(answers)[:80]}. Say what "
            "they mean with answer_lists: rows (each item is an answer, in a row of its own), "
            "first (only the first item), lines (one answer of several lines) or json."
        )

    def answers_apart(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row once for each of its answers, if answer_lists is "rows"; else the row alone."""
        if self.answer_lists != "rows" or "options" in self.shape.columns:
            return [row]
        for field_name in fields_of(self.shape.answer_template):
            answers = answers_in(row[field_name]) or []
            if len(answers) > 1:
                return [{**row, field_name: answer} for answer in answers]
        return [row]

    def _history(self, cell: Any) -> list[Message]:
        """The messages of what was said before. Raises Dropped if it cannot be read."""
        if is_empty(cell):
            return []
        turns = turns_in(cell, texts_are_turns=True)
        if turns is None:
            if cell_text(cell).strip() in ("", "[]", "null", "None"):
                return []
            raise Dropped("a history that is not a list of turns")
        return messages_in(turns, self.clean, self.turn_options)


def with_system_column(system: str, messages: list[Message]) -> list[Message]:
    """The messages of a row with the text of its system column, which may be "".

    A system turn at the start keeps its text behind that of the column. An empty one is left out:
    it says nothing, and would take the place of the parameter `system_prompt`.
    """
    turn: Message = {"role": "system", "content": ""}
    if messages and messages[0]["role"] == "system":
        turn, *messages = messages
    # often the column repeats what the turn says
    texts = dict.fromkeys(filter(None, [system, turn["content"]]))
    if not texts or not messages:
        return messages
    return [{**turn, "content": "\n\n".join(texts)}, *messages]


def _parts_or_text(value: Any) -> Any:
    """The value of a system column.

    Parts that CSV has as JSON are parts, everything else is as it is.
    """
    # to read the parts, they are put into a turn, as they would stand in a conversation
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*\"(type|text)\"", value):
        turns = turns_in(f'[{{"role": "system", "content": {value}}}]')
        return turns[0]["content"] if turns else value
    return value


def answers_in(value: Any) -> list[str] | None:
    """The different answers in a list of texts or numbers, or in SQuAD's {"text": [...]}.

    None if a cell is neither.
    """
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if not isinstance(value, list) or any(isinstance(item, (list, dict)) for item in value):
        return None
    texts = [cell_text(item) for item in value if not is_empty(item)]
    return list(dict.fromkeys(texts))


# Options of a multiple choice


def _labels_and_texts(value: Any) -> tuple[list[str], list[str]]:
    """The labels and the texts of options.

    A list, {"A": text}, {"label": [...], "text": [...]}, or a list of such. Raises Dropped for
    anything else.
    """
    if isinstance(value, str):
        parsed = turns_in(f'[{{"role": "user", "content": {value}}}]')
        value = parsed[0]["content"] if parsed else value
    # {"label": ["A", "B"], "text": ["Peru", "Chile"]}, as in ARC
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = [cell_text(label) for label in value.get("label") or []]
        texts = [cell_text(text) for text in value["text"]]
        return (labels if len(labels) == len(texts) else list(LETTERS[: len(texts)])), texts
    # {"A": "Peru", "B": "Chile"}
    if isinstance(value, dict) and value:
        return [str(label) for label in value], [cell_text(text) for text in value.values()]
    if isinstance(value, list) and 1 < len(value) <= len(LETTERS):
        # [{"label": "A", "text": "Peru"}, …]
        if all(isinstance(item, dict) and "text" in item for item in value):
            labels = [
                cell_text(item.get("label", letter))
                for item, letter in zip(value, LETTERS, strict=False)
            ]
            return labels, [cell_text(item["text"]) for item in value]
        # ["Peru", "Chile"]
        if not any(isinstance(item, (dict, list)) for item in value):
            return list(LETTERS[: len(value)]), [cell_text(item) for item in value]
    raise Dropped("options that are not a list")


def options_in(value: Any) -> list[str]:
    """The options of a row as lines: "A. Peru". Raises Dropped if there are none."""
    labels, texts = _labels_and_texts(value)
    return [f"{label}. {text}" for label, text in zip(labels, texts, strict=True)]


def right_option(answer: str, value: Any, options: list[str]) -> str:
    """The line of the right option, which a row names by its text, its label, or its place from 0.

    Raises Dropped if the answer is none of these, or if it is two of them.
    """
    labels, texts = _labels_and_texts(value)
    answer = answer.strip()
    if not answer:
        raise Dropped("no answer")
    # "2" may be an option's text, its label or its place; two different ones are ambiguous
    places = set()
    if answer in texts:
        places.add(texts.index(answer))
    if answer in labels:
        places.add(labels.index(answer))
    elif answer.isdecimal():
        places.add(int(answer))
    elif answer.upper() in labels:
        places.add(labels.index(answer.upper()))
    if len(places) > 1:
        raise Dropped("an answer that may be an option or its number")
    if not places or max(places) >= len(options):
        raise Dropped("an answer that is none of the options (numbers count from 0)")
    return options[places.pop()]


# Cells that only say that they are empty


def cell_filter(shape: Shape, values: Any, patterns: Any) -> EmptyCells:
    """A function of a field and its text that empties cells which say nothing.

    It gives "" for a cell with one of the values, or that a pattern matches from end to end.

    Lists are for the optional fields; {field: list} is for the fields that it names. Raises
    StageError for a field or a pattern that is none.
    """
    question, answer = fields_of(shape.question_template), fields_of(shape.answer_template)
    # a field that stands alone in its template is required: without it there is no row
    required = {shape.answer_column}
    for fields in (question, answer):
        if len(fields) == 1:
            required.add(fields[0])
    optional = [name for name in (*question, *answer) if name not in required]
    emptied: dict[str, list[re.Pattern[str]]] = {}
    for parameter, setting in (("drop_values", values), ("drop_patterns", patterns)):
        by_field = setting if isinstance(setting, dict) else dict.fromkeys(optional, setting)
        for name, forms in by_field.items():
            if name not in (*question, *answer):
                raise StageError(
                    f"{parameter}: there is no field "
                    f"{name!r}.{suggestion(name, (*question, *answer))}"
                )
            for form in forms if isinstance(forms, list) else [forms]:
                pattern = re.escape(str(form)) if parameter == "drop_values" else form
                try:
                    emptied.setdefault(name, []).append(re.compile(pattern, re.IGNORECASE))
                except re.error as error:
                    raise StageError(
                        f"{parameter}: {error.pattern!r} is not a valid regular expression "
                        f"({error})."
                    ) from error

    def empty_cells(name: str, text: str) -> str:
        return "" if any(pattern.fullmatch(text) for pattern in emptied.get(name, ())) else text

    return empty_cells
