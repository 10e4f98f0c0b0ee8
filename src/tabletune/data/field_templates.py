"""Templates of questions and answers: texts with the names of fields in braces."""

import re
from functools import lru_cache

from tabletune.errors import StageError

# a brace that is written twice, a field in braces, or a brace alone
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@lru_cache
def fields_of(template: str) -> tuple[str, ...]:
    """The names in single braces in a template, in order.

    A brace itself is written twice, as in Python's formats.
    """
    names = [match[1] for match in PLACEHOLDER.finditer(template) if match[1] is not None]
    return tuple(dict.fromkeys(names))


def check_template(name: str, template: str) -> None:
    """Raise StageError if a template has a single brace; `name` is the parameter's."""
    if any(match[0] in ("{", "}") for match in PLACEHOLDER.finditer(template)):
        raise StageError(f"{name} has a single brace. Write one that is meant as a brace twice.")


def fill(template: str, row: dict[str, str]) -> str:
    """A template with a row's texts in place of its fields.

    A line is left out if all of its fields are empty, and so is an empty line after an empty line.
    """
    lines: list[str] = []
    for line in template.split("\n"):
        fields = fields_of(line)
        if fields and not any(row[field] for field in fields):
            continue
        # where lines were left out, two empty lines may meet
        if not line and lines and lines[-1] == "":
            continue
        lines.append(_fill_line(line, row))
    return "\n".join(lines).strip()


def _fill_line(line: str, row: dict[str, str]) -> str:
    def text_for(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]  # {{ becomes {
        return row[match[1]]

    return PLACEHOLDER.sub(text_for, line)


def is_incomplete(line: str, row: dict[str, str]) -> bool:
    """Whether a line with words of its own lacks some of its fields, but not all.

    It would be no sentence.
    """
    filled = {bool(row[field]) for field in fields_of(line)}
    return len(filled) == 2 and re.search(r"\w", PLACEHOLDER.sub("", line)) is not None
