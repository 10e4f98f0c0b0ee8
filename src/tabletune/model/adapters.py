"""Putting a trained LoRA adapter on a base model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tabletune.errors import StageError

if TYPE_CHECKING:
    from peft import PeftModel


def attach_adapter(model: PreTrainedModel, folder: str | Path) -> "PeftModel":
    """A PeftModel of `model` with the adapter in `folder`, for inference.

    `PeftModel.from_pretrained` only warns of an adapter that does not fit, and with peft 0.19.1 and
    transformers 5.13.1 it fails for every mixture of experts (`WeightConverter.__init__() got an
    unexpected keyword argument 'distributed_operation'`; mended in peft 0.20). Raises StageError if
    the adapter does not fit.
    """
    from peft import PeftConfig, get_peft_model  # here, as notebook 1 starts sooner without it

    # made where it is used: PEFT draws random weights first, and on a CPU that takes seconds
    with model.device:
        adapted = get_peft_model(model, PeftConfig.from_pretrained(folder))
    load_adapter_weights(adapted, folder)
    adapted.peft_config["default"].inference_mode = True
    return adapted.requires_grad_(False).eval()


@torch.no_grad()
def load_adapter_weights(adapted: "PeftModel", folder: str | Path, *_: Any, **__: Any) -> None:
    """Put the weights of the adapter in `folder` into a PeftModel that has one of the same config.

    Further arguments are ignored: Trainer calls it as a model's `load_adapter`. Raises StageError
    if the adapter does not fit.
    """
    from peft import get_peft_model_state_dict

    saved = load_file(Path(folder) / "adapter_model.safetensors")
    # under the names of the file, and still the model's own memory
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # what only one of both has
    wrong = saved.keys() ^ weights.keys()
    wrong |= {
        name for name in saved.keys() & weights.keys() if saved[name].shape != weights[name].shape
    }
    if wrong:
        raise StageError(
            f"The adapter in {folder} does not fit the base model ({min(wrong)}). Run "
            "02_finetune_qlora again."
        )
    for name, tensor in saved.items():
        weights[name].copy_(tensor)
