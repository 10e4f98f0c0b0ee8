"""What to compute on, and in which number format."""

import psutil
import torch

from tabletune.errors import StageError


def compute_dtype(precision):
    """The dtype to compute in. "auto": bf16 on a GPU that has it natively, fp16 on an older one, fp32 on a CPU.

    PyTorch emulates bf16 on a T4, and `torch.cuda.is_bf16_supported()` says yes there; the compute capability tells.
    Raises StageError for any other word than auto, bf16, fp16 or fp32.
    """
    if precision != "auto":
        try:
            return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
        except KeyError:
            raise StageError(f"precision={precision!r}: use auto, bf16, fp16 or fp32.") from None
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


# --- what is there, and what belongs together


def available_memory_gib():
    """Memory in GiB that models can take here: on the GPU, within this process's share of it, or RAM without one."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available / 2**30
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    share = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_allocated()
    return min(free + unused, share) / 2**30
