"""A summary of the base model and of how it will be treated, for the reader."""

import pandas as pd

from tabletune.model.inspection import context_length, linear_layers, text_part
from tabletune.model.loading import attention_implementation
from tabletune.training.lora_targets import lora_targets


def summarize_base_model(model, targets="auto", attn_implementation="auto", quantization="nf4"):
    """What this base is and how it will be treated, {what: a short text}.

    Raises StageError for what cannot work.

    Of `model` only the shapes are read: a `skeleton` will do.
    """
    config = model.config
    found, every = lora_targets(model, targets), linear_layers(model)
    counts = pd.Series([name.rpartition(".")[2] for name in found]).value_counts()
    numbers = sum(layer.weight.numel() for layer in every.values())
    rest = model.num_parameters() - numbers
    experts = any(parameter.dim() == 3 for parameter in text_part(model).parameters())
    bits = {"nf4": 4, "8bit": 8, "none": 16}[quantization]
    return {
        "architecture": f"{type(model).__name__}, {model.num_parameters() / 1e6:,.1f} million parameters",
        "attention": attention_implementation(config, attn_implementation),
        "adapters on": ", ".join(f"{count} × {name}" for name, count in sorted(counts.items())),
        "in memory": f"{numbers / 1e6:,.1f} million weights in {bits} bits, {rest / 1e6:,.1f} million in 16"
        + (", the mixture's experts among them" if experts else ""),
        "weights": f"{(numbers * bits + rest * 16) / 8 / 2**30:,.2f} GiB",
        "reads at once": f"{context_length(config):,} tokens"
        if context_length(config)
        else "unknown",
    }
