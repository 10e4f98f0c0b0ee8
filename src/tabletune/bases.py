"""What a base model is, and how it will be treated: looked at before anything long.

Asked are transformers and the model's own modules, built on the device `meta`, rather than attributes of its config:
those have other names in every family, or are missing.
"""

import inspect
import math
import re

import pandas as pd
import psutil
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch.nn import Embedding, Linear
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from .models import attention_of, model_class, room_gib
from .run import StageError, hub_error

ATTENTION = re.compile("Attention|DeltaNet|Mamba|Mixer|ShortConv")
# names that PEFT takes for a mixture's experts
EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}


def base_config(base_model, revision=None):
    """The config of a base model. Raises StageError if it cannot be had, or if such a model cannot be trained here."""
    try:
        config = AutoConfig.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise hub_error(f"base_model={base_model}", error) from None
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "bitsandbytes")
    if stored and (method != "bitsandbytes" or not (stored.get("load_in_4bit") or stored.get("_load_in_4bit"))):
        raise StageError(
            f"base_model={base_model} is stored in {method}, through which no adapter is trained here. Take the same "
            "model in 16 bits, or one that bitsandbytes has stored in 4."
        )
    if config.is_encoder_decoder:
        raise StageError(f"base_model={base_model} is an encoder and a decoder. Take a causal language model.")
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
        and "Router" not in type(module).__name__  # of a mixture; some are linear layers that give two results
    }


def sizes(layer):
    """How many numbers a linear layer takes and gives: (in, out)."""
    return layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def lora_targets(model, wanted="auto"):
    """The full names of the layers that get an adapter.

    `wanted` is "auto", the linear layers of attention and of what stands in its place (in Llama q, k, v and o);
    "all-linear", all but the output layer and a mixture's experts, which are no linear layers; or a list of names, or
    of ends of names. Raises StageError for a name that no layer has, and for what cannot be merged: embeddings and an
    output layer that is tied to them.
    """
    layers, parents = linear_layers(model), dict(model.named_modules())
    owner = {name: type(parents[name.rpartition(".")[0]]).__name__ for name in layers}
    # the fused kernels of Mamba read the weight of out_proj and pass by its adapter
    usable = [n for n in layers if not (re.search("Mamba|Mixer", owner[n]) and n.endswith("out_proj"))]
    mixture = any(parameter.dim() == 3 for name, parameter in text_part(model).named_parameters() if "conv" not in name)
    usable = [n for n in usable if not (mixture and n.rpartition(".")[2] in EXPERTS)]
    if wanted in ("auto", "all-linear"):
        return [n for n in usable if wanted != "auto" or ATTENTION.search(owner[n])] or usable
    if isinstance(wanted, str):
        return [n for n in layers if re.fullmatch(wanted, n)] or no_such(wanted, layers)
    found = {}
    for name in wanted:
        if mixture and name.rpartition(".")[2] in EXPERTS:
            raise StageError(
                f'lora_target_modules: "{name}" means the experts here, which are not adapted. Leave it out.'
            )
        ends = [n for n in parents if n == name or n.endswith(f".{name}")]
        refused = [n for n in ends if isinstance(parents[n], Embedding)]
        output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if refused or (parents.get(name) is output and output.weight is embedding.weight):
            raise StageError(
                f'lora_target_modules: "{name}" is an embedding or tied to one, and an adapter on it cannot be merged. '
                'Leave it out; "all-linear" takes every layer that can have one.'
            )
        usable = [n for n in ends if n in layers or parents[n] is model.get_output_embeddings()]
        found |= dict.fromkeys(usable or no_such(name, layers))
    return list(found)


def no_such(name, layers):
    """Raise StageError: no layer has this name."""
    there = ", ".join(sorted({n.rpartition(".")[2] for n in layers}))
    raise StageError(f'lora_target_modules: no layer is called "{name}". This model has: {there}.')


