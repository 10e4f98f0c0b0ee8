"""How many rows fit into memory at once."""

import torch
from accelerate.utils import gather_object

from tabletune.model.devices import available_memory_gib


@torch.no_grad()
def bytes_per_token(model, with_logits=True):
    """What a token takes while it is read: what the cache keeps of it, and logits, as computed and twice in fp32.

    Measured, as caches differ: keys and values of some layers, or states that do not grow.
    """

    def read(tokens):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        output = model(input_ids=ids, use_cache=True)
        layers = getattr(output.get("past_key_values"), "layers", [])
        kept = [
            value
            for layer in layers
            for value in vars(layer).values()
            if isinstance(value, torch.Tensor)
        ]
        return sum(tensor.nbytes for tensor in kept), output.logits

    (few, _), (more, logits) = read(8), read(16)
    return (more - few) // 8 + with_logits * logits.shape[-1] * (logits.element_size() + 4 + 4)


def max_batch_size(model, length, most, with_logits=True):
    """How many rows of `length` tokens, up to `most`, have room in memory beside `model`.

    A fifth of the free memory is left alone. An answer needs no logits but the last. Of several processes, the one with
    the least room decides.
    """
    if most <= 1:
        return 1
    model.eval()
    room = (
        0.8
        * available_memory_gib()
        * 2**30
        / (length * max(1, bytes_per_token(model, with_logits)))
    )
    return min(gather_object([max(1, min(most, int(room)))]))
