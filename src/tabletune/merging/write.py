"""Writing a merged model one file at a time."""

import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

import psutil
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig

from tabletune.chat.encoding import encode
from tabletune.chat.tokenizer import load_tokenizer_of_run, save_tokenizer
from tabletune.errors import StageError
from tabletune.merging.verification import verify_merge
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import read_json, set_aside, whole, write_json
from tabletune.run.machine import peak_memory_gib

NOT_COPIED = (
    re.compile(  # weights, what describes the base on the Hub, and what comes from the adapter
        r".*\.(safetensors|bin|pth|pt|gguf|md|index\.json)|\..*"
        r"|(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|generation_config).*"
    )
)


def merge_adapter(plan, stage, max_shard_gb=1.0):
    """Write `merged/`, in files of at most `max_shard_gb` GB, and prove it. Returns its folder and its report.

    What was made of the same adapter with the same settings stays; what was made of another is set aside. Where Google
    Drive has no room, the merged model is in `runs/`. Raises StageError if there is no room, or if the proof fails.
    """
    inputs = {
        "adapter": hashlib.sha256(
            (plan.folder / "adapter_model.safetensors").read_bytes()
        ).hexdigest()
    }
    on_drive = str(stage.parameters["run_dir"]).startswith("drive:")
    places = [stage.folder, *([Path("runs") / stage.folder.name] if on_drive else [])]
    for place in places:
        if (place / "merged").exists() and stage.is_done(
            inputs, [os.path.relpath(place / "merged", stage.folder)]
        ):
            return place / "merged", read_json(place / "merged" / "merge_report.json", stage.name)
    tokenizer, stops = load_tokenizer_of_run(plan.folder)
    rows = load_dataset_of_run(stage.folder)[0]["test"].select(range(2))
    rows = [encode(row, tokenizer, stops)["input_ids"] for row in rows]
    pattern, limit = "model{suffix}.safetensors", max(1, int(max_shard_gb * 1e9))
    split = split_torch_state_dict_into_shards(
        plan.tensors, filename_pattern=pattern, max_shard_size=limit
    )
    place = check_room(plan, split.filename_to_tensors.values(), places)
    for other in places:
        if (other / "merged").exists():
            set_aside(other, "merged", "evaluation", "trust")
    with whole(place / "merged") as folder:
        folder.mkdir()
        started = time.perf_counter()
        if not plan.plain:
            plan.merge_by_peft()
        for file, names in tqdm(
            split.filename_to_tensors.items(), "merging", unit="file", file=sys.stdout
        ):
            save_file(
                {name: plan.merge(name) for name in names}, folder / file, metadata={"format": "pt"}
            )
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
        seconds, gib = round(time.perf_counter() - started, 1), peak_memory_gib()["host"]
        write_settings(plan, folder, tokenizer, stops)
        report = {
            "base_model": plan.base_model,
            "base_weights": plan.base_weights,
            "merged_modules": len(plan.adapted),
        }
        report |= {
            "shards": len(split.filename_to_tensors),
            "dtype": str(plan.dtype).removeprefix("torch."),
        }
        report |= {"seconds": seconds, "peak_rss_gib": gib, **verify_merge(plan, folder, rows)}
        write_json(folder / "merge_report.json", report | {"adapter_sha256": inputs["adapter"]})
    output = os.path.relpath(place / "merged", stage.folder)
    stage.record(plan.provenance["dataset_fingerprint"], inputs, [output])
    return place / "merged", read_json(place / "merged" / "merge_report.json", stage.name)


def check_room(plan, shards, places):
    """The first of `places` with room on its disk. Says what merging takes; raises StageError if it is not there."""
    memory, room = plan.gib(shards), psutil.virtual_memory().available / 2**30
    way = (
        ""
        if plan.plain
        else ": the adapter is more than plain LoRA, so PEFT merges it with the whole model in memory"
    )
    print(f"merging takes {memory:.1f} GiB of RAM, and {room:.1f} GiB are free{way}")
    if memory > room:
        raise StageError(
            f"Merging takes {memory:.1f} GiB of RAM, and {room:.1f} GiB are free. Lower max_shard_gb."
        )
    place = places[-1] if plan.size > shutil.disk_usage(places[0]).free / 2 else places[0]
    if place != places[0]:
        print(
            f"{plan.size / 2**30:.1f} GiB are too much for Google Drive: the merged model stays here, in {place}."
        )
        place.mkdir(parents=True, exist_ok=True)
    needed, free = plan.size / 2**20, shutil.disk_usage(place).free / 2**20
    if needed > free:
        raise StageError(
            f"The merged model needs {needed:,.1f} MiB, and {place} has {free:,.1f}. Free some space."
        )
    return place


def write_settings(plan, folder, tokenizer, stops):
    """Write what belongs to a model beside its tensors: the base's config and processor, the run's tokenizer and stops.

    Settings for sampling that the base brought along stay only if it samples.
    """
    for path in plan.base.iterdir():
        if path.is_file() and not NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    if plan.parts:
        config = read_json(folder / "config.json", plan.base_model) | {
            "dtype": str(plan.dtype).removeprefix("torch.")
        }
        del config["quantization_config"]
        write_json(folder / "config.json", config)
    save_tokenizer(folder, tokenizer, stops)
    known = (plan.base / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(plan.base) if known else GenerationConfig()
    generation.update(
        eos_token_id=stops, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    if not generation.do_sample:
        generation.update(temperature=None, top_p=None, top_k=None)
    generation.save_pretrained(folder)
