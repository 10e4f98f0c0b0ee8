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
# # Chat with it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/chat.ipynb)
#
# Ask the model yourself. The base model and the fine-tuned model answer side by side, on a page in
# your browser. With `context_rows`, the page shows below each answer of the fine-tuned model which
# rows of your table it comes from. (How many answers are right is measured in
# [notebook 4](04_evaluate.ipynb).)
#
# - **In:** `dataset/` and `adapter/` in the run folder, from notebooks 1 and 2, and the base model;
#   `retrieval/`, if notebook 1 ran with `context_rows`.
# - **Out:** a page on your machine. Nothing is written.
# - **Time:** as long as it takes to load the base model.
#
# The page needs no more memory than the training did, so it fits a T4. `make chat RUN_DIR=runs/cpu`
# opens it on your machine.

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

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # of notebooks 1 and 2; in Colab better "drive:home_remedies"
base_model = "NousResearch/Llama-2-7b-chat-hf"  # as in notebook 2
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"  # its version on the Hub
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
attn_implementation = "auto"  # "sdpa" where the model has it, PyTorch's fast attention
window = 1024  # tokens of a question, its rows and its answer together
max_new_tokens = 256  # an answer is cut after so many tokens
unknown_threshold = "auto"  # with context_rows: below this score, 0 to 1, the answer is "nothing"
wait = False  # True: the last cell runs until you interrupt it; `make chat` sets this
disclaimer = ""  # above the page; "" for the example's, or a neutral one

# %% [markdown]
# ## Load the model
#
# The base model is loaded as it was for the training, and the adapter is attached to it. An adapter
# that was trained on another data set or on another base model is refused.

# %%
from tabletune.export.chat_page import chat_page, load_chat, open_page
from tabletune.run.stage import start_stage

stage = start_stage("chat", globals())
chat = load_chat(stage)

# %% [markdown]
# ## What the model is asked
#
# With `context_rows`, each question is looked up in the table first. The most similar rows go into
# the prompt, laid out as in training, and both models see them. All rows of the table can be found
# here, those of the test split, too. Without `context_rows`, the prompt is the question alone. Here
# is the prompt for one question:

# %%
for question in chat.examples[:1]:
    print(chat.prompt(question).messages[-1]["content"])

# %% [markdown]
# ## Two answers at once
#
# One model in memory gives both answers. It reads the question twice, at the same time: once with
# the adapter and once without it. The library PEFT can switch the adapter on and off within one
# batch. Both answers grow on the page, token by token, until the longer one is complete.
#
# - Every token is the most likely one, as in notebook 4. So the same question gets the same answer.
# - Each question is answered by itself, as in training. The models do not see earlier questions of
#   the chat.
# - With `context_rows`, below an answer are the rows that it rests on, and how similar their
#   questions are. If the table has nothing, *Rests on nothing* stands there, and why: no row was
#   similar enough, or the model did not find an answer in the rows.
# - If two people ask at once, the second one waits. The disclaimer stays in view.

# %%
page = chat_page(chat)  # made with Gradio, a library for such pages

# %% [markdown]
# The cell below opens the page: inside this notebook, or with `make chat` at the address that is
# printed.

# %%
import time

try:
    address = open_page(page, inline=not wait)
    print(f"{chat.disclaimer}\nThe page is at {address}")
    while wait:
        time.sleep(1)  # Ctrl-C ends it
except KeyboardInterrupt:
    page.close()

# %% [markdown]
# Two things to try:
#
# - Ask a question of the table in three other ways. Which rows does the answer rest on?
# - Ask something that the table has nothing on. Which of the two models makes something up?
#
# Next: [report](report.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/report.ipynb))
# makes one page of the whole run.
