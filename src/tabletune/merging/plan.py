"""Merging: one plain model from a base model and a LoRA adapter, one tensor at a time.

A `Plan` says what becomes of each tensor, `merged_model` writes them. The tensors are those of the base model's files:
each is copied as it is stored, under its own name and in its own dtype, and those that the adapter changes are changed.
So tied weights stay tied, and buffers, layers for images and experts stored one by one stay what they are, whatever
transformers makes of their names when it reads them.
"""

import re

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import load_state_dict
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from tabletune.errors import StageError
from tabletune.merging.lora import add_lora, nf4_round_trip, transpose_conv1d
from tabletune.model.adapters import attach_adapter
from tabletune.model.compat import QuantState, dequantize_4bit
from tabletune.model.inspection import in_out_features, linear_layers
from tabletune.model.loading import download_model, load_model, skeleton
from tabletune.model.weights import OnDisk, weight_files
from tabletune.run.artifacts import same_model
from tabletune.run.files import read_json

CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # ways to begin that change the base's weights, too


# --- a model in memory


def quantized_layers(model):
    """Names and modules of the layers that read text and that bitsandbytes quantizes.

    These are the linear layers without the output layer. Experts that transformers keeps in one tensor are none, and
    stay as they are.
    """
    tied = (
        model.all_tied_weights_keys
    )  # as transformers' get_keys_to_not_convert, which sees them before they are tied
    last = list(model.named_parameters(remove_duplicate=False))[-1][0]
    skipped = [name.removesuffix(".weight") for name in (*tied, *tied.values(), last)]
    layers = linear_layers(model).items()
    return [
        (n, m)
        for n, m in layers
        if type(m) in (torch.nn.Linear, Conv1D) and should_convert_module(n, skipped)
    ]


def nf4_round_trip_model(model):
    """Send the linear layers of a plain model through NF4 and back, in place. Returns it."""
    for _, layer in quantized_layers(model):
        weight = transpose_conv1d(layer, layer.weight.data)
        weight.copy_(nf4_round_trip(weight, weight.dtype))
    return model


def is_plain_lora(config, adapter):
    """Whether an adapter is nothing but products B · A, to be added to the base's own linear layers."""
    products = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in adapter)
    return (
        products
        and not config.target_parameters
        and not str(config.init_lora_weights).startswith(CHANGES_BASE)
    )


def merge_in_memory(model, folder, base_weights, training_dtype):
    """Merge the adapter in `folder` into a plain model, in place, each weight rounded once. Returns it.

    `base_weights` is "original" or "dequantized". More than plain LoRA is PEFT's; raises StageError if it cannot.
    """
    config, adapter = (
        PeftConfig.from_pretrained(folder),
        load_file(folder / "adapter_model.safetensors"),
    )
    quantized = dict(quantized_layers(model)) if base_weights == "dequantized" else {}
    plain = is_plain_lora(config, adapter)
    for name, layer in model.named_modules():
        adapted = plain and f"base_model.model.{name}.lora_A.weight" in adapter
        if name in quantized or adapted:
            weight = transpose_conv1d(layer, layer.weight.data)
            new = (
                nf4_round_trip(weight, training_dtype)
                if name in quantized
                else weight.cpu().to(torch.float32, copy=True)
            )
            weight.copy_(add_lora(new, adapter, config, name) if adapted else new)
    try:
        return model if plain else attach_adapter(model, folder).merge_and_unload()
    except (ValueError, RuntimeError) as error:
        raise StageError(f"PEFT cannot merge the adapter in {folder}: {error}") from None


# --- a model on disk


def load_adapter(folder, base_model):
    """The config, the provenance and the weights of the adapter in `folder`, trained on `base_model`.

    Raises StageError if it is missing, damaged, no numbers, or trained on another base.
    """
    provenance = read_json(folder / "provenance.json", "02_finetune_qlora")
    try:
        config, weights = (
            PeftConfig.from_pretrained(folder),
            load_file(folder / "adapter_model.safetensors"),
        )
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"The adapter in {folder} is damaged ({error}). Run 02_finetune_qlora again."
        ) from None
    trained_on = config.base_model_name_or_path
    if not same_model(trained_on, base_model):
        raise StageError(
            f"The adapter in {folder} was trained on {trained_on}, but base_model is {base_model}."
        )
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise StageError(
            f"The adapter in {folder} holds infinity or NaN: its training diverged. Train it again."
        )
    return config, provenance, weights


