"""What earlier stages left in a run folder, and whether it belongs together."""

import hashlib
from pathlib import Path

import datasets

from tabletune.errors import StageError
from tabletune.run.files import read_json


def load_dataset_of_run(run, otherwise=""):
    """The DatasetDict and the report that notebook 1 left. Raises StageError if they are not there or not whole."""
    report = read_json(run / "dataset" / "report.json", "01_format_dataset", otherwise)
    try:
        return datasets.load_from_disk(run / "dataset"), report
    except (OSError, ValueError) as error:
        raise StageError(
            f"{run / 'dataset'} is damaged ({error}). Run 01_format_dataset again."
        ) from None


def same_model(one, other):
    """Whether two names mean the same model: equal, or one local folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def check_run(run, merged, report, base_model):
    """The adapter's SHA-256, once it is known that all belongs together; `merged` is None if it is elsewhere.

    Raises StageError if the adapter or the merged model is missing or does not belong to the rest of the run.
    """
    for folder, stage in ((run / "adapter", "02_finetune_qlora"), (merged, "03_merge_adapter")):
        if folder and not folder.exists():
            raise StageError(
                f"{folder} is missing. Run {stage} first, with the same run_dir, in Colab one in Drive."
            )
    provenance = read_json(run / "adapter" / "provenance.json", "02_finetune_qlora")
    digest = hashlib.sha256(
        (run / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()
    if not same_model(provenance["base_model"], base_model):
        raise StageError(
            f"The adapter was trained on {provenance['base_model']}, but base_model is {base_model}."
        )
    if provenance["dataset_fingerprint"] != report["fingerprint"]:
        raise StageError(
            "The adapter was trained on another data set. Run 02_finetune_qlora again."
        )
    if (
        merged
        and read_json(merged / "merge_report.json", "03_merge_adapter")["adapter_sha256"] != digest
    ):
        raise StageError(
            "The merged model was made from another adapter. Run 03_merge_adapter again."
        )
    return digest
