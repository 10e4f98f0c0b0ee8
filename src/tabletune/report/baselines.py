"""The table and the plot of notebook 5: every way to answer, on the same questions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from tabletune.report.text import PARTS, with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = ("reworded", "table", "new")  # of the parts of the questions, the most important first


def parts_of(metrics: Mapping) -> list[str]:
    """The parts that were asked, in ORDER."""
    first = next(iter(metrics["ways"].values()))
    return [part for part in ORDER if part in first["content"]]


def baselines_table(metrics: Mapping) -> pd.DataFrame:
    """The figures of `baselines/metrics.json` as texts with their intervals.

    A line for each part and way.
    """
    lines = []
    for part in parts_of(metrics):
        for name, entry in metrics["ways"].items():
            content, reading = entry["content"][part], entry["perplexity"].get(part, {})
            lines.append(
                {
                    "questions": PARTS[part],
                    "way": name,
                    "right": with_interval(content["right"], content["right_ci95"], ".0%"),
                    "chrF": with_interval(content["chrf"], content["chrf_ci95"], ".0f"),
                    "perplexity of the references": with_interval(
                        reading.get("response"), reading.get("response_ci95"), ",.2f"
                    ),
                    "tokens a question": f"{entry['tokens_a_question']:,.0f}",
                    "seconds a question": f"{entry['seconds_a_question']:.2g}",
                }
            )
    return pd.DataFrame(lines).set_index(["questions", "way"])


def plot_baselines(metrics: Mapping) -> "Figure":
    """A figure with a panel for each part of the questions.

    The share of right answers of each way, with intervals.
    """
    import matplotlib.pyplot as plt  # half a second

    parts = parts_of(metrics)
    names = list(metrics["ways"])
    figure, panels = plt.subplots(
        1,
        len(parts),
        figsize=(2 + 3.2 * len(parts), 1.2 + 0.4 * len(names)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, part in zip(panels[0], parts, strict=True):
        for place, name in enumerate(names):
            content = metrics["ways"][name]["content"][part]
            if content["right_ci95"] is not None:
                axes.plot(content["right_ci95"], [place, place], "|-k", markersize=9)
            # black points: what training has made
            trained = metrics["ways"][name]["model"] == "adapter"
            fill = "black" if trained else "0.7"
            axes.plot(content["right"], place, "o", color=fill, markeredgecolor="black")
        axes.set(xlim=(-0.03, 1.03), xlabel="right answers", ylim=(len(names) - 0.5, -0.5))
        axes.set_title(f"{PARTS[part]}: {content['questions']}", fontsize=9)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.grid(axis="x", color="0.9")
    panels[0][0].set_yticks(range(len(names)), names)
    plt.close(figure)  # else a notebook shows it a second time
    return figure
