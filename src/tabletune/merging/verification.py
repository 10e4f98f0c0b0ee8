"""Verifying that a merged model computes what the base model with its adapter computes."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from tabletune.errors import StageError, first_line
from tabletune.merging.lora import lora_matrices, scaling, transpose_conv1d
from tabletune.merging.plan import MergePlan
from tabletune.model.adapters import attach_adapter
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import load_model
from tabletune.model.quantization import load_base
from tabletune.model.weights import weight_files

MAX_TOKENS = 512  # of a row that is compared: their logits take 0.3 GiB with a large vocabulary
# Of the adapter's effect, by how large a share a merged model may differ from base and adapter.
# Rounding gives 0 to 0.05; half of the adapter left out gives 0.5 to 1.
MAX_SHARE = 0.05  # up to here the logits alone are proof; above it the files' tensors are compared
MAX_SHARE_BY_LOGITS = 0.2  # for what PEFT has merged, whose tensors nobody can compute otherwise
MAX_WRONG = 0.05  # of the numbers that the adapter changes in a matrix: sums may round otherwise


def verify_merge(plan: MergePlan, folder: Path, rows: list[list[int]]) -> dict[str, float | None]:
    """Compare the logits of the merged model in `folder` with those of base and adapter.

    They are computed for `rows` of token ids.

    What the merged model adds to the base must be what the adapter adds: their difference is
    measured as a share of the adapter's own effect, so that a merge that left out a weak adapter
    does not pass. All is computed in float32; only the rounding of the merged weights is left. An
    adapter so weak that this rounding hides it is compared number by number. Returns
    `max_logit_difference`, `logit_range`, `same_next_token` and `difference_to_effect`; all are
    None if memory does not suffice, which is printed. Raises StageError if the merged model is
    another one.
    """
    names = ("max_logit_difference", "logit_range", "same_next_token", "difference_to_effect")
    rows = [row[:MAX_TOKENS] for row in rows]
    # 1.05: the model in its own dtype, and one layer of it in fp32
    needed = 1.05 * plan.size / 2**30
    available = available_memory_gib()
    if available < needed:
        print(
            f"UNPROVEN: comparing takes {needed:.1f} GiB of memory, and there are "
            f"{available:.1f} GiB."
        )
        return dict.fromkeys(names)
    try:
        base, adapted, merged = logits_to_compare(plan, folder, rows)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"UNPROVEN: memory ran out while comparing ({first_line(error)}).")
        return dict.fromkeys(names)
    share = difference_to_effect(base, adapted, merged)
    difference = (merged - adapted).abs().max().item()
    if not share <= MAX_SHARE:  # written so that a share of NaN is looked into, too
        check_tensors(plan, folder, share, difference)
    # of the tokens of both rows: a share from 0 to 1
    same = (merged.argmax(-1) == adapted.argmax(-1)).float().mean().item()
    span = (adapted.max() - adapted.min()).item()
    return dict(zip(names, (difference, span, same, share), strict=True))


def check_tensors(plan: MergePlan, folder: Path, share: float, difference: float) -> None:
    """Raise StageError unless a merged model differs from base and adapter by rounding alone.

    `share` is that of `difference_to_effect`, `difference` the largest one of a logit.
    """
    wrong = wrong_tensors(plan, folder)
    if wrong is None and share <= MAX_SHARE_BY_LOGITS:
        return
    if wrong == []:
        print(
            f"Rounding to {plan.dtype} hides {min(share, 1):.0%} of what the adapter changes. "
            "Each merged weight is right."
        )
        return
    names = f" Wrong: {', '.join(wrong[:3])}." if wrong else ""
    raise StageError(
        "The merged model is not the base model with its adapter: it differs by "
        f"{share:.0%} of what the adapter changes (a logit by {difference:.3g}). It is not "
        f"kept.{names}"
    )


def difference_to_effect(base: torch.Tensor, adapted: torch.Tensor, merged: torch.Tensor) -> float:
    """How far a merged model is from the adapted one, by what the adapter changes.

    The result is a share.

    All are logits, [tokens, vocabulary]. The share is taken for each token, by the Euclidean norm,
    and the median is returned: in a mixture of experts, rounding may send single tokens to other
    experts. 0 is a perfect merge, 1 one that left the adapter out. Infinity where the adapter
    changes nothing but the merged model differs.
    """
    effect = (adapted - base).norm(dim=-1)  # [tokens]
    difference = (merged - adapted).norm(dim=-1)
    shares = torch.where(difference == 0, 0.0, difference / effect)
    return shares.median().item()


def logits_to_compare(
    plan: MergePlan, folder: Path, rows: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits of the base model, of base and adapter, and of the merged model.

    The last one is in `folder`.

    They are computed in float32, but for models with GPU kernels for 16 bits only: those compute in
    their own dtype, all three, which is printed. Only one model is in memory at a time.
    """
    try:
        return compute_logits(plan, folder, rows, exactly=True)
    except RuntimeError as error:
        # out of memory and errors of the GPU are no reason to compute otherwise
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        print(
            f"This model cannot compute in float32 ({first_line(error)}): compared in {plan.dtype}."
        )
    return compute_logits(plan, folder, rows, exactly=False)


