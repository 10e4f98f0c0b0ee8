"""Questions that a table is not to answer, such as emergencies."""

from pathlib import Path

from tabletune.data.lookup import exact_text
from tabletune.data.safety_rows import emergency_questions
from tabletune.errors import StageError

EMERGENCIES = "emergencies"  # the list that comes with the package


def read_out_of_scope(source: str, question_template: str) -> list[str]:
    """Questions that the table is not to answer, each once; [] without a `source`.

    `source` is "emergencies", for the package's own questions, also in the words of
    `question_template`, or a text file with a question a line. Raises StageError if it is neither.
    """
    if not source:
        return []
    if source == EMERGENCIES:
        lines = emergency_questions(question_template)
    else:
        lines = lines_of_text(Path(source).expanduser())
    questions = {exact_text(line): line.strip() for line in lines if line.strip()}
    if not questions:
        raise StageError(
            f'out_of_scope={source!r} has no question. Fill it, or set out_of_scope to "".'
        )
    return list(questions.values())


def lines_of_text(path: Path) -> list[str]:
    """The lines of a text file in UTF-8. Raises StageError if it is none."""
    if not path.is_file():
        raise StageError(
            f"out_of_scope={str(path)!r} is neither {EMERGENCIES!r} nor a text file with a "
            "question a line."
        )
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise StageError(f"out_of_scope={str(path)!r} is no text in UTF-8.") from None
