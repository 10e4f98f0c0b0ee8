"""The examination of notebook 4.

The same test rows are scored, and the same questions asked, with each model.

With `context_rows` rows of the table stand in the prompt, worded as in training:
for new questions from the index for evaluation, which has the rows of the training split alone. The
test questions are then asked a second time with the index for use, which has their own rows, too:
as if these had been added after training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedModel

from tabletune.chat.encoding import encode_all
from tabletune.data.context import TableContext, answer_with_context, load_context
from tabletune.errors import StageError
from tabletune.evaluation.answers import generate
from tabletune.evaluation.content import (
    check_content,
    class_figures,
    content_differences,
    content_rules,
    majority_baseline,
    summarize_content,
)
from tabletune.evaluation.perplexity_and_form import PAIRS, answer_bytes, save_rows, summarize_all
from tabletune.evaluation.questions import question_sets
from tabletune.evaluation.scoring import perplexity, score
from tabletune.evaluation.trained_run import TrainedRun
from tabletune.evaluation.verdict import content_verdict
from tabletune.report.text import PARTS
from tabletune.run.files import write_json
from tabletune.stats import perplexity_interval

QUESTION_COLUMNS = ["part", "group", "asked", "references"]


@dataclass(frozen=True)
class ExaminationSettings:
    """The parameters of notebook 4 that an examination depends on, under their names there."""

    samples: int = 20
    ask_all_models: bool = True
    eval_batch_size: int = 64
    window: int = 1024
    stride: int = 512
    max_new_tokens: int = 256
    sampling: dict = field(default_factory=dict)  # for GenerationConfig
    bootstrap_samples: int = 2000
    seed: int = 42
    item_field: str = ""
    unknown_threshold: str | float = "auto"

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> "ExaminationSettings":
        """The settings among the parameters of a notebook.

        `do_sample` decides whether those of sampling count.
        """
        names = {f.name for f in fields(cls)} - {"sampling"}
        sampling = {}
        if parameters.get("do_sample"):
            sampling = {
                "do_sample": True,
                "temperature": parameters["temperature"],
                "top_p": parameters["top_p"],
            }
        return cls(sampling=sampling, **{k: v for k, v in parameters.items() if k in names})


@dataclass
class ModelResults:
    """What one model did.

    `scores` of the test rows, `answers` {part: DataFrame}, and the seconds that they took.
    """

    scores: pd.DataFrame
    answers: dict[str, pd.DataFrame]
    seconds: float
    # the same with the index for use in place of that for evaluation
    scores_with_rows: pd.DataFrame | None = None

    def tokens_per_second(self) -> float:
        """How many new tokens a second it wrote, over all questions."""
        tokens = sum(answers["new_tokens"].sum().item() for answers in self.answers.values())
        return round(tokens / self.seconds, 1)


class Examination:
    """The rows and questions of an examination, and what the models made of them.

    `results` is {model: ModelResults}.
    """

    def __init__(self, trained: TrainedRun, settings: ExaminationSettings):
        if not len(trained.splits["test"]):
            raise StageError("The test split is empty: set test_fraction in notebook 1.")
        self.trained, self.settings = trained, settings
        threshold = settings.unknown_threshold
        self.context = load_context(trained.folder, "evaluation", threshold)
        self.context_for_use = load_context(trained.folder, "use", threshold)
        self.rules = content_rules(trained.splits, trained.report, settings.item_field)
        self.sets = question_sets(trained.splits, settings.samples)
        if self.context is not None:
            # the questions of "new" once more, to be asked with their rows in the index
            self.sets["added"] = [{**question, "part": "added"} for question in self.sets["new"]]
        self.rows = self.encode_test(self.context)
        self.groups = list(trained.splits["test"]["group"])
        self.results: dict[str, ModelResults] = {}

    def overview(self) -> pd.DataFrame:
        """How many questions are asked of each kind; says so where there are none."""
        questions = len(set(self.groups))
        print(f"Read for the perplexity: {len(self.rows)} test rows with {questions} questions.")
        if not self.questions:
            print("These rows are texts without questions, so nothing is answered.")
        counts = {PARTS[part]: len(questions) for part, questions in self.sets.items()}
        return pd.DataFrame({"questions to answer": counts})

    @property
    def questions(self) -> list[dict]:
        """The questions of the test split."""
        return self.sets["new"]

    def encode_test(self, context: TableContext | None) -> list[dict]:
        """The test rows as token ids and masks, with the prompts that the model is asked with."""
        rows = list(self.trained.splits["test"])
        if context is not None:
            rows = [{**row, "prompt": context.prompt(row["prompt"]).messages} for row in rows]
        return encode_all(rows, self.trained.tokenizer, self.trained.stop_token_ids)

    def score(self, model: PreTrainedModel, rows: list[dict]) -> pd.DataFrame:
        """The scores of some encoded rows, see `scoring.score`."""
        settings = self.settings
        return score(
            model,
            rows,
            self.trained.tokenizer.pad_token_id,
            settings.eval_batch_size,
            settings.window,
            settings.stride,
        )

    def ask(
        self, model: PreTrainedModel, prompts: list[dict], context: TableContext | None = None
    ) -> tuple[pd.DataFrame, float]:
        """The answers to prompts, and the seconds that they took.

        See `context.answer_with_context`.
        """
        settings = self.settings

        def generate_answers(prompts: list) -> tuple[pd.DataFrame, float]:
            return generate(
                model,
                self.trained.tokenizer,
                self.trained.stop_token_ids,
                prompts,
                settings.eval_batch_size,
                settings.max_new_tokens,
                settings.seed,
                **settings.sampling,
            )

        return answer_with_context(context, prompts, generate_answers)

    def examine(self, name: str, model: PreTrainedModel, also: list[dict]) -> None:
        """Score the test rows and answer the questions with a model.

        `also` are prompts without a right answer. The answers to them stand under the part "yours".
        Without `ask_all_models` only the merged model is asked more than the new questions.
        """
        asks_all = self.settings.ask_all_models or name == "merged"
        # the base model and the adapter are compared on new questions; answering takes most of the
        # time
        parts = ["new", "table", "reworded"] if asks_all else ["new"]
        scores = self.score(model, self.rows)
        sets = {part: self.sets[part] for part in parts}
        if self.context_for_use is None:
            sets["yours"] = also
        answers, seconds = self.ask_sets(model, sets, self.context)
        scores_with_rows = None
        if self.context_for_use is not None:
            sets = {"yours": also}
            if asks_all:
                sets["added"] = self.sets["added"]
                scores_with_rows = self.score(model, self.encode_test(self.context_for_use))
            more_answers, more_seconds = self.ask_sets(model, sets, self.context_for_use)
            answers |= more_answers
            seconds += more_seconds
        self.results[name] = ModelResults(scores, answers, seconds, scores_with_rows)

    def ask_sets(
        self, model: PreTrainedModel, sets: dict[str, list[dict]], context: TableContext | None
    ) -> tuple[dict[str, pd.DataFrame], float]:
        """The answers to sets of questions, {part: DataFrame}, and the seconds that they took.

        All sets are asked together, so that batches are full.
        """
        prompts: list[dict] = []
        for questions in sets.values():
            prompts += questions
        answers, seconds = self.ask(model, prompts, context)
        of_part = {}
        start = 0
        for part, questions in sets.items():
            of_part[part] = answers[start : start + len(questions)].reset_index(drop=True)
            start += len(questions)
        return of_part, seconds

    def check(self, answers: pd.DataFrame, part: str) -> pd.DataFrame:
        """What is right in the answers to one set of questions, see `content.check_content`."""
        questions = self.sets[part]
        context = self.context_for_use if part == "added" else self.context
        # without an `unknown_answer` there is no refusing, and every question wants an answer
        answerable = [True] * len(questions)
        if context is not None and context.settings.unknown_answer:
            answerable = [context.has_answer(question["references"]) for question in questions]
        unknown = answers.get("unknown", None)
        checked = check_content(answers["answer"], questions, self.rules, unknown, answerable)
        if "copied" in answers:
            checked["copied"] = answers["copied"].to_numpy()
        return checked

    def metrics(self) -> dict:
        """What goes into `evaluation/metrics.json`.

        The figures of all models, their differences, and the verdict.
        """
        settings = self.settings
        draws, seed = settings.bootstrap_samples, settings.seed
        # [rows], in the order of the test split
        sizes = [answer_bytes(row) for row in self.trained.splits["test"]]
        for result in self.results.values():
            # bytes are the same for all tokenizers, so figures by the byte can be compared
            result.scores["response_bytes"] = sizes
        metrics = summarize_all(
            self.results_of_test(), self.questions, self.groups, self.trained.report, draws, seed
        )
        checked = self.check_all()
        for name, tables in checked.items():
            self.add_figures_of_answers(metrics[name], self.results[name], tables)
            self.add_figures_of_rows(metrics[name], self.results[name])
        metrics["content_differences"] = {
            f"{one} - {other}": self.differences(checked[one], checked[other])
            for one, other in PAIRS
        }
        metrics["content_rules"] = self.rules.as_json()
        metrics["majority"] = majority_baseline(self.questions, self.rules)
        metrics["retrieval"] = self.context is not None
        metrics["answer_leaks"] = (self.trained.report.get("answer_leaks") or {}).get("test", 0)
        metrics["verdict"] = content_verdict(metrics)
        return metrics

    def check_all(self) -> dict[str, dict[str, pd.DataFrame]]:
        """What is right in all answers, {model: {part: what `check` returns}}."""
        checked: dict[str, dict[str, pd.DataFrame]] = {}
        for name, result in self.results.items():
            checked[name] = {}
            for part in self.sets:
                if part in result.answers:
                    checked[name][part] = self.check(result.answers[part], part)
        return checked

    def add_figures_of_answers(
        self, entry: dict, result: ModelResults, checked: Mapping[str, pd.DataFrame]
    ) -> None:
        """Add to a model's entry how right its answers are, its speed, and its classes if any."""
        draws, seed = self.settings.bootstrap_samples, self.settings.seed
        entry["content"] = {}
        for part, table in checked.items():
            entry["content"][part] = summarize_content(table, self.rules, draws, seed)
        if self.questions:
            entry["generation"]["tokens_per_second"] = result.tokens_per_second()
        if self.rules.labels:
            answers = result.answers["new"]["answer"]
            classes = class_figures(answers, self.questions, self.rules)
            entry["classes"] = classes.to_dict("index")

    def differences(
        self, one: Mapping[str, pd.DataFrame], other: Mapping[str, pd.DataFrame]
    ) -> dict[str, dict]:
        """The differences of two models in content, for each part that both have answered."""
        draws, seed = self.settings.bootstrap_samples, self.settings.seed
        entries = {}
        for part in self.sets:
            if part in one and part in other:
                entries[part] = content_differences(one[part], other[part], self.rules, draws, seed)
        return entries

    def results_of_test(self) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
        """The scores and the answers of each model for the test split."""
        return {name: (r.scores, r.answers["new"]) for name, r in self.results.items()}

    def add_figures_of_rows(self, entry: dict, result: ModelResults) -> None:
        """Add the perplexity of the test rows with their own rows in the index, if there is one."""
        if result.scores_with_rows is None:
            return
        scores, settings = result.scores_with_rows, self.settings
        entry["perplexity"]["response_added"] = perplexity(scores, "response")
        entry["perplexity"]["response_added_ci95"] = perplexity_interval(
            scores, "response", self.groups, settings.bootstrap_samples, settings.seed
        )

    def answer_yours(self, adapted: PeftModel, yours: list[dict]) -> dict[str, list[str]]:
        """The answers of base model and adapter to the reader's own question.

        Returns {model: answers}.
        """
        # the base model is the adapted one with its adapter off: one model in memory
        with adapted.disable_adapter():
            base, _ = self.ask(adapted, yours, self.context_for_use)
        adapter, _ = self.ask(adapted, yours, self.context_for_use)
        return {"base": list(base["answer"]), "adapter": list(adapter["answer"])}

    def save(self, folder: Path, disclaimer: str, asked: list[str]) -> None:
        """Write the results of an examination into a folder.

        These are `scores.parquet`, `samples.jsonl`, `answers.jsonl` and `your_questions.json`.

        `asked` is the text of the reader's own question, in a list.
        """
        yours = {name: list(r.answers["yours"]["answer"]) for name, r in self.results.items()}
        write_json(folder / "your_questions.json", {text: yours for text in asked})
        save_rows(folder, self.results_of_test(), self.questions, self.groups, disclaimer)
        lines = []
        for part, questions in self.sets.items():
            for name, result in self.results.items():
                if part not in result.answers:
                    continue
                answers = result.answers[part]
                table = pd.concat([answers, self.check(answers, part)], axis=1)
                # `unknown` and `copied` are in both
                table = table.loc[:, ~table.columns.duplicated()]
                columns = pd.DataFrame(questions).reindex(columns=QUESTION_COLUMNS)
                lines.append(pd.concat([columns, table], axis=1).assign(model=name))
        table = pd.concat(lines, ignore_index=True)
        table.to_json(folder / "answers.jsonl", orient="records", lines=True, force_ascii=False)