def base_module_name(name):
    """The module that a tensor of an adapter belongs to: `base_model.model.` and `.lora_A.weight` are taken off."""
    head, *tail = re.split(
        r"\.lora_|\.token_adapter\.|\.base_layer\.", name.removeprefix("base_model.model.")
    )
    return head if tail else head.rpartition(".")[0]


def model_names(stored, model):
    """What becomes of the `stored` names when transformers reads `model`: {name: [name in the model, ...]}.

    Several names, or one that several stored tensors have, are of weights that are split or fused on the way. Names
    that the model does not know are left out. As `convert_and_load_state_dict_in_model` in transformers 5.13.
    """
    mapping, own, names = get_model_conversion_mapping(model), model.state_dict(), {}
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    targets = {
        source: entry.target_patterns for entry in converters for source in entry.source_patterns
    }
    for name in sorted(stored, key=loading.dot_natural_key):
        for rules in (
            (renamings, converters),
            ([], []),
        ):  # a name that needs no change may fit a rule by chance
            new, source = loading.rename_source_key(name, *rules, model.base_model_prefix, own)
            if new in own and name not in names:
                first, *others = targets.get(source, [""])
                names[name] = [new, *(new.replace(first, other) for other in others)]
    return names


class Plan:
    """What becomes of each tensor of the base model. Raises StageError if the adapter cannot be merged into it.

    `tensors` has one on `meta` for each, of the shape and dtype that it will have; `modules` says to which layer those
    belong that change. What is not `plain` LoRA on single layers, PEFT merges with the whole model in memory.
    """

    def __init__(self, run, base_model, revision=None, base_weights="original"):
        self.folder, self.base_model, self.base_weights = run / "adapter", base_model, base_weights
        self.config, self.provenance, self.adapter = load_adapter(self.folder, base_model)
        self.training_dtype = getattr(torch, self.provenance["dtype"])
        self.base = download_model(base_model, revision)
        self.files = weight_files(self.base)
        in_4_bits = [
            name for name in self.files if f"{name}.quant_state.bitsandbytes__nf4" in self.files
        ]
        self.parts = {
            name: [part for part in self.files if part.startswith(f"{name}.")] for name in in_4_bits
        }
        if self.parts and base_weights == "original":
            self.base_weights = "dequantized"
            print(
                "The base model is stored in 4 bits, without its original weights: base_weights is 'dequantized'."
            )
        if self.base_weights not in ("original", "dequantized"):
            raise StageError(f'base_weights={base_weights!r}: use "original" or "dequantized".')
        if (
            self.base_weights == "dequantized"
            and self.provenance.get("quantization", "nf4") != "nf4"
        ):
            raise StageError(
                'base_weights="dequantized": the adapter was not trained on NF4. Use "original".'
            )
        self.model = skeleton(AutoConfig.from_pretrained(self.base))
        statistics = {part for parts in self.parts.values() for part in parts}
        self.names = model_names(self.files.keys() - statistics, self.model)
        self.adapted = {base_module_name(name) for name in self.adapter}
        self.quantized = (
            set(dict(quantized_layers(self.model))) if self.base_weights == "dequantized" else set()
        )
        single = {
            name: new[0].removesuffix(".weight")
            for name, new in self.names.items()
            if len(new) == 1
        }
        self.modules = {
            name: module
            for name, module in single.items()
            if module in self.adapted | self.quantized
        }
        self.check_fit()
        self.tensors, self.merged = {}, {}
        for file in dict.fromkeys(self.files.values()):
            self.tensors |= load_state_dict(file, map_location="meta")
        self.tensors = {name: self.described(name) for name in self.files if name not in statistics}
        self.size = sum(tensor.nbytes for tensor in self.tensors.values())
        self.dtype = self.tensors[next(iter(self.modules or self.tensors))].dtype

    def check_fit(self):
        """Raise StageError if the model lacks what the adapter changes, or if what changes is tied or cannot change."""
        layers, tied = dict(self.model.named_modules()), self.model.all_tied_weights_keys
        every_layer_alone = sorted(self.modules.values()) == sorted(self.adapted | self.quantized)
        self.plain = is_plain_lora(self.config, self.adapter) and every_layer_alone
        for module in sorted(self.adapted):
            a, b = (
                self.adapter.get(f"base_model.model.{module}.lora_{matrix}.weight")
                for matrix in "AB"
            )
            if module not in layers or (
                self.plain and in_out_features(layers[module]) != (a.shape[1], len(b))
            ):
                raise StageError(
                    f"The adapter changes {module}, which {self.base_model} does not have in that shape."
                )
            if f"{module}.weight" in {*tied, *tied.values()}:
                raise StageError(
                    f"The adapter changes {module}, which is tied to another layer: it cannot be merged."
                )
        if self.parts and not self.plain:
            raise StageError(
                f"{self.base_model} is stored in 4 bits, and only plain LoRA can be merged into that."
            )

    def described(self, name):
        """What a tensor will be, on `meta`.

        It keeps its dtype, but a base stored in 4 bits has that of whoever stored it: it gets the training's, as bf16
        would round eight times as coarsely as the fp16 of a T4.
        """
        tensor, dtype = self.tensors[name], self.training_dtype
        dtype = dtype if dtype != torch.float32 else self.model.config.dtype or torch.float16
        if name in self.parts:
            return self.model.get_parameter(self.names[name][0]).to(dtype)
        return tensor.to(dtype) if self.parts and tensor.is_floating_point() else tensor

    def stored(self, name):
        """A tensor as it is stored, on the CPU; dequantized to fp32 if that is in 4 bits."""
        parts = [name, *self.parts.get(name, [])]
        tensor, *rest = (OnDisk(self.files[part], part, "cpu")[...] for part in parts)
        state = {
            part.removeprefix(f"{name}."): value
            for part, value in zip(parts[1:], rest, strict=True)
        }
        return (
            dequantize_4bit(tensor, QuantState.from_dict(state, torch.device("cpu"))).float()
            if state
            else tensor
        )

    def read(self, name):
        """The weight that B · A is added to, fp32 and [out, in]; with "dequantized", after its way through NF4."""
        weight = transpose_conv1d(self.model.get_submodule(self.modules[name]), self.stored(name))
        if self.modules[name] in self.quantized and name not in self.parts:
            return nf4_round_trip(weight, self.training_dtype)
        return weight.to(torch.float32, copy=True)

    def merge(self, name):
        """One tensor of the merged model, contiguous, in its dtype."""
        module = self.modules.get(name) if self.plain else None
        tensor = (
            self.merged[name]
            if name in self.merged
            else self.read(name)
            if module
            else self.stored(name)
        )
        tensor = (
            add_lora(tensor, self.adapter, self.config, module)
            if module in self.adapted
            else tensor
        )
        tensor = transpose_conv1d(self.model.get_submodule(module), tensor) if module else tensor
        return tensor.to(self.tensors[name].dtype).contiguous()

    def merge_by_peft(self):
        """Let PEFT merge what is more than plain LoRA, which takes the memory of the whole model."""
        model = load_model(self.base, None, self.dtype, device="cpu")
        model = merge_in_memory(model, self.folder, self.base_weights, self.training_dtype)
        new, changed = (
            loading.revert_weight_conversion(model, model.state_dict()),
            self.adapted | self.quantized,
        )
        owners = {
            name: {own.rpartition(".")[0] for own in names} for name, names in self.names.items()
        }
        self.merged = {name: new[name] for name, modules in owners.items() if modules & changed}

    def gib(self, shards):
        """RAM in GiB that merging takes beside what is there: the largest of `shards`, and of the matrices that change.

        That is in fp32, and on its way through NF4 three times (measured at 7B). PEFT takes the whole model instead.
        """
        largest = max(sum(self.tensors[name].nbytes for name in shard) for shard in shards)
        matrix = max((4 * self.tensors[name].numel() for name in self.modules), default=0)
        return (
            largest + (matrix * (3 if self.quantized else 1) if self.plain else self.size)
        ) / 2**30
