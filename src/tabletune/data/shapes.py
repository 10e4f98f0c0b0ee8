"""The shapes that tables have: which columns hold questions, answers and conversations."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tabletune.data.cells import cell_text, is_empty
from tabletune.data.example import read_example
from tabletune.data.field_templates import check_template, fields_of
from tabletune.data.rendered import turns_of_rendered_text, unread_marker
from tabletune.data.shape_advice import advice, headless_hint, shown_columns
from tabletune.data.sources import split_of
from tabletune.data.tables import Table
from tabletune.data.turns import ROLE_KEYS, turns_in
from tabletune.data.vocabulary import ROLES, WORDS
from tabletune.errors import StageError, suggestion
from tabletune.run.parameters import PARAMETERS

NEEDED: dict[str, str] = WORDS["shapes"]
CHAT_FIELDS = ("chat", "system", "tools")
MESSAGE_FIELDS = ("question", "answer", "system", "tools")
PAIR_FIELDS = ("question", "answer", "context", "system", "tools", "history", "options")
FIELDS_AS_THEY_ARE = ("system", "tools", "history", "keep")  # in no template


@dataclass
class Shape:
    """How rows become conversations.

    `columns` has the table's column for each field. The templates are "" for columns that hold
    whole conversations. `example` is the worked example whose settings apply, or None.
    `split_column` names the official split of each row, `unused` are the columns that nothing is
    read from, and `notes` say what else there is to say.
    """

    name: str
    columns: dict[str, str]
    question_template: str = ""
    answer_template: str = ""
    answer_column: str = ""
    example: str | None = None
    split_column: str = ""
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds_turns(self) -> bool:
        """Whether there are columns of turns, or of earlier turns."""
        if "history" in self.columns:
            return True
        return self.name != "text" and not self.question_template

    def describe(self) -> list[str]:
        """What notebook 1 says of the shape, in lines."""
        lines = [f"shape: {self.name}"]
        if self.example:
            lines[0] += f", with the settings of the example {self.example}"
        lines += [f"{field} = column {column!r}" for field, column in self.columns.items()]
        if self.split_column:
            lines.append(f"the split of a row = column {self.split_column!r}")
        if self.unused:
            lines.append(f"not used: {', '.join(map(repr, self.unused[:30]))}")
        return lines + self.notes


def with_example(table: Table, parameters: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The parameters, with the worked example's settings where they have their defaults, and its
    name or None.

    The example is a table with its columns, unless other columns or another shape are set.
    """
    example = read_example("home_remedies")
    defaults = PARAMETERS["01_format_dataset"]
    own_columns = parameters["columns"] not in ({}, example["columns"])
    own_shape = parameters["shape"] not in ("auto", "columns")
    if own_columns or own_shape or not {"Health Issue", "Home Remedy"} <= set(table.columns):
        return parameters, None
    settings = {
        name: value
        for name, value in example.items()
        if parameters.get(name) == defaults.get(name, ...)
    }
    return {**parameters, **settings}, "home_remedies"


def recognize(table: Table, settings: dict[str, Any], example: str | None = None) -> Shape:
    """The Shape of a table. `settings` are the parameters of notebook 1.

    Raises StageError, with the nearest name, if no shape fits, if two columns claim one field, or
    if a setting names what is not there.
    """
    wanted = settings["shape"]
    shapes = ["auto", "columns", *NEEDED]
    if wanted not in shapes:
        raise StageError(
            f"shape={wanted!r}: use one of {', '.join(shapes)}.{suggestion(wanted, shapes)}"
        )
    columns = {str(name): str(column) for name, column in settings["columns"].items()}
    templates = [
        settings[name] for name in ("question_template", "answer_template", "answer_column")
    ]
    matcher = ColumnMatcher(table, columns)
    if wanted == "columns" or (wanted == "auto" and any(templates) and not matcher.chats):
        question_template, answer_template, answer_column = templates
        shape = Shape(
            "columns", columns, question_template, answer_template, answer_column, example
        )
    else:
        shape = matcher.shape(wanted)
    check_shape(shape, table)
    shape.split_column = find_split_column(table, shape, settings.get("split_column", ""))
    used = {table.path_of(column)[0] for column in shape.columns.values()} | {shape.split_column}
    shape.unused = [column for column in table.columns if column not in used]
    return shape


