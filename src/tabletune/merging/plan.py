"""Merging: one plain model from a base model and a LoRA adapter, one tensor at a time.

A `MergePlan` says what becomes of each tensor, and merging/write.py writes them. The tensors are
those of the base model's files: each is copied as it is stored, under its own name and in its own
dtype, and those that the adapter changes are changed. So tied weights stay tied, and buffers,
layers for images and experts stored one by one stay what they are, whatever names transformers
gives them when it reads them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

from tabletune.errors import StageError
from tabletune.merging.in_memory import is_plain_lora, merge_in_memory, quantized_layers
from tabletune.merging.lora import (
    add_lora,
    base_module_name,
    lora_matrices,
    nf4_round_trip,
    transpose_conv1d,
)
from tabletune.model.bnb import QuantState, dequantize_4bit
from tabletune.model.compat import model_names, stored_state_dict, tensors_in_4_bits
from tabletune.model.inspection import in_out_features, tied_weight_names
from tabletune.model.loading import download_model, load_model, skeleton
from tabletune.model.weights import OnDisk, tensors_on_meta, weight_files
from tabletune.run.artifacts import same_model
from tabletune.run.files import read_json


def load_adapter(
    folder: Path, base_model: str
) -> tuple[LoraConfig, dict[str, Any], dict[str, torch.Tensor]]:
    """The config, the provenance and the weights of the adapter in `folder`.

    Raises StageError if it is missing or damaged, holds infinity or NaN, or was trained on another
    base than `base_model`.
    """
    provenance = read_json(folder / "provenance.json", "02_finetune_qlora")
    try:
        config = PeftConfig.from_pretrained(folder)
        weights = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"The adapter in {folder} is damaged ({error}). Run 02_finetune_qlora again."
        ) from error
    trained_on = config.base_model_name_or_path
    if not same_model(trained_on, base_model):
        raise StageError(
            f"The adapter in {folder} was trained on {trained_on}, but base_model is {base_model}. "
            "Set base_model to the one of the training."
        )
    # NaN and infinity show in the extremes, which take one pass, and no memory
    extremes = [tensor.aminmax() for tensor in weights.values() if tensor.numel()]
    if not all(low.isfinite() and high.isfinite() for low, high in extremes):
        raise StageError(
            f"The adapter in {folder} holds infinity or NaN: its training diverged. Train again "
            "with a lower learning_rate."
        )
    return config, provenance, weights


class MergePlan:
    """What becomes of each tensor of the base model.

    A *tensor* has the name that it has in the base model's files, a *module* the name that
    transformers gives to a layer. For a model that is stored as transformers names it:

    - `files`: {tensor: its file}, such as {"model.layers.0.mlp.up_proj.weight": model.safetensors}
    - `statistics`: of a base stored in 4 bits, {weight: tensors to dequantize it with}
    - `names`: {tensor: its names in transformers}, several where transformers splits it
    - `adapted`: modules with an adapter, such as "model.layers.0.mlp.up_proj"
    - `quantized`: modules that go through NF4, with "dequantized" weights
    - `modules`: {tensor: module} of those that change
    - `tensors`: {tensor: one on `meta`, with the shape and dtype that it will have}
    - `merged`: {tensor: its merged numbers}, once PEFT has merged them

    What is not `plain` LoRA on single layers is merged by PEFT, with the whole model in memory.
    Raises StageError if the adapter cannot be merged into the base model.
    """

    def __init__(
        self,
        run: Path,
        base_model: str,
        revision: str | None = None,
        base_weights: str = "original",
    ) -> None:
        self.folder = run / "adapter"
        self.base_model = base_model
        self.config, self.provenance, self.adapter = load_adapter(self.folder, base_model)
        self.training_dtype: torch.dtype = getattr(torch, self.provenance["dtype"])
        self.base = download_model(base_model, revision)
        self.files = weight_files(self.base)
        self.statistics = self.find_statistics()
        self.base_weights = self.check_base_weights(base_weights)

        self.model = skeleton(AutoConfig.from_pretrained(self.base))
        self.names = model_names(self.weight_names(), self.model)
        self.adapted = {base_module_name(name) for name in self.adapter}
        self.quantized: set[str] = set()
        if self.base_weights == "dequantized":
            self.quantized = {name for name, _ in quantized_layers(self.model)}
        self.modules = self.changed_modules()
        self.plain = is_plain_lora(self.config, self.adapter) and self.has_own_tensors()
        self.check_adapter()

        self.merged: dict[str, torch.Tensor] = {}
        # shapes and dtypes only: nothing is read yet
        stored = tensors_on_meta(self.files)
        self.tensors = {name: self.output_spec(name, stored[name]) for name in self.weight_names()}
        self.size = sum(tensor.nbytes for tensor in self.tensors.values())  # in bytes
        first_changed = next(iter(self.modules or self.tensors))
        self.dtype = self.tensors[first_changed].dtype

    def find_statistics(self) -> dict[str, list[str]]:
        """Of a base stored in 4 bits: {name of a weight: names of its statistics}; else {}."""
        statistics = {}
        for name in tensors_in_4_bits(self.files):
            statistics[name] = [part for part in self.files if part.startswith(f"{name}.")]
        return statistics

    def weight_names(self) -> list[str]:
        """The tensors of the files in their order, without the statistics of 4-bit weights."""
        statistics: set[str] = set()
        for parts in self.statistics.values():
            statistics.update(parts)
        return [name for name in self.files if name not in statistics]

    def changed_modules(self) -> dict[str, str]:
        """{tensor: module} of the tensors that are one layer's own weight, and change."""
        changing = self.adapted | self.quantized
        modules = {}
        for name, model_names_of_it in self.names.items():
            module = model_names_of_it[0].removesuffix(".weight")
            # a tensor that transformers splits or fuses is no layer's own, and PEFT merges it
            if len(model_names_of_it) == 1 and module in changing:
                modules[name] = module
        return modules

    def has_own_tensors(self) -> bool:
        """Whether each layer that changes is stored in a tensor of its own."""
        return sorted(self.modules.values()) == sorted(self.adapted | self.quantized)

    def check_base_weights(self, base_weights: str) -> str:
        """The way to take the base's weights: a base stored in 4 bits has "dequantized" ones only.

        Raises StageError for a way that there is not, or that does not belong to the adapter.
        """
        if self.statistics and base_weights == "original":
            base_weights = "dequantized"
            print(
                "The base model is stored in 4 bits, without its original weights: base_weights is "
                "'dequantized'."
            )
        if base_weights not in ("original", "dequantized"):
            raise StageError(f'base_weights={base_weights!r}: use "original" or "dequantized".')
        trained_on_nf4 = self.provenance.get("quantization", "nf4") == "nf4"
        if base_weights == "dequantized" and not trained_on_nf4:
            raise StageError(
                'base_weights="dequantized": the adapter was not trained on NF4. Use "original".'
            )
        return base_weights

    def check_adapter(self) -> None:
        """Raise StageError if the model lacks what the adapter changes, or if it cannot change."""
        layers, tied = dict(self.model.named_modules()), tied_weight_names(self.model)
        for module in sorted(self.adapted):
            fits = module in layers
            if fits and self.plain:
                a, b = lora_matrices(self.adapter, module)  # [r, in], [out, r]
                fits = in_out_features(layers[module]) == (a.shape[1], len(b))
            if not fits:
                raise StageError(
                    f"The adapter changes {module}, which {self.base_model} does not have in that "
                    "shape. It belongs to another base model."
                )
            if f"{module}.weight" in tied:
                raise StageError(
                    f"The adapter changes {module}, which is tied to another layer: it cannot be "
                    "merged. Leave that layer out of lora_target_modules and train again."
                )
        if self.statistics and not self.plain:
            raise StageError(
                f"{self.base_model} is stored in 4 bits, and only plain LoRA can be merged into "
                "that. Train again without lora_options, or from the model in 16 bits."
            )

    def output_spec(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The shape and the dtype that a tensor will have: a tensor on `meta`.

        It keeps its dtype. But a base stored in 4 bits has that of whoever stored it: it gets the
        training's, as bf16 would round eight times as coarsely as the fp16 of a T4.
        """
        dtype = self.training_dtype
        if dtype == torch.float32:
            dtype = self.model.config.dtype or torch.float16
        if name in self.statistics:
            return self.model.get_parameter(self.names[name][0]).to(dtype)
        # its norms and embeddings were rounded to the storer's dtype as well
        if self.statistics and stored.is_floating_point():
            return stored.to(dtype)
        return stored

    def changed_tensors(self) -> list[str]:
        """The names of the tensors whose numbers merging may change. All others are copied."""
        if self.plain:
            return list(self.modules)
        changed_modules = self.adapted | self.quantized
        changed = []
        for name, new_names in self.names.items():
            owners = {new_name.rpartition(".")[0] for new_name in new_names}
            if owners & changed_modules:
                changed.append(name)
        return changed

    def read_stored(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, on the CPU; dequantized to fp32 if that is in 4 bits."""
        tensor = OnDisk(self.files[name], name, "cpu")[...]
        if name not in self.statistics:
            return tensor
        state = {}
        for part in self.statistics[name]:
            state[part.removeprefix(f"{name}.")] = OnDisk(self.files[part], part, "cpu")[...]
        return dequantize_4bit(tensor, QuantState.from_dict(state, torch.device("cpu"))).float()

    def read(self, name: str) -> torch.Tensor:
        """The weight that B · A is added to, fp32 and [out, in].

        With "dequantized" weights it has gone through NF4.
        """
        module = self.modules[name]
        weight = transpose_conv1d(self.model.get_submodule(module), self.read_stored(name))
        if module in self.quantized and name not in self.statistics:
            return nf4_round_trip(weight, self.training_dtype)
        return weight.to(torch.float32, copy=True)

    def merge(self, name: str) -> torch.Tensor:
        """One tensor of the merged model, contiguous, in its dtype."""
        module = self.modules.get(name) if self.plain else None
        if name in self.merged:
            tensor = self.merged[name]
        elif module is None:
            tensor = self.read_stored(name)
        else:
            tensor = self.read(name)
            if module in self.adapted:
                tensor = add_lora(tensor, self.adapter, self.config, module)
            tensor = transpose_conv1d(self.model.get_submodule(module), tensor)
        return tensor.to(self.tensors[name].dtype).contiguous()

    def merge_by_peft(self) -> None:
        """Let PEFT merge what is more than plain LoRA.

        This takes the memory of the whole model.
        """
        model = load_model(self.base, None, self.dtype, device="cpu")
        model = merge_in_memory(model, self.folder, self.base_weights, self.training_dtype)
        # under the names that the files have, whatever transformers calls them
        weights = stored_state_dict(model)
        for name in self.changed_tensors():
            self.merged[name] = weights[name]

    def gib(self, shards: Iterable[Iterable[str]]) -> float:
        """RAM in GiB that merging takes beside what is used already.

        That is the largest of `shards`, lists of names, and of the matrices that change: in fp32,
        and on its way through NF4 three times (measured at 7B). PEFT takes the whole model instead.
        """
        largest_shard = max(sum(self.tensors[name].nbytes for name in shard) for shard in shards)
        if not self.plain:
            return (largest_shard + self.size) / 2**30
        # fp32, 4 bytes a number
        working = max((4 * self.tensors[name].numel() for name in self.modules), default=0)
        if self.quantized:
            working *= 3
        return (largest_shard + working) / 2**30
