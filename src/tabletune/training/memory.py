"""An estimate of the memory that a training takes, before anything is downloaded."""

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import psutil
import torch

from tabletune.model.devices import available_memory_gib
from tabletune.model.inspection import (
    in_out_features,
    intermediate_size,
    linear_layers,
    text_part,
)
from tabletune.training.lora_targets import ATTENTION, lora_targets

GIB = 2**30
NF4_BYTES = 0.5  # a weight in 4 bits
NF4_SCALE_BYTES = 8.25 / 8 / 64  # its share of a scale, itself in 8 bits, for every 64 weights
TRAINED_BYTES = 4 + 4  # a trained weight and its gradient, in fp32
ADAM_BYTES = 8  # the two states that Adam keeps of a weight, in fp32
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
# PyTorch reserves more than its tensors take, most where freed blocks keep the size that they had.
# Steps that are a CUDA graph keep their memory to themselves. Measured on an H200.
RESERVED_SHARE = {"expandable": 0.025, "blocks": 0.09}
CUDA_GRAPH_SHARE = {"expandable": 0.1, "blocks": 0.2}
# On a CPU, freed memory is reused less: a tenth more, measured at 256 and 512 tokens.
CPU_FACTOR = 1.1
# FSDP holds layers in flight that its streams do not give back at once, measured on an H100.
GATHERED_LAYERS = 6


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide what its training takes. Widths are numbers a token."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    attention: int  # queries, keys, values and results together
    norms: int  # norms of the hidden state in a layer
    linear_weights: int  # of all linear layers but the output layer
    other_weights: int
    output_weights: int  # of the output layer
    largest_layer: int  # weights of the largest linear layer


def model_shape(model: torch.nn.Module) -> ModelShape:
    """The ModelShape of a model; a `skeleton` will do."""
    config = model.config.get_text_config()
    linear = [layer.weight.numel() for layer in linear_layers(model).values()]
    norms = [
        parameter.numel()
        for name, parameter in text_part(model).named_parameters()
        if "norm" in name and name.endswith("weight")
    ]
    heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Keys and values are as wide as the queries once they meet them. Where queries and keys have a
    # norm of their own, what that reads is kept, too.
    per_head = 5 if head in norms else 4
    output = model.get_output_embeddings()
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=intermediate_size(config),
        vocabulary=config.vocab_size,
        attention=heads * head * per_head,
        norms=norms.count(config.hidden_size) // config.num_hidden_layers,
        linear_weights=sum(linear),
        other_weights=model.num_parameters() - sum(linear),
        output_weights=output.weight.numel() if output is not None else 0,
        largest_layer=max(linear, default=0),
    )


def adapter_inputs(model: torch.nn.Module, layers: list[str]) -> tuple[int, int]:
    """The widths that adapters on these layers read, summed: (cheap to recompute, others).

    Layers side by side read the same tensor, which counts once. Cheap are the outputs of norms and
    the input of a gated MLP's last layer (`model/recompute.py`). The result of the attention, which
    its output layer reads, is kept in any case and not counted.
    """
    hidden = model.config.get_text_config().hidden_size
    modules = dict(model.named_modules())
    inputs: dict[tuple[str, int], bool] = {}  # (parent, width): whether it is cheap
    for name in layers:
        parent, _, last = name.rpartition(".")
        width = in_out_features(modules[name])[0]
        if width == hidden:
            inputs[parent, width] = True
        elif not ATTENTION.search(type(modules[parent]).__name__):
            gated = all(hasattr(modules[parent], projection) for projection in GATED_MLP)
            inputs[parent, width] = gated and last == "down_proj"
    cheap = sum(width for (_, width), is_cheap in inputs.items() if is_cheap)
    return cheap, sum(width for _, width in inputs) - cheap


