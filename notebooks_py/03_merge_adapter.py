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
# # 3 · Merge the adapter
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/03_merge_adapter.ipynb)
#
# | 1 · format | 2 · fine-tune | **3 · merge** | 4 · evaluate | 5 · baselines | 6 · trust | 7 · export |
# |---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away |
#
# - **In:** `adapter/` in the run folder, from notebook 2, and the base model.
# - **Out:** `merged/`, a plain model, and `merged/merge_report.json`. The library transformers
#   loads the model like any other, without the training libraries.
# - **Time:** about as long as copying the base model's files, and as long again to verify the
#   result: a minute or two for 7B on a T4, half a minute on a CPU with the small model of
#   `profiles/cpu.yaml`.
#
# An adapter works only beside its base model. *Merging* adds it to the base model's weights, so
# that one plain model remains. The usual way is `merge_and_unload` of PEFT, the library that made
# the adapter. It holds the whole base model in the computer's memory (RAM): 13 GB for a 7B model,
# and free Colab has 12.7. But each matrix can be merged on its own. So this notebook reads, merges
# and writes one matrix after the other.

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
# Notebook 2 usually trains the adapter beside *quantized* weights, rounded to the 4 bits of NF4. To
# which weights should it be added now? `base_weights = "original"` takes the weights as they were
# published. `"dequantized"` takes what the training really saw: the weights after rounding. Neither
# is better in principle; notebook 6 measures both. (With `quantization = "none"` in notebook 2, the
# training saw the published weights, so there is nothing to choose.)

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 and 2; in Colab better "drive:home_remedies"
base_model = "NousResearch/Llama-2-7b-chat-hf"  # as in notebook 2
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"  # its version on the Hub
base_weights = "original"  # or "dequantized"
max_shard_gb = 1.0  # GB: the largest file of the merged model, and about the memory for merging it

# %% [markdown]
# First a plan: which *tensors* (the matrices and lists of numbers of the model) will change? The
# notebook reads the whole adapter, but only the names and shapes of the base model's tensors. It
# also checks that adapter and base model belong together.

# %%
from tabletune.merging.plan import MergePlan
from tabletune.report.showing import show_table
from tabletune.run.stage import start_stage

stage = start_stage("03_merge_adapter", globals())
run = stage.folder
plan = MergePlan(run, base_model, base_model_revision, base_weights)
print(f"{len(plan.tensors)} tensors in the base model, {len(plan.adapted)} of them with an adapter")

# %% [markdown]
# ## One matrix
#
# LoRA leaves a matrix $W$ as it is and learns two thin ones beside it, $A$ with $r$ rows and $B$
# with $r$ columns. Below is the name of the first matrix that has an adapter. The first number in
# it is that of its layer, counted from 0; `mlp`, in many models, is the part of a layer that is not
# attention. Then come the shapes of its $W$, $A$ and $B$, as (rows, columns):

# %%
from tabletune.merging.lora import lora_matrices

# for each tensor that changes, `plan.modules` names the part of the model (module) it is in
adapted = [(name, module) for name, module in plan.modules.items() if module in plan.adapted]
name, module = adapted[0]
weight = plan.read(name)
a, b = lora_matrices(plan.adapter, module)
print(f"{module}\nW {tuple(weight.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}")
print(f"A and B have {(a.numel() + b.numel()) / weight.numel():.0%} as many numbers as W")

# %% [markdown]
# Merging them takes one line, $W' = W + s\,BA$. The factor $s$ is $\alpha / r$ (`lora_alpha` and
# `lora_r` of notebook 2). With rsLoRA, a variant of LoRA, it is $\alpha / \sqrt r$.

# %%
from tabletune.merging.lora import scaling

merged = weight + scaling(plan.config, module) * b @ a

# %% [markdown]
# The package's `add_lora` does the same, but overwrites $W$ with the result, so that no memory is
# needed for a second matrix. It will merge all matrices further down. The next cell gives it a copy
# of $W$ (`clone`), and stops with an error if its result differs from ours:

# %%
import torch

from tabletune.merging.lora import add_lora

by_package = add_lora(weight.clone(), plan.adapter, plan.config, module)
assert torch.allclose(merged, by_package, rtol=1e-4, atol=1e-5)

# %% [markdown]
# How much does merging change a matrix? We compare up to three changes of $W$:
#
# - the adapter is added;
# - the sum is rounded to the number format of the files;
# - $W$ is rounded to NF4, if the training saw quantized weights. With `base_weights = "original"`
#   this rounding is not in the merged model. The last line of the table then says how far the
#   weights of the training were from those that are merged now.
#
# Each is shown as a share of the size of $W$. Size here is the Frobenius norm: the root of the sum
# of all squared numbers. Rounding to NF4 can change a matrix more than the adapter does. It matters
# less than its size says, because its errors go up and down at random and partly cancel out.

# %% tags=["nbval-ignore-output"]
import pandas as pd

from tabletune.merging.lora import nf4_round_trip

changes = {
    "the adapter": merged - weight,
    f"rounding to {str(plan.dtype).removeprefix('torch.')}": merged.to(plan.dtype).float() - merged,
}
# `plan.provenance` is what notebook 2 has written about its training
if plan.provenance.get("quantization", "nf4") == "nf4":
    # there and back: rounded to NF4 as for the training, and unpacked again
    changes["rounding to NF4"] = nf4_round_trip(weight, plan.training_dtype) - weight
