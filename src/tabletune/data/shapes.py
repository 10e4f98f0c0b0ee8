"""Recognizes the shape of a table: which columns hold questions, answers and conversations."""

from typing import Any

from tabletune.data.cells import cell_text
from tabletune.data.column_matcher import ColumnMatcher
from tabletune.data.conversation_shape import Shape, check_shape
from tabletune.data.example import read_example
from tabletune.data.shape_advice import advice, headless_hint, shown_columns
from tabletune.data.sources import split_of
from tabletune.data.tables import Table
from tabletune.data.vocabulary import WORDS
from tabletune.errors import StageError, suggestion
from tabletune.run.parameters import PARAMETERS

NEEDED: dict[str, str] = WORDS["shapes"]  # {shape: the columns that it needs}


def with_example(table: Table, parameters: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The parameters with the worked example's settings, and the example's name or None.

    The settings apply where a parameter has its default. The example is a table with its columns,
    unless other columns or another shape are set.
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
    requested = settings["shape"]
    shapes = ["auto", "columns", *NEEDED]
    if requested not in shapes:
        raise StageError(
            f"shape={requested!r}: use one of {', '.join(shapes)}.{suggestion(requested, shapes)}"
        )
    # YAML may read a name as a number, and every name is a text here
    columns = {str(name): str(column) for name, column in settings["columns"].items()}
    templates = [
        settings[name] for name in ("question_template", "answer_template", "answer_column")
    ]
    matcher = ColumnMatcher(table, columns)
    # Templates are for columns: with one set, "auto" is settled, unless a column holds whole chats.
    by_templates = requested == "auto" and any(templates) and not matcher.chats
    if requested == "columns" or by_templates:
        question_template, answer_template, answer_column = templates
        shape = Shape(
            "columns", columns, question_template, answer_template, answer_column, example
        )
    else:
        shape = shape_of(matcher, requested)
    check_shape(shape, table)
    shape.split_column = find_split_column(table, shape, settings.get("split_column", ""))
    used = {table.path_of(column)[0] for column in shape.columns.values()} | {shape.split_column}
    shape.unused = [column for column in table.columns if column not in used]
    return shape


def find_split_column(table: Table, shape: Shape, setting: str) -> str:
    """The column that names the split of its row: the one that is set, or one called split.

    "" if there is none. Raises StageError if there is no column as it is set.
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
        # a column called split may hold anything: its cells must name splits, and files must not do
        # so already
        values = [cell_text(row.get(column)) for row in table.sample()]
        if all(split_of(value) for value in values) and all(not part.split for part in table.parts):
            return column
    return ""


# --- one function a shape


def shape_of(matcher: ColumnMatcher, requested: str) -> Shape:
    """The shape of a table: the `requested` one, or with "auto" the one that fits.

    Raises StageError if none fits, if the columns lack what the shape needs, or if two columns
    claim one field.
    """
    name = requested
    if requested == "auto":
        name = recognized_name(matcher)
    shape = None
    if name == "text":
        shape = text_shape(matcher)
    elif name in ("messages", "conversations"):
        shape = chat_shape(matcher, name)
    elif name in ("prompt_completion", "instruction"):
        shape = pair_shape(matcher, name)
    if shape is None:
        raise StageError(not_recognized(matcher, requested))
    return shape


def recognized_name(matcher: ColumnMatcher) -> str:
    """The name of the shape that the columns have, "" if there is none."""
    question, answer = matcher.question_and_answer()
    pair_name = "instruction"
    if question in matcher.names.get("prompt", []):
        pair_name = "prompt_completion"
    # two columns of turns are a pair, though each of them is a conversation, too
    if question in matcher.chats and answer in matcher.chats:
        return pair_name
    chat = matcher.chat_column()
    if chat:
        return matcher.chats[chat]
    if question and answer:
        return pair_name
    if matcher.text_column() and len(matcher.table.columns) == 1:
        return "text"
    return ""


def not_recognized(matcher: ColumnMatcher, requested: str) -> str:
    """The message for a table that lacks what its shape needs."""
    table = matcher.table
    needs = "their shape is not recognized"
    if requested != "auto":
        needs = f"shape={requested} needs {NEEDED[requested]}"
    return (
        f"The table has the columns {shown_columns(table)}: {needs}. "
        f"{advice(table, matcher.rejected)}{headless_hint(table)}"
    )


def text_shape(matcher: ColumnMatcher) -> Shape | None:
    """The shape of plain texts without questions; None without a column of texts."""
    text = matcher.text_column()
    if not text:
        return None
    matcher.check_markers([text])
    return Shape("text", {"text": text})


def chat_shape(matcher: ColumnMatcher, name: str) -> Shape | None:
    """The shape of whole conversations in one column; None without such a column."""
    chat = matcher.chat_column()
    if not chat:
        return None
    # the columns of a preference are no rivals: which of them is learned is known
    matcher.check_one_claim("messages", matcher.claims_of_chat())
    columns = {"chat": chat, **matcher.optional_columns(["system", "tools"])}
    shape = Shape(name, columns)
    note_preferences(shape, matcher, question=None, answer=chat)
    return shape


def pair_shape(matcher: ColumnMatcher, name: str) -> Shape | None:
    """The shape of a question and an answer in each row; None if one of them is missing."""
    question, answer = matcher.question_and_answer()
    if not question or not answer:
        return None
    for field_name in ("question", "answer"):
        matcher.check_one_claim(field_name, matcher.claims(field_name))
    if answer in matcher.chats:
        shape = pair_of_turns(matcher, name, question, answer)
    else:
        shape = pair_of_texts(matcher, name, question, answer)
    note_preferences(shape, matcher, question, answer)
    return shape


def pair_of_turns(matcher: ColumnMatcher, name: str, question: str, answer: str) -> Shape:
    """The shape of an answer that is a list of turns, after a question of turns or a text."""
    matcher.check_no_other_chat(question, answer)
    columns = {"question": question, "answer": answer}
    columns |= matcher.optional_columns(["system", "tools"])
    return Shape(name, columns)


def pair_of_texts(matcher: ColumnMatcher, name: str, question: str, answer: str) -> Shape:
    """The shape of a question and an answer that are texts, with what belongs to them."""
    matcher.check_markers([question, answer])
    columns = {"question": question, "answer": answer}
    columns |= matcher.optional_columns(
        ["context", "system", "tools", "history", "options"], taken=[question, answer]
    )
    shape = Shape(name, columns, "{question}", "{answer}", "answer")
    if "options" in columns:
        shape.question_template += "\n\n{options}"
    if "context" in columns:
        shape.question_template += "\n\n{context}"
    return shape


def note_preferences(
    shape: Shape, matcher: ColumnMatcher, question: str | None, answer: str
) -> None:
    """Note which of two answers is learned, and leave out the rows whose answer was rejected."""
    if answer in matcher.preferred and matcher.rejected:
        shape.notes.append(
            f"a table of preferences: {answer!r} is learned, {matcher.rejected[0]!r} is not"
        )
    label = matcher.preference_label(question, answer)
    if label:
        shape.columns["keep"] = label
        shape.notes.append(
            f"rows whose {label!r} is false are answers that were rejected: they are left out"
        )
