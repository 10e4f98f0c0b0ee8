"""Which way to answer should be shipped: the decision of notebook 5, in words that need no
statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
WORTH_IT, PROBABLY_WORTH_IT = "Training was worth it", "Training was probably worth it"
ONLY_OF_THE_TABLE = (
    "That is for questions that the table has, in whatever words: "
    "of new ones, no way answers enough right."
)
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
MIXED = "No way answers both kinds of questions well enough"
TOO_FEW = (
    "There are too few questions to say what to ship. Ask more of them (`baseline_samples`), or "
    "keep more for the test in notebook 1 (`test_fraction`)."
)
HELP = "What may help: context_rows in notebook 1, more rows, more epochs, a larger base model."


@dataclass(frozen=True)
class Decision:
    """What to ship: `choice` is the name of a way, or None if nothing works; `best` comes nearest.

    The decision rests on `parts` of the questions. `rights` has for each way whether its answers to
    these are right, [questions]. `unanswered` are the parts that count, too, but that no way
    answers well enough. `best_of_parts` has the best way for each of `parts`, if no way is good
    enough for all of them.
    """

    choice: str | None
    best: str | None
    parts: list[str]
    rights: dict[str, np.ndarray]
    unanswered: list[str] = field(default_factory=list)
    best_of_parts: dict[str, str] = field(default_factory=dict)

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


def is_as_good(right: np.ndarray, best: np.ndarray) -> bool:
    """Whether a way is as good as the best one, by which answers of both are right, [questions].

    "As good" is within one standard error of their difference, which is the usual rule to choose
    among simpler and more complex models (Breiman et al., Classification and Regression Trees,
    1984). A single wrong answer more is within it.
    """
    missing = np.mean(best) - np.mean(right)
    return bool(missing <= standard_error(best, right) + 1e-9)  # rounding


def as_good_as_best(rights: Mapping[str, np.ndarray]) -> list[str]:
    """The ways that are as good as the best one, the cheapest first."""
    best = rights[best_of(rights)]
    # rights are in the order of what a question costs, so the first that is good enough is the
    # cheapest
    return [name for name, right in rights.items() if is_as_good(right, best)]


def works(rights: Mapping[str, np.ndarray], least_right: float) -> bool:
    """Whether some way answers the share `least_right` right, and one answer for all does not."""
    best = np.mean(rights[best_of(rights)])
    return bool(best >= least_right and CONSTANT.name not in as_good_as_best(rights))


def choose(parts: Sequence[Mapping[str, np.ndarray]]) -> str:
    """The cheapest way that is as good as the best in every part of the questions.

    If there is none, as one is good here and another one there, the best is the way whose worst
    part is best, and the choice is the cheapest way that is as good as that one in every part.
    """
    as_good = [as_good_as_best(rights) for rights in parts]
    for name in as_good[0]:
        if all(name in names for names in as_good):
            return name
    balanced = max(parts[0], key=lambda name: min(np.mean(rights[name]) for rights in parts))
    for name in parts[0]:
        if all(is_as_good(rights[name], rights[balanced]) for rights in parts):
            return name
    return balanced


def enough(rights: Mapping[str, np.ndarray]) -> bool:
    """Whether a part has enough questions to decide anything."""
    return any(len(right) >= FEWEST_GROUPS for right in rights.values())


def decide(rights: Mapping[str, Mapping[str, np.ndarray]], least_right: float) -> Decision:
    """What to ship, by `rights`: {part of the questions: {way: whether its answers are right}}.

    The decision rests on reworded and on new questions, as nobody asks quite as the table does, and
    of these on the parts that some way can answer at all: what the table does not have, none can
    know. Of labels only the new ones count: nobody needs the label of a text that has one. A part
    of fewer than FEWEST_GROUPS questions decides nothing.
    """
    has_labels = any(CONSTANT.name in of_part for of_part in rights.values())
    deciding = ["new"] if has_labels else ["reworded", "new"]
    parts = [part for part in deciding if enough(rights.get(part, {}))]
    answered = [part for part in parts if works(rights[part], least_right)]
    used = answered or parts
    if not used:
        return Decision(None, None, [], {})
    names = list(rights[used[0]])
    pooled = {name: np.concatenate([rights[part][name] for part in used]) for name in names}
    best = choose([rights[part] for part in used])
    if len(answered) == 1 and np.mean(pooled[best]) < least_right:
        best = best_of(pooled)  # a cheaper way, as good as this one, is just below the limit
    unanswered = [part for part in parts if part not in answered]
    if answered and np.mean(pooled[best]) >= least_right:
        return Decision(best, best, used, pooled, unanswered)
    best_of_parts = {part: choose([rights[part]]) for part in answered}
    return Decision(None, best, used, pooled, unanswered, best_of_parts)


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
        for part in sorted(ORDER, key=lambda part: part not in decision.parts):
            if part in rights:
                line = evidence(decision, part, rights[part])
                if must_be_refused(checked, part):
                    line += " The table cannot answer most of these: to say so counts as right."
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
    """What to do, in one or two sentences."""
    if decision.best is None:
        return TOO_FEW
    if decision.choice is not None:
        advice = ADVICE[decision.choice]
        if decision.choice in TRAINED and not difference_to_rival(decision)["significant"]:
            advice = advice.replace(WORTH_IT, PROBABLY_WORTH_IT)
        if "new" in decision.unanswered:
            advice += f" {ONLY_OF_THE_TABLE}"
        return advice
    if decision.best_of_parts:
        names = [
            f"for {PARTS[part]}, {IN_WORDS[name]}" for part, name in decision.best_of_parts.items()
        ]
        return f"{MIXED}. The best ones are, {'; '.join(names)}."
    return NOTHING


def evidence(decision: Decision, part: str, rights: Mapping[str, np.ndarray]) -> str:
    """How many questions of a part the choice answers right; of a part that no way can answer, the
    best of all.
    """
    too_few = not enough(rights)
    hopeless = part in decision.unanswered
    name = best_of(rights) if hopeless else decision.subject
    right = rights[name]
    share = with_interval(float(right.mean()), rate_interval(right), ".0%")
    kind = NAMES.get(part, PARTS[part])
    line = f"Of {len(right)} {kind}, {IN_WORDS[name]} gets {right.sum()} right: {share}."
    if too_few:
        line += " Too few to decide anything."
    elif hopeless and CONSTANT.name in as_good_as_best(rights):
        same = rights[CONSTANT.name].sum()
        line += f" Always the same answer gets {same}, and no way is clearly better than that."
    elif hopeless:
        line += " No way gets more."
    return line


def rival_of(decision: Decision) -> str:
    """The way that the choice is compared with: the better trained one, or if the choice was
    trained, the best one without training.
    """
    rivals = [name for name in TRAINED if name in decision.rights]
    if decision.subject in TRAINED:
        rivals = [name for name in decision.rights if name not in TRAINED]
    return max(rivals, key=lambda name: decision.rights[name].mean())


def difference_to_rival(decision: Decision) -> dict:
    """How much more often the choice is right than `rival_of`, in pairs of questions: an entry of
    `stats.difference`.
    """
    rights = decision.rights
    return rate_difference(rights[decision.subject], rights[rival_of(decision)])


def against(decision: Decision) -> list[str]:
    """How the choice compares with training, or with the best way without it, and whether that is
    sure.
    """
    rights = decision.rights
    subject, rival = decision.subject, rival_of(decision)
    entry = difference_to_rival(decision)
    points = [f"{100 * value:+.0f}" for value in (entry["difference"], *entry["ci95"])]
    kinds = f"the {PARTS[decision.parts[0]]}"
    if len(decision.parts) > 1:
        kinds = "the reworded and the new questions together"
    sentences = [
        f"Of {kinds}, {IN_WORDS[rival]} gets {rights[rival].sum()} of {len(rights[rival])} right, "
        f"where {IN_WORDS[subject]} gets {rights[subject].sum()}: "
        f"a difference of {points[0]} percentage points ({points[1]} – {points[2]})."
    ]
    if decision.choice is not None and not entry["significant"]:
        sentences.append(
            "That may be chance; more questions (`baseline_samples`, or `test_fraction` in "
            "notebook 1) would tell. Of ways that are equally good, the cheapest is named."
        )
    return sentences


def costs(decision: Decision, ways: Mapping[str, dict]) -> str:
    """What a question costs with the choice, and with the trained model."""
    names = [decision.subject]
    names += [name for name in TRAINED if name in ways and name not in names]
    parts = []
    for name in names:
        tokens, seconds = ways[name]["tokens_a_question"], ways[name]["seconds_a_question"]
        time = f"{seconds:.2g} seconds" if seconds >= 0.01 else "less than 0.01 seconds"
        parts.append(f"{IN_WORDS[name]}, {tokens:,.0f} tokens and {time}")
    return "What a question costs on this machine: " + "; ".join(parts) + "."
