"""Which layers of a base model get a LoRA adapter."""

import re

from torch.nn import Embedding

from tabletune.errors import StageError
from tabletune.model.inspection import linear_layers, text_part

ATTENTION = re.compile("Attention|DeltaNet|Mamba|Mixer|ShortConv")
# names that PEFT takes for a mixture's experts
EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}


def lora_targets(model, wanted="auto"):
    """The full names of the layers that get an adapter.

    `wanted` is "auto", the linear layers of attention and of what stands in its place (in Llama q,
    k, v and o); "all-linear", all but the output layer and a mixture's experts, which are no linear
    layers; or a list of names, or of ends of names. Raises StageError for a name that no layer has,
    and for what cannot be merged: embeddings and an output layer that is tied to them.
    """
    layers, parents = linear_layers(model), dict(model.named_modules())
    owner = {name: type(parents[name.rpartition(".")[0]]).__name__ for name in layers}
    # the fused kernels of Mamba read the weight of out_proj and pass by its adapter
    usable = [
        n for n in layers if not (re.search("Mamba|Mixer", owner[n]) and n.endswith("out_proj"))
    ]
    mixture = any(
        parameter.dim() == 3
        for name, parameter in text_part(model).named_parameters()
        if "conv" not in name
    )
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


def shortest_target_names(model, targets):
    """The shortest ends of the names of `targets` that match them and no other module, as PEFT
    matches a list.
    """
    every, wanted = [name for name, _ in model.named_modules()], set(targets)
    for parts in (1, 2, 3):
        ends = {".".join(name.split(".")[-parts:]) for name in targets}
        if {n for n in every if any(n == end or n.endswith(f".{end}") for end in ends)} == wanted:
            return sorted(ends)
    return list(targets)
