"""The tensors of a model's safetensors files, read when they are asked for."""

import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tabletune.errors import StageError
from tabletune.model.compat import in_loading_order

AHEAD = 8  # tensors that are read while one is quantized, each by a thread


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor of the model in a folder: {name: path}.

    Raises StageError if a file is damaged, if one that the index names is missing, or if there is
    none.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = sorted({folder / name for name in names})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise StageError(
            f"The model in {folder} lacks weights in safetensors format. Get a copy that has them."
        )
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise StageError(f"The model in {folder} lacks {', '.join(missing)}. Get its files again.")
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise StageError(f"{path} is damaged ({error}). Delete it and run again.") from error
    return files


# safetensors' names of the dtypes
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def tensors_on_meta(files: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The tensors of {name: file} without their values: their shapes and dtypes, on `meta`."""
    tensors = {}
    for path in dict.fromkeys(files.values()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                # reads the header only
                part = file.get_slice(name)
                dtype = DTYPES[part.get_dtype()]
                tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    # in the order of `files`, not of the paths
    return {name: tensors[name] for name in files}


class OnDisk:
    """A tensor in a safetensors file, read each time it is asked for with `[...]`."""

    def __init__(self, file: Path, name: str, device: str) -> None:
        self.file = file
        self.name = name
        self.device = device

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The tensor, or a part of it."""
        with safe_open(self.file, framework="pt", device=self.device) as file:
            return file.get_tensor(self.name)[index]


class Awaited:
    """A tensor that `take(name)` gives, when it is asked for with `[...]`."""

    def __init__(self, take: Callable[[str], torch.Tensor], name: str) -> None:
        self.take = take
        self.name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The tensor, or a part of it."""
        return self.take(self.name)[index]


def read_ahead(tensors: dict[str, OnDisk]) -> dict[str, Awaited]:
    """Tensors like `tensors`, each to be asked for once: the next are read while one is used.

    transformers does not read ahead where it quantizes, lest a model of 16 bits heap up on the GPU.
    Here it is AHEAD tensors, those that follow in the order in which transformers asks. On an H100
    a 7B was read in 3.1 s one by one and in 1.1 s with 4 ahead, and loaded into 4 bits in 1.5 s
    with 4, in 1.3 s with 8, and in 1.1 s with 16, which took 0.5 GiB more RAM than 8.
    """
    waiting = OrderedDict.fromkeys(in_loading_order(tensors))
    reading: dict[str, Future] = {}
    threads = ThreadPoolExecutor(AHEAD)
    lock = Lock()  # transformers may ask from several threads

    def take(name: str) -> torch.Tensor:
        with lock:
            waiting.pop(name, None)
            while waiting and len(reading) < AHEAD:
                following, _ = waiting.popitem(last=False)
                reading[following] = threads.submit(tensors[following].__getitem__, ...)
            future = reading.pop(name, None)
            if not waiting and not reading:
                threads.shutdown(wait=False)
        # asked for a second time, or out of turn: read now
        return tensors[name][...] if future is None else future.result()

    return {name: Awaited(take, name) for name in tensors}
