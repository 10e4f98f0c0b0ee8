"""What the backward pass needs and is cheap to compute is computed again, not kept.

Autograd keeps the input of every linear layer that has an adapter. Two of those inputs are cheap:
the output of a norm follows from the norm's input, which is kept anyway, and the input of an MLP's
last layer follows from the outputs of the two layers before it, which are kept as well. In a 7B
with adapters on all linear layers they are a quarter of the activations. Recomputing whole layers
(gradient checkpointing) frees more, but costs up to a third of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from tabletune.model.compat import changes_in_place
from tabletune.model.inspection import text_part


def decoder_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of a model's text part that can be recomputed one by one, in their order."""
    modules = text_part(model).modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def recompute_first_layers(model: torch.nn.Module, count: int) -> None:
    """Recompute only the first `count` layers of a model that has gradient checkpointing on.

    The first ones come last in the backward pass: by then, the others have given their memory back.
    """
    for layer in decoder_layers(model)[count:]:
        layer.gradient_checkpointing = False


class RecomputeFirstLayers(TrainerCallback):
    """Recompute only the first layers in a training with checkpointing; with 0, change nothing."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Choose the layers, if there are any to recompute."""
        if self.count:
            recompute_first_layers(model, self.count)


@dataclass
class Recipe:
    """How to compute a tensor again, and the tensor while the backward pass still needs it."""

    compute: Callable[[], torch.Tensor]
    needed: int = 0  # how many operations of the backward pass still ask for it
    result: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """The tensor: computed at the first call, forgotten after the last."""
        result = self.compute() if self.result is None else self.result
        self.needed -= 1
        self.result = result if self.needed > 0 else None
        return result


