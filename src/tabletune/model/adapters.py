"""Putting a trained LoRA adapter on a base model."""

from pathlib import Path

from safetensors.torch import load_file

from tabletune.errors import StageError


def attach_adapter(model, folder):
    """A PeftModel of `model` with the adapter in `folder`, for inference.

    Not by `PeftModel.from_pretrained`: peft 0.19.1 with transformers 5.13.1 fails in it for every mixture of experts
    (`WeightConverter.__init__() got an unexpected keyword argument 'distributed_operation'`; peft 0.20 has it mended).
    """
    from peft import PeftConfig, get_peft_model  # here, as notebook 1 starts sooner without it

    adapted = get_peft_model(model, PeftConfig.from_pretrained(folder))
    load_adapter_weights(adapted, folder)
    adapted.peft_config["default"].inference_mode = True
    return adapted.requires_grad_(False).eval()


def load_adapter_weights(adapted, folder, *_, **__):
    """Put the weights of the adapter in `folder` into a PeftModel that has one of the same config.

    Raises StageError if they do not fit.
    """
    own, weights = adapted.state_dict(), {}
    for name, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
        stem, _, last = name.rpartition(".")
        called = [f"{stem}.default.{last}", f"{name}.default.weight", f"{name}.default"]
        called.append(f"{stem}.modules_to_save.default.{last}")
        weights[next((place for place in called if place in own), name)] = tensor
    result = adapted.load_state_dict(weights, strict=False)
    lacking = [name for name in result.missing_keys if "lora_" in name]
    if lacking or result.unexpected_keys:
        odd = (lacking or result.unexpected_keys)[0]
        raise StageError(
            f"The adapter in {folder} does not fit the base model ({odd}). Run 02_finetune_qlora again."
        )
