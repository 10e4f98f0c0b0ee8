"""What a reader of files takes and returns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    The parameters of notebook 1 of the same names, and a workbook's `sheet`.
    """

    encoding: str = "auto"
    delimiter: str = "auto"
    quotes: str = "auto"
    header: bool = True
    header_row: int = 0  # 0: it is searched for
    sheet: str = ""
    # whether these are parameters for this file, so that an error may say which to set
    settable: bool = True


@dataclass(frozen=True)
class TableFile:
    """A file that can be read as often as needed.

    `rows` is called with the columns that are wanted, and yields dicts of at least those.
    `description` is what there is to say about the file.
    """

    columns: list[str]
    rows: Callable[[list[str]], Iterator[dict[str, Any]]]
    description: str = ""
