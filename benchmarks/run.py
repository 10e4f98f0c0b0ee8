"""Training throughput of the profiles, of the notebook this series grew out of, and of TRL's and Unsloth's notebooks.

    python benchmarks/run.py [--peer-python PYTHON] [--base-model FOLDER] [--only ROW]... [--out FOLDER]

One GPU, one process a row, the same base weights and the same examples for all. See README.md beside this file.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
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
UNSLOTH_NOTEBOOK = {"lora_r": 16, "targets": ALL_LINEAR, "packing": False, "accumulate": 4, "max_length": 2048}

# name: what runs it, the limit of GPU memory in GiB, and its settings
ROWS = {
    "seed's settings": ("notebook", None, {"profile": "t4", **SEED}),
    "TRL's QLoRA notebook": ("trl", None, {}),
    "Unsloth's notebook": ("unsloth", None, {**UNSLOTH_NOTEBOOK, "batch": 2, "checkpointing": True}),
    "Unsloth, packed 16 x 512": ("unsloth", None, {**UNSLOTH, "batch": 16, "checkpointing": False}),
    "t4 profile, 14.5 GiB, fp16": ("notebook", 14.5, {"profile": "t4", "precision": "fp16"}),
    "Unsloth 4 x 512, 14.5 GiB, fp16": ("unsloth", 14.5, {**UNSLOTH, "batch": 4, "checkpointing": False, "fp16": True}),
    "Unsloth 8 x 512, 14.5 GiB, fp16, its checkpointing": (
        "unsloth",
        14.5,
        {**UNSLOTH, "batch": 8, "checkpointing": True, "fp16": True},
    ),
    "a100 profile, 39 GiB": ("notebook", 39, {"profile": "a100"}),
    "Unsloth 8 x 512, 39 GiB": ("unsloth", 39, {**UNSLOTH, "batch": 8, "checkpointing": False}),
    "Unsloth 12 x 512, 39 GiB": ("unsloth", 39, {**UNSLOTH, "batch": 12, "checkpointing": False}),
    "Unsloth 16 x 512, 39 GiB, its checkpointing": ("unsloth", 39, {**UNSLOTH, "batch": 16, "checkpointing": True}),
    "a100 profile, 32 rows, no limit": ("notebook", None, {"profile": "a100", "batch_size": 32}),
}


def make_base_model(folder):
    """Make a Llama-2-7B of random weights in fp16, with the tokenizer of the tiny profile, on the GPU."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(intermediate_size=11008, num_hidden_layers=32, max_position_embeddings=4096, dtype="float16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(ROOT / ".cache" / "tiny-llama").save_pretrained(folder)


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
        prompt = [{"role": "user", "content": "I am suffering from a cold. Please suggest a home remedy."}]
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": " ".join(text)}]}

    count = steps * 32 * 512 // 150
    rows = [conversation(length) for length in rng.choices(LENGTHS, k=count)]
    splits = {"train": rows, "validation": rows[:4], "test": rows[:4]}
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()})
    splits.save_to_disk(Path(run_dir) / "dataset")
    (Path(run_dir) / "dataset" / "report.json").write_text('{"fingerprint": "benchmark"}')


def notebook_trainer(settings, base_model, run_dir):
    """The trainer of notebook 2, made by its own cells, with a profile and settings on top."""
    import yaml

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import run_script

    profile = yaml.safe_load((ROOT / "profiles" / f"{settings['profile']}.yaml").read_text())
    profile |= {"min_steps": WARM_UP + STEPS, **settings, "base_model": str(base_model), "run_dir": str(run_dir)}
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
        lambda row: {"input_ids": tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)},
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
        logging_steps=1,
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
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    return SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=token_ids(run_dir, base_model), args=arguments
    )


