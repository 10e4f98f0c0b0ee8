"""Would more rows help? A curve of runs that differ in `train_rows`, over one test split."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tabletune.report.compare import (
    NOT_IN_SETTING,
    comparable_runs,
    compared_part,
    headline,
    name_of_seeds,
    open_runs,
    ranked,
    settings_of,
)
from tabletune.report.reading import (
    digest_of_test,
    in_order_of_test,
    read_lines,
    right_answers,
)
from tabletune.run.files import read_json
from tabletune.run.parameters import DEFAULTS
from tabletune.stats import (
    mean_difference,
    mean_interval,
    perplexity_interval,
    rate_difference,
    rate_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_COMPARED = {*NOT_IN_SETTING, "train_rows"}  # in which the runs of one curve may differ
TUNED = ("merged", "adapter")  # the model to look at: the first of these that was evaluated
HALF = 0.75  # of the rows of the largest run, at most, for a smaller one to be compared with it
LEAST_GAIN = 0.01  # nats a token, 1% of the perplexity: less is no gain, however sure it is
LEAST_HALF = 0.3  # of the rows of the largest run, at least, for it to be the last doubling
ONE_SEED_GAIN = 0.04  # nats a token: where each size ran once, seeds alone changed as much
NEARLY_ALL = 0.95  # of the new questions right: then likelier answers are no better ones
HARDLY_ANY = 0.05
MORE_STEPS = 1.2  # times as many optimizer steps are more: packing and whole batches make some


@dataclass
class Point:
    """A size of a learning curve: its number of training questions, and its test figures.

    `scores` has a line a test row (`group`, `response_nll`, `response_tokens`), `right` says for
    each new question in which share of the runs its answer is right, and is empty where that was
    not measured. Of several seeds both are means; `spreads` is how far the runs are then apart,
    the largest less the smallest: (nats a token, share of right answers). `steps` are those of the
    optimizer, and `epochs` how often it read each row, None for a run that does not say.
    """

    name: str
    questions: int
    scores: pd.DataFrame
    right: dict[str, float]
    spreads: tuple[float, float] = (0.0, 0.0)
    has_seeds: bool = False
    steps: int | None = None
    epochs: float | None = None

    @property
    def nats(self) -> float:
        """The mean negative log-likelihood of a token of the test split's responses."""
        return float(self.scores["response_nll"].sum() / self.scores["response_tokens"].sum())

    @property
    def perplexity(self) -> float:
        """The response perplexity of the test split."""
        return math.exp(self.nats)

    @property
    def right_rate(self) -> float:
        """The share of new questions that are answered right."""
        return float(np.mean(list(self.right.values())))

    def right_interval(self) -> list[float] | None:
        """The 95% interval of `right_rate`, over questions."""
        values = list(self.right.values())
        if set(values) <= {0.0, 1.0}:
            return rate_interval(np.array(values, bool))
        return mean_interval(values, np.ones(len(values)))


def read_point(name: str, folder: Path) -> Point | None:
    """The Point of a run folder; None if the run was not evaluated."""
    report_file, scores_file = folder / "dataset/report.json", folder / "evaluation/scores.parquet"
    if not report_file.exists() or not scores_file.exists():
        return None
    report = read_json(report_file, "01_format_dataset")
    scores = pd.read_parquet(scores_file)
    model = next((model for model in TUNED if model in set(scores["model"])), None)
    if model is None:
        return None
    scores = in_order_of_test(scores[scores["model"] == model], folder)
    lines = read_lines(folder / "evaluation/answers.jsonl")
    new = [line for line in lines if line["part"] == "new" and line["model"] == model]
    right = {question: float(is_right) for question, is_right in right_answers(new).items()}
    training_file = folder / "training/metrics.json"
    training = read_json(training_file, "02_finetune_qlora") if training_file.exists() else {}
    questions = report["questions"]["train"]
    steps, epochs = training.get("steps"), training.get("epochs")
    return Point(name, questions, scores, right, steps=steps, epochs=epochs)


def curves_of(folders: Mapping[str, Path]) -> list[list[Point]]:
    """The learning curves among some runs, each a list of Points from few to many questions.

    The runs of a curve have one test split and the same parameters but for `train_rows` and `seed`,
    and at least two different numbers of training questions. Their epochs are the same, or as many
    more as there are fewer rows (`equal_steps` in a grid).
    """
    alike: dict[str, list[Point]] = {}
    for name, folder in folders.items():
        point = read_point(name, folder)
        if point is not None:
            for key in keys_of(folder):
                alike.setdefault(key, []).append(point)
    curves = [merge_seeds(points) for points in alike.values()]
    return [curve for curve in curves if len(curve) > 1]


