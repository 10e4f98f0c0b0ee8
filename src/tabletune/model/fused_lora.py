"""LoRA layers that keep less for the backward pass, and copy less, than PEFT's own forward.

PEFT computes `base(x) + scaling * lora_B(lora_A(dropout(x)))` one operation at a time: it copies
the base's result, scales, adds, and autograd keeps the input after dropout and its mask. With
adapters on all linear layers of a 7B these passes over memory took a tenth of a training step on an
H200. Here, one autograd function adds the adapter's product to the base's result inside the matrix
product, and draws the same dropout again in the backward pass.

The modules, their names and their weights stay PEFT's. Only `forward` is replaced, on the modules
of one model. Whatever is not plain LoRA in training precision still goes to PEFT's own `forward`.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from tabletune.model.compat import statistics_of

FUSED_CLASSES = ("Linear", "Linear4bit")  # of PEFT's LoRA layers


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """[..., width] as [rows, width], without a copy where there is a choice."""
    return tensor.reshape(-1, tensor.shape[-1])


def frozen_weight(layer: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a frozen linear layer, [out, in], in `dtype`, dequantized from 4 bits."""
    state = statistics_of(layer.weight)
    if state is None:
        return layer.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit  # imported late: it takes a second

    return dequantize_4bit(layer.weight.data.view(-1, 1), state).to(dtype)


def get_random_state(device: torch.device) -> int | torch.Tensor:
    """How far a device's random generator has come: enough to draw the same numbers again.

    On a GPU that is an offset. The whole state would take a tenth of a millisecond to set, a
    thousand times a step.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index].get_offset()
    return torch.get_rng_state()


def set_random_state(device: torch.device, state: int | torch.Tensor) -> None:
    """Put a device's random generator back to where `get_random_state` found it."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].set_offset(state)
    else:
        torch.set_rng_state(state)


def repeat_dropout(
    rows: torch.Tensor, probability: float, state: int | torch.Tensor
) -> torch.Tensor:
    """`rows` [tokens, width] after the dropout that was drawn when the generator had this state."""
    current_state = get_random_state(rows.device)
    set_random_state(rows.device, state)
    dropped = torch.nn.functional.dropout(rows, probability)
    set_random_state(rows.device, current_state)
    return dropped


class LoraProduct(torch.autograd.Function):
    """`layer(x) + scaling * dropout(x) @ A.T @ B.T` for a frozen linear layer.

    It keeps x, which neighbouring layers keep as well, and the thin product with A. The gradients:

        dB = dy.T @ (scaling * dropout(x) @ A.T)
        dA = (dy @ (scaling * B)).T @ dropout(x)
        dx = dy @ W + dropout((dy @ (scaling * B)) @ A)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: torch.nn.Linear,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """`x` [..., in], `a` [rank, in], `b` [out, rank]; returns [..., out]."""
        ctx.layer = layer
        ctx.scaling = scaling
        ctx.dropout = dropout
        ctx.random_state = get_random_state(x.device) if dropout else None
        result = layer(x)  # [..., out]; autograd is off in here
        rows = torch.nn.functional.dropout(flatten(x), dropout)  # [tokens, in]
        thin = rows @ a.to(rows.dtype).T  # [tokens, rank]
        # in place, into the base's result: PEFT would make two more tensors [tokens, out]
        flatten(result).addmm_(thin, b.to(rows.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, thin, a, b)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Takes the gradient of the result, [..., out]; returns those of x, A and B."""
        x, thin, a, b = ctx.saved_tensors
        rows = flatten(gradients[0])  # [tokens, out]
        dtype = rows.dtype
        # B is scaled before the product, not its result: fp16 ends at 65,504, and the gradient
        # already carries the factor of the loss scaler.
        thin_gradient = rows @ (b * ctx.scaling).to(dtype)  # [tokens, rank]
        gradient_of_b = (rows.T @ (thin * ctx.scaling)).to(b.dtype)  # [out, rank]
        inputs = flatten(x)  # [tokens, in]
        if ctx.dropout:
            inputs = repeat_dropout(inputs, ctx.dropout, ctx.random_state)
        gradient_of_a = (thin_gradient.T @ inputs).to(a.dtype)  # [rank, in]
        if not ctx.needs_input_grad[0]:  # the first layer reads frozen embeddings
            return None, gradient_of_a, gradient_of_b, None, None, None
        gradient_of_x = rows @ frozen_weight(ctx.layer, dtype)  # [tokens, in]
        if ctx.dropout:
            through_adapter = thin_gradient @ a.to(dtype)
            gradient_of_x += repeat_dropout(through_adapter, ctx.dropout, ctx.random_state)
        else:
            gradient_of_x.addmm_(thin_gradient, a.to(dtype))
        return gradient_of_x.view(x.shape), gradient_of_a, gradient_of_b, None, None, None


def can_be_fused(module: torch.nn.Module) -> bool:
    """Whether a module is plain LoRA on a frozen linear layer, in 4 bits or unquantized.

    DoRA and other variants, biases that are trained, and 8-bit layers are not.
    """
    if not isinstance(module, LoraLayer) or type(module).__name__ not in FUSED_CLASSES:
        return False
    base = module.get_base_layer()
    if not isinstance(base, torch.nn.Linear) or module.fan_in_fan_out or module.lora_variant:
        return False
    readable = statistics_of(base.weight) is not None or base.weight.is_floating_point()
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return readable and frozen and not any(module.lora_bias.values())


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which PyTorch computes matrix products of a tensor now, autocast included."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def fuse(module: LoraLayer) -> None:
    """Give a LoRA layer a `forward` that uses LoraProduct wherever PEFT would compute the same."""
    peft_forward = module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = module.active_adapters
        # merged weights, or two adapters at once, are PEFT's business
        switched_off = module.disable_adapters or module.merged or len(adapters) != 1
        if args or kwargs or switched_off or adapters[0] not in module.lora_A:
            return peft_forward(x, *args, **kwargs)
        a = module.lora_A[adapters[0]].weight
        b = module.lora_B[adapters[0]].weight
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != product_dtype(x) or (a.dtype != x.dtype and not autocast):
            return peft_forward(x)  # PEFT computes the adapter in another precision than the base
        dropout = module.lora_dropout[adapters[0]]
        drops = module.training and isinstance(dropout, torch.nn.Dropout)
        probability = dropout.p if drops else 0.0
        scaling = module.scaling[adapters[0]]
        return LoraProduct.apply(x, a, b, module.get_base_layer(), scaling, probability)

    module.forward = forward
    module.is_fused = True


def fuse_adapters(model: torch.nn.Module) -> int:
    """Fuse all LoRA layers of a PeftModel that can be; returns how many there are.

    Layers that are fused already, as in a second trainer of the same model, stay as they are.
    """
    fusible = [module for module in model.modules() if can_be_fused(module)]
    for module in fusible:
        if not hasattr(module, "is_fused"):
            fuse(module)
    return len(fusible)
