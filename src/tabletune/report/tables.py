"""Tables of results and differences, and answers side by side."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

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

OUTCOMES = {"right": "✓ right", "wrong": "✗ wrong", "nothing": "– says “nothing”"}
NO_DIFFERENCE = "no difference shown"
WITHOUT_ROWS = "log_perplexity_without_rows"
FIGURES_COMPARED = {  # of the differences, {name in the metrics: what tables call it}
    "log_perplexity": "perplexity ratio",
    WITHOUT_ROWS: "perplexity ratio, rows left out",
    "outside_log_perplexity": "perplexity ratio, other texts",
    "exact_match_rate": "answers right word for word",
    "stop_rate": "answers that stop",
    "structure_rate": "answers with the structure",
    "emergency_seeks_help": "emergencies: sends to help",
    "emergency_offers_remedy": "emergencies: offers a remedy",
    "everyday_seeks_help": "everyday: sends to help",
    "everyday_offers_remedy": "everyday: offers a remedy",
}
NEITHER_IS_BETTER = {  # {name: (what more of it is called, what less of it)}
    "mean_new_tokens": ("longer", "shorter"),
    WITHOUT_ROWS: ("higher", "lower"),
    "everyday_seeks_help": ("more often", "less often"),
    "everyday_offers_remedy": ("more often", "less often"),
}
OF_ANSWERS = ("copied", "exact_match", "right_item", "facts", "chrf")  # not of refusals
MODELS = ("base", "adapter", "merged")
IN_TABLE = "in the table"
MOST_CHARACTERS = 600  # of an answer that are shown
SLACK = 100  # characters: so few more are shown, too
REPEATED = re.compile(r"(.{2,200}?)\1{3,}", re.DOTALL)  # the same, four times or more
LEAST_REPEATED = 80  # characters: a shorter repetition, such as a line of dashes, is shown


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


def form_table(metrics: dict) -> pd.DataFrame:
    """Perplexity and form with their intervals, as texts: a line a figure, a column a model.

    What was measured for one model alone says so for the others.
    """
    names = [name for name, (group, _, _) in COLUMNS.items() if not group.startswith("content")]
    table = results_table(metrics)
    table = table[[name for name in names if name in table]]
    return table.replace("–", "not measured").T


def content_table(metrics: dict) -> pd.DataFrame:
    """How right the answers are, as texts.

    A line a set of questions and model, with its 95% intervals.
    """
    with_rows = bool(metrics.get("retrieval"))
    lines = []
    for part, title in PARTS.items():
        if part == "new" and with_rows:
            title = "new questions, their rows left out"
        for model, entry in figures_of(metrics).items():
            content = (entry.get("content") or {}).get(part) or {}
            if content.get("questions"):
                name = f"{title} ({content['questions']})"
                lines.append({"questions": name, "model": model, **content_figures(content)})
    if not lines:
        return pd.DataFrame()
    columns = ["questions", "model", *CONTENT_COLUMNS]
    # a figure that this table does not have gets no column
    table = pd.DataFrame(lines).reindex(columns=columns).dropna(axis="columns", how="all")
    if not with_rows:  # then no answer is "nothing"
        table = table.drop(columns=[column for column in table if "nothing" in column])
    return table.fillna("–").set_index(["questions", "model"])


def content_figures(content: dict) -> dict[str, str]:
    """The figures of a model on one set of questions, {heading: text with the 95% interval}."""
    figures = {}
    for heading, (name, form) in CONTENT_COLUMNS.items():
        if content.get(name) is not None and applies_to(name, content):
            figures[heading] = with_interval(content[name], content.get(f"{name}_ci95"), form)
    return figures


def applies_to(name: str, content: Mapping[str, Any]) -> bool:
    """Whether a figure says something about these answers.

    Where all questions are to be refused, there are no answers to compare with the table's.
    """
    return name not in OF_ANSWERS or content.get("answerable") != 0


def reasons_table(reasons: Mapping[str, str]) -> dict[str, str]:
    """Why each figure of content applies to a table or not.

    Returns {column of the content table: sentence}, in the order of its columns.
    """
    names = {name: column for column, (name, _) in CONTENT_COLUMNS.items()}
    return {names[name]: reasons[name] for name in names if name in reasons}


def difference_line(name: str, entry: dict) -> dict[str, str]:
    """A difference as texts: the logarithm of a perplexity as a ratio, a rate in points."""
    value, ci95 = entry["difference"], entry["ci95"]
    if "log_perplexity" in name:
        # the ratio of two perplexities is easier to read than the difference of their logarithms
        text = with_interval(math.exp(value), None if ci95 is None else np.exp(ci95), ".4f")
    elif name == "mean_new_tokens" or name.casefold().endswith("chrf"):
        text = with_interval(value, ci95, "+.1f")
    else:
        points = None if ci95 is None else [100 * limit for limit in ci95]
        text = f"{with_interval(100 * value, points, '+.0f')} points"
    shown = FIGURES_COMPARED.get(name, name).replace("_", " ")
    return {"figure": shown, "difference": text, "result": result_of(name, entry)}


def result_of(name: str, entry: dict) -> str:
    """What a difference says in words: is the first model better or worse?

    Of figures where neither more nor less is better, it says which of the two it is.
    """
    if not entry["significant"]:
        return NO_DIFFERENCE
    more = entry["difference"] > 0
    if name in NEITHER_IS_BETTER:
        more_of_it, less_of_it = NEITHER_IS_BETTER[name]
        return more_of_it if more else less_of_it
    lower_is_better = "log_perplexity" in name or name.endswith("offers_remedy")
    return "better" if more != lower_is_better else "worse"


def differences_table(differences: dict) -> pd.DataFrame:
    """The `differences` of the metrics, {pair of models: {figure: entry}}, as texts."""
    lines = []
    for pair, entries in differences.items():
        for name, entry in entries.items():
            lines.append({"models": pair, **difference_line(name, entry)})
    return pd.DataFrame(lines).set_index(["models", "figure"])


def all_differences(metrics: dict) -> pd.DataFrame:
    """The differences of content and of form between the models, the content first, as texts."""
    names = {name: column for column, (name, _) in CONTENT_COLUMNS.items()}
    differences = {}
    for pair, entries in metrics["differences"].items():
        content = (metrics.get("content_differences") or {}).get(pair, {})
        first_model = metrics.get(pair.split(" - ")[0]) or {}
        of_pair = {}
        for part, figures in content.items():
            # both models have answered the same questions
            of_part = (first_model.get("content") or {}).get(part) or {}
            for name, entry in figures.items():
                if applies_to(name, of_part):
                    of_pair[f"{PARTS[part]}: {names.get(name, name)}"] = entry
        for name, entry in entries.items():
            # with context_rows, training teaches the model not to give these answers
            left_out = name == "log_perplexity" and metrics.get("retrieval")
            of_pair[WITHOUT_ROWS if left_out else name] = entry
        differences[pair] = of_pair
    return differences_table(differences)


def side_by_side(columns: Mapping[str, Sequence[str]], rows: int, disclaimer: str) -> HTML:
    """An HTML table of texts under the disclaimer, line breaks kept.

    `columns` maps a heading to a list of texts, of which the first `rows` are shown.
    """
    table = html_table({heading: texts[:rows] for heading, texts in columns.items()})
    return HTML(f"<p><b>{escape(disclaimer)}</b></p>{table}")


def html_table(columns: Mapping[str, Sequence[str]]) -> str:
    """Texts as an HTML table, {heading: texts}, line breaks kept."""
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"
    head = "".join(f'<th style="text-align:left">{escape(heading)}</th>' for heading in columns)
    body = ""
    for texts in zip(*columns.values(), strict=True):
        cells = [f'<td style="{style}">{as_html(text)}</td>' for text in texts]
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<table style='table-layout:fixed;width:100%'><tr>{head}</tr>{body}</table>"


def as_html(text: str) -> str:
    """A text as HTML: nothing in it is markup, but `**bold**` of Markdown is bold."""
    return re.sub(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"<b>\1</b>", escape(text))


@dataclass(frozen=True)
class AnsweredQuestions:
    """Some questions of one kind side by side with their answers.

    A `title`, and `columns`, {heading: texts}.
    """

    title: str
    columns: dict[str, list[str]]


def answered_questions(
    lines: Sequence[dict], headings: Mapping[str, str], most: int
) -> list[AnsweredQuestions]:
    """At most `most` questions of each kind among the lines of `answers.jsonl`.

    The kinds come in the order of PARTS. `headings` are the models to show and what to call them. A
    model that was not asked a kind of question has no column there, and the title says who was
    asked.
    """
    shown = []
    for part, title in PARTS.items():
        rows: dict[str, dict[str, str]] = {}
        for line in lines:
            if line["part"] != part:
                continue
            row = rows.setdefault(line["group"], question_columns(line))
            if line["model"] in headings:
                row[headings[line["model"]]] = judged_answer(line)
        first = list(rows.values())[:most]
        if not first:
            continue
        # in the cpu profile only the merged model is asked all questions
        models = [name for name in headings.values() if all(name in row for row in first)]
        if len(models) < len(headings):
            title += f" (answered by the {' and the '.join(models)} model alone)"
        columns = {name: [row[name] for row in first] for name in ("question", IN_TABLE, *models)}
        shown.append(AnsweredQuestions(title[0].upper() + title[1:], columns))
    return shown


def question_columns(line: dict) -> dict[str, str]:
    """What stands beside the answers.

    The question, with the row that was most similar, and what the table says.
    """
    question = line["asked"]
    if line.get("rows"):
        best = line["rows"][0]
        similarity = f"similarity {best['score']:.2f}"
        question += f"\n\n[most similar row: “{best['question']}”, {similarity}]"
    answer = references_shown(line["references"])
    if not line.get("answerable", True):
        answer = f"[its rows are left out here, so “nothing” is right]\n{answer}"
    return {"question": question, IN_TABLE: answer}


def references_shown(references: Sequence[str]) -> str:
    """The first answer of the table to a question, and how many others it has."""
    answer = as_shown(references[0])
    more = len(references) - 1
    if more == 1:
        answer += "\n\n[the table has another answer, which is right, too]"
    elif more > 1:
        answer += f"\n\n[the table has {more} other answers, which are right, too]"
    return answer


def samples_table(folder: Path, disclaimer: str, of_each: int = 3) -> HTML:
    """Some of the answers in `answers.jsonl` side by side, `of_each` kind of question.

    Each answer says whether it is right, and whether it was cut for its length.
    """
    text = (folder / "answers.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    tables = []
    for group in answered_questions(lines, {name: name for name in MODELS}, of_each):
        table = html_table(group.columns)
        tables.append(f"<p><b>{escape(group.title)}</b></p>{table}")
    if not tables:
        return HTML("<p>Not measured: these rows are texts without questions.</p>")
    return HTML(f"<p><b>{escape(disclaimer)}</b></p>{''.join(tables)}")


def judged_answer(line: dict) -> str:
    """An answer of `answers.jsonl` as it is shown."""
    cut = "" if line.get("stopped", True) else " … [cut after max_new_tokens]"
    return f"{OUTCOMES[line['outcome']]}\n{as_shown(line['answer'])}{cut}"


def as_shown(text: str) -> str:
    """A text as it is shown: what repeats is shown twice, and a long text is cut.

    Both say so, and so does an empty text.
    """
    if not text.strip():
        return "[no text]"
    text = REPEATED.sub(shown_twice, text)
    if len(text) <= MOST_CHARACTERS + SLACK:
        return text
    cut = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS].rstrip()} … [not shown: {cut:,} more characters]"


def shown_twice(match: re.Match) -> str:
    """Two of the parts that repeat, and how many more there are; all of them if they are short."""
    part = match[1]
    if len(match[0]) < LEAST_REPEATED:
        return match[0]
    more = len(match[0]) // len(part) - 2
    return f"{part * 2} [not shown: the same {more} more times]"


def own_answers_table(answers: dict, asked: list[str], disclaimer: str) -> HTML:
    """The answers to the reader's own question side by side, {question: {model: [answer]}}."""
    if not asked:
        return HTML("<p>Not asked: these rows are texts without questions.</p>")
    columns = {"question": asked}
    for text in asked:
        for model, of_model in answers[text].items():
            columns[model] = [as_shown(answer) for answer in of_model]
    return side_by_side(columns, len(asked), disclaimer)
