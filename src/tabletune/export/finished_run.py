"""The finished run that notebook 7 exports: what the stages left, checked to belong together."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from tabletune.chat.tokenizer import load_tokenizer_of_run
from tabletune.data.context import INPUT_NAMES, ContextPrompt, TableContext, load_context
from tabletune.data.example import disclaimer_of
from tabletune.errors import StageError
from tabletune.model.run_models import find_merged
from tabletune.report.tables import results_table
from tabletune.report.text import figures_of
from tabletune.run.artifacts import check_run, load_dataset_of_run
from tabletune.run.files import archive, read_json, write_json
from tabletune.run.stage import Stage

Messages = list[dict[str, str]]
MOST_CONVERSATIONS = 1000  # of each split that are compared token by token


@dataclass
class ExportRun:
    """What the cards and the files are made from."""

    run: Path
    merged: Path
    folder: Path  # `export/`, beside the merged model
    parameters: dict[str, Any]  # of notebook 7
    # what the merged model was made from: the adapter's digest, the weights
    sources: dict[str, str]
    splits: DatasetDict
    report: dict[str, Any]  # of notebook 1
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]
    base_model: str
    training: dict[str, Any] = field(default_factory=dict)  # the metrics of notebook 2
    merging: dict[str, Any] = field(default_factory=dict)  # the report of notebook 3
    metrics: dict[str, Any] = field(default_factory=dict)  # of notebook 4
    # the metrics of notebook 6; {} before it ran
    trust: dict[str, Any] = field(default_factory=dict)
    # finds rows among all of the table; None with context_rows 0
    context: TableContext | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name: that of its repository on the Hub, or of the run folder."""
        return self.parameters["push_to_hub"].rpartition("/")[2] or self.run.name

    @property
    def base_on_hub(self) -> str | None:
        """The base model's id on the Hub; None if it is only known as a folder of this machine."""
        if self.parameters["base_model_on_hub"]:
            return self.parameters["base_model_on_hub"]
        return None if Path(self.base_model).exists() else self.base_model

    @property
    def dataset(self) -> str:
        """The table: a path, or an id on the Hub."""
        return self.report["source"]["dataset"]

    @property
    def dataset_on_hub(self) -> str | None:
        """The data set's id on the Hub; None for a file of this machine."""
        return self.dataset if self.report["dataset_commit"] else None

    @property
    def disclaimer(self) -> str:
        """The sentence for the cards and the Modelfile.

        The reader's, the example's, or a neutral one.
        """
        return disclaimer_of(self.report, self.parameters["disclaimer"])

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The figures of each model, {name: entry}: those of notebook 4, and of 6 if it ran."""
        entries = {}
        for name, entry in figures_of(self.metrics).items():
            # "merged, in 4 bits" is "merged" in the metrics of notebook 6
            entries[name] = self.trust.get(name.split(",")[0], {}) | entry
        return entries

    @property
    def table(self) -> pd.DataFrame:
        """The figures of notebook 4 as texts, a line for each model."""
        return results_table(self.metrics)

    @property
    def inputs(self) -> dict[str, str]:
        """What the export depends on, for the manifest."""
        figures = json.dumps(self.models).encode()
        inputs = {**self.sources, "figures": hashlib.sha256(figures).hexdigest()}
        if self.context is not None:
            inputs[INPUT_NAMES["use"]] = self.context.fingerprint
        return inputs

    @property
    def outputs(self) -> list[str]:
        """The file that says that an export was finished, relative to the run folder."""
        return [os.path.relpath(self.folder / "metrics.json", self.run)]

    @property
    def has_questions(self) -> bool:
        """Whether the rows have questions: those of a table of texts have none."""
        return bool(self.splits["train"][0]["prompt"])

    @property
    def system_message(self) -> str:
        """The system message of the table's questions; "" if they have none."""
        for message in self.splits["train"][0]["prompt"]:
            if message["role"] == "system":
                return message["content"]
        return ""

    def ask(self, messages: Messages) -> ContextPrompt:
        """What the model is asked.

        The messages, with the rows that were found for them if the run has rows.
        """
        if self.context is None:
            return ContextPrompt(messages, [], False)
        return self.context.prompt(messages)

    def example_prompt(self) -> Messages:
        """A question for the card's example code.

        The first of the test split, as the model is asked it.
        """
        prompt = self.splits["test"][0]["prompt"] or [{"role": "user", "content": "Hello"}]
        return self.ask(prompt).messages

    def conversations(self) -> Iterator[dict[str, Any]]:
        """Rows of all splits, at most MOST_CONVERSATIONS of each."""
        for split in self.splits.values():
            yield from split.select(range(min(len(split), MOST_CONVERSATIONS)))

    def as_asked(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the data set with the prompt that the model gets in use."""
        if not row["prompt"]:
            return row
        return {**row, "prompt": self.ask(row["prompt"]).messages}

    def test_rows(self) -> list[dict[str, Any]]:
        """The first `proof_rows` rows of the test split, as the model is asked them in use."""
        split = self.splits["test"]
        rows = split.select(range(min(len(split), self.parameters["proof_rows"])))
        return [self.as_asked(row) for row in rows]

    def questions_with_tools(self) -> list[dict[str, Any]]:
        """The first `proof_questions` different questions of the test split, as asked in use.

        Each has its `prompt` and `tools` (a JSON text or None). None of a table of texts.
        """
        questions = {}
        for row in self.splits["test"]:
            if row["prompt"]:
                question = {"prompt": row["prompt"], "tools": row.get("tools")}
                questions[json.dumps(question)] = question
        first = list(questions.values())[: self.parameters["proof_questions"]]
        return [self.as_asked(question) for question in first]

    def questions(self) -> list[Messages]:
        """The prompts of `questions_with_tools` alone, without the tools.

        For Ollama's Modelfile, whose template has no place for tools.
        """
        return [question["prompt"] for question in self.questions_with_tools()]


def open_finished_run(stage: Stage) -> ExportRun:
    """Read what notebooks 1 to 4, and 6 if it ran, left in the run folder of notebook 7.

    An `export/` that was made from another model moves to `earlier/`. Raises StageError if
    something is missing or does not belong to the rest, or if a name is none that the Hub takes.
    """
    run = stage.folder
    parameters = stage.parameters
    merged = find_merged(run, parameters["run_dir"]) or run / "merged"
    splits, report = load_dataset_of_run(run)
    adapter_config = read_json(run / "adapter/adapter_config.json", "02_finetune_qlora")
    base_model = adapter_config["base_model_name_or_path"]
    digest = check_run(run, merged, report, base_model)
    merging = read_json(merged / "merge_report.json", "03_merge_adapter")
    metrics = read_json(run / "evaluation/metrics.json", "04_evaluate")
    trust = {}
    if (run / "trust").exists():
        trust = read_json(run / "trust/metrics.json", "06_trust")
    check_names_on_hub(parameters, base_model)
    tokenizer, stop_token_ids = load_tokenizer_of_run(merged)

    export_run = ExportRun(
        run=run,
        merged=merged,
        folder=merged.with_name("export"),
        parameters=parameters,
        sources={"adapter_sha256": digest, "base_weights": merging["base_weights"]},
        splits=splits,
        report=report,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        base_model=base_model,
        training=read_json(run / "training/metrics.json", "02_finetune_qlora"),
        merging=merging,
        metrics=metrics,
        trust=trust,
        context=load_context(run, "use", parameters["unknown_threshold"]),
        manifest=stage.entries(),
    )
    archive_other_export(export_run)
    return export_run


def check_names_on_hub(parameters: dict[str, Any], base_model: str) -> None:
    """Raise StageError if a name is not OWNER/NAME, or an upload could not name its base model."""
    for parameter in ("base_model_on_hub", "push_to_hub"):
        name = parameters[parameter]
        if name and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise StageError(f'{parameter}="{name}": use owner/name, as on the Hub.')
    is_local = Path(base_model).exists()
    if parameters["push_to_hub"] and is_local and not parameters["base_model_on_hub"]:
        raise StageError(
            f"The base model was the folder {base_model}, which others do not have: set "
            "base_model_on_hub to its name on the Hub."
        )


def archive_other_export(export_run: ExportRun) -> None:
    """Move an `export/` that was made from another model to `earlier/`, and begin a new one."""
    path = export_run.folder / "metrics.json"
    earlier = read_json(path, "07_export") if path.exists() else {}
    # metrics.json says which adapter and which weights the export was made from
    if not export_run.sources.items() <= earlier.items():
        archive(export_run.folder.parent, export_run.folder.name)
        write_json(path, export_run.sources)
