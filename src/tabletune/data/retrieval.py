"""An index over the questions of a table: the rows whose questions are most similar to a text.

TF-IDF of characters, by scikit-learn: it needs no model, reads any script, and finds misspelt
words. It matches letters, not meaning; the model that reads the rows does the rest.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tabletune.data.english import FUNCTION_WORDS, looks_english
from tabletune.data.lookup import (
    LONGEST,
    SHORTEST,
    answer_without_thoughts,
    exact_text,
    familiarity,
    known_words,
    lookup_text,
    most_rows,
    scope_factor,
)

# Thai, Lao, Myanmar and Khmer; Chinese and Japanese: written without spaces between words
WITHOUT_SPACES = (
    ("\u0e00", "\u0eff"),
    ("\u1000", "\u109f"),
    ("\u1780", "\u17ff"),
    ("\u2e80", "\u9fff"),
    ("\uf900", "\ufaff"),
)
NEVER_WRITTEN = "\0\0"  # the only n-gram of an index that finds nothing


@dataclass(frozen=True)
class TableRow:
    """A row of the table as it is looked up and shown in a prompt.

    Rows with one `question_id` ask the same.
    """

    question: str
    answer: str
    question_id: str


@dataclass(frozen=True)
class Hit:
    """A row that was found, and how similar its question is.

    `score` is the cosine of the two times the question's `familiarity` and its `scope_factor`, from
    0 to 1.
    """

    row: TableRow
    score: float


def table_rows(rows: Iterable[dict]) -> list[TableRow]:
    """The rows of a data set of notebook 1 as the index takes them.

    Of a conversation these are the last question, its answer, and its `group`.
    """
    result = []
    for row in rows:
        questions = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
        if questions:
            answer = answer_without_thoughts(row["completion"][0]["content"])
            result.append(TableRow(questions[-1], answer, row["group"]))
    return result


def all_rows(splits: Mapping[str, Iterable[dict]]) -> list[TableRow]:
    """The rows of all splits of a data set of notebook 1, as the index for use has them."""
    rows: list[TableRow] = []
    for split in splits.values():
        rows += table_rows(split)
    return rows


def analyzer_for(texts: Iterable[str]) -> str:
    """The kind of n-grams: "char" for texts mostly in scripts without spaces, else "char_wb"."""
    letters = without = 0
    for text in texts:
        for character in text:
            letters += character.isalpha()
            without += any(first <= character <= last for first, last in WITHOUT_SPACES)
    return "char" if without > letters / 2 else "char_wb"


def function_words_for(analyzer: str, questions: Sequence[str]) -> frozenset[str] | None:
    """The function words of the questions' language: English or, as None, one not known here."""
    if analyzer == "char_wb" and looks_english(questions):
        return FUNCTION_WORDS
    return None