def compute_logits(
    plan: MergePlan, folder: Path, rows: list[list[int]], exactly: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logits_to_compare` in float32, if `exactly`, or in the models' own dtype."""
    release_memory()
    if plan.base_weights == "original":
        model = load_model(plan.base, None, plan.dtype)
    else:
        # as training had it: the same NF4 that the merge went through
        model = load_base(plan.base, None, plan.training_dtype)
    base = logits_of(model, rows, exactly)  # [tokens, vocabulary]
    model = attach_adapter(model, plan.folder)
    adapted = logits_of(model, rows, exactly)
    del model
    release_memory()
    merged = logits_of(load_model(folder, None, plan.dtype), rows, exactly)
    return base, adapted, merged


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: list[list[int]], exactly: bool = True) -> torch.Tensor:
    """The logits of `model` at every token of `rows`, lists of token ids, on the CPU.

    Fp32, [tokens, vocabulary].

    Computed in fp32, if `exactly`, else in the model's own dtype.
    """
    model.eval()
    logits = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)  # [1, tokens]
        if exactly:
            with in_fp32(model):
                output = model(ids)
        else:
            output = model(ids)
        logits.append(output.logits[0].float().cpu())
    return torch.cat(logits)


@contextmanager
def in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Compute with a model in fp32 whose weights stay in memory as they are.

    A layer's are cast while it works.
    """
    stored: dict[torch.nn.Module, list] = {}

    def cast(module: torch.nn.Module, _: tuple) -> None:
        weights = [weight for weight in module.parameters() if weight.is_floating_point()]
        stored[module] = [(weight, weight.data) for weight in weights]  # to put back, as it was
        for weight in weights:
            weight.data = weight.data.float()

    def restore(module: torch.nn.Module, *_: object) -> None:
        for weight, data in stored.pop(module):
            weight.data = data

    layers: list[torch.nn.Module] = []
    with_weights = []
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            layers.extend(module)
        if next(module.parameters(recurse=False), None) is not None:
            with_weights.append(module)
    # Whole layers first: some read a weight of a part without calling that part's forward.
    hooks = []
    for module in dict.fromkeys([*layers, *with_weights]):
        hooks.append(module.register_forward_pre_hook(cast))
        hooks.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in reversed(list(stored)):  # of a forward pass that ended with an error
            restore(module)


@torch.no_grad()
def wrong_tensors(plan: MergePlan, folder: Path) -> list[str] | None:
    """The names of the tensors in `folder` that are not what the merge should have made of them.

    The weight of an adapted layer must be base + adapter, rounded (`is_adapted_right`). Every other
    tensor must be the base's. None for what PEFT has merged: that is not plain B · A, and nothing
    here can compute it otherwise.
    """
    if not plan.plain:
        return None
    files = weight_files(folder)
    wrong = []
    for name in plan.tensors:
        layer_name = plan.modules.get(name)
        with safe_open(files[name], framework="pt") as file:
            merged = file.get_tensor(name)
        if layer_name in plan.adapted:
            is_right = is_adapted_right(plan, name, layer_name, merged)
        else:
            is_right = torch.equal(merged, plan.merge(name))
        if not is_right:
            wrong.append(layer_name or name)
    return wrong


def is_adapted_right(plan: MergePlan, name: str, layer_name: str, merged: torch.Tensor) -> bool:
    """Whether the merged weight of an adapted layer is base + adapter, rounded.

    Compared are the numbers that the adapter changes after rounding, and those that it does not
    change must be the base's. A change that is lost in the rounding of all of them is no mistake of
    the merge.
    """
    merged = transpose_conv1d(plan.model.get_submodule(layer_name), merged)  # [out, in]
    base = plan.read(name)  # float32, [out, in]
    a, b = lora_matrices(plan.adapter, layer_name)  # [r, in], [out, r]
    update = scaling(plan.config, layer_name) * (b @ a)
    expected = (base + update).to(plan.tensors[name].dtype)
    is_wrong = merged != expected
    if is_wrong.float().mean() > MAX_WRONG:
        return False
    # where rounding leaves something of the update: a few numbers, if the adapter is weak
    changed = expected != base.to(expected.dtype)
    return not changed.any() or bool(is_wrong[changed].float().mean() <= MAX_WRONG)


def release_memory() -> None:
    """Give back the memory of models that are no longer used."""
    gc.collect()
    torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out.

    A GPU has an error of its own; a CPU's allocator raises a plain RuntimeError.
    """
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search(r"out of memory|can't allocate memory|not enough memory", message)
    )
