"""Answer a file of questions with a finished run: `make ask RUN_DIR=… QUESTIONS=file`.

With `context_rows` the rows of the whole table come into the prompt, those that `make index` added
included. Where the file has expected answers, it is said which answers are right.
"""

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.context import TableContext, answer_with_context, load_context
from tabletune.data.csv_files import read_small_csv
from tabletune.errors import StageError
from tabletune.evaluation.answers import generate
from tabletune.evaluation.content import (
    SHORT_ANSWER_WORDS,
    ContentRules,
    compare_answer,
    content_rules,
    normalized,
)
from tabletune.evaluation.grounding import table_of_items
from tabletune.evaluation.trained_run import TrainedRun, open_trained_run
from tabletune.model.devices import compute_dtype
from tabletune.model.run_models import load_adapted, load_merged
from tabletune.run.files import archive, atomic_write
from tabletune.run.parameters import PARAMETERS
from tabletune.stats import rate_interval

QUESTION_NAMES = ("question", "prompt", "asked", "input")
EXPECTED_NAMES = ("expected", "expected_answer", "answer", "reference", "output")
FILE = "answers.jsonl"


@dataclass(frozen=True)
class AskedQuestion:
    """A question of the reader's, and the answers that are right; none if the file does not say."""

    question: str
    expected: list[str] = field(default_factory=list)


def answer_questions(run_dir: Path, questions: Path, part: str, values: Mapping[str, Any]) -> None:
    """Answer the questions of a file with a `part` of a run: "adapter", "merged" or "base".

    Writes `answers.jsonl` into the run folder, and prints a table. `values` are parameters of
    notebook 4; what they leave out has its default. Raises StageError if the file or the run cannot
    be used.
    """
    asked_questions = read_questions(questions)
    settings = PARAMETERS["04_evaluate"] | dict(values)
    trained = open_trained_run(
        Path(run_dir),
        str(run_dir),
        settings["base_model"],
        with_merged=part == "merged",
        indexes=(),
    )
    context = load_context(trained.folder, "use", settings["unknown_threshold"])
    answers = ask_part(trained, part, prompts_of(trained, asked_questions), context, settings)
    rules = content_rules(trained.splits, trained.report, settings["item_field"])
    lines = answer_lines(asked_questions, answers, part, rules, context)
    archive(trained.folder, FILE)
    with atomic_write(trained.folder / FILE) as partial:
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        partial.write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(table_of_answers(lines, trained.disclaimer(settings["disclaimer"])))
    print(f"\n{trained.folder / FILE}")


