"""The whole job, a part in a process of its own: a notebook of ours, or all that Unsloth does in one.

What goes in is the bundled table and a base model, what comes out an adapter trained for one epoch, the answers to the
questions of the test split by base and adapter, and a merged model in 16 bits. `run.py` starts the parts and takes the
time, Python's start and imports included.
"""

import os
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notebook(stage, settings, base_model, run_dir):
    """Run a notebook of ours with a profile and settings on top, as Papermill would. Returns its peak GiB."""
    import yaml

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import run_script
    from run import installed_packages, peak_gib

    os.environ["MPLBACKEND"] = "agg"
    profile = yaml.safe_load((ROOT / "profiles" / f"{settings['profile']}.yaml").read_text(encoding="utf-8"))
    table = str(ROOT / "data" / "home_remedies.csv")
    run_script(stage, **profile | settings | {"base_model": base_model, "dataset": table, "run_dir": run_dir})
    return {"peak_gib": peak_gib(), "packages": installed_packages()}


def unsloth(_, settings, base_model, run_dir):
    """The same by Unsloth, as its Alpaca notebook has it, with our adapter (r 64 on q, k, v, o) and our data set.

    Returns the seconds of each part under the name of our notebook for it, and the peak GiB.
    """
    marks = {"start": time.perf_counter()}
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    from unsloth import FastLanguageModel  # isort: skip, it patches what comes after
    import datasets
    import torch
    from run import ATTENTION, installed_packages, peak_gib
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        base_model,
        max_seq_length=512,
        dtype=torch.float16 if settings["fp16"] else torch.bfloat16,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=64,
        target_modules=ATTENTION,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    splits = datasets.load_from_disk(Path(run_dir) / "dataset")
    train = splits["train"].map(
        lambda row: {"input_ids": tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)},
        remove_columns=splits["train"].column_names,
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
    SFTTrainer(model=model, processing_class=tokenizer, train_dataset=train, args=arguments).train()
    model.save_pretrained(f"{run_dir}/unsloth/adapter")
    marks["02_finetune_qlora"] = time.perf_counter()

    FastLanguageModel.for_inference(model)
    tokenizer.padding_side = "left"
    prompts = {row["prompt"][-1]["content"]: row["prompt"] for row in splits["test"]}  # each question once
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts.values()]
    asked = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to("cuda")
    asked.pop("token_type_ids", None)
    model.generate(**asked, max_new_tokens=256)
    with model.disable_adapter():
        model.generate(**asked, max_new_tokens=256)
    marks["04_evaluate"] = time.perf_counter()

    model.save_pretrained_merged(f"{run_dir}/unsloth/merged", tokenizer, save_method="merged_16bit")
    marks["03_merge_adapter"] = time.perf_counter()
    seconds = {part: end - begun for (_, begun), (part, end) in pairwise(marks.items())}
    return {"seconds": seconds, "peak_gib": peak_gib(), "packages": installed_packages()}
