"""Other wordings of a question, by rules: what people type who do not ask as the table does.

There are two kinds of rules, those of training and those of evaluation, so that a model is not
measured on what it was taught: their English phrases and their typing errors differ. Lower case,
missing punctuation and the bare subject are common to both.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence

from tabletune.data.english import FUNCTION_WORDS, looks_english
from tabletune.data.lookup import lookup_text
from tabletune.data.retrieval import TableRow

AROUND = {  # English words around a question
    "training": (
        "Hello, {question}",
        "Hi! {question} Thanks.",
        "Please tell me: {question}",
        "I would like to know: {question}",
        "{question} Can you help?",
        "Hey there. {question}",
    ),
    "evaluation": (
        "Good morning! {question}",
        "Sorry to bother you, but {question}",
        "Quick question: {question}",
        "{question} Many thanks in advance!",
        "Dear team, {question}",
    ),
}
ABOUT = {  # English words around the subject of a question
    "training": (
        "{subject}",
        "{subject}?",
        "What about {subject}?",
        "I need help with {subject}",
        "Tell me about {subject}.",
        "Do you know anything on {subject}?",
        "and {subject}?",
        "How is it with {subject}?",
    ),
    "evaluation": (
        "{subject}, any idea?",
        "What can you say on {subject}?",
        "A question about {subject}, please",
        "Looking for advice: {subject}",
        "what do I do in case of {subject}",
    ),
}
LEAST_SHARE = 0.6  # of the questions that begin, or end, with the words of a template
# questions of one answer; an answer to more is a label, such as "yes" or "positive"
MOST_WORDINGS = 12
# points that belong to a word: of ".5" and ".NET", of "../a" and "./a", and ".." as in "cd .."
POINTS_BEFORE = re.compile(r"\.(?=\w)|\.\.?(?=/)|\.\.(?=\s|$)")
POINTS_AFTER = re.compile(r"(?<![^\s/])\.\.$")


def template_words(questions: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that most questions of a table begin and end with.

    They are those of its question template: (first words, last words).
    """
    words = [question.split() for question in questions]
    return shared_start(words), shared_start([line[::-1] for line in words])[::-1]


def shared_start(lines: list[list[str]]) -> list[str]:
    """The longest start, a list of words, that LEAST_SHARE of the lines have in common."""
    start: list[str] = []
    while lines:
        longer = Counter(
            line[len(start)]
            for line in lines
            if len(line) > len(start) and line[: len(start)] == start
        )
        if not longer:
            break
        word, count = longer.most_common(1)[0]
        if count < LEAST_SHARE * len(lines) or count < 3:
            break
        start.append(word)
    return start


def subject_of(question: str, prefix: list[str], suffix: list[str]) -> str:
    """A question without the template's words around it.

    Without a template, it is left without its English function words.
    """
    words = question.split()
    if prefix and words[: len(prefix)] == prefix:
        words = words[len(prefix) :]
    if suffix and words[-len(suffix) :] == suffix:
        words = words[: -len(suffix)]
    if len(words) == len(question.split()):
        words = [word for word in words if lookup_text(word) not in FUNCTION_WORDS]
    return without_marks(" ".join(words), " .,;:!?¿¡。？！") or question


class Rewording:
    """Rewords the questions of a table by the rules of one `use`, "training" or "evaluation".

    `questions` are those of the table, which tell its template and whether it is in English.
    """

    def __init__(self, questions: Sequence[str], use: str):
        self.use = use
        self.prefix, self.suffix = template_words(questions)
        self.english = looks_english(questions)

    def __call__(self, question: str, rng: random.Random) -> str:
        """Another wording of a question."""
        # the question's subject, such as "dry cough" of "What helps against a dry cough?"
        subject = subject_of(question, self.prefix, self.suffix)
        if self.english:
            pattern = rng.choice(AROUND[self.use] if rng.random() < 0.35 else ABOUT[self.use])
            if "{subject}" in pattern and rng.random() < 0.7:
                subject = subject.lower()
            text = pattern.replace("{subject}", subject).replace("{question}", question)
        else:
            text = rng.choice([question, subject])
        if rng.random() < 0.4:
            text = text.lower()
        if rng.random() < 0.4:
            text = without_punctuation(text)
        # a rewording that changed nothing gets a typing error, if a word has letters enough
        if rng.random() < 0.45 or text == question:
            text = misspell(text, rng, self.use)
        return text


def without_punctuation(text: str) -> str:
    """A text without the punctuation at the ends of its words.

    Points that belong to a word stay, as in ".5 mg".
    """
    words = [without_marks(word, ".,;:!?¿¡…\"'()") for word in text.split()]
    return " ".join(words).strip() or text


def without_marks(text: str, marks: str) -> str:
    """A text without the marks, such as ",;.", at its ends.

    Points that belong to a word stay: ".5 mg", "cd ..".
    """
    text = text.strip(marks.replace(".", ""))
    if not POINTS_BEFORE.match(text):
        text = text.lstrip(marks)
    if not POINTS_AFTER.search(text):
        text = text.rstrip(marks)
    return text


def misspell(text: str, rng: random.Random, use: str = "evaluation") -> str:
    """A text with a typing error, or two in different words.

    Short words and the first letters of words stay. Training swaps two letters or doubles one;
    evaluation leaves one out or takes another.
    """
    words = text.split()
    long = [i for i, word in enumerate(words) if len(re.sub(r"\W|\d", "", word)) >= 4]
    for i in rng.sample(long, min(len(long), rng.choice([1, 1, 2]))):
        words[i] = misspell_word(words[i], rng, use)
    return " ".join(words)


def misspell_word(word: str, rng: random.Random, use: str) -> str:
    """A word with one typing error."""
    places = [i for i in range(1, len(word) - 1) if word[i].isalpha() and word[i + 1].isalpha()]
    if not places:
        return word
    i = rng.choice(places)
    first = rng.random() < 0.5
    if use == "training" and first and word[i] != word[i + 1]:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if use == "training":
        return word[: i + 1] + word[i] + word[i + 1 :]
    if first:
        return word[:i] + word[i + 1 :]
    letters = [letter for letter in word.lower() if letter.isalpha() and letter != word[i].lower()]
    return word[:i] + rng.choice(letters or ["e"]) + word[i + 1 :]


def same_answer(rows: Sequence[TableRow]) -> dict[str, list[TableRow]]:
    """The rows of each answer that several questions have, {answer as it is compared: rows}.

    Such questions are natural paraphrases of each other. An answer to more than MOST_WORDINGS
    questions is a label, such as "yes", and left out.
    """
    rows_of: dict[str, list[TableRow]] = {}
    for row in rows:
        rows_of.setdefault(lookup_text(row.answer), []).append(row)
    paraphrases = {}
    for answer, group in rows_of.items():
        questions = {row.question_id for row in group}
        if 2 <= len(questions) <= MOST_WORDINGS:
            paraphrases[answer] = group
    return paraphrases
