"""The shapes that tables have, and the conversation in a row: messages of system, user, assistant and tool."""

import ast
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from tabletune.chat.markers import break_markers
from tabletune.chat.templates import MARK, USER, around, render
from tabletune.data.cleaning import Dropped
from tabletune.data.example import read_example
from tabletune.data.tables import KNOWN
from tabletune.errors import StageError, suggestion
from tabletune.run.parameters import PARAMETERS

NEEDED = KNOWN["shapes"]
ROLES = {name: role for role, names in KNOWN["roles"].items() for name in names}
NO_PLACE = (
    "which this model's chat template has no place for. Leave them out, or take another base_model."
)
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass
class Shape:
    """How rows become conversations: the `name` of the shape, the table's column for each field, the templates (none
    for columns that hold whole conversations), and the worked `example` whose settings apply, or None."""

    name: str
    columns: dict
    question_template: str = ""
    answer_template: str = ""
    answer_column: str = ""
    example: str | None = None


def with_example(table, parameters):
    """The parameters, with the worked example's settings where they have their defaults, and its name; or None for it.

    The example is a table with its columns, unless other columns or another shape were asked for.
    """
    example, defaults = read_example("home_remedies"), PARAMETERS["01_format_dataset"]
    own = parameters["columns"] not in ({}, example["columns"]) or parameters["shape"] not in (
        "auto",
        "columns",
    )
    if own or not {"Health Issue", "Home Remedy"} <= set(table.columns):
        return parameters, None
    settings = {
        name: value
        for name, value in example.items()
        if parameters.get(name) == defaults.get(name, ...)
    }
    return {**parameters, **settings}, "home_remedies"


def recognize(table, settings, example=None):
    """The Shape of a table. `settings` has shape, columns, question_template, answer_template and answer_column.

    Raises StageError, with the nearest name, if no shape fits, or if a setting names what there is not.
    """
    wanted, columns = (
        settings["shape"],
        {str(field): str(name) for field, name in settings["columns"].items()},
    )
    templates = [
        settings[name] for name in ("question_template", "answer_template", "answer_column")
    ]
    shapes = ["auto", "columns", *NEEDED]
    if wanted not in shapes:
        raise StageError(
            f"shape={wanted!r}: use one of {', '.join(shapes)}.{suggestion(wanted, shapes)}"
        )
    chats = {}  # the columns that hold conversations, and the shape that these have
    for name, cell in (item for row in table.sample() for item in row.items()):
        if (not columns or name in columns.values()) and (turns := turns_in(cell)):
            chats[name] = "messages" if "role" in turns[0] else "conversations"
    if wanted == "columns" or (wanted == "auto" and any(templates) and not chats):
        return checked(Shape("columns", columns, *templates, example), table)
    known = {
        field.strip().casefold(): name
        for field, name in (columns or {n: n for n in table.columns}).items()
    }
    of = dict.fromkeys(KNOWN["columns"])  # the column of each field, None where there is none
    for field, names in KNOWN["columns"].items():
        of[field] = next(
            (known[name] for name in names if known.get(name) not in (None, *of.values())), None
        )
    of["chat"] = next((column for column in (of["chat"], *chats) if column in chats), None)
    pair, lists = of["question"] and of["answer"], {of["question"], of["answer"]} <= set(chats)
    if wanted == "auto":
        plain = "prompt_completion" if known.get("prompt") == of["question"] else "instruction"
        lone = of["text"] and len(table.columns) == 1
        wanted = (
            plain
            if lists
            else chats[of["chat"]]
            if of["chat"]
            else plain
            if pair
            else "text"
            if lone
            else None
        )
    both = (
        ["question", "answer", "system", "tools"]
        if lists
        else ["question", "answer", "context", "system", "tools"]
    )
    fields = {
        "text": ["text"],
        "messages": ["chat", "system", "tools"],
        "conversations": ["chat", "system", "tools"],
    }
    fields = fields.get(wanted, both if pair else ["answer"])
    if not wanted or not of[fields[0]]:
        needs = (
            f"shape={wanted} needs {NEEDED[wanted]}" if wanted else "their shape is not recognized"
        )
        raise StageError(
            f"The table has the columns {shown(table)}: {needs}. Say which are which, for instance columns: "
            f"{{question: {shown(table)[0]!r}, answer: {shown(table)[-1]!r}}}.{headless(table)}"
        )
    shape = Shape(wanted, {field: of[field] for field in fields if of[field]})
    if fields[0] == "question" and not lists:
        shape.question_template = "{question}" + ("\n\n{context}" if of["context"] else "")
        shape.answer_template, shape.answer_column = "{answer}", "answer"
    return checked(shape, table)


