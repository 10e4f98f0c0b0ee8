# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     runtime_attributes:
#       runtime_version: '2026.07'
#   jupytext:
#     cell_metadata_filter: tags,cellView,jupyter,-all
#     notebook_metadata_filter: accelerator,colab,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · Fine-tune with QLoRA
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/02_finetune_qlora.ipynb)
#
# | 1 · format | **2 · fine-tune** | 3 · merge | 4 · evaluate | 5 · baselines | 6 · trust | 7 · export |
# |---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away |
#
# - **In:** `dataset/` in the run folder, from notebook 1.
# - **Out:** `adapter/`, what was learned, some hundred megabytes or less; `training/metrics.json`
#   and the loss curves.
# - **Time:** minutes for a table of a few hundred rows on a GPU. Without a GPU, two to four
#   minutes on two CPU cores, with the small model of the profile `cpu` or `knowledge`.
#   ([Profiles](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/parameters.md#profiles)
#   are files of parameters.)
#
# A model is a long list of numbers, its *weights*. Training changes them. A model with nearly seven
# billion weights (7B) takes 13 GB, two bytes a weight, and training all of them takes several times
# that. *LoRA* ([Hu et al., 2021](https://arxiv.org/abs/2106.09685)) leaves the weights of the model
# *frozen*, which means that they do not change. It trains a small *adapter* beside them; for a 7B
# model the adapter has about one weight for every hundred of the model. (The share is larger for a
# small model, and if more than the attention gets an adapter.) *QLoRA* ([Dettmers et al.,
# 2023](https://arxiv.org/abs/2305.14314)) also stores the frozen model with 4 bits a weight, in a
# format called NF4. So a 7B model can be trained on a T4, the GPU of free Colab, which has 15 GB.
#
# In Colab this notebook runs on a machine of its own, which does not have the files of notebook 1.
# Set `run_dir = "drive:home_remedies"` below and in notebook 1: both then work in that folder of
# your Google Drive.

# %% [markdown]
# On Colab, the folded cell below installs the few libraries that are missing. Elsewhere it does
# nothing. Terms that are new to you are explained in the
# [glossary](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/glossary.md).

# %% cellView="form" jupyter={"source_hidden": true}
# @title Install what Colab lacks (elsewhere this does nothing)
import os
import sys
from importlib.util import find_spec

from IPython import get_ipython

series = "git+https://github.com/home-remedies-qlora/home-remedies-qlora@main"
needed = ["tabletune", "trl", "bitsandbytes", "liger_kernel", "sacrebleu"]
if "google.colab" in sys.modules and not all(map(find_spec, needed)):
    # if the address is wrong, git fails instead of asking for a password
    os.environ["GIT_TERMINAL_PROMPT"] = "0"
    lacking = "trl==0.29.1 bitsandbytes==0.50.2 liger-kernel==0.8.5 "
    lacking += "sacrebleu==2.6.0 portalocker==4.4.2 colorama==0.4.6"
    get_ipython().run_line_magic("pip", f"install -qqq --no-deps {series} {lacking}")
    if find_spec("tabletune") is None:
        sys.exit(f"Nothing came from {series}: set `series` to an address or an uploaded ./FOLDER.")

# %% [markdown]
# ## Parameters
#
# For a first run nothing needs to change. Terms in the comments are explained further down, where
# they are used, or in the
# [glossary](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/glossary.md).
# The two that matter most: a *batch* is the rows that the model reads at once, and in a *step* it
# reads one or more batches and then changes the adapter once. A *row* is here what the model reads
# as one text: an example or, with `packing`, several.