def merge_seeds(points: Sequence[Point]) -> list[Point]:
    """One Point for each number of training questions, from few to many: the mean of its runs."""
    of_size: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.questions):
        of_size.setdefault(point.questions, []).append(point)
    return [mean_point(same) for same in of_size.values()]


def mean_point(points: Sequence[Point]) -> Point:
    """The mean of Points of one size, whose runs differ by their seeds."""
    first = points[0]
    if len(points) == 1:
        return first
    # [rows]: runs of one curve have the same test rows in the same order
    nll = np.mean([point.scores["response_nll"] for point in points], axis=0)
    right: dict[str, float] = {}
    spread_of_right = 0.0
    if all(point.right and point.right.keys() == first.right.keys() for point in points):
        for question in first.right:
            right[question] = float(np.mean([point.right[question] for point in points]))
        rates = [point.right_rate for point in points]
        spread_of_right = max(rates) - min(rates)
    nats = [point.nats for point in points]
    spreads = (max(nats) - min(nats), spread_of_right)
    name = name_of_seeds(first.name, len(points))
    scores = first.scores.assign(response_nll=nll)
    return replace(first, name=name, scores=scores, right=right, spreads=spreads, has_seeds=True)


def keys_of(folder: Path) -> list[str]:
    """What the runs of one curve have in common, as texts: one for equal epochs, one for steps."""
    manifest = read_json(folder / "manifest.json", "01_format_dataset")
    parameters: dict[str, Any] = {}
    for stage in ("01_format_dataset", "02_finetune_qlora"):
        parameters |= manifest.get(stage, {}).get("parameters", {})
    common = {name: value for name, value in parameters.items() if name not in NOT_COMPARED}
    digest = digest_of_test(folder)
    epochs = common.pop("epochs", DEFAULTS["epochs"])
    rows_read = round(epochs * parameters.get("train_rows", DEFAULTS["train_rows"]), 6)
    return [
        json.dumps([common, digest, {"epochs": epochs}], sort_keys=True),
        json.dumps([common, digest, {"epochs of all rows": rows_read}], sort_keys=True),
    ]


def learning_curve(folders: Mapping[str, Path]) -> tuple["Figure | None", list[list[str]]]:
    """(A figure, the sentences on each curve) of the learning curves among runs, {name: folder}.

    The first sentence on a curve is its verdict. (None, []) where there is no curve.
    """
    curves = curves_of(folders)
    if not curves:
        return None, []
    sentences = [last_doubling(curve) for curve in curves]
    if len(curves) > 1:
        for curve, of_curve in zip(curves, sentences, strict=True):
            of_curve[0] = f"{kind_of(curve)}: {of_curve[0]}"
    return plot_curves(curves), sentences


def in_words(places: Sequence[str]) -> list[str]:
    """What a comparison of some run folders finds, in sentences, without tables and plots.

    First which setting is best, then the verdicts of the learning curves. Raises StageError if one
    of the folders is no run.
    """
    runs, _ = comparable_runs(open_runs(places))
    part = compared_part(runs)
    sentences = headline(ranked(settings_of(runs), part), part)
    curves = curves_of({run.name: run.folder for run in runs})
    return sentences + [last_doubling(curve)[0] for curve in curves]


def kind_of(curve: list[Point]) -> str:
    """What the runs of a curve have in common beside their parameters, to tell curves apart."""
    steps = [point.steps for point in curve if point.steps is not None]
    if not steps:
        return f"{curve[0].name} to {curve[-1].name}"
    if max(steps) <= MORE_STEPS * min(steps):
        return f"About {max(steps):,} steps each"
    return f"{min(steps):,} to {max(steps):,} steps, the same epochs"


