"""The steps that the rows of a table go through: read, clean, drop what cannot teach, encode."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabletune.chat.encoding import decode_all, encode_all
from tabletune.chat.markers import break_markers
from tabletune.chat.templates import takes_system, takes_tools
from tabletune.data.arrow import batches
from tabletune.data.cells import cell_text
from tabletune.data.cleaning import Cleaning, Dropped
from tabletune.data.conversation_shape import Shape
from tabletune.data.conversations import ANSWER_LISTS, ConversationReader, cell_filter
from tabletune.data.duplicates import Duplicates, words
from tabletune.data.messages import Message, TurnOptions
from tabletune.data.report import check_lost_rows
from tabletune.data.safety_rows import SafetyRows
from tabletune.data.splits import question_id, question_key, split_of_cell, split_position
from tabletune.data.tables import Table
from tabletune.data.tools import NO_PLACE, shows_tool_turns, text_of_calls, tools_text, writes_key
from tabletune.errors import StageError

SHOWN_OF_A_REASON = 5  # dropped rows
SHOWN_CHARACTERS = 200
Row = dict[str, Any]


@dataclass
class FormatStatistics:
    """What has happened to the rows of a table."""

    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # rows by reason
    # the first of each reason, as they were
    dropped_rows: list[dict[str, str]] = field(default_factory=list)
    answers_apart: int = 0  # rows more, by answers that were lists
    system_messages: int = 0
    # Arrays take 4 or 8 bytes a row where lists take 40, and a table may have millions of rows.
    lengths: array = field(default_factory=lambda: array("i"))  # [rows], in tokens
    # lengths of rows that were dropped for them
    too_long: array = field(default_factory=lambda: array("i"))
    # [rows], of their questions, see split_position
    positions: array = field(default_factory=lambda: array("d"))
    # [rows], hashes of their last answers
    answers: array = field(default_factory=lambda: array("Q"))
    official_splits: list[str] = field(default_factory=list)  # [rows]

    def drop(self, reason: str, row: Row) -> None:
        """Count a dropped row, and keep the first of each reason as they are in the table."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= SHOWN_OF_A_REASON:
            texts = {name: cell_text(value)[:SHOWN_CHARACTERS] for name, value in row.items()}
            self.dropped_rows.append({"reason": reason, **texts})


