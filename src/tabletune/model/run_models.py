"""The models of a run, ready to be asked: base and adapter as one, and the merged model."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig, PreTrainedModel

from tabletune.errors import StageError
from tabletune.model.adapters import attach_adapter
from tabletune.model.dequantize import dequantize_layers
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import load_model, skeleton
from tabletune.model.quantization import load_base
from tabletune.run.files import read_json

if TYPE_CHECKING:
    from peft import PeftModel


def find_merged(run: Path, run_dir: str) -> Path | None:
    """The folder of the merged model, which notebook 3 leaves in `runs/` if Google Drive is full.

    None if the run is of a kind that several machines share, and another one has it.
    """
    folders = [run / "merged", Path("runs") / run.name / "merged"]
    for folder in folders:
        if folder.exists():
            return folder
    is_shared = str(run_dir).startswith(("drive:", "hub:"))
    return None if is_shared else folders[0]


def load_adapted(
    adapter: Path,
    base_model: str,
    revision: str | None,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
) -> "PeftModel":
    """The base model as it was trained on, with the adapter of a folder, for inference."""
    provenance = read_json(adapter / "provenance.json", "02_finetune_qlora")
    quantization = provenance.get("quantization", "nf4")
    base = load_base(base_model, revision, dtype, attn_implementation, quantization=quantization)
    adapted = attach_adapter(base, adapter)
    # the same numbers, and answers take less time
    dequantize_layers(adapted)
    return adapted


def load_merged(
    folder: Path | None,
    adapter: Path,
    base_model: str,
    revision: str | None,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
) -> tuple[PreTrainedModel, str | None]:
    """The merged model as anyone would load it, and what it was put into to fit: None or "NF4".

    Without its `folder` it is merged again, in memory, from the base model and the folder of the
    `adapter`. Raises StageError if it does not fit, and cannot be loaded in 4 bits, as those are
    made from files.
    """
    gc.collect()  # what was let go of, in circles, is still there
    torch.cuda.empty_cache()
    source = folder or base_model
    config = AutoConfig.from_pretrained(source, revision=None if folder else revision)
    size = skeleton(config).num_parameters() * dtype.itemsize / 2**30
    # all processes decide alike, by the one with the least memory
    available = min(gather_object([available_memory_gib()]))
    if folder and size <= available:
        return load_model(folder, None, dtype, attn_implementation), None
    sentence = f"The merged model takes {size:.1f} GiB of memory, and there are {available:.1f}"
    if folder:
        print(f"{sentence}: it is evaluated in 4 bits.")
        return load_base(folder, None, dtype, attn_implementation), "NF4"
    if size > available:
        raise StageError(
            f"{sentence} GiB. Keep the merged files in notebook 3 so that they can be evaluated in "
            "4 bits, or run this notebook on a larger machine."
        )
    model = load_model(base_model, revision, dtype, attn_implementation)
    return attach_adapter(model, adapter).merge_and_unload(), None
