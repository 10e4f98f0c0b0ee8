"""Rows on disk, as Arrow streams: a table larger than memory waits there between one step and the next."""

from itertools import islice

import datasets
import pyarrow as pa

from tabletune.run.files import whole


def features_of(*texts):
    """The features of examples, with more columns of `texts`."""
    text = datasets.Value("string")
    turns = [{"content": text, "role": text}]
    return datasets.Features(
        {"prompt": turns, "completion": turns, **dict.fromkeys(["text", "group", *texts], text)}
    )


def batches(rows, size=1000):
    """Yield the rows in lists of `size`."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def in_arrow(rows, features):
    """Yield rows, dicts, as Arrow batches of a thousand."""
    return (pa.RecordBatch.from_pylist(batch, features.arrow_schema) for batch in batches(rows))


def write_arrow(path, arrow, features):
    """Write Arrow batches as a stream. Returns how many rows. Raises StageError if the disk is full."""
    written, schema = 0, features.arrow_schema
    with (
        whole(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in arrow:
            writer.write_batch(batch)
            written += len(batch)
    return written


def read_rows(path, kept, columns):
    """Yield the batches of an Arrow stream, of each the rows for which `kept`, one truth value a row, is true.

    It is read, as what is mapped into memory would be counted as memory.
    """
    start = 0
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            yield batch.filter(pa.array(kept[start : start + len(batch)])).select(list(columns))
            start += len(batch)
