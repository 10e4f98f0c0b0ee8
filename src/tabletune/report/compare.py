"""Runs beside each other.

Which can be compared, and which differ by more than chance, in pairs on the same rows.

Runs that differ in nothing but their seeds are one *setting*. A perplexity counts tokens, and each
tokenizer cuts its own, so settings are compared by bits per byte of the answers, and by how many
answers are right.
"""

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tabletune.report.reading import (
    as_texts,
    at,
    digest_of_test,
    doubts,
    in_order_of_test,
    read_lines,
    read_run,
    right_answers,
)
from tabletune.report.tables import NO_DIFFERENCE
from tabletune.report.text import PARTS, with_interval
from tabletune.run.hub import open_run
from tabletune.run.parameters import RUN_STAGES
from tabletune.stats import count_groups, mean_difference, mean_interval

NOT_IN_SETTING = {  # parameters in which the runs of one setting may differ
    "seed",
    "run_dir",
    "your_question",
    "push_dataset_to",
    "ignore_memory",
    "disclaimer",
    "eval_batch_size",
}
EVALUATED_WITH = ("window", "stride", "samples", "max_new_tokens", "do_sample")
RIGHT, BITS = "right", "bits"
RIGHT_UNKNOWN = (
    "Which setting has the most right answers is not known: the runs were not asked the same "
    "questions. Run notebook 4 again with the same `samples`."
)
LEAST_BITS = 0.004  # per byte, some 1% of a perplexity: less is no difference, however sure it is
# Where each setting ran once: in 18 pairs of runs that differed by their seeds alone, the largest
# difference was 0.014 (docs/how-many-rows.md).
ONE_SEED_BITS = 0.015


@dataclass
class ComparedRun:
    """A run folder among others.

    Its `name`, and what its stages left, `info` (see `read_run` in report/reading.py).
    """

    name: str
    folder: Path
    info: dict

    @property
    def model(self) -> str | None:
        """The key of the model that is compared: the merged one, else the adapter.

        None if none was evaluated.
        """
        return self.info["tuned"]

    @property
    def entry(self) -> dict:
        """What the metrics say of that model."""
        return self.info["metrics"].get(self.model) or {}

    @cached_property
    def test_digest(self) -> str:
        """What identifies the questions and answers of its test split."""
        return digest_of_test(self.folder)

    @cached_property
    def scores(self) -> pd.DataFrame | None:
        """The scores of that model, a line a test row.

        None if there are none, or of an older notebook 4.
        """
        path = self.folder / "evaluation" / "scores.parquet"
        if not path.exists() or self.model is None:
            return None
        table = pd.read_parquet(path)
        if "response_bytes" not in table:
            return None
        return in_order_of_test(table[table["model"] == self.model], self.folder)

    @cached_property
    def answers(self) -> dict[str, dict[str, bool]]:
        """Which questions that model answers right, {part: {question: right}}.

        The questions are called as `right_answers` in report/reading.py does.
        """
        lines: dict[str, list[dict]] = {}
        for line in read_lines(self.folder / "evaluation" / "answers.jsonl"):
            if line["model"] == self.model:
                lines.setdefault(line["part"], []).append(line)
        return {part: right_answers(of_part) for part, of_part in lines.items()}

    @cached_property
    def parameters(self) -> dict[str, str]:
        """The parameters of the notebooks that make a run, 1 to 4, {name: value as text}.

        The other notebooks have some of the same names (`window`, `max_new_tokens`), and what they
        measure is not compared.
        """
        entries = [self.info["manifest"].get(stage) for stage in RUN_STAGES]
        return as_texts(at(entry, "parameters") or {} for entry in entries)

    @property
    def setting(self) -> tuple:
        """Its `parameters`, but for those that do not make another setting."""
        return tuple(sorted((k, v) for k, v in self.parameters.items() if k not in NOT_IN_SETTING))