def short_names(model, targets):
    """The shortest ends of the names of `targets` that match them and no other module, as PEFT matches a list."""
    every, wanted = [name for name, _ in model.named_modules()], set(targets)
    for parts in (1, 2, 3):
        ends = {".".join(name.split(".")[-parts:]) for name in targets}
        if {n for n in every if any(n == end or n.endswith(f".{end}") for end in ends)} == wanted:
            return sorted(ends)
    return list(targets)


@torch.no_grad()
def packing_leaks(model):
    """Whether examples that are packed into one row see each other in this model, as a share of the logits' range.

    Two rows hold two examples each, with positions that begin anew; the first one is varied, and what the second one
    changes is compared with the range of its logits. 0 in Llama and most; 8% to 60% in hybrids with recurrent layers. A
    model that takes no positions cannot know where an example begins: 1.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return 1.0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2, 34).remainder(vocabulary)
    one, other = ids.repeat(2, 1), torch.cat([ids[:16].flip(0), ids[16:]]).repeat(2, 1)
    positions = torch.arange(16).repeat(2, 2)
    first, second = (
        model(input_ids=rows.to(model.device), position_ids=positions.to(model.device), use_cache=False)
        .logits[:, 16:]
        .float()
        for rows in (one, other)
    )
    return ((first - second).abs().max() / (first.max() - first.min())).item()


def check_numbers(results, model):
    """Raise StageError if there is infinity or NaN in what `model` computed, a tensor, as with Gemma 3 in fp16.

    fp16 ends at 65,504, and some models' activations do not (https://unsloth.ai/blog/gemma3).
    """
    if not results.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        remedy = 'Set precision to "fp32".' if dtype == "float16" else "Its files may be damaged."
        raise StageError(f"This model computes infinity or NaN in {dtype}. {remedy}")


def check_forward(model, ids):
    """Raise StageError if what `model` computes for these ids, [1, tokens], is no number, or sees what comes later.

    An encoder does, such as BERT, which transformers would train as a causal language model: it would learn to copy. In
    a causal one, the gradient of the first token's result by later tokens is exactly 0.
    """
    embedded = []

    def keep(module, inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with model.get_input_embeddings().register_forward_hook(keep):
        hidden = text_part(model)(input_ids=ids.to(model.device), use_cache=False)[0].float()
    check_numbers(hidden, model)
    weights = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)  # a plain sum is constant behind a norm
    gradients = torch.autograd.grad((hidden[0, 0] * weights).sum(), embedded[:1]) if embedded else []
    if any(gradient[0, 1:].nan_to_num().any() for gradient in gradients):
        raise StageError(
            "This model sees the words that are still to come, so it would learn none. Take a chat model. If this is "
            'one, set attn_implementation to "eager".'
        )


def intermediate_size(config):
    """The width of a layer between its two halves, of all experts at work; what a config lacks is taken as usual."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(width) if isinstance(width, (list, tuple)) else width
    experts = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    return max(width, experts * (getattr(config, "moe_intermediate_size", None) or width)) if experts else width


