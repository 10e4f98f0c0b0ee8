"""A whole table as a data set.

Cleaned, without copies, encoded, split by question, and saved with a report.

A table may be larger than memory. So its rows go through all steps a thousand at a time, to a file
from which the splits are dealt out.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tabletune.data.arrow import (
    arrow_batches,
    features_of,
    read_stream,
    save_splits,
    write_arrow,
)
from tabletune.data.conversation_shape import Shape
from tabletune.data.formatter import TableFormatter
from tabletune.data.report import make_report
from tabletune.data.splits import SPLITS, assign_splits, limit_training
from tabletune.data.tables import Table
from tabletune.run.files import archive, atomic_write


def format_table(
    table: Table,
    shape: Shape,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: list[int],
    folder: Path,
    context: int | None = None,
) -> dict[str, Any]:
    """Put a table through all steps and save it as `folder`.

    A DatasetDict, and report.json, which is returned. An earlier one moves aside once the new one
    is complete. The fingerprint is a SHA-256 of the text of all splits: two data sets with the same
    one train the same. `context` is how many tokens the model reads at once. Raises StageError if
    too many rows are lost, or too few questions are left.
    """
    formatter = TableFormatter(table, shape, settings, tokenizer, stop_token_ids)
    features = features_of(formatter.extra_columns)
    waiting_features = features_of([*formatter.extra_columns, "key"])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        examples = formatter.examples(formatter.conversations())
        progress = tqdm(
            examples, "formatting", unit=" rows", delay=10, mininterval=10, file=sys.stdout
        )
        # Splits depend on all rows, so these wait on the disk until the last one is read.
        waiting = Path(temporary) / "rows.arrow"
        write_arrow(waiting, arrow_batches(progress, waiting_features), waiting_features)
        formatter.check_lost()
        split = split_of_rows(formatter, settings)
        safety_rows = []
        if settings["safety_rows"] not in (0, False):
            # not those whose question is held out: it would be in training after all
            safety_rows = formatter.safety_rows(held_out_questions(waiting, split))
        digest = hashlib.sha256()
        streams = {name: Path(temporary) / f"{name}.arrow" for name in SPLITS}
        sizes = {}
        for name in sorted(SPLITS):  # the order of the digest
            arrow = chain(
                read_stream(waiting, split == name, features),
                arrow_batches(safety_rows if name == "train" else [], features),
            )
            sizes[name] = write_arrow(streams[name], with_digest(arrow, name, digest), features)
        report = make_report(
            formatter, {name: sizes[name] for name in SPLITS}, split, context, len(safety_rows)
        )
        report["fingerprint"] = digest.hexdigest()[:16]
        with atomic_write(folder) as partial:
            save_splits(partial, streams)
            text = json.dumps(report, indent=2, ensure_ascii=False)
            (partial / "report.json").write_text(text, encoding="utf-8")
            # last: until the new data set is complete, the earlier one stays where it is
            archive(folder.parent, folder.name)
    return report


def split_of_rows(formatter: TableFormatter, settings: dict[str, Any]) -> np.ndarray:
    """The split of each row that was formatted, [rows]; "" for what `train_rows` leaves out.

    Raises StageError if there are too few questions.
    """
    statistics = formatter.statistics
    split = assign_splits(
        statistics.positions,
        settings["validation_fraction"],
        settings["test_fraction"],
        statistics.official_splits,
    )
    return limit_training(split, statistics.positions, settings["train_rows"])


def held_out_questions(waiting: Path, split: np.ndarray) -> set[str]:
    """The questions that validation and test have, of the rows in a stream, as `question_key`."""
    questions: set[str] = set()
    for batch in read_stream(waiting, np.isin(split, ["validation", "test"]), ["key"]):
        # with split_by: row the answer stands in the key, below the question
        questions.update(key.partition("\n")[0] for key in batch["key"].to_pylist())
    return questions


def with_digest(
    arrow: Iterable[pa.RecordBatch], split: str, digest: Any
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a split, the text of each row added to the digest on its way."""
    for batch in arrow:
        texts = batch["text"].to_pylist()
        digest.update("".join(f"{split}\0{text}\0" for text in texts).encode())
        if "learned" in batch.schema.names:
            digest.update("".join(filter(None, batch["learned"].to_pylist())).encode())
        yield batch
