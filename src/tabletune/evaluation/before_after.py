"""One question of the table, answered by the base model and by the fine-tuned one."""

from pathlib import Path

import pandas as pd
from accelerate import PartialState
from IPython.display import HTML
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from tabletune.data.context import answer_with_context, load_context
from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.evaluation.answers import generate
from tabletune.evaluation.questions import questions_of
from tabletune.report.tables import IN_TABLE, as_shown, references_shown, side_by_side
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import read_json, write_json

FILE = "training/answers.json"
NOT_ASKED = (
    "<p>Not asked: the rows are texts without questions, or the model is spread over GPUs.</p>"
)
MOST_TOKENS = 64  # of an answer: enough to see what it is like
MOST_REFERENCES = 3  # answers of the table that are shown: any of them is right


def answer_before_and_after(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int], run: Path
) -> None:
    """Ask the first question of the training split, before and after training.

    Writes the answers to FILE in the run folder. The base model is the model with its adapter
    switched off. Answers are greedy, so no random number is drawn. With `context_rows` the rows
    stand in the prompt. Nothing is written for texts without questions.
    """
    splits, _ = load_dataset_of_run(run)
    train = splits["train"]
    group = train["group"][0]
    rows = [place for place, other in enumerate(train["group"]) if other == group]
    questions = questions_of(train.select(rows))  # one question, with all of its answers
    if not questions:
        return
    context = load_context(run)

    def generate_answers(prompts: list) -> tuple[pd.DataFrame, float]:
        return generate(model, tokenizer, stop_token_ids, prompts, 1, MOST_TOKENS)

    references = questions[0]["references"]
    answers_of_table = [as_shown(text) for text in references[: MOST_REFERENCES - 1]]
    rest = references[MOST_REFERENCES - 1 :]
    if rest:
        # the last one that is shown also says how many more there are
        answers_of_table.append(references_shown(rest))
    answers = {"question": questions[0]["asked"], IN_TABLE: "\n\n[or]\n\n".join(answers_of_table)}
    with model.disable_adapter():
        before, _ = answer_with_context(context, questions, generate_answers)
    after, _ = answer_with_context(context, questions, generate_answers)
    for name, table in (("before: the base model", before), ("after: fine-tuned", after)):
        cut = "" if table["stopped"][0] else f" … [cut after {MOST_TOKENS} tokens]"
        answers[name] = table["answer"][0] + cut
    if PartialState().is_main_process:
        write_json(run / FILE, answers)


def before_and_after(run: Path) -> HTML:
    """The answers that `answer_before_and_after` left in a run folder, side by side.

    A sentence if it left none.
    """
    if not (run / FILE).exists():
        return HTML(NOT_ASKED)
    answers = read_json(run / FILE, "02_finetune_qlora")
    report = read_json(run / "dataset" / "report.json", "01_format_dataset")
    disclaimer = example_settings(report).get("disclaimer", NEUTRAL_DISCLAIMER)
    columns = {}
    for name, text in answers.items():
        # the table's answers were cut one by one, so that the last one is shown, too
        columns[name] = [text if name == IN_TABLE else as_shown(text)]
    return side_by_side(columns, 1, disclaimer)
