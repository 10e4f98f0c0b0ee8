"""What notebook 1 shows of the rows in prompts."""

from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.context import TableContext
from tabletune.run.artifacts import load_dataset_of_run

OFF = "`context_rows` is 0: the model is asked without rows of the table."
NO_QUESTIONS = "These rows are texts without questions."
KINDS = {
    "own row": "questions whose own row is in the prompt",
    "other wording": "questions whose answer is there under another wording",
    "missing": "questions whose rows are missing",
    "practice": "questions about practice tables",
}


def prompts_table(report: dict[str, Any]) -> pd.DataFrame:
    """What became of the rows: a table of one column; an empty one without rows in the prompts."""
    context = report.get("context")
    if context is None:
        return pd.DataFrame()
    lines = {
        "training prompts": context["prompts"]["train"],
        "validation prompts": context["prompts"]["validation"],
    }
    for kind, text in KINDS.items():
        lines[text] = context["questions"].get(kind, 0)
    lines["prompts made shorter to fit max_length"] = context["shortened"]
    lines["prompts dropped, too long"] = context["dropped"]
    lines["tokens of a training prompt, half of them up to"] = context["tokens"]["p50"]
    lines["tokens of the longest"] = context["tokens"]["max"]
    lines["tokens of all training prompts"] = context["tokens"]["sum"]
    if context["unknown_answer"]:
        lines["unknown_threshold"] = context["unknown_threshold"]
        lines["reworded questions that it refuses"] = f"{context['false_nothing']:.0%}"
        lines["questions without a row that it refuses"] = f"{context['refused']:.0%}"
    return pd.Series(lines, name="with rows in the prompt", dtype=object).to_frame()


def example_prompt(run: Path, context: TableContext | None) -> str:
    """The last turn of the first prompt of the validation split; with rows in it, and their scores,
    if there is a context.
    """
    splits, _ = load_dataset_of_run(run)
    messages = next(iter(splits["validation"]["prompt"]), None) or []
    if not messages:
        return NO_QUESTIONS
    if context is None:
        return messages[-1]["content"]
    prompt = context.prompt(messages)
    scores = ", ".join(f"{hit.score:.2f}" for hit in prompt.hits)
    return f"{prompt.messages[-1]['content']}\n\n(similarity of the rows: {scores})"
