"""Readers of single files, by the ending of the file's name.

And what can be wrong with a file before it is read.
"""

import gzip
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from tabletune.data.columnar_files import read_arrow, read_parquet
from tabletune.data.csv_files import read_csv
from tabletune.data.json_files import read_json_rows
from tabletune.data.table_file import ReadOptions, TableFile
from tabletune.data.workbooks import DamagedFile, read_workbook
from tabletune.errors import StageError, first_line

# each is called with a file, its name as it is shown, and the options
READERS: dict[str, Callable[[Path, str, ReadOptions], TableFile]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json_rows,
    ".jsonl": read_json_rows,
    ".ndjson": read_json_rows,
    ".parquet": read_parquet,
    ".xlsx": read_workbook,
    ".arrow": read_arrow,
}
# what libraries raise for files that are damaged; whatever else is raised is a mistake of ours, and
# stays as it is
DAMAGE = (
    DamagedFile,
    OSError,
    EOFError,
    UnicodeError,
    zlib.error,
    zipfile.BadZipFile,
    pa.ArrowException,
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
COPY_BYTES = 2**20


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise a StageError of one line in place of what a library raises for a damaged file."""
    try:
        yield
    except DAMAGE as error:
        # a library's message may quote the file, control characters included
        printable = "".join(filter(str.isprintable, first_line(error)))
        reason = printable[:300]
        hint = "Is it damaged, or of another kind or `encoding` than it seems?"
        raise StageError(f"{path} could not be read: {reason}. {hint}") from error


def check_downloaded(path: Path) -> None:
    """Raise StageError if a file is only a pointer to the data, as Git LFS leaves it."""
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(LFS_POINTER):
        raise StageError(
            f"{path} is a pointer of Git LFS: the data itself was not downloaded. Run `git lfs "
            "pull` in its repository."
        )
    if b"/annex/objects/" in head and len(head) < 200:
        raise StageError(
            f"{path} is a pointer of git-annex: the data itself was not downloaded. Run `git annex "
            "get`."
        )


def unpack(path: Path, target: Path) -> Path:
    """The file itself or, if it is compressed by gzip, `target` with what is in it."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    with gzip.open(path) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, COPY_BYTES)
    return target
