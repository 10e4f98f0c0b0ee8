"""Plots: what they show."""

import matplotlib.pyplot as plt

from tabletune.report.plots import plot_losses


def test_plot_losses_shows_the_base_at_step_0_and_each_validation_once(monkeypatch):
    """Trainer logs the best checkpoint's validation again at the end: the first one counts."""
    monkeypatch.setattr(plt, "show", lambda: None)
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "eval_loss": 9.0},
    ]
    plot_losses(history, {"eval_loss_before": 4.0})
    training, validation = plt.gcf().axes[0].get_lines()
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 2.0]]
    assert validation.get_xydata().tolist() == [[0, 4.0], [2, 1.5]]
    plt.close("all")
