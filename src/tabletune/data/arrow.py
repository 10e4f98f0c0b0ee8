"""Rows on disk, as Arrow streams.

A table larger than memory waits there between one step and the next.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from tabletune.run.files import atomic_write

BATCH_ROWS = 1000
Row = dict[str, Any]


def features_of(extra: Iterable[str] = ()) -> datasets.Features:
    """The features of examples, with `extra` columns of texts."""
    text = datasets.Value("string")
    turns = [{"content": text, "role": text}]
    features = {"prompt": turns, "completion": turns, "text": text, "group": text}
    return datasets.Features(features | dict.fromkeys(extra, text))


def batches(rows: Iterable[Row], size: int = BATCH_ROWS) -> Iterator[list[Row]]:
    """Yield the rows in lists of `size`."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def arrow_batches(rows: Iterable[Row], features: datasets.Features) -> Iterator[pa.RecordBatch]:
    """Yield rows, dicts, as Arrow batches of a thousand; keys that are no feature are left out."""
    for batch in batches(rows):
        yield pa.RecordBatch.from_pylist(batch, features.arrow_schema)


def write_arrow(path: Path, arrow: Iterable[pa.RecordBatch], features: datasets.Features) -> int:
    """Write Arrow batches as a stream.

    Returns how many rows. Raises StageError if the disk is full.
    """
    schema = features.arrow_schema
    written = 0
    with (
        atomic_write(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in arrow:
            writer.write_batch(batch)
            written += len(batch)
    return written


def read_stream(path: Path, keep: np.ndarray, columns: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow stream, with those rows for which `keep` is true.

    `keep` has a truth value a row. It is read, as what is mapped into memory would be counted as
    memory.
    """
    start = 0
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            yield batch.filter(pa.array(keep[start : start + len(batch)])).select(list(columns))
            start += len(batch)


def save_splits(folder: Path, streams: dict[str, Path]) -> None:
    """Save Arrow streams, {split: path}, as the folder of a DatasetDict.

    `datasets.load_from_disk` reads it.
    """
    splits = {name: datasets.Dataset.from_file(str(path)) for name, path in streams.items()}
    datasets.DatasetDict(splits).save_to_disk(folder)
