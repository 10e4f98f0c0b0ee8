"""The questions of a reader's file, for `make ask`: a text file, .csv, .tsv, .json or .jsonl."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabletune.data.csv_files import read_small_csv
from tabletune.data.text_encoding import choose_encoding
from tabletune.data.vocabulary import WORDS
from tabletune.errors import StageError

NO_TEXTS = (".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".gz", ".zip")
# what a column may be called, in lower case, the first that is there counts; then as in a table
QUESTION_NAMES = (
    "question",
    "asked",
    *WORDS["columns"]["question"],
    *WORDS["other_columns"]["question"],
)
EXPECTED_NAMES = (
    "expected",
    "expected_answer",
    "answer",
    "reference",
    *WORDS["columns"]["answer"],
    *WORDS["other_columns"]["answer"],
)


@dataclass(frozen=True)
class AskedQuestion:
    """A question of the reader's, and the answers that are right; none if the file does not say."""

    question: str
    expected: list[str] = field(default_factory=list)


def read_questions(path: Path) -> list[AskedQuestion]:
    """The questions of a .csv, .tsv, .json or .jsonl file, or of a text file with one a line.

    A table has a column `question` (or another of QUESTION_NAMES), and perhaps one of
    EXPECTED_NAMES, a text or a list of texts. Raises StageError if the file cannot be read, or has
    no questions.
    """
    if not path.is_file():
        raise StageError(
            f"QUESTIONS={path} cannot be read: there is no such file. It needs one question a line."
        )
    kind = path.suffix.lower()
    if kind in NO_TEXTS:
        raise StageError(f"QUESTIONS={path} cannot be read: save it as .csv or .jsonl.")
    name = f"QUESTIONS={path}"
    try:
        if kind in (".csv", ".tsv"):
            questions = questions_of_rows(read_small_csv(path, name), path)
        else:
            encoding, _ = choose_encoding(path, name, "auto")
            questions = questions_of_text(path.read_text(encoding=encoding), path)
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"{name} cannot be read: {error}.") from None
    if not questions:
        raise StageError(f"{name} has no questions.")
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
        question = question_of_row(row, path)
        if question.question:
            questions.append(question)
    return questions


def question_of_row(row: dict[Any, Any], path: Path) -> AskedQuestion:
    """The question of a row, "" if its cell is empty, and the answers that are right.

    Raises StageError if there is no column of questions, or if what is in it is no text.
    """
    # columns are called Question, question or " question"
    cells = {str(name).strip().casefold(): value for name, value in row.items()}
    names = [name for name in QUESTION_NAMES if name in cells]
    if not names:
        columns = ", ".join(map(str, row)) or "none"
        advice = "Rename one."
        if len(row) == 1:
            advice = "Rename it. If it is a question, put a line above it that says: question"
        raise StageError(
            f"QUESTIONS={path} has no column question. Its columns: {columns}. {advice}"
        )
    value = cells[names[0]]
    if isinstance(value, list | dict):
        raise StageError(f"QUESTIONS={path}: {names[0]} must be a text, not {str(value)[:60]}.")
    if names[0] == "instruction" and cells.get("input"):
        raise StageError(
            f"QUESTIONS={path} has both an instruction and an input: write each question as one "
            "text into a column question."
        )
    expected = next((cells[name] for name in EXPECTED_NAMES if name in cells), None)
    expected = expected if isinstance(expected, list) else [expected]
    texts = [str(text).strip() for text in expected if text is not None]
    question = "" if value is None else str(value).strip()
    return AskedQuestion(question, [text for text in texts if text])
