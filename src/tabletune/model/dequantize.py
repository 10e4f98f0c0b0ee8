"""Keeping 4-bit weights unpacked where memory allows, which makes answers faster."""

import torch

from tabletune.model.compat import bnb, dequantize_4bit
from tabletune.model.devices import available_memory_gib


class Linear(torch.nn.Linear):
    """A linear layer that computes in the dtype of its weight, whatever that of its input, as bitsandbytes' do."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def dequantize_layers(model):
    """Keep the 4-bit weights of a model as the numbers that they stand for, in place, if there is room for that.

    bitsandbytes unpacks all weights at every forward pass, that is for each token of an answer, and computes with the
    result. Unpacked once they give the same logits, bit for bit on a CPU, and answers take less time. At least half of
    the free memory is left alone. Returns whether it was done.
    """
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, bnb.nn.Linear4bit)
    ]
    size = (
        sum(
            layer.weight.quant_state.shape.numel() * layer.compute_dtype.itemsize
            for _, _, layer in layers
        )
        / 2**30
    )
    if not layers or 2 * size > available_memory_gib():
        return False
    for parent, name, layer in layers:
        state = layer.weight.quant_state
        state.dtype = layer.compute_dtype
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = torch.nn.Parameter(
            dequantize_4bit(layer.weight.data, state), requires_grad=False
        )
        plain.bias = layer.bias
        setattr(parent, name, plain)
    return True
