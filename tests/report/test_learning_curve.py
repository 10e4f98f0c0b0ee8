"""Learning curves: which runs belong to one, and whether the last doubling still gained."""

import json
import random

import datasets
import numpy as np
import pandas as pd
import pytest

from tabletune.report.learning_curve import curves_of, last_doubling, learning_curve, read_point

QUESTIONS = 40  # in the test split


def write_run(folder, questions, nll, right=None, steps=None, **parameters):
    """Leave what a learning curve reads of a run: `nll` has the mean negative log-likelihood of
    each test question."""
    marks = [questions, len(parameters), parameters.get("seed", ""), parameters.get("epochs", "")]
    folder = folder / f"run_{'_'.join(map(str, marks))}"
    rows = [{"prompt": [{"role": "user", "content": f"q{n}"}], "completion": []} for n in range(5)]
    test = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": test}).save_to_disk(folder / "dataset")
    report = {"questions": {"train": questions}}
    (folder / "dataset" / "report.json").write_text(json.dumps(report))
    stage = {"parameters": {"train_rows": questions, "seed": 1, "lora_r": 8, **parameters}}
    manifest = {"01_format_dataset": {"parameters": {}}, "02_finetune_qlora": stage}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "evaluation").mkdir()
    if steps is not None:
        (folder / "training").mkdir()
        training = {"steps": steps, "epochs": parameters.get("epochs", 1)}
        (folder / "training" / "metrics.json").write_text(json.dumps(training))
    tables = [
        pd.DataFrame(
            {
                "group": [f"g{n}" for n in range(len(nll))],
                "response_nll": np.array(nll) * 20,
                "response_tokens": 20.0,
                "model": model,
            }
        )
        for model in ("base", "adapter", "merged")
    ]
    tables[0]["response_nll"] += 40
    pd.concat(tables).to_parquet(folder / "evaluation" / "scores.parquet")
    if right is not None:
        lines = [
            {"part": part, "asked": f"q{n}", "model": model, "right": bool(value)}
            for part in ("new", "table")
            for model in ("base", "merged")
            for n, value in enumerate(right)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "evaluation" / "answers.jsonl").write_text(text)
    return folder


def nll_of(mean, seed=0, spread=0.5):
    """Likelihoods of the test questions: most of the spread is in the questions, the same for all
    runs."""
    hard = np.random.default_rng(1).normal(0, spread, QUESTIONS)
    return mean + hard + np.random.default_rng(seed).normal(0, 0.05, QUESTIONS)


def sentences(tmp_path, runs):
    """The sentences on runs, [(questions, likelihoods, right answers, steps)], but for the last."""
    folders = {str(questions): write_run(tmp_path, questions, *rest) for questions, *rest in runs}
    (of_curve,) = learning_curve(folders)[1]
    *lines, caution = of_curve
    assert caution.startswith("How much a seed alone changes is not known here")
    return lines


def test_more_rows_help_where_they_did(tmp_path):
    runs = [(10, nll_of(2.0, 1)), (20, nll_of(1.7, 2)), (40, nll_of(1.4, 3))]
    lines = sentences(tmp_path, runs)
    assert lines[0] == "The last doubling still gained: more rows would probably help."
    assert lines[1].startswith(
        "From 20 to 40 questions in training, the perplexity of new questions changes by -2"
    )


def test_more_copies_do_not_help(tmp_path):
    runs = [(10, nll_of(1.4, 1)), (20, nll_of(1.4, 2)), (40, nll_of(1.4, 3))]
    assert sentences(tmp_path, runs)[0].startswith("The last doubling gained nothing")


def test_only_the_last_doubling_counts(tmp_path):
    runs = [(10, nll_of(3.0, 1)), (20, nll_of(1.4, 2)), (40, nll_of(1.4, 3))]
    assert sentences(tmp_path, runs)[0].startswith("The last doubling gained nothing")


def test_a_tenth_of_the_rows_is_no_half(tmp_path):
    lines = sentences(tmp_path, [(10, nll_of(2.4, 1)), (100, nll_of(1.4, 3))])
    assert lines[0] == "10 times as many questions still gained: more rows would probably help."
    assert lines[1].startswith("Whether the last doubling gained is not measured")


def test_a_gain_of_less_than_a_hundredth_is_none(tmp_path):
    """It is sure, as the test rows differ alike in both runs, and nobody would notice it."""
    small = nll_of(1.4, 1)
    lines = sentences(tmp_path, [(20, small), (40, small - 0.005)])
    assert lines[0].startswith("The last doubling gained nothing")


def test_what_a_seed_alone_changes_is_no_gain(tmp_path):
    """As measured: seeds of one size of the bundled table differ by up to 0.04 nats a token."""
    small = nll_of(1.4, 1)
    lines = sentences(tmp_path, [(20, small), (40, small - 0.035)])
    assert lines[0].startswith("The last doubling gained nothing")


