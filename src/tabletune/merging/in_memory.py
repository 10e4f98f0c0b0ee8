"""Merging a model in memory: with PEFT where an adapter is more than plain LoRA, else by hand.

`merging/plan.py` merges one tensor at a time and needs less memory. Notebook 6 merges here, to
compare the ways; and what is more than plain LoRA has to be merged here.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import Conv1D, PreTrainedModel

from tabletune.errors import StageError, first_line
from tabletune.merging.lora import (
    MATRICES,
    add_lora,
    has_lora,
    nf4_round_trip,
    transpose_conv1d,
)
from tabletune.model.adapters import attach_adapter
from tabletune.model.inspection import linear_layers, tied_weight_names

# ways to initialize an adapter that change the base's weights, too
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def quantized_layers(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Names and modules of the layers that read text and that bitsandbytes quantizes.

    These are the linear layers but the output layer: transformers leaves out what is tied, and the
    module of the last parameter (`get_keys_to_not_convert`). Experts that transformers keeps in one
    tensor are no linear layers, and stay as they are.
    """
    # remove_duplicate=False: a tied output layer is listed at the end, too, and not only where the
    # embedding stands
    last = list(model.named_parameters(remove_duplicate=False))[-1][0]
    skipped = {name.removesuffix(".weight") for name in (*tied_weight_names(model), last)}
    layers = []
    for name, layer in linear_layers(model).items():
        if type(layer) in (torch.nn.Linear, Conv1D) and name not in skipped:
            layers.append((name, layer))
    return layers


def nf4_round_trip_model(model: PreTrainedModel) -> PreTrainedModel:
    """Send the linear layers of a plain model through NF4 and back, in place. Returns it."""
    for _, layer in quantized_layers(model):
        weight = transpose_conv1d(layer, layer.weight.data)
        weight.copy_(nf4_round_trip(weight, weight.dtype))
    return model


def is_plain_lora(config: PeftConfig, adapter: Iterable[str]) -> bool:
    """Whether an adapter is nothing but products B · A, added to linear layers of the base itself.

    `adapter` are the names of its tensors.
    """
    only_products = all(name.endswith(MATRICES) for name in adapter)
    changes_base = str(config.init_lora_weights).startswith(CHANGES_BASE)
    return only_products and not config.target_parameters and not changes_base


def merge_in_memory(
    model: PreTrainedModel, folder: Path, base_weights: str, training_dtype: torch.dtype
) -> PreTrainedModel:
    """Merge the adapter in `folder` into a plain model, in place, each weight rounded once.

    `base_weights` is "original" or "dequantized". What is more than plain LoRA is merged by PEFT.
    Returns the model. Raises StageError if PEFT cannot merge it.
    """
    config = PeftConfig.from_pretrained(folder)
    adapter = load_file(folder / "adapter_model.safetensors")
    is_plain = is_plain_lora(config, adapter)
    # these go through NF4 as in training, so that B · A is added to what it was trained with
    quantized = set()
    if base_weights == "dequantized":
        quantized = {name for name, _ in quantized_layers(model)}
    for name, layer in model.named_modules():
        is_adapted = is_plain and has_lora(adapter, name)
        if name not in quantized and not is_adapted:
            continue
        weight = transpose_conv1d(layer, layer.weight.data)  # [out, in]
        if name in quantized:
            new = nf4_round_trip(weight, training_dtype)
        else:
            # a copy: add_lora works in place, and the model's weight is rounded only once, at the
            # end
            new = weight.cpu().to(torch.float32, copy=True)
        if is_adapted:
            add_lora(new, adapter, config, name)
        weight.copy_(new)
    if is_plain:
        return model
    try:
        return attach_adapter(model, folder).merge_and_unload()
    except (ValueError, RuntimeError) as error:
        raise StageError(
            f"PEFT cannot merge the adapter in {folder}: {first_line(error)}"
        ) from error