@dataclass
class Setting:
    """Runs that differ by their seeds alone."""

    name: str
    runs: list[ComparedRun]

    def bits(self) -> tuple[np.ndarray, np.ndarray]:
        """The bits and bytes of each test row's response, both [rows]; the mean over the runs."""
        tables = [run.scores for run in self.runs if run.scores is not None]
        # nats to bits; [rows], in the order of the test split in all runs
        bits = np.mean([table["response_nll"] / math.log(2) for table in tables], axis=0)
        return bits, tables[0]["response_bytes"].to_numpy()

    def groups(self) -> np.ndarray:
        """The question of each test row, [rows]."""
        scores = self.runs[0].scores
        return np.array([]) if scores is None else scores["group"].to_numpy()

    def right(self, part: str) -> dict[str, float]:
        """How often each question of a part was answered right, {question: share of the runs}."""
        of_runs = [run.answers.get(part, {}) for run in self.runs]
        # only questions that every seed was asked can be averaged
        shared = set.intersection(*(set(answers) for answers in of_runs))
        return {
            question: float(np.mean([answers[question] for answers in of_runs]))
            for question in shared
        }

    def values(self, figure: str, part: str) -> list[float]:
        """A figure of each run, right answers as a share, or bits per byte."""
        if figure == RIGHT:
            return [float(np.mean(list(run.answers[part].values()))) for run in self.runs]
        return [run.entry["perplexity"]["bits_per_byte"] for run in self.runs]

    @property
    def has_rows(self) -> bool:
        """Whether rows of the table stand in its prompts (`context_rows`)."""
        return bool(self.runs[0].info["metrics"].get("retrieval"))

    @property
    def has_answers(self) -> bool:
        """Whether one of its runs has answered questions."""
        return any(run.answers for run in self.runs)

    def spread(self, figure: str, part: str) -> float:
        """How far its runs are apart in a figure: the largest less the smallest."""
        values = self.values(figure, part)
        return max(values) - min(values)


def open_runs(runs: str | Sequence[str]) -> list[ComparedRun]:
    """The runs of some folders, each once.

    A single text may name several, with spaces between, and in quotes where a name has spaces.

    A run is named by its path below the folder that all of them are in. Raises StageError if one of
    them is no run.
    """
    places = [runs] if isinstance(runs, str) else list(runs)
    if len(places) == 1 and not Path(places[0]).is_dir():
        places = split_places(places[0])
    folders = list(dict.fromkeys(open_run(place).resolve() for place in places))
    common = os.path.commonpath([folder.parent for folder in folders])
    return [
        ComparedRun(os.path.relpath(folder, common), folder, read_run(folder)) for folder in folders
    ]


def split_places(text: str) -> list[str]:
    """The folders that a text names.

    It is split as a shell would do it, or at spaces alone where its quotes do not close.
    """
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def comparable_runs(runs: Sequence[ComparedRun]) -> tuple[list[ComparedRun], list[str]]:
    """The runs that can be compared with each other, and sentences.

    The sentences are on those that cannot, and on what to mind. These are the evaluated runs of the
    test set that most of them share; of several such sets, that of the first run.
    """
    sentences = []
    evaluated = []
    for run in runs:
        if not run.entry:
            sentences.append(f"{run.name} was not evaluated: it is left out of the comparison.")
        elif run.scores is None:
            sentences.append(
                f"{run.name} was evaluated by an older notebook 4: run it again to compare it."
            )
        else:
            evaluated.append(run)
    if not evaluated:
        return [], sentences
    digests = [run.test_digest for run in evaluated]
    # dict.fromkeys keeps the order, so of equally frequent ones the first wins
    digest = max(dict.fromkeys(digests), key=digests.count)
    same = [run for run in evaluated if run.test_digest == digest]
    for run in evaluated:
        if run not in same:
            sentences.append(
                f"{run.name} CANNOT BE COMPARED with {same[0].name}: it has another test set. It "
                "is left out. Runs share one if the table and split_seed are the same."
            )
    return same, sentences + cautions(same)


