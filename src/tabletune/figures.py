"""How figures look: with their intervals, in tables, in plots that can be read in grey, beside the answers."""

import math
from html import escape

import numpy as np
import pandas as pd
from IPython.display import HTML

GREYS = ["0.85", "0.6", "0.35"]
COLUMNS = {  # of the table of figures: where each stands in the entry of a model, and its format
    "response perplexity": ("perplexity", "response", ",.1f"),
    "full-text perplexity": ("perplexity", "full_text", ",.1f"),
    "answers right word for word": ("generation", "exact_match_rate", ".0%"),
    "answers that stop": ("generation", "stop_rate", ".0%"),
    "answers with the structure": ("generation", "structure_rate", ".0%"),
    "mean new tokens": ("generation", "mean_new_tokens", ".0f"),
}


def with_interval(value, ci95, form):
    """A figure and its interval as text, such as `6.0 (5.2 – 6.9)`; for None a dash."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if ci95 is None else f" ({ci95[0]:{form}} – {ci95[1]:{form}})")


def figures_of(metrics):
    """The entries of the models among the metrics, {name: entry}, a model that was evaluated in 4 bits named so."""
    models = {name: metrics[name] for name in ("base", "adapter", "merged") if name in metrics}
    return {name + ", in 4 bits" * ("evaluated_in" in entry): entry for name, entry in models.items()}


def stored(entry, column):
    """A figure of COLUMNS in the entry of a model: (value, [low, high]), None for what was not measured."""
    group, name, _ = COLUMNS[column]
    return (entry.get(group) or {}).get(name), (entry.get(group) or {}).get(f"{name}_ci95")


def results_table(metrics):
    """The figures of `evaluation/metrics.json`, each with its interval, as a DataFrame of texts: a line a model."""
    models = figures_of(metrics)
    lines = {
        column: {model: with_interval(*stored(entry, column), form) for model, entry in models.items()}
        for column, (_, _, form) in COLUMNS.items()
        if any(stored(entry, column)[0] is not None for entry in models.values())
    }
    return pd.DataFrame(lines)


def difference_line(name, entry):
    """A difference as texts: the logarithm of a perplexity as a ratio, a rate in points of percent."""
    value, ci95, form = entry["difference"], entry["ci95"], "+.1f"
    if "log_perplexity" in name:
        name, value, form = name.replace("log_perplexity", "perplexity ratio"), math.exp(value), ".4f"
        ci95 = None if ci95 is None else np.exp(ci95)
    elif name != "mean_new_tokens":
        name, value, form = f"{name}, points", 100 * value, "+.0f"
        ci95 = None if ci95 is None else [100 * limit for limit in ci95]
    real = "yes" if entry["significant"] else "cannot be told"
    return {"figure": name.replace("_", " "), "difference": with_interval(value, ci95, form), "is it one?": real}


def differences_table(differences):
    """The `differences` of the metrics, {pair of models: {figure: entry}}, as a DataFrame of texts."""
    lines = [
        {"models": pair, **difference_line(name, entry)}
        for pair, entries in differences.items()
        for name, entry in entries.items()
    ]
    return pd.DataFrame(lines).set_index(["models", "figure"])


def plot_figures(axes, figures, label, form=",.2f"):
    """Bars of figures {name: (value, ci95)} on matplotlib axes, with their intervals; `label` says what they are."""
    figures = {name: figure for name, figure in figures.items() if figure[0] is not None}
    names = [f"{name}\n{value:{form}}" for name, (value, _) in figures.items()]
    axes.bar(names, [value for value, _ in figures.values()], color=GREYS, edgecolor="black")
    for k, (value, ci95) in enumerate(figures.values()):
        if ci95 is not None:
            axes.errorbar(k, value, [[value - ci95[0]], [ci95[1] - value]], color="black", capsize=6)
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter("{x:.0%}" if form.endswith("%") else "{x:,g}")


def plot_results(metrics):
    """A figure with a panel for each of the figures that were measured, of those that most depends on; shown once."""
    import matplotlib.pyplot as plt  # half a second, which notebook 2 needs only at its end

    models = figures_of(metrics)
    wanted = ("response perplexity", "answers right word for word", "answers that stop", "mean new tokens")
    wanted = [column for column in wanted if all(stored(entry, column)[0] is not None for entry in models.values())]
    figure, panels = plt.subplots(1, len(wanted), figsize=(4 * len(wanted), 3.5), layout="constrained", squeeze=False)
    for axes, column in zip(panels[0], wanted, strict=True):
        bars = {model: stored(entry, column) for model, entry in models.items()}
        plot_figures(axes, bars, column, COLUMNS[column][2])
    plt.close(figure)  # else a notebook shows it a second time
    return figure


def side_by_side(columns, rows, disclaimer):
    """An HTML table of texts, line breaks kept, under the disclaimer. `columns` maps a heading to a list of texts."""
    cell = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere">{}</td>'
    head = "".join(f'<th style="text-align:left">{escape(heading)}</th>' for heading in columns)
    body = "".join("<tr>" + "".join(cell.format(escape(c[i])) for c in columns.values()) + "</tr>" for i in range(rows))
    disclaimer = f"<p><b>{escape(disclaimer)}</b></p>"
    return HTML(f"{disclaimer}<table style='table-layout:fixed;width:100%'><tr>{head}</tr>{body}</table>")