class ColumnMatcher:
    """Finds the column of each field by the names of the columns and by what is in the first rows.

    `columns`, if it is not empty, has the only columns to look at, by the names that they count as.
    """

    def __init__(self, table: Table, columns: dict[str, str]) -> None:
        self.table = table
        self.set_by_reader = bool(columns)
        self.sample = table.sample()
        self.names: dict[str, list[str]] = {}  # the columns of a name in lower case
        for name, column in (columns or {column: column for column in table.columns}).items():
            self.names.setdefault(name.strip().casefold(), []).append(column)
        self.rejected = self.candidates(WORDS["preferences"]["rejected"])
        self.chosen = self.candidates(WORDS["preferences"]["chosen"])
        looked_at = list(columns.values())
        if not columns:
            others = self.rejected + self.candidates(WORDS["columns"]["system"])
            if self.claims("question") and self.claims("answer"):
                others += self.candidates(WORDS["columns"]["history"])
            looked_at = [column for column in table.columns if column not in others]
        self.rendered: list[str] = []  # the columns whose conversations are rendered texts
        kinds = {column: self.kind_of_conversation(column) for column in looked_at}
        self.chats = {column: kind for column, kind in kinds.items() if kind}

    def candidates(self, names: Iterable[str]) -> list[str]:
        """The columns that have one of these names."""
        return [column for name in names for column in self.names.get(name, [])]

    def values(self, column: str) -> list[Any]:
        """What a column has in the first rows, without what is empty."""
        path = self.table.path_of(column)
        cells = [_value(row, path) for row in self.sample]
        return [cell for cell in cells if not is_empty(cell)]

    def kind_of_conversation(self, column: str) -> str:
        """The shape that a column of conversations has, "" if its cells are none.

        Cells that are texts must mostly be rendered conversations, as some text may quote one.
        """
        cells = self.values(column)
        texts_are_turns = column in self.candidates(WORDS["columns"]["chat"])
        conversations = [
            turns for turns in (turns_in(cell, texts_are_turns) for cell in cells) if turns
        ]
        if not conversations:
            return ""
        rendered = [cell for cell in cells if isinstance(cell, str) and has_rendered_answer(cell)]
        texts = [cell for cell in cells if isinstance(cell, str) and turns_of_rendered_text(cell)]
        if texts and 2 * len(rendered) < len(cells):
            return ""
        if rendered:
            self.rendered.append(column)
        return "conversations" if "from" in conversations[0][0] else "messages"

    def shape(self, wanted: str) -> Shape:
        """The shape of the table, or the `wanted` one unless that is "auto". Raises StageError."""
        chat = self.chat_column()
        question, answer = self.question_and_answer()
        both_lists = {question, answer} <= set(self.chats) and question is not None
        text = self.first(self.candidates(WORDS["columns"]["text"]))
        plain = "prompt_completion" if question in self.names.get("prompt", []) else "instruction"
        if wanted == "auto":
            if both_lists:
                wanted = plain
            elif chat:
                wanted = self.chats[chat]
            elif question and answer:
                wanted = plain
            elif text and len(self.table.columns) == 1:
                wanted = "text"
        if wanted == "text" and text:
            self.check_markers([text])
            return Shape("text", {"text": text})
        if wanted in ("messages", "conversations") and chat:
            self.check_one_claim("messages", self.claims_of_chat())
            shape = Shape(wanted, {"chat": chat, **self.others(["system", "tools"])})
            self.add_note_on_preferences(shape, chat)
            self.add_preference_label(shape, question=None, answer=chat)
            return shape
        if wanted in ("prompt_completion", "instruction") and question and answer:
            self.check_claims()
            if both_lists or answer in self.chats:
                self.check_one_claim(
                    "messages", [c for c in self.claims_of_chat() if c not in (question, answer)], 0
                )
                columns = {
                    "question": question,
                    "answer": answer,
                    **self.others(["system", "tools"]),
                }
                shape = Shape(wanted, columns)
                self.add_note_on_preferences(shape, answer)
                self.add_preference_label(shape, question, answer)
                return shape
            return self.pair_shape(wanted, question, answer)
        needs = "their shape is not recognized"
        if wanted != "auto":
            needs = f"shape={wanted} needs {NEEDED[wanted]}"
        raise StageError(
            f"The table has the columns {shown_columns(self.table)}: {needs}. "
            f"{advice(self.table, self.rejected)}{headless_hint(self.table)}"
        )

    def pair_shape(self, name: str, question: str, answer: str) -> Shape:
        """The shape of a table with a question and an answer in each row."""
        self.check_markers([question, answer])
        columns = {"question": question, "answer": answer}
        columns |= self.others(
            ["context", "system", "tools", "history", "options"], taken=[question, answer]
        )
        shape = Shape(name, columns, "{question}", "{answer}", "answer")
        if "options" in columns:
            shape.question_template += "\n\n{options}"
        if "context" in columns:
            shape.question_template += "\n\n{context}"
        self.add_note_on_preferences(shape, answer)
        self.add_preference_label(shape, question, answer)
        return shape

    def add_note_on_preferences(self, shape: Shape, column: str) -> None:
        """Say of a table of preferences which answers are learned."""
        if column in self.chosen and self.rejected:
            shape.notes.append(
                f"a table of preferences: {column!r} is learned, {self.rejected[0]!r} is not"
            )

    def add_preference_label(self, shape: Shape, question: str | None, answer: str | None) -> None:
        """Let a shape leave out the rows whose answer was rejected, and say so."""
        label = self.preference_label(question, answer)
        if label:
            shape.columns["keep"] = label
            shape.notes.append(
                f"rows whose {label!r} is false are answers that were rejected: they are left out"
            )

    def chat_column(self) -> str | None:
        """The column of conversations: one with a usual name, else any; of preferences, the chosen
        one.
        """
        if self.rejected and self.chosen:
            full = [
                column
                for column in self.chosen
                if self.chats.get(column) and self.has_questions(column)
            ]
            if full:
                return full[0]
        named = [
            column for column in self.candidates(WORDS["columns"]["chat"]) if column in self.chats
        ]
        if named:
            return named[0]
        question, answer = self.question_and_answer()
        for column in self.claims_of_chat():
            part_of_pair = column in (question, answer) and not self.has_questions(column)
            beside_a_pair = column in self.rendered and question and answer
            if not part_of_pair and not beside_a_pair:
                return column
        return None

    def has_questions(self, column: str) -> bool:
        """Whether the conversations of a column have turns of a user."""
        for cell in self.values(column):
            for turn in turns_in(cell) or []:
                role = next((turn[key] for key in ROLE_KEYS if key in turn), "")
                if ROLES.get(str(role).casefold()) == "user":
                    return True
        return False

    def question_and_answer(self) -> tuple[str | None, str | None]:
        """The columns of questions and answers, None where there is none."""
        question = self.first(self.claims("question"))
        answers = self.claims("answer")
        if not answers and self.candidates(WORDS["columns"]["options"]):
            answers = self.candidates(WORDS["right_option"])
        answer = self.first([column for column in answers if column != question])
        return question, answer

    def claims(self, field_name: str) -> list[str]:
        """The columns that may be a field. An `input` beside another question is its context."""
        if field_name == "answer" and self.chosen and self.rejected:
            return self.chosen
        columns = self.candidates(WORDS["columns"][field_name])
        if not columns:
            columns = self.candidates(WORDS["other_columns"].get(field_name, []))
        inputs = self.names.get("input", [])
        if field_name == "question" and set(columns) - set(inputs):
            columns = [column for column in columns if column not in inputs]
        if field_name == "context" and not set(self.claims("question")) - set(inputs):
            columns = [column for column in columns if column not in inputs]
        return list(dict.fromkeys(columns))

    def claims_of_chat(self) -> list[str]:
        """The columns of conversations, without those of preferences."""
        return [column for column in self.chats if column not in self.rejected + self.chosen]

    def others(self, fields: list[str], taken: list[str] | None = None) -> dict[str, str]:
        """The columns of the fields that a table may have besides. Raises StageError if two claim
        one.
        """
        columns = {}
        for field_name in fields:
            claims = [column for column in self.claims(field_name) if column not in (taken or [])]
            self.check_one_claim(field_name, claims)
            if claims:
                columns[field_name] = claims[0]
        return columns

    def check_claims(self) -> None:
        """Raise StageError if two columns claim to be the question, or the answer."""
        for field_name in ("question", "answer"):
            self.check_one_claim(field_name, self.claims(field_name))

    def check_one_claim(self, field_name: str, claims: list[str], at_most: int = 1) -> None:
        """Raise StageError if more columns claim a field, unless the reader has said which columns
        count.
        """
        if len(claims) <= at_most or self.set_by_reader:
            return
        names = " and ".join(map(repr, claims))
        if field_name == "messages":
            advised = f"columns: {{messages: {claims[0]!r}}}"
        else:
            question, answer = self.question_and_answer()
            fields = {"question": question, "answer": answer} | {field_name: claims[0]}
            advised = (
                "columns: {"
                + ", ".join(f"{name}: {column!r}" for name, column in fields.items() if column)
                + "}"
            )
            if field_name in ("question", "answer"):
                advised += (
                    f", or use both: {templates_of_both(field_name, claims, question, answer)}"
                )
        raise StageError(
            f"The table has the columns {names}: each may be the {field_name}. Say which is, for "
            f"instance {advised}."
        )

    def preference_label(self, question: str | None, answer: str | None) -> str | None:
        """The column that says whether an answer was preferred (as in KTO); None if there is
        none.
        """
        if self.set_by_reader:
            return None
        truths = {"true", "false"}
        if question in self.names.get("prompt", []) and answer in self.names.get("completion", []):
            truths |= {"0", "1"}
        for column in self.candidates(WORDS["preferences"]["label"]):
            values = {cell_text(value).casefold() for value in self.values(column)}
            if values and values <= truths and column not in (question, answer):
                return column
        return None

    def check_markers(self, columns: list[str]) -> None:
        """Raise StageError if most cells of a column are rendered by a chat template that is not
        read here.
        """
        for column in columns:
            texts = [value for value in self.values(column) if isinstance(value, str)]
            markers = [marker for marker in map(unread_marker, texts) if marker]
            if markers and 2 * len(markers) > len(texts):
                raise StageError(
                    f"The column {column!r} holds texts that a chat template has rendered already "
                    f"({markers[0]} is one "
                    "of its markers), in a form that is not read here. Give the conversations as "
                    "questions and "
                    "answers, or as messages: this notebook renders them."
                )

    @staticmethod
    def first(columns: list[str]) -> str | None:
        """The first of some columns, None if there are none."""
        return columns[0] if columns else None


