"""The training examples: from the run folder or the Hub, as token ids."""

import datasets
import pandas as pd

from tabletune.chat.encoding import encode_all
from tabletune.errors import StageError, hub_error
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import atomic_write, write_json


def load_examples(run, published_dataset, processes):
    """The DatasetDict and the report that notebook 1 left in the run, or published on the Hub.

    With rows of the table in the prompts, the train and validation splits are the prompts in
    `retrieval/`. Raises StageError if there is neither.
    """
    with processes.main_process_first():
        if published_dataset and not (run / "dataset").exists():
            take_published(published_dataset, run / "dataset")
    splits, report = load_dataset_of_run(
        run, " Or set published_dataset to one that notebook 1 has published."
    )
    if "context" in report:
        splits = with_prompts(splits, run / "retrieval" / "prompts")
    return splits, report


def with_prompts(splits, folder):
    """The splits, with the training and validation prompts of a folder in place of the plain rows.

    Raises StageError if the folder is missing or damaged.
    """
    try:
        prompts = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{folder} is missing or damaged ({error}). Run 01_format_dataset again."
        ) from None
    columns = prompts["train"].column_names
    return datasets.DatasetDict(
        train=prompts["train"],
        validation=prompts["validation"],
        test=splits["test"].select_columns(columns),
    )


def take_published(name, folder):
    """Save a data set of the Hub as notebook 1 would have: train, validation and test of conversations, and a report.

    Raises StageError if it cannot be had, or is not of that kind.
    """
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise hub_error(f"published_dataset={name}", error) from None
    columns = {column for split in splits.values() for column in split.column_names}
    if (
        not {"train", "validation", "test"} <= splits.keys()
        or not {"prompt", "completion"} <= columns
    ):
        raise StageError(
            f"published_dataset={name} lacks the splits train, validation and test or the columns prompt and "
            "completion. Give it to notebook 1 as its dataset instead."
        )
    report = {"published": name, "splits": {split: len(rows) for split, rows in splits.items()}}
    report["fingerprint"] = "-".join(rows._fingerprint for rows in splits.values())
    with atomic_write(folder) as partial_folder:
        splits.save_to_disk(partial_folder)
        write_json(partial_folder / "report.json", report)


def encode_splits(splits, tokenizer, stops, max_length):
    """All splits as token ids, a DatasetDict, and a table of how many examples and tokens they have.

    The validation split is sorted by length, so that its batches have little padding. Raises StageError if an example
    is longer than `max_length`: it would lose its end.
    """

    def encode_batch(columns):
        rows = pd.DataFrame(
            encode_all(pd.DataFrame(dict(columns)).to_dict("records"), tokenizer, stops)
        )
        sizes = {
            "tokens": rows["input_ids"].map(len),
            "in the loss": rows["completion_mask"].map(sum),
        }
        return rows.assign(**sizes).to_dict("list")

    encoded = splits.map(encode_batch, batched=True, remove_columns=splits["train"].column_names)
    sizes = {
        name: split.select_columns(["tokens", "in the loss"]).to_pandas()
        for name, split in encoded.items()
    }
    longest = max(size["tokens"].max() for size in sizes.values())
    if longest > max_length:
        raise StageError(
            f"max_length={max_length}, but the longest example has {longest} tokens and would lose its end. "
            "Raise max_length, or run 01_format_dataset again with this one."
        )
    encoded = encoded.remove_columns(["tokens", "in the loss"])
    encoded["validation"] = encoded["validation"].select(
        sizes["validation"]["tokens"].argsort(kind="stable")
    )
    counts = {name: {"examples": len(size), **size.sum()} for name, size in sizes.items()}
    return encoded, pd.DataFrame(counts).T
