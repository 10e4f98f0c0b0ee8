"""How many rows to train on: nested subsets of the training questions, over one and the same test
split."""

import itertools
import random

import base_models
import numpy as np
import pytest
from conftest import TINY
from hypothesis import assume, given
from hypothesis import strategies as st
from table_helpers import examples, formatted, write

from tabletune.data.splits import assign_splits, limit_training, question_key, split_position
from tabletune.errors import StageError

FRACTIONS = 0.1, 0.15


def table_of(questions, seed):
    """The questions of the rows of a table, each once to three times, in some order."""
    rng = random.Random(seed)
    rows = [
        f"question {number}" for number in range(questions) for _ in range(rng.choice([1, 1, 2, 3]))
    ]
    rng.shuffle(rows)
    return rows


def splits_of(rows, train_rows=1.0, split_seed=42):
    """{split: the questions in it}."""
    positions = [split_position(row, split_seed) for row in rows]
    split = limit_training(assign_splits(positions, *FRACTIONS), positions, train_rows)
    names = {"train", "validation", "test", ""}
    return {
        name: {row for row, at in zip(rows, split, strict=True) if at == name} for name in names
    }


@pytest.mark.parametrize("seed", range(8))
def test_a_smaller_training_set_is_part_of_every_larger_one(seed):
    rows = table_of(random.Random(seed).randrange(20, 300), seed)
    sizes = [0.05, 0.1, 0.25, 0.5, 0.9, 1.0]
    sets = [splits_of(rows, size, seed)["train"] for size in sizes]
    assert all(small <= large for small, large in itertools.pairwise(sets))


@pytest.mark.parametrize("seed", range(8))
def test_the_held_out_splits_stay_whatever_train_rows_is(seed):
    rows = table_of(120, seed)
    complete = splits_of(rows, 1.0, seed)
    for size in (0.01, 0.5, 2, 40):
        limited = splits_of(rows, size, seed)
        assert limited["test"] == complete["test"]
        assert limited["validation"] == complete["validation"]


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_rows_changes_no_set(seed):
    rows = table_of(90, seed)
    shuffled = random.Random(seed + 1).sample(rows, len(rows))
    assert splits_of(rows, 0.4, seed) == splits_of(shuffled, 0.4, seed)


def test_all_rows_of_a_question_are_in_or_out():
    rows = table_of(100, 3)
    parts = splits_of(rows, 0.3)
    assert not parts["train"] & parts[""]


def test_the_share_is_of_the_training_questions():
    rows = table_of(200, 5)
    questions = len(splits_of(rows)["train"])
    assert len(splits_of(rows, 0.5)["train"]) == round(0.5 * questions)


def test_above_one_it_is_the_number_of_questions():
    assert len(splits_of(table_of(200, 5), 37)["train"]) == 37


def test_a_small_share_leaves_one_question():
    assert len(splits_of(table_of(50, 5), 0.001)["train"]) == 1


def test_one_is_all():
    rows = table_of(50, 5)
    positions = [split_position(row, 42) for row in rows]
    split = assign_splits(positions, *FRACTIONS)
    assert np.array_equal(limit_training(split, positions, 1.0), split)


@pytest.mark.parametrize("train_rows", [10_000, 7.5])
def test_a_number_that_cannot_be_is_refused_in_one_line(train_rows):
    with pytest.raises(StageError, match=f"train_rows={train_rows}: use a share") as error:
        splits_of(table_of(50, 5), train_rows)
    assert "\n" not in str(error.value)


# --- through the whole of notebook 1


def table_file(folder, order_seed=None):
    """A table of 60 questions with one or two answers each, in an order of its own."""
    rows = [(row, f"answer {number}") for number, row in enumerate(table_of(60, 1))]
    if order_seed is not None:
        random.Random(order_seed).shuffle(rows)
    return write(folder / "table.csv", ["question", "answer"], rows)


def questions(splits):
    """{split: the questions of its rows}."""
    return {name: {prompt[-1]["content"] for prompt, _ in rows} for name, rows in splits.items()}


@pytest.fixture
def complete(tmp_path):
    """The questions of each split of the whole table."""
    _, splits = formatted(tmp_path, table_file(tmp_path))
    return questions(splits)


@pytest.mark.parametrize(
    "changed", [{"seed": 7}, {"train_rows": 0.25}, {"train_rows": 9, "seed": 3}]
)
def test_one_split_seed_gives_one_test_split(tmp_path, complete, changed):
    _, splits = formatted(tmp_path, table_file(tmp_path), **changed)
    assert questions(splits)["test"] == complete["test"]


