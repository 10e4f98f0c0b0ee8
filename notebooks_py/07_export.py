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
# # 7 · Take it away
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/07_export.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | 5 · baselines | 6 · trust | **7 · export** |
# |---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away |
#
# A model that goes to other people needs three things: a *model card*, which says what the model is
# and whether its answers are right; a file that their programs can read; and evidence that the file
# still holds the same model. If the model answers from the rows of a table, it needs the rows, too.
#
# - **In:** a run folder in which notebooks 1 to 4 have run; the figures of 6, if it has run.
# - **Out:** the folder `export/`:
#   - model cards for the adapter and for the merged model,
#   - the merged model as GGUF files of 16, 8 and about 4 bits a weight, which the programs
#     llama.cpp and Ollama read, and a `Modelfile` for Ollama,
#   - `app/`, a small program that answers questions,
#   - `metrics.json`, which says what each file lost.
# - **Time:** two minutes with the small model of the `cpu` profile; longer for a 7B model, which
#   llama.cpp reads on the CPU. Installing llama.cpp compiles it, once: 5 to 10 minutes on two
#   cores.

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
# The run folder has most of what a model card says. Two things only you know: the licence, which
# has to follow that of the base model; and, if `base_model` was a folder, the name of that model on
# the Hub (huggingface.co, where models are shared).
#
# Rarely changed settings are folded away and come first; the next cell can override them. When
# `make` runs a notebook, it adds one more cell, with the settings of its profile. These override
# all others.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed parameters
language = "en"  # of the table's texts
tags = "qlora"  # separated by commas; tags such as "text-generation" are added
private = True  # only you can see the uploads
window = 1024  # tokens that the model sees at once; a longer text is read in overlapping windows
stride = 512  # tokens by which the window moves on
bootstrap_samples = 2000  # draws behind each 95% interval
disclaimer = ""  # on cards, in Modelfile and app; "" for the example's, or a neutral one

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # of notebooks 1 to 4; in Colab better "drive:home_remedies"
seed = 42
license = ""  # of the model, as the Hub writes it ("apache-2.0"); it follows the base model's
base_model_on_hub = ""  # if base_model was a folder: its id, "HuggingFaceTB/SmolLM2-135M-Instruct"
push_to_hub = ""  # "owner/name" of the merged model, whose adapter becomes "owner/name-adapter"
gguf_types = ["F16", "Q8_0", "Q4_K_M"]  # 16, 8, about 4 bits a weight; []: no GGUF, no llama.cpp
proof_rows = 30  # rows of the test split that each file is scored on
proof_questions = 5  # questions that each file answers
max_new_tokens = 256  # an answer is cut after so many tokens
unknown_threshold = "auto"  # with context_rows: below this score, 0 to 1, the answer is "nothing"

# %% [markdown]
# The notebook first checks that data set, adapter, merged model and figures belong together.
# Otherwise it stops. The name of the model is that in `push_to_hub`, or else that of the run
# folder. The disclaimer stands on the cards, in the `Modelfile`, and above the answers of the app.

# %%
from tabletune.export import app, cards, gguf, llama_cpp, ollama, verification
from tabletune.export.finished_run import open_finished_run
from tabletune.run.stage import start_stage

stage = start_stage("07_export", globals())
export_run = open_finished_run(stage)
print(f"{export_run.merged} will be called {export_run.name}.")
print(f"Disclaimer: {export_run.disclaimer}")

# %% [markdown]
# ## The model card
#
# A model card is the README of a model on the Hub. Its first lines are written in YAML and serve
# the Hub's search. They name a data set or a base model only if it is on the Hub, since a path on
# your disk means nothing to others. The adapter and the merged model get a card each. On the Hub,
# they differ in the library that loads them, and in the *relation* to the base model: one is an
# adapter for it, the other a fine-tuned model of its own.

# %%
from huggingface_hub import EvalResult, ModelCardData

dataset = export_run.dataset_on_hub
card_data = {}
for part, library, relation in (
    ("adapter", "peft", "adapter"),
    ("merged", "transformers", "finetune"),
):
    more_tags = [tag for tag in tags.replace(",", " ").split() if tag]
    card_data[part] = ModelCardData(
        license=license or None,
        language=[name.strip() for name in language.split(",") if name.strip()] or None,
        library_name=library,  # by which the Hub shows how to load it
        pipeline_tag="text-generation",
        base_model=export_run.base_on_hub,
        base_model_relation=relation if export_run.base_on_hub else None,
        datasets=[dataset] if dataset else None,
        tags=["text-generation", "conversational", "fine-tuned", part, *more_tags],
    )

