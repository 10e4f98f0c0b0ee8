"""Reader of .json, .jsonl and .ndjson files.

Objects one after the other, an array, or an object that holds the rows.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tabletune.data.cells import WrittenNumber
from tabletune.data.table_file import ReadOptions, TableFile
from tabletune.data.text_encoding import choose_encoding
from tabletune.data.vocabulary import WORDS
from tabletune.errors import StageError

BLOCK_CHARACTERS = 2**20
LONGEST_LINE_CHARACTERS = 2**24  # a file without line breaks is not read at once
Row = dict[str, Any]
BETWEEN_VALUES = ", \t\n\r\f\v"
ROLE_KEYS = set(WORDS["turn_keys"]["role"])
# an object with one of these is a row itself
ROW_COLUMNS: set[str] = set()
for field_name in ("question", "answer", "chat"):
    ROW_COLUMNS.update(WORDS["columns"][field_name])


def read_json_rows(path: Path, name: str, options: ReadOptions) -> TableFile:
    """A file of rows in JSON.

    Raises StageError if it is damaged, or if no rows are recognized in it.
    """
    encoding, description = choose_encoding(path, name, options.encoding)

    def rows(wanted: list[str]) -> Iterator[Row]:
        with path.open(encoding=encoding) as file:
            yield from rows_of_values(json_values(file, name), name)

    columns: dict[str, None] = {}  # as a set that keeps the order
    for row in rows([]):
        columns |= dict.fromkeys(row)
    return TableFile(list(columns), rows, description)


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of a JSON object. Raises ValueError if a field is there twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field is there twice")
    return dict(pairs)


DECODER = json.JSONDecoder(
    object_pairs_hook=unique_fields,
    parse_float=WrittenNumber,
    parse_int=WrittenNumber,
    strict=False,
)


def json_values(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for each value of an open file.

    The items of an array, or what stands one after the other, however it is broken into lines.

    Raises StageError if anything else is in between.
    """
    if has_a_list_a_line(file):
        yield from _values_of_lines(file, name)
    else:
        yield from _ValueStream(file, name)


class _ValueStream:
    """The values of a file, which is read block by block. `position` in `text` is in `line`."""

    def __init__(self, file: TextIO, name: str) -> None:
        self.file = file
        self.name = name
        self.text = ""
        self.position = 0
        self.line = 1

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        may_have_array = True
        in_array = False
        while True:
            mark = self.next_mark()
            if mark == "":
                break
            # the first bracket of a file opens an array of rows; later ones are values
            if mark == "[" and may_have_array and not in_array:
                in_array = True
                self.move_to(self.position + 1)
            elif mark == "]" and in_array:
                in_array = False
                self.move_to(self.position + 1)
            else:
                may_have_array = in_array  # what begins with an object has lists as values only
                line = self.line
                yield line, self.value()
        if in_array:
            raise self.damage("the list is not closed")

    def next_mark(self) -> str:
        """Move to the next character that is not between values, and return it; "" at the end."""
        while True:
            place = self.position
            while place < len(self.text) and self.text[place] in BETWEEN_VALUES:
                place += 1
            self.move_to(place)
            if place < len(self.text):
                return self.text[place]
            if not self.read_more():
                return ""

    def value(self) -> Any:
        """The value at the position, which moves behind it. Raises StageError if it is none."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                if not self.read_more():
                    raise self.damage(str(error)) from error
                continue
            if end == len(self.text) and self.read_more():
                continue  # a number may go on in the next block
            self.move_to(end)
            return value

    def move_to(self, position: int) -> None:
        """Go on to a later position."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def read_more(self) -> bool:
        """Read another block, at least as long as what waits, and forget what is behind."""
        # twice as long each time: a value of many blocks is not decoded from its start for each of
        # them
        rest = self.text[self.position :]
        more = self.file.read(max(BLOCK_CHARACTERS, len(rest)))
        self.text = rest + more
        self.position = 0
        return bool(more)

    def damage(self, reason: str) -> StageError:
        """The error that says where a file is damaged."""
        return StageError(
            f"{self.name}, line {self.line} is not JSON ({reason}). Correct or remove it."
        )


def has_a_list_a_line(file: TextIO) -> bool:
    """Whether each line of a file is a JSON list of its own, as conversations often are.

    The file is left at 0.
    """
    lines: list[str] = []
    while len(lines) < 2:
        line = file.readline(LONGEST_LINE_CHARACTERS)
        if not line or len(line) == LONGEST_LINE_CHARACTERS:
            break
        if line.strip():
            lines.append(line)
    file.seek(0)
    if len(lines) < 2 or not lines[0].lstrip().startswith("["):
        return False
    try:
        return all(isinstance(json.loads(line), list) for line in lines)
    except (ValueError, RecursionError):
        return False


