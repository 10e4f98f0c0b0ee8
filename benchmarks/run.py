"""Training throughput of the profiles and of others' notebooks, and the seconds of the whole job.

    python benchmarks/run.py [--peer-python PYTHON] [--base-model FOLDER] [--only ROW]...

The whole job goes from a table to a merged model and its answers. All rows have the same base
weights and the same examples, and a process of their own; one a GPU in the rows that take two. See
README.md beside this file.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import wraps
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for its neighbours, from any folder

from common import (
    ALL_LINEAR,
    ATTENTION,
    HERE,
    ROOT,
    installed_packages,
    limit_memory,
    make_dataset,
    now,
)
from random_models import make_base_model
from trainers import notebook_trainer, trl_trainer, unsloth_trainer
from whole_job import STAGES, run_all

WARM_UP, STEPS = 5, 20

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

# name: what runs it, the limit of GPU memory in GiB, and its settings. Rows of more GPUs than the
# machine has are left out. Notebook 2 shards what does not fit, so for some rows it is told of less
# memory than the whole model takes.
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
    "a100 profile, 2 GPUs, 16 rows each, two times 8": (
        "notebook",
        None,
        {"profile": "a100", "gpus": 2, "batch_size": 8, "gradient_accumulation_steps": 2},
    ),
    "a100 profile, 2 GPUs, 16 rows each, sharded": (
        "notebook",
        None,
        # "auto" would take the rows in parts, with which a whole copy fits
        {"profile": "a100", "gpus": 2, "batch_size": 16, "room": 29},
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
# adapters on all linear layers, for both sides
for rank in (16, 64):
    all_linear = {"lora_target_modules": "all-linear", "lora_r": rank}
    peer = {**UNSLOTH, "targets": ALL_LINEAR, "lora_r": rank}
    ROWS |= {
        f"a100 profile, 39 GiB, all-linear r {rank}": (
            "notebook",
            39,
            {"profile": "a100", **all_linear},
        ),
        f"Unsloth 12 x 512, 39 GiB, all-linear r {rank}": (
            "unsloth",
            39,
            {**peer, "batch": 12, "checkpointing": False},
        ),
        f"t4 profile, 14.5 GiB, fp16, all-linear r {rank}": (
            "notebook",
            14.5,
            {"profile": "t4", "precision": "fp16", **all_linear},
        ),
        f"Unsloth 8 x 512, 14.5 GiB, fp16, its checkpointing, all-linear r {rank}": (
            "unsloth",
            14.5,
            {**peer, "batch": 8, "checkpointing": True, "fp16": True},
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

# The whole job: who does it, the limit in GiB, and the settings. Others' jobs begin with the data
# set that ours has made.
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
    "whole job, a100 profile, 39 GiB, all-linear r 16": (
        "notebooks",
        39,
        {"profile": "a100", "lora_target_modules": "all-linear", "lora_r": 16},
    ),
    "whole job, Unsloth, 39 GiB, all-linear r 16": (
        "unsloth",
        39,
        {"fp16": False, "targets": ALL_LINEAR, "lora_r": 16},
    ),
    "whole job, t4 profile, 14.5 GiB, fp16, all-linear r 16": (
        "notebooks",
        14.5,
        {
            "profile": "t4",
            "precision": "fp16",
            "lora_target_modules": "all-linear",
            "lora_r": 16,
        },
    ),
    "whole job, Unsloth, 14.5 GiB, fp16, all-linear r 16": (
        "unsloth",
        14.5,
        {"fp16": True, "targets": ALL_LINEAR, "lora_r": 16},
    ),
}


def measure(row, base_model, run_dir):
    """Train for WARM_UP + STEPS steps. Returns tokens a second, seconds a step, peak GiB and more.

    Each of several processes returns the same: the tokens of all, and the largest peak.
    """
    engine, limit, settings = ROWS[row]
    if settings.get("gpus", 1) > 1:  # as make does; PyTorch reads it when it is imported
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    expected = None
    if engine == "notebook":
        settings = {"min_steps": WARM_UP + STEPS, **settings}
        trainer, expected = notebook_trainer(settings, base_model, run_dir, limit)
    else:
        make_trainer = {"trl": trl_trainer, "unsloth": unsloth_trainer}[engine]
        trainer = make_trainer(settings, base_model, run_dir)
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
        "expected_gib": expected and round(expected, 2),
        "allocated_gib": round(allocated / 2**30, 2),
        "steps": len(steps),
        "skipped_steps": sum(skipped),
        "loss": losses,
        "measured": now(),
        "packages": installed_packages(),
    }


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
    """The operations that training a token needs, without recomputation and the adapter.

    They are 4 for each weight of the linear layers, output layer included: 2 in the forward pass,
    and 2 for the gradient of its input. Frozen weights have no gradient.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base_model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def child(command, folder):
    """The result of a process that measures a row or a stage, or {"error": why it has none}.

    `log.txt` in the folder has all its output.
    """
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


