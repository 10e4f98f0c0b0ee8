"""Which way to answer should be shipped: the decision of notebook 5, in words that need no
statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tabletune.evaluation.baselines import (
    ADAPTER,
    ADAPTER_CONTEXT,
    BASE,
    BASE_FIXED,
    BASE_NEAREST,
    CONSTANT,
    COPY,
)
from tabletune.report.baselines import ORDER
from tabletune.report.text import PARTS, with_interval
from tabletune.stats import FEWEST_GROUPS, rate_difference, rate_interval

TRAINED = (ADAPTER_CONTEXT.name, ADAPTER.name)
ADVICE = {
    COPY.name: "Do not fine-tune for this table: copy the answer of the most similar row.",
    BASE.name: "Do not fine-tune for this table: the base model answers these questions as it is.",
    BASE_FIXED.name: "Do not fine-tune for this table: "
    "put a few fixed rows into the base model's prompt.",
    BASE_NEAREST.name: "Do not fine-tune for this table: "
    "put the most similar rows into the base model's prompt.",
    ADAPTER.name: "Training was worth it: ship the fine-tuned model.",
    ADAPTER_CONTEXT.name: "Training was worth it: "
    "ship the fine-tuned model, with the most similar rows in its prompt.",
}
IN_WORDS = {
    CONSTANT.name: "always the same answer",
    COPY.name: "copying the most similar row",
    BASE.name: "the base model",
    BASE_FIXED.name: "the base model with fixed rows in its prompt",
    BASE_NEAREST.name: "the base model with the most similar rows in its prompt",
    ADAPTER.name: "the fine-tuned model",
    ADAPTER_CONTEXT.name: "the fine-tuned model with the most similar rows in its prompt",
}
NAMES = {"table": "questions of the table as they stand"}  # after a number
NOTHING = "Nothing works for this table yet: ship none of these."
TOO_FEW = "There are too few questions to say what to ship."
HELP = "What may help: context_rows in notebook 1, more rows, more epochs, a larger base model."


@dataclass(frozen=True)
class Decision:
    """What to ship: `choice` is the name of a way, or None if nothing works; `best` comes nearest.

    The decision rests on `parts` of the questions. `rights` has for each way whether its answers to
    these are right, [questions].
    """

    choice: str | None
    best: str | None
    parts: list[str]
    rights: dict[str, np.ndarray]

    @property
    def subject(self) -> str:
        """The way that the sentences are about: the choice, or what comes nearest."""
        return self.choice or self.best or ""


def standard_error(one: np.ndarray, other: np.ndarray) -> float:
    """The standard error of the difference of two rates on the same questions, in pairs."""
    differences = np.asarray(one, float) - np.asarray(other, float)
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def best_of(rights: Mapping[str, np.ndarray]) -> str:
    """The way with most right answers; of equal ones the first, which is the cheapest."""
    return max(rights, key=lambda name: np.mean(rights[name]))


def as_good_as_best(rights: Mapping[str, np.ndarray]) -> list[str]:
    """The ways that are as good as the best one, the cheapest first.

    "As good" is within one standard error of their difference, which is the usual rule to choose
    among simpler and more complex models (Breiman et al., Classification and Regression Trees,
    1984). A single wrong answer more is within it.
    """
    best = rights[best_of(rights)]
    names = []
    for name, right in rights.items():
        # rights are in the order of what a question costs, so the first that is good enough is the
        # cheapest
        missing = np.mean(best) - np.mean(right)
        if missing <= standard_error(best, right) + 1e-9:  # rounding
            names.append(name)
    return names


def works(rights: Mapping[str, np.ndarray], least_right: float) -> bool:
    """Whether some way answers the share `least_right` right, and one answer for all does not."""
    best = np.mean(rights[best_of(rights)])
    return bool(best >= least_right and CONSTANT.name not in as_good_as_best(rights))


def choose(parts: Sequence[Mapping[str, np.ndarray]]) -> str:
    """The cheapest way that is as good as the best in every part of the questions.

    If there is none, as one is good here and another one there: the way whose worst part is best.
    """
    as_good = [as_good_as_best(rights) for rights in parts]
    for name in as_good[0]:
        if all(name in names for names in as_good):
            return name
    return max(parts[0], key=lambda name: min(np.mean(rights[name]) for rights in parts))


def enough(rights: Mapping[str, np.ndarray]) -> bool:
    """Whether a part has enough questions to decide anything."""
    return any(len(right) >= FEWEST_GROUPS for right in rights.values())


def decide(rights: Mapping[str, Mapping[str, np.ndarray]], least_right: float) -> Decision:
    """What to ship, by `rights`: {part of the questions: {way: whether its answers are right}}.

    The decision rests on reworded and on new questions, as nobody asks quite as the table does, and
    of these on the parts that some way can answer at all: what the table does not have, none can
    know. A part of fewer than FEWEST_GROUPS questions decides nothing.
    """
    parts = [part for part in ("reworded", "new") if enough(rights.get(part, {}))]
    answered = [part for part in parts if works(rights[part], least_right)]
    used = answered or parts
    if not used:
        return Decision(None, None, [], {})
    names = list(rights[used[0]])
    pooled = {name: np.concatenate([rights[part][name] for part in used]) for name in names}
    best = choose([rights[part] for part in used])
    choice = best if answered and np.mean(pooled[best]) >= least_right else None
    return Decision(choice, best, used, pooled)


def rights_of(checked: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, np.ndarray]]:
    """{part: {way: whether its answers are right}} of what `baselines.check_results` returns."""
    rights: dict[str, dict[str, np.ndarray]] = {}
    for name, lines in checked.items():
        for part, some in lines.groupby("part", sort=False):
            rights.setdefault(part, {})[name] = some["right"].to_numpy(bool)
    return rights


def recommend(checked: Mapping[str, pd.DataFrame], ways: Mapping[str, dict], least_right: float):
    """The `verdict` of `baselines/metrics.json`: the choice, and sentences, the most important
    first.

    `ways` are the entries of the ways in the metrics, for what a question costs.
    """
    rights = rights_of(checked)
    decision = decide(rights, least_right)
    sentences = [what_to_do(decision)]
    if decision.best is not None:
        for part in ORDER:
            if part in rights:
                line = evidence(decision, part, rights[part])
                if must_be_refused(checked, part):
                    line += " To say that the table has nothing counts as right here."
                sentences.append(line)
        sentences += against(decision)
        sentences.append(costs(decision, ways))
    if decision.choice is None:
        sentences.append(HELP)
    return {
        "choice": decision.choice,
        "best": decision.best,
        "parts": decision.parts,
        "least_right": least_right,
        "sentences": sentences,
    }


def must_be_refused(checked: Mapping[str, pd.DataFrame], part: str) -> bool:
    """Whether most questions of a part have no answer in the table, so that "nothing" is right."""
    lines = next(iter(checked.values()))
    lines = lines[lines["part"] == part]
    return "answerable" in lines and bool((~lines["answerable"].astype(bool)).mean() > 0.5)


def what_to_do(decision: Decision) -> str:
    """What to do, in one sentence."""
    if decision.best is None:
        return TOO_FEW
    if decision.choice is None:
        return NOTHING
    return ADVICE[decision.choice]


def evidence(decision: Decision, part: str, rights: Mapping[str, np.ndarray]) -> str:
    """How many questions of a part the choice answers right; of a part that no way can answer, the
    best of all.
    """
    too_few = not enough(rights)
    hopeless = part not in (*decision.parts, "table") and not too_few
    name = best_of(rights) if hopeless else decision.subject
    right = rights[name]
    share = with_interval(float(right.mean()), rate_interval(right), ".0%")
    kind = NAMES.get(part, PARTS[part])
    line = f"Of {len(right)} {kind}, {IN_WORDS[name]} gets {right.sum()} right: {share}."
    if too_few:
        line += " Too few to decide anything."
    elif hopeless:
        line += " No way gets more: the table does not say enough to answer them."
    return line


def against(decision: Decision) -> list[str]:
    """How the choice compares with training, or with the best way without it, and whether that is
    sure.
    """
    rights = decision.rights
    subject = decision.subject
    rivals = [name for name in TRAINED if name in rights]
    if subject in TRAINED:
        rivals = [name for name in rights if name not in TRAINED]
    rival = max(rivals, key=lambda name: rights[name].mean())
    entry = rate_difference(rights[subject], rights[rival])
    points = [f"{100 * value:+.0f}" for value in (entry["difference"], *entry["ci95"])]
    kinds = "the same questions" if len(decision.parts) == 1 else "both kinds together"
    sentences = [
        f"Of {kinds}, {IN_WORDS[rival]} gets {rights[rival].sum()} of {len(rights[rival])} right, "
        f"where {IN_WORDS[subject]} gets {rights[subject].sum()}: "
        f"a difference of {points[0]} points ({points[1]} – {points[2]})."
    ]
    if decision.choice is not None and not entry["significant"]:
        sentences.append(
            "That may be chance; more questions (`baseline_samples`) would tell. "
            "Of ways that are equally good, the cheapest is named."
        )
    return sentences


def costs(decision: Decision, ways: Mapping[str, dict]) -> str:
    """What a question costs with the choice, and with the trained model."""
    names = [decision.subject]
    names += [name for name in TRAINED if name in ways and name not in names]
    parts = []
    for name in names:
        tokens, seconds = ways[name]["tokens_a_question"], ways[name]["seconds_a_question"]
        parts.append(f"{IN_WORDS[name]}, {tokens:,.0f} tokens and {seconds:.2g} seconds")
    return "What a question costs on this machine: " + "; ".join(parts) + "."
