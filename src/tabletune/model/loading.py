"""Loading a base model: finding its files, its class, its attention, its weights."""

import shutil
from contextlib import suppress
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
)
from transformers.utils import is_flash_attn_2_available

from tabletune.errors import StageError, hub_error
from tabletune.model.weights import OnDisk, read_ahead, weight_files

datasets.disable_progress_bars()
datasets.disable_caching()
transformers.utils.logging.set_verbosity_error()


def download_model(model, revision=None):
    """The folder of a model: a folder here, or its files from the Hub: safetensors, JSON, tokenizer and template.

    What a repository holds beside them (`original/`, `consolidated.safetensors`: the same weights again) stays there.
    Raises StageError if it is not to be had, or if the disk has no room for it.
    """
    if Path(model).is_dir():
        return Path(model)
    wanted = {
        "revision": revision,
        "allow_patterns": ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"],
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    try:
        with suppress(DryRunError):  # no network: all may be here already
            files = snapshot_download(model, dry_run=True, **wanted)
            size = sum(file.file_size for file in files if file.will_download)
            cache = Path(HF_HUB_CACHE)
            free = shutil.disk_usage(
                next(path for path in (cache, *cache.parents) if path.exists())
            ).free
            if size:
                print(
                    f"to download: {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of {cache} are free"
                )
            if size > free:
                raise StageError(
                    f"There is no room for {model} in {cache}. Free some space, or set HF_HOME elsewhere."
                )
        return Path(snapshot_download(model, **wanted))
    except (OSError, ValueError) as error:
        raise hub_error(model, error) from None


# --- reading a model


def model_class(config):
    """The class that a model was made with, where it can generate; else transformers' choice for its kind.

    Raises StageError if transformers knows no causal language model of this kind, or the class is one of another use:
    the files of a classifier, say, have no output layer.
    """
    named = (getattr(transformers, name, None) for name in config.architectures or [])
    named = [kind for kind in named if isinstance(kind, type)]
    for made_with in named:
        if issubclass(made_with, GenerationMixin):
            return made_with
    if named:
        raise StageError(
            f"A {named[0].__name__} writes no text, so it cannot be fine-tuned here. Take a chat model."
        )
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise StageError(
        f"A {config.model_type} is no causal language model for transformers {transformers.__version__}, so it "
        "cannot be fine-tuned here. Take a chat model."
    )


def skeleton(config):
    """The model of a config on the device `meta`: all modules and shapes, and no memory."""
    with torch.device("meta"):
        return model_class(config)._from_config(config)


def attention_implementation(config, wanted="auto"):
    """The attention implementation to load a model with: SDPA where the model has it, else the eager one it always has.

    Raises StageError if `wanted` is none that the model has.
    """
    kind = model_class(config)
    text = getattr(transformers, kind.__name__, kind)
    if wanted == "auto":
        return "sdpa" if text._supports_sdpa else "eager"
    has = {"eager": True, "sdpa": text._supports_sdpa, "flex_attention": text._supports_flex_attn}
    has["flash_attention_2"] = text._supports_flash_attn
    if not has.get(wanted):
        there = ", ".join(name for name, supported in has.items() if supported)
        raise StageError(
            f'attn_implementation="{wanted}": {kind.__name__} has no such attention. It has: {there}.'
        )
    here = {
        "flash_attention_2": is_flash_attn_2_available(),
        "flex_attention": torch.cuda.is_available(),
    }
    if not here.get(wanted, True):
        raise StageError(
            f'attn_implementation="{wanted}" needs a GPU, or a package, that is not here. Use "auto".'
        )
    return wanted


def load_model(
    model, revision, dtype, attn_implementation="auto", quantization_config=None, device=None
):
    """A language model, a folder or a name on the Hub, with its generation config; on the GPU if there is one.

    It is read one tensor at a time, or a few. `from_pretrained` alone keeps all files mapped until the last tensor is
    read, so that a 7B model in fp16 takes 13.7 GiB of resident memory on its way to the GPU; this way it takes 1.5 GiB.
    A model stored in 4 bits is small enough, and needs the statistics beside its tensors. Raises StageError if the
    files lack a tensor, or have one of another shape: transformers would make random ones up.
    """
    device = device or (
        f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    )
    folder = download_model(model, revision)
    config = AutoConfig.from_pretrained(folder)
    kind = model_class(config)
    options = {
        "dtype": dtype,
        "device_map": {"": device},
        "attn_implementation": attention_implementation(config, attn_implementation),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in what it outputs
    }
    if hasattr(config, "quantization_config"):
        return check_loaded_weights(
            folder, *kind.from_pretrained(folder, use_safetensors=True, **options)
        )
    weights = {name: OnDisk(file, name, device) for name, file in weight_files(folder).items()}
    weights = (
        read_ahead(weights) if quantization_config else weights
    )  # without one, transformers does so itself
    options |= {"config": config, "state_dict": weights, "quantization_config": quantization_config}
    loaded = check_loaded_weights(folder, *kind.from_pretrained(None, **options))
    loaded.name_or_path = loaded.config.name_or_path = str(
        model
    )  # what an adapter will say it was trained on
    if (folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def check_loaded_weights(folder, model, report):
    """The model, if its files have all of its weights, in its shapes, by transformers' `report`; else StageError."""
    for name in sorted(report["missing_keys"]):
        raise StageError(
            f"The model in {folder} lacks {name}. Get its files again, or take another model."
        )
    wrong = {name for name, *_ in report["mismatched_keys"]}
    for name, layer in model.named_modules():  # of quantized layers it reports none
        if isinstance(layer, torch.nn.Linear):
            stored = getattr(layer.weight, "quant_state", None) or layer.weight
            wrong |= (
                {f"{name}.weight"}
                if stored.shape != (layer.out_features, layer.in_features)
                else set()
            )
    for name in sorted(wrong):
        raise StageError(
            f"{name} in {folder} has another shape than config.json says. Get the files again."
        )
    return model
