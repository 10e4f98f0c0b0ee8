"""Generating answers with a static cache and CUDA graphs."""

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from tabletune.model.cuda_graphs import cuda_graph, supports_cuda_graph

# --- answers, a token at a time


def static_cache(model, length):
    """A cache with room for `length` tokens, or None where the model takes no such cache, or there is no GPU.

    It is made of the layers that the model's own cache has: keys and values of every token. That of a sliding window
    may keep them all, since the mask leaves out what is too far back.
    """
    if model.device.type != "cuda" or not supports_cuda_graph(model):
        return None
    with torch.no_grad():
        own = model(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True
        )
    layers = getattr(own.get("past_key_values"), "layers", [])
    usual = layers and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )
    return Cache(layers=[StaticLayer(length) for _ in layers]) if usual else None


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
    """The loop of `generate` over a `static_cache`, for its argument `custom_generate`: same tokens, recorded steps.

    `input_ids` are [rows, tokens], padded on the left; `prepared` is what else `generate` has for the model. Returns
    them with the answers, [rows, tokens and new ones].
    """
    begin, end, pad = (
        input_ids.shape[1],
        generation_config.max_length,
        generation_config.pad_token_id,
    )
    ids = torch.nn.functional.pad(input_ids, (0, end - begin), value=pad)
    positions, seen = prepared.pop("position_ids"), prepared["attention_mask"]
    prepared["attention_mask"] = torch.nn.functional.pad(
        seen, (0, end - begin), value=1
    )  # what comes later is masked
    logits = model(input_ids=input_ids, position_ids=positions, **prepared).logits[:, -1].float()
    token, position = input_ids[:, -1:].clone(), positions[:, -1:] + 1
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def step():
        logits = model(input_ids=token, position_ids=position, **prepared).logits[:, -1].float()
        position.add_(1)
        return logits

    for now in range(begin, end):
        scores = logits_processor(ids[:, :now], logits)
        new = (
            scores.softmax(-1).multinomial(1)[:, 0]
            if generation_config.do_sample
            else scores.argmax(-1)
        )
        ids[:, now] = new.masked_fill(done, pad)
        done |= stopping_criteria(ids[:, : now + 1], None)
        if done.all():
            break
        token.copy_(ids[:, now : now + 1])
        if now == begin + 1:
            step = cuda_graph(step)
        logits = step()
    return ids[:, : now + 1]