def _values_of_lines(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            yield line, DECODER.decode(text.strip())
        except (ValueError, RecursionError) as error:
            raise StageError(
                f"{name}, line {line} is not JSON ({error}). Correct or remove it."
            ) from error


def rows_of_values(values: Iterator[tuple[int, Any]], name: str) -> Iterator[Row]:
    """Yield the rows among a file's values.

    Objects, or lists of turns, each of which is a conversation. A file that is one object may hold
    its rows in it, as a list or in one of the forms in which pandas writes a table. Raises
    StageError, naming what was found, for anything else.
    """
    first_two = list(islice(values, 2))
    if len(first_two) == 1 and isinstance(first_two[0][1], dict):
        yield from rows_of_object(first_two[0][1], name)
        return
    for group in (first_two, values):
        for line, value in group:
            yield row_of_value(value, name, line)


def row_of_value(value: Any, name: str, line: int) -> Row:
    """A row. Raises StageError if a value is none."""
    if isinstance(value, dict):
        return value
    if is_conversation(value):
        return {"messages": value}
    what = "a single value"
    if isinstance(value, list):
        what = f"a list of {len(value)}"
        if value:
            kinds = {"dict": "object", "list": "list", "str": "text", "WrittenNumber": "number"}
            what += f" (the first is: {kinds.get(type(value[0]).__name__, 'another value')})"
    raise StageError(
        f"{name}, line {line} is not JSON of a table: a row must be an object like "
        f'{{"question": "..."}} or a list of '
        f"messages, and this is {what}."
    )


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns: objects that say whose turn it is."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and bool(ROLE_KEYS & set(turn)) for turn in value)


def rows_of_object(value: Row, name: str) -> Iterator[Row]:
    """Yield the rows in the one object of a file; the object itself if it is a row."""
    # such as {"data": [{"question": …}, …], "version": 1}
    lists = {key: item for key, item in value.items() if _is_list_of_rows(item)}
    is_split_form = {"columns", "data"} <= set(value) and isinstance(value["columns"], list)
    if is_split_form:  # pandas, orient="split"
        for cells in value["data"]:
            if not isinstance(cells, list) or len(cells) != len(value["columns"]):
                raise StageError(
                    f"{name}: in 'data', a row has another number of cells than there are "
                    "'columns'. Correct the file."
                )
            yield dict(zip(map(str, value["columns"]), cells, strict=True))
    elif len(lists) == 1 and not ROW_COLUMNS & {key.casefold() for key in set(value) - set(lists)}:
        (rows,) = lists.values()
        for row in rows:
            yield row if isinstance(row, dict) else {"messages": row}
    elif len(lists) > 1 and not ROW_COLUMNS & {key.casefold() for key in value}:
        keys = ", ".join(map(repr, lists))
        raise StageError(
            f"{name} has several lists of rows: {keys}. Put each into a file of its own."
        )
    elif _are_columns(value):
        yield from rows_of_columns(value)
    else:
        yield value


def _is_list_of_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are no turns, or a list of conversations."""
    if not isinstance(value, list) or not value or is_conversation(value):
        return False
    return all(isinstance(row, dict) for row in value) or all(is_conversation(row) for row in value)


def _are_columns(value: Row) -> bool:
    """Whether an object is a table by columns.

    Lists of one length, or objects with the same keys.
    """
    items = list(value.values())
    if len(items) < 2 and not (items and isinstance(items[0], dict)):
        return False
    # {"question": ["…", "…"], "answer": ["…", "…"]}
    if all(isinstance(item, list) and not is_conversation(item) for item in items):
        return len({len(item) for item in items}) == 1 and len(items[0]) > 0
    # {"question": {"0": "…"}, "answer": {"0": "…"}}, as pandas writes a table
    if not all(isinstance(item, dict) and item for item in items):
        return False
    return len(items) > 1 and len({frozenset(item) for item in items}) == 1


def rows_of_columns(value: Row) -> Iterator[Row]:
    """Yield the rows of a table by columns, {"question": ["...", ...]}.

    Or of a table by rows, with their index as keys. With objects inside, their keys are the index
    where they are numbers, {"question": {"0": "..."}}; else they are the columns, {"0":
    {"question": "..."}}.
    """
    items = list(value.values())
    if isinstance(items[0], list):
        for cells in zip(*items, strict=True):
            yield dict(zip(value, cells, strict=True))
        return
    inner = list(items[0])
    if all(re.fullmatch(r"\d+", key) for key in inner):
        for key in inner:
            yield {column: cells[key] for column, cells in value.items()}
    else:
        yield from items
