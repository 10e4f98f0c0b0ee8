"""Batches of examples, padded or packed."""

import torch

from tabletune.training.trainer import IGNORED

# --- batches


class Collator:
    """Makes a batch of rows, {name: tensor [rows, length]}.

    A packed row has `seq_lengths`, the lengths of its examples. Its `position_ids` begin anew with each example, which
    is how transformers knows that they must not see each other; padding has the position 0 throughout, so that nothing
    sees it. Other rows have an `attention_mask`. `labels` are the ids in the loss, and -100 elsewhere. Rows are padded
    to the longest of the batch; packed ones on a GPU, whose kernels are compiled for one shape, to `max_length`.
    """

    def __init__(self, pad_token_id, max_length):
        self.pad_token_id, self.max_length = pad_token_id, max_length

    def __call__(self, examples):
        packed = "seq_lengths" in examples[0]
        longest = max(len(example["input_ids"]) for example in examples)
        length = self.max_length if packed and torch.cuda.is_available() else longest
        shape = (len(examples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
        }
        seen = "position_ids" if packed else "attention_mask"
        batch[seen] = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            ids, in_loss = (
                torch.tensor(example["input_ids"]),
                torch.tensor(example["completion_mask"]).bool(),
            )
            batch["input_ids"][row, : len(ids)] = ids
            batch["labels"][row, : len(ids)] = ids.where(in_loss, IGNORED)
            positions = (
                [torch.arange(n) for n in example["seq_lengths"]]
                if packed
                else [torch.ones_like(ids)]
            )
            batch[seen][row, : len(ids)] = torch.cat(positions)
        return batch
