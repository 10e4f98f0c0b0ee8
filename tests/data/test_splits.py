"""data.splits."""

import random
from collections import Counter

import datasets
import pytest
from table_helpers import CITIES, NAMES, formatted, jsonl, pairs, write

from tabletune.data.duplicates import words
from tabletune.data.splits import assign_splits, question_key, split_position
from tabletune.errors import StageError


def places(questions, seed=42):
    return [split_position(question, seed) for question in questions]


def test_splits_do_not_move():
    keys = [f"issue {i}" for i in range(300)]
    split = assign_splits(places(keys), 0.1, 0.15)
    sizes = Counter(split)
    assert 15 < sizes["validation"] < 50
    assert 25 < sizes["test"] < 70
    order = random.Random(0).sample(range(300), 300)
    assert list(assign_splits(places([keys[i] for i in order]), 0.1, 0.15)) == list(split[order])
    more = [*keys, *(f"new {i}" for i in range(300))]
    assert list(assign_splits(places(more), 0.1, 0.15)[:300]) == list(split)
    assert list(assign_splits(places(keys, seed=43), 0.1, 0.15)) != list(split)


@pytest.mark.parametrize("questions", [3, 4, 5, 10])
def test_small_tables_get_every_split(questions):
    for seed in range(50):
        split = assign_splits(places([f"q{i}" for i in range(questions)] * 2, seed), 0.1, 0.1)
        assert set(split) == {"train", "validation", "test"}
        assert list(split[:questions]) == list(split[questions:])


def test_too_few_questions_are_refused():
    with pytest.raises(StageError, match="at least 3"):
        assign_splits(places(["a", "b", "a"]), 0.1, 0.1)


@pytest.mark.parametrize(("validation", "test"), [(0, 0.15), (0.15, 0), (0, 0), (1e-9, 0.15)])
def test_an_empty_split_takes_one_question_and_leaves_the_others_as_they_are(validation, test):
    positions = places([f"q{number}" for number in range(400)])
    split = assign_splits(positions, validation, test)
    fractions = {"validation": validation, "test": test}
    for name, fraction in fractions.items():
        if fraction < 1e-6:
            assert (split == name).sum() == 1
        else:
            assert 0.1 < (split == name).mean() < 0.2
    assert (split == "train").mean() > 0.8


def test_an_empty_training_split_takes_a_question_of_the_largest():
    split = assign_splits([0.1, 0.2, 0.3, 0.4, 0.4], 0.1, 0.85)
    assert sorted(split) == ["test", "test", "test", "train", "validation"]


def test_case_and_punctuation_make_no_other_question():
    assert (
        question_key(["Sore Throat"])
        == question_key(["sore  throat!"])
        != question_key(["Sore Foot"])
    )
    assert question_key(["?!"]) != question_key(["..."])
    assert words("Tea! (-5) C# 50% ?") == ["tea", "-5", "c#", "50%"]
    assert words("?") == ["?"]


@pytest.mark.parametrize("held_out", [["test"], ["validation"], ["test", "validation"]])
def test_official_splits_stay(tmp_path, held_out):
    """Those that the source lacks are drawn from its training split; what is asked in two is
    counted, not moved.
    """
    for name in held_out:
        rows = [("Question 1?", f"Answer to {name}."), *((f"{name} {i}?", "x") for i in range(9))]
        write(tmp_path / "t" / f"{name}.csv", NAMES, rows)
    write(
        tmp_path / "t" / "train.csv", NAMES, [(f"Question {i}?", f"Answer {i}.") for i in range(50)]
    )
    report, splits = formatted(tmp_path, tmp_path / "t")
    for name in held_out:
        assert len(splits[name]) == 10
        assert ("Question 1?", f"Answer to {name}.") in pairs({name: splits[name]})
    asked = {
        name: {question for question, _ in pairs({name: split})} for name, split in splits.items()
    }
    drawn = {"test", "validation"} - set(held_out)
    assert all(0 < len(asked[name]) < 25 and not asked[name] & asked["train"] for name in drawn)
    if "Question 1?" in asked["train"]:
        assert report["leaks"] == dict.fromkeys(sorted(held_out, reverse=True), 1)
        counts = " and ".join(f"1 of 10 rows of the {name} split" for name in report["leaks"])
        assert any(
            note.startswith(f"Asked in training, too: {counts}.") for note in report["notes"]
        )
    assert sum(report["splits"].values()) == 50 + 10 * len(held_out)


