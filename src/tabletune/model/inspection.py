"""What a base model consists of: asked of transformers and of the model's own modules."""

from huggingface_hub.errors import EntryNotFoundError
from torch.nn import Linear
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from tabletune.errors import StageError, hub_error
from tabletune.model.loading import model_class


def base_config(base_model, revision=None):
    """The config of a base model. Raises StageError if it cannot be had, or if such a model cannot be trained here."""
    try:
        config = AutoConfig.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise hub_error(f"base_model={base_model}", error) from None
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "bitsandbytes")
    if stored and (
        method != "bitsandbytes" or not (stored.get("load_in_4bit") or stored.get("_load_in_4bit"))
    ):
        raise StageError(
            f"base_model={base_model} is stored in {method}, through which no adapter is trained here. Take the same "
            "model in 16 bits, or one that bitsandbytes has stored in 4."
        )
    if config.is_encoder_decoder:
        raise StageError(
            f"base_model={base_model} is an encoder and a decoder. Take a causal language model."
        )
    model_class(config)
    return config


def text_part(model):
    """The part of a model that reads text: all of it, or the language model within a multimodal one."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def linear_layers(model):
    """{name: module} of the linear layers that read text, GPT-2's kind included, without output layer and routers."""
    inside = {id(module) for module in text_part(model).modules()}
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (Linear, Conv1D))
        and id(module) in inside
        and module is not output
        and "Router"
        not in type(module).__name__  # of a mixture; some are linear layers that give two results
    }


def in_out_features(layer):
    """How many numbers a linear layer takes and gives: (in, out)."""
    return (
        layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    )


def context_length(config):
    """How many tokens the model was made to read at once, or None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
