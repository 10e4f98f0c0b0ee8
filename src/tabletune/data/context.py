"""Rows of the table in the prompt: how a question becomes what the model is asked.

Notebooks 1, 4, 5 and 6, the chat page and `make ask` call `TableContext.prompt`; the exported app
does the same with `lookup.py` alone. Notebook 1 leaves two indexes in `retrieval/`: "evaluation"
has the rows of the train split, so that no test question finds its own row, and "use" has all rows.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tabletune.data.lookup import (
    MOST_CONTEXT_ROWS,
    choose_rows,
    context_message,
    copied_answer,
    final_answer,
    is_refused,
    is_unknown,
    lookup_text,
)
from tabletune.data.retrieval import Hit, RowIndex
from tabletune.errors import StageError

FOLDER = "retrieval"
INDEXES = ("evaluation", "use")
# what the manifest calls an index among the things that a result was made from
INPUT_NAMES = {"evaluation": "retrieval", "use": "retrieval_in_use"}
Message = dict[str, str]


@dataclass(frozen=True)
class ContextSettings:
    """How rows get into a prompt, and when the lookup alone decides.

    A question whose best score is below `unknown_threshold` is refused without asking the model,
    and an answer that rests on a row below it is not given. If the model refuses although the best
    score is at least `certain_threshold`, the answer is that of the best row.
    """

    context_rows: int
    context_characters: int
    context_template: str
    unknown_answer: str
    unknown_threshold: float = 0.0
    certain_threshold: float = 1.01


@dataclass(frozen=True)
class ContextPrompt:
    """A question as it is put to the model.

    The messages, the rows in them, best first, and whether it is refused.
    """

    messages: list[Message]
    hits: list[Hit]
    refused: bool

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in the prompt as plain values, best first: question, answer, score."""
        return [
            {"question": hit.row.question, "answer": hit.row.answer, "score": round(hit.score, 4)}
            for hit in self.hits
        ]


class TableContext:
    """An index and how its rows get into a prompt."""

    def __init__(self, index: RowIndex, settings: ContextSettings):
        self.index = index
        self.settings = settings
        self.answers = {lookup_text(row.answer) for row in index.rows}

    @property
    def fingerprint(self) -> str:
        """A short name for all that an answer depends on here.

        That is the settings, the rows, and the questions out of scope.
        """
        # the rows in their order: of equal scores, the earlier row comes first
        parts: list[Any] = [asdict(self.settings), [asdict(row) for row in self.index.rows]]
        if self.index.out_of_scope:
            parts.append(self.index.out_of_scope)
        text = json.dumps(parts, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def hits(self, question: str) -> list[Hit]:
        """The rows for a question's prompt, best first."""
        candidates = self.index.search(question, MOST_CONTEXT_ROWS)
        return self.choose(candidates)

    def choose(self, hits: Sequence[Hit]) -> list[Hit]:
        """Those of the hits, best first, that go into a prompt."""
        rows = [asdict(hit.row) for hit in hits]
        settings = self.settings
        places = choose_rows(rows, settings.context_rows, settings.context_characters)
        return [hits[place] for place in places]

    def prompt(self, messages: Sequence[Message]) -> ContextPrompt:
        """Messages that end with a user's turn, with the rows for that turn in it.

        Earlier turns stay as they are.
        """
        # rows belong to the last question; earlier turns had theirs
        place = max(i for i, turn in enumerate(messages) if turn["role"] == "user")
        question = messages[place]["content"]
        hits = self.hits(question)
        text = self.message([hit.row for hit in hits], question)
        turns = [dict(turn) for turn in messages]
        turns[place]["content"] = text
        settings = self.settings
        scores = [hit.score for hit in hits]
        refused = is_refused(scores, settings.unknown_answer, settings.unknown_threshold)
        return ContextPrompt(turns, hits, refused)

    def message(self, rows: Sequence[Any], question: str) -> str:
        """The text of the user's turn with these rows (TableRow)."""
        return context_message(
            self.settings.context_template, [asdict(row) for row in rows], question
        )

    def is_unknown(self, answer: str) -> bool:
        """Whether an answer says that the table has nothing."""
        return is_unknown(answer, self.settings.unknown_answer)

    def final_answer(self, answer: str, prompt: ContextPrompt) -> tuple[str, bool]:
        """What is said in the end of a model's answer to a prompt, and whether it is "nothing"."""
        settings = self.settings
        return final_answer(
            answer,
            prompt.rows,
            settings.unknown_answer,
            settings.unknown_threshold,
            settings.certain_threshold,
        )

    def copied(self, question: str) -> tuple[str, bool, list[dict[str, Any]]]:
        """What is said to a question without a model: (answer, unknown, rows).

        `unknown` says whether that is "nothing"; `rows` has the most similar row, as in
        `ContextPrompt.rows`.
        """
        hit = self.index.search(question, 1)[0]
        return copied_answer(
            asdict(hit.row),
            hit.score,
            self.settings.unknown_answer,
            self.settings.unknown_threshold,
        )

    def has_answer(self, references: Sequence[str]) -> bool:
        """Whether one of the answers stands in the index, under whatever question.

        If not, "nothing" is right.
        """
        return any(lookup_text(reference) in self.answers for reference in references)


def load_context(
    run: Path, which: str = "evaluation", unknown_threshold: float | str = "auto"
) -> TableContext | None:
    """The TableContext that notebook 1 left in a run folder; None without rows in the prompt.

    `which` is "evaluation" or "use". A number for `unknown_threshold` replaces the calibrated one.
    Raises StageError if the folder is damaged.
    """
    folder = run / FOLDER
    if not folder.exists():
        return None
    try:
        stored = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        names = ContextSettings.__dataclass_fields__
        values = {name: stored[name] for name in names}
        for name in ("unknown_threshold", "certain_threshold"):
            values[name] = float(values[name])
        for name in ("context_template", "unknown_answer"):
            if not isinstance(values[name], str):
                raise TypeError(f"{name} is no text")
        index = RowIndex.load(folder / which)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{folder} cannot be read ({str(error)[:100]}): run 01_format_dataset again."
        ) from None
    if unknown_threshold != "auto":
        values["unknown_threshold"] = float(unknown_threshold)
    return TableContext(index, ContextSettings(**values))


