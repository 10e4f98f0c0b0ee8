"""A summary of the base model and of how it will be treated, for the reader."""

from collections import Counter

import torch
from transformers import PreTrainedModel

from tabletune.model.inspection import context_length, linear_layers, text_part
from tabletune.model.loading import attention_implementation
from tabletune.training.lora_targets import lora_targets

QUANTIZED_BITS = {"nf4": 4, "8bit": 8}


def summarize_base_model(
    model: PreTrainedModel,
    targets: str | list[str] = "auto",
    attn_implementation: str = "auto",
    quantization: str = "nf4",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, str]:
    """What this base is and how it will be treated, {what: a short text}.

    Of `model` only the shapes are read: a `skeleton` will do. `dtype` is that of the weights that
    are not quantized. Raises StageError for what cannot work.
    """
    # by the last part of the name: 32 × q_proj, 32 × v_proj
    adapted = Counter(name.rpartition(".")[2] for name in lora_targets(model, targets))
    quantized = sum(layer.weight.numel() for layer in linear_layers(model).values())
    unquantized = model.num_parameters() - quantized
    other_bits = 8 * dtype.itemsize
    bits = QUANTIZED_BITS.get(quantization, other_bits)
    if bits == other_bits:
        in_memory = f"all {model.num_parameters() / 1e6:,.1f} million weights in {bits} bits"
    else:
        in_memory = f"{quantized / 1e6:,.1f} million weights in {bits} bits"
        in_memory += f", {unquantized / 1e6:,.1f} million in {other_bits}"
        # experts in one tensor are no linear layers, so they are not quantized
        if any(parameter.dim() == 3 for parameter in text_part(model).parameters()):
            in_memory += ", the mixture's experts among them"
    longest = context_length(model.config)
    matrices = ", ".join(f"{count} × {name}" for name, count in sorted(adapted.items()))
    gib = (quantized * bits + unquantized * other_bits) / 8 / 2**30
    parameters = f"{model.num_parameters() / 1e6:,.1f} million parameters"
    return {
        "architecture": f"{type(model).__name__}, {parameters}",
        "attention": attention_implementation(model.config, attn_implementation),
        "adapters on": f"{adapted.total()} matrices: {matrices}",
        "in memory": in_memory,
        "weights": f"{gib:,.2f} GiB",
        "context length": f"{longest:,} tokens" if longest else "unknown",
    }
