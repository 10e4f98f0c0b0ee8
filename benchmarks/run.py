"""Training throughput of the profiles, of the notebook this series grew out of, and of TRL's and Unsloth's notebooks;
and the seconds of the whole job, from a table to a merged model and its answers, by stage.

    python benchmarks/run.py [--peer-python PYTHON] [--base-model FOLDER] [--only ROW]... [--out FOLDER]

The same base weights and the same examples for all; a process of its own for each row, and one a GPU in the rows that
take two. See README.md beside this file.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
WARM_UP, STEPS = 5, 20
# tokens of the 115 rows of medss19/home_remedies_dataset, prompt and template included
LENGTHS = [int(n) for n in (HERE / "lengths.txt").read_text().split()]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

SEED = {
    "precision": "fp16",
    "packing": False,
    "batch_size": 4,
    "min_steps": 1,
    "lora_dropout": 0.1,
    "learning_rate": 2e-4,
    "use_liger_kernel": False,
}
UNSLOTH = {"lora_r": 64, "targets": ATTENTION, "packing": True, "accumulate": 1, "max_length": 512}
UNSLOTH_NOTEBOOK = {
    "lora_r": 16,
    "targets": ALL_LINEAR,
    "packing": False,
    "accumulate": 4,
    "max_length": 2048,
}

# name: what runs it, the limit of GPU memory in GiB, and its settings; rows of more GPUs than there are are left out.
# Notebook 2 shards what does not fit, so for some rows it is told of so little room that the whole model would not.
ROWS = {
    "seed's settings": ("notebook", None, {"profile": "t4", **SEED}),
    "TRL's QLoRA notebook": ("trl", None, {}),
    "Unsloth's notebook": (
        "unsloth",
        None,
        {**UNSLOTH_NOTEBOOK, "batch": 2, "checkpointing": True},
    ),
    "Unsloth, packed 16 x 512": ("unsloth", None, {**UNSLOTH, "batch": 16, "checkpointing": False}),
    "t4 profile, 14.5 GiB, fp16": ("notebook", 14.5, {"profile": "t4", "precision": "fp16"}),
    "Unsloth 4 x 512, 14.5 GiB, fp16": (
        "unsloth",
        14.5,
        {**UNSLOTH, "batch": 4, "checkpointing": False, "fp16": True},
    ),
    "Unsloth 8 x 512, 14.5 GiB, fp16, its checkpointing": (
        "unsloth",
        14.5,
        {**UNSLOTH, "batch": 8, "checkpointing": True, "fp16": True},
    ),
    "a100 profile, 39 GiB": ("notebook", 39, {"profile": "a100"}),
    "Unsloth 8 x 512, 39 GiB": ("unsloth", 39, {**UNSLOTH, "batch": 8, "checkpointing": False}),
    "Unsloth 12 x 512, 39 GiB": ("unsloth", 39, {**UNSLOTH, "batch": 12, "checkpointing": False}),
    "Unsloth 16 x 512, 39 GiB, its checkpointing": (
        "unsloth",
        39,
        {**UNSLOTH, "batch": 16, "checkpointing": True},
    ),
    "a100 profile, 32 rows, no limit": ("notebook", None, {"profile": "a100", "batch_size": 32}),
    "a100 profile, twice 16 rows a step": (
        "notebook",
        None,
        {"profile": "a100", "gradient_accumulation_steps": 2},
    ),
    "a100 profile, 2 GPUs, 16 rows each": ("notebook", None, {"profile": "a100", "gpus": 2}),
    "a100 profile, 2 GPUs, 16 rows each, sharded": (
        "notebook",
        None,
        {"profile": "a100", "gpus": 2, "room": 29},
    ),
    "t4x2 profile, 2 GPUs, 2 rows each": (
        "notebook",
        None,
        {"profile": "kaggle_t4x2", "batch_size": 2, "gpus": 2},
    ),
    "t4x2 profile, 2 GPUs, 2 rows each, sharded": (
        "notebook",
        None,
        {"profile": "kaggle_t4x2", "batch_size": 2, "gpus": 2, "room": 4.5},
    ),
    "70b profile, 2 GPUs, 79 GiB": (
        "notebook",
        79,
        {"profile": "70b", "gpus": 2, "model": "70b", "room": 72},
    ),
}
# two more base models, each in the shape of its entry in models/
for title, model in {"Llama 3.1 8B": "llama-3.1-8b-instruct", "Qwen3 4B": "qwen3-4b"}.items():
    peer = {**UNSLOTH, "model": model, "batch": 8}
    ROWS |= {
        f"{title}, t4 profile, 14.5 GiB, fp16": (
            "notebook",
            14.5,
            {"profile": "t4", "precision": "fp16", "model": model},
        ),
        f"{title}, Unsloth 8 x 512, 14.5 GiB, fp16, its checkpointing": (
            "unsloth",
            14.5,
            {**peer, "checkpointing": True, "fp16": True},
        ),
        f"{title}, a100 profile, 39 GiB": ("notebook", 39, {"profile": "a100", "model": model}),
        f"{title}, Unsloth 8 x 512, 39 GiB": ("unsloth", 39, {**peer, "checkpointing": False}),
    }
ROWS["a100 profile, a row a step"] = ("notebook", None, {"profile": "a100", "batch_size": 1})

STAGES = ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate"]
# The whole job: who does it, the limit in GiB, and the settings. Others' begin with the data set that ours made.
JOBS = {
    "whole job, a100 profile, 39 GiB": ("notebooks", 39, {"profile": "a100"}),
    "whole job, Unsloth, 39 GiB": ("unsloth", 39, {"fp16": False}),
    "whole job, t4 profile, 14.5 GiB, fp16": (
        "notebooks",
        14.5,
        {"profile": "t4", "precision": "fp16"},
    ),
    "whole job, Unsloth, 14.5 GiB, fp16": ("unsloth", 14.5, {"fp16": True}),
    "whole job, TRL, 14.5 GiB": ("trl", 14.5, {}),
}


def make_base_model(folder, size):
    """Make a base model of random weights, with the tokenizer of the tiny profile, on the GPU.

    `size` is "7b" or "70b" for a Llama-2, or an entry of models/. They are stored in 16 bits. 70B would take 128 GiB on
    disk, so it is stored in 4 bits, in the way that FSDP can shard, and made one layer at a time.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    shapes = {
        "7b": {"intermediate_size": 11008, "num_hidden_layers": 32},
        "70b": {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    }
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(ROOT / ".cache" / "tiny-llama").save_pretrained(folder)
    if size in shapes:
        config = LlamaConfig(**shapes[size], max_position_embeddings=4096, dtype="float16")
    else:
        published = json.loads(
            (ROOT / "tests" / "model_configs" / f"{size}.json").read_text(encoding="utf-8")
        )
        config = AutoConfig.for_model(**published["config"])
    if size != "70b":
        torch.set_default_dtype(torch.float16 if size in shapes else torch.bfloat16)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, max_shard_size="5GB")
        return
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    files = {}
    for name, parameter in skeleton.named_parameters():
        files.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter.shape
    weight_map = {}
    for part, names in files.items():
        tensors = {}
        for name, shape in names.items():
            norm = len(shape) == 1
            weight = (torch.ones if norm else torch.randn)(
                shape, dtype=torch.float16, device="cuda"
            )
            tensors[name] = weight if norm else weight.mul_(config.initializer_range)
            if ".layers." in name and not norm:
                tensors[name], state = quantize_4bit(
                    weight, quant_type="nf4", compress_statistics=True, quant_storage=torch.float32
                )
                tensors |= {
                    f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()
                }
        weight_map |= dict.fromkeys(tensors, f"{part}.safetensors")
        save_file(tensors, Path(folder) / f"{part}.safetensors", metadata={"format": "pt"})
    (Path(folder) / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.float32,
    ).to_dict()
    config.save_pretrained(folder)


