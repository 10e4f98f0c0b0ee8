"""Which way to answer should be shipped: the rule of notebook 5.

The cheapest way that is as good as the best one, within one standard error, for reworded and for
new questions. `recommendation` puts it in words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from tabletune.evaluation.baselines import ADAPTER, ADAPTER_CONTEXT, CONSTANT
from tabletune.stats import FEWEST_GROUPS, rate_difference

TRAINED = (ADAPTER_CONTEXT.name, ADAPTER.name)


@dataclass(frozen=True)
class Decision:
    """What to ship: `choice` is the name of a way, or None if nothing works; `best` comes nearest.

    The decision rests on `parts` of the questions; `rights` has for these whether the answers of
    each way are right, {part: {way: [questions]}}. `unanswered` are the parts that count, too, but
    that no way answers well enough. `best_of_parts` has the best way for each of `parts`, if no
    single way is good enough for all of them.
    """

    choice: str | None
    best: str | None
    parts: list[str]
    rights: dict[str, Mapping[str, np.ndarray]]
    unanswered: list[str] = field(default_factory=list)
    best_of_parts: dict[str, str] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """The way that the sentences are about: the choice, or what comes nearest."""
        return self.choice or self.best or ""

    @property
    def rivals(self) -> list[str]:
        """The ways that the subject is compared with.

        They are those with training or, if the subject was trained itself, those without.
        """
        names = self.rights[self.parts[0]]  # each part has them all
        is_trained = self.subject in TRAINED
        return [name for name in names if (name in TRAINED) != is_trained]

    def difference(self, part: str, rival: str) -> dict:
        """How much more often the subject is right than a rival, on a part of the questions.

        The answers are compared in pairs; the result is an entry of `stats.difference`.
        """
        return rate_difference(self.rights[part][self.subject], self.rights[part][rival])

    @property
    def is_sure(self) -> bool:
        """Whether the subject is better than each rival, in some part, by more than chance."""
        for rival in self.rivals:
            entries = [self.difference(part, rival) for part in self.parts]
            if not any(entry["significant"] and entry["difference"] > 0 for entry in entries):
                return False
        return True


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
    # rates from 0 to 1; in pairs, as both ways were asked the same questions
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
    part is best, unless another one is as good in every part and better in one. The choice is the
    cheapest way that is as good as that one in every part.
    """
    as_good = [as_good_as_best(rights) for rights in parts]
    for name in as_good[0]:
        if all(name in names for names in as_good):
            return name

    # no way is good everywhere: the one that is least bad where it is worst
    def worst_part(name: str) -> float:
        return min(float(np.mean(rights[name])) for rights in parts)

    balanced = max(parts[0], key=worst_part)
    # a worst part that is better by chance does not make up for another part that is clearly worse
    better = [name for name in parts[0] if is_better(name, balanced, parts)]
    if better:
        balanced = max(better, key=worst_part)
    for name in parts[0]:
        if all(is_as_good(rights[name], rights[balanced]) for rights in parts):
            return name
    return balanced


def is_better(one: str, other: str, parts: Sequence[Mapping[str, np.ndarray]]) -> bool:
    """Whether a way is as good as another in every part, and the other is not so in some part."""
    if not all(is_as_good(rights[one], rights[other]) for rights in parts):
        return False
    return not all(is_as_good(rights[other], rights[one]) for rights in parts)


def enough(rights: Mapping[str, np.ndarray]) -> bool:
    """Whether a part has enough questions to decide anything."""
    return any(len(right) >= FEWEST_GROUPS for right in rights.values())


def decide(rights: Mapping[str, Mapping[str, np.ndarray]], least_right: float) -> Decision:
    """What to ship, by `rights`: {part of the questions: {way: whether its answers are right}}.

    The decision rests on reworded and on new questions, as nobody asks quite as the table does, and
    of these on the parts that some way can answer at all: what the table does not have, none can
    know. Of labels only the new ones count: nobody needs the label of a text that has one. A part
    of fewer than FEWEST_GROUPS questions decides nothing.

    An example, with `least_right` 0.7 and 40 questions a part: copying gets 38 reworded and 2 new
    ones right, the adapter 30 and 3. No way answers new ones, so the reworded ones decide alone,
    and copying is the choice; `unanswered` is ["new"].
    """
    has_labels = any(CONSTANT.name in of_part for of_part in rights.values())
    deciding = ["new"] if has_labels else ["reworded", "new"]
    parts = [part for part in deciding if enough(rights.get(part, {}))]
    # the parts that some way can answer; if there is none, all of them say what comes nearest
    answered = [part for part in parts if works(rights[part], least_right)]
    used = answered or parts
    if not used:
        return Decision(None, None, [], {})
    rights_used = {part: rights[part] for part in used}
    names = list(rights[used[0]])
    # the questions of all parts that are used, one after the other
    pooled = {name: np.concatenate([rights[part][name] for part in used]) for name in names}
    best = choose([rights[part] for part in used])
    if len(answered) == 1 and np.mean(pooled[best]) < least_right:
        best = best_of(pooled)  # a cheaper way, as good as this one, is just below the limit
    unanswered = [part for part in parts if part not in answered]
    if answered and np.mean(pooled[best]) >= least_right:
        return Decision(best, best, used, rights_used, unanswered)
    # one way is good here, another one there: the sentences name both
    best_of_parts = {part: choose([rights[part]]) for part in answered}
    return Decision(None, best, used, rights_used, unanswered, best_of_parts)


def rights_of(checked: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, np.ndarray]]:
    """{part: {way: whether its answers are right}} of what `baselines.check_results` returns."""
    rights: dict[str, dict[str, np.ndarray]] = {}
    for name, lines in checked.items():
        for part, some in lines.groupby("part", sort=False):
            rights.setdefault(part, {})[name] = some["right"].to_numpy(bool)
    return rights
