"""Generating answers with a static cache and CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from tabletune.model.compat import cache_of
from tabletune.model.cuda_graphs import cuda_graph, supports_cuda_graph


def static_cache(model: PreTrainedModel, length: int) -> Cache | None:
    """A cache with room for `length` tokens; None where the model takes none, or without a GPU.

    It is made of the layers that the model's own cache has: keys and values of every token. That of
    a sliding window may keep them all, since the mask leaves out what is too far back.
    """
    if model.device.type != "cuda" or not supports_cuda_graph(model):
        return None
    # which layers a model's cache has shows only when it has read a token
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    layers = getattr(cache_of(output), "layers", [])
    kinds = {type(layer) for layer in layers}
    if not layers or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    return Cache(layers=[StaticLayer(length) for _ in layers])


def decode_loop(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Callable,
    stopping_criteria: Callable,
    generation_config: GenerationConfig,
    **prepared: Any,
) -> torch.Tensor:
    """The loop of `generate` over a `static_cache`, for its argument `custom_generate`.

    It gives the same tokens, and runs its steps as a CUDA graph. `input_ids` are [rows, tokens],
    padded on the left; `prepared` is what else `generate` has for the model. Returns them with the
    answers, [rows, tokens and new ones].
    """
    prompt_length = input_ids.shape[1]
    max_length, pad = generation_config.max_length, generation_config.pad_token_id
    # room for all new tokens from the start: the tensors keep their shape, as a graph needs it
    new_tokens = max_length - prompt_length
    ids = torch.nn.functional.pad(input_ids, (0, new_tokens), value=pad)  # [rows, max_length]
    positions = prepared.pop("position_ids")
    # what is still to come is masked by its position
    prepared["attention_mask"] = torch.nn.functional.pad(
        prepared["attention_mask"], (0, new_tokens), value=1
    )
    logits = model(input_ids=input_ids, position_ids=positions, **prepared).logits[:, -1].float()
    # a CUDA graph reads the same memory each time: `token` and `position` are changed in place
    token = input_ids[:, -1:].clone()  # [rows, 1], the same memory in each step
    position = positions[:, -1:] + 1
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def step() -> torch.Tensor:
        logits = model(input_ids=token, position_ids=position, **prepared).logits[:, -1].float()
        position.add_(1)
        return logits

    for length in range(prompt_length, max_length):
        scores = logits_processor(ids[:, :length], logits)  # [rows, vocabulary]
        if generation_config.do_sample:
            new = scores.softmax(-1).multinomial(1)[:, 0]
        else:
            new = scores.argmax(-1)
        # a row that has stopped gets padding
        ids[:, length] = new.masked_fill(done, pad)
        done |= stopping_criteria(ids[:, : length + 1], None)
        if done.all():
            break
        token.copy_(ids[:, length : length + 1])
        if length == prompt_length + 1:  # it has run once by now
            step = cuda_graph(step)
        logits = step()
    return ids[:, : length + 1]
