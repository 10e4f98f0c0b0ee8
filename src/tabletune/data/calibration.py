"""When the lookup alone decides: two thresholds for its score.

They come from questions that training does not ask. Questions with an answer are rewordings that
are held back (rules of training, other seeds). Questions without an answer are the table's own,
looked up without their rows and without rows of the same answer. Paraphrases that share no word
with their row score no better than questions without an answer, so they do not move the threshold:
to refuse them is better than to guess.

The thresholds are those of the similarity alone. Questions out of scope do not move them: in a
small table, one or two rewordings that happen to resemble an emergency would otherwise pull the
threshold down to a tenth, and hardly any question would be refused.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tabletune.data.lookup import lookup_text
from tabletune.data.retrieval import RowIndex
from tabletune.data.rewording import Rewording

MOST_QUESTIONS = 1000  # that are looked up
REFUSED_SHARE = 0.02  # of the held-back rewordings score lower than the quantile that is taken
MARGIN = 0.65  # people reword more freely than rules: the threshold is lower than that quantile
MOST_THRESHOLD = 0.35  # where the rules change little, as in languages that they do not know
CERTAIN_SHARE = 0.99  # of the questions without an answer score lower than what counts as certain
LEAST_CERTAIN = 0.7
NEVER_CERTAIN = 1.01  # no score is as high


@dataclass(frozen=True)
class Calibration:
    """The two thresholds, and what the lookup makes of the questions that they were taken from.

    The scores are those of use: lower where a question resembles one out of scope.
    """

    unknown_threshold: float
    certain_threshold: float
    answerable_scores: list[float]
    other_scores: list[float]


def calibrate(index: RowIndex, seed: int) -> Calibration:
    """The thresholds for an index; the same for the same rows and seed."""
    generator = random.Random(f"calibration {seed}")
    places = list(range(len(index.rows)))
    if len(places) > MOST_QUESTIONS:
        places = sorted(generator.sample(places, MOST_QUESTIONS))
    reword = Rewording([row.question for row in index.rows], "training")
    answers = np.array([lookup_text(row.answer) for row in index.rows])  # [rows]
    similarities: dict[str, list[float]] = {"answerable": [], "others": []}
    scores: dict[str, list[float]] = {"answerable": [], "others": []}

    def look_up(kind: str, question: str, excluded: np.ndarray | None) -> None:
        similarities[kind].append(score_of(index, question, excluded, scope=False))
        scores[kind].append(score_of(index, question, excluded, scope=True))

    for place in places:
        row = index.rows[place]
        look_up("answerable", reword(row.question, generator), None)
        # as if the table did not have it: neither its question nor its answer under another one
        own_question = index.ids == row.question_id
        same = answers == answers[place]
        look_up("others", row.question, own_question | same)
    # a low quantile, and less than that: few real questions may be refused by mistake
    low = MARGIN * float(np.quantile(similarities["answerable"], REFUSED_SHARE))
    low = min(MOST_THRESHOLD, low)
    certain = max(LEAST_CERTAIN, float(np.quantile(similarities["others"], CERTAIN_SHARE)))
    if certain >= 1:
        certain = NEVER_CERTAIN
    return Calibration(round(low, 3), round(certain, 3), scores["answerable"], scores["others"])


def score_of(index: RowIndex, question: str, excluded: np.ndarray | None, scope: bool) -> float:
    """The best score among the rows that are not `excluded` [rows]; 0 if there are none."""
    hits = index.best(index.scores(question, scope), 1, excluded)
    return hits[0].score if hits else 0.0


def share_below(scores: Sequence[float], threshold: float) -> float:
    """The share of the scores that are below a threshold."""
    return float(np.mean(np.asarray(scores) < threshold))
