"""What a reader thinks of the answers.

Pairs without names, what was said of them, and the figures of that. The pairs are the answers of
notebook 4, so no model is needed. `export.rating_page` shows them; this module does the rest, and
works without Gradio.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tabletune.errors import StageError
from tabletune.report.reading import read_lines
from tabletune.report.text import with_interval
from tabletune.run.files import write_json, write_lines
from tabletune.stats import interval, rate_interval

BETTER = ("left", "right", "equal")
ENOUGH = 20  # answers that were called right or wrong, for a rank correlation to say anything
DRAWS = 200  # of the bootstrap: ranks are slow to draw again
METRICS = {"chrf": "chrF", "right": "the rule for right answers"}


@dataclass(frozen=True)
class Pair:
    """The answers of two models to one question, `left` and `right`.

    And what notebook 4 measured of them. `left_model` is "base" or "tuned". Who rates sees neither
    that nor the measured figures.
    """

    pair_id: str
    part: str
    question: str
    references: list[str]
    left: str
    right: str
    left_model: str
    measured: dict  # {"base" or "tuned": {"chrf": number, "right": bool}}


@dataclass(frozen=True)
class Rating:
    """What a reader said of a pair: which answer is better, and whether each is right.

    None: not said.
    """

    pair_id: str
    better: str  # "tuned", "base" or "equal"
    base_is_right: bool | None = None
    tuned_is_right: bool | None = None


def pairs_of_run(run: Path, seed: int = 42) -> list[Pair]:
    """The pairs of a run in random order.

    Its base model against the merged one, or the adapter where that is missing.

    Raises StageError if notebook 4 has left no answers.
    """
    path = run / "evaluation" / "answers.jsonl"
    lines = read_lines(path)
    if not lines:
        raise StageError(
            f"{path} is missing or empty. Run 04_evaluate first: its answers are rated."
        )
    models = {line["model"] for line in lines}
    tuned = "merged" if "merged" in models else "adapter"
    # the last turns of several conversations may be the same: the id tells them apart
    answers: dict[tuple[str, str, str | None], dict[str, dict]] = {}
    for line in lines:
        key = (line["part"], line["asked"], line.get("group"))
        answers.setdefault(key, {})[line["model"]] = line
    rng = random.Random(seed)
    pairs = []
    for (part, question, _), by_model in answers.items():
        if {"base", tuned} <= by_model.keys():
            pairs.append(make_pair(part, question, by_model["base"], by_model[tuned], rng))
    # not in the order of the parts: a reader tires, and the last ones would all be of one kind
    rng.shuffle(pairs)
    return pairs


def make_pair(part: str, question: str, base: dict, tuned: dict, rng: random.Random) -> Pair:
    """The Pair of two lines of answers.jsonl, the sides by chance."""
    texts = {"base": base["answer"], "tuned": tuned["answer"]}
    left_model = rng.choice(["base", "tuned"])
    right_model = "tuned" if left_model == "base" else "base"
    content = json.dumps([part, question, texts], ensure_ascii=False)
    return Pair(
        pair_id=hashlib.sha256(content.encode()).hexdigest()[:16],
        part=part,
        question=question,
        references=list(base["references"]),
        left=texts[left_model],
        right=texts[right_model],
        left_model=left_model,
        measured={"base": measured_of(base), "tuned": measured_of(tuned)},
    )


def measured_of(line: dict) -> dict:
    """The figures of an answer that are compared with the reader."""
    return {name: line.get(name) for name in METRICS}


class RatingSession:
    """The pairs of a run that are still to be rated, one after the other.

    Each rating is saved at once. Ratings of answers that the run no longer has, as it was evaluated
    again, stay in the file and do not count.
    """

    def __init__(self, run: Path, seed: int = 42):
        self.folder = run / "rating"
        self.pairs = pairs_of_run(run, seed)
        self.lines = read_lines(self.folder / "ratings.jsonl")

    @property
    def ratings(self) -> dict[str, Rating]:
        """The ratings of this run, {pair_id: Rating}; the last one of a pair counts."""
        # lines of an evaluation that was made anew since are of pairs that are no more
        pair_ids = {pair.pair_id for pair in self.pairs}
        lines = [line for line in self.lines if line["pair_id"] in pair_ids]
        return {line["pair_id"]: Rating(**line) for line in lines}

    def next_pair(self) -> Pair | None:
        """The first pair that is not rated; None if all are."""
        rated = self.ratings
        return next((pair for pair in self.pairs if pair.pair_id not in rated), None)

    def rate(
        self,
        pair: Pair,
        better: str,
        left_is_right: bool | None = None,
        right_is_right: bool | None = None,
    ) -> Rating:
        """Save what a reader says of a pair: `better` is "left", "right" or "equal".

        Raises ValueError otherwise.
        """
        if better not in BETTER:
            raise ValueError(f"better={better!r}: use one of {', '.join(BETTER)}")
        right_model = "tuned" if pair.left_model == "base" else "base"
        names = {"left": pair.left_model, "right": right_model, "equal": "equal"}
        is_right = {pair.left_model: left_is_right, right_model: right_is_right}
        rating = Rating(pair.pair_id, names[better], is_right["base"], is_right["tuned"])
        self.lines.append(asdict(rating))
        write_lines(self.folder / "ratings.jsonl", self.lines)
        write_json(self.folder / "metrics.json", self.metrics())
        return rating

    def metrics(self) -> dict:
        """What `rating/metrics.json` says."""
        return summarize_ratings(self.pairs, self.ratings)


# --- figures


def summarize_ratings(pairs: Sequence[Pair], ratings: dict[str, Rating]) -> dict:
    """The win rate, and the shares that a reader called right.

    And how far the measured figures agree with the reader.
    """
    rated = [(pair, ratings[pair.pair_id]) for pair in pairs if pair.pair_id in ratings]
    better = [rating.better for _, rating in rated]
    # ties say nothing of which model is better, so the win rate leaves them out
    wins = [choice == "tuned" for choice in better if choice != "equal"]
    metrics: dict[str, Any] = {
        "rated": len(rated),
        "pairs": len(pairs),
        "wins": better.count("tuned"),
        "losses": better.count("base"),
        "ties": better.count("equal"),
        "win_rate": float(np.mean(wins)) if wins else None,
        "win_rate_ci95": rate_interval(wins),
        "right": {},
        "agreement": {},
    }
    for model in ("base", "tuned"):
        called_right = [getattr(rating, f"{model}_is_right") for _, rating in rated]
        called_right = [value for value in called_right if value is not None]
        if called_right:
            metrics["right"][model] = {
                "answers": len(called_right),
                "rate": float(np.mean(called_right)),
                "rate_ci95": rate_interval(called_right),
            }
    table = judged_answers(rated)
    for name in METRICS:
        metrics["agreement"][name] = rank_correlation(table, name)
    metrics["sentences"] = rating_sentences(metrics)
    return metrics


def judged_answers(rated: Sequence[tuple[Pair, Rating]]) -> pd.DataFrame:
    """A line for each answer that a reader called right or wrong.

    `pair_id`, `called_right` (bool) and the measured figures.
    """
    lines = []
    for pair, rating in rated:
        for model in ("base", "tuned"):
            called_right = getattr(rating, f"{model}_is_right")
            if called_right is not None:
                line = {"pair_id": pair.pair_id, "called_right": called_right}
                lines.append(line | pair.measured[model])
    return pd.DataFrame(lines, columns=["pair_id", "called_right", *METRICS])


def rank_correlation(table: pd.DataFrame, name: str) -> dict | None:
    """Spearman's rank correlation of a measured figure with what the reader said.

    Its interval comes from drawing pairs. None where fewer than ENOUGH answers were judged, or
    where all of them are alike: no rank can agree with that.
    """
    table = table.dropna(subset=[name])
    if len(table) < ENOUGH:
        return None
    value = spearman(table, name)
    if value is None:
        return None
    groups = table["pair_id"].unique()
    parts = {key: part for key, part in table.groupby("pair_id")}
    random_numbers = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        keys = random_numbers.choice(groups, size=len(groups))
        again = spearman(pd.concat([parts[key] for key in keys]), name)
        if again is not None:
            drawn.append(again)
    limits = interval(drawn, groups) if drawn else None
    return {"answers": len(table), "rank_correlation": value, "ci95": limits}


def spearman(table: pd.DataFrame, name: str) -> float | None:
    """The rank correlation of a figure with `called_right`.

    None where one of them does not vary.
    """
    figures = table[name].astype(float)
    called_right = table["called_right"].astype(float)
    if figures.nunique() < 2 or called_right.nunique() < 2:
        return None
    # Spearman's is Pearson's correlation of the ranks
    return float(figures.rank().corr(called_right.rank()))


def rating_sentences(metrics: dict) -> list[str]:
    """The figures in words, the most important first."""
    if not metrics["rated"]:
        return ["No answers were rated yet."]
    sentences = [
        f"A reader rated {metrics['rated']} of {metrics['pairs']} pairs of answers without names: "
        f"the fine-tuned model's was better {metrics['wins']} times, the base model's "
        f"{metrics['losses']} times, {metrics['ties']} were equal."
    ]
    if metrics["win_rate"] is not None:
        share = with_interval(metrics["win_rate"], metrics["win_rate_ci95"], ".0%")
        line = f"Win rate of the fine-tuned model, without the equal ones: {share}."
        if metrics["win_rate_ci95"][0] <= 0.5 <= metrics["win_rate_ci95"][1]:
            line += " That may be chance."
        sentences.append(line)
    for model, name in (("tuned", "fine-tuned"), ("base", "base")):
        entry = metrics["right"].get(model)
        if entry:
            share = with_interval(entry["rate"], entry["rate_ci95"], ".0%")
            sentences.append(
                f"The reader called {share} of {entry['answers']} {name} answers right."
            )
    for name, heading in METRICS.items():
        agreement = metrics["agreement"][name]
        if agreement:
            value = with_interval(agreement["rank_correlation"], agreement["ci95"], ".2f")
            sentences.append(f"Rank correlation of {heading} with the reader: {value}.")
    if not any(metrics["agreement"].values()):
        sentences.append(
            "Whether chrF and the rule for right answers agree with the reader is not measured: "
            f"that takes {ENOUGH} answers called right or wrong, some of each."
        )
    return sentences
