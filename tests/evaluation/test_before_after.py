"""One question of the table, answered by the base model and by the fine-tuned one."""

import json

import pytest
import torch
from conftest import TINY
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tabletune.evaluation.before_after import FILE, answer_before_and_after, before_and_after


@pytest.fixture(scope="module")
def adapted():
    """The tiny base model with an adapter that changes what it says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """A run folder after notebook 1, as far as its first question is concerned."""
    return write_run(tmp_path / "run", [{"role": "user", "content": "What is tea?"}])


def write_run(folder, prompt, answers=("A drink.",)):
    """Write a data set whose training split begins with a prompt and its answers."""
    rows = []
    for answer in answers:
        completion = [{"role": "assistant", "content": answer}]
        rows.append({"prompt": prompt, "completion": completion, "group": "tea", "text": "…"})
    splits = {name: Dataset.from_list(rows) for name in ("train", "validation", "test")}
    DatasetDict(splits).save_to_disk(folder / "dataset")
    (folder / "dataset" / "report.json").write_text(json.dumps({"example": None}))
    return folder


def test_both_answer_the_first_question_of_the_training_split(adapted, tokenizer, run):
    answer_before_and_after(adapted, *tokenizer, run)
    answers = json.loads((run / FILE).read_text(encoding="utf-8"))
    assert answers["question"] == "What is tea?"
    assert answers["in the table"] == "A drink."
    assert answers["before: the base model"] != answers["after: fine-tuned"]


def test_three_answers_of_the_table_are_shown_and_the_others_are_counted(
    adapted, tokenizer, tmp_path
):
    prompt = [{"role": "user", "content": "What is tea?"}]
    run = write_run(
        tmp_path / "five", prompt, ["A drink.", "A leaf.", "A " + "very " * 120, "4", "5"]
    )
    answer_before_and_after(adapted, *tokenizer, run)
    in_table = json.loads((run / FILE).read_text(encoding="utf-8"))["in the table"]
    assert in_table.startswith("A drink.\n\n[or]\n\nA leaf.\n\n[or]\n\nA very")
    assert in_table.endswith("[the table has 2 other answers, which are right, too]")
    assert "[the table has 2 other answers, which are right, too]" in before_and_after(run).data


def test_asking_draws_no_random_number(adapted, tokenizer, run):
    """The figures of a run would differ from those of a run that does not ask."""
    state = torch.get_rng_state()
    answer_before_and_after(adapted, *tokenizer, run)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_adapter_is_on_again_afterwards(adapted, tokenizer, run):
    ids = torch.tensor([[5, 6, 7]])
    before = adapted(ids).logits
    answer_before_and_after(adapted, *tokenizer, run)
    assert torch.equal(adapted(ids).logits, before)


def test_the_page_shows_both_under_the_disclaimer(adapted, tokenizer, run):
    answer_before_and_after(adapted, *tokenizer, run)
    shown = before_and_after(run).data
    assert "before: the base model" in shown
    assert "after: fine-tuned" in shown
    assert "Answers may be wrong." in shown


def test_texts_without_questions_are_not_asked(adapted, tokenizer, tmp_path):
    run = write_run(tmp_path / "texts", [])
    answer_before_and_after(adapted, *tokenizer, run)
    assert "Not asked" in before_and_after(run).data


def test_notebook_2_leaves_the_answers_in_the_run(finished_run):
    answers = json.loads((finished_run / FILE).read_text(encoding="utf-8"))
    assert set(answers) == {
        "question", "in the table", "before: the base model", "after: fine-tuned"
    }  # fmt: skip
