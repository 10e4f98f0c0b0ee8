"""Answer a file of questions with a finished run: `make ask RUN_DIR=… QUESTIONS=file`.

With `context_rows` the rows of the whole table come into the prompt, those that `make index` added
included. Without a model, `MODEL_PART=copy`, the answer is that of the most similar row. Where the
file has expected answers, it is said which answers are right.
"""

import shutil
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.context import TableContext
from tabletune.data.example import disclaimer_of
from tabletune.evaluation.content import (
    SHORT_ANSWER_WORDS,
    ContentRules,
    compare_answer,
    content_rules,
    normalized,
    reference_of,
    rows_with_questions,
)
from tabletune.evaluation.copying import copied_answers, copying_context
from tabletune.evaluation.grounding import table_of_items
from tabletune.evaluation.question_files import AskedQuestion, read_questions
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import archive, read_json, write_lines
from tabletune.run.parameters import PARAMETERS
from tabletune.stats import rate_interval

COPY = "copy"
PARTS = (COPY, "base", "adapter", "merged")
FILE = "answers.jsonl"
READ_THESE = (
    "Answers are compared by their words and numbers. One in other words may be right and have a "
    "NO, so read these."
)


def answer_questions(run_dir: Path, questions: Path, part: str, values: Mapping[str, Any]) -> None:
    """Answer the questions of a file with a `part` of a run, one of PARTS.

    Writes `answers.jsonl` into the run folder, and prints a table. `values` are parameters of
    notebook 4; what they leave out has its default. Raises StageError if the file or the run cannot
    be used.
    """
    run_dir = Path(run_dir)
    asked_questions = read_questions(questions)
    settings = PARAMETERS["04_evaluate"] | dict(values)
    context: TableContext | None
    if part == COPY:
        context = copying_context(run_dir, settings)
        answers = copied_answers(context, [question.question for question in asked_questions])
    else:
        # PyTorch, which takes seconds to import, is for the models
        from tabletune.evaluation.ask_model import ask_model

        answers, context = ask_model(run_dir, part, asked_questions, settings)
    rules = None
    accepted = [question.expected for question in asked_questions]
    if any(accepted):
        splits, report = load_dataset_of_run(run_dir)
        rules = content_rules(splits, report, settings["item_field"])
        alternatives = answers_to_the_same(splits)
        accepted = [with_alternatives(expected, alternatives) for expected in accepted]
    lines = answer_lines(asked_questions, answers, part, rules, context, accepted)
    archive(run_dir, FILE)
    write_lines(run_dir / FILE, lines)
    print(table_of_answers(lines, disclaimer_of(data_report_of(run_dir), settings["disclaimer"])))
    print(f"\n{run_dir / FILE}")


def data_report_of(run_dir: Path) -> dict[str, Any]:
    """The report of notebook 1; {} where only its index is: copying needs no more."""
    path = run_dir / "dataset" / "report.json"
    return read_json(path, "01_format_dataset") if path.exists() else {}


def answers_to_the_same(splits: Mapping[str, Iterable[dict]]) -> dict[str, set[str]]:
    """For each answer of a table, all answers to the questions that it is an answer to.

    {normalized answer: answers}, as `normalized` writes it.
    """
    answers_of: dict[str, set[str]] = {}  # {question id: answers}
    questions_of: dict[str, set[str]] = {}  # {normalized answer: question ids}
    for split in splits.values():
        for row in rows_with_questions(split):
            answer = reference_of(row)
            answers_of.setdefault(row["group"], set()).add(answer)
            questions_of.setdefault(normalized(answer), set()).add(row["group"])
    return {
        answer: set().union(*(answers_of[question] for question in questions))
        for answer, questions in questions_of.items()
    }


def with_alternatives(expected: list[str], alternatives: Mapping[str, set[str]]) -> list[str]:
    """The expected answers, and those that the table has for the same questions.

    A table may have several answers to one question, as the worked example has several remedies. As
    in notebook 4 each of them is right.
    """
    to_the_same: set[str] = set()
    for text in expected:
        to_the_same |= alternatives.get(normalized(text), set())
    return [*expected, *sorted(to_the_same - set(expected))]


def answer_lines(
    questions: Sequence[AskedQuestion],
    answers: pd.DataFrame,
    part: str,
    rules: ContentRules | None,
    context: TableContext | None,
    accepted: Sequence[list[str]] | None = None,
) -> list[dict]:
    """The lines of `answers.jsonl`.

    `question`, `answer`, `unknown`, `rows`, and `expected` and `right` where known: only these need
    the `rules`. Right is one of the `accepted` answers to a question, without them of the expected.
    """
    lines = []
    accepted = accepted or [question.expected for question in questions]
    for question, right_answers, generated in zip(
        questions, accepted, answers.to_dict("records"), strict=True
    ):
        unknown = bool(generated.get("unknown", False))
        line = {
            "question": question.question,
            "answer": generated["answer"],
            "unknown": unknown,
            "rows": generated.get("rows") or [],
            "model": part,
            "stopped": bool(generated["stopped"]),
        }
        if question.expected and rules is not None:
            line["expected"] = question.expected
            line["right"] = is_expected(generated["answer"], unknown, right_answers, rules, context)
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
        if line["unknown"]:
            cells["rests on"] = "nothing"
        if line["rows"]:
            best = line["rows"][0]
            cells["rests on"] = f"{best['question']} ({best['score']:.2f})"
            if line["unknown"]:
                cells["rests on"] = f"nothing; nearest: {cells['rests on']}"
        wrapped = {name: wrap(cells[name], size) for name, size in sizes.items()}
        height = max(len(column) for column in wrapped.values())
        for i in range(height):
            parts = [
                padded(column[i] if i < len(column) else "", sizes[name])
                for name, column in wrapped.items()
            ]
            if i == 0 and "right" in line:
                parts.append("yes" if line["right"] else "NO")
            text.append("  ".join(parts).rstrip())
    if judged:
        limits = rate_interval(judged) or [0.0, 1.0]
        low, high = (round(limit * len(judged)) for limit in limits)
        text += ["", f"Right: {sum(judged)} of {len(judged)} ({low}–{high})."]
        if not all(judged):
            text.append(READ_THESE)
    return "\n".join(text)


def shown_answer(line: dict) -> str:
    """An answer as the table shows it: without the marks of bold text.

    An answer that was cut says so.
    """
    cut = "" if line["stopped"] else " … [cut after max_new_tokens]"
    return line["answer"].replace("**", "") + cut


def wrap(text: str, size: int) -> list[str]:
    """The lines of a text, none wider than about `size`; its own line breaks stay."""
    lines = []
    for line in text.splitlines():
        # textwrap counts characters, and those of Chinese take two columns each
        of_a_character = max(1.0, width_of(line) / max(1, len(line)))
        lines += textwrap.wrap(line, max(1, int(size / of_a_character))) or []
    return lines or [""]


def padded(text: str, size: int) -> str:
    """A text with spaces after it, up to the width `size`."""
    return text + " " * (size - width_of(text))


def width_of(text: str) -> int:
    """How many columns of a terminal a text takes: two a Chinese character, none an accent."""
    width = 0
    for character in text:
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            continue
        width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return width
