"""Intervals hold what they say they hold, whole questions are resampled, and a difference is one
only if it is real.
"""

import math

import numpy as np
import pandas as pd
import pytest

from tabletune.stats import (
    FEWEST_GROUPS,
    count_groups,
    difference,
    differences,
    interval,
    mean_difference,
    mean_interval,
    perplexity_interval,
    rate_difference,
    rate_interval,
    resampled,
)


def table_of(generator, questions, rows, nll=2.0, between=0.3, within=0.3):
    """Scores of `rows` answers to each of some questions, drawn from a source whose perplexity
    is exp(nll).
    """
    groups = np.repeat(np.arange(questions), rows)
    per_token = (
        nll
        + generator.normal(0, between, questions)[groups]
        + generator.normal(0, within, len(groups))
    )
    tokens = generator.integers(20, 60, len(groups))
    return pd.DataFrame(
        {"response_nll": tokens * per_token, "response_tokens": tokens, "group": groups}
    )


def perplexity(scores):
    return math.exp(scores["response_nll"].sum() / scores["response_tokens"].sum())


def test_the_interval_holds_the_estimate_and_narrows():
    generator = np.random.default_rng(0)
    few, many = (table_of(generator, questions, 1) for questions in (20, 500))
    low, high = perplexity_interval(few, "response", few["group"])
    assert low < perplexity(few) < high
    narrow = perplexity_interval(many, "response", many["group"])
    assert narrow[1] - narrow[0] < (high - low) / 2
    assert perplexity_interval(few, "response", few["group"]) == [low, high]
    assert perplexity_interval(few, "response") == [low, high], "without groups each row is one"


def test_the_interval_covers_the_truth_where_questions_have_many_rows():
    """11 questions of 30 rows each: about 95% of the intervals hold the source's perplexity, and
    of rows alone 40%.
    """
    generator = np.random.default_rng(1)
    hits = {"questions": 0, "rows": 0}
    for _ in range(500):
        table = table_of(generator, 11, 30)
        for by, groups in (("questions", table["group"]), ("rows", None)):
            low, high = perplexity_interval(table, "response", groups, draws=1000)
            hits[by] += low < math.exp(2) < high
    assert 0.92 <= hits["questions"] / 500 <= 0.98
    assert hits["rows"] / 500 < 0.5


def test_few_questions_widen_an_interval_as_students_t_does():
    """Of 1,000 tables of 8 rows; Efron's percentile interval alone holds the truth in fewer than
    90 of 100.
    """
    generator = np.random.default_rng(2)
    hits = {"widened": 0, "plain": 0}
    for _ in range(1000):
        values = generator.normal(2, 0.3, 8)
        drawn = resampled(values, np.ones(8), draws=1000)
        for kind, groups in (("widened", np.arange(8)), ("plain", None)):
            low, high = interval(drawn, groups)
            hits[kind] += low < 2 < high
    assert hits["widened"] / 1000 >= 0.92
    assert hits["plain"] / 1000 < 0.9
    many = np.random.default_rng(0).normal(size=4000)
    assert interval(many, np.arange(1000)) == pytest.approx(interval(many), abs=0.05), (
        "with many there is nothing to widen"
    )


def test_whole_questions_are_drawn():
    """Two questions of opposite rows: every draw has some of each row as often as of its
    question's other rows.
    """
    groups = ["a", "a", "b", "b", "c"]
    totals, counts = [1, 2, 10, 20, 100], [1, 1, 1, 1, 1]
    possible = set()
    for picks in np.ndindex(3, 3, 3):
        sums = [(3, 2), (30, 2), (100, 1)]
        possible.add(round(sum(sums[i][0] for i in picks) / sum(sums[i][1] for i in picks), 9))
    drawn = set(np.round(resampled(totals, counts, groups, 500, 0), 9))
    assert drawn == possible
    shuffled = [4, 2, 0, 3, 1]
    again = resampled(
        *([values[i] for i in shuffled] for values in (totals, counts, groups)), 500, 0
    )
    assert set(np.round(again, 9)) == possible, "the order of the rows is all one"


def test_too_few_questions_have_no_interval():
    few = table_of(np.random.default_rng(0), FEWEST_GROUPS - 1, 30)
    assert perplexity_interval(few, "response", few["group"]) is None
    assert perplexity_interval(few[:2], "response") is None
    assert mean_interval([1, 2], [1, 1]) is None
    assert interval([1.0, 2.0, 3.0], list("aabbc")) is None
    enough = table_of(np.random.default_rng(0), FEWEST_GROUPS, 1)
    assert perplexity_interval(enough, "response", enough["group"]) is not None
    entry = mean_difference(
        few["response_nll"] + 100, few["response_nll"], few["response_tokens"], few["group"]
    )
    assert entry["ci95"] is None
    assert not entry["significant"]
    assert entry["difference"] > 0


def test_the_interval_of_a_rate():
    """Wilson's, as tables have it: 11 of 11, none of 40, and 81 of 263 (Newcombe, 1998)."""
    assert rate_interval([True] * 11) == pytest.approx([0.741, 1.0], abs=1e-3)
    assert rate_interval([False] * 40) == pytest.approx([0.0, 0.0876], abs=1e-3)
    assert rate_interval([True] * 81 + [False] * 182) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert rate_interval([]) is None


