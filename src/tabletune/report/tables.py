"""Tables of results and differences, and answers side by side."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML

from tabletune.report.text import (
    COLUMNS,
    CONTENT_COLUMNS,
    PARTS,
    figures_of,
    stored,
    with_interval,
)

OUTCOMES = {"right": "✓ right", "wrong": "✗ wrong", "nothing": "– says nothing"}


def results_table(metrics: dict) -> pd.DataFrame:
    """The figures of `evaluation/metrics.json` with their intervals, as texts: a line a model."""
    models = figures_of(metrics)
    lines = {}
    for column, (_, _, form) in COLUMNS.items():
        figures = {model: stored(entry, column) for model, entry in models.items()}
        if any(value is not None for value, _ in figures.values()):
            lines[column] = {
                model: with_interval(*figure, form) for model, figure in figures.items()
            }
    return pd.DataFrame(lines)


def content_table(metrics: dict) -> pd.DataFrame:
    """How right the answers are, as texts: a line a set of questions and model, with its 95%
    intervals.
    """
    lines = []
    for part, title in PARTS.items():
        for model, entry in figures_of(metrics).items():
            content = (entry.get("content") or {}).get(part) or {}
            if not content.get("questions"):
                continue
            line = {"questions": f"{title} ({content['questions']})", "model": model}
            for column, (name, form) in CONTENT_COLUMNS.items():
                if content.get(name) is not None:
                    line[column] = with_interval(content[name], content.get(f"{name}_ci95"), form)
            lines.append(line)
    if not lines:
        return pd.DataFrame()
    columns = ["questions", "model", *CONTENT_COLUMNS]
    table = pd.DataFrame(lines).reindex(columns=columns).dropna(axis="columns", how="all")
    if not metrics.get("retrieval"):  # without it no answer is "nothing"
        table = table.drop(columns=['says "nothing"', 'wrongly "nothing"'], errors="ignore")
    return table.fillna("–").set_index(["questions", "model"])


def difference_line(name: str, entry: dict) -> dict[str, str]:
    """A difference as texts: the logarithm of a perplexity as a ratio, a rate in points."""
    value, ci95 = entry["difference"], entry["ci95"]
    form = "+.1f"
    if "log_perplexity" in name:
        name = name.replace("log_perplexity", "perplexity ratio")
        # the ratio of two perplexities is easier to read than the difference of their logarithms
        value, form = math.exp(value), ".4f"
        ci95 = None if ci95 is None else np.exp(ci95)
    elif name.endswith("chrf"):
        name = f"{name[:-4]}chrF"
    elif name != "mean_new_tokens":
        name = f"{name}, points"
        value, form = 100 * value, "+.0f"
        ci95 = None if ci95 is None else [100 * limit for limit in ci95]
    return {
        "figure": name.replace("_", " "),
        "difference": with_interval(value, ci95, form),
        "is it one?": "yes" if entry["significant"] else "cannot be told",
    }


def differences_table(differences: dict) -> pd.DataFrame:
    """The `differences` of the metrics, {pair of models: {figure: entry}}, as texts."""
    lines = []
    for pair, entries in differences.items():
        for name, entry in entries.items():
            lines.append({"models": pair, **difference_line(name, entry)})
    return pd.DataFrame(lines).set_index(["models", "figure"])


def all_differences(metrics: dict) -> pd.DataFrame:
    """The differences of content and of form between the models, the content first, as texts."""
    differences = {}
    for pair, entries in metrics["differences"].items():
        content = (metrics.get("content_differences") or {}).get(pair, {})
        of_pair = {}
        for part, figures in content.items():
            for name, entry in figures.items():
                of_pair[f"{PARTS[part]}: {name}"] = entry
        differences[pair] = of_pair | entries
    return differences_table(differences)


def side_by_side(columns: Mapping[str, Sequence[str]], rows: int, disclaimer: str) -> HTML:
    """An HTML table of texts under the disclaimer, line breaks kept. `columns` maps a heading to a
    list of texts.
    """
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"
    head = "".join(f'<th style="text-align:left">{escape(heading)}</th>' for heading in columns)
    body = ""
    for i in range(rows):
        cells = [f'<td style="{style}">{as_html(texts[i])}</td>' for texts in columns.values()]
        body += f"<tr>{''.join(cells)}</tr>"
    return HTML(
        f"<p><b>{escape(disclaimer)}</b></p><table "
        f"style='table-layout:fixed;width:100%'><tr>{head}</tr>{body}</table>"
    )


def as_html(text: str) -> str:
    """A text as HTML: nothing in it is markup, but `**bold**` of Markdown is bold."""
    return re.sub(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"<b>\1</b>", escape(text))


def samples_table(folder: Path, disclaimer: str, of_each: int = 3) -> HTML:
    """Some of the answers in `answers.jsonl` side by side, `of_each` kind of question.

    Each answer says whether it is right, and whether it was cut for its length.
    """
    text = (folder / "answers.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows: dict[tuple, dict] = {}
    for line in lines:
        row = rows.setdefault((line["part"], line["group"]), {})
        row["question"] = f"[{PARTS[line['part']]}]\n{line['asked']}"
        row["in the table"] = line["references"][0]
        row[line["model"]] = judged_answer(line)
    shown = []
    for part in PARTS:
        shown += [row for (of_part, _), row in rows.items() if of_part == part][:of_each]
    models = [name for name in ("base", "adapter", "merged") if any(name in row for row in shown)]
    headings = ["question", "in the table", *models]
    columns = {heading: [row.get(heading, "–") for row in shown] for heading in headings}
    return side_by_side(columns, len(shown), disclaimer)


def judged_answer(line: dict) -> str:
    """An answer of `answers.jsonl` as it is shown."""
    cut = "" if line.get("stopped", True) else " … [cut: max_new_tokens]"
    return f"{OUTCOMES[line['outcome']]}\n{line['answer']}{cut}"


def own_answers_table(answers: dict, asked: list[str], disclaimer: str) -> HTML:
    """The answers to the reader's own question side by side, {question: {model: [answer]}}."""
    columns = {"question": asked}
    for text in asked:
        columns |= answers[text]
    return side_by_side(columns, len(asked), disclaimer)