def index_fingerprints(run: Path, indexes: Sequence[str] = INDEXES) -> dict[str, str]:
    """The fingerprints of some indexes of a run, by their INPUT_NAMES; {} without indexes.

    A renewed index gives other prompts, and with them other results. Raises StageError if the
    folder is damaged.
    """
    fingerprints = {}
    for which in indexes:
        context = load_context(run, which)
        if context is not None:
            fingerprints[INPUT_NAMES[which]] = context.fingerprint
    return fingerprints


def messages_of(prompt: Any) -> list[Message]:
    """The messages of a prompt: a list of messages, or a row of a data set."""
    return list(prompt["prompt"]) if isinstance(prompt, dict) else list(prompt)


def answer_with_context(
    context: TableContext | None,
    prompts: Sequence[Any],
    generate: Callable[[list[Any]], tuple[pd.DataFrame, float]],
) -> tuple[pd.DataFrame, float]:
    """Answers to prompts, with rows of the table in them, and the seconds that they took.

    `generate` takes prompts and returns (DataFrame with `answer`, `stopped`, `new_tokens`;
    seconds). Columns that are added: `unknown` (the table has nothing, says the lookup or the
    model), `refused` (says the lookup alone), `copied` (the answer is the best row's, as the model
    refused a question that a row has nearly word for word), and `rows`: what was in the prompt, as
    dicts with `question`, `answer` and `score`. Without a context: what `generate` returns.
    """
    if context is None:
        return generate(list(prompts))
    with_rows = [context.prompt(messages_of(prompt)) for prompt in prompts]
    # what the lookup refuses costs no time of the model
    to_ask = [place for place, prompt in enumerate(with_rows) if not prompt.refused]
    lines: list[dict[str, Any]] = [
        {"answer": context.settings.unknown_answer, "stopped": True, "new_tokens": 0}
        for _ in with_rows
    ]
    seconds = 0.0
    if to_ask:
        answers, seconds = generate([with_rows[place].messages for place in to_ask])
        for place, line in zip(to_ask, answers.to_dict("records"), strict=True):
            lines[place] = line
    for line, prompt in zip(lines, with_rows, strict=True):
        line["rows"] = prompt.rows
        line["refused"] = prompt.refused
        model_answer = line["answer"]
        line["unknown"] = True
        if not prompt.refused:
            line["answer"], line["unknown"] = context.final_answer(model_answer, prompt)
        line["copied"] = not line["unknown"] and line["answer"] != model_answer
    columns = ["answer", "stopped", "new_tokens", "refused", "unknown", "copied", "rows"]
    return pd.DataFrame(lines, columns=columns), seconds


def threshold_table(
    scores: Sequence[float],
    said_unknown: Sequence[bool],
    answerable: Sequence[bool],
    thresholds: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Both errors of refusing at each threshold of the lookup's score, a line a threshold.

    `scores` are the best scores of questions, `said_unknown` what the model said of them,
    `answerable` whether the index has an answer. Columns: `false nothing`, the share of answerable
    questions that are refused, and `not refused`, the share of the others that get an answer; NaN
    where there are no such questions.
    """
    score = np.asarray(scores, dtype=float)  # [questions]
    model_refused = np.asarray(said_unknown, dtype=bool)
    has = np.asarray(answerable, dtype=bool)
    if thresholds is None:
        thresholds = [round(0.1 * step, 1) for step in range(10)]
    lines = []
    for threshold in thresholds:
        refused = model_refused | (score < threshold)
        false_nothing = refused[has].mean() if has.any() else np.nan
        not_refused = (~refused[~has]).mean() if (~has).any() else np.nan
        lines.append([threshold, false_nothing, not_refused])
    return pd.DataFrame(lines, columns=["unknown_threshold", "false nothing", "not refused"])