def test_a_run_that_got_worse_is_no_gain(tmp_path):
    runs = [(20, nll_of(1.4, 2)), (40, nll_of(1.8, 3))]
    assert sentences(tmp_path, runs)[0].startswith("The last doubling gained nothing")


def test_right_answers_count_more_than_likelihood(tmp_path):
    right = [n < 10 for n in range(QUESTIONS)], [n < 30 for n in range(QUESTIONS)]
    runs = [(20, nll_of(1.4, 2), right[0]), (40, nll_of(1.4, 3), right[1])]
    lines = sentences(tmp_path, runs)
    assert lines[0].startswith("The last doubling still gained")
    assert "Right answers to the same 40 new questions: +50 points" in lines[2]


def test_more_likely_without_more_right_answers_is_said_to_be_so(tmp_path):
    right = [n < 10 for n in range(QUESTIONS)]
    runs = [(20, nll_of(1.8, 2), right), (40, nll_of(1.4, 3), right)]
    assert "but it cannot be told whether" in sentences(tmp_path, runs)[0]


def test_more_likely_answers_where_nearly_all_are_right_already_are_no_gain(tmp_path):
    right = [True] * QUESTIONS
    lines = sentences(tmp_path, [(20, nll_of(1.8, 2), right), (40, nll_of(1.4, 3), right)])
    assert "nearly all new questions are answered right with fewer rows already" in lines[0]
    assert lines[0].endswith("more rows of this kind would hardly help.")


def test_likelihood_decides_where_no_answer_is_right(tmp_path):
    """As measured on the bundled table: right answers stay at nothing, whatever is learned."""
    right = [False] * QUESTIONS
    lines = sentences(tmp_path, [(20, nll_of(1.8, 2), right), (40, nll_of(1.4, 3), right)])
    assert lines[0] == "The last doubling still gained: more rows would probably help."
    assert lines[1].startswith("Hardly any new question is answered right")


def test_a_gain_with_more_steps_may_be_that_of_the_steps(tmp_path):
    runs = [(20, nll_of(1.8, 2), None, 45), (40, nll_of(1.4, 3), None, 90)]
    lines = sentences(tmp_path, runs)
    assert "the larger run also made more steps (90, not 45)" in lines[0]
    assert lines[0].endswith("`equal_steps: true` in the grid gives all sizes as many.")


def test_a_gain_with_as_many_steps_is_that_of_the_rows(tmp_path):
    runs = [(20, nll_of(1.8, 2), None, 96), (40, nll_of(1.4, 3), None, 90)]
    assert sentences(tmp_path, runs)[0].endswith("more rows would probably help.")


def test_no_gain_with_more_steps_is_none(tmp_path):
    runs = [(20, nll_of(1.4, 2), None, 45), (40, nll_of(1.4, 3), None, 90)]
    assert sentences(tmp_path, runs)[0].startswith("The last doubling gained nothing")


def test_runs_with_as_many_more_epochs_as_they_have_fewer_rows_are_one_curve(tmp_path):
    """What `equal_steps` in a grid makes."""
    folders = {
        "a": write_run(tmp_path, 10, nll_of(2), train_rows=0.25, epochs=8),
        "b": write_run(tmp_path, 20, nll_of(2), train_rows=0.5, epochs=4),
        "c": write_run(tmp_path, 40, nll_of(1), train_rows=1.0, epochs=2),
    }
    (curve,) = curves_of(folders)
    assert [point.name for point in curve] == ["a", "b", "c"]


def test_equal_steps_that_batches_of_other_sizes_made_unequal_are_said_to_be_so(tmp_path):
    folders = {
        "a": write_run(tmp_path, 20, nll_of(2), steps=12, train_rows=0.5, epochs=4),
        "b": write_run(tmp_path, 40, nll_of(1), steps=18, train_rows=1.0, epochs=2),
    }
    _, (lines,) = learning_curve(folders)
    assert "more steps (18, not 12)" in lines[0]
    assert lines[0].endswith("give `batch_size` a number in the grid.")


def test_several_curves_say_which_they_are(tmp_path):
    folders = {
        "a": write_run(tmp_path, 20, nll_of(2), steps=45, train_rows=0.5, epochs=2),
        "b": write_run(tmp_path, 20, nll_of(2), steps=90, train_rows=0.5, epochs=4),
        "c": write_run(tmp_path, 40, nll_of(1), steps=90, train_rows=1.0, epochs=2),
    }
    _, (of_epochs, of_steps) = learning_curve(folders)
    assert of_epochs[0].startswith("45 to 90 steps, the same epochs: The last doubling gained, but")
    assert of_steps[0].startswith("About 90 steps each: The last doubling still gained")


