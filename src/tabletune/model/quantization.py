"""Base models in 4 or 8 bits, as training has them."""

import torch
from transformers import BitsAndBytesConfig

from tabletune.errors import StageError
from tabletune.model.loading import load_model


def nf4_config(dtype, sharded=False):
    """How QLoRA keeps the base: NF4 with double quantization, computing in `dtype` (https://arxiv.org/abs/2305.14314).

    To be `sharded`, the 4-bit numbers are stored as if they were float32: FSDP shards only floats, and of 16-bit ones,
    those that read as NaN all become the same NaN where a GPU copies them
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
    base_model, revision, dtype, attn_implementation="auto", sharded=False, quantization="nf4"
):
    """The base model as training has it: quantized, or in `dtype` with `quantization` "none"; on a GPU if there is one.

    `quantization` is "nf4", "8bit", "none", or a BitsAndBytesConfig. A model that is to be `sharded` waits in RAM.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights at its first forward pass in eval mode, into a
    layout that has no gradient: a model that was evaluated once would never learn again, without an error
    (`Linear4bit.forward` in bitsandbytes 0.50). The attribute that asks for the repacking is switched off here.
    Raises StageError for any other `quantization`.
    """
    configs = {
        "nf4": nf4_config(dtype, sharded),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }
    if isinstance(quantization, str) and quantization not in configs:
        raise StageError(f'quantization="{quantization}": use nf4, 8bit or none.')
    config = configs[quantization] if isinstance(quantization, str) else quantization
    model = load_model(
        base_model, revision, dtype, attn_implementation, config, "cpu" if sharded else None
    )
    for module in model.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # a Linear4bit; bitsandbytes takes seconds to import
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = (
                dtype  # a base stored in 4 bits brings the dtype of whoever stored it
            )
    return model
