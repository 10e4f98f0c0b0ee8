"""Models: finding, reading, quantizing them, and what of a run belongs together."""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    GenerationMixin,
)
from transformers.utils import is_flash_attn_2_available

from .run import StageError, hub_error, read_json
from .weights import OnDisk, read_ahead, weight_files

datasets.disable_progress_bars()
datasets.disable_caching()
transformers.utils.logging.set_verbosity_error()


def compute_dtype(precision):
    """The dtype to compute in. "auto": bf16 on a GPU that has it natively, fp16 on an older one, fp32 on a CPU.

    PyTorch emulates bf16 on a T4, and `torch.cuda.is_bf16_supported()` says yes there; the compute capability tells.
    Raises StageError for any other word than auto, bf16, fp16 or fp32.
    """
    if precision != "auto":
        try:
            return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
        except KeyError:
            raise StageError(f"precision={precision!r}: use auto, bf16, fp16 or fp32.") from None
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def fetch(model, revision=None):
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
            free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
            if size:
                print(f"to download: {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of {cache} are free")
            if size > free:
                raise StageError(f"There is no room for {model} in {cache}. Free some space, or set HF_HOME elsewhere.")
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
        raise StageError(f"A {named[0].__name__} writes no text, so it cannot be fine-tuned here. Take a chat model.")
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


def attention_of(config, wanted="auto"):
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
        raise StageError(f'attn_implementation="{wanted}": {kind.__name__} has no such attention. It has: {there}.')
    here = {"flash_attention_2": is_flash_attn_2_available(), "flex_attention": torch.cuda.is_available()}
    if not here.get(wanted, True):
        raise StageError(f'attn_implementation="{wanted}" needs a GPU, or a package, that is not here. Use "auto".')
    return wanted


def load_model(model, revision, dtype, attn_implementation="auto", quantization_config=None, device=None):
    """A language model, a folder or a name on the Hub, with its generation config; on the GPU if there is one.

    It is read one tensor at a time, or a few. `from_pretrained` alone keeps all files mapped until the last tensor is
    read, so that a 7B model in fp16 takes 13.7 GiB of resident memory on its way to the GPU; this way it takes 1.5 GiB.
    A model stored in 4 bits is small enough, and needs the statistics beside its tensors. Raises StageError if the
    files lack a tensor, or have one of another shape: transformers would make random ones up.
    """
    device = device or (f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    folder = fetch(model, revision)
    config = AutoConfig.from_pretrained(folder)
    kind = model_class(config)
    options = {
        "dtype": dtype,
        "device_map": {"": device},
        "attn_implementation": attention_of(config, attn_implementation),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in what it outputs
    }
    if hasattr(config, "quantization_config"):
        return complete(folder, *kind.from_pretrained(folder, use_safetensors=True, **options))
    weights = {name: OnDisk(file, name, device) for name, file in weight_files(folder).items()}
    weights = read_ahead(weights) if quantization_config else weights  # without one, transformers does so itself
    options |= {"config": config, "state_dict": weights, "quantization_config": quantization_config}
    loaded = complete(folder, *kind.from_pretrained(None, **options))
    loaded.name_or_path = loaded.config.name_or_path = str(model)  # what an adapter will say it was trained on
    if (folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def complete(folder, model, report):
    """The model, if its files have all of its weights, in its shapes, by transformers' `report`; else StageError."""
    for name in sorted(report["missing_keys"]):
        raise StageError(f"The model in {folder} lacks {name}. Get its files again, or take another model.")
    wrong = {name for name, *_ in report["mismatched_keys"]}
    for name, layer in model.named_modules():  # of quantized layers it reports none
        if isinstance(layer, torch.nn.Linear):
            stored = getattr(layer.weight, "quant_state", None) or layer.weight
            wrong |= {f"{name}.weight"} if stored.shape != (layer.out_features, layer.in_features) else set()
    for name in sorted(wrong):
        raise StageError(f"{name} in {folder} has another shape than config.json says. Get the files again.")
    return model


def nf4(dtype, sharded=False):
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


def load_base(base_model, revision, dtype, attn_implementation="auto", sharded=False, quantization="nf4"):
    """The base model as training has it: quantized, or in `dtype` with `quantization` "none"; on a GPU if there is one.

    `quantization` is "nf4", "8bit", "none", or a BitsAndBytesConfig. A model that is to be `sharded` waits in RAM.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights at its first forward pass in eval mode, into a
    layout that has no gradient: a model that was evaluated once would never learn again, without an error
    (`Linear4bit.forward` in bitsandbytes 0.50). The attribute that asks for the repacking is switched off here.
    Raises StageError for any other `quantization`.
    """
    configs = {"nf4": nf4(dtype, sharded), "8bit": BitsAndBytesConfig(load_in_8bit=True), "none": None}
    if isinstance(quantization, str) and quantization not in configs:
        raise StageError(f'quantization="{quantization}": use nf4, 8bit or none.')
    config = configs[quantization] if isinstance(quantization, str) else quantization
    model = load_model(base_model, revision, dtype, attn_implementation, config, "cpu" if sharded else None)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a Linear4bit; bitsandbytes takes seconds to import
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype  # a base stored in 4 bits brings the dtype of whoever stored it
    return model


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
        raise StageError(f"The adapter in {folder} does not fit the base model ({odd}). Run 02_finetune_qlora again.")


# --- what is there, and what belongs together


def room_gib():
    """Memory in GiB that models can take here: on the GPU, within this process's share of it, or RAM without one."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available / 2**30
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    share = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_allocated()
    return min(free + unused, share) / 2**30


def load_dataset_of_run(run, otherwise=""):
    """The DatasetDict and the report that notebook 1 left. Raises StageError if they are not there or not whole."""
    report = read_json(run / "dataset" / "report.json", "01_format_dataset", otherwise)
    try:
        return datasets.load_from_disk(run / "dataset"), report
    except (OSError, ValueError) as error:
        raise StageError(f"{run / 'dataset'} is damaged ({error}). Run 01_format_dataset again.") from None


def same_model(one, other):
    """Whether two names mean the same model: equal, or one local folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def check_run(run, merged, report, base_model):
    """The adapter's SHA-256, once it is known that all belongs together; `merged` is None if it is elsewhere.

    Raises StageError if the adapter or the merged model is missing or does not belong to the rest of the run.
    """
    for folder, stage in ((run / "adapter", "02_finetune_qlora"), (merged, "03_merge_adapter")):
        if folder and not folder.exists():
            raise StageError(f"{folder} is missing. Run {stage} first, with the same run_dir, in Colab one in Drive.")
    provenance = read_json(run / "adapter" / "provenance.json", "02_finetune_qlora")
    digest = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    if not same_model(provenance["base_model"], base_model):
        raise StageError(f"The adapter was trained on {provenance['base_model']}, but base_model is {base_model}.")
    if provenance["dataset_fingerprint"] != report["fingerprint"]:
        raise StageError("The adapter was trained on another data set. Run 02_finetune_qlora again.")
    if merged and read_json(merged / "merge_report.json", "03_merge_adapter")["adapter_sha256"] != digest:
        raise StageError("The merged model was made from another adapter. Run 03_merge_adapter again.")
    return digest
