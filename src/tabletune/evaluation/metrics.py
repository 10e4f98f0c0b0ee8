"""The evaluation of notebook 4: which questions are asked, how answers are checked, and the figures of all models."""

import math
import re
from statistics import median

import numpy as np
import pandas as pd
import torch

from tabletune.evaluation.scoring import perplexity
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

SHORT = 5  # words that the middle one of a table's answers has at most, for an answer to be right only word for word


def has_structure(answer, answer_template, answer_column):
    """Whether an answer is the template filled in: its lines in order, each at most once, the answer proper not empty.

    Lines with other fields may be left out, as in the training rows.
    """
    pattern, labels = "", []
    for line in filter(None, answer_template.split("\n")):
        filled = re.sub(r"\\{(.+?)\\}", r"\\S[\\s\\S]*?", re.escape(line))
        required = "{" not in line or f"{{{answer_column}}}" in line
        pattern += rf"(?:{filled}\s*)" + ("" if required else "?")
        labels.append(line.split("{")[0])
    found = [label for label in labels if label and label in answer]
    in_order = sorted(found, key=answer.index) == found and all(
        answer.count(label) == 1 for label in found
    )
    return in_order and re.fullmatch(pattern, answer.strip()) is not None


def check_answers(made, questions, report):
    """The answers to `questions`, in their order, with what can be checked by itself: `structured` and `exact_match`.

    The structure is that of the answer template, if that has a text of its own and all references have it. An answer
    matches if it is one of its references word for word, in tables whose answers are labels or short: half of the
    references have at most `SHORT` words.
    """
    template, column = (
        (report.get("templates") or {}).get(key) or "" for key in ("answer", "answer_column")
    )
    known = [reference for question in questions for reference in question["references"]]
    made = made[: len(questions)].copy()
    if re.search(r"\w", re.sub("{.+?}", "", template)) and all(
        has_structure(text, template, column) for text in known
    ):
        made["structured"] = [has_structure(answer, template, column) for answer in made["answer"]]
    if known and median(len(reference.split()) for reference in known) <= SHORT:
        pairs = zip(made["answer"], questions, strict=True)
        made["exact_match"] = [answer in question["references"] for answer, question in pairs]
    return made


# --- figures


@torch.no_grad()
def joined_perplexity(model, tokenizer, texts):
    """The perplexity of texts joined into one sequence, their prompts in it: how it is often done."""
    ids = tokenizer("\n".join(texts), return_tensors="pt")["input_ids"][
        :, : context_length(model.config)
    ]
    return math.exp(model(ids.to(model.device), labels=ids.to(model.device)).loss.item())


def summarize(scores, made, groups, draws, seed):
    """The entry of a model in `evaluation/metrics.json`, intervals by drawing `groups`, a key a row of `scores`.

    `made` are its answers to independent questions and how they were checked, none where nothing could be asked.
    """
    questions = count_groups(groups)
    entry = {"perplexity": {}, "tokens": int(scores["response_tokens"].sum()), "generation": None}
    entry |= {"questions": questions, "too_small": questions < FEWEST_GROUPS}
    for name, part in (("response", "response"), ("full_text", "full")):
        entry["perplexity"][name] = perplexity(scores, part)
        entry["perplexity"][f"{name}_ci95"] = perplexity_interval(scores, part, groups, draws, seed)
    if len(made):
        entry["generation"] = figures = {}
        for name, column in RATES.items():
            figures[name] = made[column].mean().item() if column in made else None
            figures[f"{name}_ci95"] = rate_interval(made[column]) if column in made else None
        figures["mean_new_tokens"] = made["new_tokens"].mean().item()
        figures["mean_new_tokens_ci95"] = mean_interval(
            made["new_tokens"], np.ones(len(made)), None, draws, seed
        )
    return entry


def summarize_all(results, questions, groups, report, draws, seed):
    """What `evaluation/metrics.json` says of models, and of their differences.

    `results` has for each name (scores, answers, seconds), where the first answers are those to `questions`.
    """
    checked = {
        name: (scores, check_answers(made, questions, report))
        for name, (scores, made, _) in results.items()
    }
    metrics = {name: summarize(*result, groups, draws, seed) for name, result in checked.items()}
    for name, (_, made, seconds) in results.items():
        if questions:
            metrics[name]["generation"]["tokens_per_second"] = round(
                made["new_tokens"].sum().item() / seconds, 1
            )
    metrics["differences"] = {
        f"{one} - {other}": differences(checked[one], checked[other], groups, draws, seed)
        for one, other in (("adapter", "base"), ("merged", "adapter"))
    }
    return metrics


def save_rows(folder, results, questions, groups, disclaimer):
    """Write a line a test row and model to `scores.parquet`, and the answers to `samples.jsonl`, in a folder."""
    tables = [scores.assign(model=name, group=groups) for name, (scores, _, _) in results.items()]
    pd.concat(tables).to_parquet(folder / "scores.parquet")
    columns = {
        "question": [question["prompt"][-1]["content"] for question in questions],
        "in_the_table": [question["references"][0] for question in questions],
        **{name: made["answer"][: len(questions)] for name, (_, made, _) in results.items()},
    }
    lines = pd.DataFrame(columns).assign(disclaimer=disclaimer)
    lines.to_json(folder / "samples.jsonl", orient="records", lines=True, force_ascii=False)
