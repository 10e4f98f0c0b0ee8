"""Checks of a base model before it is trained: numbers, causality, packed examples."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from tabletune.errors import StageError
from tabletune.model.inspection import text_part


@torch.no_grad()
def packing_leak(model: PreTrainedModel) -> float:
    """How much examples that are packed into one row see of each other.

    A share of the logits' range. Two rows hold two examples each, with positions that begin anew.
    The first example is varied, and the change of the second one's logits is compared with their
    range. It is 0 in Llama and most models, 8% to 60% in hybrids with recurrent layers. A model
    that takes no positions cannot know where an example begins: 1.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return 1.0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # not 0 and 1, which are often padding and BOS
    ids = torch.arange(2, 34).remainder(vocabulary)  # [32]: two examples of 16 tokens
    varied = torch.cat([ids[:16].flip(0), ids[16:]])
    positions = torch.arange(16).repeat(2, 2).to(model.device)  # [2 rows, 32]
    logits = []
    for row in (ids, varied):
        rows = row.repeat(2, 1).to(model.device)
        output = model(input_ids=rows, position_ids=positions, use_cache=False)
        logits.append(output.logits[:, 16:].float())  # [2, 16, vocabulary], of the second example
    change = (logits[0] - logits[1]).abs().max()
    return (change / (logits[0].max() - logits[0].min())).item()


def check_finite(results: torch.Tensor, model: PreTrainedModel) -> None:
    """Raise StageError if there is infinity or NaN in what `model` computed.

    So it is with Gemma 3 in fp16. fp16 ends at 65,504, and some models' activations do not
    (https://unsloth.ai/blog/gemma3).
    """
    if results.isfinite().all():
        return
    dtype = str(model.dtype).removeprefix("torch.")
    remedy = "Its files may be damaged."
    if dtype == "float16":
        remedy = 'Set precision to "fp32".'
    raise StageError(f"This model computes infinity or NaN in {dtype}. {remedy}")


def check_forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Check what `model` computes for these ids, [1, tokens].

    Raises StageError if it is no number, or if a token's result depends on later tokens. An
    encoder's does, such as BERT, which transformers would train as a causal language model: it
    would learn to copy. In a causal model the gradient of the first token's result by later tokens
    is exactly 0.
    """
    embedded = []

    def keep_embeddings(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with model.get_input_embeddings().register_forward_hook(keep_embeddings):
        hidden = text_part(model)(input_ids=ids.to(model.device), use_cache=False)[0].float()
    check_finite(hidden, model)
    if not embedded:
        return
    # weighted, as a plain sum is constant behind a norm
    weights = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)
    (gradient,) = torch.autograd.grad((hidden[0, 0] * weights).sum(), embedded[:1])
    if gradient[0, 1:].nan_to_num().any():  # [later tokens, hidden size]
        raise StageError(
            "This model sees the words that are still to come, so it would only learn to copy "
            'them. Take a chat model. If this is one, set attn_implementation to "eager".'
        )
