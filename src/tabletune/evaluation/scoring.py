"""What a model makes of rows that it was not trained on.

How likely it finds their answers, and what it answers itself. Everything here works on padded
batches, in one process or in several under `accelerate launch`, each of which takes its share and
gets the whole result.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm import tqdm
from transformers import PreTrainedModel

from tabletune.model.batch_size import max_batch_size
from tabletune.model.checks import check_finite

# --- perplexity


def spans(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a text of `length` tokens into spans (start, end, first).

    In start…end, score the tokens from `first` on. Every token but the very first is scored exactly
    once, with at least `window - stride` tokens before it where the text has as many.
    """
    # the very first token has none before it, so nothing predicts it
    cut = [(0, min(window, length), 1)]
    while cut[-1][1] < length:
        end = min(cut[-1][1] + min(stride, window - 1), length)
        cut.append((max(0, end - window), end, cut[-1][1]))
    return cut


def padded_logits(
    model: PreTrainedModel, texts: Sequence[list[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a batch of texts, lists of ids, padded on the right.

    (logits, ids), [texts, longest, vocabulary]. Padding is masked, so that a result depends on its
    batch by rounding only.
    """
    ids = [torch.tensor(text) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(
        model.device
    )
    lengths = torch.tensor([len(text) for text in texts], device=model.device)
    positions = torch.arange(ids.shape[1], device=model.device)
    attention_mask = (positions < lengths[:, None]).long()  # [texts, longest]
    return model(input_ids=ids, attention_mask=attention_mask).logits, ids


@torch.no_grad()
def score(
    model: PreTrainedModel,
    rows: Sequence[dict],
    pad_token_id: int,
    batch_size: int,
    window: int,
    stride: int,
) -> pd.DataFrame:
    """Negative log-likelihoods, in nats, of each row's response and of all of its text.

    `rows` have `input_ids` and `completion_mask`; at most `batch_size` are read at once, where
    memory allows. Returns a DataFrame with a line a row: `response_nll`, `response_tokens`,
    `full_nll`, `full_tokens`. Raises StageError if the model computes no numbers.
    """
    model.eval()
    processes = PartialState()
    totals = np.zeros((len(rows), 4))  # a column for each figure that is returned
    work = []  # (row, start, end, first): see `spans`
    for i, row in enumerate(rows):
        work += [(i, *span) for span in spans(len(row["input_ids"]), window, stride)]
    # by length, so that little of a batch is padding
    work.sort(key=lambda item: item[2] - item[1])
    batch_size = max_batch_size(model, work[-1][2] - work[-1][1], batch_size) if work else 1
    # each process takes every n-th span, and so gets long and short ones
    work = work[processes.process_index :: processes.num_processes]
    for k in tqdm(range(0, len(work), batch_size), "scoring", unit="batch", file=sys.stdout):
        batch = work[k : k + batch_size]
        logits, ids = padded_logits(
            model, [rows[i]["input_ids"][start:end] for i, start, end, _ in batch], pad_token_id
        )
        # flat: along another dimension than the last PyTorch sums less exactly, by 0.01% of a
        # perplexity
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        # [rows, tokens - 1]: the first column is of the second token
        nll = nll.view(len(batch), -1).double().cpu().numpy()
        for (i, start, end, first), row_nll in zip(batch, nll, strict=True):
            # of a later window, only what the window before has not scored
            scored = row_nll[first - start - 1 : end - start - 1]
            mask = np.array(rows[i]["completion_mask"][first:end])
            totals[i] += [scored @ mask, mask.sum(), scored.sum(), len(scored)]
    # each process has zeros in the rows of the others, so the sum is the whole
    totals = reduce(torch.tensor(totals, device=processes.device), "sum").cpu()
    check_finite(totals, model)
    return pd.DataFrame(
        totals.numpy(), columns=["response_nll", "response_tokens", "full_nll", "full_tokens"]
    )


def perplexity(scores: pd.DataFrame, part: str) -> float:
    """Token-weighted perplexity of a part, "response" or "full", of all rows together."""
    return math.exp(scores[f"{part}_nll"].sum() / scores[f"{part}_tokens"].sum())


@torch.no_grad()
def response_logits(
    model: PreTrainedModel, rows: Sequence[dict], pad_token_id: int, batch_size: int
) -> list[torch.Tensor]:
    """The logits that predict each row's response, as computed.

    A list of tensors [tokens, vocabulary] on the CPU.
    """
    model.eval()
    logits_of_rows = []
    batch_size = max_batch_size(
        model, max((len(row["input_ids"]) for row in rows), default=1), batch_size
    )
    for k in range(0, len(rows), batch_size):
        batch = rows[k : k + batch_size]
        logits, _ = padded_logits(model, [row["input_ids"] for row in batch], pad_token_id)
        for row, row_logits in zip(batch, logits, strict=True):
            # row_logits [longest, vocabulary]: position t predicts token t + 1
            logits_of_rows.append(row_logits[np.flatnonzero(row["completion_mask"][1:])].cpu())
    return logits_of_rows


def divergence(
    trained: Sequence[torch.Tensor], variant: Sequence[torch.Tensor], rows: Sequence[dict]
) -> pd.DataFrame:
    """How far a variant is from what was trained.

    A line a row, `response_nll`, `response_kl`, `response_tokens`. `response_kl` is the sum over
    the response of KL(trained ‖ variant) of the next token, in nats. Both logits are those of
    `response_logits` for `rows`.
    """
    lines = []
    for p, q, row in zip(trained, variant, rows, strict=True):
        log_p = p.float().log_softmax(-1)  # [tokens, vocabulary]
        log_q = q.float().log_softmax(-1)
        # [tokens of the response]: the ids that the logits above predict
        response = torch.tensor(row["input_ids"])[1:][np.flatnonzero(row["completion_mask"][1:])]
        nll = -log_q.gather(-1, response[:, None]).double().sum().item()
        # max(kl, 0): rounding may make the divergence of equal logits a hair below 0
        kl = (log_p.exp() * (log_p - log_q)).double().sum().item()
        lines.append(
            {"response_nll": nll, "response_kl": max(kl, 0.0), "response_tokens": len(response)}
        )
    return pd.DataFrame(lines)