def doubts_of(runs: Sequence[ComparedRun]) -> list[str]:
    """What to know before trusting the figures of some runs, a sentence a run that needs one.

    What `train_rows` leaves out is not among it: it is what the runs were made to differ in.
    """
    sentences = []
    for run in runs:
        of_run = [doubt for doubt in doubts(run.info) if not doubt.startswith("train_rows:")]
        if of_run:
            sentences.append(f"{run.name}: {' '.join(of_run)}")
    return sentences


def cautions(runs: Sequence[ComparedRun]) -> list[str]:
    """What to mind in runs that can be compared."""
    sentences = []
    if len({run.parameters.get("base_model") for run in runs}) > 1:
        sentences.append(
            "The base models differ. Perplexity is a figure per token, and each tokenizer makes "
            "other tokens, so compare bits per byte."
        )
    if len({bool(run.info["metrics"].get("retrieval")) for run in runs}) > 1:
        sentences.append(
            "Some of these runs have rows in their prompts (`context_rows`), others do not. "
            "Compare their right answers: bits per byte and response perplexity are measured "
            "without these rows, and say nothing about how the runs with rows answer."
        )
    for name in EVALUATED_WITH:
        values = {run.parameters.get(name) for run in runs}
        if len(values) > 1:
            sentences.append(
                f"They were evaluated with different {name} ({values_as_text(values)}): a "
                "difference may come from that."
            )
    return sentences


def values_as_text(values: set[Any]) -> str:
    """Values of a parameter as a text."""
    return ", ".join(sorted(str(value) for value in values))


def settings_of(runs: Sequence[ComparedRun]) -> list[Setting]:
    """The settings among runs, each named after its first run, and after how many seeds it has."""
    of_setting: dict[tuple, list[ComparedRun]] = {}
    for run in runs:
        of_setting.setdefault(run.setting, []).append(run)
    settings = []
    for members in of_setting.values():
        name = members[0].name
        if len(members) > 1:
            name = name_of_seeds(name, len(members))
        settings.append(Setting(name, members))
    return settings


def name_of_seeds(name: str, seeds: int) -> str:
    """The name of several seeds of a setting, by that of one of its runs."""
    # not of split_seed, another parameter
    without_seed = re.sub(r"(?<!split)_seed-\d+(?=_|$)|^seed-\d+_", "", name)
    return f"{without_seed} ({seeds} seeds)"


def compared_part(runs: Sequence[ComparedRun]) -> str | None:
    """The set of questions by which right answers are compared: one that all runs were asked alike.

    Else None. Labels are for what is new; of all else the reworded questions come first, if
    training had the same questions.
    """
    labels = any((run.info["metrics"].get("content_rules") or {}).get("labels") for run in runs)
    order = (
        ["new", "added", "reworded", "table"] if labels else ["reworded", "table", "added", "new"]
    )
    for part in order:
        # the questions of each run; one set means that all runs answered the same ones
        question_sets = {frozenset(run.answers.get(part, {})) for run in runs}
        if len(question_sets) == 1 and question_sets != {frozenset()}:
            return part
    return None


def ranked(settings: Sequence[Setting], part: str | None) -> list[Setting]:
    """The settings, the best first: most right answers, then fewest bits per byte."""

    def key(setting: Setting) -> tuple[float, float]:
        right = float(np.mean(setting.values(RIGHT, part))) if part else 0.0
        return -right, float(np.mean(setting.values(BITS, "")))

    return sorted(settings, key=key)