class Recipes:
    """The recipes of one layer during its forward pass; empty between two passes.

    `outputs` holds the tensors themselves meanwhile, so that no other tensor can get their memory
    and be mistaken for them.
    """

    def __init__(self) -> None:
        self.active = False
        self.outputs: dict[int, tuple[torch.Tensor, int, Recipe]] = {}

    def add(self, output: torch.Tensor, function: Callable, *inputs: Any) -> None:
        """Note that `output` is what `function` gives for these inputs."""
        # the backward pass runs outside of autocast, so its state is a part of the recipe
        kind = output.device.type
        enabled = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind)

        def compute() -> torch.Tensor:
            with torch.no_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
                return function(*inputs)

        # by address: autograd hands over views, such as [tokens, width] of [rows, tokens, width]
        self.outputs[output.data_ptr()] = (output, changes_in_place(output), Recipe(compute))

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps instead of a tensor: its recipe and shape, or the tensor itself.

        A tensor that was changed in place after its recipe was noted is kept.
        """
        output, version, recipe = self.outputs.get(tensor.data_ptr(), (None, 0, None))
        if output is None or recipe is None or changes_in_place(output) != version:
            return tensor
        # a cast of it, a part of it, or another order of its numbers is another tensor
        if tensor.dtype != output.dtype or tensor.numel() != output.numel():
            return tensor
        if not tensor.is_contiguous():
            return tensor
        recipe.needed += 1
        return recipe, tensor.shape

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        """The tensor that `pack` has replaced."""
        if isinstance(packed, torch.Tensor):
            return packed
        recipe, shape = packed
        return recipe.take().view(shape)


class StandIn:
    """A gated MLP whose projections are results already computed.

    The forward of such an MLP is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`. Called with this
    as `self`, `gate_proj` and `up_proj` return what they gave before, and `down_proj` its input: so
    it computes `act_fn(gate) * up`, whatever a model has in its place.
    """

    def __init__(self, mlp: torch.nn.Module, gate: torch.Tensor, up: torch.Tensor) -> None:
        self.mlp = mlp
        self.gate_proj = lambda x: gate
        self.up_proj = lambda x: up
        self.down_proj = lambda x: x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mlp, name)


def input_of_last(mlp: torch.nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The input of `down_proj`, [..., width], from the outputs of `gate_proj` and `up_proj`."""
    return mlp.forward.__func__(StandIn(mlp, gate, up), gate)


@torch.no_grad()
def is_gated_mlp(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether `input_of_last` gives exactly what a module hands its `down_proj`.

    It is tried on random numbers, with the module's own forward.
    """
    layers = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= layers.keys():
        return False
    if not hasattr(module.forward, "__func__"):
        return False
    seen: dict[str, torch.Tensor] = {}
    gate = layers["gate_proj"]
    up = layers["up_proj"]
    down = layers["down_proj"]
    hooks = [
        gate.register_forward_hook(lambda layer, inputs, output: seen.update(gate=output)),
        up.register_forward_hook(lambda layer, inputs, output: seen.update(up=output)),
        down.register_forward_pre_hook(lambda layer, inputs: seen.update(down=inputs[0])),
    ]
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    try:
        # two tokens are enough: [1, 2, hidden size]
        x = torch.randn(1, 2, gate.in_features, generator=generator)
        module(x.to(device, dtype))
        return torch.equal(input_of_last(module, seen["gate"], seen["up"]), seen["down"])
    except (RuntimeError, TypeError, AttributeError, KeyError):
        return False  # a module of another kind that has layers of these names
    finally:
        for hook in hooks:
            hook.remove()


def watch_norm(norm: torch.nn.Module, recipes: Recipes) -> None:
    """Note the recipe of a norm's output whenever its layer computes."""

    def hook(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if recipes.active and inputs and isinstance(output, torch.Tensor):
            recipes.add(output, module.forward, *inputs)

    norm.register_forward_hook(hook)


def watch_mlp(mlp: torch.nn.Module, recipes: Recipes) -> None:
    """Note the recipe of the input of a gated MLP's last layer whenever its layer computes."""
    results = {}

    def note(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            if recipes.active:
                results[name] = output

        return hook

    def add_recipe(module: torch.nn.Module, inputs: tuple) -> None:
        if recipes.active:
            recipes.add(inputs[0], input_of_last, mlp, results.pop("gate"), results.pop("up"))

    mlp.gate_proj.register_forward_hook(note("gate"))
    mlp.up_proj.register_forward_hook(note("up"))
    mlp.down_proj.register_forward_pre_hook(add_recipe)


def watch_layer(layer: torch.nn.Module, recipes: Recipes) -> None:
    """Let a layer keep recipes instead of tensors, unless it is recomputed as a whole."""
    usual_forward = layer.forward

    def forward(*args, **kwargs):
        # a layer that is recomputed as a whole keeps only its input anyway
        if not torch.is_grad_enabled() or (layer.gradient_checkpointing and layer.training):
            return usual_forward(*args, **kwargs)
        recipes.active = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(recipes.pack, recipes.unpack):
                return usual_forward(*args, **kwargs)
        finally:
            recipes.active = False
            recipes.outputs.clear()

    layer.forward = forward
    layer.keeps_recipes = True


def recompute_cheap_parts(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let the decoder layers of a PeftModel recompute their norms and the inside of their MLP.

    `dtype` is the one that the model computes in. Where no adapter reads these tensors, autograd
    does not keep them in the first place, and nothing changes. A second call changes nothing.
    """
    hidden_size = model.config.get_text_config().hidden_size
    layers = [layer for layer in decoder_layers(model) if not hasattr(layer, "keeps_recipes")]
    for layer in layers:
        recipes = Recipes()
        for module in layer.modules():
            weight = getattr(module, "weight", None)
            # norms of queries and keys are smaller: they are not worth it
            hidden = isinstance(weight, torch.Tensor) and weight.numel() == hidden_size
            if hidden and "Norm" in type(module).__name__:
                watch_norm(module, recipes)
            has_adapter = isinstance(getattr(module, "down_proj", None), LoraLayer)
            if has_adapter and is_gated_mlp(module, dtype):
                watch_mlp(module, recipes)
        watch_layer(layer, recipes)
