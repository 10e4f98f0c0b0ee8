"""Tables as people keep them.

Any usual file, folder or Hub data set as rows, each cell as it was written.

`datasets.load_dataset` does not read them: it turns 007 in a CSV into 7 and NA into nothing, and
silently shifts the cells of a row that has more of them than the header. What can be understood in
two ways is refused here, in one line that says where.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tabletune.data.cells import cell_text
from tabletune.data.readers import READERS, check_downloaded, explained, unpack
from tabletune.data.sources import choose_splits, file_kind, find_source
from tabletune.data.table_file import ReadOptions
from tabletune.errors import StageError

MOST_LINES = 10  # about a table's files
DIGEST_CHARACTERS = 16


@dataclass(frozen=True)
class TablePart:
    """A file of a table: its official split, or "" if that is ours to choose.

    Its columns; a function for its rows.
    """

    split: str
    path: Path
    columns: list[str]
    rows: Callable[[list[str]], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Table:
    """A table that can be read as often as needed.

    `descriptions` has a line about each file, `commit` is that of a Hub data set or None, `digest`
    is one of all bytes, and what was compressed lies in `unpacked` as long as the table is in use.
    """

    parts: list[TablePart]
    descriptions: list[str]
    commit: str | None
    digest: str
    unpacked: tempfile.TemporaryDirectory

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        names: dict[str, None] = {}  # as a set that keeps the order
        for part in self.parts:
            names |= dict.fromkeys(part.columns)
        return list(names)

    def records(self, wanted: list[str]) -> Iterator[tuple[str, list[Any]]]:
        """Yield (official split, values of the `wanted` columns) for each row.

        None stands where a value is missing. A column "a.b" is the field b of the objects in column
        a, if no column has that very name.
        """
        paths = [self.path_of(name) for name in wanted]
        # a reader knows columns, not the fields in them
        tops = list(dict.fromkeys(path[0] for path in paths))
        for part in self.parts:
            with explained(part.path):
                for row in part.rows(tops):
                    yield part.split, [self.read_value(part, row, path) for path in paths]

    @staticmethod
    def read_value(part: TablePart, row: dict[str, Any], path: list[str]) -> Any:
        """The value of a column or field in a row, bytes as a text.

        Raises StageError for bytes that are no text.
        """
        value = value_at(row, path)
        if not isinstance(value, bytes):
            return value
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            column = ".".join(path)
            raise StageError(
                f"{part.path}: the column {column!r} contains bytes that are not text: "
                f"{value[:20]!r}. Remove the column, or save it as text."
            ) from error

    def rows(self, wanted: list[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield (official split, texts of the `wanted` columns) for each row.

        "" stands where one is missing.
        """
        for split, values in self.records(wanted):
            yield split, [cell_text(value) for value in values]

    def path_of(self, name: str) -> list[str]:
        """The column of a name, and the fields in it: ["a"], or ["a", "b"] for "a.b"."""
        if name in self.columns or "." not in name:
            return [name]
        return name.split(".")

    def has_column(self, name: str) -> bool:
        """Whether there is such a column, or such a field in the objects of a column."""
        path = self.path_of(name)
        if len(path) == 1:
            return name in self.columns
        return any(value_at(row, path) is not None for row in self.sample())

    def sample(self, number: int = 20) -> list[dict[str, Any]]:
        """The first rows of each of the first files.

        They are dicts of all columns, as the file's reader gives them.
        """
        rows: list[dict[str, Any]] = []
        for part in self.parts[:number]:
            with explained(part.path):
                rows += islice(part.rows(part.columns), number)
        return rows

    def looks_headless(self) -> bool:
        """Whether the column names seem to be a row.

        Sentences, numbers, or values that come again in their column.
        """
        no_name = re.compile(r"[.?!]$|^[-\d.,]+$|^.{60}", re.DOTALL)  # a sentence, a number, long
        if any(no_name.search(name.strip()) for name in self.columns):
            return True
        # a value that is its column's name: the first row was a row like this one
        sample = self.sample(100)
        return any(name in [row.get(name) for row in sample] for name in self.columns)


def value_at(row: dict[str, Any], path: list[str]) -> Any:
    """The value of a column or, with more names in `path`, of a field in its objects.

    None if there is none.
    """
    value: Any = row
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def table_digest(
    dataset: str, revision: str = "main", config: str = "", splits: dict[str, Any] | None = None
) -> str:
    """The digest that the Table of a data set has, without reading its rows.

    It is one of all bytes of its files. Raises StageError if there is no such data set.
    """
    source = find_source(str(dataset), revision, config)
    digest = hashlib.sha256()
    for split, path in choose_splits(dataset, source, splits or {}):
        digest.update(file_digest(path) + split.encode())
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def file_digest(path: Path) -> bytes:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def open_table(
    dataset: str,
    revision: str = "main",
    config: str = "",
    splits: dict[str, Any] | None = None,
    options: ReadOptions | None = None,
) -> Table:
    """The Table of a data set.

    That is a file, a folder, the files of a pattern such as `data/*.csv`, or a Hub data set.

    `config` names one of several configurations, or a sheet of a workbook. `splits`, {"train": ...,
    "test": ...}, says which of the source's splits, or which files, are to be what; without it the
    source's own stay, if it has a held-out one. Raises StageError if there is no such table, if it
    is damaged or ambiguous, or if it has no rows.
    """
    source = find_source(str(dataset), revision, config)
    options = replace(options or ReadOptions(), sheet=config)
    unpacked = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    parts: list[TablePart] = []
    descriptions = []
    digest = hashlib.sha256()
    for split, path in choose_splits(dataset, source, splits or {}):
        check_downloaded(path)
        with explained(path):
            digest.update(file_digest(path) + split.encode())
            unpacked_path = unpack(path, Path(unpacked.name) / str(len(parts)))
            table_file = READERS[file_kind(path)](unpacked_path, str(path), options)
        parts.append(TablePart(split, path, table_file.columns, table_file.rows))
        about_split = f"{split} split" if split else ""
        descriptions.append(
            ", ".join(filter(None, [path.name, table_file.description, about_split]))
        )
    if len(descriptions) > MOST_LINES:
        more = len(descriptions) - MOST_LINES + 1
        descriptions = [*descriptions[: MOST_LINES - 1], f"… and {more} more files"]
    table = Table(
        parts, descriptions, source.commit, digest.hexdigest()[:DIGEST_CHARACTERS], unpacked
    )
    if not table.columns or not table.sample(1):
        raise StageError(f"dataset={dataset} has no rows. It needs some below its column names.")
    return table
