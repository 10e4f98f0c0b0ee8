"""What a base model consists of: asked of transformers and of the model's own modules."""

from collections import defaultdict

from huggingface_hub.errors import EntryNotFoundError
from torch.nn import Linear, Module
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    Conv1D,
    PreTrainedConfig,
    PreTrainedModel,
)

from tabletune.errors import StageError, hub_error
from tabletune.model.loading import model_class


def base_config(base_model: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a base model.

    Raises StageError if it cannot be had, or if such a model cannot be trained here.
    """
    try:
        config = AutoConfig.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise hub_error(f"base_model={base_model}", error) from error
    stored = getattr(config, "quantization_config", None)
    if stored:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        # early files of bitsandbytes do not say by which method
        method = stored.get("quant_method", "bitsandbytes")
        is_nf4 = method == "bitsandbytes" and BitsAndBytesConfig.from_dict(stored).load_in_4bit
        if not is_nf4:
            raise StageError(
                f"base_model={base_model} is stored in {method}, through which no adapter is "
                "trained here. Take the same model in 16 bits, or stored in 4 bits by "
                "bitsandbytes."
            )
    if config.is_encoder_decoder:
        raise StageError(
            f"base_model={base_model} is an encoder and a decoder. Take a causal language model."
        )
    model_class(config)  # raises for a model that generates no text
    return config


def intermediate_size(config: PreTrainedConfig) -> int:
    """The width of a layer between its two halves, of all experts that work on a token.

    What a config lacks is assumed to be as usual.
    """
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if isinstance(width, (list, tuple)):
        width = max(width)
    experts = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    if not experts:
        return width
    return max(width, experts * (getattr(config, "moe_intermediate_size", None) or width))


def text_part(model: PreTrainedModel) -> Module:
    """The part of a model that reads text: all of it, or the language model in a multimodal one."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def linear_layers(model: PreTrainedModel) -> dict[str, Module]:
    """The linear layers that read text, by name, GPT-2's kind included.

    The output layer and the routers of a mixture of experts are left out; some routers are linear
    layers that give two results.
    """
    # by identity: names in the text part begin otherwise than in the whole model
    reads_text = {id(module) for module in text_part(model).modules()}
    output = model.get_output_embeddings()
    layers = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, (Linear, Conv1D)) and "Router" not in type(module).__name__
        if is_linear and id(module) in reads_text and module is not output:
            layers[name] = module
    return layers


def in_out_features(layer: Module) -> tuple[int, int]:
    """The widths of a linear layer's input and output."""
    if isinstance(layer, Conv1D):
        return tuple(layer.weight.shape)  # [in, out], the other way round than Linear's
    return layer.in_features, layer.out_features


def tied_weight_names(model: PreTrainedModel) -> set[str]:
    """The names of the parameters of a model that are one and the same as another one."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    tied: set[str] = set()
    for same in names.values():
        if len(same) > 1:
            tied.update(same)
    return tied


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens the model was trained to read at once; None if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