def read_questions(path: Path) -> list[AskedQuestion]:
    """The questions of a .csv, .tsv, .json or .jsonl file, or of a text file with one a line.

    A table has a column `question` (or another of QUESTION_NAMES), and perhaps one of
    EXPECTED_NAMES, a text or a list of texts. Raises StageError if the file cannot be read, or has
    no questions.
    """
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            rows = read_small_csv(path, f"QUESTIONS={path}")
            questions = questions_of_rows(rows, path)
        else:
            # spreadsheets write a byte order mark at the beginning
            questions = questions_of_text(path.read_text(encoding="utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"QUESTIONS={path} cannot be read: {error}.") from None
    if not questions:
        raise StageError(f"QUESTIONS={path} has no questions.")
    return questions


def questions_of_text(text: str, path: Path) -> list[AskedQuestion]:
    """The questions of a JSON file's text, or of one with a question a line."""
    kind = path.suffix.lower()
    if kind in (".json", ".jsonl", ".ndjson"):
        return questions_of_rows(rows_of_json(text, kind, path), path)
    return [AskedQuestion(line.strip()) for line in text.splitlines() if line.strip()]


def rows_of_json(text: str, kind: str, path: Path) -> list[Any]:
    """The rows of a JSON text: a list, or one object a line.

    Raises StageError naming the line that is no JSON.
    """
    if kind == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise StageError(f"QUESTIONS={path} is not JSON: {error}.") from None
        if not isinstance(rows, list):
            raise StageError(f"QUESTIONS={path} must be a list of questions.")
        return rows
    rows = []
    # not splitlines: a JSON text may hold U+2028 as it is
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise StageError(f"QUESTIONS={path}, line {number}, is not JSON: {error}.") from None
    return rows


def questions_of_rows(rows: list[Any], path: Path) -> list[AskedQuestion]:
    """The questions of rows: dictionaries, or texts.

    Raises StageError if there is no column of questions.
    """
    questions = []
    for row in rows:
        if isinstance(row, str):
            row = {"question": row}
        if not isinstance(row, dict):
            raise StageError(
                f"QUESTIONS={path}: {row!r} is neither a question nor a row with a question."
            )
        # columns are called Question, question or " question"
        cells = {str(name).strip().casefold(): value for name, value in row.items()}
        name = next((name for name in QUESTION_NAMES if name in cells), None)
        if name is None:
            columns = ", ".join(map(str, row)) or "none"
            raise StageError(
                f"QUESTIONS={path} has no column question. Its columns: {columns}. Rename one."
            )
        text = str(cells[name] or "").strip()
        expected = next((cells[name] for name in EXPECTED_NAMES if name in cells), None)
        expected = expected if isinstance(expected, list) else [expected]
        texts = [str(value).strip() for value in expected if value is not None]
        if text:
            questions.append(AskedQuestion(text, [value for value in texts if value]))
    return questions


def prompts_of(trained: TrainedRun, questions: Sequence[AskedQuestion]) -> list[dict]:
    """The prompts for questions, as training had them.

    With the system turn of the training rows, if they have one.
    """
    # the same for all rows: notebook 1 puts it before each
    first = trained.splits["train"][0]["prompt"]
    system = [message for message in first[:1] if message["role"] == "system"]
    prompts = []
    for question in questions:
        prompts.append({"prompt": [*system, {"role": "user", "content": question.question}]})
    return prompts


def ask_part(
    trained: TrainedRun,
    part: str,
    prompts: list[dict],
    context: TableContext | None,
    settings: Mapping[str, Any],
) -> pd.DataFrame:
    """The answers of a part of the run to prompts, see `context.answer_with_context`."""
    source = (
        settings["base_model"],
        settings["base_model_revision"],
        compute_dtype(settings["precision"]),
        settings["attn_implementation"],
    )
    sampling = {}
    if settings["do_sample"]:
        sampling = {"do_sample": True}
        sampling |= {name: settings[name] for name in ("temperature", "top_p")}
    if part == "merged":
        model, _ = load_merged(trained.merged, trained.folder / "adapter", *source)
    else:
        model = load_adapted(trained.folder / "adapter", *source)

    def generate_answers(rows: list) -> tuple[pd.DataFrame, float]:
        return generate(
            model,
            trained.tokenizer,
            trained.stop_token_ids,
            rows,
            settings["eval_batch_size"],
            settings["max_new_tokens"],
            settings["seed"],
            **sampling,
        )

    if part == "base":
        with model.disable_adapter():
            answers, _ = answer_with_context(context, prompts, generate_answers)
    else:
        answers, _ = answer_with_context(context, prompts, generate_answers)
    return answers


def answer_lines(
    questions: Sequence[AskedQuestion],
    answers: pd.DataFrame,
    part: str,
    rules: ContentRules,
    context: TableContext | None,
) -> list[dict]:
    """The lines of `answers.jsonl`.

    `question`, `answer`, `unknown`, `rows`, and `expected` and `right` where known.
    """
    lines = []
    for question, generated in zip(questions, answers.to_dict("records"), strict=True):
        unknown = bool(generated.get("unknown", False))
        line = {
            "question": question.question,
            "answer": generated["answer"],
            "unknown": unknown,
            "rows": generated.get("rows") or [],
            "model": part,
            "stopped": bool(generated["stopped"]),
        }
        if question.expected:
            line["expected"] = question.expected
            line["right"] = is_expected(
                generated["answer"], unknown, question.expected, rules, context
            )
        lines.append(line)
    return lines


def is_expected(
    answer: str,
    unknown: bool,
    expected: list[str],
    rules: ContentRules,
    context: TableContext | None,
) -> bool:
    """Whether an answer is one of those that the reader expects.

    An expected answer that says that the table has nothing is right for `unknown` answers. One of
    few words is right if the answer has it in it; in a table of labels or short answers the two
    must be equal. All else is judged by the rules of the table.
    """
    says_nothing = context is not None and any(context.is_unknown(text) for text in expected)
    if unknown or says_nothing:
        return unknown and says_nothing
    # a table of long answers; of labels, "no" must not be right because it stands in "not known"
    if rules.right != "exact_match":
        words = f" {normalized(answer)} "
        for text in expected:
            short = len(text.split()) <= SHORT_ANSWER_WORDS
            if short and contains_words(words, normalized(text)):
                return True
    rows = [{"group": "asked", "completion": [{"content": text}]} for text in expected]
    items = table_of_items(rows, rules.answer_template, rules.item_field)
    # the table's items, and those of the expected answers under a question of their own
    rules = replace(rules, items=rules.items | items)
    return bool(compare_answer(answer, expected, rules, "asked")["right"])


def contains_words(text: str, words: str) -> bool:
    """Whether `words` stand in a text, not as a part of longer words."""
    start = text.find(words)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(words) :][:1]
        if not before.isalnum() and not after.isalnum():
            return True
        start = text.find(words, start + 1)
    return False


def table_of_answers(lines: Sequence[dict], disclaimer: str) -> str:
    """The answers as a table for the terminal, under the disclaimer, and how many are right."""
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    judged = [line["right"] for line in lines if "right" in line]
    with_rows = any(line["rows"] for line in lines)
    # what the columns have between them, and "right", take the rest of the width
    sizes = {"question": (width - 12) // 3, "answer": (width - 12) // 2}
    if with_rows:
        sizes = {"question": (width - 14) // 4, "answer": (width - 14) * 2 // 5}
        sizes["rests on"] = (width - 14) // 4
    heading = "  ".join(name.ljust(size) for name, size in sizes.items())
    text = [disclaimer, "", heading + ("  right" if judged else ""), "-" * width]
    for line in lines:
        cells = {"question": line["question"], "answer": shown_answer(line), "rests on": ""}
        if line["rows"]:
            best = line["rows"][0]
            cells["rests on"] = f"{best['question']} ({best['score']:.2f})"
            if line["unknown"]:
                cells["rests on"] = f"nothing; nearest: {cells['rests on']}"
        wrapped = {name: wrap(cells[name], size) for name, size in sizes.items()}
        height = max(len(column) for column in wrapped.values())
        for i in range(height):
            parts = [
                (column[i] if i < len(column) else "").ljust(sizes[name])
                for name, column in wrapped.items()
            ]
            if i == 0 and "right" in line:
                parts.append("yes" if line["right"] else "NO")
            text.append("  ".join(parts).rstrip())
    if judged:
        limits = rate_interval(judged) or [0.0, 1.0]
        low, high = (round(limit * len(judged)) for limit in limits)
        text += ["", f"Right: {sum(judged)} of {len(judged)} ({low}–{high})."]
    return "\n".join(text)


def shown_answer(line: dict) -> str:
    """An answer as the table shows it: without the marks of bold text.

    An answer that was cut says so.
    """
    cut = "" if line["stopped"] else " … [cut after max_new_tokens]"
    return line["answer"].replace("**", "") + cut


def wrap(text: str, size: int) -> list[str]:
    """The lines of a text, none longer than `size`; its own line breaks stay."""
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, size) or []
    return lines or [""]
