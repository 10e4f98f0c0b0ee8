"""The training examples: from the run folder or the Hub, as token ids."""

import hashlib
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from tabletune.chat.encoding import encode_all
from tabletune.errors import StageError, hub_error
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import atomic_write, write_json

IGNORED = -100  # the label of what is not in the loss, by PyTorch's cross entropy


def load_examples(
    run: Path, published_dataset: str, processes: PartialState
) -> tuple[DatasetDict, dict[str, Any]]:
    """The data set and the report that notebook 1 left in the run, or published on the Hub.

    With rows of the table in the prompts, the train and validation splits are the prompts in
    `retrieval/`. Raises StageError if there is neither.
    """
    # one process downloads, the others read what it has saved
    with processes.main_process_first():
        if published_dataset and not (run / "dataset").exists():
            take_published(published_dataset, run / "dataset")
    otherwise = " Or set published_dataset to one that notebook 1 has published."
    splits, report = load_dataset_of_run(run, otherwise)
    if "context" in report:
        splits = with_prompts(splits, run / "retrieval" / "prompts")
    return splits, report


def with_prompts(splits: DatasetDict, folder: Path) -> DatasetDict:
    """The splits, with the training and validation prompts of a folder in place of the plain rows.

    Raises StageError if the folder is missing or damaged.
    """
    try:
        prompts = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{folder} is missing or damaged ({error}). Run 01_format_dataset again."
        ) from error
    # the prompts have fewer columns than the rows; all splits must have the same
    columns = prompts["train"].column_names
    return DatasetDict(
        train=prompts["train"],
        validation=prompts["validation"],
        test=splits["test"].select_columns(columns),
    )


def take_published(name: str, folder: Path) -> None:
    """Save a data set of the Hub as notebook 1 would have: conversations in three splits, a report.

    Raises StageError if it cannot be had, or is not of that kind.
    """
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise hub_error(f"published_dataset={name}", error) from error
    columns = set()
    for split in splits.values():
        columns.update(split.column_names)
    has_splits = {"train", "validation", "test"} <= splits.keys()
    if not has_splits or not {"prompt", "completion"} <= columns:
        raise StageError(
            f"published_dataset={name} lacks the splits train, validation and test or the columns "
            "prompt and completion. Give it to notebook 1 as its dataset instead."
        )
    report = {"published": name, "splits": {split: len(rows) for split, rows in splits.items()}}
    report["fingerprint"] = fingerprint(splits)
    with atomic_write(folder) as partial_folder:
        splits.save_to_disk(partial_folder)
        write_json(partial_folder / "report.json", report)


def fingerprint(splits: DatasetDict) -> str:
    """A digest of all rows of a data set."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(f"{name}\0".encode())
        for row in split:
            digest.update(f"{row['prompt']!r}\0{row['completion']!r}\0".encode())
    return digest.hexdigest()[:16]


def encode_splits(
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: list[int],
    max_length: int,
) -> tuple[DatasetDict, pd.DataFrame]:
    """All splits as token ids and labels, and a table of how many examples and tokens they have.

    The validation split is sorted by length, so that its batches have little padding. Raises
    StageError if an example is longer than `max_length`: it would lose its end.
    """

    def encode_batch(columns: dict[str, list]) -> dict[str, list]:
        examples = pd.DataFrame(dict(columns)).to_dict("records")
        rows = encode_all(examples, tokenizer, stop_token_ids)
        return {
            "input_ids": [row["input_ids"] for row in rows],
            "labels": [labels_of(row) for row in rows],
            "tokens": [len(row["input_ids"]) for row in rows],
            "in the loss": [sum(row["completion_mask"]) for row in rows],
        }

    columns = splits["train"].column_names
    encoded = splits.map(encode_batch, batched=True, remove_columns=columns)
    sizes = {}
    for name, split in encoded.items():
        sizes[name] = split.select_columns(["tokens", "in the loss"]).to_pandas()
    # also of the test split, although nothing is trained on it: its answers are scored in full
    longest = max(size["tokens"].max() for size in sizes.values())
    if longest > max_length:
        raise StageError(
            f"max_length={max_length}, but the longest example has {longest} tokens and would lose "
            "its end. Raise max_length, or run 01_format_dataset again with this max_length."
        )
    encoded = encoded.remove_columns(["tokens", "in the loss"])
    by_length = sizes["validation"]["tokens"].argsort(kind="stable")
    encoded["validation"] = encoded["validation"].select(by_length)
    counts = {name: {"examples": len(size), **size.sum()} for name, size in sizes.items()}
    return encoded, pd.DataFrame(counts).T


def labels_of(encoded: dict[str, list]) -> list[int]:
    """The labels of an encoded example: the ids that are in the loss, and -100 elsewhere.

    The first token has none, as nothing predicts it: in a packed row the example before it would.
    """
    labels = []
    for token_id, in_loss in zip(encoded["input_ids"], encoded["completion_mask"], strict=True):
        labels.append(token_id if in_loss else IGNORED)
    labels[0] = IGNORED
    return labels


def count_labels(rows: Dataset) -> int:
    """How many tokens of these rows are in the loss."""
    return sum(len(labels) - labels.count(IGNORED) for labels in rows["labels"])
