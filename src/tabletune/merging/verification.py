"""Verifying that a merged model computes what the base model with its adapter computes."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tabletune.errors import StageError, first_line
from tabletune.merging.lora import lora_matrices, scaling, transpose_conv1d
from tabletune.merging.plan import MergePlan
from tabletune.model.adapters import attach_adapter
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import load_model
from tabletune.model.quantization import load_base
from tabletune.model.weights import OnDisk, tensors_on_meta, weight_files

MAX_TOKENS = 512  # of a row that is compared: their logits take 0.3 GiB with a large vocabulary
# By how much the merged model's logits may differ, as a share of what the adapter changes. Rounding
# gives 0 to 0.05 unless the adapter is weak; leaving out half of the adapter gives 0.5 to 1.
ROUNDING_SHARE = 0.05  # up to this, it is rounding; above it, each merged weight is looked at
MAX_SHARE_WITHOUT_WEIGHTS = 0.2  # above this, a merge is refused whose weights cannot be looked at
# And where all weights are right, as a share of the logits: rounding moves these by a few percent
# only, even if a weak adapter is lost in it.
MAX_SHARE_OF_LOGITS = 0.2
MAX_WRONG = 0.05  # share of the numbers of a matrix that may be rounded otherwise, as sums may

Logits = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of base, base and adapter, merged model


def verify_merge(plan: MergePlan, folder: Path, rows: list[list[int]]) -> dict[str, float | None]:
    """Compare the merged model in `folder` with the base model and its adapter.

    Every tensor that merging does not change must be as the base model stores it. Then the logits
    are compared, for `rows` of token ids: what the merged model adds to the base must be what the
    adapter adds. The difference is measured as a share of the adapter's own effect, so that a merge
    that left out a weak adapter does not pass. All is computed in float32; only the rounding of the
    merged weights is left. An adapter so weak that this rounding hides it is compared number by
    number.

    Returns `max_logit_difference`, `logit_range`, `same_next_token` and `difference_to_effect`; all
    are None if memory does not suffice for the logits, which is printed. Raises StageError if the
    merged model is another one.
    """
    check_copied_tensors(plan, folder)
    names = ("max_logit_difference", "logit_range", "same_next_token", "difference_to_effect")
    rows = [row[:MAX_TOKENS] for row in rows]
    # 1.05: the model in its own dtype, and one layer of it in fp32
    needed, available = 1.05 * plan.size / 2**30, available_memory_gib()
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
    # written so that a share of NaN is checked, too
    if not share <= ROUNDING_SHARE:
        check_difference(plan, folder, (base, adapted, merged))
    # of the tokens of both rows: a share from 0 to 1
    same = (merged.argmax(-1) == adapted.argmax(-1)).float().mean().item()
    span = (adapted.max() - adapted.min()).item()
    return dict(zip(names, (difference, span, same, share), strict=True))


def check_copied_tensors(plan: MergePlan, folder: Path) -> None:
    """Compare each tensor that merging copies with the base model's, byte by byte.

    One tensor is read at a time. Raises StageError if a tensor is missing in `folder`, or has
    another shape, dtype or value.
    """
    files = weight_files(folder)
    written = tensors_on_meta(files)
    wrong = sorted(plan.tensors.keys() ^ written.keys())
    for name in plan.tensors.keys() & written.keys():
        expected = plan.tensors[name]
        if (written[name].shape, written[name].dtype) != (expected.shape, expected.dtype):
            wrong.append(name)
    if not wrong:
        for name in plan.tensors.keys() - set(plan.changed_tensors()):
            expected = plan.read_stored(name).to(plan.tensors[name].dtype)
            if not same_bytes(OnDisk(files[name], name, "cpu")[...], expected):
                wrong.append(name)
    if wrong:
        raise StageError(
            "The merged model is not the base model with its adapter: tensors that the adapter "
            "does not change are not as in the base model. It is not kept. Wrong: "
            f"{', '.join(sorted(wrong)[:3])}."
        )


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes; so NaN equals NaN."""
    # flat, since a tensor without dimensions cannot be viewed as bytes
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def check_difference(plan: MergePlan, folder: Path, logits: Logits) -> None:
    """Check a merged model whose logits differ by more than rounding usually gives.

    Right weights and a small difference of the logits show that it is rounding, which is printed.
    Where PEFT has merged, the weights cannot be looked at, and the logits alone decide. Raises
    StageError if it is not rounding.
    """
    base, adapted, merged = logits
    share = difference_to_effect(base, adapted, merged)
    wrong_layers = wrongly_merged_layers(plan, folder)
    # each comparison is written so that a share of NaN is refused
    if wrong_layers is None:
        if not share <= MAX_SHARE_WITHOUT_WEIGHTS:
            raise StageError(not_the_same(share, logits, []))
        return
    # what an adapter changes in a base whose logits are all 0 are the logits themselves
    share_of_logits = difference_to_effect(torch.zeros_like(adapted), adapted, merged)
    if wrong_layers or not share_of_logits <= MAX_SHARE_OF_LOGITS:
        raise StageError(not_the_same(share, logits, wrong_layers))
    print(
        f"Rounding to {plan.dtype} hides {min(share, 1):.0%} of what the adapter changes. "
        "Each merged weight is right."
    )