# %% [markdown]
# The Hub can show a figure of a model in its lists, but only if the data set is on the Hub, too.
# Then the perplexity of notebook 4 goes into the card's first lines:

# %%
for part, data in card_data.items():
    if dataset and part in export_run.models:
        value = round(export_run.models[part]["perplexity"]["response"], 4)
        name = "Response perplexity, test split"
        data.model_name = export_run.name
        # the task, the data set's type and name, the metric, its value, and what it is called
        data.eval_results = [
            EvalResult("text-generation", dataset, dataset, "perplexity", value, name)
        ]

# %% [markdown]
# The rest is for people. It comes from the run: whether the answers are right, how to ask the
# model, the data, the training, figures with their intervals, limits, and what ran where. First the
# YAML of the merged model's card, and then the card itself:

# %%
written = {part: cards.write_card(export_run, part, data) for part, data in card_data.items()}
print(written["merged"].data)

# %%
from IPython.display import Markdown, display

Markdown(written["merged"].text)

# %% [markdown]
# ## GGUF: one file for llama.cpp and Ollama
#
# A GGUF file holds the weights, the tokenizer and the chat template, which turns messages into the
# text that the model reads. The program llama.cpp runs it without Python. Ollama, LM Studio and
# others are built on llama.cpp.
#
# Here we use llama.cpp from Python, with the package llama-cpp-python. PyPI has only its source, so
# pip compiles it. With `PIP_EXTRA_INDEX_URL=https://abetlen.github.io/llama-cpp-python/whl/cpu` in
# the environment, pip takes a version that its authors compiled.
#
# Without the package, this notebook makes the cards and the app only. The cells up to
# [The app](#The-app) then do nothing.

# %%
if gguf_types and "google.colab" in sys.modules and find_spec("llama_cpp") is None:
    get_ipython().run_line_magic("pip", f"install -q {llama_cpp.packages_to_install()}")
kinds = llama_cpp.usable_types(gguf_types)

# %% [markdown]
# llama.cpp's own converter writes the file of 16 bits, F16. It knows most kinds of models. It reads
# some tokenizers wrongly, so it gets a copy in which these are corrected. All other files are made
# from F16, so F16 comes first in `kinds`, even if you leave it out of `gguf_types`.

# %%
files = {kind: gguf.make_gguf(export_run, kind) for kind in kinds[:1]}

# %% [markdown]
# ### The same tokens?
#
# A model that reads other tokens than in its training gives other answers. So llama.cpp must split
# the conversations of this run into exactly the tokens of the training. Otherwise the file moves to
# `earlier/`, and no other file is made from it.

# %%
if files:
    number = gguf.check_tokens(export_run, files["F16"])
    print(f"{number:,} conversations, split into the same tokens")

# %% [markdown]
# ### 8 bits and 4 bits
#
# With fewer bits a weight, the model is smaller and faster, and less exact. Q8_0 rounds each weight
# to 8 bits, with a scale of 16 bits for every 32 weights. Q4_K_M uses 4 bits for most weights and 6
# for those that matter more. This works only for a matrix whose rows can be divided into blocks of
# 256 weights. Any other matrix gets 5 or 8 bits.

# %%
import pandas as pd

files |= {kind: gguf.make_gguf(export_run, kind) for kind in kinds[1:]}
sizes = {file.name: f"{file.stat().st_size / 2**20:,.1f} MiB" for file in files.values()}
if files:
    display(pd.Series(sizes).to_frame("size"))

# %% [markdown]
# Rounding by hand: we take the first 32 weights of the embeddings, the table with a row of numbers
# for each token. Each weight becomes a whole number from -127 to 127, one byte, and the scale takes
# two more bytes. Rounding to a whole number changes a weight by about 0.4% of the largest weight at
# most. The small model of the `cpu` profile loses much less here, because its embeddings come from
# a file in which they had been rounded to 8 bits before. The cell stops if the result differs from
# the file:

# %%
if "Q8_0" in files:
    import numpy as np
    from gguf import GGUFReader, dequantize

    tensors = {}
    for kind in ("F16", "Q8_0"):
        reader = GGUFReader(files[kind])
        tensors[kind] = next(t for t in reader.tensors if t.name == "token_embd.weight")
    weights = tensors["F16"].data[0, :32].astype(np.float32)
    largest = np.abs(weights).max()
    scale = largest / 127
    by_hand = np.float32(np.float16(scale)) * (weights / scale).round()
    in_file = dequantize(tensors["Q8_0"].data[:1], tensors["Q8_0"].tensor_type)[0, :32]
    assert np.allclose(by_hand, in_file, atol=scale / 100)
    error = np.abs(by_hand - weights).max() / largest
    print(f"32 weights in 34 bytes; the largest error is {error:.2%} of the largest weight")

