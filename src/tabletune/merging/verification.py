"""Verifying that a merged model computes what base and adapter compute."""

import gc
from contextlib import contextmanager, suppress

import torch

from tabletune.errors import StageError
from tabletune.model.adapters import attach_adapter
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import load_model
from tabletune.model.quantization import load_base


@contextmanager
def in_fp32(model):
    """Compute with a model in fp32 whose weights stay in memory as they are: a layer's are cast while it works."""
    stored = {}

    def cast(module, _):
        weights = [weight for weight in module.parameters() if weight.is_floating_point()]
        stored[module] = [(weight, weight.data) for weight in weights]
        for weight in weights:
            weight.data = weight.data.float()

    def restore(module, *_):
        for weight, data in stored.pop(module):
            weight.data = data

    layers = [
        layer
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList)
        for layer in module
    ]
    alone = [
        module
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    modules = dict.fromkeys([*layers, *alone])
    hooks = [module.register_forward_pre_hook(cast) for module in modules]
    hooks += [module.register_forward_hook(restore) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in reversed(list(stored)):  # of a forward pass that ended with an error
            restore(module)


def logits_of(model, rows, exactly=True):
    """The logits of `model` at every token of `rows`, lists of token ids, on the CPU: fp32, [tokens, vocabulary].

    Computed in fp32, but for a model with kernels that know no fp32; or, if not `exactly`, in the model's own dtype.
    """

    @torch.no_grad()
    def compute():
        ids = [torch.tensor([row], device=model.device) for row in rows]
        return torch.cat([model.eval()(row).logits[0].float().cpu() for row in ids])

    if exactly:
        with suppress(RuntimeError), in_fp32(model):
            return compute()
    return compute()


def verify_merge(plan, folder, rows):
    """Compare the logits of the model in `folder` with those of base and adapter, on `rows` of token ids.

    Computed in fp32, so that only the rounding of the merged weights is left. How much a model makes of rounding shows
    in what computing in its own dtype changes: of a mixture a lot, as its router picks other experts. The figures are
    None if memory does not suffice. Raises StageError if the two differ by more than rounding explains.
    """
    keys, room, dtype = (
        ("max_logit_difference", "logit_range", "same_next_token"),
        available_memory_gib(),
        plan.dtype,
    )
    needed = 1.05 * plan.size / 2**30
    if room < needed:
        print(
            f"UNPROVEN: comparing takes {needed:.1f} GiB of memory, and there are {room:.1f} GiB."
        )
        return dict.fromkeys(keys)

    def logits(merged=False, exactly=True):
        gc.collect()
        torch.cuda.empty_cache()
        if merged:
            return logits_of(load_model(folder, None, dtype), rows)
        original = plan.base_weights == "original"
        load, its_dtype = (load_model, dtype) if original else (load_base, plan.training_dtype)
        return logits_of(
            attach_adapter(load(plan.base, None, its_dtype), plan.folder), rows, exactly
        )

    expected, actual = logits(), logits(merged=True)
    difference, span = (
        (actual - expected).abs().max().item(),
        (expected.max() - expected.min()).item(),
    )
    limit = (0.1 if dtype == torch.bfloat16 else 0.05) * span
    if not difference < limit:
        limit = 2 * (logits(exactly=False) - expected).abs().max().item()
    if not difference < limit:
        raise StageError(
            f"The merged model differs by {difference:.3g} in logits that span {span:.3g}: not kept."
        )
    same = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return dict(zip(keys, (difference, span, same), strict=True))