def make_dataset(run_dir, base_model, steps):
    """Make a run folder as notebook 1 leaves it: the upstream's lengths, the words of the bundled table."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    words = (ROOT / "data" / "home_remedies.csv").read_text(encoding="utf-8").split()
    sizes = [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
    rng = random.Random(0)

    def conversation(length):
        text, room = [], length - 30  # the prompt, the template, BOS and EOS
        while room > 0:
            i = rng.randrange(len(words))
            if sizes[i] <= room:
                text.append(words[i])
                room -= sizes[i]
        prompt = [
            {"role": "user", "content": "I am suffering from a cold. Please suggest a home remedy."}
        ]
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": " ".join(text)}]}

    count = steps * 32 * 512 // 150
    rows = [conversation(length) for length in rng.choices(LENGTHS, k=count)]
    splits = {"train": rows, "validation": rows[:4], "test": rows[:4]}
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part) for name, part in splits.items()}
    )
    splits.save_to_disk(Path(run_dir) / "dataset")
    (Path(run_dir) / "dataset" / "report.json").write_text('{"fingerprint": "benchmark"}')


def notebook_trainer(settings, base_model, run_dir, limit=None):
    """The trainer of notebook 2, made by its own cells, with a profile and settings on top.

    It plans with the memory that it will have, unless the settings tell it of less `room`.
    """
    import yaml

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import run_script

    profile = yaml.safe_load((ROOT / "profiles" / f"{settings['profile']}.yaml").read_text())
    profile |= {
        "min_steps": WARM_UP + STEPS,
        **settings,
        "base_model": str(base_model),
        "run_dir": str(run_dir),
    }
    limit_memory(settings.get("room", limit))
    trainer = run_script("02_finetune_qlora", before="## Train", **profile).trainer
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    return trainer


def token_ids(run_dir, base_model):
    """The same examples as ids, for those that have their own way to a trainer."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    train = datasets.load_from_disk(Path(run_dir) / "dataset")["train"]
    return train.map(
        lambda row: {
            "input_ids": tokenizer.apply_chat_template(
                row["prompt"] + row["completion"], return_dict=False
            )
        },
        remove_columns=train.column_names,
    )


