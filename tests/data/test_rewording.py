"""Other wordings by rules: two kinds with phrases and errors of their own, reproducible, and kind to
other languages.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabletune.data.retrieval import TableRow
from tabletune.data.rewording import (
    ABOUT,
    AROUND,
    MOST_WORDINGS,
    Rewording,
    looks_english,
    misspell,
    same_answer,
    subject_of,
    template_words,
    without_marks,
    without_punctuation,
)

REMEDIES = [
    f"I am suffering from {name}. Please suggest a home remedy."
    for name in ("Dry Cough", "Acne", "Hiccups", "Sore Throat", "Nausea")
]


def test_the_template_is_what_most_questions_share():
    assert template_words(REMEDIES) == (
        ["I", "am", "suffering", "from"],
        ["Please", "suggest", "a", "home", "remedy."],
    )


def test_free_questions_have_no_template():
    assert template_words(["What is your address?", "How can I pay?", "Are you open?"]) == ([], [])


def test_the_subject_is_what_the_template_leaves():
    assert subject_of(REMEDIES[0], *template_words(REMEDIES)) == "Dry Cough"
    assert subject_of("What is your address?", [], []) == "address"
    assert subject_of("What is it?", [], []) == "What is it?"


def test_training_and_evaluation_share_no_rule():
    for rules in (AROUND, ABOUT):
        assert not set(rules["training"]) & set(rules["evaluation"])


def test_training_and_evaluation_make_other_typing_errors():
    def errors(use):
        return {misspell("remedy", random.Random(number), use) for number in range(200)}

    assert not errors("training") & errors("evaluation")


@given(seed=st.integers(0, 2**32), use=st.sampled_from(["training", "evaluation"]))
@settings(max_examples=100, deadline=None)
def test_a_rewording_is_the_same_for_the_same_numbers(seed, use):
    reword = Rewording(REMEDIES, use)
    first = reword(REMEDIES[0], random.Random(seed))
    assert first == reword(REMEDIES[0], random.Random(seed))
    assert first.strip()
    assert first != REMEDIES[0]


@given(text=st.text(max_size=40), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_misspelt(text, seed):
    for use in ("training", "evaluation"):
        assert len(misspell(text, random.Random(seed), use)) <= len(text) + 2


def test_questions_of_other_languages_get_no_english_words():
    questions = ["Wie lautet Ihre Adresse?", "Wann haben Sie geöffnet?", "Nehmen Sie Karten?"]
    assert not looks_english(questions)
    reword = Rewording(questions, "training")
    for number in range(100):
        text = reword(questions[0], random.Random(number)).lower()
        assert not {"hello", "please", "help", "about"} & set(text.split())


def test_other_wordings_are_questions_of_the_same_answer():
    rows = [TableRow("a", "Yes.", "1"), TableRow("b", "yes", "2"), TableRow("c", "No.", "3")]
    assert same_answer(rows) == {"yes": rows[:2]}


def test_labels_are_no_paraphrases():
    rows = [TableRow(str(n), "positive", str(n)) for n in range(MOST_WORDINGS + 1)]
    assert same_answer(rows) == {}


@pytest.mark.parametrize("use", ["training", "evaluation"])
def test_most_rewordings_keep_the_subject(use):
    reword = Rewording(REMEDIES, use)
    texts = [reword(REMEDIES[1], random.Random(number)).lower() for number in range(200)]
    assert sum("acne" in text for text in texts) > 100


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (".5 mg of what?", ".5 mg of what"),
        ("Take (.5 mg).", "Take .5 mg"),
        ("What does cd .. do?", "What does cd .. do"),
        ("What does `cd ../a` do, or cd ..?", "What does `cd ../a` do or cd .."),
        ("Where is .NET?", "Where is .NET"),
        ("Well... and then?", "Well and then"),
        ("...and then?", "and then"),
    ],
)
def test_points_that_belong_to_a_word_are_no_punctuation(text, bare):
    assert without_punctuation(text) == bare


def test_the_subject_keeps_its_points():
    assert subject_of("How much is .5 mg?", ["How", "much", "is"], []) == ".5 mg"
    assert subject_of("What does cd ..?", ["What", "does"], []) == "cd .."


@given(text=st.text('ab5 .,?!"', max_size=12))
@settings(max_examples=300, deadline=None)
def test_only_points_of_words_are_kept_at_the_ends(text):
    """Of any other text exactly the marks at its ends are taken."""
    marks = ' .,?!"'
    bare = without_marks(text, marks)
    assert bare.strip(marks) == text.strip(marks)
    if not any(points in text for points in (".a", ".b", ".5", "..")):
        assert bare == text.strip(marks)
