"""Readers of single files: .csv, .tsv, .json, .jsonl, .parquet, .xlsx and .arrow, in any usual encoding.

Each is called with a file, its name as it is shown, and options, and returns the names of the columns, a function that
yields the rows as dicts of at least the wanted columns, and what there is to say about the file.
"""

import codecs
import csv
import gzip
import io
import json
import re
import shutil
from contextlib import suppress
from statistics import mean

from tabletune.errors import StageError

csv.field_size_limit(2**31 - 1)
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
SHOWN = {"utf-8-sig": "UTF-8", "\t": "tabs"}
SHOWN |= {"cp1252": "Windows-1252 (as it is no UTF-8: if letters look wrong, set `encoding`)"}
BLOCK, HEAD = 2**20, 2**16


def cell_text(value):
    """A cell as text: "" for a missing value, JSON for a list, an object or a truth value. Halves of characters go."""
    if isinstance(value, (list, dict, bool)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "ignore").decode()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return "" if value is None or value != value else str(value)


def unpack(path, target):
    """The file itself or, if it is compressed by gzip, what is in it: `target`."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    with gzip.open(path) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, BLOCK)
    return target


def find_encoding(path, name):
    """The encoding of a text file. Raises StageError if it cannot be told.

    UTF-8, UTF-16 and UTF-32 prove themselves. The rest is taken for Windows-1252, which Latin-1 is a part of, if it is
    neither UTF-8 with a few bytes damaged nor, being mostly beyond ASCII, of another script.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file, suppress(UnicodeDecodeError):
        head = data = file.read(BLOCK)
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                return encoding
        if b"\0" in head[:2]:
            return "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
        decoder.decode(head)
        while block := file.read(BLOCK):
            data = block
            decoder.decode(block)
        decoder.decode(b"", True)
        return "utf-8"
    text = data.decode("utf-8", "replace")
    beyond, letters = re.findall(r"[^\0-\x7f]", text), re.findall(r"[A-Za-z]", text)
    damaged = 2 * beyond.count("\ufffd") <= len(beyond)
    if damaged or 2 * len(beyond) > len(letters) or re.search(rb"[\x81\x8d\x8f\x90\x9d]", data):
        what = (
            "is UTF-8 with damaged bytes"
            if damaged
            else "is not UTF-8, and does not look like Windows-1252"
        )
        raise StageError(
            f"{name} {what}. Save it as UTF-8, or set `encoding`: cp1251, shift_jis, gb18030, euc_kr, …"
        )
    return "cp1252"


def encoding_of(path, name, encoding):
    """The encoding to read a text file in, and what to say about it."""
    found = find_encoding(path, name) if encoding == "auto" else codecs.lookup(encoding).name
    return "utf-8-sig" if found == "utf-8" else found, SHOWN.get(found, found.upper())


def find_delimiter(head, tabs_first):
    """What stands between the cells of a .csv, from its first characters.

    That which cuts most of the rows into as many cells as the first; of several, the one less often followed by a
    space, as marks in prose are. An Excel line `sep=;` says it.
    """
    scores = {}
    for mark in "\t,;|" if tabs_first else ",;\t|":
        rows = [row for row in csv.reader(io.StringIO(head, newline=""), delimiter=mark) if row]
        rows = rows[:-1] if len(head) == HEAD else rows
        if rows and len(rows[0]) > 1:
            scores[mark] = (
                mean(len(row) == len(rows[0]) for row in rows),
                -head.count(f"{mark} ") / head.count(mark),
            )
    return (
        head[4]
        if head.startswith("sep=")
        else max(scores, key=scores.get, default="\t" if tabs_first else ",")
    )


def read_csv(path, name, encoding, delimiter, header, **_):
    """A file of cells with a separator. Raises StageError if a quote is open or a row is not as long as the first."""
    encoding, said = encoding_of(path, name, encoding)
    if delimiter == "auto":
        with path.open(encoding=encoding, newline="") as file:
            delimiter = find_delimiter(file.read(HEAD), ".tsv" in name.lower())
    delimiter = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    if len(delimiter) != 1:
        raise StageError(f'delimiter={delimiter!r}: use auto, tab, or one character such as ";".')
    between = SHOWN.get(delimiter, repr(delimiter))

    def records():
        with path.open(encoding=encoding, newline="") as file:
            reader, line = (
                csv.reader(file, delimiter=delimiter, strict=True),
                1,
            )  # pandas' own cuts a cell at a NUL
            try:
                for record in reader:
                    if record and not (line == 1 and record[0].startswith("sep=")):
                        yield line, record
                    line = reader.line_num + 1
            except csv.Error as error:
                raise StageError(
                    f"{name}: the row that begins in line {line} has a double quote too many or too few ({error}). "
                    'Write a quote inside a quoted cell twice: "".'
                ) from None

    _, first = next(records(), (1, []))
    columns = first if header else [str(number) for number in range(1, len(first) + 1)]

    def rows(wanted):
        for number, (line, record) in enumerate(records()):
            if len(record) != len(columns):
                raise StageError(
                    f"{name}, line {line}: this row has {len(record)} cells, the first {len(columns)}. Put double "
                    f"quotes around a cell that has {between} or line breaks."
                )
            if number or not header:
                yield dict(zip(columns, record, strict=True))

    return columns, rows, f"{said}, {between} between cells"