class TableFormatter:
    """Takes the rows of a table through all steps: read, clean, drop what cannot teach, encode.

    `settings` are the parameters of notebook 1. What happens to the rows is counted in
    `statistics`, what the rules of cleaning did in `clean.changed`.
    """

    def __init__(
        self,
        table: Table,
        shape: Shape,
        settings: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: list[int],
    ) -> None:
        check_settings(settings)
        self.table = table
        self.shape = shape
        self.settings = settings
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self.statistics = FormatStatistics()
        self.clean = Cleaning(
            settings["html_to_text"], settings["strip_addresses"], settings["collapse_spaces"]
        )
        self.empty_cells = cell_filter(shape, settings["drop_values"], settings["drop_patterns"])
        self.turn_options = TurnOptions(
            settings["thinking"], tuple(settings["ignore_turn_keys"]), dict(settings["roles"])
        )
        self.reader = ConversationReader(
            shape, self.clean, self.empty_cells, self.turn_options, settings["answer_lists"]
        )

    @property
    def extra_columns(self) -> list[str]:
        """The columns that examples have besides the usual ones.

        Tools, and which earlier answers are learned.
        """
        columns = ["tools"] if "tools" in self.shape.columns else []
        if self.shape.holds_turns:
            columns.append("learned")
        return columns

    def clean_cell(self, field_name: str, value: Any) -> str:
        """A cell as it goes into a template."""
        return self.empty_cells(field_name, self.clean(cell_text(value)))

    def records(self) -> Iterator[tuple[str, Row]]:
        """Yield (official split, {field: value}) for each row of the table."""
        columns = list(self.shape.columns.values())
        to_read = list(columns)
        if self.shape.split_column:
            to_read.append(self.shape.split_column)
        for split, values in self.table.records(to_read):
            # zip ends with the columns of the shape: the split's own column is no field
            row = dict(zip(self.shape.columns, values, strict=False))
            if self.shape.split_column:
                split = split_of_cell(cell_text(values[-1]), self.shape.split_column)
            yield split, row

    def conversations(self) -> Iterator[Row]:
        """Yield the rows as conversations.

        Those that teach something, and are no copies of earlier ones. Each has `prompt` and
        `completion` (messages), `tools` (JSON or ""), `learned` (see `learned_flags`), `key` (what
        is asked, see `question_key`), `split` (the official one or "") and `row`.
        """
        threshold = self.settings["near_duplicate_threshold"]
        duplicates = Duplicates(threshold, keep_all=self.settings["keep_duplicates"])
        for split, record in self.records():
            self.statistics.rows_in += 1
            rows = self.reader.answers_apart(record)
            self.statistics.answers_apart += len(rows) - 1
            for row in rows:
                self.clean.start_row()
                try:
                    example = self.conversation(row)
                    duplicates.check(
                        split, example["prompt"] + example["completion"], example["tools"]
                    )
                except Dropped as reason:
                    self.statistics.drop(str(reason), row)
                    continue
                yield {**example, "split": split, "row": row}

    def conversation(self, row: Row) -> Row:
        """A row as a conversation.

        Raises Dropped if it teaches nothing, StageError if the template has no place.
        """
        if "keep" in row and cell_text(row["keep"]).casefold() in ("false", "0"):
            raise Dropped("labelled as rejected")
        questions, messages = self.messages(row)
        tools = break_markers(tools_text(row.get("tools")), self.tokenizer)
        if tools and not takes_tools(self.tokenizer):
            raise StageError(f"The table has tools, {NO_PLACE}")
        key = question_key(questions)
        if self.settings["split_by"] == "row":
            # then rows of one question with other answers may be in different splits
            key = f"{key}\n{messages[-1]['content']}"
        return {
            "prompt": [_role_and_content(message) for message in messages[:-1]],
            "completion": [_role_and_content(messages[-1])],
            "tools": tools,
            "learned": learned_flags(messages),
            "key": key,
        }

    def messages(self, row: Row) -> tuple[list[str], list[Message]]:
        """The texts of a row's question, and its messages as this model's template takes them.

        Raises Dropped.
        """
        questions, messages = self.reader.read(row)
        messages = self.up_to_last_answer(messages)
        for message in messages:
            self.as_text(message)
        if not messages[-1]["content"]:
            raise Dropped("no answer")
        if self.shape.name == "text":
            return questions, messages
        if not any(message["role"] == "user" and message["content"] for message in messages):
            raise Dropped("no question")
        return questions, self.with_system(messages)

    def up_to_last_answer(self, messages: list[Message]) -> list[Message]:
        """The messages up to the last answer that is to be learned.

        Raises Dropped if there is none.
        """
        answers = [
            place for place, message in enumerate(messages) if message["role"] == "assistant"
        ]
        learned = [place for place in answers if messages[place].get("learn", True)]
        end = learned[-1] + 1 if learned else 0
        # counted like a rule of cleaning, so that the reader sees an example
        self.clean.count_change("turns after the last answer", str(messages[end:]), "[]")
        if not learned:
            raise Dropped("no answer")
        if self.settings["loss_on_last_answer"]:
            for place in answers:
                messages[place]["learn"] = place == learned[-1]
        return messages[:end]

    def as_text(self, message: Message) -> None:
        """Make a message's content what the template writes for it.

        Markers in its text are broken up.
        """
        if message["role"] == "tool" and not shows_tool_turns(self.tokenizer):
            raise StageError(f"The table has turns of tools, {NO_PLACE}")
        for key in ("name", "tool_call_id"):
            if key not in message:
                continue
            if (
                writes_key(self.tokenizer, message["role"], key)
                and key not in self.settings["ignore_turn_keys"]
            ):
                raise StageError(
                    f"Turns of the role {message['role']} have the key {key!r}. This model's chat "
                    "template would write it, but this notebook does not keep it. To read the "
                    f"turns without it, set ignore_turn_keys: [{key}]."
                )
            self.turn_options.left_out[key] += 1
        if "tool_calls" in message:
            message["content"] = text_of_calls(message, self.tokenizer)
            return
        before = message["content"]
        message["content"] = break_markers(before, self.tokenizer)
        self.clean.count_change("special tokens broken up", before, message["content"])

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages with the system prompt.

        It stands in front of the first question if the template has no place for it.
        """
        if self.settings["system_prompt"] and messages[0]["role"] != "system":
            text = break_markers(self.settings["system_prompt"], self.tokenizer)
            messages = [{"role": "system", "content": text}, *messages]
        if messages[0]["role"] != "system":
            return messages
        self.statistics.system_messages += 1
        # the model was made without such a role; its text still belongs to what is asked
        if not takes_system(self.tokenizer):
            system, *messages = messages
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = f"{system['content']}\n\n{first['content']}"
        return messages

    def first(self) -> Row:
        """The first row that is kept, with its cells as `texts`.

        Raises StageError if there is none.
        """
        for row in self.conversations():
            return {**row, "texts": {name: cell_text(cell) for name, cell in row["row"].items()}}
        self.check_lost()
        raise StageError("No row is left of this table.")

    def examples(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that fit into max_length as examples.

        `text` is what their ids say. `group` is the hash of `key`: what intervals and comparisons
        call a question (with split_by: row, a question with its answer).
        """
        statistics = self.statistics
        for batch in batches(rows):
            encoded = self.input_ids(batch)
            texts = decode_all(encoded, self.tokenizer)
            for row, ids, text in zip(batch, encoded, texts, strict=True):
                if not ids:
                    statistics.drop("refused by the chat template", row["row"])
                    continue
                if len(ids) > self.settings["max_length"]:
                    statistics.drop("too long", row["row"])
                    statistics.too_long.append(len(ids))
                    continue
                statistics.lengths.append(len(ids))
                statistics.positions.append(split_position(row["key"], self.settings["split_seed"]))
                statistics.answers.append(answer_hash(row["completion"][0]["content"]))
                statistics.official_splits.append(row["split"])
                yield {**row, "text": text, "group": question_id(row["key"])}

    def input_ids(self, rows: list[Row]) -> list[list[int]]:
        """The ids of each row, [] where the chat template refuses it."""
        try:
            return [
                encoded["input_ids"]
                for encoded in encode_all(rows, self.tokenizer, self.stop_token_ids)
            ]
        except StageError:
            if len(rows) == 1:
                return [[]]
            # one of them is refused, and one by one the others are not
            return [self.input_ids([row])[0] for row in rows]

    def check_lost(self) -> None:
        """Raise StageError if more rows are lost than max_dropped allows.

        It names the settings that keep them.
        """
        check_lost_rows(self.statistics, self.settings["max_dropped"])

    def safety_rows(self, held_out: set[str]) -> list[Row]:
        """Our rows on emergencies as examples.

        As many as `safety_rows` says, of all kinds. None whose question is `held_out`, that is too
        long, or that the chat template refuses.
        """
        rows = SafetyRows(self.shape.question_template, self.with_system).rows()
        encoded = self.input_ids(rows)
        usable = []
        for row, ids in zip(rows, encoded, strict=True):
            # no ids: the template refuses it
            fits = 0 < len(ids) <= self.settings["max_length"]
            if fits and row["key"] not in held_out:
                usable.append({**row, "text": self.tokenizer.decode(ids)})
        return SafetyRows.choose(usable, self.settings["safety_rows"])


def check_settings(settings: dict[str, Any]) -> None:
    """Raise StageError for a setting that is none of its choices."""
    choices = {"split_by": ("question", "row"), "answer_lists": ANSWER_LISTS}
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise StageError(
                f"{name}={settings[name]!r}: use one of {', '.join(filter(None, allowed))}."
            )


def _role_and_content(message: Message) -> Message:
    return {"role": message["role"], "content": message["content"]}


def learned_flags(messages: list[Message]) -> str:
    """Which of the answers before the last one are in the loss, "1 0 1"; "" if all of them are."""
    flags = [
        message.get("learn", True) for message in messages[:-1] if message["role"] == "assistant"
    ]
    if all(flags):
        return ""
    return " ".join("1" if flag else "0" for flag in flags)


def answer_hash(answer: str) -> int:
    """A number of 64 bits for an answer, the same for answers with the same words."""
    return int.from_bytes(hashlib.sha256(" ".join(words(answer)).encode()).digest()[:8], "big")
