"""Writing a merged model one file at a time."""

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tabletune.chat.encoding import encode_all
from tabletune.chat.tokenizer import load_tokenizer_of_run, save_tokenizer
from tabletune.errors import StageError
from tabletune.merging.plan import MergePlan
from tabletune.merging.verification import verify_merge
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import archive, atomic_write, read_json, write_json
from tabletune.run.machine import peak_memory_gib
from tabletune.run.stage import Stage

WRITERS = 4  # files that are merged and written at the same time, where memory allows

# weights, what describes the base on the Hub, and what comes from the adapter
NOT_COPIED = re.compile(
    r".*\.(safetensors|bin|pth|pt|gguf|md|index\.json)|\..*"
    r"|(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|generation_config).*"
)


def merge_adapter(
    plan: MergePlan, stage: Stage, max_shard_gb: float = 1.0
) -> tuple[Path, dict[str, Any]]:
    """Write `merged/`, in files of at most `max_shard_gb` GB, and verify it.

    What was made of the same adapter with the same settings stays; what was made of another is
    archived. Where Google Drive has no room, the merged model is in `runs/`. Returns its folder and
    its report. Raises StageError if there is no room, or if the merged model is wrong.
    """
    weights = (plan.folder / "adapter_model.safetensors").read_bytes()
    inputs = {"adapter": hashlib.sha256(weights).hexdigest()}
    folders = [stage.folder]
    if str(stage.parameters["run_dir"]).startswith("drive:"):
        # a second place, for a Drive that is too small for a whole model
        folders.append(Path("runs") / stage.folder.name)
    for folder in folders:
        merged = folder / "merged"
        if merged.exists() and stage.is_done(inputs, [os.path.relpath(merged, stage.folder)]):
            return merged, read_json(merged / "merge_report.json", stage.name)
    tokenizer, stop_token_ids = load_tokenizer_of_run(plan.folder)
    rows = rows_to_compare(stage.folder, tokenizer, stop_token_ids)
    shards = split_torch_state_dict_into_shards(
        plan.tensors,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max(1, int(max_shard_gb * 1e9)),
    )
    target = check_room(plan, shards.filename_to_tensors.values(), folders)
    for folder in folders:
        if (folder / "merged").exists():
            # what was measured belongs to the merged model that it was measured on
            archive(folder, "merged", "evaluation", "baselines", "trust", "rating")
    with atomic_write(target / "merged") as partial_folder:
        partial_folder.mkdir()
        started = time.perf_counter()
        write_tensors(plan, partial_folder, shards)
        report = {
            "base_model": plan.base_model,
            "base_weights": plan.base_weights,
            "merged_modules": len(plan.adapted),
            "shards": len(shards.filename_to_tensors),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_rss_gib": peak_memory_gib()["host"],
        }
        write_model_settings(plan, partial_folder, tokenizer, stop_token_ids)
        report |= verify_merge(plan, partial_folder, rows)
        report["adapter_sha256"] = inputs["adapter"]
        write_json(partial_folder / "merge_report.json", report)
    output = os.path.relpath(target / "merged", stage.folder)
    stage.record(plan.provenance["dataset_fingerprint"], inputs, [output])
    return target / "merged", read_json(target / "merged" / "merge_report.json", stage.name)


def rows_to_compare(
    run: Path, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> list[list[int]]:
    """Token ids of two rows of the run's data set, of its test split where it has so many."""
    splits, _ = load_dataset_of_run(run)
    examples: list[dict] = []
    for name in ("test", "validation", "train"):
        if name in splits:
            # two rows are enough: a wrong weight shows in every token
            needed = min(2 - len(examples), len(splits[name]))
            examples += list(splits[name].select(range(needed)))
    encoded = encode_all(examples, tokenizer, stop_token_ids)
    return [row["input_ids"] for row in encoded]


def write_tensors(plan: MergePlan, folder: Path, shards: Any) -> None:
    """Write the merged tensors into safetensors files, with an index if there are several.

    Several files are written at the same time: while one waits for the disk, the next is merged.
    """
    if not plan.plain:
        plan.merge_by_peft()
    files = shards.filename_to_tensors
    threads = ThreadPoolExecutor(writers(plan, files.values()))
    try:
        writing = [
            threads.submit(write_file, plan, folder / file, names) for file, names in files.items()
        ]
        written = as_completed(writing)
        for future in tqdm(written, "merging", total=len(files), unit="file", file=sys.stdout):
            future.result()
    finally:
        # after an error, too, no thread goes on writing into a folder that is removed
        threads.shutdown(cancel_futures=True)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_file(plan: MergePlan, path: Path, names: list[str]) -> None:
    """Merge the tensors `names` and write them into one safetensors file."""
    tensors = {name: plan.merge(name) for name in names}
    save_file(tensors, path, metadata={"format": "pt"})


def writers(plan: MergePlan, shards: Collection[Iterable[str]]) -> int:
    """How many files to write at the same time: together they take half of the free RAM at most."""
    available = psutil.virtual_memory().available / 2**30
    fitting = int(available / 2 / plan.gib(shards))
    return max(1, min(WRITERS, len(shards), os.cpu_count() or 1, fitting))


def check_room(plan: MergePlan, shards: Collection[Iterable[str]], folders: list[Path]) -> Path:
    """The first of `folders` with room on its disk. Prints what merging takes.

    Raises StageError if there is not enough memory, or no room on any disk.
    """
    memory, available = plan.gib(shards), psutil.virtual_memory().available / 2**30
    together = memory * writers(plan, shards)
    sentence = f"merging takes {together:.1f} GiB of RAM, and {available:.1f} GiB are free"
    if not plan.plain:
        sentence += ": the adapter is more than plain LoRA, so PEFT merges it with the whole model"
        sentence += " in memory"
    print(sentence)
    if memory > available:
        raise StageError(
            f"Merging takes {memory:.1f} GiB of RAM, and {available:.1f} GiB are free. Lower "
            "max_shard_gb."
        )
    target = folders[0]
    # a Drive is shared with what else lies in it: at most half of what is free
    if plan.size > shutil.disk_usage(target).free / 2:
        target = folders[-1]
    if target != folders[0]:
        print(
            f"{plan.size / 2**30:.1f} GiB are too much for Google Drive: the merged model stays "
            f"here, in {target}."
        )
        target.mkdir(parents=True, exist_ok=True)
    # in MiB, since on a full disk GiB would print as 0.0
    needed, free = plan.size / 2**20, shutil.disk_usage(target).free / 2**20
    if needed > free:
        raise StageError(
            f"The merged model needs {needed:,.1f} MiB, and {target} has {free:,.1f}. Free some "
            "space."
        )
    return target


def write_model_settings(
    plan: MergePlan, folder: Path, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> None:
    """Write what belongs to a model beside its tensors.

    These are the base's config and processor, and the run's tokenizer and stop tokens. Settings for
    sampling that the base brought along stay only if it samples.
    """
    for path in plan.base.iterdir():
        if path.is_file() and not NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    # the merged weights are not in 4 bits any more, and the config must not say so
    if plan.statistics:
        config = read_json(folder / "config.json", plan.base_model)
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
        del config["quantization_config"]
        write_json(folder / "config.json", config)
    save_tokenizer(folder, tokenizer, stop_token_ids)
    generation = GenerationConfig()
    if (plan.base / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(plan.base)
    generation.update(
        eos_token_id=stop_token_ids,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # transformers warns of settings for sampling where nothing is sampled
    if not generation.do_sample:
        generation.update(temperature=None, top_p=None, top_k=None)
    generation.save_pretrained(folder)