def test_the_interval_of_a_rate_covers_the_truth():
    generator = np.random.default_rng(2)
    limits = {hits: rate_interval([True] * hits + [False] * (40 - hits)) for hits in range(41)}
    drawn = generator.binomial(40, 0.9, size=1000)
    assert 0.92 <= np.mean([limits[hits][0] < 0.9 < limits[hits][1] for hits in drawn]) <= 0.99


def test_the_interval_of_a_rate_of_cases_that_belong_together():
    """Ten answers to each of 15 questions that are mostly all right or all wrong say little more
    than 15 answers.
    """
    generator = np.random.default_rng(3)
    hits, groups = 0, np.repeat(np.arange(15), 10)
    for _ in range(150):
        of_question = generator.beta(0.6, 0.4, 15)  # 60% in the mean
        low, high = rate_interval(generator.random(150) < of_question[groups], groups)
        hits += low < 0.6 < high
    assert 0.9 <= hits / 150 <= 0.99
    assert rate_interval([True] * 150, groups) == rate_interval([True] * 15), (
        "all alike: as one case each"
    )
    assert rate_interval([True, False, True], ["a", "a", "b"]) is None


def test_a_difference_is_one_only_if_its_interval_excludes_zero():
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 60, size=40)
    hard = generator.normal(3, 1, size=40)  # rows differ far more than the models do
    base = tokens * hard
    better = tokens * (hard - 0.1 + generator.normal(0, 0.05, size=40))
    same = tokens * (hard + generator.normal(0, 0.2, size=40))
    entry = mean_difference(better, base, tokens)
    assert entry["significant"]
    assert entry["ci95"][0] < entry["difference"] < entry["ci95"][1] < 0
    assert -0.13 < entry["difference"] < -0.07, "pairs: the rows' own spread of 1 cancels"
    assert not mean_difference(same, base, tokens)["significant"]
    assert not difference(1.0, [0.5, 1.5], list("aabbc"))["significant"], (
        "three questions that agree may be chance"
    )
    assert difference(1.0, [0.5, 1.5], list("abcdef"))["significant"]
    assert count_groups(list("aabbc")) == 3


def test_a_difference_of_rates():
    def pairs(both, only_one, only_other, neither):
        one = [True] * (both + only_one) + [False] * (only_other + neither)
        return one, [True] * both + [False] * only_one + [True] * only_other + [False] * neither

    entry = rate_difference(*pairs(0, 40, 0, 0))
    assert entry["difference"] == 1
    assert entry["ci95"] == pytest.approx([0.8728, 1.0], abs=1e-4)
    assert entry["significant"]
    for same in (
        pairs(40, 0, 0, 0),
        pairs(0, 0, 0, 1),
        pairs(20, 3, 2, 15),
        pairs(0, 1, 0, 0),
        pairs(0, 5, 0, 0),
    ):
        assert not rate_difference(*same)["significant"]
    assert rate_difference(*pairs(20, 2, 12, 6))["ci95"][1] < 0
    one, other = pairs(5, 4, 1, 10)
    expected = rate_difference(other, one)
    assert (
        rate_difference(one, other)["difference"]
        == -expected["difference"]
        == pytest.approx(3 / 20)
    )


def test_differences_of_equal_models_are_seldom_called_any():
    """Of 300 pairs of models that differ by chance alone, per question, about one in twenty is
    called different.
    """
    generator = np.random.default_rng(4)
    called = {"questions": 0, "rows": 0, "rate": 0}
    groups = np.repeat(np.arange(11), 30)
    for _ in range(300):
        one, other = (
            generator.normal(3, 0.3, 11)[groups] + generator.normal(0, 0.3, 330) for _ in range(2)
        )
        for by, keys in (("questions", groups), ("rows", None)):
            called[by] += mean_difference(one, other, np.ones(330), keys, draws=200)["significant"]
        called["rate"] += rate_difference(*(generator.random((2, 40)) < 0.7))["significant"]
    assert 3 <= called["questions"] <= 27
    assert 3 <= called["rate"] <= 30
    assert called["rows"] > 100, "rows taken for independent see differences everywhere"


def test_the_differences_of_two_models():
    generator = np.random.default_rng(0)
    base, adapter = table_of(generator, 20, 2, 4.0), table_of(generator, 20, 2, 2.0)
    adapter["response_tokens"] = base["response_tokens"]
    slow = pd.DataFrame({"stopped": [False] * 20, "new_tokens": [128] * 20})
    quick = pd.DataFrame(
        {"stopped": [True] * 20, "new_tokens": np.arange(20), "exact_match": [True] * 20}
    )
    slow["exact_match"] = [True] * 10 + [False] * 10
    entries = differences((adapter, quick), (base, slow), base["group"])
    assert set(entries) == {"log_perplexity", "stop_rate", "exact_match_rate", "mean_new_tokens"}
    assert all(entry["significant"] for entry in entries.values())
    assert entries["log_perplexity"]["difference"] == pytest.approx(
        math.log(perplexity(adapter) / perplexity(base))
    )
    assert set(differences((adapter, ()), (base, ()), base["group"])) == {"log_perplexity"}
