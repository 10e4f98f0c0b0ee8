"""Which question a row asks, and which split it is in.

A question is its words and some signs (`question_key`). All rows of one question are in one split,
by a hash of these and the seed. The same question in other words is another question here. Rows of
a table with splits of its own stay in them, and `report.json` counts those that are asked in
training, too.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from tabletune.data.sources import split_of
from tabletune.errors import StageError

SPLITS = ("train", "validation", "test")
PUNCTUATION = {i: " " for i in range(0x20000) if unicodedata.category(chr(i)).startswith("P")}
# other ways to write a sign
SAME_SIGNS = str.maketrans("−＋－＊／％＃＝×∗÷∕", "-+-*/%#=**//")
DASH_AS_MINUS = re.compile(r"(?<=\d)(\s*)[–—](?=\s*\d)|(?<![\w–—])[–—](?=\d)")
# Marks that change what is asked, as in 30 - 5 and 30 / 5. They stand between numbers or letters,
# before a number, or after one. A hyphen in a word, a dash in a sentence and the stars around a
# bold word are marks like any other.
OPERAND = r"(?:[\d(.]|-\d|[^\W\d_]\b)"
SIGNS = re.compile(
    r"(?P<between>(?<=\d)\s*[-*/:^]\s*(?=-?[(\[.]?\d)"  # 30-5, 30 / 5
    rf"|(?:(?<=[\d)])|(?<=\b[^\W\d_])|(?<=\d[^\W\d_]))\s+[-*/]\s+(?={OPERAND})"  # a - b, 2x / 1
    r"|(?<=\b[^\W\d_])[*/](?=[^\W\d_]\b))"  # a*b
    r"|(?<![\w)\]*-])-(?=[.,]?\d|[^\W\d_]\b)"  # -5, -x
    r"|(?<=\d)\s?%{1,2}"  # 5%
    r"|(?<=[^\W\d_])#(?!\w)"  # C#
    r"|(?<=\S )[*%#&@\\]{1,3}(?!\S)"  # a sign on its own
)
FIRST_PRIVATE = 0xE100


def question_key(texts: Iterable[str]) -> str:
    """What makes two rows ask the same.

    The words of their questions, letter case and punctuation aside. Signs stay where SIGNS finds
    them: 30 - 5 and 30 / 5, 5% and 5, -5 and 5, C# and C are different questions. All other marks
    count for nothing, also where they mean something: `cd -` and `cd ..`, / and //, != and =, "*/6"
    and "6" in a line of cron make no different questions.
    """
    keys = []
    for text in texts:
        normalized = text.casefold().translate(SAME_SIGNS).replace("‰", "%%")
        normalized = DASH_AS_MINUS.sub("-", normalized)
        normalized = SIGNS.sub(_hide_signs, normalized).translate(PUNCTUATION)
        normalized = " ".join(_show_signs(normalized).split())
        keys.append(normalized or text)
    return " ".join(keys)


def _hide_signs(match: re.Match[str]) -> str:
    """Signs as characters for private use, which are no punctuation."""
    hidden = "".join(chr(FIRST_PRIVATE + ord(sign)) for sign in match[0].strip())
    return f" {hidden} " if match["between"] else hidden


def _show_signs(text: str) -> str:
    return "".join(
        chr(ord(c) - FIRST_PRIVATE) if FIRST_PRIVATE <= ord(c) < FIRST_PRIVATE + 0x80 else c
        for c in text
    )


def question_id(key: str) -> str:
    """A short name for a question, the same for all rows that ask it."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def split_position(key: str, seed: int) -> float:
    """Where a question stands between 0 and 1, by a hash.

    Rows added, removed or moved elsewhere do not move it.
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(
    positions: Sequence[float],
    validation_fraction: float,
    test_fraction: float,
    official: Sequence[str] | None = None,
) -> np.ndarray:
    """The split of each row, "train", "validation" or "test", as an array of names.

    It follows from the positions of their questions: with fractions of 0.1 a question at 0.05 is in
    the test split, one at 0.15 in validation, one at 0.7 in training.

    `official` has the split that a row must stay in, or ""; the held-out splits that no row has
    officially come from the rows for training, "" or "train". Where the fractions leave a split
    empty, as in a small table or with a fraction of 0, it gets one question of the largest split,
    and the others stay as they are. Raises StageError if there are too few different questions for
    that.
    """
    positions = np.array(positions)  # [rows]
    official_splits = np.array(
        official if official is not None else [""] * len(positions), dtype="U10"
    )
    is_free = np.isin(official_splits, ["", "train"])
    names = [name for name in ("test", "validation") if name not in official_splits] + ["train"]
    fractions = {"test": test_fraction, "validation": validation_fraction}
    # positions below the first bound are of the first name, and so on; the rest is for training
    bounds = np.cumsum([fractions[name] for name in names[:-1]])
    questions = np.unique(positions[is_free])  # sorted
    if len(questions) < len(names):
        raise StageError(
            f"Only {len(questions)} different questions are left; {', '.join(names)} need at least "
            f"{len(names)}. If one prompt has many answers in this table, set split_by: row."
        )
    # [questions]: the place of each one's split in names
    places = np.asarray(np.digitize(questions, bounds))
    for place in range(len(names)):
        if place not in places:
            largest = np.bincount(places).argmax()
            # its question with the lowest position
            places[np.flatnonzero(places == largest)[0]] = place
    of_rows = places[np.searchsorted(questions, positions[is_free])]
    splits = official_splits.copy()
    splits[is_free] = np.array(names)[of_rows]
    return splits


def limit_training(split: np.ndarray, positions: Sequence[float], train_rows: float) -> np.ndarray:
    """The splits of the rows with fewer questions for training: the rows of the others get "".

    `train_rows` is a share of the training questions up to 1, or above 1 how many. Those with the
    lowest positions are taken, so that a smaller set is part of every larger one, and the held-out
    splits stay as they are. Raises StageError if there are not so many, or if the number is not
    whole.
    """
    positions = np.array(positions)  # [rows]
    questions = np.unique(positions[split == "train"])  # sorted
    if train_rows > len(questions) or (train_rows > 1 and train_rows % 1):
        raise StageError(
            f"train_rows={train_rows}: use a share up to 1, or a whole number up to "
            f"{len(questions)}, the training questions of this table."
        )
    number = int(train_rows)
    if train_rows <= 1:
        number = max(1, round(train_rows * len(questions)))
    is_left_out = (split == "train") & ~np.isin(positions, questions[:number])
    return np.where(is_left_out, "", split)


def split_of_cell(value: str, column: str) -> str:
    """The split that a cell of the column of splits names. Raises StageError if it names none."""
    split = split_of(value)
    if not split:
        raise StageError(
            f"split_column={column!r}: a row has {value[:60]!r} there, which is none of train, "
            "validation, test."
        )
    return split
