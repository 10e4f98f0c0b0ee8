"""Batches of examples, padded or packed."""

from typing import Any

import torch

from tabletune.training.examples import IGNORED


class Collator:
    """Makes a batch of rows, {name: tensor [rows, length]}.

    A packed row has `seq_lengths`, the lengths of its examples. Its `position_ids` begin anew with
    each example, which is how transformers knows that they must not see each other; padding has the
    position 0 throughout, so that nothing sees it. Other rows have an `attention_mask`. `labels`
    are the ids in the loss, and -100 elsewhere. Rows are padded to the longest of the batch; packed
    ones on a GPU, whose kernels are compiled for one shape, to `max_length`.
    """

    def __init__(self, pad_token_id: int, max_length: int) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these examples: `input_ids`, `labels`, and positions or a mask."""
        is_packed = "seq_lengths" in examples[0]
        length = max(len(example["input_ids"]) for example in examples)
        if is_packed and torch.cuda.is_available():
            length = self.max_length
        shape = (len(examples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
        }
        # what is in neither an example nor its mask stays 0: padding
        visible = "position_ids" if is_packed else "attention_mask"
        batch[visible] = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            tokens = len(example["input_ids"])
            batch["input_ids"][row, :tokens] = torch.tensor(example["input_ids"])
            batch["labels"][row, :tokens] = torch.tensor(example["labels"])
            if is_packed:
                # 0, 1, 2, 0, 1, …
                positions = [torch.arange(count) for count in example["seq_lengths"]]
                batch[visible][row, :tokens] = torch.cat(positions)
            else:
                batch[visible][row, :tokens] = 1
        return batch