class RowIndex:
    """An index over the questions of rows.

    `vectors` is a sparse matrix [n-grams, rows + questions out of scope], one row of it an n-gram,
    so that a search reads only the n-grams of its question. `out_of_scope` are questions that the
    table is not to answer: they are never found, but lower the scores of what resembles them more
    than any row. `function_words` are those of the questions' language: English or, as None, one
    that is not known here.
    """

    def __init__(
        self,
        rows: Sequence[TableRow],
        analyzer: str,
        vectorizer,
        vectors,
        out_of_scope: Sequence[str] = (),
    ):
        self.rows, self.analyzer = list(rows), analyzer
        self.vectorizer, self.vectors = vectorizer, vectors
        self.out_of_scope = list(out_of_scope)
        self.ids = np.array([row.question_id for row in self.rows])
        questions = [row.question for row in self.rows]
        self.rows_of_text: dict[str, list[int]] = {}  # {exact text: row numbers}
        for number, question in enumerate(questions):
            self.rows_of_text.setdefault(exact_text(question), []).append(number)
        self.words: frozenset[str] | None = None
        self.function_words = function_words_for(analyzer, questions)
        if self.function_words is not None:
            self.words = known_words(questions, self.function_words)

    @classmethod
    def build(
        cls, rows: Sequence[TableRow], analyzer: str = "auto", out_of_scope: Sequence[str] = ()
    ) -> "RowIndex":
        """Make an index over the questions of `rows`. Raises ValueError if there are none."""
        from scipy.sparse import vstack

        if not rows:
            raise ValueError("an index needs at least one row")
        questions = [row.question for row in rows]
        if analyzer == "auto":
            analyzer = analyzer_for(questions)
        vectorizer = new_vectorizer(analyzer, most_rows=most_rows(len(rows)))
        try:
            vectors = vectorizer.fit_transform(questions)  # [rows, n-grams]
        except ValueError:  # no n-gram is left that tells questions apart: nothing can be found
            vectorizer = new_vectorizer(analyzer, [NEVER_WRITTEN])
            vectors = vectorizer.fit_transform(questions)
        if out_of_scope:
            # by the n-grams and weights of the rows alone, so that their scores stay as they are
            vectors = vstack([vectors, vectorizer.transform(out_of_scope)])
        return cls(rows, analyzer, vectorizer, vectors.T.tocsr(), out_of_scope)

    def scores(self, question: str, scope: bool = True) -> np.ndarray:
        """The similarity of a question with that of every row: an array [rows], from 0 to 1.

        Without `scope`, questions out of scope do not lower it.
        """
        result = self.vectorizer.transform([question]) @ self.vectors  # [1, vectors]
        similarity = np.zeros(self.vectors.shape[1])
        similarity[result.indices] = result.data
        scores = similarity[: len(self.rows)]
        out_of_scope = similarity[len(self.rows) :]
        factor = familiarity(question, self.words)
        if scope:
            factor *= scope_factor(scores.max(), out_of_scope.max(initial=0.0))
        return scores * factor

    def search(self, question: str, k: int, exclude_question_id: str | None = None) -> list[Hit]:
        """The k rows with the most similar questions, best first; none of `exclude_question_id`."""
        excluded = self.ids == exclude_question_id if exclude_question_id is not None else None
        same = self.rows_of_text.get(exact_text(question), [])
        return self.best(self.scores(question), k, excluded, same)

    def search_many(self, questions: Iterable[str], k: int) -> list[list[Hit]]:
        """`search` for many questions."""
        return [self.search(question, k) for question in questions]

    def best(
        self,
        scores: np.ndarray,
        k: int,
        excluded: np.ndarray | None = None,
        preferred: Sequence[int] = (),
    ) -> list[Hit]:
        """The k rows with the highest scores, best first; none that is `excluded` [rows].

        Of equal ones those whose numbers are `preferred` come first, then the earlier.
        """
        # PlainIndex adds in another order: what differs by rounding is equal
        ranks = np.round(scores, 6)
        ranks[list(preferred)] += 5e-7
        if excluded is not None:
            ranks[excluded] = -1
        if k < len(ranks):
            limit = np.partition(ranks, -k)[-k] if k else np.inf
            candidates = np.flatnonzero(ranks >= limit)
        else:
            candidates = np.arange(len(ranks))
        order = candidates[np.argsort(-ranks[candidates], kind="stable")][:k]
        return [Hit(self.rows[i], float(scores[i])) for i in order if ranks[i] >= 0]

    def save(self, folder: Path) -> None:
        """Write rows.jsonl, terms.json and vectors.npz into a folder.

        No pickle: what is read runs no code.
        """
        from scipy.sparse import save_npz

        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
            for row in self.rows:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        names = self.vectorizer.get_feature_names_out().tolist()
        terms = {
            "analyzer": self.analyzer,
            "ngrams": names,
            "idf": self.vectorizer.idf_.tolist(),
            "out_of_scope": self.out_of_scope,
        }
        (folder / "terms.json").write_text(json.dumps(terms, ensure_ascii=False), encoding="utf-8")
        save_npz(folder / "vectors.npz", self.vectors)

    @classmethod
    def load(cls, folder: Path) -> "RowIndex":
        """Read an index that `save` wrote.

        Raises OSError, ValueError, KeyError or TypeError if it is not complete.
        """
        from scipy.sparse import load_npz

        with open(folder / "rows.jsonl", encoding="utf-8") as file:
            rows = [TableRow(**json.loads(line)) for line in file]
        terms = json.loads((folder / "terms.json").read_text(encoding="utf-8"))
        vectorizer = new_vectorizer(terms["analyzer"], terms["ngrams"])
        vectorizer.idf_ = np.array(terms["idf"])
        try:
            vectors = load_npz(folder / "vectors.npz").tocsr()
        except (EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(f"vectors.npz: {error}") from None
        # an index of an earlier version has no questions out of scope
        out_of_scope = terms.get("out_of_scope", [])
        questions = len(rows) + len(out_of_scope)
        # files of two indexes, or one that was cut between two lines
        if not rows or vectors.shape != (len(terms["ngrams"]), questions):
            raise ValueError(f"vectors.npz does not belong to the {len(rows)} rows of rows.jsonl")
        return cls(rows, terms["analyzer"], vectorizer, vectors, out_of_scope)


def new_vectorizer(
    analyzer: str, vocabulary: list[str] | None = None, most_rows: int | float = 1.0
):
    """scikit-learn's TF-IDF of n-grams, as `lookup.PlainIndex` computes it, too."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        preprocessor=lookup_text,
        analyzer=analyzer,
        ngram_range=(SHORTEST, LONGEST),
        sublinear_tf=True,
        max_df=most_rows,
        vocabulary=vocabulary,
    )