def headless(table):
    """What to say where the column names of a table seem to be a row, else ""."""
    return " If its first line is a row, set header: false." if table.looks_headless() else ""


def shown(table):
    """The first column names, as they are shown in a message."""
    return [
        str(name)[:60] for name in table.columns[:30]
    ]  # without a header these are cells, as long as they like


@lru_cache
def fields_of(template):
    """The names in single braces in a template, in order. A brace itself is written twice, as in Python's formats."""
    return tuple(
        dict.fromkeys(match[1] for match in PLACEHOLDER.finditer(template) if match[1] is not None)
    )


def checked(shape, table):
    """The shape with the columns that it uses. Raises StageError if a template or `columns` names what is not there."""
    for name in ("question_template", "answer_template"):
        template = getattr(shape, name)
        if shape.name == "columns" and not fields_of(template):
            raise StageError(
                f"{name}={template!r}: put at least one column in braces, such as {{{shown(table)[0]}}}."
            )
        if any(match[0] in ("{", "}") for match in PLACEHOLDER.finditer(template)):
            raise StageError(
                f"{name} has a single brace. Write one that is meant as a brace twice."
            )
    answer = fields_of(shape.answer_template)
    if shape.answer_column not in ("", *answer):
        raise StageError(
            f"answer_column={shape.answer_column!r} is not in answer_template, which uses: {list(answer)}"
        )
    used = [*fields_of(shape.question_template), *answer] or list(shape.columns)
    used += [field for field in ("system", "tools") if field in shape.columns]
    shape.columns = {field: shape.columns.get(field, field) for field in used}
    for field, column in shape.columns.items():
        if any(names.count(column) > 1 for _, _, names, _ in table.parts):
            raise StageError(
                f"The table has more than one column {column!r}. Rename or remove one."
            )
        if column not in table.columns and not shape.example:
            braces = (
                f" A brace that is meant as one is written twice: {{{{{field}}}}}."
                if field == column
                else ""
            )
            near = suggestion(column, shown(table)) + braces + headless(table)
            raise StageError(
                f"The table has no column {column!r} for {{{field}}}. It has: {shown(table)}.{near}"
            )
    return shape


def fill(template, row):
    """Fill a template line by line; a line all of whose fields are empty is left out."""
    lines = []
    for line in template.split("\n"):
        fields = fields_of(line)
        if (not fields or any(row[field] for field in fields)) and (line or lines[-1:] != [""]):
            lines.append(
                PLACEHOLDER.sub(
                    lambda match: match[0][0] if match[1] is None else row[match[1]], line
                )
            )
    return "\n".join(lines).strip()


def turns_in(cell):
    """The turns that a cell holds: a list of objects, or one written as JSON or Python. None if it holds none."""
    if isinstance(cell, str) and re.match(r"\s*\[\s*\{", cell):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            cell = ast.literal_eval(cell) if re.match(r"\s*\[\s*\{\s*'", cell) else json.loads(cell)
    turns = isinstance(cell, list) and cell and all(isinstance(turn, dict) for turn in cell)
    return cell if turns and {"role", "from"} & set(cell[0]) else None


def messages_in(cell, clean):
    """The messages of a cell that holds turns: role, content, and tool_calls where there are. Raises Dropped."""
    messages = []
    for turn in turns_in(cell) or []:
        role = ROLES.get(str(turn.get("role", turn.get("from"))).casefold())
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list) and all(
            isinstance(part, dict) and "text" in part for part in content
        ):
            content = "\n".join(part["text"] for part in content)
        if role is None or not isinstance(content, (str, type(None))):
            raise Dropped("a turn of an unknown role" if role is None else "a turn that is no text")
        calls = {"tool_calls": turn["tool_calls"]} if turn.get("tool_calls") else {}
        messages.append({"role": role, "content": clean(content or ""), **calls})
    return messages


