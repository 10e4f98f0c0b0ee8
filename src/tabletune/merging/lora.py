"""Adding a LoRA update to one weight matrix.

Adapters are stored in PEFT's checkpoint format
(https://huggingface.co/docs/peft/developer_guides/checkpoint): the matrices A and B of a layer have
the names `base_model.model.LAYER.lora_A.weight` and `base_model.model.LAYER.lora_B.weight`.
"""

import re
from typing import Any

import torch
from peft import LoraConfig
from transformers import Conv1D

from tabletune.model.bnb import dequantize_4bit, quantize_4bit

PREFIX = "base_model.model."  # of all names in an adapter's file
MATRICES = (".lora_A.weight", ".lora_B.weight")


def has_lora(adapter: dict[str, torch.Tensor], module: str) -> bool:
    """Whether an adapter has the matrices A and B of a layer."""
    return f"{PREFIX}{module}{MATRICES[0]}" in adapter


def lora_matrices(
    adapter: dict[str, torch.Tensor], module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices A, [r, in], and B, [out, r], of a layer that has them (`has_lora`), in fp32."""
    a, b = (adapter[f"{PREFIX}{module}{matrix}"].float() for matrix in MATRICES)
    return a, b


def base_module_name(name: str) -> str:
    """The layer of the base model that a tensor of an adapter belongs to.

    `base_model.model.` and `.lora_A.weight` are taken off.
    """
    name = name.removeprefix(PREFIX)
    # what is trained in full has no such part: its own name ends with .weight or .bias
    module, *kind = re.split(r"\.lora_|\.token_adapter\.|\.base_layer\.", name)
    return module if kind else module.rpartition(".")[0]


def scaling(config: LoraConfig, module: str) -> float:
    """The factor of B · A for a layer: α / r, or α / √r with rsLoRA.

    See https://arxiv.org/abs/2312.03732 for the latter.
    """
    r = of_layer(config.rank_pattern, module, config.r)
    alpha = of_layer(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r)


def of_layer(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a layer's name ends with.

    A pattern is a name or a regular expression. This is how PEFT documents `rank_pattern` and
    `alpha_pattern`.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def add_lora(
    weight: torch.Tensor, adapter: dict[str, torch.Tensor], config: LoraConfig, module: str
) -> torch.Tensor:
    """Add scaling · B A of a layer to its `weight`, fp32 and [out, in], in place. Returns it."""
    a, b = lora_matrices(adapter, module)
    return weight.addmm_(b, a, alpha=scaling(config, module))


def nf4_round_trip(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as training saw it, in fp32 on the CPU.

    It is cast to `dtype`, quantized to NF4 with double quantization, and dequantized.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # rounded to the training's dtype first, as the base was when it was loaded for training
    weight = weight.to(device, dtype).float().contiguous()
    quantized, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(quantized, state).cpu()


def transpose_conv1d(layer: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight as [out, in], or back: a view.

    GPT-2's `Conv1D` has it the other way round.
    """
    return weight.T if isinstance(layer, Conv1D) else weight
