"""Reader of .xlsx workbooks: each cell as its sheet shows it."""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabletune.data.csv_files import HEADER_SEARCH_ROWS, is_title
from tabletune.data.number_formats import shown_text
from tabletune.data.table_file import ReadOptions, TableFile
from tabletune.errors import StageError


class DamagedFile(Exception):
    """A library could not read a file; its text is the reason."""


@dataclass
class Sheet:
    """A sheet's cells as texts, without empty columns.

    `rows` has (number of the row in the sheet, texts); empty rows are left out. `errors` counts
    cells such as #N/A, which are read as empty.
    """

    title: str
    rows: list[tuple[int, list[str]]] = field(default_factory=list)
    letters: list[str] = field(default_factory=list)  # of the columns
    errors: int = 0


def read_workbook(path: Path, name: str, options: ReadOptions) -> TableFile:
    """A sheet of a workbook: the one that is set, else the first that holds a table.

    Raises StageError if there is no such sheet, or if it has formulas that were never computed.
    """
    book = load_book(path)
    titles = [sheet.title for sheet in book.worksheets]
    if options.sheet and options.sheet not in titles:
        raise StageError(
            f"dataset_config={options.sheet!r}: {name} has no such sheet. It has: "
            f"{', '.join(titles)}."
        )
    sheet = read_sheet(book[options.sheet]) if options.sheet else choose_sheet(book)
    check_formulas(path, name, sheet.title)
    number, names = find_header_row(sheet, name, options)
    columns = [text or letter for text, letter in zip(names, sheet.letters, strict=True)]
    if not options.header:
        columns = [str(position) for position in range(1, len(names) + 1)]
    rows_below = [texts for row, texts in sheet.rows if row > number or not options.header]

    def rows(wanted: list[str]) -> Iterator[dict[str, Any]]:
        for texts in rows_below:
            yield dict(zip(columns, texts, strict=True))

    return TableFile(columns, rows, describe(sheet, number, titles, options))


def describe(sheet: Sheet, number: int, titles: list[str], options: ReadOptions) -> str:
    """What there is to say about the sheet that is read."""
    description = f"sheet {sheet.title!r} of {len(titles)}"
    other_titles = [title for title in titles if title != sheet.title]
    if other_titles and not options.sheet:
        description += f" (dataset_config names another: {', '.join(other_titles[:5])})"
    if number > 1 and options.header:
        description += f", column names in row {number}"
    if sheet.errors:
        description += f", {sheet.errors} cells with an error such as #N/A are empty"
    return description


def load_book(path: Path, formulas: bool = False) -> Any:
    """The workbook, with the formulas or with what they came to.

    Raises DamagedFile if it is none.
    """
    import openpyxl

    try:
        with path.open("rb") as file:  # a file, as openpyxl refuses names with another ending
            return openpyxl.load_workbook(file, data_only=not formulas)
    except Exception as error:  # openpyxl checks nothing, so a damaged file may fail in any way
        raise DamagedFile(str(error) or type(error).__name__) from error


def choose_sheet(book: Any) -> Sheet:
    """The first sheet with a table: two columns or more, and two rows.

    Else the first that is not empty, or the first. Hidden sheets come last.
    """
    ordered = sorted(book.worksheets, key=lambda sheet: sheet.sheet_state != "visible")
    first: Sheet | None = None
    for worksheet in ordered:
        sheet = read_sheet(worksheet)
        if len(sheet.letters) > 1 and len(sheet.rows) > 1:
            return sheet
        if first is None or (not first.rows and sheet.rows):
            first = sheet
    return first or Sheet("")


def read_sheet(worksheet: Any) -> Sheet:
    """The texts of a sheet. Cells that are merged downwards carry their value down."""
    from openpyxl.utils import get_column_letter

    repeated = {}  # (row, column) of a merged cell: that of the one which has the value
    # Downwards only: a cell merged to the right is a heading over several columns.
    for merged in worksheet.merged_cells.ranges:
        for row in range(merged.min_row + 1, merged.max_row + 1):
            repeated[row, merged.min_col] = (merged.min_row, merged.min_col)
    sheet = Sheet(worksheet.title)
    rows = []
    for number, cells in enumerate(worksheet.iter_rows(), start=1):
        texts = []
        for column, cell in enumerate(cells, start=1):
            if (number, column) in repeated:
                cell = worksheet.cell(*repeated[number, column])
            if cell.data_type == "e":
                sheet.errors += 1
                texts.append("")
                continue
            # as the sheet shows it: 0.5 with the format 0% is 50%
            texts.append(shown_text(cell.value, cell.number_format))
        rows.append((number, texts))
    used_places: set[int] = set()
    for _, texts in rows:
        used_places.update(place for place, text in enumerate(texts) if text)
    filled = sorted(used_places)
    sheet.letters = [get_column_letter(place + 1) for place in filled]
    sheet.rows = [
        (number, [texts[place] for place in filled]) for number, texts in rows if any(texts)
    ]
    return sheet


def find_header_row(sheet: Sheet, name: str, options: ReadOptions) -> tuple[int, list[str]]:
    """The number and the texts of the row with the column names; (0, []) of an empty sheet."""
    if not sheet.rows:
        return 0, []
    if options.header_row:
        for number, texts in sheet.rows:
            if number >= options.header_row:
                return number, texts
        raise StageError(
            f"header_row={options.header_row}: {name} has no rows from that line on. Lower "
            "header_row."
        )
    head = sheet.rows[:HEADER_SEARCH_ROWS]
    if options.header:
        for position, (number, texts) in enumerate(head):
            if not is_title(texts, [below for _, below in head[position + 1 :]]):
                return number, texts
    return head[0]


def check_formulas(path: Path, name: str, title: str) -> None:
    """Raise StageError if a sheet has a formula whose result is not in the file.

    Programs that write workbooks leave it out; only spreadsheets compute it.
    """
    with zipfile.ZipFile(path) as archive:
        sheets = [part for part in archive.namelist() if part.startswith("xl/worksheets/")]
        if not any(re.search(rb"<f[ >/]", archive.read(part)) for part in sheets):
            return
    computed = load_book(path)[title]
    for row in load_book(path, formulas=True)[title].iter_rows():
        for cell in row:
            if cell.data_type == "f" and computed[cell.coordinate].value is None:
                formula = getattr(cell.value, "text", cell.value)
                raise StageError(
                    f"{name}, sheet {title!r}, cell {cell.coordinate}: the formula "
                    f"{str(formula)[:60]!r} was never computed. Open the workbook in Excel or "
                    "LibreOffice, and save it."
                )
