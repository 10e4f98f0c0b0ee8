"""Keeping 4-bit weights unpacked where memory allows.

It makes answers faster, and training on a CPU.
"""

import torch

from tabletune.model.bnb import bnb, dequantize_4bit
from tabletune.model.compat import computes_in, statistics_of
from tabletune.model.devices import available_memory_gib


class Linear(torch.nn.Linear):
    """A linear layer that computes in the dtype of its weight, as bitsandbytes' layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the dtype of its input `x`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def dequantize_layers(model: torch.nn.Module) -> bool:
    """Replace the 4-bit layers of a model, in place, by plain ones, if there is room for that.

    bitsandbytes unpacks all weights at every forward pass, that is for each token of an answer, and
    computes with the result. Unpacked once they give the same logits, bit for bit on a CPU, and
    answers take less time. At least half of the free memory is left alone. Returns whether it was
    done.
    """
    # collected first: a model must not change while it is walked through
    layers = []  # (the module that has it, its name there, the layer)
    size = 0  # in bytes, once unpacked
    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, bnb.nn.Linear4bit):
                layers.append((parent, name, layer))
                size += statistics_of(layer.weight).shape.numel() * computes_in(layer).itemsize
    if not layers or 2 * size / 2**30 > available_memory_gib():
        return False
    for parent, name, layer in layers:
        state = statistics_of(layer.weight)
        state.dtype = computes_in(layer)
        # on meta: the layer's own random weight is never made
        with torch.device("meta"):
            linear = Linear(layer.in_features, layer.out_features, bias=False)
        weight = dequantize_4bit(layer.weight.data, state)  # [out, in]
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        linear.bias = layer.bias
        setattr(parent, name, linear)
    return True