def templates_of_both(
    field_name: str, claims: list[str], question: str | None, answer: str | None
) -> str:
    """Templates that use all of the columns that claim a field, as a setting."""
    templates = {"question": f"{{{question}}}", "answer": f"{{{answer}}}"}
    templates[field_name] = r"\n\n".join(f"{{{column}}}" for column in claims)
    return f'question_template: "{templates["question"]}", answer_template: "{templates["answer"]}"'


def has_rendered_answer(text: str) -> bool:
    """Whether a text is a rendered conversation with an answer in it, not only a rendered
    question.
    """
    turns = turns_of_rendered_text(text) or []
    return any(ROLES.get(str(turn["role"]).casefold()) == "assistant" for turn in turns)


def _value(row: dict[str, Any], path: list[str]) -> Any:
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def check_shape(shape: Shape, table: Table) -> None:
    """Leave in a shape the columns that it uses. Raises StageError if a template or `columns` names
    what is not there.
    """
    for name in ("question_template", "answer_template"):
        template = getattr(shape, name)
        if shape.name == "columns" and not fields_of(template):
            raise StageError(
                f"{name}={template!r}: put at least one column in braces, such as "
                f"{{{shown_columns(table)[0]}}}."
            )
        check_template(name, template)
    answer_fields = fields_of(shape.answer_template)
    if shape.answer_column not in ("", *answer_fields):
        raise StageError(
            f"answer_column={shape.answer_column!r} is not in answer_template, which uses: "
            f"{list(answer_fields)}"
        )
    used = [*fields_of(shape.question_template), *answer_fields] or list(shape.columns)
    used += [name for name in FIELDS_AS_THEY_ARE if name in shape.columns]
    shape.columns = {name: shape.columns.get(name, name) for name in used}
    for name, column in shape.columns.items():
        top = table.path_of(column)[0]
        if any(part.columns.count(top) > 1 for part in table.parts):
            raise StageError(f"The table has more than one column {top!r}. Rename or remove one.")
        if not shape.example and not table.has_column(column):
            braces = ""
            if name == column:
                braces = f" A brace that is meant as one is written twice: {{{{{name}}}}}."
            hints = suggestion(column, shown_columns(table)) + braces + headless_hint(table)
            raise StageError(
                f"The table has no column {column!r} for {{{name}}}. It has: "
                f"{shown_columns(table)}.{hints}"
            )


def find_split_column(table: Table, shape: Shape, setting: str) -> str:
    """The column that names the split of its row: the one that is set, or one called split. "" if
    there is none.

    Raises StageError if there is no column as it is set.
    """
    if setting:
        if setting not in table.columns:
            raise StageError(
                f"split_column={setting!r}: the table has no such "
                f"column.{suggestion(setting, table.columns)}"
            )
        return setting
    for column in table.columns:
        if column.casefold() not in WORDS["split_column"] or column in shape.columns.values():
            continue
        values = [cell_text(row.get(column)) for row in table.sample()]
        if all(split_of(value) for value in values) and all(not part.split for part in table.parts):
            return column
    return ""
