"""What to compute on, and in which number format."""

import psutil
import torch

from tabletune.errors import StageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype to compute in: "bf16", "fp16", "fp32", or "auto".

    "auto" is bf16 on a GPU that has it natively, fp16 on an older one, fp32 on a CPU. PyTorch
    emulates bf16 on a T4, and `torch.cuda.is_bf16_supported()` says yes there; the compute
    capability tells. Raises StageError for any other word.
    """
    if precision in DTYPES:
        return DTYPES[precision]
    if precision != "auto":
        raise StageError(f"precision={precision!r}: use auto, bf16, fp16 or fp32.")
    if not torch.cuda.is_available():
        return torch.float32
    if torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float16


def available_memory_gib() -> float:
    """Memory in GiB that models can take here.

    On a GPU, that is what is free within this process's share of it; without one, RAM.
    """
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available / 2**30
    free, total = torch.cuda.mem_get_info()
    # PyTorch keeps what tensors gave back: free for us, though the driver calls it used
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    share = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_allocated()
    return min(free + unused, share) / 2**30
