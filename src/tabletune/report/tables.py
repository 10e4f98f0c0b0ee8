"""Tables of results and differences, and answers side by side."""

import math
from html import escape

import numpy as np
import pandas as pd
from IPython.display import HTML

from tabletune.report.text import COLUMNS, figures_of, stored, with_interval


def results_table(metrics):
    """The figures of `evaluation/metrics.json`, each with its interval, as a DataFrame of texts: a line a model."""
    models = figures_of(metrics)
    lines = {
        column: {
            model: with_interval(*stored(entry, column), form) for model, entry in models.items()
        }
        for column, (_, _, form) in COLUMNS.items()
        if any(stored(entry, column)[0] is not None for entry in models.values())
    }
    return pd.DataFrame(lines)


def difference_line(name, entry):
    """A difference as texts: the logarithm of a perplexity as a ratio, a rate in points of percent."""
    value, ci95, form = entry["difference"], entry["ci95"], "+.1f"
    if "log_perplexity" in name:
        name, value, form = (
            name.replace("log_perplexity", "perplexity ratio"),
            math.exp(value),
            ".4f",
        )
        ci95 = None if ci95 is None else np.exp(ci95)
    elif name != "mean_new_tokens":
        name, value, form = f"{name}, points", 100 * value, "+.0f"
        ci95 = None if ci95 is None else [100 * limit for limit in ci95]
    real = "yes" if entry["significant"] else "cannot be told"
    return {
        "figure": name.replace("_", " "),
        "difference": with_interval(value, ci95, form),
        "is it one?": real,
    }


def differences_table(differences):
    """The `differences` of the metrics, {pair of models: {figure: entry}}, as a DataFrame of texts."""
    lines = [
        {"models": pair, **difference_line(name, entry)}
        for pair, entries in differences.items()
        for name, entry in entries.items()
    ]
    return pd.DataFrame(lines).set_index(["models", "figure"])


def side_by_side(columns, rows, disclaimer):
    """An HTML table of texts, line breaks kept, under the disclaimer. `columns` maps a heading to a list of texts."""
    cell = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere">{}</td>'
    head = "".join(f'<th style="text-align:left">{escape(heading)}</th>' for heading in columns)
    body = "".join(
        "<tr>" + "".join(cell.format(escape(c[i])) for c in columns.values()) + "</tr>"
        for i in range(rows)
    )
    disclaimer = f"<p><b>{escape(disclaimer)}</b></p>"
    return HTML(
        f"{disclaimer}<table style='table-layout:fixed;width:100%'><tr>{head}</tr>{body}</table>"
    )
