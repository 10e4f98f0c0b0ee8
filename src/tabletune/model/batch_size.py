"""How many rows fit into memory at once."""

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from tabletune.model.compat import cache_of
from tabletune.model.devices import available_memory_gib
from tabletune.model.inspection import intermediate_size


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel, with_logits: bool = True) -> int:
    """What a token takes while it is read: what the cache keeps of it, and its logits.

    Logits are counted as computed and twice in fp32. The cache is measured, as caches differ: keys
    and values of some layers, or states that do not grow.
    """

    def read(tokens: int) -> tuple[int, torch.Tensor]:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        output = model(input_ids=ids, use_cache=True)
        size = 0
        for layer in getattr(cache_of(output), "layers", []):
            tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
            size += sum(tensor.nbytes for tensor in tensors)
        return size, output.logits

    # the difference of two lengths leaves out what a cache keeps once, such as a state
    size_of_8, _ = read(8)
    size_of_16, logits = read(16)
    size = (size_of_16 - size_of_8) // 8
    if with_logits:
        size += logits.shape[-1] * (logits.element_size() + 4 + 4)
    return size


def working_bytes_per_token(model: PreTrainedModel) -> int:
    """What a layer holds of each token while it reads a prompt, freed before the next layer.

    That is three results of its wide half, the MLP, and four hidden states, by the config.
    """
    config = model.config.get_text_config()
    numbers = 3 * intermediate_size(config) + 4 * config.hidden_size
    return numbers * model.get_input_embeddings().weight.element_size()


def max_batch_size(
    model: PreTrainedModel, length: int, most: int, prompt_tokens: int | None = None
) -> int:
    """How many rows of `length` tokens, up to `most`, have room in memory beside `model`.

    With `prompt_tokens`, a row is a prompt of so many tokens and its answer; an answer needs no
    logits but the last. Without, rows are scored, and the logits of each token take more than a
    layer does. A fifth of the free memory is left alone. Of several processes, the one with the
    least room decides.
    """
    if most <= 1:
        return 1
    model.eval()
    # bytes of a row
    row = length * max(1, bytes_per_token(model, with_logits=prompt_tokens is None))
    if prompt_tokens is not None:
        row += prompt_tokens * working_bytes_per_token(model)
    # a batch that runs out of memory would end the notebook, so a fifth stays free
    rows = int(0.8 * available_memory_gib() * 2**30 / row)
    return min(gather_object([max(1, min(most, rows))]))
