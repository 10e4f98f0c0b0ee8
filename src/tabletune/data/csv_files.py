"""Reader of .csv and .tsv files."""

import csv
import io
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from tabletune.data.table_file import ReadOptions, TableFile
from tabletune.data.text_encoding import choose_encoding
from tabletune.errors import StageError

csv.field_size_limit(2**31 - 1)
HEAD_CHARACTERS = 2**16  # what the delimiter is found in
HEADER_SEARCH_ROWS = 20
QUOTES = ("auto", "cells", "letters")
NO_DELIMITERS = ('"', "\r", "\n")  # they have a meaning of their own
LETTERS = "If double quotes are ordinary letters in this table, set quotes: letters."
Record = tuple[int, list[str]]  # the line that a row begins in, and its cells


def read_csv(path: Path, name: str, options: ReadOptions) -> TableFile:
    """A file of cells with a delimiter between them.

    Raises StageError if a quote is open, if a quoted cell has swallowed rows, or if a row is not as
    long as the first.
    """
    if options.quotes not in QUOTES:
        raise StageError(f"quotes={options.quotes!r}: use one of {', '.join(QUOTES)}.")
    encoding, encoding_description = choose_encoding(path, name, options.encoding)
    delimiter = choose_delimiter(path, name, encoding, options)
    shown_delimiter = "tabs" if delimiter == "\t" else repr(delimiter)
    records = CsvRecords(path, name, encoding, delimiter, options)
    header_line, first = find_header(records, name, options)
    if options.quotes == "auto":
        check_swallowed_rows(first, delimiter, f"{name}, line {header_line}", options)
    columns = first if options.header else [str(number) for number in range(1, len(first) + 1)]

    def rows(wanted: list[str]) -> Iterator[dict[str, Any]]:
        for line, record in records:
            if line < header_line or (options.header and line == header_line):
                continue
            if len(record) != len(columns):
                raise StageError(
                    f"{name}, line {line}: this row has {len(record)} cells, the first "
                    f"{len(columns)}. {length_advice(line, len(columns), shown_delimiter, options)}"
                )
            if options.quotes == "auto":
                check_swallowed_rows(record, delimiter, f"{name}, line {line}", options)
            yield dict(zip(columns, record, strict=True))

    description = f"{encoding_description}, {shown_delimiter} between cells"
    if header_line > 1 and options.header:
        description += f", column names in line {header_line}"
    return TableFile(columns, rows, description)


def read_small_csv(path: Path, name: str) -> list[dict[str, str]]:
    """All rows of a file of cells for which there are no parameters: {column: cell}.

    Raises StageError as `read_csv` does, and OSError if the file cannot be read.
    """
    table = read_csv(path, name, ReadOptions(settable=False))
    return list(table.rows(table.columns))


def length_advice(line: int, columns: int, shown_delimiter: str, options: ReadOptions) -> str:
    """What to do about a row that has more or fewer cells than the first, which has `columns`."""
    advice = f"Put double quotes around a cell that has {shown_delimiter} or line breaks."
    if columns == 1 and options.settable:
        advice += f" If line {line} has the column names, set header_row: {line}."
    return advice


class CsvRecords:
    """The rows of a file, each with the line that it begins in.

    Rows of empty cells are left out.
    """

    def __init__(
        self, path: Path, name: str, encoding: str, delimiter: str, options: ReadOptions
    ) -> None:
        self.path = path
        self.name = name
        self.encoding = encoding
        self.options = csv_options(delimiter, options.quotes)
        self.advice = f" {LETTERS}" if options.settable else ""

    def __iter__(self) -> Iterator[Record]:
        line = 1
        with self.path.open(encoding=self.encoding, newline="") as file:
            # not pandas: its reader cuts a cell at a NUL
            reader = csv.reader(file, **self.options, strict=True)
            try:
                for record in reader:
                    # Excel's line that says which delimiter it is
                    about_the_delimiter = line == 1 and record and record[0].startswith("sep=")
                    if any(cell.strip() for cell in record) and not about_the_delimiter:
                        yield line, record
                    line = reader.line_num + 1
            except csv.Error as error:
                raise StageError(
                    f"{self.name}: the row that begins in line {line} has a double quote too many "
                    f"or too few ({error}). Inside a quoted cell, write a double quote twice: "
                    f'"".{self.advice}'
                ) from error


def csv_options(delimiter: str, quotes: str) -> dict[str, Any]:
    """What `csv.reader` is called with."""
    quoting = csv.QUOTE_NONE if quotes == "letters" else csv.QUOTE_MINIMAL
    return {"delimiter": delimiter, "quoting": quoting}


def choose_delimiter(path: Path, name: str, encoding: str, options: ReadOptions) -> str:
    """The delimiter that is set, or the one found.

    Raises StageError if it is more than a character, or a quote or the end of a line.
    """
    if options.delimiter == "auto":
        with path.open(encoding=encoding, newline="") as file:
            # what stands above the header may be of any form
            for _ in range(options.header_row - 1):
                file.readline()
            return find_delimiter(
                file.read(HEAD_CHARACTERS), ".tsv" in name.lower(), options.quotes
            )
    delimiter = {"tab": "\t", "\\t": "\t"}.get(options.delimiter, options.delimiter)
    if len(delimiter) != 1 or delimiter in NO_DELIMITERS:
        raise StageError(f'delimiter={delimiter!r}: use auto, tab, or one character such as ";".')
    return delimiter


