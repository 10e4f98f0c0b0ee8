"""Plots of results with intervals."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tabletune.report.text import COLUMNS, direction, figures_of, stored

if TYPE_CHECKING:  # matplotlib takes half a second, which notebook 2 needs only at its end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREYS = ["0.85", "0.6", "0.35"]
PANELS = (  # of the plot of results, those that were measured: content first
    "reworded questions answered right",
    "table's own questions answered right",
    "new questions answered right",
    "added rows' questions answered right",
    "answers right word for word",
    "response perplexity",
    "answers that stop",
)


def plot_figures(
    axes: "Axes", figures: Mapping[str, tuple], label: str, form: str = ",.2f"
) -> None:
    """Bars of figures {name: (value, ci95)} on matplotlib axes, with their intervals; `label` says
    what they are.
    """
    figures = {name: figure for name, figure in figures.items() if figure[0] is not None}
    names = [f"{name}\n{value:{form}}" for name, (value, _) in figures.items()]
    axes.bar(names, [value for value, _ in figures.values()], color=GREYS, edgecolor="black")
    for position, (value, ci95) in enumerate(figures.values()):
        if ci95 is not None:
            # matplotlib wants distances from the bar's end
            below_and_above = [[value - ci95[0]], [ci95[1] - value]]
            axes.errorbar(position, value, below_and_above, color="black", capsize=6)
    axes.set_ylabel(direction(label))
    if form.endswith("%"):
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter("{x:.0%}")
    else:
        axes.yaxis.set_major_formatter("{x:,g}")


def plot_results(metrics: dict) -> "Figure":
    """A figure with a panel for each of PANELS that was measured; it is shown once."""
    import matplotlib.pyplot as plt

    models = figures_of(metrics)
    columns = [
        column
        for column in PANELS
        if any(stored(entry, column)[0] is not None for entry in models.values())
    ]
    rows = (len(columns) + 2) // 3
    across = min(3, len(columns))
    figure, panels = plt.subplots(
        rows, across, figsize=(4 * across, 3.5 * rows), layout="constrained", squeeze=False
    )
    for axes, column in zip(panels.flat, columns, strict=False):
        bars = {model: stored(entry, column) for model, entry in models.items()}
        plot_figures(axes, bars, column, COLUMNS[column][2])
    for axes in panels.flat[len(columns) :]:
        axes.set_visible(False)
    plt.close(figure)  # else a notebook shows it a second time
    return figure


def plot_data_set(report: Mapping[str, Any], max_length: int) -> None:
    """How long the examples of a data set are, and how many rows ask the same question: two plots.

    `report` is the data set's report.json, `max_length` is marked as a line.
    """
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    counts, edges = report["tokens"]["histogram"]
    left.stairs(counts, edges, fill=True, color="0.55")
    left.axvline(max_length, color="black", linestyle="--", label=f"max_length = {max_length}")
    left.set(xlabel="tokens in an example", ylabel="examples", title="Length")
    left.legend()
    rows, questions = report["rows_a_question"]
    right.bar(rows, questions, color="0.55", edgecolor="black")
    right.set(xlabel="rows with the same question", ylabel="questions", title="Rows a question")
    right.xaxis.get_major_locator().set_params(integer=True)
    plt.show()


def plot_losses(log_history: list[dict[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Show the loss curves of a training, in nats a token of the answers; lower is better.

    `log_history` are the entries that Trainer logged, `metrics` those of `training/metrics.json`.
    The base model's validation loss stands at step 0.
    """
    import matplotlib.pyplot as plt

    training = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    # where training was interrupted, a step may stand in the log twice: the first counts
    validation = {0: metrics["eval_loss_before"]}
    for entry in log_history:
        if "eval_loss" in entry:
            validation.setdefault(entry["step"], entry["eval_loss"])
    _, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(*zip(*training, strict=True), color="0.6", label="training")
    axes.plot(
        list(validation), list(validation.values()), "ko-", label="validation (step 0: base model)"
    )
    axes.set(
        xlabel="optimizer step",
        ylabel="loss a response token (nats)",
        title="Loss: lower is better",
    )
    axes.legend()
    plt.show()
