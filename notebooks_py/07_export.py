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
# # 7 · Take it away
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/07_export.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | 5 · baselines | 6 · trust | **7 · export** |
# |---|---|---|---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples | was it worth it? | what else it did | card, GGUF, Ollama |
#
# - **In:** a run folder in which notebooks 1 to 4 have run; the figures of 6, if it has.
# - **Out:** `export/`: a model card for the adapter and one for the merged model; the merged model as GGUF, which
#   llama.cpp and Ollama read, in 16, 8 and about 4 bits, with a `Modelfile`; `metrics.json`: what each file lost.
# - **Time:** two minutes with the small model of the `cpu` profile; longer for a 7B model, which llama.cpp reads on the
#   CPU. Installing llama.cpp compiles it, once: 5 to 10 minutes on two cores.
#
# A model that leaves the machine it was made on needs three things: a card that says what it is and what it is not, a
# format that other programs read, and a proof that it is still the same model there.

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
#
# The run folder knows most of what a model card says. It cannot know how the base model is called on the Hub, if it was
# a local folder, nor what licence the base model has: yours has to allow for it.

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 4; in Colab better "drive:home_remedies"
seed = 42
license = ""  # of the model, as the Hub writes it, for example "llama2" or "apache-2.0"; it follows the base model's
language = "en"
tags = "qlora"  # with commas between; what fits any such model is added
base_model_on_hub = ""  # the base model's id there, for example "HuggingFaceTB/SmolLM2-135M-Instruct"; "" if it was one
push_to_hub = ""  # "owner/name": the merged model goes there, the adapter to "owner/name-adapter"; "" uploads nothing
private = True  # whether only you can see them there
gguf_types = [
    "F16",
    "Q8_0",
    "Q4_K_M",
]  # [] makes none and needs no llama.cpp; all are made from F16, which stays
proof_rows = 30  # rows of the test split that each file is scored on
proof_questions = 5  # questions that each file answers
max_new_tokens = 256
window = 1024  # tokens that the model sees at once; a longer text is read in overlapping windows
stride = 512  # by which a window moves on
bootstrap_samples = 2000
disclaimer = ""  # on the cards and in the Modelfile; "" for the example's, or a neutral one

# %% [markdown]
# What is exported must belong together: this data set, this adapter, this merged model, these figures.

# %%
from tabletune.export.cards import open_finished, questions, upload, write_card
from tabletune.export.gguf import check_tokens, make_gguf
from tabletune.export.llama_cpp import EXTRAS, usable_types
from tabletune.export.ollama import write_modelfile
from tabletune.export.verification import prove_files
from tabletune.run.stage import begin

stage = begin("07_export", globals())
found = open_finished(stage)
print(f"{found.merged}, to be called {found.name}. {found.disclaimer}")

# %% [markdown]
# ## The model card
#
# A card on the Hub is a README with a few lines of YAML on top, by which people find the model. A name is given only if
# it is one on the Hub: a path on your disk is nobody's business.

# %%
from huggingface_hub import EvalResult, ModelCardData

about = {
    part: ModelCardData(
        license=license or None,
        language=[name.strip() for name in language.split(",")] if language else None,
        library_name=library,  # by which the Hub shows how to load it
        pipeline_tag="text-generation",
        base_model=found.base_on_hub,
        base_model_relation=relation if found.base_on_hub else None,
        datasets=[found.dataset_on_hub] if found.dataset_on_hub else None,
        tags=[
            "text-generation",
            "conversational",
            "fine-tuned",
            part,
            *filter(None, tags.replace(",", " ").split()),
        ],
    )
    for part, library, relation in (
        ("adapter", "peft", "adapter"),
        ("merged", "transformers", "finetune"),
    )
}

# %% [markdown]
# The Hub lists a figure only beside a data set of its own.

# %%
for part, data in about.items():
    if (on := found.dataset_on_hub) and part in found.models:
        value = round(found.models[part]["perplexity"]["response"], 4)
        data.model_name = found.name
        data.eval_results = [
            EvalResult(
                "text-generation", on, on, "perplexity", value, "Response perplexity, test split"
            )
        ]

# %% [markdown]
# The rest is for people, and a template fills it in from the run alone: data, training, figures with their intervals,
# limits, and what ran where.

# %%
cards = {part: write_card(found, part, data) for part, data in about.items()}
print(cards["merged"].data)

# %%
from IPython.display import Markdown

Markdown(cards["merged"].text)

# %% [markdown]
# ## GGUF: llama.cpp and Ollama
#
# A GGUF is one file with weights, tokenizer and chat template, which llama.cpp reads without Python; Ollama, LM Studio
# and others are built on llama.cpp. The package llama-cpp-python is llama.cpp's library with Python bindings; as it has
# no wheel on PyPI, pip compiles it. `PIP_EXTRA_INDEX_URL=https://abetlen.github.io/llama-cpp-python/whl/cpu` in the
# environment lets pip take the authors' compiled one instead. Without it, the cards are all that is made.

# %%
if gguf_types and "google.colab" in sys.modules and find_spec("llama_cpp") is None:
    get_ipython().run_line_magic("pip", f"install -q {EXTRAS}")
