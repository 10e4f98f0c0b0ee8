"""Find rows by their questions, and put them into a prompt: with the standard library alone.

Notebook 7 copies this file into the exported app as it is, so that the app finds the same rows and
asks in the same words as the series. `retrieval.RowIndex` is the fast version of `PlainIndex`, made
of scikit-learn's `TfidfVectorizer`; a test compares the two.
"""

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence

SHORTEST, LONGEST = 2, 5  # characters in an n-gram
MOST_CONTEXT_ROWS = 40  # that are looked at for one prompt
FREE_WORDS = 3  # words that no question of the table has, before they lower the scores
PENALTY = 0.25  # of each such word after them
OUT_OF_SCOPE = 0.1  # factor of all scores if a question out of scope is more similar than any row
SENTENCE = 3  # words; fewer may end an answer by chance
PUNCTUATION = {i: " " for i in range(0x20000) if unicodedata.category(chr(i)).startswith("P")}
CONTEXT_TEMPLATE = (
    "Rows of the table:\n\n{rows}\n\nAnswer this, from the rows if they have it:\n{question}"
)


def lookup_text(text: str) -> str:
    """A text as it is looked up: lower case, with spaces for punctuation.

    The text itself if it is all punctuation.
    """
    words = " ".join(text.casefold().translate(PUNCTUATION).split())
    return words or " ".join(text.split())


def exact_text(text: str) -> str:
    """A text with its punctuation: it tells "30 - 5" from "30 / 5", which look up the same."""
    return " ".join(text.casefold().split())


def answer_without_thoughts(answer: str) -> str:
    """An answer as it is shown: without the thoughts before it."""
    return answer.rpartition("</think>")[2].strip()


def char_ngrams(text: str, analyzer: str = "char_wb") -> list[str]:
    """The n-grams of a lookup text, as scikit-learn's analyzers `char_wb` and `char` cut them.

    "char_wb" stays inside words, each with a space on both sides; "char" is for languages that
    write no spaces.
    """
    parts = [f" {word} " for word in text.split()] if analyzer == "char_wb" else [text]
    ngrams = []
    for part in parts:
        for length in range(SHORTEST, LONGEST + 1):
            if length > len(part):
                break
            ngrams += [part[start : start + length] for start in range(len(part) - length + 1)]
    return ngrams


