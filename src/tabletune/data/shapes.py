"""Recognizes the shape of a table: which columns hold questions, answers and conversations."""

from typing import Any

from tabletune.data.cells import cell_text
from tabletune.data.column_matcher import NEEDED, ColumnMatcher
from tabletune.data.conversation_shape import Shape, check_shape
from tabletune.data.example import read_example
from tabletune.data.sources import split_of
from tabletune.data.tables import Table
from tabletune.data.vocabulary import WORDS
from tabletune.errors import StageError, suggestion
from tabletune.run.parameters import PARAMETERS


def with_example(table: Table, parameters: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The parameters with the worked example's settings, and the example's name or None.

    The settings apply where a parameter has its default.

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
    requested = settings["shape"]
    shapes = ["auto", "columns", *NEEDED]
    if requested not in shapes:
        raise StageError(
            f"shape={requested!r}: use one of {', '.join(shapes)}.{suggestion(requested, shapes)}"
        )
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
        shape = matcher.shape(requested)
    check_shape(shape, table)
    shape.split_column = find_split_column(table, shape, settings.get("split_column", ""))
    used = {table.path_of(column)[0] for column in shape.columns.values()} | {shape.split_column}
    shape.unused = [column for column in table.columns if column not in used]
    return shape


def find_split_column(table: Table, shape: Shape, setting: str) -> str:
    """The column that names the split of its row: the one that is set, or one called split.

    "" if there is none.

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
        # a column called split may hold anything: its cells must name splits, and files must not do
        # so already
        values = [cell_text(row.get(column)) for row in table.sample()]
        if all(split_of(value) for value in values) and all(not part.split for part in table.parts):
            return column
    return ""