def find_delimiter(head: str, tabs_first: bool, quotes: str = "auto") -> str:
    """What stands between the cells, from a file's first characters.

    That which cuts most of the rows into as many cells as the first; of several, the one less often
    followed by a space, as marks in prose are. If none cuts the first row, it may be a title, and
    the first row that is cut counts in its place. Of marks that are equal in both, the first of
    comma, semicolon, tab and bar (in a .tsv file the tab first). An Excel line `sep=;` says it.
    """
    if head.startswith("sep="):
        mark = head[4:5]
        if mark and mark not in NO_DELIMITERS:
            return mark
        head = head.partition("\n")[2]  # it says nothing: the other lines tell
    candidates = "\t,;|" if tabs_first else ",;\t|"
    lengths = {mark: row_lengths(head, mark, quotes) for mark in candidates}
    standards = {}  # {mark: how many cells a row should have}
    for mark, of_mark in lengths.items():
        if of_mark and of_mark[0] > 1:
            standards[mark] = of_mark[0]
    # a table of one column has no delimiter; one that is cut below its first row is none
    if not standards and max(lengths[candidates[0]], default=1) > 1:
        for mark, of_mark in lengths.items():
            longer = [length for length in of_mark if length > 1]
            if longer:
                standards[mark] = longer[0]
    scores = {}
    for mark, standard in standards.items():
        same_length = mean(length == standard for length in lengths[mark])
        # (how regular, how rarely before a space): the largest tuple wins
        scores[mark] = (same_length, -head.count(f"{mark} ") / head.count(mark))
    return max(scores, key=scores.__getitem__, default=candidates[0])


def row_lengths(head: str, mark: str, quotes: str) -> list[int]:
    """How many cells the rows of a file's first characters have with this delimiter."""
    reader = csv.reader(io.StringIO(head, newline=""), **csv_options(mark, quotes))
    lengths = [len(row) for row in reader if any(row)]
    if len(head) == HEAD_CHARACTERS:
        return lengths[:-1]  # the last row is cut
    return lengths


def find_header(records: CsvRecords, name: str, options: ReadOptions) -> Record:
    """The row with the column names: the one that is set, else the first that is no title.

    (1, []) if none is there.
    """
    if options.header_row:
        for line, record in records:
            if line >= options.header_row:
                return line, record
        raise StageError(
            f"header_row={options.header_row}: {name} has no rows from that line on. Lower "
            "header_row."
        )
    head = list(islice(records, HEADER_SEARCH_ROWS))
    if not head:
        return 1, []
    if options.header:
        for position, (line, record) in enumerate(head):
            if not is_title(record, [cells for _, cells in head[position + 1 :]]):
                return line, record
    return head[0]


def is_title(record: list[str], below: list[list[str]]) -> bool:
    """Whether a row is a title above the column names.

    It is if it has one text, in the first cell, and a row of names below it.
    """
    filled = [cell for cell in record if cell.strip()]
    if len(record) < 2 or len(filled) != 1 or not record[0].strip():
        return False
    for cells in below:
        if sum(bool(cell.strip()) for cell in cells) > 1:
            return looks_like_names(cells)
    return False


def looks_like_names(cells: list[str]) -> bool:
    """Whether cells may be column names.

    They may if all are filled, short and no numbers, and none comes twice.
    """
    texts = [cell.strip() for cell in cells]
    if len(set(texts)) < len(texts):
        return False
    return all(0 < len(text) < 60 and not re.fullmatch(r"[-+\d.,%]+", text) for text in texts)


def check_swallowed_rows(
    record: list[str], delimiter: str, place: str, options: ReadOptions
) -> None:
    """Raise StageError if a quoted cell holds whole rows; `place` is the file and its line.

    Its opening quote was a letter, or its end is missing.
    """
    advice = 'Inside a quoted cell, write a double quote twice: "".'
    if options.settable:
        advice = f"{LETTERS} If the cell is right as it is, set quotes: cells."
    for position, cell in enumerate(record):
        if "\n" not in cell and "\r" not in cell:
            continue
        if holds_rows(cell, position, len(record), delimiter):
            lines = len(cell.splitlines())
            raise StageError(
                f"{place}: a double quote opens a cell that ends {lines - 1} lines later and "
                f"seems to contain whole rows. {advice}"
            )


def holds_rows(cell: str, position: int, columns: int, delimiter: str) -> bool:
    """Whether the lines of a cell are mostly rows of the table.

    A row has as many delimiters as there are columns, less one.
    """
    lines = cell.splitlines()
    rows = 0
    candidates = 0  # lines that could be rows
    for number, text in enumerate(lines):
        # delimiters in a whole row; the first and the last line are parts of one
        expected = columns - 1
        if number == 0:
            expected -= position
        elif number == len(lines) - 1:
            expected = position
        if expected == 0 or not text.strip():
            continue
        candidates += 1
        rows += is_row(text, expected, delimiter)
    return rows > 0 and 2 * rows >= candidates


def is_row(text: str, delimiters: int, delimiter: str) -> bool:
    """Whether a line has this number of delimiters, with text on both sides of each.

    Delimiters in prose or in a number do not count.
    """
    cells = text.split(delimiter)
    if len(cells) != delimiters + 1 or not cells[-1].strip() or not cells[0].strip():
        return False
    if delimiter != "\t" and any(cell.startswith(" ") for cell in cells[1:]):
        return False
    return not re.search(rf"\d{re.escape(delimiter)}\d", text)
