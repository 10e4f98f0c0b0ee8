"""The trainers that are compared: notebook 2's, TRL's and Unsloth's."""

import os

from common import ALL_LINEAR, limit_memory, parameters_of, run_notebook, token_ids


def notebook_trainer(settings, base_model, run_dir, limit=None):
    """The trainer of notebook 2, made by its own cells, with a profile and settings on top.

    It plans with the memory that it will have, unless the settings tell it of less `room`. Returns
    the trainer and the memory that the notebook expects, in GiB.
    """
    # before PyTorch is imported, as in the notebook, whose limit is set first here
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    parameters = parameters_of(settings, base_model, run_dir)
    limit_memory(settings.get("room", limit))
    notebook = run_notebook("02_finetune_qlora", parameters, before="## Train")
    trainer = notebook.trainer
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    return trainer, float(notebook.room.expected.sum())


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
    # first, as it patches what is imported after it
    from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip
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