def do_job(command, folder):
    """Others' whole job in a folder: the seconds of each part, and the peak GiB.

    The process's start and end count for its first part.
    """
    begun = time.perf_counter()
    result = child([*command, "--run-dir", str(folder / "run")], folder)
    if "error" not in result:
        seconds = result["seconds"]
        seconds[next(iter(seconds))] += time.perf_counter() - begun - sum(seconds.values())
    return result


def do_our_job(settings, limit, base_model, folder):
    """Our whole job in a folder: the seconds of each notebook, and the peak GiB."""
    import torch

    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    share = min(1.0, limit / total)
    return run_all(settings, share, base_model, folder / "run", folder / "run_all.txt")


def finish_job(result, folder):
    """The result of a job with the sum of its seconds.

    Merged models are deleted, since those of all jobs would fill a disk.
    """
    for merged in (folder / "run").glob("**/merged"):
        shutil.rmtree(merged)
    if "error" in result:
        return result
    seconds = {part: round(value, 1) for part, value in result["seconds"].items()}
    total = round(sum(seconds.values()), 1)
    return {**result, "seconds": seconds, "all": total, "measured": now()}


def middle(runs, key):
    """Of several runs the one with the median of `key`, and the values of all as `runs`."""
    done = sorted((run for run in runs if "error" not in run), key=lambda run: run[key])
    if not done:
        return runs[-1]
    return {**done[len(done) // 2], "runs": [run[key] for run in done]}


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
            total = f"{result['all']:.0f}{spread}"
            lines.append(f"| {name} | {' | '.join(parts)} | {total} | {result['peak_gib']:.1f} |")
    return "\n".join(lines)


def table(results):
    """The results as a Markdown table."""
    lines = [
        "| row | tokens/s | peak GiB | of the limit |",
        "|---|--:|--:|--:|",
    ]
    for row, result in results.items():
        if "error" in result:
            lines.append(f"| {row} | {result['error']} | | |")
            continue
        peak = f"{result['peak_gib']:.1f}"
        if result.get("expected_gib"):
            peak += f" ({result['expected_gib']:.1f} expected)"
        rate = f"{result['tokens_per_second']:,}"
        if len(result.get("runs", [])) > 1:
            rate += f" ({result['runs'][0]:,} to {result['runs'][-1]:,})"
        lines.append(f"| {row} | {rate} | {peak} | {result['of_limit']:.0%} |")
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
    axes.margins(x=0.18)  # room for the figure of the longest bar
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
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(done) + 1.7), layout="constrained")
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
    figure.legend(ncols=4, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=110)