# %% tags=["main-parameters"]
run_dir = "runs/home_remedies"  # that of notebook 1; in Colab better "drive:home_remedies"
seed = 42  # of all random choices
base_model = "NousResearch/Llama-2-7b-chat-hf"  # as in notebook 1
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"  # its version on the Hub
precision = "auto"  # format of numbers: "bf16", "fp16", "fp32"; "auto": what the hardware has
quantization = "nf4"  # of the frozen model: "nf4", "8bit", or "none" for plain LoRA
attn_implementation = "auto"  # "sdpa" where the model has it
max_length = 512  # tokens in a row; the longest example must fit into it
lora_r = 64  # the rank: the larger, the more the adapter can learn
lora_alpha = 16  # how strongly the adapter counts: it is multiplied by lora_alpha / lora_r
lora_dropout = 0.0  # dropout; 0.1 gained nothing in one epoch, and can cost time or memory
lora_target_modules = "auto"  # what gets an adapter: attention; or "all-linear", or names
epochs = 1  # passes over all training examples
packing = True  # several examples in one row of max_length tokens, kept apart: no padding
batch_size = "auto"  # rows in a batch; "auto": a step has up to 16, fewer for a small table
min_steps = 300  # with "auto", batches are so small that there are this many steps, if possible
gradient_accumulation_steps = 1  # how many batches there are in a step
learning_rate = 3e-4  # how large the changes of a step are
optim = "paged_adamw_32bit"  # the optimizer: AdamW, which may move its memory to the CPU
gradient_checkpointing = True  # recompute layers where memory is short: up to a third slower
use_liger_kernel = True  # Liger's code for GPUs: faster, and with less memory for the loss
evaluations = 4  # how often the validation loss is measured and a checkpoint saved
early_stopping_patience = 0  # stop after so many evaluations without improvement; 0: never

# %% [markdown]
# The other parameters are folded away. Open the cell to change one. If you start the notebooks with
# the command `make`, it adds a cell with the settings of a profile. They override those above.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed parameters
published_dataset = ""  # a data set that notebook 1 published on the Hub, if the run has none
lora_options = {}  # anything else for peft.LoraConfig, such as {"use_rslora": True}
training_options = {}  # anything else for trl.SFTConfig, such as {"weight_decay": 0.01}
lr_scheduler_type = "cosine"  # how the learning rate falls: as half a wave of the cosine
warmup = 0.03  # the share of steps in which the learning rate rises; a whole number counts steps
max_grad_norm = 0.3  # longer gradients are shortened to this length
report_to = "tensorboard"  # a page with live curves; or "wandb", "trackio", "none"
ignore_memory = False  # True: train even if the weights alone do not seem to fit

# %% tags=["parameters"]
# `make` adds its cell below this one

# %%
# PyTorch reads this setting when it is imported. With it, freed GPU memory is reused better.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from tabletune.chat.tokenizer import load_tokenizer, template_settings
from tabletune.model.devices import compute_dtype
from tabletune.model.inspection import base_config
from tabletune.model.quantization import load_base
from tabletune.report.showing import show_table
from tabletune.run.stage import start_stage
from tabletune.training import checkpoints, examples, planning, results, trainer_settings
from tabletune.training.collator import Collator
from tabletune.training.lora_targets import shortest_target_names
from tabletune.training.trainer import TokenTrainer, free_memory, training_callbacks

# `globals()` hands all parameters to the stage, which checks them
stage = start_stage("02_finetune_qlora", globals())
run = stage.folder  # the run folder, as a path

# %% [markdown]
# ## The examples
#
# They are the conversations that notebook 1 has left in the run folder. If there are none, the
# notebook stops here: run [notebook
# 1](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/01_format_dataset.ipynb)
# first, with the same `run_dir`. (A data set that notebook 1 has published on the Hub will also do:
# `published_dataset`.)

# %%
import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, set_seed

set_seed(seed)
# with several GPUs, each has a process of its own; `processes` lets them wait for each other
processes = PartialState(cpu=not torch.cuda.is_available())
splits, report = examples.load_examples(run, published_dataset, processes)

# %% [markdown]
# Each example becomes two lists of the same length. The *token ids* are the numbers of its tokens.
# The *labels* are the same ids where the model is to predict a token from those before it, and -100
# where nothing is to be learned. Only the answers are in the loss.
#
# The model learns from the training split alone. The validation split shows during training how it
# does on other questions. The test split waits for notebook 4.
#
# With rows of the table in the prompt (`context_rows`), a training example is such a prompt, with
# several questions. There are then fewer examples than rows, and they are longer. The test split is
# counted without rows in its prompts.

# %%
# the chat template as notebook 1 has used it: with thinking or without, and with which date
tokenizer, stops = load_tokenizer(base_model, base_model_revision, *template_settings(report))
encoded, counts = examples.encode_splits(splits, tokenizer, stops, max_length)
counts

