"""Which layers of a base model get a LoRA adapter."""

import re
from collections.abc import Iterable
from typing import Any, NoReturn, cast

from torch.nn import Embedding
from transformers import PreTrainedModel

from tabletune.errors import StageError
from tabletune.model.inspection import linear_layers, text_part

ATTENTION = re.compile("Attention|DeltaNet|Mamba|Mixer|ShortConv")
# names that PEFT takes for a mixture's experts
EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}


def lora_targets(model: PreTrainedModel, wanted: str | list[str] = "auto") -> list[str]:
    """The full names of the layers that get an adapter.

    `wanted` is one of:

    - "auto": the linear layers of attention and of what stands in its place (in Llama q, k, v, o);
      as "all-linear" where no layer has such a name
    - "all-linear": all but the output layer and a mixture's experts, which are no linear layers
    - another text: a regular expression
    - a list of names, or of ends of names

    Raises StageError for a name that no layer has, and for what cannot be merged: embeddings and an
    output layer that is tied to them.
    """
    layers = linear_layers(model)
    modules = dict(model.named_modules())
    is_mixture = has_experts(model)
    if wanted in ("auto", "all-linear"):
        return adaptable_layers(model, attention_only=wanted == "auto")
    if isinstance(wanted, str):
        matching = [name for name in layers if re.fullmatch(wanted, name)]
        return matching or refuse_unknown(wanted, layers)
    output = cast(Any, model.get_output_embeddings())
    embedding = cast(Any, model.get_input_embeddings())
    targets: dict[str, None] = {}  # as a set that keeps the order
    for name in wanted:
        if is_mixture and name.rpartition(".")[2] in EXPERTS:
            raise StageError(
                f'lora_target_modules: "{name}" means the experts here, which are not adapted. '
                "Leave it out."
            )
        matching = [n for n in modules if n == name or n.endswith(f".{name}")]
        is_embedding = any(isinstance(modules[n], Embedding) for n in matching)
        is_output = modules.get(name) is output
        is_tied = is_output and output.weight is embedding.weight
        if is_embedding or is_tied:
            raise StageError(
                f'lora_target_modules: "{name}" is an embedding or tied to one, and an adapter on '
                'it cannot be merged. Leave it out; "all-linear" takes every layer that can have '
                "one."
            )
        adaptable = [n for n in matching if n in layers or modules[n] is output]
        targets |= dict.fromkeys(adaptable or refuse_unknown(name, layers))
    return list(targets)


def adaptable_layers(model: PreTrainedModel, attention_only: bool) -> list[str]:
    """The names of the linear layers that can have an adapter.

    With `attention_only` those of attention, or all of them if the model has none by that name.
    """
    modules, is_mixture = dict(model.named_modules()), has_experts(model)
    adaptable, in_attention = [], []
    for name in linear_layers(model):
        owner = type(modules[name.rpartition(".")[0]]).__name__
        # the fused kernels of Mamba read the weight of out_proj and pass by its adapter
        is_fused = re.search("Mamba|Mixer", owner) and name.endswith("out_proj")
        is_expert = is_mixture and name.rpartition(".")[2] in EXPERTS
        if is_fused or is_expert:
            continue
        adaptable.append(name)
        if ATTENTION.search(owner):
            in_attention.append(name)
    return (in_attention if attention_only else adaptable) or adaptable


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a model is a mixture of experts: it keeps them in tensors of three dimensions."""
    for name, parameter in text_part(model).named_parameters():
        if parameter.dim() == 3 and "conv" not in name:
            return True
    return False


def refuse_unknown(name: str, layers: Iterable[str]) -> NoReturn:
    """Raise StageError: no layer has this name."""
    available = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
    raise StageError(
        f'lora_target_modules: no layer is called "{name}". This model has: {available}.'
    )


def shortest_target_names(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """The shortest ends of the names of `targets` that match them and no other module.

    PEFT matches a list in this way.
    """
    names = [name for name, _ in model.named_modules()]
    # q_proj, then self_attn.q_proj, then 0.self_attn.q_proj
    for parts in (1, 2, 3):
        ends = {".".join(name.split(".")[-parts:]) for name in targets}
        matching = set()
        for name in names:
            if any(name == end or name.endswith(f".{end}") for end in ends):
                matching.add(name)
        if matching == set(targets):
            return sorted(ends)
    return list(targets)
