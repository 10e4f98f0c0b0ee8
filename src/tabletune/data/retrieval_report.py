"""What notebook 1 shows of the rows in prompts."""

from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.context import TableContext
from tabletune.run.artifacts import load_dataset_of_run

OFF = "`context_rows` is 0: the prompts of this run have no rows of the table in them."
LOOKUP = "refused by the lookup alone"
NO_QUESTIONS = "These rows are texts without questions."
HEADINGS = {
    "train": "--- A TRAINING QUESTION",
    "validation": "--- A VALIDATION QUESTION",
}
RIGHT = "--- THE RIGHT ANSWER"
KINDS = {
    "own row": "– with their own row in the prompt",
    "other wording": "– with the same answer under another question",
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
    lines["prompts dropped because they are too long"] = context["dropped"]
    lines["tokens of a training prompt: median"] = context["tokens"]["p50"]
    lines["tokens of a training prompt: longest"] = context["tokens"]["max"]
    lines["tokens of all training prompts together"] = context["tokens"]["sum"]
    lines["validation prompts, of one question each"] = context["prompts"]["validation"]
    if context["unknown_answer"]:
        lines["questions out of scope"] = context["out_of_scope"]
        lines["unknown_threshold"] = context["unknown_threshold"]
        lines[f"{LOOKUP}: reworded questions of the table"] = f"{context['false_nothing']:.0%}"
        lines[f"{LOOKUP}: questions without a row"] = f"{context['refused']:.0%}"
    return pd.Series(lines, name="with rows in the prompt", dtype=object).to_frame()


def example_prompt(run: Path, context: TableContext | None) -> str:
    """The first question of the training split and of the validation split, as the model is asked.

    Each with the right answer, and with rows of the table in the prompt if there is a `context`.
    A sentence for texts without questions.
    """
    splits, _ = load_dataset_of_run(run)
    shown = []
    for name in ("train", "validation"):
        row = next(iter(splits[name]), None)
        if row is None or not row["prompt"]:
            return NO_QUESTIONS
        shown.append(prompt_and_answer(HEADINGS[name], row, context))
    return "\n\n".join(shown)


def prompt_and_answer(heading: str, row: dict[str, Any], context: TableContext | None) -> str:
    """A row's question as it is put to the model, and the right answer, under a heading.

    With a `context`, the heading also has the scores of the rows in the prompt.
    """
    answer = row["completion"][0]["content"]
    if context is None:
        return f"{heading}\n\n{row['prompt'][-1]['content']}\n\n{RIGHT}\n\n{answer}"
    prompt = context.prompt(row["prompt"])
    if not context.has_answer([answer]):
        answer = context.settings.unknown_answer or answer
    scores = ", ".join(f"{hit.score:.2f}" for hit in prompt.hits)
    heading += f"; similarity of the rows: {scores}"
    if prompt.refused:
        threshold = context.settings.unknown_threshold
        heading += f", below {threshold:g}: so the model is not asked"
    return f"{heading}\n\n{prompt.messages[-1]['content']}\n\n{RIGHT}\n\n{answer}"