def measure(row, base_model, run_dir):
    """Train for WARM_UP + STEPS steps. Returns tokens a second, seconds a step, peak GiB and skipped steps."""
    engine, limit, settings = ROWS[row]
    trainer = {"notebook": notebook_trainer, "trl": trl_trainer, "unsloth": unsloth_trainer}[engine](
        settings, base_model, run_dir
    )
    import torch
    from transformers import TrainerCallback

    if limit:
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    times, tokens, skipped = [], [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            skipped.append(trainer.accelerator.optimizer_step_was_skipped)

    collate = trainer.data_collator

    def counting(examples):
        tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    trainer.args.max_steps = WARM_UP + STEPS
    trainer.add_callback(Clock())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    each = trainer.args.gradient_accumulation_steps
    tokens = [sum(tokens[i : i + each]) for i in range(0, len(tokens), each)]
    steps = [b - a for a, b in pairwise(times)][WARM_UP - 1 :]
    rates = [count / seconds for count, seconds in zip(tokens[WARM_UP:], steps, strict=False)]
    packages = ["torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "unsloth", "xformers"]
    return {
        "tokens_per_second": round(statistics.median(rates)),
        "seconds_per_step": round(statistics.median(steps), 3),
        "tokens_per_step": round(statistics.mean(tokens[WARM_UP : WARM_UP + len(steps)])),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1),
        "steps": len(steps),
        "skipped_steps": sum(skipped),
        "loss": [round(entry["loss"], 2) for entry in trainer.state.log_history if "loss" in entry][
            :: STEPS + WARM_UP - 1
        ],
        "packages": {name: found for name in packages if (found := installed(name))},
    }


def installed(name):
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def arithmetic_limit(base_model):
    """Measure the speed of bf16 matrix products and the tokens a second that they alone allow. Returns both.

    A token takes 4 operations a weight of the linear layers, output layer included: 2 in the forward pass, 2 for the
    gradient of its input; frozen weights have none. The products are 8192 x 8192 x 8192, the best of 20 counts.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    best = 0
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * 8192**3 / start.elapsed_time(end) * 1e3)
    return best, best / (4 * weights)


def table(results, limit):
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
                f"{result['tokens_per_second'] / limit:.0%} |"
            )
    return "\n".join(lines)


def plot(results, path):
    """Horizontal bars of tokens a second, ours darker."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {row: r["tokens_per_second"] for row, r in results.items() if "tokens_per_second" in r}
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1), layout="constrained")
    colours = ["0.35" if "profile" in row else "0.8" for row in rows]
    bars = axes.barh(list(rows), list(rows.values()), color=colours, edgecolor="black")
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="tokens a second (padding not counted)", title="QLoRA of a 7B model on one GPU")
    figure.savefig(path, dpi=110)


def main():
    """Run every row in a process of its own, print the table as it grows, write results.json and throughput.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    absolute = {"type": lambda path: str(Path(path).absolute())}  # the rows run in a folder of their own
    parser.add_argument(
        "--base-model", **absolute, help="a folder with a 7B model; random weights are made if it is left out"
    )
    parser.add_argument(
        "--peer-python", **absolute, help="Python of an environment with Unsloth; its rows are left out without"
    )
    parser.add_argument("--only", action="append", choices=ROWS, metavar="ROW", help="a row to run; may be repeated")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print("RESULT", json.dumps(measure(options.row, options.base_model, options.run_dir)), flush=True)
        os._exit(0)  # worker threads of a framework would hold the process up
    import torch

    if not torch.cuda.is_available():
        sys.exit("The benchmark needs an NVIDIA GPU; there is none here.")
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-"))
    base_model = options.base_model or scratch / "llama-2-7b-random"
    if not options.base_model:
        make_base_model(base_model)
    make_dataset(scratch, base_model, WARM_UP + STEPS)
    peak, limit = arithmetic_limit(base_model)
    torch.cuda.empty_cache()
    print(
        f"{torch.cuda.get_device_name()}: {peak / 1e12:,.0f} TFLOP/s in bf16, at most {limit:,.0f} tokens/s\n",
        flush=True,
    )
    machine = {"gpu": torch.cuda.get_device_name(), "bf16_flops": peak, "limit_tokens_per_second": limit}
    results = {}
    for row in options.only or ROWS:
        python = options.peer_python if ROWS[row][0] == "unsloth" else sys.executable
        if python is None:
            continue
        command = [python, __file__, "--row", row, "--base-model", str(base_model), "--run-dir", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        failed = "out of memory" if "OutOfMemoryError" in done.stderr else f"failed: {done.stderr.strip()[-300:]}"
        results[row] = json.loads(found[0]) if found else {"error": failed}
        (options.out / "results.json").write_text(json.dumps({**machine, "rows": results}, indent=2) + "\n")
        print(table({row: results[row]}, limit).splitlines()[-1], flush=True)
    print("\n" + table(results, limit))
    versions = {row: r["packages"] for row, r in results.items() if "packages" in r}
    for packages in {json.dumps(p): p for p in versions.values()}.values():
        print("\n" + ", ".join(f"{name} {number}" for name, number in packages.items()))
    plot(results, options.out / "throughput.png")


if __name__ == "__main__":
    main()