sizes = {name: change.norm() / weight.norm() for name, change in changes.items()}
pd.Series({name: f"{size.item():.3%}" for name, size in sizes.items()}).to_frame("changes W by")

# %% [markdown]
# ## All of them
#
# Every tensor of the base model's files is copied, and those with an adapter are merged on the way.
# Whatever has no adapter stays bit for bit what it was, such as the image layers of a model that
# also sees pictures.
#
# Then the result is verified. Three models read the same two rows of the test split: the base
# model, the base model with its adapter, and the merged model, read back from its files. The last
# two must give the same scores (logits) to all tokens, except for rounding. (With `"dequantized"`,
# all three start from the weights after rounding to NF4.) A merged model that differs by more is
# not kept.

# %% tags=["nbval-ignore-output"]
from tabletune.merging.write import merge_adapter

merged_folder, report = merge_adapter(plan, stage, max_shard_gb)

# %% [markdown]
# The adapter changes the base model's scores. By how much do the merged model's scores still differ
# from those of the base model with its adapter? We show that as a share of the adapter's change: 0%
# is a perfect merge, and 100% is one that left the adapter out. Rounding alone gives a few percent
# if the files are in bf16, and well under 1% if they are in fp16, which has more digits. (Less than
# 0.1% is shown as 0.1%.) The most likely next token can differ even then: where a model finds two
# tokens about equally likely, the smallest rounding decides between them.

# %%
verified = report["difference_to_effect"] is not None
if verified:
    part = max(report["difference_to_effect"], 0.001)
    same = report["same_next_token"]
    print(f"At a typical token the merged model differs by {part:.1%} of what the adapter changes.")
    print(f"For {same:.0%} of the tokens, the two find the same next token most likely.")
else:
    print("Not verified: there was not enough memory to compare the models.")

# %% [markdown]
# ## Does it answer?
#
# The folder can now be used with transformers alone: `pipeline("text-generation",
# "runs/…/merged")`. Below, the package's `load_model` loads the same model in less memory.
#
# We ask the first question of the test split. With `context_rows`, it is asked as in real use, with
# rows of the table in the prompt. (If the table has plain texts without questions, the model
# continues the beginning of one.) Whether answers like this one are right is measured in
# notebook 4.

# %% tags=["nbval-ignore-output"]
from IPython.display import display
from transformers import AutoTokenizer, GenerationConfig, pipeline

from tabletune.data.context import load_context
from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.model.devices import compute_dtype
from tabletune.model.loading import load_model
from tabletune.report.tables import side_by_side
from tabletune.run.artifacts import load_dataset_of_run

splits, dataset_report = load_dataset_of_run(run)
row = splits["test"][0]
# the question as messages, or the beginning of a plain text
start = row["prompt"] or row["completion"][0]["content"][:40]
context = load_context(run, "use")  # what searches the rows; None without context_rows
if context is not None:
    # the question with the most similar rows of the table
    prompt = context.prompt(row["prompt"])
    start = prompt.messages

# %% tags=["nbval-ignore-output"]
if verified:
    model = load_model(merged_folder, None, compute_dtype("auto"))
    tokenizer = AutoTokenizer.from_pretrained(merged_folder)
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    greedy = GenerationConfig(max_new_tokens=60, do_sample=False)
    written = ask(start, generation_config=greedy)[0]["generated_text"]
    question = start[-1]["content"] if row["prompt"] else start
    answer = written[-1]["content"] if row["prompt"] else written
    if context is not None:
        # `unknown_answer` instead, if no row is similar enough
        answer, _ = context.final_answer(answer, prompt)
    warning = example_settings(dataset_report).get("disclaimer", NEUTRAL_DISCLAIMER)
    columns = {"asked": [question], "the merged model, at most 60 tokens": [answer]}
    display(side_by_side(columns, 1, warning))
else:
    print("Not asked: loading the model takes more memory than there was.")

# %% [markdown]
# ## What we have now
#
# One plain model in safetensors files, a format that holds weights and can hold no program. The
# time in the table below is that of merging and writing, without the verification. The memory
# includes Python and its libraries, which take more than a small model. A 7B model has many files.
# Where memory is short, they are merged one at a time, which takes a tenth of the memory of the
# usual way; where there is enough, up to four at once.

# %% tags=["nbval-ignore-output"]
show_table(
    {
        "merged": f"{report['merged_modules']} matrices, into the {report['base_weights']} weights",
        "stored": f"as {report['dtype']}, files: {report['shards']}",
        "time": f"{report['seconds']:.1f} s",
        "most memory of this process": f"{report['peak_rss_gib']:.2f} GiB",
        "size of the model": f"{plan.size / 2**30:.2f} GiB",
    }
)

# %% [markdown]
# One thing to try: `base_weights = "dequantized"`, and then run notebooks 3 and 4 again: are the
# answers any different? The table in "One matrix" says how much rounding to NF4 changes $W$, and
# notebook 6 says what that does to the model.
#
# Next: [4 · evaluate](04_evaluate.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/04_evaluate.ipynb)).