def pair_difference(one: Setting, other: Setting, figure: str, part: str | None) -> dict | None:
    """How much more `one` has of a figure, in pairs on the same rows.

    As `stats.difference` gives it. It is `significant` only if it is also larger than what seeds
    alone do. For bits that is the spread of the settings' seeds, at least LEAST_BITS, and
    ONE_SEED_BITS where both ran once. None if they have no right answers to compare, or for bits
    if rows stand in the prompts of one only.
    """
    if figure == RIGHT:
        first, second = one.right(part or ""), other.right(part or "")
        shared = sorted(set(first) & set(second))
        if not shared:
            return None
        entry = mean_difference(
            [first[question] for question in shared],
            [second[question] for question in shared],
            np.ones(len(shared)),
        )
    elif one.has_rows != other.has_rows:
        return None
    else:
        bits, sizes = one.bits()
        entry = mean_difference(bits, other.bits()[0], sizes, one.groups())
    # a difference that two seeds of one setting also have says nothing of the settings
    least = max(setting.spread(figure, part or "") for setting in (one, other))
    if figure == BITS:
        ran_once = len(one.runs) == len(other.runs) == 1
        least = max(least, ONE_SEED_BITS if ran_once else LEAST_BITS)
    entry["significant"] = entry["significant"] and abs(entry["difference"]) > least
    return entry


def pairs_table(settings: Sequence[Setting], part: str | None) -> pd.DataFrame:
    """Each setting beside the first of them, as texts.

    How much more it has of each figure, and whether that is real.
    """
    lines = {}
    for setting in settings[1:]:
        line = {}
        right = pair_difference(setting, settings[0], RIGHT, part) if part else None
        if right is not None:
            line["right answers, points"] = difference_text(right, 100, "+.0f")
        bits = pair_difference(setting, settings[0], BITS, part)
        line["bits per byte"] = difference_text(bits, 1, "+.3f")
        line["result"] = result_of_pair(right, bits)
        lines[setting.name] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def result_of_pair(right: dict | None, bits: dict | None) -> str:
    """Whether a setting is better or worse than the first one.

    Right answers decide, and bits per byte if those do not differ.
    """
    if right is None and bits is None:
        return "not compared"
    if right is not None and right["significant"]:
        return "better" if right["difference"] > 0 else "worse"
    if bits is not None and bits["significant"]:
        return "better" if bits["difference"] < 0 else "worse"
    return NO_DIFFERENCE


def is_told_apart(*entries: dict | None) -> bool:
    """Whether one of several differences is more than chance."""
    return any(entry is not None and entry["significant"] for entry in entries)


def difference_text(entry: dict | None, factor: float, form: str) -> str:
    """A difference with its interval, as text."""
    if entry is None:
        return "–"
    ci95 = entry["ci95"] and [factor * limit for limit in entry["ci95"]]
    return with_interval(factor * entry["difference"], ci95, form)


def headline(settings: Sequence[Setting], part: str | None) -> list[str]:
    """Sentences on which setting is best, and which cannot be told apart from it."""
    if not settings:
        return ["No two runs can be compared."]
    best = settings[0]
    by_right_answers = most_right(best, part)
    sentences = by_right_answers or most_likely(settings, part)
    # then bits per byte cannot tell either which one is best
    if any(setting.has_rows != best.has_rows for setting in settings) and not by_right_answers:
        return sentences or ["No two runs can be compared."]
    same = []
    for setting in settings[1:]:
        right = pair_difference(setting, best, RIGHT, part) if part else None
        if not is_told_apart(right, pair_difference(setting, best, BITS, part)):
            same.append(setting.name)
    if same:
        sentences.append(f"No difference from it is shown for: {', '.join(same)}.")
    elif settings[1:]:
        sentences.append("All others differ from it by more than chance.")
    if all(len(setting.runs) == 1 for setting in settings):
        sentences.append(
            "Each setting ran with one seed. How much a seed alone changes is not known: run one "
            "setting with two more seeds before you trust a small difference."
        )
    return sentences


def most_right(best: Setting, part: str | None) -> list[str]:
    """A sentence on the best setting, if it answers any question right."""
    rates = best.values(RIGHT, part) if part else []
    if not part or max(rates) == 0:
        return []
    questions = len(best.runs[0].answers[part])
    return [f"Most right answers: {best.name}, {np.mean(rates):.0%} of {questions} {PARTS[part]}."]