def trl_trainer(settings, base_model, run_dir):
    """As in huggingface/trl, examples/notebooks/sft_trl_lora_qlora.ipynb."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(
        base_model,
        attn_implementation="sdpa",
        dtype=torch.float16,
        device_map={"": 0},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
        ),
    )
    arguments = SFTConfig(
        output_dir=str(run_dir),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        learning_rate=2e-4,
        optim="paged_adamw_8bit",
        max_length=1024,
        use_liger_kernel=True,
        activation_offloading=True,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=token_ids(run_dir, base_model),
        processing_class=AutoTokenizer.from_pretrained(base_model),
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules=ALL_LINEAR),
    )


def unsloth_trainer(settings, base_model, run_dir):
    """As in unslothai/notebooks, nb/Llama3.1_(8B)-Alpaca.ipynb, with these settings."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip, it patches what comes after
    import torch
    from trl import SFTConfig, SFTTrainer

    fp16 = settings.get("fp16", not is_bfloat16_supported())
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base_model),
        max_seq_length=settings["max_length"],
        dtype=torch.float16 if fp16 else torch.bfloat16,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings["lora_r"],
        target_modules=settings["targets"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if settings["checkpointing"] else False,
        random_state=3407,
    )
    arguments = SFTConfig(
        output_dir=str(run_dir),
        max_length=settings["max_length"],
        packing=settings["packing"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["accumulate"],
        warmup_steps=5,
        learning_rate=2e-4,
        optim="adamw_8bit",
        weight_decay=0.01,
        fp16=fp16,
        bf16=not fp16,
        save_strategy="no",
        report_to="none",
    )
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=token_ids(run_dir, base_model),
        args=arguments,
    )


def limit_memory(gib):
    """Let this process reserve so much of the GPU and no more; all of it, if `gib` is None."""
    import torch

    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole) if gib else 1.0)


