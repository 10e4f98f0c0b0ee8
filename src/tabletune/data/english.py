"""Whether questions are in English, and which words of English say nothing about their subject."""

from collections.abc import Sequence
from importlib import resources

from tabletune.data.lookup import lookup_text

_TEXT = (resources.files("tabletune") / "resources/texts/english_words.txt").read_text("utf-8")
COMMON_ENGLISH = frozenset(_TEXT.splitlines()[0].split())  # by which English is recognized
FUNCTION_WORDS = frozenset(_TEXT.split())  # say nothing about the subject of a question


def looks_english(questions: Sequence[str]) -> bool:
    """Whether most of the questions have one of the commonest English words."""
    english = 0
    for question in questions:
        english += bool(COMMON_ENGLISH & set(lookup_text(question).split()))
    return english > len(questions) / 2
