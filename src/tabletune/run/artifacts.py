"""What earlier stages left in a run folder, and whether it belongs together."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabletune.errors import StageError
from tabletune.run.files import SAME_RUN_DIR, read_json

if TYPE_CHECKING:
    from datasets import DatasetDict


def load_dataset_of_run(run: Path, otherwise: str = "") -> tuple["DatasetDict", dict[str, Any]]:
    """The DatasetDict and the report that notebook 1 left.

    Raises StageError if they are missing or damaged; `otherwise` is added to its text.
    """
    import datasets

    report = read_json(run / "dataset" / "report.json", "01_format_dataset", otherwise)
    try:
        return datasets.load_from_disk(run / "dataset"), report
    except (OSError, ValueError) as error:
        raise StageError(
            f"{run / 'dataset'} is damaged ({error}). Run 01_format_dataset again."
        ) from None


def adapter_digest(run: Path) -> str:
    """The SHA-256 of the adapter's weights. Raises StageError if they are missing."""
    weights = run / "adapter" / "adapter_model.safetensors"
    check_exists(weights, "02_finetune_qlora")
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_exists(path: Path, stage: str) -> None:
    """Raise StageError if a file or folder that `stage` makes is missing."""
    if not path.exists():
        raise StageError(f"{path} is missing. Run {stage} first, {SAME_RUN_DIR}")


def same_model(one: str, other: str) -> bool:
    """Whether two names mean the same model: they are equal, or one local folder."""
    if one == other:
        return True
    return Path(one).is_dir() and Path(one).resolve() == Path(other).resolve()


def check_run(run: Path, merged: Path | None, report: dict[str, Any], base_model: str) -> str:
    """The adapter's SHA-256, after a check that adapter, merged model and data set belong together.

    `merged` is None if the merged model is on another machine. Raises StageError if one of them is
    missing or does not belong to the rest of the run.
    """
    check_exists(run / "adapter", "02_finetune_qlora")
    if merged is not None:
        check_exists(merged, "03_merge_adapter")
    # adapter → base model and data set, merged model → adapter: each says what it was made from
    provenance = read_json(run / "adapter" / "provenance.json", "02_finetune_qlora")
    digest = adapter_digest(run)
    trained_on = provenance["base_model"]
    if not same_model(trained_on, base_model):
        raise StageError(
            f"The adapter was trained on {trained_on}, but base_model is {base_model}. Set "
            "base_model to the one of the training."
        )
    if provenance["dataset_fingerprint"] != report["fingerprint"]:
        raise StageError(
            "The adapter was trained on another data set. Run 02_finetune_qlora again."
        )
    if merged is not None:
        merge_report = read_json(merged / "merge_report.json", "03_merge_adapter")
        if merge_report["adapter_sha256"] != digest:
            raise StageError(
                "The merged model was made from another adapter. Run 03_merge_adapter again."
            )
    return digest