def test_runs_of_other_parameters_are_another_curve(tmp_path):
    folders = {
        "a": write_run(tmp_path, 10, nll_of(2)),
        "b": write_run(tmp_path, 20, nll_of(2)),
        "c": write_run(tmp_path, 40, nll_of(1), epochs=3),
    }
    (curve,) = curves_of(folders)
    assert [point.name for point in curve] == ["a", "b"]


def test_runs_of_one_size_are_no_curve(tmp_path):
    assert learning_curve({"a": write_run(tmp_path, 10, nll_of(2))}) == (None, [])


def seeds_of(tmp_path, sizes, jump):
    """Runs of two sizes, each with three seeds, whose likelihoods jump by `jump` from seed to seed;
    {name: folder}.
    """
    folders = {}
    for questions, mean in sizes:
        for seed in (1, 2, 3):
            nll = nll_of(mean + jump * (seed - 2), seed)
            folders[f"{questions} {seed}"] = write_run(tmp_path, questions, nll, seed=seed)
    return folders


def test_several_seeds_of_a_size_are_one_point(tmp_path):
    (curve,) = curves_of(seeds_of(tmp_path, [(20, 1.7), (40, 1.4)], 0.1))
    assert [point.questions for point in curve] == [20, 40]
    assert curve[1].perplexity == pytest.approx(np.exp(nll_of(1.4).mean()), rel=0.02)
    assert curve[1].name.endswith("(3 seeds)")


def test_seeds_alone_are_no_curve(tmp_path):
    assert curves_of(seeds_of(tmp_path, [(40, 1.4)], 0.1)) == []


def test_a_gain_of_more_than_the_seeds_do_is_one(tmp_path):
    _, (lines,) = learning_curve(seeds_of(tmp_path, [(20, 1.7), (40, 1.4)], 0.05))
    assert lines[0].startswith("The last doubling still gained")


def test_a_gain_that_seeds_make_alone_is_none(tmp_path):
    _, (lines,) = learning_curve(seeds_of(tmp_path, [(20, 1.7), (40, 1.4)], 0.3))
    assert lines[0].startswith("The last doubling gained nothing")


def test_right_answers_of_several_seeds_are_averaged(tmp_path):
    folders = {}
    for seed, right in ((1, [True, False]), (2, [True, True])):
        folders[f"small {seed}"] = write_run(tmp_path, 20, nll_of(2), [False] * 2, seed=seed)
        folders[f"large {seed}"] = write_run(tmp_path, 40, nll_of(2), right, seed=seed)
    (curve,) = curves_of(folders)
    assert curve[1].right == {"q0": 1.0, "q1": 0.5}


@pytest.mark.parametrize("name", ["eval_batch_size", "your_question"])
def test_what_changes_no_figure_makes_no_other_curve(tmp_path, name):
    folders = {
        "a": write_run(tmp_path, 10, nll_of(2)),
        "b": write_run(tmp_path, 20, nll_of(2), **{name: 7}),
    }
    assert len(curves_of(folders)) == 1


def test_the_points_are_in_the_order_of_their_size(tmp_path):
    sizes = [10, 20, 40, 80]
    folders = {
        str(size): write_run(tmp_path, size, nll_of(2))
        for size in random.Random(0).sample(sizes, 4)
    }
    (curve,) = curves_of(folders)
    assert [point.questions for point in curve] == sizes


def test_the_merged_model_is_read(tmp_path):
    point = read_point("a", write_run(tmp_path, 10, nll_of(2.0)))
    assert point.perplexity == pytest.approx(np.exp(nll_of(2.0).mean()))


def test_only_new_questions_are_read(tmp_path):
    point = read_point("a", write_run(tmp_path, 10, nll_of(2.0), [True, False]))
    assert point.right == {"q0": True, "q1": False}


def test_a_run_that_was_not_evaluated_is_left_out(tmp_path):
    assert read_point("a", tmp_path) is None


def test_without_half_as_many_questions_nothing_is_said_of_more(tmp_path):
    folders = {str(size): write_run(tmp_path, size, nll_of(2)) for size in (35, 40)}
    (curve,) = curves_of(folders)
    assert "cannot be said" in last_doubling(curve)[0]


def test_the_figure_has_a_panel_for_each_thing_that_was_measured(tmp_path):
    right = [True] * QUESTIONS
    folders = {str(size): write_run(tmp_path, size, nll_of(2), right) for size in (10, 20)}
    figure, _ = learning_curve(folders)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["perplexity (lower is better)", "right answers"]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["40 new questions", "40 new questions"]


def test_two_conversations_that_end_in_the_same_question_are_two_questions(tmp_path):
    folder = write_run(tmp_path, 10, nll_of(2.0))
    lines = [
        {"part": "new", "asked": "Why?", "group": group, "model": "merged", "right": right}
        for group, right in (("a", True), ("b", False))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "evaluation" / "answers.jsonl").write_text(text)
    assert read_point("run", folder).right_rate == 0.5