def test_rows_of_one_question_have_one_group(tmp_path):
    rows = [(f"Question {i % 5}{'!' * (i % 2)}", f"Answer {i}.") for i in range(10)]
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    splits = datasets.load_from_disk(tmp_path / "dataset")
    groups = [
        (row["group"], question_key([row["prompt"][0]["content"]]))
        for split in splits.values()
        for row in split
    ]
    assert len(set(groups)) == len({group for group, _ in groups}) == 5
    assert report["rows_a_question"] == [[2], [5]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 30 - 5?", "What is 30 * 5?"),
        ("What is 30 - 5?", "What is 30 / 5?"),
        ("What is 30-5?", "What is 30/5?"),
        ("What is 30 − 5?", "What is 30 × 5?"),
        ("What is 30 ÷ 5?", "What is 30 × 5?"),
        ("What is 30 ＋ 5?", "What is 30 － 5?"),
        ("What is a - b?", "What is a / b?"),
        ("What is 2x - 1?", "What is 2x / 1?"),
        ("Is it -5?", "Is it 5?"),
        ("Is it −5 °C?", "Is it 5 °C?"),
        ("What is 5 + (-3)?", "What is 5 + (3)?"),
        ("What is 5% of 10?", "What is 5 of 10?"),
        ("What is 5‰ of 10?", "What is 5% of 10?"),
        ("What is C#?", "What is C?"),
        ("What is C++?", "What is C?"),
        ("What is C++?", "What is C#?"),
        ("Is it 5°?", "Is it 5?"),
        ("Is it 5 €?", "Is it 5 $?"),
        ("What is 1/2?", "What is 12?"),
        ("What is 2^3?", "What is 2*3?"),
        ("What does % do?", "What does & do?"),
        ("What is 3 < 4?", "What is 3 > 4?"),
    ],
)
def test_signs_make_another_question(one, other):
    assert question_key([one]) != question_key([other])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 30 − 5?", "what is 30-5"),
        ("What is 30 – 5?", "What is 30 - 5?"),
        ("What is 30 × 5?", "What is 30 * 5?"),
        ("What helps a sore-throat?", "What helps a sore throat"),
        ("Tea - or coffee?", "Tea, or coffee?"),
        ("Tea — or coffee?", "Tea, or coffee?"),
        ("**Bold** words", "bold words"),
        ("Cold/Cough", "cold cough"),
        ("# Heading", "heading"),
        ("- item", "item"),
        ("Athlete's Foot", "athlete’s foot"),
    ],
)
def test_other_marks_make_no_other_question(one, other):
    assert question_key([one]) == question_key([other])


def test_split_seed_moves_the_test_set_and_seed_does_not(tmp_path):
    table = write(
        tmp_path / "t.csv", NAMES, [(f"Question {i}?", f"Answer {i}.") for i in range(60)]
    )
    one = formatted(tmp_path, table)[1]["test"]
    assert formatted(tmp_path, table, seed=7)[1]["test"] == one
    assert formatted(tmp_path, table, split_seed=7)[1]["test"] != one


def test_one_prompt_with_many_answers_is_split_by_row(tmp_path):
    rows = [("Write a headline.", f"{city} wakes up to rain") for city in CITIES]
    table = write(tmp_path / "t.csv", NAMES, rows)
    with pytest.raises(StageError, match="set split_by: row"):
        formatted(tmp_path, table)
    report, _ = formatted(tmp_path, table, split_by="row")
    assert min(report["splits"].values()) > 0
    assert sum(report["splits"].values()) == 12
    with pytest.raises(StageError, match="split_by='rows': use one of question, row"):
        formatted(tmp_path, table, split_by="rows")


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Training", "dev", "EVAL")])
def test_column_that_names_the_split_is_used(tmp_path, names):
    rows = [{"question": f"q{i}", "answer": "a", "split": names[min(i // 6, 2)]} for i in range(18)]
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows))
    assert report["splits"] == {"train": 6, "validation": 6, "test": 6}
    assert {question for question, _ in pairs({"test": splits["test"]})} == {
        f"q{i}" for i in range(12, 18)
    }


def test_split_column_can_be_set(tmp_path):
    rows = [
        {"question": f"q{i}", "answer": "a", "fold": "test" if i < 4 else "train"}
        for i in range(18)
    ]
    report, _ = formatted(tmp_path, jsonl(tmp_path, *rows), split_column="fold")
    assert report["splits"]["test"] == 4
    with pytest.raises(StageError, match=r"split_column='fo': .*Did you mean 'fold'"):
        formatted(tmp_path, jsonl(tmp_path, *rows), split_column="fo")
    rows[7]["fold"] = "other"
    with pytest.raises(
        StageError, match="has 'other' there, which is none of train, validation, test"
    ):
        formatted(tmp_path, jsonl(tmp_path, *rows), split_column="fold")
