"""What notebook 1 shows of the rows in prompts."""

from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.context import TableContext
from tabletune.run.artifacts import load_dataset_of_run

OFF = "`context_rows` is 0: the model is asked without rows of the table."
LOOKUP = "refused by the lookup alone"
NO_QUESTIONS = "These rows are texts without questions."
KINDS = {
    "own row": "– with their own row in the prompt",
    "other wording": "– with their answer under another wording",
    "missing": "– with no row that answers them",
    "practice": "– about made-up tables, for practice",
}


def prompts_table(report: dict[str, Any]) -> pd.DataFrame:
    """What became of the rows: a table of one column; an empty one without rows in the prompts."""
    context = report.get("context")
    if context is None:
        return pd.DataFrame()
    questions = context["questions"]
    lines = {
        "training prompts": context["prompts"]["train"],
        "questions that they ask": sum(questions.values()),
    }
    for kind, text in KINDS.items():
        lines[text] = questions.get(kind, 0)
    lines["prompts made shorter to fit max_length"] = context["shortened"]
    lines["prompts dropped, too long"] = context["dropped"]
    lines["tokens of a training prompt, half of them up to"] = context["tokens"]["p50"]
    lines["tokens of the longest"] = context["tokens"]["max"]
    lines["tokens of all training prompts"] = context["tokens"]["sum"]
    lines["validation prompts, of one question each"] = context["prompts"]["validation"]
    if context["unknown_answer"]:
        lines["unknown_threshold"] = context["unknown_threshold"]
        lines[f"{LOOKUP}: reworded questions of the table"] = f"{context['false_nothing']:.0%}"
        lines[f"{LOOKUP}: questions without a row"] = f"{context['refused']:.0%}"
    return pd.Series(lines, name="with rows in the prompt", dtype=object).to_frame()


def example_prompt(run: Path, context: TableContext | None) -> str:
    """The last turn of the first prompt of the validation split; with a context, a prompt of the
    training split and one of the validation split, with rows in them, and what is right.
    """
    splits, _ = load_dataset_of_run(run)
    rows: dict[str, dict[str, Any]] = {}
    for name in ("train", "validation"):
        row = next(iter(splits[name]), None)
        if row is None or not row["prompt"]:
            return NO_QUESTIONS
        rows[name] = row
    if context is None:
        return rows["validation"]["prompt"][-1]["content"]
    return "\n\n".join(prompt_and_answer(name, row, context) for name, row in rows.items())


def prompt_and_answer(split: str, row: dict[str, Any], context: TableContext) -> str:
    """A row's question as the model gets it, with the scores of its rows, and what is right."""
    prompt = context.prompt(row["prompt"])
    answer = row["completion"][0]["content"]
    if not context.has_answer([answer]):
        answer = context.settings.unknown_answer or answer
    scores = ", ".join(f"{hit.score:.2f}" for hit in prompt.hits)
    heading = f"--- {split.upper()} SPLIT; similarity of the rows: {scores}"
    if prompt.refused:
        heading += f"; below {context.settings.unknown_threshold:g}, so the model is not asked"
    return f"{heading}\n\n{prompt.messages[-1]['content']}\n\n--- RIGHT\n\n{answer}"
