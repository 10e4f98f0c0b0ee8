# ---
# jupyter:
#   colab:
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

# %% [markdown] tags=["not-in-report"]
# # Compare runs
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/compare_runs.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | 6 · trust | 7 · export | **compare** |
# |---|---|---|---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples | is it safe? | GGUF, cards | all runs |
#
# - **In:** the run folders of two or more runs, finished or not.
# - **Out:** this page. `make compare RUNS="runs/a runs/b"` renders it, code hidden, as one HTML file; `make sweep` ends
#   with it.
# - **Time:** seconds; no GPU is used and no model is loaded.

# %% [markdown] tags=["not-in-report"]
# On Colab, this cell installs what the runtime lacks, and nothing the second time. Elsewhere it does nothing.

# %%
import os
import sys
from importlib.util import find_spec

from IPython import get_ipython

series = "git+https://github.com/home-remedies-qlora/home-remedies-qlora@main"
if "google.colab" in sys.modules and not all(map(find_spec, ["tabletune", "trl", "bitsandbytes", "liger_kernel"])):
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # a wrong address is an error, and no question for a password
    lacking = "trl==0.29.1 bitsandbytes==0.50.2 liger-kernel==0.8.5"
    get_ipython().run_line_magic("pip", f"install -qqq --no-deps {series} {lacking}")
    if find_spec("tabletune") is None:
        sys.exit(f'Nothing came from {series}: set `series` to the address, or upload the folder and set "./FOLDER".')

# %% [markdown] tags=["not-in-report"]
# ## Parameters

# %% tags=["parameters"]
runs = [
    "runs/home_remedies"
]  # run folders, as a list or with spaces between; in Colab "drive:NAME" if they live there

# %% [markdown] tags=["not-in-report"]
# A run is named by its path below the folder that all of them are in.

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd

from tabletune.report.pages import (
    digest_of_test,
    doubts,
    figure_of,
    figures_table,
    losses,
    read_run,
    say,
    show,
    show_table,
)
from tabletune.run.hub import open_run

places = runs.split() if isinstance(runs, str) else runs
folders = list(dict.fromkeys(open_run(place).resolve() for place in places))
common = os.path.commonpath([folder.parent for folder in folders])
named = {os.path.relpath(folder, common): read_run(folder) for folder in folders}

# %% [markdown]
# # Runs beside each other

# %%
tuned = {name: run["metrics"].get(run["tuned"]) for name, run in named.items()}
measured = {name: figure_of(entry, "response perplexity") for name, entry in tuned.items()}
measured = {
    name: (value, ci95 or [value] * 2)
    for name, (value, ci95) in measured.items()
    if value is not None
}
order = sorted(measured, key=lambda name: measured[name][0])
if order:
    as_good = [name for name in order[1:] if measured[name][1][0] <= measured[order[0]][1][1]]
    say(
        f"The lowest response perplexity: {order[0]}, {measured[order[0]][0]:,.2f}.",
        kind="headline",
    )
    say(f"Not told apart from it: {', '.join(as_good) or 'none of the others'}.")

# %%
show_table(figures_table({name: tuned[name] for name in order}), "No run was evaluated.")

# %% [markdown]
# These are the fine-tuned models, the merged one where there is one, the lowest perplexity first. In brackets are 95%
# intervals: where two of them meet, this test set does not tell the runs apart.
#
# ## Before you compare

# %%
said = [f"{name}: {' '.join(lines)}" for name, run in named.items() if (lines := doubts(run))]
if len({digest_of_test(folder) for folder in folders}) > 1:
    said.append("WARNING: these runs have different test sets. Their figures are not comparable.")
if len({run["parameters"].get("base_model") for run in named.values()}) > 1:
    said.append(
        "WARNING: the base models differ. Perplexity counts tokens, and each tokenizer cuts its own."
    )
say(*(said or ["All runs were evaluated, on the same test set."]), kind="doubt")

# %% [markdown]
# ## Response perplexity

# %%
figure, axes = plt.subplots(figsize=(5.6, 1.2 + 0.42 * len(order)), layout="constrained", dpi=200)
for place, name in enumerate(order):
    axes.plot(measured[name][1], [place] * 2, "|-k", markersize=10)
    axes.plot(measured[name][0], place, "o", color="0.6", markeredgecolor="black", markersize=8)
axes.set(xlabel="response perplexity, with 95% interval", ylim=(len(order) - 0.5, -0.5))
axes.set_yticks(range(len(order)), order)
show(figure, f"Dot chart of response perplexity: {measured}")

# %% [markdown]
# ## What differs
#
# First the parameters, then the rest: on another machine or with other versions, the same parameters may give other
# figures.

# %%
for what in ("parameters", "surroundings"):
    texts = (
        pd.DataFrame({name: run[what] for name, run in named.items()})
        .fillna("–")
        .drop("run_dir", errors="ignore")
    )
    show_table(texts[texts.nunique(axis="columns") > 1], "Nothing: they are the same in all runs.")

# %% [markdown]
# ## Training

# %%
show_table(figures_table({name: run["training"] for name, run in named.items()}))

# %%
figure, axes = plt.subplots(figsize=(5.6, 3.2 + 0.24 * len(named)), layout="constrained", dpi=200)
for place, (name, run) in enumerate(named.items()):
    style = "os^Dv*P"[place % 7] + ["-", "--", ":", "-."][place % 4]
    axes.plot(losses(run)["eval_loss"].dropna(), style, label=name)
axes.set(xlabel="optimizer step", ylabel="validation loss (nats a token)")
figure.legend(loc="outside lower center", frameon=False)
show(figure, "Line chart of the validation loss of each run")

# %% [markdown] tags=["not-in-report"]
# ## Try
#
# - `make sweep GRID=grids/lora.yaml PROFILE=tiny` makes such runs from a grid, and ends with this page.
# - Two runs that differ in `seed` alone: how far apart are they? Take no smaller difference seriously.
#
# Back to [report](report.ipynb), the page about one run.