# %% [markdown]
# ### The same answers?
#
# Each file is measured as in notebook 4, and so is the merged model in transformers: the perplexity
# on test rows, and the answers to some questions. Every token is the most likely one, so the same
# model gives the same answers. How many are the same shows how much rounding changes. Only equal
# texts count as the same. Once one token differs, the rest of the answer can differ, too. So a file
# may give none of the same answers and still be nearly as good. With `context_rows`, all rows of
# the table can be found for the prompts, as in the app.
#
# In the table, *of the merged model's* is the perplexity of a file divided by that of the merged
# model. If its interval contains 100%, no loss was seen.

# %%
losses = verification.verify_files(export_run, files) if files else {}
if files:
    display(pd.DataFrame(verification.loss_table(losses)).T)

# %% [markdown]
# Rounding to 16 bits cannot change the perplexity by more than half a percent. A larger difference
# means a mistake in the file, and the notebook stops.
#
# ## Ollama
#
# Ollama does not use the chat template in a GGUF file. It wants one in the template language of Go,
# in a `Modelfile`. We write it from examples: we render a few conversations with the tokenizer's
# template, and see which texts it puts before, between and after the messages. The template for
# Ollama puts the same texts there. It must give exactly the same texts and the same tokens for the
# questions of this run. Otherwise no `Modelfile` is written.
#
# The disclaimer stands at the top of the file and in the licence, which `ollama show --license`
# prints. It is not in a system message, because the prompts of the training did not have it.

# %%
modelfile = None
if files:
    modelfile = ollama.write_modelfile(export_run, files[kinds[-1]], export_run.questions())
print(modelfile or "No Modelfile was written.")

# %% [markdown]
# ## The app
#
# `app/` goes to wherever the model is used. It is one Python file that needs no packages. It looks
# up the question in the table's rows, builds the prompt, and asks a server that speaks OpenAI's
# protocol: llama.cpp, Ollama, vLLM or `transformers serve`. Its README has the commands. Without
# `context_rows`, the prompt is the question alone. With `--copy` the app needs no server: it gives
# the answer of the most similar row.
#
# The notebook checks that the app builds the same prompts as this run, with `context_rows` from the
# same rows. It does so for the questions of up to 200 rows. A question that several rows have
# counts once for each of them:

# %%
app_folder = app.write_app(export_run)

# %% [markdown]
# ## Save and upload
#
# With `push_to_hub`, the merged model and the adapter go to two repositories on the Hub, each with
# its card, and private unless you set `private = False`. The app is not uploaded: it holds your
# table.

# %%
if not stage.is_done(export_run.inputs, export_run.outputs):
    stage.record(export_run.report["fingerprint"], export_run.inputs)
if push_to_hub:
    cards.upload(export_run, "merged", push_to_hub)
    cards.upload(export_run, "adapter", f"{push_to_hub}-adapter")

# %% [markdown]
# ## What we have now

# %%
more = " and the app" if app_folder else ""
print(f"Two model cards, {len(files)} GGUF files{more} in {export_run.folder}.")
for kind in files:
    size, ratio = losses[kind]["mib"], losses[kind]["ratio_to_merged"]
    print(f"{kind}: {size:,.0f} MiB, {ratio:.2%} of the merged model's perplexity")

# %% [markdown]
# To use them, go to the run folder, and replace NAME with the name of the model. First start a
# server. This is llama.cpp's:
#
# ```bash
# llama-server -m export/gguf/NAME-Q8_0.gguf -c 1024
# ```
#
# Then ask it with the app, in a second terminal:
#
# ```bash
# python export/app/app.py "A question"
# ```
#
# With Ollama instead, `ollama create NAME -f export/gguf/Modelfile` adds the model, and
# `ollama run NAME` asks it, without rows of the table. The app's README says how the app asks it.
#
# The app prints the disclaimer, but servers do not. If you let others ask the model, show it to
# them.
#
# Two things to try:
#
# - `gguf_types = ["Q6_K", "Q3_K_M"]`: where do the answers begin to differ?
# - With `context_rows`: add a line to `app/rows.jsonl`, and ask for it.
#
# Next: [chat](chat.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/chat.ipynb))
# opens a page on which the base model and this one answer side by side, and [report](report.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/report.ipynb))
# makes one page of the whole run.