def unique(pairs):
    """The dictionary of a JSON object. Raises ValueError if a field is there twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field is there twice")
    return dict(pairs)


def objects(file, name):
    """Yield the objects of an open file of JSON, an array or one after the other, however they are broken into lines.

    Their numbers come as the texts that are written. Raises StageError if anything else is in between.
    """
    decode = json.JSONDecoder(object_pairs_hook=unique, strict=False).raw_decode
    verbatim = json.JSONDecoder(
        parse_float=str, parse_int=str, strict=False
    ).raw_decode  # 1.50 stays 1.50
    between, text, place, line, array = re.compile(r"[\s,\[\]]*"), "", 0, 1, None
    while True:
        start = between.match(text, place).end()
        array = "[" in text[place:start] if array is None and start < len(text) else array
        try:
            value, end = decode(text, start)
            if not isinstance(value, dict):
                raise ValueError('a row must be an object like {"question": "..."}')
            if numbers := [field for field, cell in value.items() if type(cell) in (int, float)]:
                written = verbatim(text, start)[0]
                value |= {field: written[field] for field in numbers}
            yield value
            place = end
        except (ValueError, RecursionError) as error:
            more = file.read(max(BLOCK, len(text)))
            if not more and start == len(text) and (not array or "]" in text[place:]):
                return
            line += text.count("\n", 0, place if more else start)
            if not more:
                raise StageError(
                    f"{name}, line {line} is not JSON ({error}). Mend or remove it."
                ) from None
            text, place = text[place:] + more, 0


def read_objects(path, name, encoding, **_):
    """A file of JSON objects: an array of them, or one in a line. Raises StageError if it is damaged."""
    encoding, said = encoding_of(path, name, encoding)

    def rows(wanted):
        with path.open(encoding=encoding) as file:
            yield from objects(file, name)

    return list(dict.fromkeys(column for row in rows([]) for column in row)), rows, said


def rows_of(batches):
    """Yield the rows of Arrow batches."""
    for batch in batches:
        yield from batch.to_pylist()


def read_parquet(path, name, **_):
    """A .parquet file, in pieces."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, buffer_size=BLOCK)
    columns = file.schema_arrow.names
    return (
        columns,
        lambda wanted: rows_of(
            file.iter_batches(1000, columns=[c for c in wanted if c in columns])
        ),
        "",
    )


def read_arrow(path, name, **_):
    """A file that `datasets` has saved to disk."""
    from datasets import Dataset

    file = Dataset.from_file(str(path)).with_format("arrow")
    columns = file.column_names
    return (
        columns,
        lambda wanted: rows_of(file.select_columns([c for c in wanted if c in columns]).iter(1000)),
        "",
    )


def read_excel(path, name, header, sheet, **_):
    """A sheet of a workbook, the first or the one named, whole. Raises StageError if there is no such sheet."""
    import pandas as pd

    sheets = pd.ExcelFile(path).sheet_names
    if sheet and sheet not in sheets:
        raise StageError(
            f"dataset_config={sheet!r}: {name} has no such sheet. It has: {', '.join(sheets)}."
        )
    table = pd.read_excel(
        path, sheet or sheets[0], header=0 if header else None, dtype=str, na_filter=False
    )
    table.columns = [str(column if header else column + 1) for column in table.columns]
    rows = table[(table != "").any(axis=1)].to_dict("records")
    return list(table), lambda wanted: iter(rows), f"sheet {sheet or sheets[0]!r} of {len(sheets)}"


READERS = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_objects,
    ".jsonl": read_objects,
    ".ndjson": read_objects,
}
READERS |= {".parquet": read_parquet, ".xlsx": read_excel, ".arrow": read_arrow}
