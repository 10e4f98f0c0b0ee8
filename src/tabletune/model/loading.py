"""Loading a base model: finding its files, its class, its attention, its weights."""

import copy
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from tabletune.errors import StageError, hub_error
from tabletune.model.compat import statistics_of
from tabletune.model.weights import OnDisk, read_ahead, weight_files

# transformers' classes that generate text, by the class of a config
AUTO_CLASSES = (
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
)
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2")


def download_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a folder here, or its files from the Hub.

    From the Hub come safetensors, JSON, tokenizer and template. What a repository holds beside them
    (`original/`, `consolidated.safetensors`: the same weights again) stays there. Raises StageError
    if the model is not to be had, or if the disk has no room for it.
    """
    if Path(model).is_dir():
        return Path(model)
    files_wanted = {
        "revision": revision,
        "allow_patterns": ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"],
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    try:
        with suppress(DryRunError):  # no network: all may be here already
            check_disk(model, snapshot_download(model, dry_run=True, **files_wanted))
        return Path(snapshot_download(model, **files_wanted))
    except (OSError, ValueError) as error:
        raise hub_error(str(model), error) from error


def check_disk(model: str | Path, files: list) -> None:
    """Print what a download takes. Raises StageError if the disk of the Hub's cache lacks room."""
    size = sum(file.file_size for file in files if file.will_download)
    cache = Path(HF_HUB_CACHE)
    # the cache may not exist yet; its disk does
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size:
        print(
            f"to download: {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of {cache} are free"
        )
    if size > free:
        raise StageError(
            f"There is no room for {model} in {cache}. Free some space, or set HF_HOME elsewhere."
        )


# --- reading a model


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a model was made with, where it can generate; else transformers' choice.

    Raises StageError if transformers knows no causal language model of this kind, or the class is
    one of another use: the files of a classifier, for example, have no output layer.
    """
    attributes = [getattr(transformers, name, None) for name in config.architectures or []]
    classes = [attribute for attribute in attributes if isinstance(attribute, type)]
    for architecture in classes:
        if issubclass(architecture, GenerationMixin):
            return architecture
    if classes:
        raise StageError(
            f"A {classes[0].__name__} writes no text, so it cannot be fine-tuned here. Take a chat "
            "model."
        )
    for mapping, _ in AUTO_CLASSES:
        if type(config) in mapping:
            return mapping[type(config)]
    raise StageError(
        f"A {config.model_type} is no causal language model for transformers "
        f"{transformers.__version__}, so it cannot be fine-tuned here. Take a chat model."
    )


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the device `meta`: all modules and shapes, and no memory."""
    with torch.device("meta"):
        # a copy: making a model writes its attention into the config
        model = model_class(config)(copy.deepcopy(config))
    model.tie_weights()
    return model


def attention_implementation(config: PreTrainedConfig, wanted: str = "auto") -> str:
    """The attention implementation to load a model with.

    "auto" is transformers' choice: SDPA where the model has it, else the eager one that every model
    has. Raises StageError if `wanted` is none that the model has, or cannot work here.
    """
    if wanted == "auto":
        return "sdpa" if has_attention(config, "sdpa") else "eager"
    if wanted not in ATTENTIONS or not has_attention(config, wanted):
        available = ", ".join(name for name in ATTENTIONS if has_attention(config, name))
        raise StageError(
            f'attn_implementation="{wanted}": {model_class(config).__name__} has no such '
            f"attention. It has: {available}."
        )
    needs_gpu = wanted == "flex_attention" and not torch.cuda.is_available()
    needs_package = (
        wanted == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available()
    )
    if needs_gpu or needs_package:
        raise StageError(
            f'attn_implementation="{wanted}" needs a GPU, or a package, that is not here. Use '
            '"auto".'
        )
    return wanted


def has_attention(config: PreTrainedConfig, name: str) -> bool:
    """Whether a model has an attention implementation: transformers refuses to make it if not."""
    for mapping, auto_class in AUTO_CLASSES:
        if type(config) not in mapping:
            continue
        try:
            with torch.device("meta"):
                auto_class.from_config(copy.deepcopy(config), attn_implementation=name)
        except ImportError:  # the model has it, and this machine lacks the package
            return True
        except ValueError:
            return False
        return True
    return name == "eager"


def load_model(
    model: str | Path,
    revision: str | None,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    quantization_config: BitsAndBytesConfig | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """A language model, a folder or a name on the Hub, with its generation config.

    It goes to the GPU if there is one. It is read one tensor at a time, or a few: `from_pretrained`
    alone keeps all files mapped until the last tensor is read, so that a 7B model in fp16 takes
    13.7 GiB of resident memory on its way to the GPU; this way it takes 1.5 GiB. A model stored in
    4 bits is small enough, and needs the statistics beside its tensors. Raises StageError if the
    files lack a tensor, or have one of another shape: transformers would make random ones up.
    """
    if device is None and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.current_device()}"
    folder = download_model(model, revision)
    config = AutoConfig.from_pretrained(folder)
    if attn_implementation != "auto":
        attn_implementation = attention_implementation(config, attn_implementation)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device or "cpu"},
        "attn_implementation": None if attn_implementation == "auto" else attn_implementation,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in the loading info
    }
    if hasattr(config, "quantization_config"):
        loaded = load_quantized(folder, config, options)
    else:
        loaded = load_tensor_by_tensor(folder, config, options, quantization_config)
    # what an adapter will say it was trained on: not the folder of this machine's cache
    loaded.name_or_path = str(model)
    loaded.config.name_or_path = str(model)
    return loaded


def load_tensor_by_tensor(
    folder: Path,
    config: PreTrainedConfig,
    options: dict[str, Any],
    quantization_config: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    """A model whose files have its weights in 16 or 32 bits, read when they are needed."""
    device = options["device_map"][""]
    weights: dict[str, Any] = {}
    for name, file in weight_files(folder).items():
        weights[name] = OnDisk(file, name, device)
    if quantization_config:  # without quantization, transformers reads ahead itself
        weights = read_ahead(weights)
    # `None` with a config and a state dict is documented; that its values may be read when they are
    # needed is not: see model/compat.py
    loaded, report = model_class(config).from_pretrained(
        None, config=config, state_dict=weights, quantization_config=quantization_config, **options
    )
    check_loaded_weights(folder, loaded, report)
    if (folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def load_quantized(
    folder: Path, config: PreTrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """A model whose files hold it in 4 bits, with all other weights in the dtype of the options."""
    loaded, report = model_class(config).from_pretrained(folder, use_safetensors=True, **options)
    check_loaded_weights(folder, loaded, report)
    for parameter in loaded.parameters():
        # transformers 5.24 leaves the others in the dtype of whoever stored them
        if statistics_of(parameter) is None and parameter.is_floating_point():
            parameter.data = parameter.data.to(options["dtype"])
    return loaded


def check_loaded_weights(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise StageError if files lacked weights of the model, or had them in another shape.

    `report` is transformers' loading info.
    """
    for name in sorted(report["missing_keys"]):
        raise StageError(
            f"The model in {folder} lacks {name}. Get its files again, or take another model."
        )
    # (name, shape in the file, shape in the model)
    wrong = {name for name, *_ in report["mismatched_keys"]}
    for name, layer in model.named_modules():  # transformers reports none of quantized layers
        if isinstance(layer, torch.nn.Linear):
            stored = statistics_of(layer.weight) or layer.weight
            if stored.shape != (layer.out_features, layer.in_features):
                wrong.add(f"{name}.weight")
    for name in sorted(wrong):
        raise StageError(
            f"{name} in {folder} has another shape than config.json says. Get the files again."
        )