def expected_gib(model, dtype, tokens, gpu, targets="auto", lora_r=64, lora_dropout=0.0, optim="adamw_torch",
                 gradient_checkpointing=True, use_liger_kernel=True, quantization="nf4", shards=1):  # fmt: skip
    """What training on batches of `tokens` tokens takes at its peak, in GiB on each GPU, by part: a Series.

    Of `model` only the shapes are read: a `skeleton` will do. NF4 with double quantization takes 4 bits a weight and
    8.25 bits for each 64 of them, in all linear layers but the output layer; experts of a mixture stay in 16 bits.
    Activations: what each norm takes and the adapters after it, the attention without its matrix, which SDPA does not
    keep, the two halves of the MLP (after Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198), and each
    adapter's input after dropout with its mask. With checkpointing, one hidden state a layer and one layer in full.
    Liger's kernels keep less of the MLP, and compute the logits in pieces. Paged optimizer states may move to RAM. Over
    `shards` GPUs, each keeps its share of all weights, the statistics beside the 4-bit ones and the output layer, and
    gathers the layer at work and the next; with what FSDP has in flight and what its streams do not give back at once,
    that was six layers on an H100.
    """
    text, size = model.config.get_text_config(), dtype.itemsize
    layers, every = text.num_hidden_layers, linear_layers(model)
    numbers = sum(layer.weight.numel() for layer in every.values())
    unpacked = not gpu and quantization == "nf4" and 2 * numbers * size / 2**30 <= room_gib()
    bits = size if unpacked else {"nf4": 0.5, "8bit": 1}.get(quantization, size)
    adapted = [sizes(model.get_submodule(name)) for name in lora_targets(model, targets)]
    adapter = sum(lora_r * (taken + given) for taken, given in adapted)
    norms = [p.numel() for name, p in text_part(model).named_parameters() if "norm" in name and name.endswith("weight")]
    heads = getattr(text, "num_attention_heads", None) or 1
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    # keys, values and results are as wide as queries once they meet; queries and keys also before a norm of their own
    queries = heads * head * (5 if head in norms else 4)
    residual = (norms.count(text.hidden_size) // layers + (1 if use_liger_kernel else 4)) * text.hidden_size
    layer = (residual + queries + (2 if use_liger_kernel else 4) * intermediate_size(text)) * size
    layer += sum(taken for taken, _ in adapted) / layers * (size + 1) if lora_dropout else 0
    activations = layers * text.hidden_size * size + layer if gradient_checkpointing else layers * layer
    logits = text.vocab_size * (size + 4 * 4)  # as computed; in fp32: shifted, softmax, gradient, entropy
    if use_liger_kernel:  # of so many tokens at once, as in liger_kernel.ops.fused_linear_cross_entropy
        piece = 1 << (math.ceil(tokens / math.ceil(text.vocab_size / text.hidden_size)) - 1).bit_length()
    states = 0 if "paged" in optim else 2 if "8bit" in optim else 8
    parts = {
        "base model": numbers * (bits / shards + (8.25 / 8 / 64 if quantization == "nf4" else 0))
        + (model.num_parameters() - numbers) * size / shards,
        "adapter, gradients, optimizer": adapter * (4 + 4 + states) / shards,
        "activations": tokens * activations,
        "logits": (piece if use_liger_kernel else tokens) * logits,
    }
    if shards > 1:
        output_layer = model.get_output_embeddings().weight.numel() * size
        parts["gathered layers"] = 6 / layers * (numbers * 0.5 + adapter * 4) + output_layer * (1 - 1 / shards)
    if not gpu:  # freed memory is used again less than on a GPU: half as much more, measured at 256 and 512 tokens
        parts |= {name: 1.5 * parts[name] for name in ("activations", "logits")}
        parts["Python and its libraries"] = psutil.Process().memory_info().rss
    return pd.Series(parts, name="GiB") / 2**30


def context_length(config):
    """How many tokens the model was made to read at once, or None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def look_at_base(model, targets="auto", attn_implementation="auto", quantization="nf4"):
    """What this base is and how it will be treated, {what: a short text}. Raises StageError for what cannot work.

    Of `model` only the shapes are read: a `skeleton` will do.
    """
    config = model.config
    found, every = lora_targets(model, targets), linear_layers(model)
    counts = pd.Series([name.rpartition(".")[2] for name in found]).value_counts()
    numbers = sum(layer.weight.numel() for layer in every.values())
    rest = model.num_parameters() - numbers
    experts = any(parameter.dim() == 3 for parameter in text_part(model).parameters())
    bits = {"nf4": 4, "8bit": 8, "none": 16}[quantization]
    return {
        "architecture": f"{type(model).__name__}, {model.num_parameters() / 1e6:,.1f} million parameters",
        "attention": attention_of(config, attn_implementation),
        "adapters on": ", ".join(f"{count} × {name}" for name, count in sorted(counts.items())),
        "in memory": f"{numbers / 1e6:,.1f} million weights in {bits} bits, {rest / 1e6:,.1f} million in 16"
        + (", the mixture's experts among them" if experts else ""),
        "weights": f"{(numbers * bits + rest * 16) / 8 / 2**30:,.2f} GiB",
        "reads at once": f"{context_length(config):,} tokens" if context_length(config) else "unknown",
    }