def most_rows(rows: int) -> int:
    """In how many of so many rows an n-gram may be.

    What most questions share, such as a template, says nothing.
    """
    return max(10, rows // 2)


def known_words(questions: Iterable[str], function_words: Iterable[str]) -> frozenset[str]:
    """The words of a table's questions, and those that say nothing about a subject."""
    words = set(function_words)
    for question in questions:
        words.update(lookup_text(question).split())
    return frozenset(words)


def familiarity(question: str, words: Container[str] | None) -> float:
    """A factor from 0 to 1 for the scores of a question; `words` are those that the table knows.

    N-grams that no row has do not count in a cosine, so a long story that shares two words with a
    row would look as similar as a short question with these words. Each unknown word after
    FREE_WORDS therefore lowers the scores. Without `words` the factor is 1.
    """
    if words is None:
        return 1.0
    unknown = sum(word not in words for word in lookup_text(question).split())
    return 1 / (1 + PENALTY * max(0, unknown - FREE_WORDS))


def scope_factor(row_score: float, out_of_scope_score: float) -> float:
    """A factor for the scores of a question: OUT_OF_SCOPE where the table is not to answer it.

    That is so if it is more similar to a question out of scope than to any row; else it is 1.
    """
    return OUT_OF_SCOPE if round(out_of_scope_score, 6) > round(row_score, 6) else 1.0


class PlainIndex:
    """An index over the questions of rows, dicts with `question` and `answer`.

    Its scores are cosine similarities of TF-IDF vectors of n-grams, times `familiarity`.
    `function_words` are those of the table's language; None where they are not known.
    `out_of_scope` are questions that the table is not to answer.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        analyzer: str = "char_wb",
        function_words: Sequence[str] | None = None,
        out_of_scope: Sequence[str] = (),
    ):
        self.rows, self.analyzer = list(rows), analyzer
        self.words: frozenset[str] | None = None
        if function_words is not None:
            self.words = known_words((row["question"] for row in self.rows), function_words)
        self.exact_texts = [exact_text(row["question"]) for row in self.rows]
        counts = [Counter(char_ngrams(lookup_text(row["question"]), analyzer)) for row in self.rows]
        in_rows: Counter[str] = Counter()  # {n-gram: how many questions have it}
        for count in counts:
            in_rows.update(count.keys())
        self.idf = {
            ngram: math.log((1 + len(counts)) / (1 + rows)) + 1
            for ngram, rows in in_rows.items()
            if rows <= most_rows(len(counts))
        }
        # the questions out of scope are numbered after the rows
        counts += [Counter(char_ngrams(lookup_text(text), analyzer)) for text in out_of_scope]
        self.size = len(counts)
        self.postings = defaultdict(list)  # {n-gram: [(number of the question, weight), …]}
        for number, count in enumerate(counts):
            for ngram, weight in self.weights(count).items():
                self.postings[ngram].append((number, weight))

    def weights(self, count: Counter) -> dict[str, float]:
        """The weight of each n-gram that the index has: (1 + log of its count) times its IDF.

        Together they have length 1.
        """
        weights = {
            n: (1 + math.log(times)) * self.idf[n] for n, times in count.items() if n in self.idf
        }
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {ngram: weight / length for ngram, weight in weights.items() if length}

    def search(self, question: str, k: int) -> list[tuple[dict, float]]:
        """The k rows with the most similar questions, best first, with scores from 0 to 1."""
        scores = [0.0] * self.size
        for ngram, weight in self.weights(
            Counter(char_ngrams(lookup_text(question), self.analyzer))
        ).items():
            for number, other in self.postings[ngram]:
                scores[number] += weight * other
        scores, out_of_scope = scores[: len(self.rows)], scores[len(self.rows) :]
        same = exact_text(question)

        def rank(number: int) -> tuple[float, bool]:
            return -round(scores[number], 6), self.exact_texts[number] != same

        # rounded scores first, then the very same text, then the order of the rows
        best = sorted(range(len(scores)), key=rank)[:k]
        factor = familiarity(question, self.words)
        factor *= scope_factor(max(scores, default=0.0), max(out_of_scope, default=0.0))
        return [(self.rows[number], factor * scores[number]) for number in best]


def context_message(template: str, rows: Sequence[dict], question: str) -> str:
    """The text of the user's turn: the template with the rows and the question.

    `rows` are dicts of `question` and `answer`.
    """
    texts = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    # the texts may have braces of their own, so the template is cut at its fields, not formatted
    before, _, after = template.partition("{question}")
    return before.replace("{rows}", texts) + question + after.replace("{rows}", texts)


def is_unknown(answer: str, unknown_answer: str) -> bool:
    """Whether an answer says that the table has nothing.

    Letter case, punctuation and white space do not count. It says so if it begins with
    `unknown_answer`. An answer that ends with it contradicts itself, and counts as well, where
    `unknown_answer` is more than the word or two that may end any answer.
    """
    if not unknown_answer:
        return False
    text, nothing = lookup_text(answer), lookup_text(unknown_answer)
    if text.startswith(nothing):
        after = text[len(nothing) : len(nothing) + 1]
        # not in the middle of a word; "Lo" are letters of scripts that may have no spaces
        if after in ("", " ") or unicodedata.category(after) == "Lo":
            return True
    return len(nothing.split()) >= SENTENCE and text.endswith(f" {nothing}")


def is_refused(scores: Sequence[float], unknown_answer: str, unknown_threshold: float) -> bool:
    """Whether the lookup alone says that the table has nothing.

    It does if no row is as similar as `unknown_threshold`; then the model is not asked.
    """
    return bool(unknown_answer) and max(scores, default=0.0) < unknown_threshold


def choose_rows(rows: Sequence[dict], context_rows: int, context_characters: int) -> list[int]:
    """Which of the rows, best first, go into a prompt: a list of their places.

    `context_rows` of them, and more as long as all together have at most `context_characters`: of
    short rows more fit, and the right one is more often among them. An answer is shown once, with
    the best of its questions.
    """
    places: list[int] = []
    characters = 0
    answers: set[str] = set()
    for place, row in enumerate(rows):
        answer = lookup_text(row["answer"])
        if answer in answers:
            continue
        characters += len(row["question"]) + len(row["answer"])
        if len(places) >= context_rows and characters > context_characters:
            break
        answers.add(answer)
        places.append(place)
    return places


def final_answer(
    answer: str,
    rows: Sequence[dict],
    unknown_answer: str,
    unknown_threshold: float,
    certain_threshold: float,
) -> tuple[str, bool]:
    """What is said in the end, and whether that is "the table has nothing": (answer, unknown).

    `rows` were in the prompt, best first, each with its `score`. If the model says "nothing" to a
    question that the best row has nearly word for word, the answer is that row's. If it answers
    from a row that is less similar to the question than `unknown_threshold`, the table has nothing.
    """
    if is_unknown(answer, unknown_answer):
        if rows and rows[0]["score"] >= certain_threshold and not is_tied(rows):
            return rows[0]["answer"], False
        return answer, True
    if rows and is_refused([source_row(answer, rows)["score"]], unknown_answer, unknown_threshold):
        return unknown_answer, True
    return answer, False


def copied_answer(
    row: dict, score: float, unknown_answer: str, unknown_threshold: float
) -> tuple[str, bool, list[dict]]:
    """What is said without a model: (answer, whether that is "the table has nothing", rows).

    It is the answer of the most similar `row`, unless its `score` is below `unknown_threshold` or
    it has nothing in common with the question. Then it is `unknown_answer`, which may be empty.
    `rows` has that row with its score; none if it has nothing in common with the question.
    """
    if round(score, 6) <= 0:
        return unknown_answer, True, []
    rows = [{"question": row["question"], "answer": row["answer"], "score": round(score, 4)}]
    if is_refused([score], unknown_answer, unknown_threshold):
        return unknown_answer, True, rows
    return row["answer"], is_unknown(row["answer"], unknown_answer), rows


def is_tied(rows: Sequence[dict]) -> bool:
    """Whether another question is as similar as that of the best row."""
    best = rows[0]
    best_question = exact_text(best["question"])
    for row in rows[1:]:
        if row["score"] == best["score"] and exact_text(row["question"]) != best_question:
            return True
    return False


def source_row(answer: str, rows: Sequence[dict]) -> dict:
    """The row that an answer was taken from: the one whose answer has most words in common with it.

    Of equal ones the first.
    """
    words = set(lookup_text(answer).split())

    def common_share(row: dict) -> float:
        of_row = set(lookup_text(row["answer"]).split())
        return len(words & of_row) / max(1, len(words | of_row))

    return max(rows, key=common_share)
