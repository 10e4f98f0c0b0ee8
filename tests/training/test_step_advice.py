"""Too few steps to learn from are said before the training, with the epochs that would be
enough.
"""

import pytest

from tabletune.training.step_advice import ENOUGH_STEPS, few_steps_advice


def test_seven_steps_are_too_few():
    assert few_steps_advice(7, 60, 1) == (
        "7 steps are few to learn from: for 60 examples set epochs to about 6 (40 steps)."
    )


def test_enough_steps_need_no_advice():
    assert few_steps_advice(ENOUGH_STEPS, 200, 1) == ""


def test_the_epochs_count_from_those_that_were_planned():
    assert "epochs to about 8 " in few_steps_advice(10, 43, 2)


def test_part_of_an_epoch_is_counted_as_such():
    assert "epochs to about 4 " in few_steps_advice(5, 400, 0.5)


def test_with_max_steps_it_is_these_that_are_advised():
    advice = few_steps_advice(10, 60, 1, max_steps=10)
    assert "max_steps" in advice
    assert "epochs" not in advice


@pytest.mark.parametrize("steps", [1, 5, 12, 39])
def test_the_epochs_that_are_advised_are_enough(steps):
    advice = few_steps_advice(steps, 50, 1)
    epochs = int(advice.split("about ")[1].split()[0])
    assert steps * epochs >= ENOUGH_STEPS