# %% [markdown]
# ## The base model
#
# Before anything large is downloaded, we look at the model's configuration: what it is, which of
# its matrices get an adapter, and whether it can be trained here at all. (The weights are arranged
# in matrices.) The *architecture*, in the first line, is how the model is built; SmolLM2, for
# example, is built like Llama. The *parameters* in the same line are the model's weights. The
# *context length* is the most tokens that the model can read at once. The last lines are the chat
# template, as in notebook 1.
#
# A model computes in *layers*, one after the other: each works on the results of the one before.
# Most models have two parts in each layer. In the *attention*, a token looks at the tokens before
# it. Its matrices are often called `q_proj`, `k_proj`, `v_proj` and `o_proj`; "sdpa" (scaled
# dot-product attention) is PyTorch's fast implementation. The other part changes each token by
# itself, with the matrices `gate_proj`, `up_proj` and `down_proj`. With NF4, these matrices are
# stored in 4 bits. The rest of the model keeps 16 or 32 bits. Most of it is a large matrix with a
# line of numbers for each token of the *vocabulary*, which is all the tokens that the model knows.

# %%
config, dtype = base_config(base_model, base_model_revision), compute_dtype(precision)
targets, summary = planning.check_parameters(stage.parameters, config, dtype, tokenizer, stops)
show_table(summary)

# %% [markdown]
# ## Rows without padding
#
# Examples differ in length. If the shorter ones of a batch were filled up to the longest
# (*padding*), work would be wasted: little if all have about the same length, and it can be more
# than half if a few are very long. *Packing* puts several examples into one row of `max_length`
# tokens instead. They must not see each other. So the positions of the tokens start at 0 again with
# each example. From that, transformers (the library that runs the model) knows where an example
# begins, and hides the earlier ones from it.
#
# The cell below packs the examples and looks at the first row. The *collator* makes the batches: it
# turns rows into tensors, which are PyTorch's arrays, and adds the positions. (With `packing =
# False`, the training does not use these rows.)

# %%
from trl.data_utils import pack_dataset

packed = pack_dataset(encoded["train"], max_length)
collate = Collator(tokenizer.pad_token_id, max_length)
positions = collate([packed[0]])["position_ids"][0]  # [tokens]: 0, 1, 2, …, 0, 1, 2, …
print("In the first row, examples begin at tokens", (positions == 0).nonzero()[:, 0].tolist())

# %% [markdown]
# ## Is there room?
#
# We estimate the memory that training takes, still before anything large is downloaded. The parts,
# in GiB (a GiB is 2³⁰ bytes, 7% more than a GB):
#
# - the base model. (On a CPU, weights of 4 bits are turned back into 16 or 32 bits before the
#   training, if there is room. They then take more than the table above says.)
# - the adapter. Each of its weights also has a *gradient*, which says how the loss changes with
#   this weight. The *optimizer*, which changes the weights, remembers earlier gradients.
# - *activations*: the results of all layers, from which the gradients are computed.
# - working memory: what one layer, or the loss, needs while it computes. It is freed at once.
# - the rest: Python and its libraries on a CPU; on a GPU, the memory that PyTorch reserves in
#   advance.
#
# With several GPUs, each holds a full copy of the model if it fits (DDP, distributed data
# parallel). If not, they share it (FSDP, fully sharded data parallel): each keeps a part of every
# layer, and gets the rest of a layer when it is needed.

# %% tags=["nbval-ignore-output"]
model = trainer = None  # if this cell runs again: lets go of the former model
free_memory()
room = planning.room_for_training(stage.parameters, config, dtype, targets, len(packed), processes)
room.expected.round(2).to_frame()

# %% [markdown]
# ## The base model is loaded
#
# With 4 bits a weight can have one of sixteen values. NF4 ("normal float") has more of them near
# zero, where most weights of a neural network are. Every 64 weights share a *scale*, a number that
# the sixteen values are multiplied by. "Double quantization" stores the scales in 8 bits instead of
# 32. Whenever a layer computes, its weights are unpacked to 16 or 32 bits. The library bitsandbytes
# does all this. With `quantization = "none"` there is no NF4: all weights are loaded in 16 or 32
# bits.

