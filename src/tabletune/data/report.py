"""What there is to know of a data set, for `report.json` and for what notebook 1 shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tabletune.chat.templates import takes_system
from tabletune.data.cells import cell_text
from tabletune.data.cleaning import SHOWN_CHARACTERS
from tabletune.data.splits import SPLITS
from tabletune.errors import StageError
from tabletune.run.files import read_json
from tabletune.stats import FEWEST_GROUPS

if TYPE_CHECKING:
    import pandas as pd

    from tabletune.data.formatter import FormatStatistics, TableFormatter
    from tabletune.data.tables import Table

ADVICE = {
    "no question": "a column that may be empty gets a line of its own in question_template",
    "no answer": "answer_column names what every row needs",
    "near duplicate": (
        "near_duplicate_threshold: 1.01 keeps what differs in capitals or punctuation"
    ),
    "a turn of an unknown role": "roles: {NAME: user, NAME: assistant} says who is who",
}
# what such rows say is still there, or was not to be learned
NOT_LOST = ("duplicate", "labelled as rejected")
SETTINGS_IN_REPORT = ("base_model", "max_length", "system_prompt", "thinking", "template_date")
HISTOGRAM_BINS = 30
MANY_COPIES = 0.1  # a share of the rows
MANY_HTML = 0.05  # texts that look like HTML, as a share of the rows
MOST_CHARACTERS = 90  # of a text of a row that are shown
MOST_COLUMNS = 6  # side by side


def lost_rows(statistics: FormatStatistics) -> int:
    """How many rows are lost: those that were dropped, without copies of others."""
    return statistics.dropped.total() - sum(statistics.dropped[reason] for reason in NOT_LOST)


def check_lost_rows(statistics: FormatStatistics, max_dropped: float) -> None:
    """Raise StageError if more rows are lost than `max_dropped`, a share.

    It names the settings that keep them.
    """
    lost = lost_rows(statistics)
    if statistics.lengths and lost <= max_dropped * statistics.rows_in:
        return
    advice = dict(ADVICE)
    lengths = np.sort([*statistics.lengths, *statistics.too_long])
    if len(lengths):
        advice["too long"] = f"max_length: {lengths[int(0.95 * (len(lengths) - 1))]} keeps 95%"
    parts = []
    for reason, rows in statistics.dropped.items():
        parts.append(f"{rows:,} {reason} ({advice.get(reason, 'see the table')})")
    reasons = "; ".join(parts)
    if lost == 0:
        raise StageError(f"No row of {statistics.rows_in:,} is left: {reasons}.")
    # rounded up, so that what is advised suffices
    share = np.ceil(100 * lost / statistics.rows_in) / 100
    raise StageError(
        f"{lost:,} of {statistics.rows_in:,} rows would be lost, more than "
        f"max_dropped={max_dropped}: {reasons}. Correct that, or continue without these rows: "
        f"max_dropped: {share}."
    )


def make_report(
    formatter: TableFormatter,
    sizes: dict[str, int],
    split: np.ndarray,
    context: int | None,
    safety_rows: int,
) -> dict[str, Any]:
    """The report on a table that was formatted: what went in, what changed, what came out.

    `sizes` are the rows of each split, `split` is that of each row, `context` how many tokens the
    model reads at once.
    """
    statistics = formatter.statistics
    lengths = np.array(statistics.lengths)  # [rows]
    report = {
        **what_went_in(formatter),
        "rows_in": statistics.rows_in,
        "rows_out": len(lengths),
        "answers_apart": statistics.answers_apart,
        "changed": formatter.clean.changed,
        "dropped": dict(statistics.dropped),
        "dropped_rows": statistics.dropped_rows,
        "unused_columns": formatter.shape.unused,
        "safety_rows": safety_rows,
        "splits": sizes,
        **questions_of_splits(statistics, split),
        "tokens": {**token_counts(lengths), "over_max_length": len(statistics.too_long)},
    }
    beyond_context = 0
    if context:
        beyond_context = int((lengths > context).sum())
    report["notes"] = notes_of(formatter, report, beyond_context, context)
    return report


def what_went_in(formatter: TableFormatter) -> dict[str, Any]:
    """What the report says of the table, its shape, and the settings that it was formatted with."""
    table = formatter.table
    shape = formatter.shape
    settings = formatter.settings
    return {
        "source": {
            "dataset": settings["dataset"],
            "files": table.descriptions,
            "digest": table.digest,
        },
        "dataset_commit": table.commit,
        "shape": shape.name,
        "example": shape.example,
        "templates": {
            "question": shape.question_template,
            "answer": shape.answer_template,
            "answer_column": shape.answer_column,
        },
        **{name: settings[name] for name in SETTINGS_IN_REPORT},
    }


def questions_of_splits(statistics: FormatStatistics, split: np.ndarray) -> dict[str, Any]:
    """What the report says of questions: how many there are, and what splits have in common.

    `split` is that of each row, [rows]; "" for rows that `train_rows` leaves out.
    """
    # a question's position is its own, so equal positions are rows of one question
    positions = np.array(statistics.positions)  # [rows]
    rows_of_each_question = np.unique(positions, return_counts=True)[1]
    sizes, how_often = np.unique(rows_of_each_question, return_counts=True)
    answers = np.array(statistics.answers, dtype=np.uint64)
    return {
        "left_out_of_training": {
            "rows": int((split == "").sum()),
            "questions": len(np.unique(positions[split == ""])),
        },
        "questions": {name: len(np.unique(positions[split == name])) for name in SPLITS},
        "rows_a_question": [sizes.tolist(), how_often.tolist()],
        "leaks": shared_with_training(positions, split),
        "answer_leaks": shared_with_training(answers, split),
    }


def token_counts(lengths: np.ndarray) -> dict[str, Any]:
    """What the report says of the lengths of examples, [rows], in tokens."""
    histogram, edges = np.histogram(lengths, bins=HISTOGRAM_BINS)
    return {
        **{f"p{share}": int(np.quantile(lengths, share / 100)) for share in (50, 95)},
        "max": int(lengths.max()),
        "histogram": [histogram.tolist(), edges.tolist()],
    }


def shared_with_training(values: np.ndarray, split: np.ndarray) -> dict[str, int]:
    """How many rows of each held-out split have a value that a row of training has, too.

    A split with none is left out.
    """
    in_training = values[split == "train"]
    shared = {name: int(np.isin(values[split == name], in_training).sum()) for name in SPLITS[1:]}
    return {name: rows for name, rows in shared.items() if rows}


def notes_of(
    formatter: TableFormatter, report: dict[str, Any], beyond_context: int, context: int | None
) -> list[str]:
    """What a reader should know about the table, in sentences."""
    notes = []
    html = formatter.clean.html_texts
    if html > MANY_HTML * formatter.statistics.rows_in:
        notes.append(f"{html:,} texts look like HTML. html_to_text: true makes text of it.")
    if beyond_context:
        notes.append(
            f"{beyond_context:,} examples are longer than the {context} tokens that this model was "
            "made to read at once."
        )
    return notes + notes_on_splits(report) + notes_on_rows(formatter)


def notes_on_splits(report: dict[str, Any]) -> list[str]:
    """What a reader should know about the splits: what they share, and how small they are."""
    notes = []
    if report["leaks"]:
        counts = [
            f"{rows:,} of {report['splits'][name]:,} rows of the {name} split"
            for name, rows in report["leaks"].items()
        ]
        notes.append(
            f"Asked in training, too: {' and '.join(counts)}. The splits of the source stay as "
            "they are."
        )
    for name, rows in report["answer_leaks"].items():
        notes.append(
            f"{rows:,} of {report['splits'][name]:,} rows of the {name} split have an answer that "
            "stands in training, too, in the same words."
        )
    left_out = report["left_out_of_training"]
    if left_out["rows"]:
        used = report["questions"]["train"]
        notes.append(
            f"train_rows: {used:,} of {used + left_out['questions']:,} training questions are "
            f"used; {left_out['rows']:,} rows are left out."
        )
    small_splits = [name for name in SPLITS[1:] if report["questions"][name] < FEWEST_GROUPS]
    if small_splits:
        notes.append(
            f"Too few questions for an interval: {' and '.join(small_splits)}. More rows would "
            "make more of them."
        )
    return notes


def notes_on_rows(formatter: TableFormatter) -> list[str]:
    """What a reader should know about how rows became conversations."""
    statistics = formatter.statistics
    notes = []
    if formatter.shape.name == "text":
        notes.append("These rows are texts without questions: the loss is on the whole text.")
    if statistics.system_messages and not takes_system(formatter.tokenizer):
        notes.append(
            "The template has no system role: the system text goes in front of the first question."
        )
    duplicates = statistics.dropped["duplicate"]
    if duplicates > MANY_COPIES * statistics.rows_in:
        notes.append(
            f"{duplicates:,} copies of rows are dropped. keep_duplicates: true keeps what is "
            "repeated on purpose."
        )
    if statistics.answers_apart:
        notes.append(
            f"{statistics.answers_apart:,} rows more, as each answer of a list has a row of its "
            "own."
        )
    ignored_keys = formatter.turn_options.left_out
    if ignored_keys:
        keys = ", ".join(f"{key} ({count:,})" for key, count in ignored_keys.most_common())
        notes.append(f"Keys of turns that nothing is learned from: {keys}.")
    return notes


def read_report(run: Path) -> dict[str, Any]:
    """What `make_report` said of the data set of a run. Raises StageError if it is missing."""
    return read_json(run / "dataset" / "report.json", "01_format_dataset")


def first_rows(table: Table, number: int = 3) -> pd.DataFrame:
    """The first rows of a table as they are read; long texts are cut."""
    import pandas as pd

    rows = table.sample(number)[:number]
    frame = pd.DataFrame([{name: row.get(name) for name in table.columns} for row in rows])
    frame = frame.map(lambda value: shortened(cell_text(value)))
    if frame.shape[1] > MOST_COLUMNS:  # a named index: `show_table` then puts columns below another
        frame.index = pd.Index([f"row {number + 1}" for number in range(len(frame))])
    return frame


def rows_table(report: dict[str, Any]) -> pd.DataFrame:
    """What became of the rows of a table: a column of counts.

    First a sum: the rows that were read, those that were dropped, those that are left. Then how
    many rows each rule of cleaning has changed.
    """
    import pandas as pd

    steps = {"in the table": report["rows_in"]}
    for reason, rows in report["dropped"].items():
        steps[f"dropped: {reason}"] = -rows
    # a list of answers becomes several rows, and the rows on emergencies come from elsewhere
    steps["left"] = report["rows_out"]
    for rule, change in report["changed"].items():
        steps[f"changed: {rule}"] = change["rows"]
    return pd.Series(steps, name="rows").to_frame()


def splits_table(report: dict[str, Any]) -> pd.DataFrame:
    """How many rows and how many questions each split has."""
    import pandas as pd

    return pd.DataFrame({"rows": report["splits"], "questions": report["questions"]})


def changes_table(report: dict[str, Any]) -> pd.DataFrame:
    """An example of each change, before and after, around the place where it happened."""
    import pandas as pd

    examples = {
        rule: [excerpt(change["before"]), excerpt(change["after"])]
        for rule, change in report["changed"].items()
    }
    return pd.DataFrame.from_dict(examples, orient="index", columns=["before", "after"])


def excerpt(text: str) -> str:
    """A text of an example of a change, invisible characters as codes, cut at a whole word."""
    if len(text) < SHOWN_CHARACTERS:
        return repr(text)
    whole_words = text.rpartition(" ")[0] or text
    return f"{whole_words!r} …"


def dropped_table(report: dict[str, Any]) -> pd.DataFrame:
    """The first rows that were dropped, each with the reason; long texts are cut."""
    import pandas as pd

    return pd.DataFrame(report["dropped_rows"]).map(shortened)


def shortened(text: Any) -> str:
    """The beginning of a text, and that there is more; "" for what is missing."""
    text = "" if text is None else str(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def sentences_on_data_set(report: dict[str, Any]) -> list[str]:
    """What notebook 1 says at its end: how many rows came out, and what is kept for the test."""
    rows_in, rows_out = report["rows_in"], report["rows_out"]
    return [
        f"{rows_out:,} of {rows_in:,} rows became conversations.",
        f"Their median length is {report['tokens']['p50']} tokens.",
        *sentences_on_test_split(report),
    ]


def sentences_on_test_split(report: dict[str, Any]) -> list[str]:
    """What notebook 1 says at its end of the test split.

    How many questions, and what of them is in training, too.
    """
    rows = report["splits"]["test"]
    repeated = report["leaks"].get("test", 0)
    answered = report["answer_leaks"].get("test", 0)
    sentences = [f"{report['questions']['test']} questions ({rows} rows) are kept for the test."]
    if repeated:
        sentences.append(f"But {repeated} of these rows ask what is asked in training, too.")
    else:
        sentences.append("None of them is asked in training.")
    if answered:
        sentences.append(
            f"The answers of {answered} of these rows stand in training, too, word for word."
        )
    return sentences
