"""Ask a model of a finished run: what `make ask` does with it. Copying needs none of this."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.context import TableContext, answer_with_context, load_context
from tabletune.evaluation.answers import generate
from tabletune.evaluation.question_files import AskedQuestion
from tabletune.evaluation.trained_run import TrainedRun, open_trained_run
from tabletune.model.devices import compute_dtype
from tabletune.model.run_models import load_adapted, load_merged


def ask_model(
    run_dir: Path, part: str, questions: Sequence[AskedQuestion], settings: Mapping[str, Any]
) -> tuple[pd.DataFrame, TableContext | None]:
    """The answers of a part of a run, "adapter", "merged" or "base", and the rows it answers from.

    The columns of the answers are those of `context.answer_with_context`. Raises StageError if the
    parts of the run are missing, or do not belong together.
    """
    trained = open_trained_run(
        run_dir,
        str(run_dir),
        settings["base_model"],
        with_merged=part == "merged",
        indexes=(),
    )
    context = load_context(trained.folder, "use", settings["unknown_threshold"])
    answers = ask_part(trained, part, prompts_of(trained, questions), context, settings)
    return answers, context


def prompts_of(trained: TrainedRun, questions: Sequence[AskedQuestion]) -> list[dict]:
    """The prompts for questions, as training had them.

    With the system turn of the training rows, if they have one.
    """
    # the same for all rows: notebook 1 puts it before each
    first = trained.splits["train"][0]["prompt"]
    system = [message for message in first[:1] if message["role"] == "system"]
    prompts = []
    for question in questions:
        prompts.append({"prompt": [*system, {"role": "user", "content": question.question}]})
    return prompts


def ask_part(
    trained: TrainedRun,
    part: str,
    prompts: list[dict],
    context: TableContext | None,
    settings: Mapping[str, Any],
) -> pd.DataFrame:
    """The answers of a part of the run to prompts, see `context.answer_with_context`."""
    source = (
        settings["base_model"],
        settings["base_model_revision"],
        compute_dtype(settings["precision"]),
        settings["attn_implementation"],
    )
    sampling = {}
    if settings["do_sample"]:
        sampling = {"do_sample": True}
        sampling |= {name: settings[name] for name in ("temperature", "top_p")}
    if part == "merged":
        model, _ = load_merged(trained.merged, trained.folder / "adapter", *source)
    else:
        model = load_adapted(trained.folder / "adapter", *source)

    def generate_answers(rows: list) -> tuple[pd.DataFrame, float]:
        return generate(
            model,
            trained.tokenizer,
            trained.stop_token_ids,
            rows,
            settings["eval_batch_size"],
            settings["max_new_tokens"],
            settings["seed"],
            **sampling,
        )

    if part == "base":
        with model.disable_adapter():
            answers, _ = answer_with_context(context, prompts, generate_answers)
    else:
        answers, _ = answer_with_context(context, prompts, generate_answers)
    return answers