# %%
quantization_config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
    bnb_4bit_quant_storage=torch.float32 if room.sharded else torch.uint8,  # FSDP wants floats
)

# %% tags=["nbval-ignore-output"]
stored = quantization_config if quantization == "nf4" else quantization
model = load_base(base_model, base_model_revision, dtype, attn_implementation, room.sharded, stored)

# %% [markdown]
# Can packed examples see each other in this model? With `packing` we test it: we change the first
# of two packed examples, and check that the *logits* of the second stay the same. Logits are the
# scores that the model gives to each token of its vocabulary for being the next one.
#
# Then we plan the steps. In a *step* the model reads some rows, and the optimizer changes the
# adapter once.

# %%
train = planning.rows_to_train_on(model, encoded["train"], packed, packing)
plan = planning.plan_steps(stage.parameters, train, encoded["train"], room, processes)

# %% [markdown]
# ## The adapter
#
# LoRA adds the product of two thin matrices to a frozen matrix of weights $W$: $W +
# \frac{\alpha}{r} B A$. Only $A$, with $r$ rows, and $B$, with $r$ columns, are trained. The *rank*
# $r$ (`lora_r`) limits how much the adapter can learn; $\alpha$ (`lora_alpha`) says how strongly it
# counts. $B$ starts at zero. So before training, the model with its adapter gives the same answers
# as the base model. The library PEFT makes the adapter.

# %%
from peft import LoraConfig, get_peft_model

# CAUSAL_LM: a language model that predicts the next token from those before it
lora_config = LoraConfig(
    r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, task_type="CAUSAL_LM",
    target_modules=shortest_target_names(model, targets), **lora_options,
)
with model.device:  # the adapter is made where the model is
    model = get_peft_model(model, lora_config)
print(f"{model.num_parameters(only_trainable=True):,} weights are trained.")

# %% [markdown]
# ## The trainer
#
# A *checkpoint* is the state of a training, saved to disk. Run this notebook again after an
# interruption: it continues from the newest complete checkpoint, and ends where a run without
# interruption would have ended. `inputs` are what the training depends on besides its parameters.
# Checkpoints of other settings or other data are moved to `earlier/`. If this very training has
# been completed before, `done` is true, and the cells below show its results.

# %%
inputs = planning.inputs_of(report, dtype, processes, room)
done = checkpoints.check_done_or_archive(stage, inputs, processes)

# %%
from trl import SFTConfig

# SFT is supervised fine-tuning: training on examples with the right answer. `settings` has what
# is not written here: checkpoints, the learning rate's course, number formats, several GPUs.
settings = trainer_settings.sft_arguments(stage, done, dtype, room, plan, train is packed)
training_arguments = SFTConfig(
    num_train_epochs=epochs, learning_rate=learning_rate, optim=optim, remove_unused_columns=False,
    per_device_train_batch_size=plan.batch_size, gradient_accumulation_steps=plan.accumulated,
    # the rows are token ids and labels already, and keep all of their columns
    dataset_kwargs={"skip_prepare_dataset": True}, **settings | training_options,
)

# %% [markdown]
# TRL's `SFTTrainer` does the work. Our `TokenTrainer` differs from it in a few points,
# of which these matter most:
#
# - Its validation loss is the mean over all tokens of the answers. TRL's is a mean over batches,
#   weighted by their rows and not by their tokens. The validation loss decides which checkpoint is
#   the best.
# - The adapter stays in numbers of 32 bits (fp32). For a 4-bit model, TRL would store it in bf16,
#   a format of 16 bits. Small updates would be lost, and a T4 cannot train with it
#   ([trl#4901](https://github.com/huggingface/trl/issues/4901)).
# - On a CPU, the 4-bit weights are unpacked once and not in every step, if there is room. The
#   numbers are the same, and training takes a sixth less time.

# %%
# callbacks are called during training: they stop it early, or say which layers to recompute
trainer = TokenTrainer(
    model=model, args=training_arguments, processing_class=tokenizer, train_dataset=train,
    eval_dataset=encoded["validation"], data_collator=collate,
    callbacks=training_callbacks(early_stopping_patience, room.recomputed_layers(plan.batch_size)),
)

