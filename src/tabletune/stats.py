"""How sure a figure is: its 95% interval, and which differences are real.

Other test rows would have given other numbers. Rows of one question are no independent witnesses,
so whole questions (`groups`, the question's id for each row) are what is drawn again. Fewer than
`FEWEST_GROUPS` of them never suffice: even if all agree, chance alone does that more often than
once in twenty. Then there is no interval, and None stands in its place.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

if TYPE_CHECKING:
    from pandas import DataFrame

FEWEST_GROUPS = 6
# of the bootstrap, where a caller has none of its own
DRAWS = 2000
SEED = 0
# {rate: the column of the answers that it is the mean of}
RATES = {
    "stop_rate": "stopped",
    "structure_rate": "structured",
    "exact_match_rate": "exact_match",
}


def by_group(values: ArrayLike, groups: ArrayLike | None) -> np.ndarray:
    """The sum of `values` in each group: an array with a number a group.

    Without `groups` each row is one.
    """
    values = np.asarray(values, float)
    if groups is None:
        return values
    # positions: for each row the number of its group, from 0
    _, positions = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(positions, values)


def count_groups(groups: ArrayLike) -> int:
    """How many different groups there are among the keys of some rows."""
    return len(np.unique(np.asarray(groups)))


def resampled(
    totals: ArrayLike,
    counts: ArrayLike,
    groups: ArrayLike | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> np.ndarray:
    """`sum(totals) / sum(counts)` for each of many draws of as many groups with replacement.

    An array [draws]. `totals` and `counts` have a number a row, such as nats and tokens. The same
    groups and the same seed give the same draws.
    """
    totals = by_group(totals, groups)  # [groups]
    counts = by_group(counts, groups)
    random = np.random.default_rng(seed)
    size = len(totals)
    at_once = max(1, 2**20 // size)  # a large table's draws have no room all at once
    ratios = []
    for start in range(0, draws, at_once):
        shape = (min(at_once, draws - start), size)
        drawn = random.integers(size, size=shape)  # [draws, groups]
        # the ratio of sums, not the mean of ratios: a long answer counts by its tokens
        ratios.append(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(ratios)


def interval(values: ArrayLike, groups: ArrayLike | None = None) -> list[float] | None:
    """The middle 95% of bootstrap `values`, [low, high].

    None if they were drawn from too few `groups`. Efron's percentile interval is too narrow for few
    groups: their spread is underestimated, and the normal distribution's tails are too thin. Where
    `groups` are given it is wider by as much as Student's t says (the expanded percentile interval
    of Hesterberg, 2015, https://arxiv.org/abs/1411.5279).
    """
    tail = 0.025
    if groups is not None:
        size = count_groups(groups)
        if size < FEWEST_GROUPS:
            return None
        tail = ndtr(-stdtrit(size - 1, 0.975) * math.sqrt(size / (size - 1)))
    limits = [100 * tail, 100 - 100 * tail]
    return [float(np.percentile(values, limit)) for limit in limits]


def mean_interval(
    totals: ArrayLike,
    counts: ArrayLike,
    groups: ArrayLike | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> list[float] | None:
    """95% interval of `sum(totals) / sum(counts)` by drawing groups with replacement.

    None if there are too few.
    """
    groups = np.arange(len(counts)) if groups is None else groups
    # asked before drawing, which costs most of the time
    too_few = count_groups(groups) < FEWEST_GROUPS
    return None if too_few else interval(resampled(totals, counts, groups, draws, seed), groups)


def perplexity_interval(
    scores: "DataFrame",
    part: str,
    groups: ArrayLike | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> list[float] | None:
    """95% interval of the perplexity of a part, "response" or "full", or None.

    `scores` are those of `scoring.score`.
    """
    nll = mean_interval(scores[f"{part}_nll"], scores[f"{part}_tokens"], groups, draws, seed)
    return None if nll is None else [float(limit) for limit in np.exp(nll)]


def rate_interval(successes: ArrayLike, groups: ArrayLike | None = None) -> list[float] | None:
    """95% interval of the share of true ones.

    None for no cases, or for too few groups of several cases. Independent cases: Wilson's (1927),
    which sees a doubt where 11 of 11 succeed (74% to 100%) and the bootstrap none. Cases in
    `groups`: by drawing groups; if all cases are alike, they say no more than one case a group
    would.
    """
    from scipy.stats import binomtest  # slow to import

    successes = np.asarray(successes, bool)
    cases = len(by_group(successes, groups))
    # by_group(…) has one number a group; as many groups as rows means independent cases
    if cases and (cases == len(successes) or successes.all() or not successes.any()):
        limits = binomtest(round(successes.mean() * cases), cases).proportion_ci(method="wilson")
        return [float(limits.low), float(limits.high)]
    return mean_interval(successes, np.ones(len(successes)), groups)


def difference(value: float, ci95: list[float] | None, groups: ArrayLike) -> dict:
    """An entry of a table of differences.

    One is called `significant` only if its interval excludes zero. `groups` has the key of each
    row.
    """
    significant = bool(
        count_groups(groups) >= FEWEST_GROUPS and ci95 is not None and (ci95[0] > 0 or ci95[1] < 0)
    )
    ci95 = None if ci95 is None else [float(limit) for limit in ci95]
    return {"difference": float(value), "ci95": ci95, "significant": significant}


def mean_difference(
    one: ArrayLike,
    other: ArrayLike,
    counts: ArrayLike,
    groups: ArrayLike | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> dict:
    """How much more `one` has than `other` per count, both totals of the same rows.

    An entry of `difference`. In pairs: most of the doubt is in the rows, which are the same for
    both, and cancels.
    """
    more = np.asarray(one, float) - np.asarray(other, float)
    groups = np.arange(len(more)) if groups is None else groups
    ci95 = mean_interval(more, counts, groups, draws, seed)
    return difference(more.sum() / np.sum(counts), ci95, groups)


def rate_difference(one: ArrayLike, other: ArrayLike) -> dict:
    """How much higher the rate of `one` is than that of `other`.

    Both are true or false for the same independent cases. In pairs, by the adjusted formula of
    Agresti and Min (2005, https://doi.org/10.1002/sim.1781).
    """
    one, other = np.asarray(one, bool), np.asarray(other, bool)
    # cases in which both agree say nothing of the difference; 0.5 is the paper's adjustment
    only_one, only_other = (one & ~other).sum() + 0.5, (other & ~one).sum() + 0.5
    cases = len(one) + 2
    middle = (only_one - only_other) / cases
    half = 1.96 * math.sqrt(only_one + only_other - (only_one - only_other) ** 2 / cases) / cases
    limits = [max(-1.0, middle - half), min(1.0, middle + half)]
    return difference(one.mean() - other.mean(), limits, np.arange(len(one)))


def differences(
    one: "tuple[DataFrame, DataFrame]",
    other: "tuple[DataFrame, DataFrame]",
    groups: ArrayLike,
    draws: int = DRAWS,
    seed: int = SEED,
) -> dict[str, dict]:
    """All differences of two models, {figure: entry}, each given as (scores, answers).

    There may be no answers. `groups` has the question of each row of the scores. The answers are to
    independent questions.
    """
    scores, answers = one
    scores_other, answers_other = other
    nll = scores["response_nll"], scores_other["response_nll"], scores["response_tokens"]
    entries = {"log_perplexity": mean_difference(*nll, groups, draws, seed)}
    if len(answers):
        for rate, column in RATES.items():
            if column in answers:
                entries[rate] = rate_difference(answers[column], answers_other[column])
        # every answer weighs the same, and is to a question of its own
        lengths = answers["new_tokens"], answers_other["new_tokens"], np.ones(len(answers))
        entries["mean_new_tokens"] = mean_difference(*lengths, None, draws, seed)
    return entries
