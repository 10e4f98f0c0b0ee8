"""An estimate of the memory that a training takes, before anything is downloaded."""

import math

import pandas as pd
import psutil

from tabletune.model.devices import available_memory_gib
from tabletune.model.inspection import in_out_features, linear_layers, text_part
from tabletune.training.lora_targets import lora_targets


def intermediate_size(config):
    """The width of a layer between its two halves, of all experts at work; what a config lacks is taken as usual."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(width) if isinstance(width, (list, tuple)) else width
    experts = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    return (
        max(width, experts * (getattr(config, "moe_intermediate_size", None) or width))
        if experts
        else width
    )


def expected_gib(model, dtype, tokens, gpu, targets="auto", lora_r=64, lora_dropout=0.0, optim="adamw_torch",
                 gradient_checkpointing=True, use_liger_kernel=True, quantization="nf4", shards=1):  # fmt: skip
    """What training on batches of `tokens` tokens takes at its peak, in GiB on each GPU, by part: a Series.

    Of `model` only the shapes are read: a `skeleton` will do. NF4 with double quantization takes 4 bits a weight and
    8.25 bits for each 64 of them, in all linear layers but the output layer; experts of a mixture stay in 16 bits.
    Activations: what each norm takes and the adapters after it, the attention without its matrix, which SDPA does not
    keep, the two halves of the MLP (after Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198), and each
    adapter's input after dropout with its mask. With checkpointing, one hidden state a layer and one layer in full.
    Liger's kernels keep less of the MLP, and compute the logits in pieces. Paged optimizer states may move to RAM. Over
    `shards` GPUs, each keeps its share of all weights, the statistics beside the 4-bit ones and the output layer, and
    gathers the layer at work and the next; with what FSDP has in flight and what its streams do not give back at once,
    that was six layers on an H100.
    """
    text, size = model.config.get_text_config(), dtype.itemsize
    layers, every = text.num_hidden_layers, linear_layers(model)
    numbers = sum(layer.weight.numel() for layer in every.values())
    unpacked = (
        not gpu and quantization == "nf4" and 2 * numbers * size / 2**30 <= available_memory_gib()
    )
    bits = size if unpacked else {"nf4": 0.5, "8bit": 1}.get(quantization, size)
    adapted = [in_out_features(model.get_submodule(name)) for name in lora_targets(model, targets)]
    adapter = sum(lora_r * (taken + given) for taken, given in adapted)
    norms = [
        p.numel()
        for name, p in text_part(model).named_parameters()
        if "norm" in name and name.endswith("weight")
    ]
    heads = getattr(text, "num_attention_heads", None) or 1
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    # keys, values and results are as wide as queries once they meet; queries and keys also before a norm of their own
    queries = heads * head * (5 if head in norms else 4)
    residual = (
        norms.count(text.hidden_size) // layers + (1 if use_liger_kernel else 4)
    ) * text.hidden_size
    layer = (residual + queries + (2 if use_liger_kernel else 4) * intermediate_size(text)) * size
    layer += sum(taken for taken, _ in adapted) / layers * (size + 1) if lora_dropout else 0
    activations = (
        layers * text.hidden_size * size + layer if gradient_checkpointing else layers * layer
    )
    logits = text.vocab_size * (
        size + 4 * 4
    )  # as computed; in fp32: shifted, softmax, gradient, entropy
    if (
        use_liger_kernel
    ):  # of so many tokens at once, as in liger_kernel.ops.fused_linear_cross_entropy
        piece = (
            1
            << (math.ceil(tokens / math.ceil(text.vocab_size / text.hidden_size)) - 1).bit_length()
        )
    states = 0 if "paged" in optim else 2 if "8bit" in optim else 8
    parts = {
        "base model": numbers * (bits / shards + (8.25 / 8 / 64 if quantization == "nf4" else 0))
        + (model.num_parameters() - numbers) * size / shards,
        "adapter, gradients, optimizer": adapter * (4 + 4 + states) / shards,
        "activations": tokens * activations,
        "logits": (piece if use_liger_kernel else tokens) * logits,
    }
    if shards > 1:
        output_layer = model.get_output_embeddings().weight.numel() * size
        parts["gathered layers"] = 6 / layers * (numbers * 0.5 + adapter * 4) + output_layer * (
            1 - 1 / shards
        )
    if not gpu:  # freed memory is used again less than on a GPU: half as much more, measured at 256 and 512 tokens
        parts |= {name: 1.5 * parts[name] for name in ("activations", "logits")}
        parts["Python and its libraries"] = psutil.Process().memory_info().rss
    return pd.Series(parts, name="GiB") / 2**30
