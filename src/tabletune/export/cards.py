"""Taking the model away: what a run left, its cards, their upload, and what each exported file lost."""

import hashlib
import json
import os
import re
from functools import partial
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCard, create_repo, upload_folder

from tabletune.chat.tokenizer import load_tokenizer_of_run
from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.errors import StageError
from tabletune.export.ollama import put_text
from tabletune.model.run_models import find_merged
from tabletune.report.tables import results_table
from tabletune.report.text import figures_of, with_interval
from tabletune.run.artifacts import check_run, load_dataset_of_run
from tabletune.run.files import read_json, set_aside, write_json


def open_finished(stage):
    """What is exported, a namespace: what the stages left, the names for the cards, and `folder`, where to export to.

    An `export/` that another model left is set aside. Raises StageError if something is missing or does not belong to
    the rest, or if a name cannot be one on the Hub.
    """
    run, told = stage.folder, SimpleNamespace(**stage.parameters)
    merged = find_merged(run, told.run_dir) or run / "merged"
    splits, report = load_dataset_of_run(run)
    base_model = read_json(run / "adapter/adapter_config.json", "02_finetune_qlora")[
        "base_model_name_or_path"
    ]
    digest = check_run(run, merged, report, base_model)
    merging = read_json(merged / "merge_report.json", "03_merge_adapter")
    metrics = read_json(run / "evaluation/metrics.json", "04_evaluate")
    trust = read_json(run / "trust/metrics.json", "06_trust") if (run / "trust").exists() else {}
    for name in ("base_model_on_hub", "push_to_hub"):
        if not re.fullmatch(r"|[\w.-]+/[\w.-]+", value := getattr(told, name)):
            raise StageError(f'{name}="{value}": use owner/name, as on the Hub.')
    base_on_hub = told.base_model_on_hub or (None if Path(base_model).exists() else base_model)
    if told.push_to_hub and not base_on_hub:
        raise StageError(
            f"The base model was the folder {base_model}: set base_model_on_hub, for others to find it."
        )
    folder, made_of = (
        merged.with_name("export"),
        {"adapter_sha256": digest, "base_weights": merging["base_weights"]},
    )
    kept = (
        read_json(folder / "metrics.json", "07_export")
        if (folder / "metrics.json").exists()
        else {}
    )
    if not made_of.items() <= kept.items():
        set_aside(folder.parent, "export")
        write_json(folder / "metrics.json", made_of)
    found = SimpleNamespace(
        told=told, run=run, merged=merged, folder=folder, made_of=made_of, splits=splits
    )
    found.report, found.merging, found.manifest = report, merging, stage.entries()
    found.tokenizer, found.stops = load_tokenizer_of_run(merged)
    found.base_model, found.base_on_hub = base_model, base_on_hub
    found.training = read_json(run / "training/metrics.json", "02_finetune_qlora")
    found.models = {
        name: trust.get(name.split(",")[0], {}) | entry
        for name, entry in figures_of(metrics).items()
    }
    found.table = results_table(metrics)
    found.outputs = [os.path.relpath(folder / "metrics.json", run)]
    found.inputs = {
        **made_of,
        "figures": hashlib.sha256(json.dumps(found.models).encode()).hexdigest(),
    }
    found.name, found.dataset = (
        told.push_to_hub.rpartition("/")[2] or run.name,
        report["source"]["dataset"],
    )
    found.dataset_on_hub = found.dataset if report["dataset_commit"] else None
    found.disclaimer = told.disclaimer or example_settings(report).get(
        "disclaimer", NEUTRAL_DISCLAIMER
    )
    return found


# --- cards


def write_card(found, part, about):
    """Write the card of "adapter" or "merged" into `export/PART/`, a ModelCard. `about` is its ModelCardData.

    The adapter's config beside it names the base model as it is called on the Hub.
    """
    template = (resources.files("tabletune") / "resources/templates/card.md.j2").read_text(
        encoding="utf-8"
    )
    tools = {"written": with_interval, "quoted": partial(json.dumps, ensure_ascii=False)}
    card = ModelCard.from_template(about, template_str=template, **vars(found), part=part, **tools)
    files = {"README.md": card.content}
    if part == "adapter" and found.base_on_hub:
        config = read_json(found.run / "adapter/adapter_config.json", "02_finetune_qlora")
        files["adapter_config.json"] = json.dumps(
            config | {"base_model_name_or_path": found.base_on_hub}, indent=2
        )
    for name, text in files.items():
        put_text(found.folder / part / name, text)
    return card


def upload(found, part, name):
    """Upload "adapter" or "merged", with its card, to a repository on the Hub. Raises StageError if that refuses."""
    source, better = found.merged if part == "merged" else found.run / part, found.folder / part
    try:
        create_repo(name, repo_type="model", private=found.told.private, exist_ok=True)
        for folder, ignored in ((source, os.listdir(better)), (better, None)):
            upload_folder(
                repo_id=name, repo_type="model", folder_path=folder, ignore_patterns=ignored
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(
            f"{source} is here, but could not go to the Hub as {name}: {reason}"
        ) from None
    print(f"https://huggingface.co/{name}")


# --- what each file lost


def questions(found):
    """The first prompts of the test split, each once, as many as `proof_questions`; none of a table of lone texts."""
    prompts = {json.dumps(prompt): prompt for prompt in found.splits["test"]["prompt"] if prompt}
    return list(prompts.values())[: found.told.proof_questions]
