"""The examination of notebook 6.

The same texts are read, and the same prompts answered, with each model. With `context_rows` the
rows of the table come into every prompt, as they do in use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from tabletune.data.context import answer_with_context, load_context
from tabletune.evaluation.answers import generate
from tabletune.evaluation.generalization import (
    fidelity,
    forgetting,
    memorization,
    summarize_trust,
    texts_to_read,
    trust_differences,
    what_to_ship,
)
from tabletune.evaluation.grounding import ground_answers, grounding_finding
from tabletune.evaluation.safety import judge, safety_finding, safety_table
from tabletune.evaluation.scoring import divergence, response_logits, score
from tabletune.evaluation.trained_run import TrainedRun
from tabletune.report.reading import read_lines
from tabletune.run.files import read_json, write_json

NAMES_OF_PARTS = {
    "train": "training rows",
    "validation": "validation rows",
    "test": "test rows",
    "outside": "other texts",
}
IN_ITS_PROMPT = (
    "Whether it memorizes was not measured: with context_rows a training row stands in the prompt."
)


@dataclass(frozen=True)
class TrustSettings:
    """The parameters of notebook 6 that an examination depends on, under their names there."""

    seed: int = 42
    eval_batch_size: int = 64
    window: int = 1024
    stride: int = 512
    split_rows: int = 100
    fidelity_rows: int = 50
    bootstrap_samples: int = 2000
    item_field: str = ""
    outside_text: str = "bundled"
    safety_prompts: str = ""
    safety_samples: int = 40
    safety_tokens: int = 96

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> "TrustSettings":
        """The settings among the parameters of a notebook."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in parameters.items() if name in names})


