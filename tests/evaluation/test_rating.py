"""What a reader says of answers without names: order, what is saved, and the figures. No Gradio is
needed."""

import json
from collections import Counter

import pytest

from tabletune.errors import StageError
from tabletune.evaluation.rating import (
    ENOUGH,
    Pair,
    Rating,
    RatingSession,
    pairs_of_run,
    summarize_ratings,
)


def answer_line(number, model, **more):
    """A line of evaluation/answers.jsonl."""
    line = {
        "part": "reworded",
        "asked": f"question {number}?",
        "model": model,
        "answer": f"{model} says {number}",
        "references": [f"answer {number}"],
        "chrf": 10.0,
        "right": False,
    }
    return {**line, **more}


def write_answers(run, lines):
    """Leave the answers of notebook 4 in a run folder."""
    folder = run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """A run with 30 questions that base, adapter and merged model answered."""
    lines = [
        answer_line(number, model)
        for number in range(30)
        for model in ("base", "adapter", "merged")
    ]
    write_answers(tmp_path, lines)
    return tmp_path


def tuned_side(pair):
    """The side of the fine-tuned model's answer."""
    return "left" if pair.left_model == "tuned" else "right"


def test_the_merged_model_is_rated_where_there_is_one(run):
    texts = {text for pair in pairs_of_run(run) for text in (pair.left, pair.right)}
    assert texts == {f"{model} says {n}" for model in ("base", "merged") for n in range(30)}


def test_without_a_merged_model_the_adapter_is_rated(tmp_path):
    write_answers(tmp_path, [answer_line(1, "base"), answer_line(1, "adapter")])
    (pair,) = pairs_of_run(tmp_path)
    assert {pair.left, pair.right} == {"base says 1", "adapter says 1"}


def test_the_sides_are_mixed(run):
    sides = Counter(pair.left_model for pair in pairs_of_run(run))
    assert sides["base"] >= 8
    assert sides["tuned"] >= 8


def test_the_order_of_the_questions_is_mixed(run):
    asked = [pair.question for pair in pairs_of_run(run)]
    assert asked != sorted(asked, key=lambda text: int(text.split()[1].strip("?")))


def test_the_order_is_the_same_the_next_time(run):
    assert pairs_of_run(run) == pairs_of_run(run)


def test_nothing_that_is_shown_names_a_model(run):
    pair = pairs_of_run(run)[0]
    assert "tuned" not in pair.question + "".join(pair.references)
    assert "base" not in pair.pair_id


def test_a_run_without_answers_is_refused_in_one_line(tmp_path):
    with pytest.raises(StageError, match="Run 04_evaluate first") as error:
        pairs_of_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_side_becomes_the_model_that_stood_there(run):
    session = RatingSession(run)
    pair = session.next_pair()
    rating = session.rate(pair, tuned_side(pair), True, True)
    assert rating.better == "tuned"


def test_right_and_wrong_belong_to_the_model_of_the_side(run):
    session = RatingSession(run)
    for _ in range(6):
        pair = session.next_pair()
        left_is_tuned = pair.left_model == "tuned"
        rating = session.rate(pair, "equal", left_is_tuned, not left_is_tuned)
        assert rating.tuned_is_right
        assert not rating.base_is_right


def test_another_word_is_refused(run):
    session = RatingSession(run)
    with pytest.raises(ValueError, match="left, right, equal"):
        session.rate(session.next_pair(), "tuned")


def test_ratings_are_saved_at_once_and_go_on_later(run):
    session = RatingSession(run)
    first = session.next_pair()
    session.rate(first, "equal")
    later = RatingSession(run)
    assert later.ratings.keys() == {first.pair_id}
    assert later.next_pair() != first
    assert json.loads((run / "rating" / "metrics.json").read_text())["rated"] == 1


def test_when_all_are_rated_there_is_no_next_pair(run):
    session = RatingSession(run)
    while pair := session.next_pair():
        session.rate(pair, "left")
    assert session.metrics()["rated"] == 30


def test_ratings_of_other_answers_stay_but_do_not_count(run):
    session = RatingSession(run)
    session.rate(session.next_pair(), "equal")
    lines = [
        answer_line(n, model, answer=f"new {n}") for n in range(3) for model in ("base", "merged")
    ]
    write_answers(run, lines)
    again = RatingSession(run)
    again.rate(again.next_pair(), "equal")
    assert again.metrics()["rated"] == 1
    assert len((run / "rating" / "ratings.jsonl").read_text().splitlines()) == 2


