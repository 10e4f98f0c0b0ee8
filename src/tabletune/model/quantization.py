"""Base models in 4 or 8 bits, as training has them."""

import sys
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from tabletune.errors import StageError
from tabletune.model.compat import compute_in, keep_gradients_on_cpu
from tabletune.model.loading import load_model


def nf4_config(dtype: torch.dtype, sharded: bool = False) -> BitsAndBytesConfig:
    """How QLoRA keeps the base: NF4 with double quantization, computing in `dtype`.

    See https://arxiv.org/abs/2305.14314. To be `sharded`, the 4-bit numbers are stored as if they
    were float32: FSDP shards only floats, and of 16-bit ones, those that read as NaN all become the
    same NaN where a GPU copies them
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945).
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.float32 if sharded else torch.uint8,
    )


def load_base(
    base_model: str | Path,
    revision: str | None,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    sharded: bool = False,
    quantization: str | BitsAndBytesConfig = "nf4",
) -> PreTrainedModel:
    """The base model as training has it, on a GPU if there is one.

    `quantization` is "nf4", "8bit", "none" (the model in `dtype`), or a BitsAndBytesConfig. A model
    that is to be `sharded` waits in RAM. Raises StageError for any other `quantization`.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights at its first forward pass in
    eval mode, into a layout that has no gradient: a model that was evaluated once would never learn
    again, without an error (`Linear4bit.forward` in bitsandbytes 0.50). That is switched off here.
    """
    if quantization == "nf4":
        config = nf4_config(dtype, sharded)
    elif quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "none":
        config = None
    elif isinstance(quantization, str):
        raise StageError(f'quantization="{quantization}": use nf4, 8bit or none.')
    else:
        config = quantization
    # FSDP moves each share to its GPU itself
    device = "cpu" if sharded else None
    model = load_model(base_model, revision, dtype, attn_implementation, config, device)
    if "bitsandbytes" in sys.modules:  # else no layer is in 4 bits, and the import takes seconds
        from tabletune.model.bnb import bnb

        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                keep_gradients_on_cpu(layer)
                # a base stored in 4 bits brings the dtype of whoever stored it
                compute_in(layer, dtype)
    return model
