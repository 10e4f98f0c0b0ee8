"""How the rows of a table become conversations: the columns of the fields, and the templates."""

from dataclasses import dataclass, field

from tabletune.data.example import read_example
from tabletune.data.field_templates import check_template, fields_of
from tabletune.data.shape_advice import headless_hint, shown_columns
from tabletune.data.tables import Table
from tabletune.errors import StageError, suggestion

EXAMPLE_SETTINGS = {  # of the worked example, that a reader may miss
    "drop_values": "texts such as 'none' and 'n/a' count as empty",
    "strip_addresses": "web addresses are removed",
    "collapse_spaces": "single spaces, no invisible characters",
}
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
            lines[0] += f"; this is the worked example {self.example}, with its settings:"
            settings = read_example(self.example)
            lines += [
                f"{name}: {meaning}"
                for name, meaning in EXAMPLE_SETTINGS.items()
                if name in settings
            ]
        if self.name == "columns":
            lines.append(f"question_template: {self.question_template!r}")
            lines.append(f"answer_template: {self.answer_template!r}")
        lines += [f"{field} = column {column!r}" for field, column in self.columns.items()]
        if self.split_column:
            lines.append(f"the split of a row = column {self.split_column!r}")
        if self.unused:
            lines.append(f"not used: {', '.join(map(repr, self.unused[:30]))}")
        return lines + self.notes


def check_shape(shape: Shape, table: Table) -> None:
    """Leave in a shape the columns that it uses.

    Raises StageError if a template or `columns` names what is not there.
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
            f"answer_column={shape.answer_column!r} is not in answer_template. Use one of its "
            f"columns: {list(answer_fields)}."
        )
    used = [*fields_of(shape.question_template), *answer_fields] or list(shape.columns)
    used += [name for name in FIELDS_AS_THEY_ARE if name in shape.columns]
    # a field that `columns` does not name is the column of that name
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
