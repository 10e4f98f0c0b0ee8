# ---
# jupyter:
#   colab:
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

# %% [markdown] tags=["not-in-report"]
# # Compare runs
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/compare_runs.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | 5 · baselines | 6 · trust | 7 · export | **compare** |
# |---|---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away | all runs |
#
# - **In:** the run folders of two or more runs, finished or not.
# - **Out:** this page. `make compare RUNS="runs/a runs/b"` renders it, code hidden, as one HTML
#   file. `make sweep`, which makes runs with several values of some parameters, ends with it.
# - **Time:** seconds; no GPU is used and no model is loaded.

# %% [markdown] tags=["not-in-report"]
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

# %% [markdown] tags=["not-in-report"]
# ## Parameters

# %% tags=["parameters"]
runs = ["runs/home_remedies"]  # two or more run folders; in Colab ["drive:NAME", "drive:OTHER"]

# %% [markdown] tags=["not-in-report"]
# Each run is named after its folder.

# %%
import matplotlib.pyplot as plt
import pandas as pd

from tabletune.report import compare
from tabletune.report.learning_curve import learning_curve
from tabletune.report.reading import figures_table, losses
from tabletune.report.showing import say, say_verdict, show, show_table

every_run = compare.open_runs(runs)

# %% [markdown]
# # Runs beside each other
#
# ## What can be compared
#
# Runs are compared in pairs, on the same questions. So they must have the same test set. Runs that
# differ only in their seeds are one *setting*: the figures of such runs differ by chance alone.

# %%
comparable, sentences = compare.comparable_runs(every_run)
say(*sentences, kind="doubt")
if not sentences:
    say("All runs were evaluated, on the same test set.")
say(*compare.doubts_of(every_run))

# %% [markdown]
# ## Which is best
#
# The setting with the most right answers is the best. If these are equal or cannot be compared,
# the one with the fewest *bits per byte* is: they say how unlikely a model finds the table's
# answers, measured so that models with different tokenizers can be compared (lower is better).

# %%
# the kind of questions that all runs were asked, such as "reworded"; None if there is none
part = compare.compared_part(comparable)
settings = compare.ranked(compare.settings_of(comparable), part)
first, *rest = compare.headline(settings, part)
say(first, kind="headline")
say(*rest)
show_table(compare.settings_table(settings, part), "No run was evaluated.")

# %% [markdown]
# The best setting comes first. In round brackets are 95% intervals: other questions would have
# given other figures, most likely within these limits. In square brackets are the smallest and the
# largest figure of several seeds.
#
# Below, each other setting is compared with the best one on the same questions. That is more exact
# than comparing two intervals. The *result* is about right answers; where they show no difference,
# it is about bits per byte. *Better* or *worse* means that the interval of the difference excludes
# zero, and that the difference is larger than that between the seeds of one setting. "Points" are
# percentage points.
#
# If both settings ran with one seed, their bits per byte must differ by more than 0.015. In our
# measurements, another seed alone changed them by up to 0.014.

# %%
show_table(compare.pairs_table(settings, part), "There is no second setting to compare.")

# %%
figures = [compare.RIGHT, compare.BITS] if part else [compare.BITS]
size = (5.6 * len(figures), 1.2 + 0.42 * len(settings))
figure, panels = plt.subplots(
    1, len(figures), figsize=size, layout="constrained", dpi=200, squeeze=False
)
for axes, name in zip(panels[0], figures, strict=True):
    compare.plot_settings(axes, settings, name, part)
show(figure, "Dot chart of right answers and of bits per byte of each setting")

# %% [markdown]
# ## Would more rows help?
#
# `train_rows` says how many of the training questions are used. Runs that differ only in it show
# whether more would help. Each is a point of the figure. The verdict is about the last *doubling*:
# did the run with most rows gain anything over one with about half as many?

# %%
curves, verdicts = learning_curve({run.name: run.folder for run in comparable})
if curves is None:
    say("All runs have the same `train_rows`. `make sweep GRID=grids/rows.yaml` varies it.")
for verdict in verdicts:
    say_verdict(verdict)
if curves is not None:
    show(curves, "Line chart of right answers and perplexity by the number of training questions")

# %% [markdown]
# ## All figures
#
# These are the figures of the fine-tuned models: of the merged model, or of the adapter where
# nothing was merged. Their intervals were drawn with random numbers of their own, so they can
# differ a little from those above. A dash means that a figure was not measured.

# %%
evaluated = {run.name: run.entry for run in every_run if run.entry}
show_table(figures_table(evaluated), "Not evaluated yet.")

# %% [markdown]
# ## What differs
#
# First the parameters, then the versions and machines. On another machine or with other versions,
# the same parameters may give other figures. A dash means that no notebook with this parameter ran.
# If the notebooks of a run had different values, they stand with | in between. The *commit* is the
# version of this series.

# %%
for what in ("parameters", "surroundings"):
    texts = pd.DataFrame({run.name: run.info[what] for run in every_run}).fillna("–")
    texts = texts.drop("run_dir", errors="ignore")
    show_table(texts[texts.nunique(axis="columns") > 1], "Nothing: they are the same in all runs.")

# %% [markdown]
# ## Training
#
# The validation loss is measured on rows that training does not use. If it rises again, the model
# has begun to memorize. In an optimizer step the adapter is changed once; step 0 is the model
# before training. A nat is the unit of a natural logarithm.

# %%
show_table(figures_table({run.name: run.info["training"] for run in every_run}))

# %%
size = (5.6, 3.2 + 0.24 * len(every_run))
figure, axes = plt.subplots(figsize=size, layout="constrained", dpi=200)
for place, run in enumerate(every_run):
    style = "os^Dv*P"[place % 7] + ["-", "--", ":", "-."][place % 4]
    axes.plot(losses(run.info)["eval_loss"].dropna(), style, label=run.name)
axes.set(xlabel="optimizer step", ylabel="validation loss\n(nats a token, lower is better)")
figure.legend(loc="outside lower center", frameon=False)
show(figure, "Line chart of the validation loss of each run")

# %% [markdown] tags=["not-in-report"]
# ## Try
#
# - `make sweep GRID=grids/lora.yaml PROFILE=tiny` makes such runs from a *grid*, a file with
#   several values for some parameters, and ends with this page.
# - Make two runs that differ only in `seed`. How far apart are they? Do not trust a difference that
#   is smaller than that.
#
# Back to [report](report.ipynb), the page about one run.
