"""Model cards, and the upload of a model with its card."""

import json
import os
from functools import partial
from importlib import resources

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

from tabletune.errors import StageError, first_line
from tabletune.export.finished_run import ExportRun
from tabletune.report.text import with_interval
from tabletune.run.files import read_json, write_text_if_changed

CARD = "resources/templates/card.md.j2"
QUESTIONS = {  # the sets of questions of notebook 4
    "table": "of the table",
    "reworded": "of the table, reworded",
    "added": "of the test split, with their rows added to the table",
    "new": "of the test split, whose rows it never saw",
}
to_json = partial(json.dumps, ensure_ascii=False)


def write_card(export_run: ExportRun, part: str, card_data: ModelCardData) -> ModelCard:
    """Write the card of "adapter" or "merged" to `export/PART/README.md`, and return it.

    Beside the adapter's card stands its config with the base model's name on the Hub.
    """
    template = (resources.files("tabletune") / CARD).read_text(encoding="utf-8")
    card = ModelCard.from_template(
        card_data,
        template_str=template,
        run=export_run,
        part=part,
        parts=QUESTIONS,
        with_interval=with_interval,
        to_json=to_json,
    )
    folder = export_run.folder / part
    write_text_if_changed(folder / "README.md", card.content)
    if part == "adapter" and export_run.base_on_hub:
        path = export_run.run / "adapter/adapter_config.json"
        config = read_json(path, "02_finetune_qlora")
        config["base_model_name_or_path"] = export_run.base_on_hub
        write_text_if_changed(folder / "adapter_config.json", json.dumps(config, indent=2))
    return card


def upload(export_run: ExportRun, part: str, repository: str) -> None:
    """Upload "adapter" or "merged", with its card, to a repository on the Hub.

    Prints the address. Raises StageError if the Hub refuses.
    """
    model = export_run.merged if part == "merged" else export_run.run / part
    cards = export_run.folder / part
    # the card, and the adapter's config: newer than those beside the model
    replaced = os.listdir(cards)
    # the model first: a repository with a card alone would look finished
    private = export_run.parameters["private"]
    try:
        create_repo(repository, repo_type="model", private=private, exist_ok=True)
        upload_folder(
            repo_id=repository, repo_type="model", folder_path=model, ignore_patterns=replaced
        )
        upload_folder(
            repo_id=repository, repo_type="model", folder_path=cards, ignore_patterns=None
        )
    except (OSError, ValueError) as error:
        raise StageError(
            f"{model} is complete, but it could not go to the Hub as {repository}: "
            f"{first_line(error)}"
        ) from error
    print(f"https://huggingface.co/{repository}")
