"""The models of a run, ready to be asked: base and adapter as one, and the merged model."""

import gc
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig

from tabletune.errors import StageError
from tabletune.model.adapters import attach_adapter
from tabletune.model.dequantize import dequantize_layers
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import load_model, skeleton
from tabletune.model.quantization import load_base
from tabletune.run.files import read_json


def find_merged(run, run_dir):
    """The folder of the merged model, which notebook 3 leaves in `runs/` where Google Drive is too small.

    None if the run is of a kind that several machines share, and another one has it.
    """
    places = [run / "merged", Path("runs") / run.name / "merged"]
    there = [place for place in places if place.exists()]
    shared = str(run_dir).startswith(("drive:", "hub:"))
    return there[0] if there else None if shared else places[0]


def load_adapted(adapter, base_model, revision, dtype, attn_implementation="auto"):
    """The base model as it was trained on, with the adapter of a folder beside it: a PeftModel, for inference."""
    quantization = read_json(adapter / "provenance.json", "02_finetune_qlora").get(
        "quantization", "nf4"
    )
    base = load_base(base_model, revision, dtype, attn_implementation, quantization=quantization)
    adapted = attach_adapter(base, adapter)
    dequantize_layers(adapted)
    return adapted


def load_merged(folder, adapter, base_model, revision, dtype, attn_implementation="auto"):
    """The merged model as anyone would load it, and what it had to be put into to fit: (model, None or "NF4").

    Without its `folder` it is merged again, in memory, from the base model and the folder of the `adapter`. Raises
    StageError if it does not fit, and cannot be loaded in 4 bits, as those are made from files.
    """
    gc.collect()  # what was let go of, in circles, is still there
    torch.cuda.empty_cache()
    size = skeleton(
        AutoConfig.from_pretrained(folder or base_model, revision=None if folder else revision)
    )
    size, room = (
        size.num_parameters() * dtype.itemsize / 2**30,
        min(gather_object([available_memory_gib()])),
    )
    if folder and size <= room:
        return load_model(folder, None, dtype, attn_implementation), None
    if folder:
        print(
            f"The merged model takes {size:.1f} GiB of memory, and there are {room:.1f}: it is evaluated in 4 bits."
        )
        return load_base(folder, None, dtype, attn_implementation), "NF4"
    if size > room:
        raise StageError(
            f"The merged model takes {size:.1f} GiB of memory, and there are {room:.1f} GiB. To have it evaluated in "
            "4 bits, run 03_merge_adapter where its files can stay, or run this notebook on a larger machine."
        )
    model = load_model(base_model, revision, dtype, attn_implementation)
    return attach_adapter(model, adapter).merge_and_unload(), None
