"""On a CPU: logits only where the loss looks, for prompts much longer than their answers.

Of a prompt with rows of the table in it two thirds are not in the loss. Their logits, a value for
each token of the vocabulary, take a quarter of the time of a small model's step on a CPU. The loss
is the same up to rounding.
"""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from tabletune.training.examples import IGNORED

LARGEST_SHARE = 0.45  # of tokens in the loss: with more it is not worth another order of the sums


def worth_it(model: PreTrainedModel, labels: list[list[int]]) -> bool:
    """Whether few of the tokens are in the loss, and the model can leave logits out.

    `labels` are those of the training examples.
    """
    tokens = sum(len(row) for row in labels)
    in_loss = sum(len(row) - row.count(IGNORED) for row in labels)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    can = "logits_to_keep" in inspect.signature(base.forward).parameters
    return can and tokens > 0 and in_loss <= LARGEST_SHARE * tokens


def loss_of_answers(
    model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
) -> tuple[torch.Tensor, Any]:
    """The mean loss of the tokens in `labels` [rows, tokens], and the model's output for them.

    With `num_items` the sum of the losses is divided by that, as Trainer does where a step has
    several batches.
    """
    labels = inputs["labels"]
    targets = labels[:, 1:]  # [rows, tokens - 1]: the token after each position
    # where any row of the batch has a token in the loss: logits_to_keep takes one list for all rows
    positions = (targets != IGNORED).any(0).nonzero()[:, 0]  # [kept]
    model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
    output = model(**model_inputs, logits_to_keep=positions)
    logits = output.logits.float().flatten(0, 1)  # [rows x kept, vocabulary]
    target_ids = targets[:, positions].flatten()
    reduction = "mean" if num_items is None else "sum"
    loss = torch.nn.functional.cross_entropy(
        logits, target_ids, ignore_index=IGNORED, reduction=reduction
    )
    if num_items is not None:
        loss = loss / num_items
    return loss, output
