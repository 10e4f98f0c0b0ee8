"""What notebook 5 shows: the recommendation, and all ways to answer as tables and as a plot."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from IPython.display import HTML, Markdown

from tabletune.report.tables import as_shown, side_by_side
from tabletune.report.text import PARTS, with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = ("reworded", "table", "new")  # of the parts of the questions, the most important first


def parts_of(metrics: Mapping) -> list[str]:
    """The parts that were asked, in ORDER."""
    first = next(iter(metrics["ways"].values()))
    return [part for part in ORDER if part in first["content"]]


def questions_table(questions: Sequence[Mapping]) -> pd.DataFrame:
    """How many questions there are of each part, and the first of each."""
    lines = {}
    for part in ORDER:
        texts = [question["asked"] for question in questions if question["part"] == part]
        if texts:
            lines[PARTS[part]] = {"number": len(texts), "for example": texts[0]}
    return pd.DataFrame.from_dict(lines, orient="index")


def recommendation(metrics: Mapping) -> Markdown:
    """What to ship, as a heading, and the reasons below it."""
    first, *reasons = metrics["verdict"]["sentences"]
    return Markdown(f"### {first}\n\n" + "\n".join(f"- {reason}" for reason in reasons))


def perplexity_text(value: float | None, ci95: list[float] | None) -> str:
    """A perplexity with its interval; large ones without decimals."""
    form = ",.0f" if value is not None and value >= 100 else ",.2f"
    return with_interval(value, ci95, form)


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
                    "perplexity of the table's answers": perplexity_text(
                        reading.get("response"), reading.get("response_ci95")
                    ),
                    "tokens a question": f"{entry['tokens_a_question']:,.0f}",
                    "seconds a question": f"{entry['seconds_a_question']:.2g}",
                }
            )
    return pd.DataFrame(lines).set_index(["questions", "way"])


def training_table(metrics: Mapping) -> pd.DataFrame:
    """How many more answers of the fine-tuned model are right than of each other way, as texts.

    In percentage points: a line a way, a column for each part of the questions.
    """
    lines = {}
    for pair, differences in metrics["differences"].items():
        trained, _, other = pair.partition(" - ")
        line = {}
        for part in parts_of(metrics):
            entry = differences[part]["right"]
            points = [100 * value for value in (entry["difference"], *entry["ci95"])]
            text = with_interval(points[0], points[1:], "+.0f")
            line[PARTS[part]] = text if entry["significant"] else f"{text}, may be chance"
        lines[f"{trained} against {other}"] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def answers_of_ways(lines: Sequence[Mapping], disclaimer: str, most: int = 2) -> HTML:
    """The first `most` reworded questions, what each way answers, and the table's own answer.

    `lines` are those of `baselines/answers.jsonl`.
    """
    answered = pd.DataFrame(lines).query("part == 'reworded'")
    shown = answered.pivot_table("answer", "way", "question", "first", sort=False).iloc[:, :most]
    shown.loc["the table"] = answered.groupby("question")["references"].first().str[0]
    shown = shown.map(as_shown).reset_index()
    return side_by_side(shown.to_dict("list"), len(shown), disclaimer)


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