def plot_curves(curves: list[list[Point]]) -> "Figure":
    """A figure of the curves with intervals: perplexity, and right answers if measured."""
    import matplotlib.pyplot as plt  # half a second

    points = list(chain.from_iterable(curves))
    measured = all(point.right for point in points)
    panels = 2 if measured else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(4.6 * panels, 3.4), layout="constrained", squeeze=False
    )
    for number, curve in enumerate(curves):
        style = {"marker": "os^Dv"[number % 5], "color": str(0.35 * (number % 3)), "capsize": 4}
        sizes = [point.questions for point in curve]
        values = [point.perplexity for point in curve]
        limits = [
            perplexity_interval(point.scores, "response", point.scores["group"]) for point in curve
        ]
        axes[0][0].errorbar(sizes, values, error_bars(values, limits), **style)
        if measured:
            rates = [point.right_rate for point in curve]
            limits = [point.right_interval() for point in curve]
            axes[0][1].errorbar(sizes, rates, error_bars(rates, limits), **style)
    read = {point.scores["group"].nunique() for point in points}
    axes[0][0].set(ylabel="perplexity (lower is better)", title=title_of(read))
    if measured:
        answered = {len(point.right) for point in points}
        axes[0][1].set(ylabel="right answers", title=title_of(answered), ylim=(-0.03, 1.03))
        axes[0][1].yaxis.set_major_formatter("{x:.0%}")
    sizes = sorted({point.questions for point in points})
    for panel in axes[0]:
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel("questions in training")
    plt.close(figure)  # else a notebook shows it a second time
    return figure


def title_of(questions: set[int]) -> str:
    """The title of a panel, by the numbers of questions that its points rest on."""
    numbers = " or ".join(f"{number:,}" for number in sorted(questions))
    return f"{numbers} new questions"


def error_bars(values: list[float], limits: list[list[float] | None]) -> np.ndarray:
    """How far the limits are from the values, below and above: [2, values].

    0 where there is no interval.
    """
    below = [
        value - low_high[0] if low_high else 0
        for value, low_high in zip(values, limits, strict=True)
    ]
    above = [
        low_high[1] - value if low_high else 0
        for value, low_high in zip(values, limits, strict=True)
    ]
    return np.array([below, above])


@dataclass(frozen=True)
class Gain:
    """What the largest run of a curve gained over one with about half as many questions.

    `likelihood` and `right` are paired differences as `stats` returns them, of nats a token and of
    right answers; `right` is None where that was not measured. A gain counts if it is significant,
    and more than seeds alone do.
    """

    most: Point
    half: Point
    likelihood: dict
    right: dict | None

    @property
    def is_more_likely(self) -> bool:
        """Whether new answers became more likely, by more than LEAST_GAIN and than seeds do."""
        by_seeds = max(self.most.spreads[0], self.half.spreads[0])
        if not self.most.has_seeds and not self.half.has_seeds:
            by_seeds = ONE_SEED_GAIN
        least = max(LEAST_GAIN, by_seeds)
        return self.likelihood["significant"] and self.likelihood["difference"] < -least

    @property
    def is_more_right(self) -> bool:
        """Whether more new questions are answered right."""
        if self.right is None:
            return False
        by_seeds = max(self.most.spreads[1], self.half.spreads[1])
        return self.right["significant"] and self.right["difference"] > by_seeds

    @property
    def is_last_doubling(self) -> bool:
        """Whether the smaller run is large enough for the step between them to be a doubling."""
        return self.half.questions >= LEAST_HALF * self.most.questions

    @property
    def has_seeds(self) -> bool:
        """Whether it is known what seeds alone do."""
        return self.most.has_seeds and self.half.has_seeds

    @property
    def least_right(self) -> float:
        """The lower of the two shares of new questions that are answered right."""
        return min(self.most.right_rate, self.half.right_rate)

    @property
    def most_right(self) -> float:
        """The higher of the two shares of new questions that are answered right."""
        return max(self.most.right_rate, self.half.right_rate)

    @property
    def has_more_steps(self) -> bool:
        """Whether the training with more rows also made more optimizer steps."""
        if self.most.steps is None or self.half.steps is None:
            return False
        return self.most.steps > MORE_STEPS * self.half.steps

    @property
    def has_fewer_epochs(self) -> bool:
        """Whether the training with fewer rows read them more often (`equal_steps` in a grid)."""
        if self.most.epochs is None or self.half.epochs is None:
            return False
        return self.half.epochs > MORE_STEPS * self.most.epochs


def gain_of(most: Point, half: Point) -> Gain:
    """The Gain of the larger run, by pairs of the same test rows."""
    likelihood = mean_difference(
        most.scores["response_nll"],
        half.scores["response_nll"],
        most.scores["response_tokens"],
        most.scores["group"],
    )
    return Gain(most, half, likelihood, compare_right(most, half))


