"""Adding a LoRA update to one weight matrix."""

import torch
from peft.utils.other import get_pattern_key
from transformers.pytorch_utils import Conv1D

from tabletune.model.compat import dequantize_4bit, quantize_4bit

# --- one matrix


def scaling(config, module):
    """The factor of B · A for a module: α / r, or α / √r with rsLoRA (https://arxiv.org/abs/2312.03732)."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(
        get_pattern_key(config.alpha_pattern, module), config.lora_alpha
    )
    return alpha / (r**0.5 if config.use_rslora else r)


def add_lora(weight, adapter, config, module):
    """Add scaling · B A of a module to its `weight`, fp32 and [out, in], in place. Returns it."""
    a, b = (adapter[f"base_model.model.{module}.lora_{matrix}.weight"].float() for matrix in "AB")
    return weight.addmm_(b, a, alpha=scaling(config, module))


def nf4_round_trip(weight, dtype):
    """A weight as training saw it: cast to `dtype`, quantized to NF4 with double quantization, and back, in fp32."""
    weight = weight.to("cuda" if torch.cuda.is_available() else "cpu", dtype).float().contiguous()
    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).cpu()


def transpose_conv1d(layer, weight):
    """A layer's weight as [out, in], or back: a view. GPT-2's `Conv1D` keeps it the other way round."""
    return weight.T if isinstance(layer, Conv1D) else weight
