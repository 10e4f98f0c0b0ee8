"""verdict: what the figures say in words, the content first."""

from tabletune.evaluation.verdict import content_verdict


def part(right, questions=40, **more):
    return {
        "questions": questions,
        "right": right,
        "right_ci95": [right / 2, (1 + right) / 2],
        **more,
    }


def metrics_of(content, structure=1.0, **more):
    def entry(perplexity):
        return {
            "perplexity": {
                "response": perplexity,
                "response_ci95": [perplexity / 2, perplexity * 2],
            },
            "generation": {"structure_rate": structure, "stop_rate": structure},
        }

    significant = {"adapter - base": {"log_perplexity": {"significant": True}}}
    return {
        "base": entry(47.08),
        "merged": {**entry(5.96), "content": content},
        "differences": significant,
        **more,
    }


def test_reworded_questions_come_first():
    content = {"new": part(0.0, 10), "table": part(1.0), "reworded": part(0.5)}
    assert content_verdict(metrics_of(content))[0] == (
        "The fine-tuned model gives the right answer to 20 of 40 reworded questions of your table "
        "(95% interval: 10–30)."
    )


def test_only_the_first_sentence_names_the_model_and_explains_the_interval():
    content = {"new": part(0.0, 10), "table": part(1.0), "reworded": part(0.5)}
    assert content_verdict(metrics_of(content))[1] == (
        "It gives the right answer to 40 of 40 questions as they stand in your table (20–40)."
    )


def test_new_questions_come_first_for_labels_beside_the_commonest_one():
    content = {"new": part(0.9, 20), "table": part(1.0), "reworded": part(1.0)}
    majority = {"label": "spam", "rate": 0.95}
    rules = {"labels": ["spam", "ham"]}
    sentences = content_verdict(metrics_of(content, content_rules=rules, majority=majority))
    assert sentences[0].startswith("The fine-tuned model gives the right answer to 18 of 20 new")
    assert "Always saying 'spam' would be right for 19" in sentences[0]


def test_wrong_content_is_said_with_what_may_help():
    content = {"new": part(0.0, 10), "table": part(0.06), "reworded": part(0.0)}
    text = " ".join(content_verdict(metrics_of(content)))
    assert "how answers look, not what they say" in text
    for cure in ("context_rows", "more epochs", "larger base"):
        assert cure in text


def test_noise_is_not_said_to_look_like_answers():
    content = {"new": part(0.0, 10), "table": part(0.0), "reworded": part(0.0)}
    assert "how answers look" not in " ".join(content_verdict(metrics_of(content, structure=0.0)))


def test_right_content_needs_no_advice():
    content = {"new": part(0.9, 10), "table": part(1.0), "reworded": part(0.97)}
    assert "help" not in " ".join(content_verdict(metrics_of(content)))


def test_a_falling_perplexity_is_no_gain():
    content = {"new": part(0.0, 10), "table": part(0.0), "reworded": part(0.0)}
    last = content_verdict(metrics_of(content))[-1]
    assert "47.08 (23.54–94.16) before, 5.96 (2.98–11.92) after training" in last
    assert "gain" not in last
    assert "does not say whether answers are right" in last


def test_what_was_not_measured_is_called_so():
    nothing = {name: {"questions": 0} for name in ("new", "table", "reworded")}
    assert "not measured" in content_verdict(metrics_of(nothing))[0]
    older = metrics_of(None)
    del older["merged"]["content"]
    assert "not measured" in content_verdict(older)[0]


def test_with_rows_the_questions_that_they_lack_are_told_apart():
    new = part(0.9, 11, answerable=0, nothing=1.0)
    new["unanswerable"] = {"questions": 11, "nothing": 10 / 11, "nothing_ci95": [0.62, 0.98]}
    content = {
        "new": new,
        "table": part(1.0, false_nothing=0.0),
        "reworded": part(0.95, false_nothing=0.05, answerable=40),
        "added": part(1.0, 11),
    }
    sentences = content_verdict(metrics_of(content, retrieval=True))
    assert 'says "nothing" to 2' in sentences[0]
    assert "11 of 11 questions whose rows were added after training (" in sentences[2]
    assert "nothing for 10 of 11 new questions whose rows were left out (7–11)" in sentences[3]


def test_answers_that_stand_in_training_are_said():
    content = {"new": part(0.9, 10), "table": part(1.0), "reworded": part(1.0)}
    text = " ".join(content_verdict(metrics_of(content, answer_leaks=8)))
    assert "The answers to 8 test rows stand in training, too" in text
    assert "stand in training" not in " ".join(content_verdict(metrics_of(content)))