def test_another_model_gives_the_same_test_split(tmp_path, complete):
    _, splits = formatted(tmp_path, table_file(tmp_path), base_models.cached("gpt2"))
    assert questions(splits)["test"] == complete["test"]


def test_another_order_of_rows_gives_the_same_test_split(tmp_path, complete):
    _, splits = formatted(tmp_path, table_file(tmp_path, order_seed=5))
    assert questions(splits)["test"] == complete["test"]


def test_another_split_seed_gives_another_test_split(tmp_path, complete):
    _, splits = formatted(tmp_path, table_file(tmp_path), split_seed=7)
    assert questions(splits)["test"] != complete["test"]


def test_the_report_counts_what_is_left_out(tmp_path, complete):
    report, splits = formatted(tmp_path, table_file(tmp_path), train_rows=9)
    assert report["questions"]["train"] == len(questions(splits)["train"]) == 9
    assert report["left_out_of_training"]["questions"] == len(complete["train"]) - 9
    assert any(note.startswith("train_rows: 9 of ") for note in report["notes"])


def test_without_train_rows_nothing_is_said(tmp_path):
    report, _ = formatted(tmp_path, table_file(tmp_path))
    assert report["left_out_of_training"] == {"rows": 0, "questions": 0}
    assert not any(note.startswith("train_rows") for note in report["notes"])


# --- the same for any table

SUBJECTS = [
    "cold",
    "COLD",
    "fever",
    "a - b",
    "a / b",
    "C",
    "C#",
    "5",
    "-5",
    "5 %",
    "été",
    "ete",
    "头痛",
    "🤧",
]
ASKED = st.builds(
    "{} {}{}".format,
    st.sampled_from(["What helps against", "what helps  against", "Is it", "Und"]),
    st.one_of(st.sampled_from(SUBJECTS), st.integers(0, 60).map(str)),
    st.sampled_from(["?", "", "!", " ?"]),
)
TABLE_ROWS = st.lists(st.tuples(ASKED, st.integers(0, 9).map("Rest {} days.".format)), min_size=9)
VARIANTS = st.fixed_dictionaries(
    {"seed": st.integers(0, 99), "train_rows": st.sampled_from([0.1, 0.5, 2, 1.0])}
)


def asked_keys(folder, rows, base_model=TINY, **parameters):
    """{split: what its rows ask} of these rows, as a table in a file."""
    path = write(folder / "table.csv", ["question", "answer"], rows)
    _, splits = formatted(folder, path, base_model, max_dropped=1, **parameters)
    return {
        name: {question_key([prompt[-1]["content"]]) for prompt, _ in conversations}
        for name, conversations in splits.items()
    }


@given(TABLE_ROWS, st.integers(0, 9), VARIANTS, st.randoms(), st.booleans())
@examples(25)
def test_the_held_out_questions_hang_on_split_seed_alone(
    tmp_path_factory, rows, split_seed, variant, random_order, other_model
):
    """Whatever the seed, `train_rows`, the base model and the order of the rows are."""
    assume(len({question_key([question]) for question, _ in rows}) >= 6)
    folder = tmp_path_factory.mktemp("table")
    before = asked_keys(folder, rows, split_seed=split_seed)
    shuffled = list(rows)
    random_order.shuffle(shuffled)
    base_model = base_models.cached("gpt2") if other_model else TINY
    after = asked_keys(folder, shuffled, base_model, split_seed=split_seed, **variant)
    assert after["test"] == before["test"]
    assert after["validation"] == before["validation"]
    assert after["train"] <= before["train"]


GROUPINGS = st.sampled_from([{}, {"near_duplicate_threshold": 0.7}, {"split_by": "row"}])


@given(TABLE_ROWS, st.integers(0, 9), st.floats(0.01, 1), st.floats(0.01, 1), GROUPINGS)
@examples(12)
def test_of_two_training_sets_the_smaller_is_part_of_the_larger(
    tmp_path_factory, rows, split_seed, one, other, grouping
):
    """However rows that are alike are kept together."""
    assume(len({question_key([question]) for question, _ in rows}) >= 6)
    folder = tmp_path_factory.mktemp("table")
    small, large = (
        asked_keys(folder, rows, split_seed=split_seed, train_rows=share, **grouping)["train"]
        for share in sorted([one, other])
    )
    assert small <= large
