"""What notebooks 4 to 6 examine.

The data set, the adapter and the merged model of a run, if they belong together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from tabletune.chat.tokenizer import load_tokenizer_of_run
from tabletune.data.context import INDEXES, index_fingerprints
from tabletune.data.example import disclaimer_of, example_settings
from tabletune.model import run_models
from tabletune.run.artifacts import check_run, load_dataset_of_run


@dataclass(frozen=True)
class TrainedRun:
    """A run after notebooks 1 to 3.

    `inputs` identify what its results are made from, for `Stage.is_done`. `merged` is the folder of
    the merged model, or None where another machine has it. `example` has the settings of the worked
    example; it is empty for a reader's own table.
    """

    folder: Path
    splits: DatasetDict
    report: dict
    example: dict
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]
    merged: Path | None
    inputs: dict

    def disclaimer(self, text: str) -> str:
        """What stands above every answer.

        A text of the reader's, else the example's or a neutral one.
        """
        return disclaimer_of(self.report, text)


def open_trained_run(
    folder: Path,
    run_dir: str,
    base_model: str,
    with_merged: bool = True,
    indexes: Sequence[str] = INDEXES,
) -> TrainedRun:
    """Open a run folder, the parameter `run_dir` as it was set.

    Without the merged model if it is not needed. `indexes` are those of the run's indexes that the
    results depend on.

    Raises StageError if a part is missing, or if the parts do not belong together: this adapter
    must have been trained on this data set, and this merged model made from this adapter.
    """
    splits, report = load_dataset_of_run(folder)
    merged = run_models.find_merged(folder, run_dir) if with_merged else None
    adapter = check_run(folder, merged, report, base_model)
    tokenizer, stop_token_ids = load_tokenizer_of_run(folder / "adapter")
    inputs = {"dataset": report["fingerprint"], "adapter": adapter}
    inputs |= index_fingerprints(folder, indexes)
    return TrainedRun(
        folder,
        splits,
        report,
        example_settings(report),
        tokenizer,
        stop_token_ids,
        merged,
        inputs,
    )