def last_doubling(curve: list[Point]) -> list[str]:
    """Whether the last doubling of a curve still gained, in sentences, the verdict first."""
    most = curve[-1]
    smaller = [point for point in curve if point.questions <= HALF * most.questions]
    if not smaller:
        return [
            "No run has about half as many questions as the largest: "
            "whether more rows help cannot be said."
        ]
    # the largest of the smaller runs: the last doubling, or what comes nearest to one
    gain = gain_of(most, smaller[-1])
    sentences = conclusion(gain)
    sentences.append(likelihood_sentence(most, gain.half, gain.likelihood))
    if gain.right is not None:
        sentences.append(right_sentence(len(most.right), gain.right))
    if not gain.has_seeds:
        sentences.append(
            "How much a seed alone changes is not known here: run each size with three seeds "
            "(`seed: [1, 2, 3]` in the grid) before you trust a small change."
        )
    return sentences


def conclusion(gain: Gain) -> list[str]:
    """Whether more rows would help, in sentences, the verdict first."""
    step = "The last doubling"
    if not gain.is_last_doubling:
        step = f"{gain.most.questions / gain.half.questions:.0f} times as many questions"
    sentences = [conclusion_on(step, gain)]
    if gain.right is not None and gain.most_right <= HARDLY_ANY:
        sentences.append(
            "Hardly any new question is answered right, with fewer rows or with more: facts belong "
            "in the prompt (`context_rows`)."
        )
    if not gain.is_last_doubling:
        sentences.append(
            "Whether the last doubling gained is not measured: run one with half as many "
            "(`train_rows`)."
        )
    return sentences


def conclusion_on(step: str, gain: Gain) -> str:
    """Whether a step from fewer to more rows says that still more rows would help."""
    most, half = gain.most, gain.half
    if not gain.is_more_right and not gain.is_more_likely:
        return (
            f"{step} gained nothing that can be told from chance: "
            "more rows of this kind would hardly help."
        )
    if gain.has_more_steps:
        remedy = "`equal_steps: true` in the grid gives all sizes as many."
        if gain.has_fewer_epochs:
            remedy = "Their batches differ in size: give `batch_size` a number in the grid."
        return (
            f"{step} gained, but the larger run also made more steps ({most.steps:,}, not "
            f"{half.steps:,}), and that alone may be why. {remedy}"
        )
    if gain.is_more_right or gain.right is None or gain.most_right <= HARDLY_ANY:
        return f"{step} still gained: more rows would probably help."
    if gain.least_right >= NEARLY_ALL:
        return (
            f"{step} made the table's answers more likely, but nearly all new questions are "
            "answered right with fewer rows already: more rows of this kind would hardly help."
        )
    return (
        f"{step} made the table's answers more likely, but it cannot be told whether "
        "more of the model's own are right: more rows may help."
    )


def compare_right(most: Point, half: Point) -> dict | None:
    """How many more new questions one size answers right, in pairs: a rate.

    None where that was not measured.
    """
    if not most.right or most.right.keys() != half.right.keys():
        return None
    one = np.array([most.right[question] for question in most.right])
    other = np.array([half.right[question] for question in most.right])
    # of one seed each answer is right or wrong; the mean of several seeds is in between
    if set(one) | set(other) <= {0.0, 1.0}:
        return rate_difference(one.astype(bool), other.astype(bool))
    return mean_difference(one, other, np.ones(len(one)))


def likelihood_sentence(most: Point, half: Point, entry: dict) -> str:
    """By how much the perplexity of new questions changes, with its interval."""
    change = 100 * (math.exp(entry["difference"]) - 1)
    text = f"{change:+.0f}%"
    if entry["ci95"] is not None:
        low, high = (100 * (math.exp(limit) - 1) for limit in entry["ci95"])
        text += f" ({low:+.0f}% – {high:+.0f}%)"
    return (
        f"From {half.questions:,} to {most.questions:,} questions in training, "
        f"the perplexity of new questions changes by {text}."
    )


def right_sentence(questions: int, entry: dict) -> str:
    """How many more answers are right, in points of percent, with the interval."""
    points = [f"{100 * value:+.0f}" for value in (entry["difference"], *entry["ci95"])]
    return (
        f"Right answers to the same {questions} new questions: {points[0]} points "
        f"({points[1]} – {points[2]})."
    )