def measure(row, base_model, run_dir):
    """Train for WARM_UP + STEPS steps. Returns tokens a second, seconds a step, peak GiB and skipped steps.

    Of several processes all get the same: the tokens of all, and the peak of the one that took most.
    """
    engine, limit, settings = ROWS[row]
    if settings.get("gpus", 1) > 1:  # as make does; PyTorch reads it when it is imported
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if engine == "notebook":
        trainer = notebook_trainer(settings, base_model, run_dir, limit)
    else:
        trainer = {"trl": trl_trainer, "unsloth": unsloth_trainer}[engine](
            settings, base_model, run_dir
        )
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from transformers import TrainerCallback

    limit_memory(limit)
    ends, tokens, skipped = [], [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(
                torch.cuda.Event(enable_timing=True)
            )  # waiting for the GPU here would slow it down
            ends[-1].record()
            skipped.append(trainer.accelerator.optimizer_step_was_skipped)

    collate = trainer.data_collator

    @wraps(collate)  # its attributes, too: ours is asked for the id of padding
    def counting(examples):
        tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    trainer.args.max_steps = WARM_UP + STEPS
    trainer.args.logging_steps = 5
    trainer.add_callback(Clock())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    each = trainer.args.gradient_accumulation_steps
    tokens = [sum(tokens[i : i + each]) for i in range(0, len(tokens), each)]
    tokens = [sum(step) for step in zip(*gather_object([tokens]), strict=False)]
    torch.cuda.synchronize()
    steps = [start.elapsed_time(end) / 1e3 for start, end in pairwise(ends)][WARM_UP - 1 :]
    losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    rates = [count / seconds for count, seconds in zip(tokens[WARM_UP:], steps, strict=False)]
    peaks = gather_object([(torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())])
    reserved, allocated = map(max, zip(*peaks, strict=True))
    PartialState().destroy_process_group()
    return {
        "tokens_per_second": round(statistics.median(rates)),
        "seconds_per_step": round(statistics.median(steps), 3),
        "tokens_per_step": round(statistics.mean(tokens[WARM_UP : WARM_UP + len(steps)])),
        "peak_gib": round(reserved / 2**30, 2),
        "allocated_gib": round(allocated / 2**30, 2),
        "steps": len(steps),
        "skipped_steps": sum(skipped),
        "loss": losses,
        "measured": now(),
        "packages": installed_packages(),
    }


def installed_packages():
    """The versions of the packages that make a difference, of those that are there."""
    names = [
        "torch",
        "transformers",
        "peft",
        "trl",
        "bitsandbytes",
        "liger-kernel",
        "unsloth",
        "xformers",
    ]
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now():
    """The date and the minute, as results of several runs can stand in one file."""
    return datetime.now(UTC).isoformat(timespec="minutes")


def peak_gib():
    """What PyTorch has reserved on the GPU at most."""
    import torch

    return round(torch.cuda.max_memory_reserved() / 2**30, 2)


def matrix_speed():
    """Operations a second in bf16 matrix products of 8192 x 8192 x 8192, the best of 20."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    best = 0
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * 8192**3 / start.elapsed_time(end) * 1e3)
    return best


def operations_per_token(base_model):
    """The operations that training a token cannot do without, recomputation and the adapter left out.

    They are 4 for each weight of the linear layers, output layer included: 2 in the forward pass, 2 for the gradient of
    its input; frozen weights have none.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base_model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def child(command, folder):
    """What a process of a row or a stage found, or {"error": why it found nothing}; `log.txt` has all that it said."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        print(*command, done.stdout, done.stderr, sep="\n", file=log)
    found = [
        line.removeprefix("RESULT ")
        for line in done.stdout.splitlines()
        if line.startswith("RESULT ")
    ]
    if found:
        return json.loads(found[0])
    return {
        "error": "out of memory"
        if "OutOfMemoryError" in done.stderr
        else f"failed: {done.stderr.strip()[-300:]}"
    }


def do_job(command, folder, stages):
    """The whole job in a folder: the seconds of each part, and the peak GiB.

    What starts a process, Python and imports, counts for its first part, and so does what ends it. Merged models are
    deleted at the end, since those of all jobs would fill a disk.
    """
    folder.mkdir(exist_ok=True)
    if STAGES[0] in stages:  # others' go on from the data set that ours made
        shutil.rmtree(folder / "run", ignore_errors=True)
    seconds, peak = {}, 0
    for stage in stages:
        begun = time.perf_counter()
        found = child([*command, "--run-dir", str(folder / "run"), "--stage", stage], folder)
        if "error" in found:
            return found
        parts = found.pop("seconds", {stage: 0})
        parts[next(iter(parts))] += time.perf_counter() - begun - sum(parts.values())
        seconds |= {part: round(value, 1) for part, value in parts.items()}
        peak = max(peak, found["peak_gib"])
    for merged in (folder / "run").glob("**/merged"):
        shutil.rmtree(merged)
    return {
        "seconds": seconds,
        "all": round(sum(seconds.values()), 1),
        **found,
        "peak_gib": peak,
        "measured": now(),
    }


def middle(runs):
    """Of several runs of a job the one with the median of the seconds, and the seconds of all."""
    done = sorted((run for run in runs if "error" not in run), key=lambda run: run["all"])
    return {**done[len(done) // 2], "runs": [run["all"] for run in done]} if done else runs[-1]


def table_of_jobs(jobs):
    """The whole jobs as a Markdown table, in seconds."""
    lines = ["| the whole job, seconds | format | fine-tune | merge | evaluate | all | peak GiB |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for job, result in jobs.items():
        if "error" in result:
            lines.append(f"| {job} | {result['error']} | | | | | |")
        else:
            parts = [
                f"{result['seconds'][stage]:.0f}" if stage in result["seconds"] else ""
                for stage in STAGES
            ]
            name, runs = job.removeprefix("whole job, "), result.get("runs", [0])
            spread = f" ({runs[0]:.0f} to {runs[-1]:.0f})" if len(runs) > 1 else ""
            lines.append(
                f"| {name} | {' | '.join(parts)} | {result['all']:.0f}{spread} | {result['peak_gib']:.1f} |"
            )
    return "\n".join(lines)


def table(results):
    """The results as a Markdown table."""
    lines = [
        "| row | tokens/s | s/step | tokens/step | peak GiB | of the limit |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row, result in results.items():
        if "error" in result:
            lines.append(f"| {row} | {result['error']} | | | | |")
        else:
            lines.append(
                f"| {row} | {result['tokens_per_second']:,} | {result['seconds_per_step']:.3f} | "
                f"{result['tokens_per_step']:,} | {result['peak_gib']:.1f} | "
                f"{result['of_limit']:.0%} |"
            )
    return "\n".join(lines)


def plot(results, path):
    """Horizontal bars of tokens a second on one GPU, ours darker."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {row: r["tokens_per_second"] for row, r in results.items() if "tokens_per_second" in r}
    rows = {row: rate for row, rate in rows.items() if ROWS[row][2].get("gpus", 1) == 1}
    rows = {row: rate for row, rate in rows.items() if "model" not in ROWS[row][2]}
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1), layout="constrained")
    colours = ["0.35" if "profile" in row else "0.8" for row in rows]
    bars = axes.barh(list(rows), list(rows.values()), color=colours, edgecolor="black")
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="tokens a second (padding not counted)", title="QLoRA of a 7B model on one GPU")
    figure.savefig(path, dpi=110)


