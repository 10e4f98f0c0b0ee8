"""Plots of results with intervals."""

from tabletune.report.text import COLUMNS, figures_of, stored

GREYS = ["0.85", "0.6", "0.35"]


def plot_figures(axes, figures, label, form=",.2f"):
    """Bars of figures {name: (value, ci95)} on matplotlib axes, with their intervals; `label` says what they are."""
    figures = {name: figure for name, figure in figures.items() if figure[0] is not None}
    names = [f"{name}\n{value:{form}}" for name, (value, _) in figures.items()]
    axes.bar(names, [value for value, _ in figures.values()], color=GREYS, edgecolor="black")
    for k, (value, ci95) in enumerate(figures.values()):
        if ci95 is not None:
            axes.errorbar(
                k, value, [[value - ci95[0]], [ci95[1] - value]], color="black", capsize=6
            )
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter("{x:.0%}" if form.endswith("%") else "{x:,g}")


def plot_results(metrics):
    """A figure with a panel for each of the figures that were measured, of those that most depends on; shown once."""
    import matplotlib.pyplot as plt  # half a second, which notebook 2 needs only at its end

    models = figures_of(metrics)
    wanted = (
        "response perplexity",
        "answers right word for word",
        "answers that stop",
        "mean new tokens",
    )
    wanted = [
        column
        for column in wanted
        if all(stored(entry, column)[0] is not None for entry in models.values())
    ]
    figure, panels = plt.subplots(
        1, len(wanted), figsize=(4 * len(wanted), 3.5), layout="constrained", squeeze=False
    )
    for axes, column in zip(panels[0], wanted, strict=True):
        bars = {model: stored(entry, column) for model, entry in models.items()}
        plot_figures(axes, bars, column, COLUMNS[column][2])
    plt.close(figure)  # else a notebook shows it a second time
    return figure
