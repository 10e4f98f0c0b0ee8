"""Which question is in which split."""

import hashlib
import unicodedata

import numpy as np

from tabletune.errors import StageError

PUNCTUATION = {i: " " for i in range(0x20000) if unicodedata.category(chr(i)).startswith("P")}


def question_key(texts):
    """What makes two rows ask the same: the words of their questions, letter case and all punctuation aside."""
    plain = [" ".join(text.casefold().translate(PUNCTUATION).split()) for text in texts]
    return " ".join(key or text for key, text in zip(plain, texts, strict=True))


def place(key, seed):
    """Where a question stands between 0 and 1, by a hash: rows added, removed or moved elsewhere do not move it."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(places, validation_fraction, test_fraction, official=None):
    """The split of each row, "train", "validation" or "test", from the places of their questions: an array of names.

    `official` has the split that a row must stay in, or ""; of the rows for training, "" or "train", come the held-out
    splits that no row has officially. Where the fractions leave one empty, as in a small table, the questions with the
    lowest places fill it. Raises StageError if there are too few different questions for that.
    """
    places = np.array(places)
    official = np.array(official if official is not None else [""] * len(places), dtype="U10")
    free = np.isin(official, ["", "train"])
    names = [name for name in ("test", "validation") if name not in official] + ["train"]
    fractions = {"test": test_fraction, "validation": validation_fraction}
    bounds, lowest = np.cumsum([fractions[name] for name in names[:-1]]), np.unique(places[free])
    if len(lowest) < len(names):
        raise StageError(
            f"Only {len(lowest)} different questions are left; {', '.join(names)} need at least {len(names)}."
        )
    if len(np.unique(np.digitize(lowest, bounds))) < len(names):
        bounds = lowest[1 : len(names)]
    return np.where(free, np.array(names)[np.digitize(places, bounds)], official)
