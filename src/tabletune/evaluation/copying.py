"""Answers without a model: each question gets the answer of the most similar row.

Where notebook 5 recommends it, `make ask MODEL_PART=copy` and `app.py --copy` do it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.calibration import calibrate
from tabletune.data.context import ContextSettings, TableContext, load_context
from tabletune.data.lookup import CONTEXT_TEMPLATE
from tabletune.data.retrieval import RowIndex, all_rows
from tabletune.errors import StageError
from tabletune.run.artifacts import load_dataset_of_run


def copying_context(run: Path, settings: Mapping[str, Any]) -> TableContext:
    """The rows of a run's table to copy from, and below which score there is nothing to copy.

    They are those of `retrieval/`. A run without `context_rows` has no such folder: its rows are
    taken from `dataset/`, and every question gets the answer of a row, as in notebook 5, unless
    `settings` have an `unknown_answer`. Raises StageError if both folders are missing or damaged,
    and if there is a threshold, but nothing to say below it.
    """
    threshold = settings["unknown_threshold"]
    context = load_context(run, "use", threshold)
    if context is None:
        context = context_of_dataset(run, settings)
    unknown_answer = settings.get("unknown_answer") or context.settings.unknown_answer
    if threshold not in ("auto", 0) and not unknown_answer:
        raise StageError(
            f"unknown_threshold={threshold} needs a text to answer below it: "
            "ARGS=\"-p unknown_answer 'The table has nothing on that.'\""
        )
    if not unknown_answer:
        print(
            "Every question gets the answer of a row, however unlike its question is. To refuse "
            "some: ARGS=\"-p unknown_answer 'The table has nothing on that.'\""
        )
    return TableContext(context.index, replace(context.settings, unknown_answer=unknown_answer))


def context_of_dataset(run: Path, settings: Mapping[str, Any]) -> TableContext:
    """A context of all rows of `dataset/`, for a run that notebook 1 has made no index for.

    With an `unknown_answer`, its threshold is found as in notebook 1. Raises StageError if the rows
    have no questions.
    """
    splits, _ = load_dataset_of_run(run)
    rows = all_rows(splits)
    if not rows:
        raise StageError(
            "The rows of this table are texts without questions: there is nothing to look up."
        )
    index = RowIndex.build(rows)
    unknown_answer = settings.get("unknown_answer") or ""
    threshold = settings["unknown_threshold"]
    if threshold == "auto":
        threshold = 0.0
        if unknown_answer:
            threshold = calibrate(index, settings["seed"]).unknown_threshold
    return TableContext(
        index, ContextSettings(1, 0, CONTEXT_TEMPLATE, unknown_answer, float(threshold))
    )


def copied_answers(context: TableContext, questions: Sequence[str]) -> pd.DataFrame:
    """The answers of the rows that are most similar to the questions, a line a question.

    Columns as those of `context.answer_with_context`; `rows` has the row that was copied.
    """
    lines = []
    for question in questions:
        answer, unknown, rows = context.copied(question)
        line = {"answer": answer, "unknown": unknown, "rows": rows}
        lines.append({**line, "stopped": True, "new_tokens": 0})
    return pd.DataFrame(lines)
