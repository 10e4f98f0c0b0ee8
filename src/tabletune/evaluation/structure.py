"""The form of an answer: is it the answer template, filled in?"""

import json
import re

from tabletune.data.field_templates import PLACEHOLDER

FILLED = r"\S[\s\S]*?"  # what stands where a field was: not empty


def fixed_text(template: str) -> str:
    """The text of a template outside of its fields, where `{{` is a brace."""
    return PLACEHOLDER.sub(lambda match: match[0][0] if match[1] is None else " ", template)


def line_pattern(line: str, patterns: dict[str, str], otherwise: str = FILLED) -> str:
    """A line of a template as a regular expression.

    `patterns` has those of some fields; the other fields have the pattern `otherwise`.
    """
    parts, end = [], 0
    for match in PLACEHOLDER.finditer(line):
        parts.append(re.escape(line[end : match.start()]))
        if match[1] is None:  # a doubled brace, or a lone one
            parts.append(re.escape(match[0][0]))
        else:
            parts.append(patterns.get(match[1], otherwise))
        end = match.end()
    return "".join([*parts, re.escape(line[end:])])


def fields_in(line: str) -> list[str]:
    """The names of the fields in a line of a template."""
    return [match[1] for match in PLACEHOLDER.finditer(line) if match[1] is not None]


def text_before_fields(line: str) -> str:
    """What a line of a template begins with, up to its first field."""
    for match in PLACEHOLDER.finditer(line):
        if match[1] is not None:
            return fixed_text(line[: match.start()])
    return fixed_text(line)


def has_structure(answer: str, answer_template: str, answer_column: str) -> bool:
    """Whether an answer is the template filled in.

    Its lines in order, each at most once, the answer column not empty. Lines with other fields may
    be left out, as in the training rows. A template that opens with a brace or a bracket is one of
    JSON: then the answer must be JSON, too, where the template filled in would be.
    """
    pattern = ""
    openings = []
    for line in filter(None, answer_template.split("\n")):
        fields = fields_in(line)
        # a line of other fields is left out where its cells are empty
        required = not fields or answer_column in fields
        pattern += rf"(?:{line_pattern(line, {})}\s*)" + ("" if required else "?")
        # by its words: the marks before them may stand elsewhere, too
        opening = re.sub(r"^\W+", "", text_before_fields(line))
        if re.search(r"\w", opening):
            openings.append(opening)
    # cheap questions first: a regular expression with many optional lines can take long to fail
    present = [opening for opening in openings if opening in answer]
    if sorted(present, key=answer.index) != present:
        return False
    if any(answer.count(opening) != 1 for opening in present):
        return False
    if re.fullmatch(pattern, answer.strip()) is None:
        return False
    return not writes_json(answer_template) or is_json(answer)


def writes_json(template: str) -> bool:
    """Whether a template writes JSON.

    With numbers in its fields, or in those without quotes, it can be read as such.
    """
    if fixed_text(template).lstrip()[:1] not in ("{", "["):
        return False
    return is_json(PLACEHOLDER.sub(lambda m: m[0][0] if m[1] is None else "0", template))


def is_json(text: str) -> bool:
    """Whether a text is valid JSON."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