kinds = usable_types(gguf_types)

# %% [markdown]
# llama.cpp's own converter writes the 16-bit file. It knows most architectures; what it would mistake in a tokenizer is
# put right beforehand.

# %%
files = {kind: make_gguf(found, kind) for kind in kinds[:1]}

# %% [markdown]
# ### 8 bits and 4 bits
#
# Q8_0 rounds each weight to 8 bits, with a scale of 16 bits for every 32. Q4_K_M takes 4 bits for most weights and 6
# for those that matter more; a matrix whose rows do not divide into blocks of 256 gets 5 or 8.

# %%
import pandas as pd

files |= {kind: make_gguf(found, kind) for kind in kinds[1:]}
pd.Series(
    {file.name: f"{file.stat().st_size / 2**20:,.1f} MiB" for file in files.values()}, dtype=str
).to_frame("size")

# %% [markdown]
# The first 32 weights of the embeddings, rounded by hand, and as they stand in the file:

# %%
if "Q8_0" in files:
    from gguf import GGUFReader, dequantize
    from numpy import abs, allclose, float16, float32

    rows = [
        next(t for t in GGUFReader(files[k]).tensors if t.name == "token_embd.weight")
        for k in ("F16", "Q8_0")
    ]
    weights = rows[0].data[0, :32].astype(float32)
    scale = abs(weights).max() / 127
    by_hand = float32(float16(scale)) * (weights / scale).round()
    assert allclose(
        by_hand, dequantize(rows[1].data[:1], rows[1].tensor_type)[0, :32], atol=scale / 100
    )
    print(
        f"32 weights in 34 bytes; the largest error is {abs(by_hand - weights).max() / abs(weights).max():.2%}"
    )

# %% [markdown]
# ### The same tokens?
#
# A model that reads other tokens than it learned is another model. llama.cpp must cut the conversations of this run
# into exactly the tokens of the training; a file that does not is not kept.

# %%
if files:
    print(f"{check_tokens(found, files['F16']):,} conversations, cut into the same tokens")

# %% [markdown]
# ### The same answers?
#
# Each file is measured as notebook 4 measures, by the same functions on the same tokens, beside the merged model in
# transformers: perplexity, and greedy answers. In how many answers a quantized file agrees shows how far rounding moves
# it.

# %%
lost = prove_files(found, files) if files else {}

# %%
from tabletune.report.text import with_interval

lines = {
    kind: {
        "MiB": f"{m['mib']:,.1f}",
        "response perplexity": with_interval(
            m["perplexity"]["response"], m["perplexity"]["response_ci95"], ",.3f"
        ),
        "of the merged model's": with_interval(
            m["ratio_to_merged"], m["ratio_to_merged_ci95"], ".2%"
        ),
        "same greedy answers": f"{m['same_answers']} of {m['questions']}",
    }
    for kind, m in lost.items()
}
pd.DataFrame(lines).T

# %% [markdown]
# An interval of the ratio that holds 100% means that no loss was seen. In 16 bits more than rounding, half a percent,
# would be a mistake in the file, and stops the notebook.
#
# ## Ollama
#
# Ollama does not read the chat template in the GGUF; it wants one in Go's template language. So that nothing is
# guessed, the tokenizer's template is asked: from what it makes of a few conversations follow the texts before, between
# and after the messages. Put together again, they must be what the tokenizer renders, and llama.cpp must cut them into
# the tokens of the training; if not, there is no `Modelfile`.
#
# The disclaimer is in the licence, which `ollama show --license` prints, and at the top of the file. In a system
# message it would be a prompt that the model was not trained with.

# %%
if files:
    print(write_modelfile(found, files[kinds[-1]], questions(found)) or "")

# %% [markdown]
# ## Save and upload
#
# With `push_to_hub`, the merged model and the adapter go to two repositories on the Hub, private unless you say
# otherwise, each with its card.

# %%
if not stage.is_done(found.inputs, found.outputs):
    stage.record(found.report["fingerprint"], found.inputs)
if push_to_hub:
    upload(found, "merged", push_to_hub)
    upload(found, "adapter", f"{push_to_hub}-adapter")

# %% [markdown]
# ## What we have now
#
# In this run's numbers:

# %%
print(f"Two model cards in {found.folder}, and {len(files)} files that run without Python.")
for kind in files:
    print(
        f"{kind}: {lost[kind]['mib']:,.0f} MiB, {lost[kind]['ratio_to_merged']:.2%} of the merged model's perplexity"
    )

# %% [markdown]
# To run them:
#
# ```bash
# llama-server -m export/gguf/NAME-Q8_0.gguf -c 1024     # then http://localhost:8080
# ollama create NAME -f export/gguf/Modelfile && ollama run NAME
# ```
#
# Neither program shows the disclaimer beside an answer. If you let others ask the model, show it to them.
#
# **To try:** `gguf_types = ["Q6_K", "Q3_K_M"]`, and where the answers begin to differ; or merge with the other
# `base_weights` in [notebook 3](03_merge_adapter.ipynb), and see whether 4 bits cost less.
#
# Next: [chat](chat.ipynb) opens a page on which the base model and this one answer side by side, and
# [report](report.ipynb) makes one page of the whole run.