def not_the_same(share: float, logits: Logits, wrong_layers: list[str]) -> str:
    """The message for a merged model that is another one."""
    _, adapted, merged = logits
    difference = (merged - adapted).abs().max().item()
    layers = ""
    if wrong_layers:
        layers = f" Wrong: {', '.join(wrong_layers[:3])}."
    return (
        "The merged model is not the base model with its adapter: it differs by "
        f"{share:.0%} of what the adapter changes (a logit by {difference:.3g}). It is not "
        f"kept.{layers}"
    )


def difference_to_effect(base: torch.Tensor, adapted: torch.Tensor, merged: torch.Tensor) -> float:
    """How far a merged model is from the adapted one, as a share of what the adapter changes.

    All are logits, [tokens, vocabulary]. The share is taken for each token, by the Euclidean norm,
    and the median is returned: in a mixture of experts, rounding may send single tokens to other
    experts. 0 is a perfect merge, 1 one that left the adapter out. Infinity where the adapter
    changes nothing but the merged model differs.
    """
    effect = (adapted - base).norm(dim=-1)  # [tokens]
    difference = (merged - adapted).norm(dim=-1)
    shares = torch.where(difference == 0, 0.0, difference / effect)
    return shares.median().item()


def logits_to_compare(plan: MergePlan, folder: Path, rows: list[list[int]]) -> Logits:
    """The logits of the base model, of base and adapter, and of the merged model in `folder`.

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


def compute_logits(plan: MergePlan, folder: Path, rows: list[list[int]], exactly: bool) -> Logits:
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
    """The logits of `model` at every token of `rows`, lists of token ids.

    [tokens, vocabulary] in fp32, on the CPU; computed in fp32, if `exactly`, else in the model's
    own dtype.
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

    The weights of a layer are cast when it begins, and put back when it has ended.
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

    hooks = []
    for module in modules_to_cast(model):
        hooks.append(module.register_forward_pre_hook(cast))
        hooks.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in reversed(list(stored)):  # of a forward pass that ended with an error
            restore(module)


def modules_to_cast(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a model that have weights, its repeated layers first.

    A layer stands before its parts: some layers read a weight of a part without calling that part's
    forward, and their weights must be cast by then.
    """
    layers: list[torch.nn.Module] = []
    with_weights = []
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            layers.extend(module)
        if next(module.parameters(recurse=False), None) is not None:
            with_weights.append(module)
    return list(dict.fromkeys([*layers, *with_weights]))


@torch.no_grad()
def wrongly_merged_layers(plan: MergePlan, folder: Path) -> list[str] | None:
    """The names of the changed layers whose merged weight is not base + adapter, rounded.

    A change that is lost in the rounding of all numbers is no mistake of the merge. None if it is
    unknown: what PEFT merges is not plain B · A.
    """
    if not plan.plain:
        return None
    files, wrong = weight_files(folder), []
    for name, layer_name in plan.modules.items():
        layer = plan.model.get_submodule(layer_name)
        base = plan.read(name)  # float32, [out, in]
        summed = base
        if layer_name in plan.adapted:
            a, b = lora_matrices(plan.adapter, layer_name)  # [r, in], [out, r]
            summed = base + scaling(plan.config, layer_name) * (b @ a)
        expected = summed.to(plan.tensors[name].dtype)
        merged = transpose_conv1d(layer, OnDisk(files[name], name, "cpu")[...])
        if is_wrong(base.to(expected.dtype), expected, merged):
            wrong.append(layer_name)
    return wrong


def is_wrong(base: torch.Tensor, expected: torch.Tensor, merged: torch.Tensor) -> bool:
    """Whether a merged weight is another one than expected; all three are [out, in], of one dtype.

    Sums in another order may be rounded otherwise: few numbers, by little. The share of those is
    taken of the numbers that the adapter changes, and of the others.
    """
    differs = merged != expected
    if not differs.any():
        return False
    changed = expected != base
    for numbers in (changed, ~changed):
        if numbers.any() and differs[numbers].float().mean() > MAX_WRONG:
            return True
    # no number is further away than the largest of them can be by rounding
    step = torch.finfo(expected.dtype).eps * expected.abs().max().float()
    distance = (merged.float() - expected.float()).abs()
    # written so that NaN is wrong, too
    return not bool((distance <= step).all())


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
