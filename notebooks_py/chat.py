# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     runtime_attributes:
#       runtime_version: '2026.07'
#   jupytext:
#     cell_metadata_filter: tags,-all
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
# - **In:** `dataset/` and `adapter/` in the run folder, from notebooks 1 and 2, and the base model.
# - **Out:** a page on which you ask, and the base model and the fine-tuned one answer side by side. Nothing is written.
# - **Time:** as long as it takes to load the base model.
#
# One model answers twice: each question goes through it as a batch of two, one row with the adapter and one without. So
# the page needs no more memory than the training did, and fits a T4. `make chat` opens it on your machine.

# %% [markdown]
# On Colab, this cell installs what the runtime lacks, and nothing the second time. Elsewhere it does nothing.

# %%
import os
import sys
from importlib.util import find_spec

from IPython import get_ipython

series = "git+https://github.com/home-remedies-qlora/home-remedies-qlora@main"
if "google.colab" in sys.modules and not all(map(find_spec, ["tabletune", "trl", "bitsandbytes", "liger_kernel", "sacrebleu"])):
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # a wrong address is an error, and no question for a password
    lacking = "trl==0.29.1 bitsandbytes==0.50.2 liger-kernel==0.8.5 "
    lacking += "sacrebleu==2.6.0 portalocker==4.4.2 colorama==0.4.6"
    get_ipython().run_line_magic("pip", f"install -qqq --no-deps {series} {lacking}")
    if find_spec("tabletune") is None:
        sys.exit(f'Nothing came from {series}: set `series` to the address, or upload the folder and set "./FOLDER".')

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 and 2; in Colab better "drive:home_remedies"
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
attn_implementation = "auto"
window = 1024  # tokens of a question and its answer together
max_new_tokens = 256
wait = False  # true: the last cell runs until it is interrupted, which `make chat` wants
disclaimer = ""  # above the page; "" for the example's, or a neutral one

# %%
from tabletune.chat.tokenizer import load_tokenizer_of_run
from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.errors import StageError
from tabletune.export.chat_page import chat_page, open_page
from tabletune.model.adapters import attach_adapter
from tabletune.model.devices import compute_dtype
from tabletune.model.quantization import load_base
from tabletune.run.artifacts import check_run, load_dataset_of_run
from tabletune.run.files import read_json
from tabletune.run.stage import begin

stage = begin("chat", globals())
if find_spec("gradio") is None:
    raise StageError(
        "Gradio is missing here, which makes the page. Run `make chat`, or pip install gradio==6.20.0."
    )

# %% [markdown]
# ## The model
#
# The adapter must have been trained on this data set and this base model, which is loaded as it was for the training.

# %%
splits, report = load_dataset_of_run(stage.folder)
check_run(stage.folder, None, report, base_model)
tokenizer, stops = load_tokenizer_of_run(stage.folder / "adapter")
warning = disclaimer or example_settings(report).get("disclaimer", NEUTRAL_DISCLAIMER)

# %%
quantization = read_json(stage.folder / "adapter/provenance.json", "02_finetune_qlora").get(
    "quantization", "nf4"
)
how = {"attn_implementation": attn_implementation, "quantization": quantization}
base = load_base(base_model, base_model_revision, compute_dtype(precision), **how)
adapted = attach_adapter(base, stage.folder / "adapter")

# %% [markdown]
# ## Two answers at once
#
# PEFT can give each row of a batch an adapter of its own, or none. Each token that comes is shown at once; a row that
# has reached its end mark waits for the other. Greedy, as in notebook 4. Each question is answered by itself, as in
# training: the models do not see the conversation before it. Two visitors at once wait for each other in a queue, and
# the disclaimer stays in view, however far one scrolls.

# %%
page = chat_page(adapted, tokenizer, stops, splits["test"], warning, window, max_new_tokens)

# %%
import time

try:
    print(
        f"{warning}\nThe page is at {open_page(page, inline=not wait)}" + "; Ctrl-C ends it." * wait
    )
    while wait:
        time.sleep(1)
except KeyboardInterrupt:
    page.close()