def read_options():
    """The options of the command line, and those of a process that measures one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # absolute paths, as the rows run in a folder of their own
    parser.add_argument(
        "--base-model",
        type=lambda path: str(Path(path).absolute()),
        help="a folder with a 7B model; random weights are made if it is left out",
    )
    parser.add_argument(
        "--peer-python",
        type=lambda path: str(Path(path).absolute()),
        help="Python of an environment with Unsloth; its rows are left out without",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="ROW",
        choices=[*ROWS, *JOBS],
        help="a row to run; may be repeated. What results.json has of other rows stays",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="how often to run each row, all in turn; the run with the median counts",
    )
    parser.add_argument("--out", type=Path, default=HERE)
    for name in ("--row", "--run-dir"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_here(options):
    """Measure the row or the part of a job that this process was started for, and print it."""
    if options.row in JOBS:
        import whole_job

        doer, limit, settings = JOBS[options.row]
        limit_memory(limit)
        parts = {"unsloth": whole_job.unsloth, "trl": whole_job.trl}
        result = parts[doer](settings, options.base_model, options.run_dir)
    else:
        result = measure(options.row, options.base_model, options.run_dir)
    if os.environ.get("RANK", "0") == "0":
        print("RESULT", json.dumps(result), flush=True)
    os._exit(0)  # worker threads of a framework would keep the process alive


class BaseModels:
    """The base models of random weights. Each is made when a row first needs it."""

    def __init__(self, folder, base_model):
        self.folder = folder
        self.models = {"7b": base_model} if base_model else {}

    def path(self, size):
        """The folder of a model, made by a process that leaves the GPU as it was."""
        if size not in self.models:
            target = str(self.folder / f"random-{size}")
            context = multiprocessing.get_context("spawn")
            maker = context.Process(target=make_base_model, args=(target, size))
            maker.start()
            maker.join()
            if maker.exitcode:
                sys.exit(f"The base model {size} could not be made.")
            self.models[size] = target
        return self.models[size]


class Results:
    """What was measured, in results.json after each row."""

    def __init__(self, options, machine):
        self.machine = machine
        self.file = options.out / "results.json"
        stored = {}
        if options.only and self.file.exists():
            stored = json.loads(self.file.read_text(encoding="utf-8"))
        self.rows = stored.get("rows", {})
        self.jobs = stored.get("jobs", {})
        self.runs = {}  # of each row and job, those of today

    def add_row(self, row, result):
        """Store the median run of a row, and print this one."""
        self.runs.setdefault(row, []).append(result)
        self.rows[row] = middle(self.runs[row], "tokens_per_second")
        self.write()
        print(table({row: result}).splitlines()[-1], flush=True)

    def add_job(self, job, result):
        """Store the median run of a job, and print this one."""
        self.runs.setdefault(job, []).append(result)
        self.jobs[job] = middle(self.runs[job], "all")
        self.write()
        print(table_of_jobs({job: result}).splitlines()[-1], flush=True)

    def write(self):
        """Write results.json, rows and jobs in the order of ROWS and JOBS."""
        self.rows = {row: self.rows[row] for row in ROWS if row in self.rows}
        self.jobs = {job: self.jobs[job] for job in JOBS if job in self.jobs}
        content = {**self.machine, "rows": self.rows, "jobs": self.jobs}
        self.file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def launched(command, gpus):
    """The command of a row, in a process for each of its GPUs."""
    if gpus == 1:
        return command
    config = ROOT / "profiles" / "accelerate" / "gpus.yaml"
    launch = [command[0], "-m", "accelerate.commands.launch", "--num_processes", str(gpus)]
    return [*launch, "--config_file", str(config), *command[1:]]


def main():
    """Run every row in a process of its own; print the tables, write results.json and two plots."""
    options = read_options()
    if options.row:
        measure_here(options)
    import torch

    if not torch.cuda.is_available():
        sys.exit("The benchmark needs an NVIDIA GPU; there is none here.")
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-"))
    base_models = BaseModels(scratch, options.base_model)
    wanted = options.only or [*ROWS, *JOBS]
    if not set(wanted) <= JOBS.keys():
        make_dataset(scratch, base_models.path("7b"), WARM_UP + STEPS)
    machine = {"gpu": torch.cuda.get_device_name(), "bf16_flops": matrix_speed()}
    torch.cuda.empty_cache()
    print(f"{machine['gpu']}: {machine['bf16_flops'] / 1e12:,.0f} TFLOP/s in bf16\n", flush=True)
    results = Results(options, machine)
    for row in wanted * options.runs:
        engine, limit, settings = (ROWS | JOBS)[row]
        gpus = settings.get("gpus", 1)
        python = options.peer_python if engine == "unsloth" else sys.executable
        if python is None or gpus > torch.cuda.device_count():
            continue
        base_model = base_models.path(settings.get("model", "7b"))
        command = [python, __file__, "--row", row, "--base-model", base_model]
        if row in JOBS:
            folder = scratch / str(limit)  # others' begin with the data set that ours has made
            if engine == "notebooks":
                result = do_our_job(settings, limit, base_model, folder)
            else:
                result = do_job(command, folder)
            results.add_job(row, finish_job(result, folder))
            continue
        result = child(launched([*command, "--run-dir", str(scratch)], gpus), scratch)
        if "error" not in result:
            arithmetic = result["tokens_per_second"] * operations_per_token(base_model)
            result["of_limit"] = round(arithmetic / machine["bf16_flops"] / gpus, 4)
        results.add_row(row, result)
    results.write()
    print("\n" + table(results.rows) + "\n\n" + table_of_jobs(results.jobs))
    measured = [*results.rows.values(), *results.jobs.values()]
    versions = [result["packages"] for result in measured if "packages" in result]
    for packages in {json.dumps(p): p for p in versions}.values():
        print("\n" + ", ".join(f"{name} {number}" for name, number in packages.items()))
    plot(results.rows, options.out / "throughput.png")
    plot_jobs(results.jobs, options.out / "whole_job.png")


if __name__ == "__main__":
    main()