def plot_jobs(jobs, path):
    """Stacked horizontal bars of the seconds of each part of the whole job."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = {
        job.removeprefix("whole job, "): r["seconds"] for job, r in jobs.items() if "seconds" in r
    }
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(done) + 1.4), layout="constrained")
    left = dict.fromkeys(done, 0)
    for stage, colour in zip(STAGES, ["0.95", "0.4", "0.8", "0.6"], strict=True):
        widths = [parts.get(stage, 0) for parts in done.values()]
        axes.barh(
            list(done),
            widths,
            left=list(left.values()),
            color=colour,
            edgecolor="black",
            label=stage,
        )
        left = {job: left[job] + width for job, width in zip(done, widths, strict=True)}
    for row, total in enumerate(left.values()):
        axes.text(total, row, f" {total:.0f} s", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="seconds", title="The whole job with a 7B model on one GPU")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
    figure.savefig(path, dpi=110)


def main():
    """Run every row in a process of its own, print the tables as they grow, write results.json and the two plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    absolute = {
        "type": lambda path: str(Path(path).absolute())
    }  # the rows run in a folder of their own
    parser.add_argument(
        "--base-model",
        **absolute,
        help="a folder with a 7B model; random weights are made if it is left out",
    )
    parser.add_argument(
        "--peer-python",
        **absolute,
        help="Python of an environment with Unsloth; its rows are left out without",
    )
    parser.add_argument("--only", action="append", metavar="ROW", choices=[*ROWS, *JOBS],
                        help="a row to run; may be repeated, a job also to be run again, of which the median counts. "
                        "What results.json has of others stays")  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE)
    for name in ("--row", "--run-dir", "--stage"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row in JOBS:
        import whole_job

        doer, limit, settings = JOBS[options.row]
        limit_memory(limit)
        part = {
            "notebooks": whole_job.notebook,
            "unsloth": whole_job.unsloth,
            "trl": whole_job.trl,
        }[doer]
        print(
            "RESULT",
            json.dumps(part(options.stage, settings, options.base_model, options.run_dir)),
            flush=True,
        )
        os._exit(0)
    if options.row:
        result = measure(options.row, options.base_model, options.run_dir)
        if os.environ.get("RANK", "0") == "0":
            print("RESULT", json.dumps(result), flush=True)
        os._exit(0)  # worker threads of a framework would hold the process up
    import torch

    if not torch.cuda.is_available():
        sys.exit("The benchmark needs an NVIDIA GPU; there is none here.")
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-"))
    base_models = {"7b": options.base_model}

    def base_model_of(size):
        """The folder of a base model, made when it is first asked for, by a process that leaves the GPU as it was."""
        if not base_models.get(size):
            base_models[size] = str(scratch / f"random-{size}")
            context = multiprocessing.get_context("spawn")
            maker = context.Process(target=make_base_model, args=(base_models[size], size))
            maker.start()
            maker.join()
            if maker.exitcode:
                sys.exit(f"The base model {size} could not be made.")
        return base_models[size]

    wanted = options.only or [*ROWS, *JOBS]
    if not set(wanted) <= JOBS.keys():
        make_dataset(scratch, base_model_of("7b"), WARM_UP + STEPS)
    machine = {"gpu": torch.cuda.get_device_name(), "bf16_flops": matrix_speed()}
    torch.cuda.empty_cache()
    print(f"{machine['gpu']}: {machine['bf16_flops'] / 1e12:,.0f} TFLOP/s in bf16\n", flush=True)
    file = options.out / "results.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if options.only and file.exists() else {}
    results, jobs, runs = kept.get("rows", {}), kept.get("jobs", {}), {}

    def keep():
        ordered = {row: results[row] for row in ROWS if row in results}
        in_order = {job: jobs[job] for job in JOBS if job in jobs}
        file.write_text(json.dumps({**machine, "rows": ordered, "jobs": in_order}, indent=2) + "\n")
        return ordered, in_order

    for row in wanted:
        engine, _, settings = (ROWS | JOBS)[row]
        gpus = settings.get("gpus", 1)
        python = options.peer_python if engine == "unsloth" else sys.executable
        if python is None or gpus > torch.cuda.device_count():
            continue
        base_model = base_model_of(settings.get("model", "7b"))
        command = [python, __file__, "--row", row, "--base-model", base_model]
        if row in JOBS:
            found = do_job(
                command, scratch / str(JOBS[row][1]), STAGES if engine == "notebooks" else [engine]
            )
            runs.setdefault(row, []).append(found)
            jobs[row] = middle(runs[row])
            keep()
            print(table_of_jobs({row: found}).splitlines()[-1], flush=True)
            continue
        command += ["--run-dir", str(scratch)]
        if gpus > 1:
            launch = [python, "-m", "accelerate.commands.launch", "--num_processes", str(gpus)]
            command = [
                *launch,
                "--config_file",
                str(ROOT / "profiles" / "accelerate" / "gpus.yaml"),
                *command[1:],
            ]
        results[row] = child(command, scratch)
        if "error" not in results[row]:
            arithmetic = results[row]["tokens_per_second"] * operations_per_token(base_model)
            results[row]["of_limit"] = round(arithmetic / machine["bf16_flops"] / gpus, 4)
        keep()
        print(table({row: results[row]}).splitlines()[-1], flush=True)
    results, jobs = keep()
    print("\n" + table(results) + "\n\n" + table_of_jobs(jobs))
    versions = {row: r["packages"] for row, r in (results | jobs).items() if "packages" in r}
    for packages in {json.dumps(p): p for p in versions.values()}.values():
        print("\n" + ", ".join(f"{name} {number}" for name, number in packages.items()))
    plot(results, options.out / "throughput.png")
    plot_jobs(jobs, options.out / "whole_job.png")


if __name__ == "__main__":
    main()
