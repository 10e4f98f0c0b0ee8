"""The whole job: notebooks 1 to 4 by one command, as `make run-all`, or Unsloth's or TRL's way.

The bundled table and a base model go in. An adapter trained for one epoch, the answers to the
questions of the test split by base and adapter, and a merged model in 16 bits come out. `run.py`
starts the others' and takes the time, Python's start and imports included.
"""

import gc
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from common import ATTENTION, ROOT, installed_packages, peak_gib, token_ids
from trainers import trl_trainer

STAGES = ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate"]


def run_all_command(settings, base_model, run_dir):
    """The command that runs notebooks 1 to 4 with a profile and settings on top."""
    parameters = {name: value for name, value in settings.items() if name != "profile"}
    parameters["base_model"] = str(base_model)
    parameters["dataset"] = str(ROOT / "data" / "home_remedies.csv")
    command = [sys.executable, "-m", "tabletune", "run-all", str(run_dir)]
    return [*command, "--profile", settings["profile"], "-y", json.dumps(parameters)]


def seconds_of_stages(moments, end):
    """The seconds of each stage, from the moments at which it was announced, {stage: moment}."""
    ends = [*list(moments.values())[1:], end]
    return {stage: ends[i] - begun for i, (stage, begun) in enumerate(moments.items())}


def run_all(settings, memory_share, base_model, run_dir, log):
    """Run notebooks 1 to 4 with at most this share of the GPU's memory for each process.

    Returns the seconds of each, and the peak GiB, or an error. Their output goes to the file `log`.
    """
    allocator = f"expandable_segments:True,per_process_memory_fraction:{memory_share:.4f}"
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": allocator}
    command = run_all_command(settings, base_model, run_dir)
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    moments = {}
    output = []
    for line in process.stdout:
        output.append(line)
        name = line.split(maxsplit=1)[0] if line.strip() else ""
        if name in STAGES:
            moments[name] = time.perf_counter() if moments else begun
    failed = process.wait() != 0
    seconds = seconds_of_stages(moments, time.perf_counter())
    log.write_text("".join(output), encoding="utf-8")
    if failed:
        return {"error": f"failed: {''.join(output).strip()[-300:]}"}
    manifest = json.loads((Path(run_dir) / "manifest.json").read_text(encoding="utf-8"))
    peak = max(manifest[stage]["peak_memory_gib"].get("gpu", 0) for stage in STAGES)
    return {"seconds": seconds, "peak_gib": round(peak, 2), "packages": installed_packages()}


def answer(model, tokenizer, run_dir):
    """Answer the test split's questions in at most 256 tokens, by the adapter and by the base."""
    import datasets

    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    rows = datasets.load_from_disk(Path(run_dir) / "dataset")["test"]
    prompts = {row["prompt"][-1]["content"]: row["prompt"] for row in rows}
    texts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
        for p in prompts.values()
    ]
    asked = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to("cuda")
    asked.pop("token_type_ids", None)
    model.generate(**asked, max_new_tokens=256)
    with model.disable_adapter():
        model.generate(**asked, max_new_tokens=256)


def measured(marks):
    """The seconds of each part from the moments {part: its end}, named as our notebooks."""
    seconds = {part: end - begun for (_, begun), (part, end) in pairwise(marks.items())}
    return {"seconds": seconds, "peak_gib": peak_gib(), "packages": installed_packages()}


def trl(settings, base_model, run_dir):
    """The same by TRL, trained as its QLoRA notebook has it, and merged by PEFT."""
    marks = {"start": time.perf_counter()}
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = trl_trainer(settings, base_model, run_dir)
    trainer.args.num_train_epochs = 1
    trainer.train()
    adapter = f"{run_dir}/trl/adapter"
    trainer.save_model(adapter)
    marks["02_finetune_qlora"] = time.perf_counter()

    answer(trainer.model.eval(), trainer.processing_class, run_dir)
    marks["04_evaluate"] = time.perf_counter()

    tokenizer = trainer.processing_class
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    model = AutoModelForCausalLM.from_pretrained(
        base_model, dtype=torch.float16, device_map={"": 0}
    )
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(f"{run_dir}/trl/merged")
    tokenizer.save_pretrained(f"{run_dir}/trl/merged")
    marks["03_merge_adapter"] = time.perf_counter()
    return measured(marks)


def unsloth(settings, base_model, run_dir):
    """The same by Unsloth, as its Alpaca notebook has it, with our adapter and our data set."""
    marks = {"start": time.perf_counter()}
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    from unsloth import FastLanguageModel  # isort: skip, it patches what comes after
    import torch
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        base_model,
        max_seq_length=512,
        dtype=torch.float16 if settings["fp16"] else torch.bfloat16,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.get("lora_r", 64),
        target_modules=settings.get("targets", ATTENTION),
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    arguments = SFTConfig(
        output_dir=f"{run_dir}/unsloth",
        max_length=512,
        packing=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        num_train_epochs=1,
        learning_rate=2e-4,
        optim="adamw_8bit",
        weight_decay=0.01,
        fp16=settings["fp16"],
        bf16=not settings["fp16"],
        save_strategy="no",
        report_to="none",
    )
    examples = token_ids(run_dir, base_model)
    SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=examples, args=arguments
    ).train()
    model.save_pretrained(f"{run_dir}/unsloth/adapter")
    marks["02_finetune_qlora"] = time.perf_counter()

    FastLanguageModel.for_inference(model)
    answer(model, tokenizer, run_dir)
    marks["04_evaluate"] = time.perf_counter()

    model.save_pretrained_merged(f"{run_dir}/unsloth/merged", tokenizer, save_method="merged_16bit")
    marks["03_merge_adapter"] = time.perf_counter()
    return measured(marks)
