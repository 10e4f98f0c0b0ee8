"""Finds which columns of a table hold questions, answers and conversations."""

from collections.abc import Iterable
from typing import Any

from tabletune.data.cells import cell_text, is_empty
from tabletune.data.rendered import turns_of_rendered_text, unread_marker
from tabletune.data.tables import Table, value_at
from tabletune.data.turns import ROLE_KEYS, turns_in
from tabletune.data.vocabulary import ROLES, WORDS
from tabletune.errors import StageError


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
        self.preferred = self.candidates(WORDS["preferences"]["chosen"])
        self.rendered: list[str] = []  # the columns whose conversations are rendered texts
        self.chats: dict[str, str] = {}  # {column of conversations: its shape}
        for column in list(columns.values()) or self.possible_chats():
            kind = self.kind_of_conversation(column)
            if kind:
                self.chats[column] = kind

    def possible_chats(self) -> list[str]:
        """The columns whose conversations may be learned.

        Not rejected answers, and neither a system text nor the history of a question.
        """
        never_chats = self.rejected + self.candidates(WORDS["columns"]["system"])
        if self.claims("question") and self.claims("answer"):
            never_chats += self.candidates(WORDS["columns"]["history"])
        return [column for column in self.table.columns if column not in never_chats]

    def candidates(self, names: Iterable[str]) -> list[str]:
        """The columns that have one of these names."""
        columns: list[str] = []
        for name in names:
            columns += self.names.get(name, [])
        return columns

    def values(self, column: str) -> list[Any]:
        """What a column has in the first rows, without what is empty."""
        path = self.table.path_of(column)
        cells = [value_at(row, path) for row in self.sample]
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

    # --- the columns of the fields

    def chat_column(self) -> str | None:
        """The column of conversations: one with a usual name, else any.

        Of preferences, the chosen one.
        """
        if self.rejected and self.preferred:
            full = [
                column
                for column in self.preferred
                if self.chats.get(column) and self.has_questions(column)
            ]
            if full:
                return full[0]
        usual = [
            column for column in self.candidates(WORDS["columns"]["chat"]) if column in self.chats
        ]
        if usual:
            return usual[0]
        question, answer = self.question_and_answer()
        for column in self.claims_of_chat():
            # an answer that is a list of turns is no conversation of its own
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
        # of a multiple choice, the answer may be a letter or a place, under a name such as "label"
        answers = self.claims("answer")
        if not answers and self.candidates(WORDS["columns"]["options"]):
            answers = self.candidates(WORDS["right_option"])
        answer = self.first([column for column in answers if column != question])
        return question, answer

    def claims(self, field_name: str) -> list[str]:
        """The columns that may be a field. An `input` beside another question is its context."""
        if field_name == "answer" and self.preferred and self.rejected:
            return self.preferred
        columns = self.candidates(WORDS["columns"][field_name])
        if not columns:
            columns = self.candidates(WORDS["other_columns"].get(field_name, []))
        # Alpaca: `instruction` is the question, and `input` what it is about
        inputs = self.names.get("input", [])
        if field_name == "question" and set(columns) - set(inputs):
            columns = [column for column in columns if column not in inputs]
        if field_name == "context" and not set(self.claims("question")) - set(inputs):
            columns = [column for column in columns if column not in inputs]
        return list(dict.fromkeys(columns))

    def claims_of_chat(self) -> list[str]:
        """The columns of conversations, without those of preferences."""
        return [column for column in self.chats if column not in self.rejected + self.preferred]

    def optional_columns(self, fields: list[str], taken: list[str] | None = None) -> dict[str, str]:
        """The columns of the fields that a table may have besides.

        Raises StageError if two claim one.
        """
        columns = {}
        for field_name in fields:
            claims = [column for column in self.claims(field_name) if column not in (taken or [])]
            self.check_one_claim(field_name, claims)
            if claims:
                columns[field_name] = claims[0]
        return columns

    def check_no_other_chat(self, question: str, answer: str) -> None:
        """Raise StageError if a column beside a question and an answer holds conversations, too.

        Where the reader has said which columns count, nothing is checked.
        """
        rivals = [column for column in self.claims_of_chat() if column not in (question, answer)]
        if rivals and not self.set_by_reader:
            raise StageError(
                f"The columns {question!r} and {answer!r} are a question and its answer, and the "
                f"column {rivals[0]!r} holds conversations, too. Say which of them are learned: "
                f"columns: {{question: {question!r}, answer: {answer!r}}}, or "
                f"columns: {{messages: {rivals[0]!r}}}."
            )

    def check_one_claim(self, field_name: str, claims: list[str]) -> None:
        """Raise StageError if more than one column claims a field.

        Where the reader has said which columns count, nothing is checked.
        """
        if len(claims) <= 1 or self.set_by_reader:
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
            f"The columns {names} could each be the {field_name}. Say which one it is, for "
            f"instance {advised}."
        )

    def preference_label(self, question: str | None, answer: str | None) -> str | None:
        """The column that says whether an answer was preferred (as in KTO).

        None if there is none.
        """
        if self.set_by_reader:
            return None
        # 0 and 1 may be a class; only beside prompt and completion are they KTO's label
        truths = {"true", "false"}
        if question in self.names.get("prompt", []) and answer in self.names.get("completion", []):
            # KTO's data sets write the label so, too
            truths |= {"0", "1"}
        for column in self.candidates(WORDS["preferences"]["label"]):
            values = {cell_text(value).casefold() for value in self.values(column)}
            if values and values <= truths and column not in (question, answer):
                return column
        return None

    def check_markers(self, columns: list[str]) -> None:
        """Raise StageError if a column is rendered by a chat template that is not read here.

        That is so if most of its cells have such markers.
        """
        for column in columns:
            texts = [value for value in self.values(column) if isinstance(value, str)]
            markers = [marker for marker in map(unread_marker, texts) if marker]
            if markers and 2 * len(markers) > len(texts):
                raise StageError(
                    f"The column {column!r} contains texts that a chat template has already "
                    f"rendered ({markers[0]} is one of its markers), in a form that cannot be read "
                    "here. Provide the conversations as questions and answers, or as messages; "
                    "this notebook renders them."
                )

    def text_column(self) -> str | None:
        """The column of plain texts, None without one."""
        return self.first(self.candidates(WORDS["columns"]["text"]))

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
    """Whether a text is a rendered conversation with an answer in it.

    A rendered question alone is none.
    """
    turns = turns_of_rendered_text(text) or []
    return any(ROLES.get(str(turn["role"]).casefold()) == "assistant" for turn in turns)
