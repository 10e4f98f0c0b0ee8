"""Plots: what they show."""

import matplotlib.pyplot as plt
import pytest

from tabletune.report.plots import plot_data_set, plot_losses, plot_results

HISTORY = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "eval_loss": 1.5},
    {"step": 2, "eval_loss": 9.0},
]


def report_of(rows_a_question):
    """What notebook 1 says of the lengths, 40 to 100 tokens, and of the rows a question."""
    return {
        "tokens": {"histogram": [[3, 5, 2], [40.0, 60.0, 80.0, 100.0]]},
        "rows_a_question": rows_a_question,
    }


def entry_of(reworded, questions=11):
    """What notebook 4 says of a model that was asked more than the new questions, or was not."""
    content = {"new": {"questions": 7, "right": 0.5, "right_ci95": [0.2, 0.8]}}
    if reworded:
        content["reworded"] = {"questions": 20, "right": 0.1, "right_ci95": [0.0, 0.3]}
    return {
        "perplexity": {"response": 6.0, "response_ci95": [5.0, 7.0]},
        "generation": {"stop_rate": 1.0, "stop_rate_ci95": [0.7, 1.0]},
        "content": content,
        "questions": questions,
    }


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    """A figure that stays open is shown a second time, and its memory is not given back."""
    plt.close("all")
    yield
    assert plt.get_fignums() == []


def test_plot_losses_shows_the_base_at_step_0_and_each_validation_once():
    """Trainer logs the best checkpoint's validation again at the end: the first one counts."""
    [axes] = plot_losses(HISTORY, {"eval_loss_before": 4.0}).axes
    training, validation = axes.get_lines()
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 2.0]]
    assert validation.get_xydata().tolist() == [[0, 4.0], [2, 1.5]]


def test_plot_losses_says_that_lower_is_better():
    [axes] = plot_losses(HISTORY, {"eval_loss_before": 4.0}).axes
    assert "lower is better" in axes.get_ylabel()


def test_plot_data_set_zooms_to_the_lengths_and_names_a_limit_far_above_them(capsys):
    lengths, rows = plot_data_set(report_of([[1, 2], [4, 3]]), 512).axes
    assert lengths.get_xlim()[1] < 110
    assert lengths.get_title() == "10 examples, all far below max_length = 512"
    assert rows.get_title() == "7 questions"
    assert capsys.readouterr().out == ""


def test_plot_data_set_names_the_length_of_an_example_that_is_much_longer_than_the_others():
    report = report_of([[1], [100]])
    report["tokens"] |= {"histogram": [[60, 39, 0, 0, 1], [50, 150, 250, 350, 450, 550]]}
    lengths = plot_data_set(report, 512).axes[0]
    assert lengths.get_title() == "100 examples\nthe longest has 550 tokens"


def test_plot_data_set_draws_a_limit_that_is_near():
    lengths = plot_data_set(report_of([[1, 2], [4, 3]]), 120).axes[0]
    [limit] = lengths.get_lines()
    assert limit.get_xdata() == [120, 120]
    assert lengths.get_title() == "10 examples"


def test_plot_data_set_says_in_a_sentence_that_each_question_has_one_row(capsys):
    assert len(plot_data_set(report_of([[1], [10]]), 120).axes) == 1
    assert capsys.readouterr().out == "Each of the 10 questions stands in one row.\n"


def test_plot_results_has_the_number_of_questions_in_the_title_of_each_panel():
    metrics = {"base": entry_of(False), "merged": entry_of(True)}
    panels = [axes for axes in plot_results(metrics).axes if axes.get_visible()]
    titles = {axes.get_ylabel(): axes.get_title() for axes in panels}
    assert titles == {
        "reworded questions answered right": "20 questions",
        "new questions answered right": "7 questions",
        "response perplexity (lower is better)": "11 questions",
        "answers that stop": "7 questions",
    }


def test_plot_results_gives_a_model_one_grey_in_all_panels():
    metrics = {"base": entry_of(False), "merged": entry_of(True)}
    reworded, new = plot_results(metrics).axes[:2]
    assert reworded.patches[0].get_facecolor() == new.patches[1].get_facecolor()


def test_plot_results_shows_the_perplexity_with_the_rows_where_there_are_rows():
    """Without the rows of a question, a model with rows in its prompt is taught not to answer."""
    merged = entry_of(True)
    merged["perplexity"]["response_added"] = 1.06
    metrics = {"base": entry_of(False), "merged": merged}
    labels = [axes.get_ylabel() for axes in plot_results(metrics).axes]
    assert "perplexity, own rows in the index (lower is better)" in labels
    assert "response perplexity (lower is better)" not in labels


def test_plot_results_of_texts_without_questions_has_no_number_of_questions():
    entry = {"perplexity": {"response": 6.0}, "generation": None, "questions": 12}
    [axes] = plot_results({"base": entry}).axes
    assert axes.get_title() == ""