@dataclass
class TrainingMemory:
    """The memory that a training takes on each GPU. Each term has a method, which returns bytes.

    The activations are counted after Korthikanti et al., 2022 (https://arxiv.org/abs/2205.05198):
    what each norm reads, the attention without its matrix, which SDPA does not keep, the two halves
    of the MLP, and what the adapters read.
    """

    model: torch.nn.Module  # only its shapes are read: a `skeleton` will do
    dtype: torch.dtype
    gpu: bool
    targets: str | list[str] = "auto"
    lora_r: int = 64
    lora_dropout: float = 0.0
    lora_options: dict[str, Any] = field(default_factory=dict)
    optim: str = "adamw_torch"
    use_liger_kernel: bool = True
    quantization: str = "nf4"
    max_length: int = 512
    trained: int | None = None  # trained weights, where PEFT has counted them; None: by the shapes
    shards: int = 1  # GPUs that share the model (FSDP)
    replicas: int = 1  # GPUs that have a whole model each (DDP)
    fused: bool | None = None  # adapters are fused and cheap activations recomputed; None: as here
    allocator: str = "expandable"  # segments, or "blocks" of one size

    def __post_init__(self) -> None:
        self.shape = model_shape(self.model)
        modules = dict(self.model.named_modules())
        self.adapted = lora_targets(self.model, self.targets)
        self.features = [in_out_features(modules[name]) for name in self.adapted]
        if self.fused is None:
            self.fused = self.gpu and self.shards == 1
        self.dora = bool(self.lora_options.get("use_dora"))
        self.eight_bit = self.quantization == "8bit"
        # MatMul8bitLt keeps the input of every layer, with or without an adapter
        read = list(linear_layers(self.model)) if self.eight_bit else self.adapted
        self.cheap_inputs, self.other_inputs = adapter_inputs(self.model, read)

    # --- weights

    def base_model(self) -> float:
        """The frozen weights. The output layer and the experts of a mixture stay unquantized."""
        shape = self.shape
        size = self.dtype.itemsize
        scales = 0.0
        weight = {"nf4": NF4_BYTES, "8bit": 1.0}.get(self.quantization, size)
        if self.quantization == "nf4":
            scales = shape.linear_weights * NF4_SCALE_BYTES
            unpacked_gib = shape.linear_weights * size / GIB
            if not self.gpu and 2 * unpacked_gib <= available_memory_gib():
                weight = size  # on a CPU they are unpacked once, if there is room
        weights = shape.linear_weights * weight + shape.other_weights * size
        return weights / self.shards + scales

    def trained_weights(self) -> int:
        """How many weights are trained: those of the adapters and of `modules_to_save`."""
        if self.trained is not None:
            return self.trained
        count = sum(self.lora_r * (width_in + width_out) for width_in, width_out in self.features)
        if self.dora:
            count += sum(width_out for _, width_out in self.features)  # a magnitude for each output
        saved = tuple(self.lora_options.get("modules_to_save") or ())
        for name, module in self.model.named_modules():
            if saved and name.endswith(saved):
                count += sum(parameter.numel() for parameter in module.parameters())
        return count

    def adapter(self) -> float:
        """The trained weights with their gradients and optimizer states.

        Paged states may move to RAM and are not counted.
        """
        states = ADAM_BYTES
        if "paged" in self.optim:
            states = 0
        elif "8bit" in self.optim:
            states = 2
        cast = 0
        if self.gpu and not self.fused and self.dtype.itemsize < 4:
            cast = self.dtype.itemsize  # autocast keeps the copies that it has made
        if self.replicas > 1:
            states += 4  # the buckets in which gradients are averaged
        return self.trained_weights() * (TRAINED_BYTES + states + cast) / self.shards

    def gathered_layers(self) -> float:
        """What FSDP has gathered of other GPUs' shares: the output layer, and some layers."""
        if self.shards == 1:
            return 0.0
        shape = self.shape
        gathered = shape.linear_weights * NF4_BYTES + self.trained_weights() * 4
        output = shape.output_weights * self.dtype.itemsize
        return GATHERED_LAYERS / shape.layers * gathered + output * (1 - 1 / self.shards)

    # --- activations

    def layer_activations(self, fused: bool) -> float:
        """What a layer keeps of each token until its backward pass, in bytes.

        `fused`: with fused adapters, and without what is cheap to recompute.
        """
        if self.dora:
            return self.dora_activations()
        shape = self.shape
        size = self.dtype.itemsize
        inputs = self.other_inputs + self.cheap_inputs
        if fused and not self.eight_bit:  # 8-bit layers keep their inputs out of autograd's reach
            inputs = self.other_inputs
        elif self.lora_dropout:  # kept is what comes after the dropout, below
            inputs = 0
        numbers = self.norms_and_mlp() + shape.attention + inputs / shape.layers
        numbers += self.lora_r * len(self.adapted) / shape.layers  # the thin products
        if self.gpu:
            numbers += self.max_length  # a row of the attention mask
        dropped = 0.0
        if self.lora_dropout and not fused:  # each input after dropout, and its mask
            dropped = sum(width_in for width_in, _ in self.features) / shape.layers * (size + 1)
        return numbers * size + dropped

    def norms_and_mlp(self) -> int:
        """The numbers that norms and the MLP of a layer keep of each token."""
        shape = self.shape
        if self.use_liger_kernel:
            return shape.norms * shape.hidden + 2 * shape.intermediate
        return (shape.norms + 3) * shape.hidden + 4 * shape.intermediate

    def dora_activations(self) -> float:
        """The same with DoRA, whose magnitudes in fp32 make all results fp32.

        Each adapted layer keeps its own cast of its input, and the results of base (fp32) and
        adapter.
        """
        shape = self.shape
        size = self.dtype.itemsize
        inputs = sum(width_in for width_in, _ in self.features) / shape.layers
        results = sum(width_out for _, width_out in self.features) / shape.layers
        in_fp32 = self.norms_and_mlp() + results
        return in_fp32 * 4 + (shape.attention + inputs + results) * size

    def activations(self, tokens: int, recomputed_layers: int) -> float:
        """The most that all layers keep of a batch at one time.

        The first `recomputed_layers` keep only their input. They are computed again when the others
        have given back theirs, one after the other.
        """
        shape = self.shape
        inputs = recomputed_layers * shape.hidden * self.dtype.itemsize
        stored = (shape.layers - recomputed_layers) * self.layer_activations(bool(self.fused))
        if recomputed_layers:
            stored = max(stored, self.layer_activations(fused=False))
        return tokens * (inputs + stored)

    def logits(self, tokens: int) -> float:
        """The logits: in pieces with Liger's loss, else whole.

        Whole ones are also shifted, and in fp32: softmax, gradient, entropy.
        """
        shape = self.shape
        size = self.dtype.itemsize
        if not self.use_liger_kernel:
            return tokens * shape.vocabulary * (size + 4 * 4)
        # the pieces of liger_kernel.ops.fused_linear_cross_entropy
        pieces = math.ceil(shape.vocabulary / shape.hidden)
        tokens_of_piece = 1 << (math.ceil(tokens / pieces) - 1).bit_length()
        return tokens_of_piece * shape.vocabulary * size * 2

    def work(self, tokens: int) -> float:
        """What the last layer or the loss hold while they compute, the larger of the two.

        A layer: its gradients, an MLP between its halves, and one weight dequantized. The loss: the
        logits, the last hidden states, their norm and their gradient.
        """
        shape = self.shape
        size = self.dtype.itemsize
        layer = (3 * shape.hidden + 2 * shape.intermediate) * tokens * size
        weight = shape.largest_layer * size
        if self.dora:  # the weight with its adapter in fp32 for its norm, and an identity matrix
            widest = max(width_in for width_in, _ in self.features)
            weight += 2 * shape.largest_layer * 4 + widest * widest * (4 + size)
        return max(layer + weight, self.logits(tokens) + 3 * shape.hidden * tokens * size)

    # --- all of it

    def parts(self, tokens: int, recomputed_layers: int = 0, cuda_graph: bool = False) -> pd.Series:
        """The estimate in GiB, by part, for batches of `tokens` tokens, padding included."""
        parts = {
            "base model": self.base_model(),
            "adapter, gradients, optimizer": self.adapter(),
            "gathered layers": self.gathered_layers(),
            "activations": self.activations(tokens, recomputed_layers),
            "working memory": self.work(tokens),
        }
        if not parts["gathered layers"]:
            del parts["gathered layers"]
        if self.gpu:
            total = sum(parts.values())
            parts["unused, but reserved"] = RESERVED_SHARE[self.allocator] * total
            if cuda_graph and not self.dora:
                parts["CUDA graph"] = CUDA_GRAPH_SHARE[self.allocator] * total
        else:
            for name in ("activations", "working memory"):
                parts[name] *= CPU_FACTOR
            parts["Python and its libraries"] = psutil.Process().memory_info().rss
        return pd.Series(parts, name="GiB") / GIB

    def total(self, tokens: int, recomputed_layers: int = 0, cuda_graph: bool = False) -> float:
        """The sum of `parts`, in GiB."""
        return float(self.parts(tokens, recomputed_layers, cuda_graph).sum())
