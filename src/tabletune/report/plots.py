"""Plots of results with intervals.

Each function returns a closed figure: a notebook shows it once, as the result of its cell, and a
program that makes many keeps none of them in memory.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tabletune.report.text import COLUMNS, direction, figures_of, questions_behind, stored

if TYPE_CHECKING:  # matplotlib takes half a second, which notebook 2 needs only at its end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREYS = {"base": "0.85", "adapter": "0.6", "merged": "0.35"}  # one for each model, in all panels
WITHOUT_ROWS, WITH_ROWS = "response perplexity", "perplexity, own rows in the index"
PANELS = (  # of the plot of results, those that were measured: content first
    "reworded questions answered right",
    "table's own questions answered right",
    "new questions answered right",
    "added rows' questions answered right",
    "answers right word for word",
    WITHOUT_ROWS,
    WITH_ROWS,
    "answers that stop",
)
BESIDE = 1.25  # of the longest example: a limit up to here is drawn beside the lengths
FEW = 0.05  # if a smaller share of examples is beyond half of the longest, its length is named


def plot_figures(
    axes: "Axes", figures: Mapping[str, tuple], label: str, form: str = ",.2f"
) -> None:
    """Bars of figures {name: (value, ci95)} on matplotlib axes, with their intervals.

    `label` says what they are.
    """
    figures = {name: figure for name, figure in figures.items() if figure[0] is not None}
    names = [f"{name}\n{value:{form}}" for name, (value, _) in figures.items()]
    colors = [GREYS.get(name.split(",")[0], "0.6") for name in figures]
    axes.bar(names, [value for value, _ in figures.values()], color=colors, edgecolor="black")
    for position, (value, ci95) in enumerate(figures.values()):
        if ci95 is not None:
            # matplotlib wants distances from the bar's end
            below_and_above = [[value - ci95[0]], [ci95[1] - value]]
            axes.errorbar(position, value, below_and_above, color="black", capsize=6)
    axes.set_ylabel(direction(label))
    middle = (len(figures) - 1) / 2
    width = max(len(figures), len(GREYS)) + 0.2  # bars are equally wide in all panels
    axes.set_xlim(middle - width / 2, middle + width / 2)
    if form.endswith("%"):
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter("{x:.0%}")
    else:
        axes.yaxis.set_major_formatter("{x:,g}")


def plot_results(metrics: dict) -> "Figure":
    """A figure with a panel for each of PANELS that was measured.

    A panel's title has the number of questions.
    """
    import matplotlib.pyplot as plt

    models = figures_of(metrics)
    columns = [
        column
        for column in PANELS
        if any(stored(entry, column)[0] is not None for entry in models.values())
    ]
    if WITH_ROWS in columns:  # without the rows the model was taught not to give these answers
        columns.remove(WITHOUT_ROWS)
    rows = (len(columns) + 2) // 3
    across = min(3, len(columns))
    figure, panels = plt.subplots(
        rows, across, figsize=(4 * across, 3.6 * rows), layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(h_pad=0.12)  # between the rows of panels, in inches
    for axes, column in zip(panels.flat, columns, strict=False):
        plot_panel(axes, models, column)
    for axes in panels.flat[len(columns) :]:
        axes.set_visible(False)
    plt.close(figure)
    return figure


def plot_panel(axes: "Axes", models: Mapping[str, dict], column: str) -> None:
    """Plot a figure of COLUMNS of some models, {name: entry}, on matplotlib axes.

    The title has the number of questions.
    """
    bars = {model: stored(entry, column) for model, entry in models.items()}
    plot_figures(axes, bars, column, COLUMNS[column][2])
    questions = questions_behind(models, column)
    if questions is not None:
        axes.set_title(f"{questions:,} questions")


def plot_column(models: Mapping[str, dict], column: str) -> "Figure":
    """A figure of COLUMNS of some models, {name: entry}, in print quality."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained", dpi=200)
    plot_panel(axes, models, column)
    plt.close(figure)
    return figure


def plot_data_set(report: Mapping[str, Any], max_length: int) -> "Figure":
    """How long the examples of a data set are, and how many rows ask the same question.

    `report` is the data set's report.json. `max_length` is marked where it is near the longest
    example, and named in the title where it is not. If each question stands in one row, a sentence
    says so in place of the second plot.
    """
    import matplotlib.pyplot as plt

    rows, questions = report["rows_a_question"]
    one_each = list(rows) == [1]
    panels = 1 if one_each else 2
    figure, axes = plt.subplots(
        1, panels, figsize=(5.5 * panels, 3.5), layout="constrained", squeeze=False
    )
    plot_lengths(axes[0][0], report["tokens"], max_length)
    if one_each:
        print(f"Each of the {questions[0]:,} questions stands in one row.")
    else:
        right = axes[0][1]
        right.bar(rows, questions, color="0.55", edgecolor="black")
        title = f"{sum(questions):,} questions"
        right.set(xlabel="rows with the same question", ylabel="questions", title=title)
        right.xaxis.get_major_locator().set_params(integer=True)
    plt.close(figure)
    return figure


def plot_lengths(axes: "Axes", tokens: Mapping[str, Any], max_length: int) -> None:
    """The lengths of the examples on matplotlib axes, from the shortest to the longest."""
    counts, edges = tokens["histogram"]
    axes.stairs(counts, edges, fill=True, color="0.55")
    title = f"{sum(counts):,} examples"
    if max_length <= BESIDE * edges[-1]:
        axes.axvline(max_length, color="black", linestyle="--", label=f"max_length = {max_length}")
        axes.legend()
    else:
        title += f", all far below max_length = {max_length}"
    in_upper_half = sum(
        count for count, start in zip(counts, edges[:-1], strict=True) if start >= edges[-1] / 2
    )
    if in_upper_half < FEW * sum(counts):
        # the bars of so few are so low that they are overlooked
        title += f"\nthe longest has {edges[-1]:,.0f} tokens"
    axes.set(xlabel="tokens in an example", ylabel="examples", title=title)


def plot_losses(log_history: list[dict[str, Any]], metrics: Mapping[str, Any]) -> "Figure":
    """The loss curves of a training, in nats a token of the answers; lower is better.

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
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(*zip(*training, strict=True), color="0.6", label="training")
    axes.plot(
        list(validation), list(validation.values()), "ko-", label="validation (step 0: base model)"
    )
    axes.set(
        xlabel="optimizer step",
        ylabel="loss (nats a token, lower is better)",
        title="Loss of the answers' tokens",
    )
    axes.legend()
    plt.close(figure)
    return figure