def most_likely(settings: Sequence[Setting], part: str | None) -> list[str]:
    """Sentences on the setting with the fewest bits per byte, and why right answers do not count.

    The settings come as `ranked` gives them.
    """
    best = settings[0]
    sentences = []
    if part:
        sentences.append(f"No setting answers any of the {PARTS[part]} right.")
    elif any(setting.has_answers for setting in settings):
        sentences.append(RIGHT_UNKNOWN)
    if all(setting.has_rows == best.has_rows for setting in settings):
        bits = float(np.mean(best.values(BITS, "")))
        sentences.append(f"Fewest bits per byte: {best.name}, {bits:.3f}.")
    return sentences


def settings_table(settings: Sequence[Setting], part: str | None) -> pd.DataFrame:
    """The figures of each setting as texts.

    Those of one run come with an interval, those of several seeds are a mean and a spread.
    """
    lines = {}
    for setting in settings:
        line = {"seeds": str(len(setting.runs))}
        if part:
            line[f"right, {PARTS[part]}"] = figure_text(setting, RIGHT, part, ".0%")
        line["bits per byte"] = figure_text(setting, BITS, "", ".3f")
        perplexities = [run.entry["perplexity"]["response"] for run in setting.runs]
        line["response perplexity"] = spread_text(perplexities, ",.2f")
        lines[setting.name] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def figure_text(setting: Setting, figure: str, part: str, form: str) -> str:
    """A figure of a setting as text, with the interval of its only run, or its seeds' spread."""
    value, ci95 = figure_with_interval(setting, figure, part)
    if len(setting.runs) > 1:
        return spread_text(setting.values(figure, part), form)
    return with_interval(value, ci95, form)


def spread_text(values: Sequence[float], form: str) -> str:
    """The mean of several seeds with the smallest and the largest, as text; of one the value."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{np.mean(values):{form}} [{min(values):{form}} to {max(values):{form}}]"


def figure_with_interval(
    setting: Setting, figure: str, part: str
) -> tuple[float, list[float] | None]:
    """The mean of a figure over the runs of a setting, and its 95% interval over questions."""
    if figure == RIGHT:
        shares = list(setting.right(part).values())
        if len(setting.runs) == 1:
            content = setting.runs[0].entry["content"][part]
            return content["right"], content["right_ci95"]
        return float(np.mean(shares)), mean_interval(shares, np.ones(len(shares)))
    bits, sizes = setting.bits()
    groups = setting.groups()
    ci95 = mean_interval(bits, sizes, groups) if count_groups(groups) else None
    return float(bits.sum() / sizes.sum()), ci95


def plot_settings(axes: Any, settings: Sequence[Setting], figure: str, part: str | None) -> None:
    """A dot for each setting on matplotlib axes, with its interval.

    Several seeds are small marks beside it.
    """
    for position, setting in enumerate(settings):
        value, ci95 = figure_with_interval(setting, figure, part or "")
        if ci95 is not None:
            axes.plot(ci95, [position] * 2, "|-k", markersize=10)
        axes.plot(value, position, "o", color="0.6", markeredgecolor="black", markersize=8)
        values = setting.values(figure, part or "")
        if len(values) > 1:
            axes.plot(values, [position + 0.2] * len(values), "|", color="0.3", markersize=6)
    label = "bits per byte of the answers (lower is better)"
    questions = len(np.unique(settings[0].groups()))
    if figure == RIGHT:
        label = f"right answers to {PARTS[part or 'new']} (higher is better)"
        questions = len(settings[0].right(part or "new"))
        axes.xaxis.set_major_formatter("{x:.0%}")
    title = f"{questions:,} questions"
    axes.set(xlabel=label, title=title, ylim=(len(settings) - 0.5, -0.5))
    axes.set_yticks(range(len(settings)), [setting.name for setting in settings])