class TrustExamination:
    """The texts and prompts of an examination, and what each model made of them.

    `scores` and `judged` are {model: DataFrame}, `variants` is {way to merge: DataFrame}, see
    `scoring.divergence`.
    """

    def __init__(self, trained: TrainedRun, settings: TrustSettings):
        self.trained, self.settings = trained, settings
        example, report = trained.example, trained.report
        self.template = (report["templates"] or {}).get("answer") or ""
        self.item_field = settings.item_field or example.get("item_field", "")
        asked_for = settings.safety_prompts or example.get("safety_prompts", "none")
        self.prompts = safety_table(asked_for, settings.safety_samples)
        self.context = load_context(trained.folder, "evaluation")
        self.context_for_use = load_context(trained.folder, "use")
        self.texts = texts_to_read(
            trained, self.context, settings.split_rows, settings.seed, settings.outside_text
        )
        # beside each score later: which split a text is of, and its question
        self.parts = pd.DataFrame(self.texts)[["part", "group"]]
        of_test = [text for text in self.texts if text["part"] == "test"]
        self.compared = of_test[: settings.fidelity_rows]  # logits are large: some rows are enough
        self.scores: dict[str, pd.DataFrame] = {}
        self.judged: dict[str, pd.DataFrame] = {}
        self.variants: dict[str, pd.DataFrame] = {}
        self.trained_logits: list[torch.Tensor] = []

    def overview(self) -> pd.DataFrame:
        """How many rows or texts are read of each part."""
        counts = self.parts["part"].value_counts(sort=False).to_frame("number")
        return counts.rename(index=NAMES_OF_PARTS).rename_axis(None)

    def examine(self, name: str, model: PreTrainedModel) -> None:
        """Read the texts and answer the prompts on safety with a model."""
        trained, settings = self.trained, self.settings
        scores = score(
            model,
            self.texts,
            trained.tokenizer.pad_token_id,
            settings.eval_batch_size,
            settings.window,
            settings.stride,
        )
        self.scores[name] = self.parts.join(scores)

        def generate_answers(prompts: list) -> tuple[pd.DataFrame, float]:
            return generate(
                model,
                trained.tokenizer,
                trained.stop_token_ids,
                prompts,
                settings.eval_batch_size,
                settings.safety_tokens,
                settings.seed,
            )

        # with the system text of the training, since people will ask that model
        first = trained.splits["test"][0]["prompt"]
        system = [turn for turn in first[:1] if turn["role"] == "system"]
        chats = [[*system, {"role": "user", "content": text}] for text in self.prompts["prompt"]]
        answers, _ = answer_with_context(self.context_for_use, chats, generate_answers)
        answered = self.prompts.assign(model=name, answer=list(answers["answer"]))
        self.judged[name] = judge(answered, self.template, self.item_field)

    def set_trained(self, name: str, model: PreTrainedModel) -> None:
        """Take a model as what was trained: the ways to merge are compared with it."""
        self.trained_logits = self.logits_of(model)
        # its divergence from itself is 0: kept for its likelihoods
        self.variants[name] = divergence(self.trained_logits, self.trained_logits, self.compared)

    def compare_way(self, name: str, model: PreTrainedModel) -> None:
        """How far a way to merge is from what was trained, on answers of the test split."""
        self.variants[name] = divergence(self.trained_logits, self.logits_of(model), self.compared)

    def logits_of(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """What a model predicts for the answers that are compared, [tokens, vocabulary] each."""
        pad_token_id = self.trained.tokenizer.pad_token_id
        return response_logits(model, self.compared, pad_token_id, self.settings.eval_batch_size)

    def metrics(self) -> dict:
        """What goes into `trust/metrics.json`.

        The answers that notebook 4 left are looked up in the table.
        """
        settings, trained = self.settings, self.trained
        draws = (settings.bootstrap_samples, settings.seed)
        samples = read_lines(trained.folder / "evaluation" / "samples.jsonl")
        grounded = ground_answers(samples, trained.splits, self.template, self.item_field)
        metrics: dict[str, Any] = {}
        for name, scores in self.scores.items():
            metrics[name] = summarize_trust(scores, self.judged[name], grounded.get(name), *draws)
        metrics["differences"] = trust_differences(self.scores, self.judged, *draws)
        metrics["memorization"] = []
        if self.context is not None:
            # a training row in its own prompt is easy to repeat, learned or not
            metrics["memorization"] = [IN_ITS_PROMPT]
        elif settings.split_rows:
            metrics["memorization"] = memorization(
                self.scores["base"], self.scores["adapter"], *draws
            )
        groups = [text["group"] for text in self.compared]
        metrics["fidelity"], metrics["shipping"] = {}, []
        if groups:
            metrics["fidelity"] = {
                name: fidelity(table, groups, *draws) for name, table in self.variants.items()
            }
            rows_left_out = self.context is not None
            metrics["shipping"] = what_to_ship(self.variants, groups, *draws, rows_left_out)
        return metrics

    def save(self, folder: Path, metrics: dict, disclaimer: str) -> None:
        """Write `metrics.json` into a folder, and `safety.jsonl` if safety was asked about."""
        write_json(folder / "metrics.json", metrics)
        if len(self.prompts):
            answers = pd.concat(self.judged.values()).assign(disclaimer=disclaimer)
            path = folder / "safety.jsonl"
            answers.to_json(path, orient="records", lines=True, force_ascii=False)


def in_short(metrics: dict[str, Any]) -> list[str]:
    """The findings of `trust/metrics.json`, a sentence or two for each question that was asked."""
    sentences = safety_finding(metrics)[:2]
    if metrics["adapter"]["grounding"]:
        sentences.append(grounding_finding(metrics["adapter"]["grounding"]))
    sentences += metrics["memorization"]
    forgot = metrics["differences"]["adapter - base"].get("outside_log_perplexity")
    if forgot:
        sentences.append(forgetting(forgot))
    sentences += metrics["shipping"][::2]  # without what each way costs
    if not sentences:
        return ["Nothing was measured: see the parameters that leave something out."]
    return sentences


def inputs_of_trust(trained: TrainedRun, entries: dict) -> dict:
    """What the results of notebook 6 are made from, for `Stage.is_done`.

    `entries` are those of the manifest. Raises StageError if notebook 4 has not run: its answers
    are looked up in the table.
    """
    read_json(trained.folder / "evaluation" / "metrics.json", "04_evaluate")
    evaluated = entries.get("04_evaluate", {}).get("finished")
    return trained.inputs | {"base_weights": base_weights_of(trained), "evaluated": evaluated}


def base_weights_of(trained: TrainedRun) -> str:
    """To which weights notebook 3 added the adapter: "original" or "dequantized"."""
    if trained.merged is None:
        return "original"
    return read_json(trained.merged / "merge_report.json", "03_merge_adapter")["base_weights"]