# %% [markdown]
# ## Train
#
# The first line below says where the training starts. The table gets a line each time the
# validation loss is measured. Both losses should fall. The training loss jumps, because each step
# reads other rows. If the validation loss rises again while the training loss goes on falling, the
# model has begun to learn its rows by heart. (With `evaluations = 1` there is only one validation
# loss, at the end.) TensorBoard, a page with live curves, shows the same: `tensorboard --logdir
# runs`.

# %% tags=["nbval-ignore-output"]
if not done:
    trainer.train(resume_from_checkpoint=checkpoints.checkpoint_to_resume(trainer))

# %% [markdown]
# At the end, the checkpoint with the lowest validation loss is loaded again. How good was the model
# before? With its adapter switched off it is the base model, and the cell below measures its
# validation loss. Then the adapter is saved.

# %% tags=["nbval-ignore-output"]
if not done:
    before = results.base_model_loss(trainer)
    tokens = sum(map(len, encoded["train"]["input_ids"]))
    metrics = results.training_metrics(trainer, tokens, len(encoded["train"]), before)
    results.save_training(stage, trainer, metrics, tokenizer, stops, inputs)

# %% [markdown]
# ## What it learned
#
# The loss is the mean of $-\log p$, where $p$ is the probability that the model gave to the token
# that really came next. With the natural logarithm, its unit is called *nat*. Lower is better. A
# model that gives every right token a probability of 14% has a loss of 2 nats, since $e^{-2}$ is
# 0.14. If it is certain of every right token, its loss is 0.

# %%
from tabletune.run.files import read_json

metrics = read_json(run / "training" / "metrics.json", stage.name)
first, last = metrics["loss_first"], metrics["loss_last"]
print(f"training loss   {first:.2f} (first steps) → {last:.2f} (last steps) nats a token")
before, after = metrics["eval_loss_before"], metrics["eval_loss_after"]
print(f"validation loss {before:.2f} (base model)  → {after:.2f} (fine-tuned) nats a token")

# %% tags=["nbval-ignore-output"]
from tabletune.report.plots import plot_losses

plot_losses(read_json(run / "training" / "log_history.json", stage.name), metrics)

# %% [markdown]
# ## Before and after
#
# A loss says little about what a model writes. So we ask both models, the base model and the
# fine-tuned one, the first question of the training split. With `context_rows`, both have rows of
# the table in the prompt. A small base model often only repeats what it was asked.
#
# Compare the form of the answers first, then what they say: does the answer of the fine-tuned model
# agree with an answer of the table? If the table has several, any of them is right. To save time,
# an answer is cut after 64 tokens. Notebook 4 asks many questions, also new ones, and counts the
# right answers.

# %% tags=["nbval-ignore-output"]
from tabletune.evaluation.before_after import answer_before_and_after, before_and_after

if not done and not room.sharded:
    answer_before_and_after(trainer.model, tokenizer, stops, run)

# %% tags=["nbval-ignore-output"]
before_and_after(run)

# %% [markdown]
# ## What we have now
#
# An adapter that has learned how the table's answers look. How much it has learned of what they say
# is measured in notebook 4; it can be very little. The adapter is saved with its tokenizer and with
# the name of its base model, so that notebook 3 can refuse to merge it into another one.
#
# The last two lines below are the validation losses again, as probabilities: $e^{-loss}$.

# %% tags=["nbval-ignore-output"]
import math

likely = [math.exp(-metrics[f"eval_loss_{when}"]) for when in ("before", "after")]
weights = f"{metrics['trainable_parameters']:,} weights"
print(f"{weights} were trained, {metrics['trainable_percent']:.1f}% as many as the base model has.")
print(f"{metrics['steps']:,} steps over {metrics['tokens']:,} tokens.")
print(f"{metrics['seconds']:,.0f} s, with the evaluations on the way.")
print("How likely the right next token of a validation row was, on average:")
print(f"{likely[0]:.2%} with the base model, {likely[1]:.2%} after training.")

# %% [markdown]
# Two things to try:
#
# - `epochs = 2`: does the validation loss still fall in the second one?
# - `lora_r = 16`, which trains a quarter of the weights, with `lora_alpha = 4`, so that
#   `lora_alpha/lora_r` stays the same: is the validation loss at the end higher?
#
# Next: [3 · merge](03_merge_adapter.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/03_merge_adapter.ipynb)).
