"""The figures of notebook 4 on perplexity and on the form of answers.

Whether an answer is right is decided in `content.py`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tabletune.evaluation.content import SHORT_ANSWER_WORDS
from tabletune.evaluation.scoring import perplexity
from tabletune.evaluation.structure import fixed_text, has_structure
from tabletune.model.inspection import context_length
from tabletune.stats import (
    FEWEST_GROUPS,
    RATES,
    count_groups,
    differences,
    mean_interval,
    perplexity_interval,
    rate_interval,
)

PAIRS = (("adapter", "base"), ("merged", "adapter"))  # the models that are compared


def check_answers(answers: pd.DataFrame, questions: list[dict], report: dict) -> pd.DataFrame:
    """The answers to `questions`, in their order, with what can be checked by itself.

    `structured` and `exact_match`. The structure is that of the answer template, if that has a text
    of its own and all references have it. An answer matches if it is one of its references word for
    word, in tables whose answers are labels or short: half of the references have at most
    `SHORT_ANSWER_WORDS` words.
    """
    # a table of conversations has no templates, and so no structure to check
    templates = report.get("templates") or {}
    template, column = templates.get("answer") or "", templates.get("answer_column") or ""
    references: list[str] = []
    for question in questions:
        references += question["references"]
    checked = answers[: len(questions)].copy()
    # a template of fields alone has no form that an answer could miss
    if re.search(r"\w", fixed_text(template)) and all(
        has_structure(text, template, column) for text in references
    ):
        checked["structured"] = [
            has_structure(answer, template, column) for answer in checked["answer"]
        ]
    if references and median(len(text.split()) for text in references) <= SHORT_ANSWER_WORDS:
        pairs = zip(checked["answer"], questions, strict=True)
        checked["exact_match"] = [answer in question["references"] for answer, question in pairs]
    return checked


def answer_bytes(row: dict) -> int:
    """How many bytes of UTF-8 the answers of a row of the data set have.

    What is in the loss, without stop tokens.
    """
    turns = [message for message in row["prompt"] if message["role"] == "assistant"]
    # turns that are not in the loss are not among the response's nats either
    flags = (row.get("learned") or "").split()
    if flags:
        turns = [turn for turn, flag in zip(turns, flags, strict=True) if flag == "1"]
    size = 0
    for turn in [*turns, *row["completion"]]:
        size += len((turn.get("content") or "").encode())
        if turn.get("tool_calls"):
            size += len(json.dumps(turn["tool_calls"], ensure_ascii=False).encode())
    return size


# --- figures


@torch.no_grad()
def joined_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> float:
    """The perplexity of texts joined into one sequence, prompts included: how it is often done."""
    ids = tokenizer("\n".join(texts), return_tensors="pt")["input_ids"]  # [1, tokens]
    ids = ids[:, : context_length(model.config)]  # what the model can read at once
    return math.exp(model(ids.to(model.device), labels=ids.to(model.device)).loss.item())


def summarize(
    scores: pd.DataFrame, answers: pd.DataFrame, groups: Sequence[str], draws: int, seed: int
) -> dict:
    """The entry of a model in `evaluation/metrics.json`.

    Intervals come from drawing `groups`, a key a row of `scores`. `answers` are to independent
    questions, checked by `check_answers`; none where nothing could be asked.
    """
    questions = count_groups(groups)
    figures: dict[str, float | list[float] | None] = {}
    for name, part in (("response", "response"), ("full_text", "full")):
        figures[name] = perplexity(scores, part)
        figures[f"{name}_ci95"] = perplexity_interval(scores, part, groups, draws, seed)
    if "response_bytes" in scores and scores["response_bytes"].sum():
        # bits, since that is what a byte is counted in: nats / ln 2
        bits, sizes = scores["response_nll"] / math.log(2), scores["response_bytes"]
        figures["bits_per_byte"] = float(bits.sum() / sizes.sum())
        figures["bits_per_byte_ci95"] = mean_interval(bits, sizes, groups, draws, seed)
    return {
        "perplexity": figures,
        "tokens": int(scores["response_tokens"].sum()),
        "generation": summarize_form(answers, draws, seed) if len(answers) else None,
        "questions": questions,
        "too_small": questions < FEWEST_GROUPS,
    }


def summarize_form(answers: pd.DataFrame, draws: int, seed: int) -> dict:
    """The `generation` of a model in the metrics.

    Rates of its answers, and their length, with intervals.
    """
    figures: dict = {}
    for name, column in RATES.items():
        measured = column in answers
        figures[name] = answers[column].mean().item() if measured else None
        figures[f"{name}_ci95"] = rate_interval(answers[column]) if measured else None
    figures["mean_new_tokens"] = answers["new_tokens"].mean().item()
    figures["mean_new_tokens_ci95"] = mean_interval(
        answers["new_tokens"], np.ones(len(answers)), None, draws, seed
    )
    return figures


def summarize_all(
    results: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]],
    questions: list[dict],
    groups: Sequence[str],
    report: dict,
    draws: int,
    seed: int,
) -> dict:
    """What `evaluation/metrics.json` says of perplexity and form.

    Of each model, and of their differences. `results` has for each model its scores and its
    answers, the first of which are those to `questions`.
    """
    checked = {
        name: (scores, check_answers(answers, questions, report))
        for name, (scores, answers) in results.items()
    }
    metrics = {name: summarize(*result, groups, draws, seed) for name, result in checked.items()}
    metrics["differences"] = {
        f"{one} - {other}": differences(checked[one], checked[other], groups, draws, seed)
        for one, other in PAIRS
    }
    return metrics


def save_rows(
    folder: Path,
    results: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]],
    questions: list[dict],
    groups: Sequence[str],
    disclaimer: str,
) -> None:
    """Write `scores.parquet`, a line a test row and model, and `samples.jsonl`, the answers.

    Both go into `folder`.
    """
    tables = [scores.assign(model=name, group=groups) for name, (scores, _) in results.items()]
    pd.concat(tables).to_parquet(folder / "scores.parquet")
    columns = {
        "question": [question["prompt"][-1]["content"] for question in questions],
        "in_the_table": [question["references"][0] for question in questions],
    }
    for name, (_, answers) in results.items():
        columns[name] = list(answers["answer"][: len(questions)])
    lines = pd.DataFrame(columns).assign(disclaimer=disclaimer)
    lines.to_json(folder / "samples.jsonl", orient="records", lines=True, force_ascii=False)
