"""Both errors of saying "the table has nothing on that", and how the threshold moves them.

A run with `context_rows` and an `unknown_answer` says it in three cases: no row of a question
scores `unknown_threshold`, the model's answer was taken from a row that scores less, or the model
itself refuses. A higher threshold refuses more: fewer questions get an answer that the table does
not have, and more are refused although it has one.

`is_refused` and `is_unknown` in data/lookup.py decide what is a refusal; here they are counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.context import FOLDER, TableContext, threshold_table
from tabletune.data.lookup import source_row
from tabletune.report.reading import read_lines
from tabletune.report.showing import say, show_table
from tabletune.run.files import read_json

HAS = "refused, but the table has an answer"
LACKS = "answered, but the table has none"
NO_ROWS = (
    "Not measured: without `context_rows` the model is not taught to say that the table has "
    "nothing."
)
NO_ANSWER = (
    "Not measured: `unknown_answer` is empty, so the model never says that the table has nothing."
)
STEPS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # of the threshold, beside the one in use


def show_refusals(run: Path, context: TableContext | None) -> None:
    """Show both errors by threshold, or say why they were not measured.

    `run` is a run folder after notebook 4, `context` the rows that it answered from, with the
    threshold in use.
    """
    if context is None:
        say(NO_ROWS)
        return
    if not context.settings.unknown_answer:
        say(NO_ANSWER)
        return
    lines = read_lines(run / "evaluation" / "answers.jsonl")
    lines = [line for line in lines if line["model"] == "merged"]
    calibration = read_json(run / FOLDER / "settings.json", "01_format_dataset")["calibration"]
    threshold = context.settings.unknown_threshold
    table = refusals_table(lines, calibration, threshold)
    show_table(table.rename_axis("unknown_threshold").reset_index())
    say(*refusal_sentences(lines, calibration, threshold))


def refusals_table(
    lines: Sequence[dict], calibration: Mapping[str, list[float]], threshold: float
) -> pd.DataFrame:
    """Both errors by threshold, as texts: a line a threshold, the one in use marked.

    "lookup alone" counts the scores that notebook 1 kept, "with the model" the `lines` on the
    questions of notebook 4. A question that the lookup refused was not put to the model, so below
    the threshold in use nothing is known of the model.
    """
    thresholds = sorted({0.0, round(threshold, 3), *STEPS})
    answerable, unanswerable = calibration["answerable"], calibration["others"]
    lookup = threshold_table(
        [*answerable, *unanswerable],
        [False] * (len(answerable) + len(unanswerable)),
        [True] * len(answerable) + [False] * len(unanswerable),
        thresholds,
    )
    model = threshold_table(
        [decisive_score(line) for line in lines],
        [bool(line["unknown"]) for line in lines],
        [bool(line["answerable"]) for line in lines],
        thresholds,
    )
    model[model["unknown_threshold"] < round(threshold, 3)] = float("nan")
    table = pd.DataFrame(index=[threshold_name(value, threshold) for value in thresholds])
    for name, errors in (("lookup alone", lookup), ("with the model", model)):
        table[f"{name}: {HAS}"] = list(map(share_or_dash, errors["false nothing"]))
        table[f"{name}: {LACKS}"] = list(map(share_or_dash, errors["not refused"]))
    return table


def decisive_score(line: Mapping[str, Any]) -> float:
    """The score that the threshold is compared with.

    That of the row which the answer was taken from, or of the best row where the model refused.
    """
    if not line["rows"]:
        return 0.0
    row = line["rows"][0] if line["unknown"] else source_row(line["answer"], line["rows"])
    return float(row["score"])


def threshold_name(value: float, in_use: float) -> str:
    """A threshold as text, which says if it is the one in use."""
    return f"{value:g} (in use)" if value == round(in_use, 3) else f"{value:g}"


def share_or_dash(share: float) -> str:
    """A share as text, a dash for what is not known."""
    return "–" if pd.isna(share) else f"{share:.0%}"


def refusal_sentences(
    lines: Sequence[dict], calibration: Mapping[str, list[float]], threshold: float
) -> list[str]:
    """What the figures of `refusals_table` rest on, and how to move the threshold."""
    has = sum(bool(line["answerable"]) for line in lines)
    return [
        f"“lookup alone” rests on questions of notebook 1: {len(calibration['answerable']):,} "
        f"reworded ones, and {len(calibration['others']):,} whose rows were left out. “with the "
        f"model” rests on the questions above: {has} whose answer is in the index, and "
        f"{len(lines) - has} whose answer is not. The model never saw the questions that the "
        "lookup refused. So nothing is known about the model with a threshold below "
        f"{threshold:g}.",
        "To move the threshold, set `unknown_threshold` above and run this notebook again. A "
        "higher one refuses more questions; 0 leaves the decision to the model. `make ask`, chat "
        "and notebook 7 take the same parameter.",
    ]
