"""The rule by which a way is chosen: one standard error, in every part of the questions."""

import numpy as np
import pytest

from tabletune.evaluation.decision import as_good_as_best, choose, decide, standard_error


def answers(right, questions=20):
    """Whether each of so many answers is right: the first `right` of them."""
    return np.arange(questions) < right


def test_the_standard_error_is_that_of_paired_differences():
    one, other = answers(15), answers(10)
    differences = one.astype(float) - other
    assert standard_error(one, other) == pytest.approx(differences.std(ddof=1) / 20**0.5)
    assert standard_error(one, one) == 0


def test_of_equally_good_ways_the_cheapest_is_chosen():
    assert choose([{"cheap": answers(15), "dear": answers(15)}]) == "cheap"


def test_one_wrong_answer_more_is_within_a_standard_error():
    assert as_good_as_best({"cheap": answers(19), "dear": answers(20)}) == ["cheap", "dear"]


def test_three_wrong_answers_more_are_not():
    assert as_good_as_best({"cheap": answers(17), "dear": answers(20)}) == ["dear"]


def test_the_choice_is_as_good_as_the_best_in_every_part():
    parts = [
        {"copy": answers(20), "train": answers(19)},
        {"copy": answers(10), "train": answers(18)},
    ]
    assert choose(parts) == "train"


def test_of_ways_that_are_balanced_alike_the_cheapest_is_chosen():
    """Fixed rows and training are equally good, and copying is best for one part alone."""
    parts = [
        {"copy": answers(20), "fixed": answers(15), "train": answers(16)},
        {"copy": answers(0), "fixed": answers(19), "train": answers(19)},
    ]
    assert choose(parts) == "fixed"


def test_if_no_way_is_as_good_everywhere_the_worst_part_decides():
    parts = [
        {"copy": answers(20), "train": answers(16)},
        {"copy": answers(8), "train": answers(15)},
    ]
    assert choose(parts) == "train"


def test_a_worst_part_better_by_chance_does_not_outweigh_a_part_that_is_clearly_worse():
    """As measured on a table of readings: training had 8 and 16 of 16 right, rows 9 and 10."""
    right_rows, right_trained = answers(9, 16), answers(8, 16)[::-1]
    parts = [
        {"copy": answers(16, 16), "rows": right_rows, "train": right_trained},
        {"copy": answers(0, 16), "rows": answers(10, 16), "train": answers(16, 16)},
    ]
    assert choose(parts) == "train"


def test_a_part_that_was_not_asked_is_no_part_of_the_decision():
    rights = {"new": {"copy": answers(3), "adapter": answers(18)}}
    assert decide(rights, 0.5).parts == ["new"]


def part_of(copied, trained):
    """Right answers of copying and of the fine-tuned model."""
    return {"nearest row, copied": answers(copied), "adapter": answers(trained)}


def test_a_choice_that_is_better_in_one_part_by_more_than_chance_is_sure():
    """Even if the rival is better in the other part: there is one way to ship for both."""
    decision = decide({"reworded": part_of(20, 12), "new": part_of(1, 14)}, 0.5)
    assert decision.choice == "adapter"
    assert decision.is_sure


def test_a_choice_that_is_a_little_better_everywhere_is_not_sure():
    decision = decide({"reworded": part_of(15, 17), "new": part_of(15, 17)}, 0.5)
    assert decision.choice == "adapter"
    assert not decision.is_sure


def test_rivals_of_training_are_the_ways_without_it():
    assert decide({"new": part_of(1, 14)}, 0.5).rivals == ["nearest row, copied"]
    assert decide({"new": part_of(14, 1)}, 0.5).rivals == ["adapter"]
