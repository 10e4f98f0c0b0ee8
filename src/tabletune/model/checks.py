"""Checks of a base model before it is trained: numbers, causality, packed examples."""

import inspect

import torch

from tabletune.errors import StageError
from tabletune.model.inspection import text_part


@torch.no_grad()
def packing_leak(model):
    """Whether examples that are packed into one row see each other in this model, as a share of the logits' range.

    Two rows hold two examples each, with positions that begin anew; the first one is varied, and what the second one
    changes is compared with the range of its logits. 0 in Llama and most; 8% to 60% in hybrids with recurrent layers. A
    model that takes no positions cannot know where an example begins: 1.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return 1.0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2, 34).remainder(vocabulary)
    one, other = ids.repeat(2, 1), torch.cat([ids[:16].flip(0), ids[16:]]).repeat(2, 1)
    positions = torch.arange(16).repeat(2, 2)
    first, second = (
        model(
            input_ids=rows.to(model.device),
            position_ids=positions.to(model.device),
            use_cache=False,
        )
        .logits[:, 16:]
        .float()
        for rows in (one, other)
    )
    return ((first - second).abs().max() / (first.max() - first.min())).item()


def check_finite(results, model):
    """Raise StageError if there is infinity or NaN in what `model` computed, a tensor, as with Gemma 3 in fp16.

    fp16 ends at 65,504, and some models' activations do not (https://unsloth.ai/blog/gemma3).
    """
    if not results.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        remedy = 'Set precision to "fp32".' if dtype == "float16" else "Its files may be damaged."
        raise StageError(f"This model computes infinity or NaN in {dtype}. {remedy}")


def check_forward(model, ids):
    """Raise StageError if what `model` computes for these ids, [1, tokens], is no number, or sees what comes later.

    An encoder does, such as BERT, which transformers would train as a causal language model: it would learn to copy. In
    a causal one, the gradient of the first token's result by later tokens is exactly 0.
    """
    embedded = []

    def keep(module, inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with model.get_input_embeddings().register_forward_hook(keep):
        hidden = text_part(model)(input_ids=ids.to(model.device), use_cache=False)[0].float()
    check_finite(hidden, model)
    weights = torch.linspace(
        -1, 1, hidden.shape[-1], device=hidden.device
    )  # a plain sum is constant behind a norm
    gradients = (
        torch.autograd.grad((hidden[0, 0] * weights).sum(), embedded[:1]) if embedded else []
    )
    if any(gradient[0, 1:].nan_to_num().any() for gradient in gradients):
        raise StageError(
            "This model sees the words that are still to come, so it would learn none. Take a chat model. If this is "
            'one, set attn_implementation to "eager".'
        )