def test_the_last_rating_of_a_pair_counts(run):
    session = RatingSession(run)
    pair = session.next_pair()
    session.rate(pair, "left")
    session.rate(pair, "equal")
    assert session.metrics()["ties"] == 1
    assert session.metrics()["rated"] == 1


# --- figures


def rated(better, said=(), chrf=(), right=()):
    """Pairs and ratings: `better` of each, and of the fine-tuned answers whether they were said to
    be right."""
    pairs, ratings = [], {}
    for number, choice in enumerate(better):
        measured = {
            "chrf": chrf[number] if number < len(chrf) else None,
            "right": right[number] if number < len(right) else None,
        }
        pair_id = f"p{number}"
        empty = {"chrf": None, "right": None}
        pair = Pair(pair_id, "new", "?", [], "a", "b", "base", {"base": empty, "tuned": measured})
        pairs.append(pair)
        ratings[pair_id] = Rating(
            pair_id, choice, None, said[number] if number < len(said) else None
        )
    return pairs, ratings


def test_the_win_rate_leaves_ties_out():
    metrics = summarize_ratings(*rated(["tuned"] * 9 + ["base"] * 3 + ["equal"] * 8))
    assert metrics["win_rate"] == 0.75
    assert (metrics["wins"], metrics["losses"], metrics["ties"]) == (9, 3, 8)


def test_the_win_rate_has_wilsons_interval():
    metrics = summarize_ratings(*rated(["tuned"] * 10))
    assert metrics["win_rate_ci95"] == pytest.approx([0.722, 1.0], abs=1e-3)


def test_eight_to_four_may_be_chance():
    sentences = summarize_ratings(*rated(["tuned"] * 8 + ["base"] * 4))["sentences"]
    assert any("may be chance" in line for line in sentences)


def test_forty_to_five_is_none():
    sentences = summarize_ratings(*rated(["tuned"] * 40 + ["base"] * 5))["sentences"]
    assert not any("may be chance" in line for line in sentences)


def test_only_ties_have_no_win_rate():
    metrics = summarize_ratings(*rated(["equal"] * 5))
    assert metrics["win_rate"] is None


def test_nothing_rated_is_said_to_be_so():
    assert summarize_ratings([], {})["sentences"] == ["No answers were rated yet."]


def test_the_share_of_right_answers_is_the_readers():
    metrics = summarize_ratings(*rated(["tuned"] * 4, said=[True, True, True, False]))
    assert metrics["right"]["tuned"]["rate"] == 0.75
    assert "base" not in metrics["right"]


def test_a_figure_that_agrees_with_the_reader_has_a_high_rank_correlation():
    said = [number >= 15 for number in range(30)]
    metrics = summarize_ratings(*rated(["equal"] * 30, said, chrf=range(30), right=said))
    assert metrics["agreement"]["chrf"]["rank_correlation"] == pytest.approx(0.866, abs=1e-3)
    assert metrics["agreement"]["right"]["rank_correlation"] == pytest.approx(1)


def test_a_figure_that_has_nothing_to_do_with_the_reader_has_none():
    said = [number % 2 == 0 for number in range(40)]
    metrics = summarize_ratings(*rated(["equal"] * 40, said, chrf=[n // 2 for n in range(40)]))
    low, high = metrics["agreement"]["chrf"]["ci95"]
    assert low < 0 < high


def test_a_rank_correlation_needs_enough_answers():
    few = ENOUGH - 1
    said = [number % 2 == 0 for number in range(few)]
    metrics = summarize_ratings(*rated(["equal"] * few, said, chrf=range(few)))
    assert metrics["agreement"]["chrf"] is None
    assert any("is not measured" in line for line in metrics["sentences"])


def test_where_all_answers_are_right_nothing_can_agree():
    metrics = summarize_ratings(*rated(["equal"] * 30, [True] * 30, chrf=range(30)))
    assert metrics["agreement"]["chrf"] is None


def test_two_conversations_that_end_in_the_same_question_are_two_pairs(tmp_path):
    lines = [
        answer_line(0, model, group=group, answer=f"{model}, {group}")
        for group in ("cold", "cough")
        for model in ("base", "merged")
    ]
    write_answers(tmp_path, lines)
    assert len(pairs_of_run(tmp_path)) == 2