def emptier(shape, values, patterns):
    """A function of a field and its text that gives "" for a cell to be emptied, by its value or a pattern of it all.

    Lists are for the optional fields; {field: list} is for the fields that it names. Raises StageError for a field or a
    pattern that is none.
    """
    question, answer = fields_of(shape.question_template), fields_of(shape.answer_template)
    required = {
        shape.answer_column,
        *(fields[0] for fields in (question, answer) if len(fields) == 1),
    }
    optional, emptied = [field for field in (*question, *answer) if field not in required], {}
    for name, given in (("drop_values", values), ("drop_patterns", patterns)):
        for field, forms in (
            given if isinstance(given, dict) else dict.fromkeys(optional, given)
        ).items():
            if field not in (*question, *answer):
                raise StageError(
                    f"{name}: there is no field {field!r}.{suggestion(field, (*question, *answer))}"
                )
            try:
                forms = forms if isinstance(forms, list) else [forms]
                forms = [re.escape(str(form)) if name == "drop_values" else form for form in forms]
                emptied.setdefault(field, []).extend(
                    re.compile(form, re.IGNORECASE) for form in forms
                )
            except re.error as error:
                raise StageError(
                    f"{name}: {error.pattern!r} is no regular expression: {error}."
                ) from None
    return lambda field, text: (
        "" if any(form.fullmatch(text) for form in emptied.get(field, ())) else text
    )


def conversation(row, shape, clean, emptied):
    """What a row, {field: text}, says: (texts that make its question, messages). Raises Dropped if it teaches nothing.

    `clean` is called with each text, `emptied` with each field and its text (see `emptier`).
    """
    if shape.name == "text":
        text = clean(row["text"])
        return [text], [{"role": "assistant", "content": text}]
    if shape.question_template:
        cells = {
            field: emptied(field, clean(text))
            for field, text in row.items()
            if field not in ("system", "tools")
        }
        asked = [cells[field] for field in fields_of(shape.question_template)]
        texts = fill(shape.question_template, cells), fill(shape.answer_template, cells)
        broken = any(incomplete(line, cells) for line in shape.question_template.split("\n"))
        if broken or not any(asked) or (shape.name != "columns" and not asked[0]):
            raise Dropped("no question")
        if not cells.get(shape.answer_column, texts[1]):
            raise Dropped("no answer")
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), texts, strict=True)
        ]
    else:
        messages = [
            turn
            for field in ("chat", "question", "answer")
            for turn in messages_in(row.get(field), clean)
        ]
        asked = [turn["content"] for turn in messages if turn["role"] == "user"]
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": clean(row["system"])})
    return asked, messages


def incomplete(line, cells):
    """Whether a line of a template that has words of its own lacks some of its fields, and would be no sentence."""
    filled = {bool(cells[field]) for field in fields_of(line)}
    return len(filled) == 2 and re.search(r"\w", PLACEHOLDER.sub("", line)) is not None


def turn_of_calls(turn, tokenizer):
    """What the chat template writes for a turn that calls tools, as a text. Raises StageError if it cannot."""
    _, before, after = around([USER], tokenizer)
    turns = render(
        [USER, json.loads(break_markers(json.dumps(turn, ensure_ascii=False), tokenizer))],
        tokenizer,
        False,
    )
    text = turns[len(before) : len(turns) - len(after)].strip()
    if not text or not (turns.startswith(before.rstrip()) and turns.endswith(after)):
        raise StageError(f"The table has tool_calls, {NO_PLACE}")
    return text


@lru_cache
def shows_tool_turns(tokenizer):
    """Whether the chat template has a place for what a tool has answered."""
    turns = [USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": MARK}]
    with suppress(StageError):
        return MARK in render(turns, tokenizer)
    return False
