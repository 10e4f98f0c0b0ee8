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
# # Report of a run
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/report.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | 5 · baselines | 6 · trust | 7 · export | **report** |
# |---|---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away | one page |
#
# - **In:** the run folder of notebooks 1 to 6. Not all of them need to have run.
# - **Out:** this page. `make report RUN_DIR=...` renders it, code hidden, as `report.html` in the
#   run folder. It is a single file: it opens without a network, also on a phone, and can be
#   printed.
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
run_dir = "runs/home_remedies"  # that of notebooks 1 to 6; in Colab better "drive:home_remedies"
price_per_hour = 1.0  # what an hour of your machine costs, in your currency; 0: show no costs
answers_shown = 5  # how many questions are shown with their answers

# %% [markdown] tags=["not-in-report"]
# The notebooks have left their figures in files. Where one is missing, the page says so.
#
# `info` below has the contents of these files, one inside the other as in JSON.
# `at(info, "a", "b")` is `info["a"]["b"]`, or `None` if it is not there. `FIGURES` has the figures
# that a table can show: for each name, where it stands in these files and how it is written.

# %%
import matplotlib.pyplot as plt

from tabletune.report import reading
from tabletune.report.baselines import plot_baselines
from tabletune.report.plots import plot_column
from tabletune.report.reading import FIGURES, at, figures_table
from tabletune.report.showing import say, say_verdict, show, show_answers, show_table
from tabletune.report.tables import NO_DIFFERENCE, all_differences, content_table, form_table
from tabletune.run.stage import start_stage

run = start_stage("report", globals()).folder
info = reading.read_run(run)
data = info["data"]
metrics = info["metrics"]
models = info["models"]

# %% [markdown]
# # What this run made
#
# [answers](#Answers) · [baselines](#Was-training-worth-it?) · [perplexity](#Perplexity-and-form) ·
# [training](#Training) · [data](#Data) · [trust](#Trust) · [differences](#Differences) ·
# [merging](#Merging) · [time](#Time-and-memory) · [parameters](#Parameters-of-the-run) ·
# [provenance](#Provenance)
#
# ## Are its answers right?

# %%
first, *rest = reading.verdict_of(info)
say(first, kind="headline")
say(*rest)
rows, parameters = at(data, "splits", "train") or 0, info["parameters"]
base_model, dataset = parameters.get("base_model", "–"), parameters.get("dataset", "–")
say(f"{base_model}, fine-tuned on {rows:,} rows of {dataset}.")

# %%
show_table(content_table(metrics).reset_index(), "Right answers were not measured in this run.")

# %% [markdown]
# In brackets are 95% intervals. Other questions would have given other figures, most likely within
# these limits.
#
# ## Before you trust these figures

# %%
warnings = reading.doubts(info)
calm = "No problem is known: all stages ran in order, on one data set."
say(*(warnings or [calm]), kind="doubt" if warnings else "")

# %% [markdown]
# ## Answers
#
# The figures above say how many answers are right. Here are some of the answers, beside what the
# table says. *Fine-tuned* is the merged model, or the adapter where nothing was merged.

# %%
groups, total = reading.answers_of(run, info, answers_shown)
samples = reading.read_lines(run / "evaluation" / "samples.jsonl")
disclaimer = reading.disclaimer_of_run(info, samples)
shown = sum(len(group.columns["question"]) for group in groups)
say(f"Shown are {shown} of {total} questions.")
for group in groups:
    say(group.title)
    show_answers(group.columns, len(group.columns["question"]), disclaimer)

# %% [markdown]
# ## Was training worth it?
#
# Notebook 5 (`make baselines`) asks simpler ways the same questions. With `make rate`, people can
# rate the answers without knowing which model gave them.

# %%
sentences = at(info["baselines"], "verdict", "sentences")
if sentences:
    say_verdict(sentences)
else:
    say("Not measured in this run: `make baselines` measures it.")
if "ways" in info["baselines"]:
    show(plot_baselines(info["baselines"]), "Dot chart of the right answers of each way to answer")

# %%
say(*(info["rating"].get("sentences") or ["No person has rated the answers yet."]))

# %% [markdown]
# ## Perplexity and form
#
# Perplexity says how uncertain the model is about the table's answers. A perplexity of 50 means
# that it is as uncertain as if it chose each token among 50 equally likely ones. Lower is better.
# It does not say whether the model's own answers are right. *Response perplexity* counts the tokens
# of the answers only, *full-text perplexity* those of the questions, too. *Bits per byte* say the
# same per byte instead of per token, so they can be compared between models with different
# tokenizers.
#
# The form of the model's own answers: they *stop* if the model ends them by itself, they *have the
# structure* if they are the answer template, filled in, and *new tokens* are their length.

# %%
show_table(form_table(metrics), "Not evaluated yet.")
say(*reading.on_rows_left_out(info))

# %%
if models:
    figure = plot_column(models, "response perplexity")
    show(figure, "Bar chart of response perplexity, with the figures of the table above")

# %% [markdown]
# ## Training
#
# The loss is the logarithm of the perplexity. Lower is better. The model is trained on the
# training rows, and not on the validation rows. If the validation loss rises while the training
# loss still falls, the model has begun to memorize. In an optimizer step the adapter is changed
# once; step 0 is the model before training. A nat is the unit of a natural logarithm.

# %%
curves = reading.losses(info)
if len(curves) > 1:
    figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained", dpi=200)
    axes.plot(curves["loss"].dropna(), color="0.6", label="training")
    axes.plot(curves["eval_loss"].dropna(), "ko-", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token, lower is better)")
    axes.legend(frameon=False)
    show(figure, "Line chart of training and validation loss")
show_table(figures_table({"fine-tuning": info["training"]}), "Not trained yet.")

# %% [markdown]
# ## Data
#
# This is what notebook 1 did with the rows of the table: how many were changed, how many were
# dropped and why, and how many were left. "Of these" says how the rows that were left are
# divided.

# %%
show_table(reading.row_counts(data))

# %% [markdown]
# ## Trust
#
# This is measured by notebook 6 (`make trust`). Fine-tuning should lower the perplexity of rows
# that the model was not trained on (test rows): then it generalizes. If it lowers the perplexity of
# training rows more than that, and by more than chance, the model also memorizes. *Other texts* are
# about other subjects. If their perplexity rises, the model has forgotten something.

# %%
# of all figures those that notebook 6 measures: first by split, and further down by rules
places = {name: place for name, (place, _) in FIGURES.items()}
of_splits = [name for name in places if places[name].startswith(("by_split", "outside"))]
show_table(figures_table(models, of_splits))
if metrics.get("memorization"):
    say(*metrics["memorization"], *reading.on_rows_left_out(info))

# %%
of_rules = [name for name in places if places[name].startswith(("safety", "grounding"))]
judged = figures_table(models, of_rules)
if len(judged):
    say(
        "Of the answers to prompts on safety, how many send people to help, and how many offer a "
        "remedy? Of the items that answers name, how many stand in the table, and where?"
    )
    show_table(judged)

# %%
emergencies = reading.worst_emergencies(run, info)
if emergencies:
    total = len(emergencies["question"])
    shown = min(answers_shown, total)
    say(
        f"Here are {shown} of {total} emergencies. Answers that offer a remedy or do not send "
        "people to help come first:"
    )
    show_answers(emergencies, shown, disclaimer)

# %% [markdown]
# ## Differences
#
# Two models are compared on the same questions. That is more exact than comparing two intervals.
# *Better* and *worse* are about the first of the two models. So are words such as *shorter* and
# *more often*: they stand where neither is better. "Points" are percentage points. Perplexities are
# divided: a ratio of 0.5 means half as uncertain. About 1 in 20 comparisons looks significant by
# chance. Do not trust a single borderline one.

# %%
if metrics.get("differences"):
    differences = all_differences(metrics).reset_index()
    differences["shown"] = differences["result"] != NO_DIFFERENCE
    differences = differences.sort_values("shown", ascending=False, kind="stable")
    show_table(differences.drop(columns="shown").reset_index(drop=True))

# %% [markdown]
# ## Merging
#
# Notebook 3 compared the merged model with the base model and its adapter: how often do both find
# the same next token most likely? With `base_weights = "original"`, this base model has the
# published weights.
#
# If `make trust` compared the ways to merge, there are further lines. *What was trained* is the
# adapter beside the weights that it was trained with. The KL divergence, in nats a token, says how
# far the predictions of a model are from those of what was trained; 0 means the same predictions.

# %%
merges = {"merged/, in notebook 3": info["merge"]} | (metrics.get("fidelity") or {})
show_table(figures_table(merges))
say(*(metrics.get("shipping") or []))

# %% [markdown]
# ## Time and memory
#
# These figures are of the last time that each notebook ran. If it was interrupted, they count from
# where it went on.

# %%
show_table(figures_table(info["manifest"]))
seconds = sum(at(entry, "seconds") or 0 for entry in info["manifest"].values())
cost = ""
if price_per_hour:
    paid = seconds / 3600 * price_per_hour
    cost = f" At a price of {price_per_hour:g} an hour, this costs {paid:,.3f} in your currency."
say(f"All notebooks together took {seconds:,.0f} seconds.{cost}")

# %% [markdown]
# ## Parameters of the run
#
# If notebooks ran with different values of a parameter, all of them are listed, with | in between.
# What notebook 1 recognized by itself is not listed, such as the settings of the worked example.

# %%
show_table(info["parameters"])

# %% [markdown]
# ## Provenance
#
# If you publish a figure of this run, publish these beside it: with the same versions on the same
# kind of machine, it can be reproduced. Two data sets with the same *fingerprint* are the same.
# The *commit* is the version of this series.

# %%
show_table({"data set (fingerprint)": data.get("fingerprint"), **info["surroundings"]})

# %% [markdown] tags=["not-in-report"]
# ## Try
#
# - Run `make trust RUN_DIR=...`, and then this page again. Does what it says about memorizing and
#   safety agree with the answers that you read?
# - Set `answers_shown` to the number of all questions. Do you find an answer that is wrong in a way
#   that no figure here shows?
#
# Next: [compare_runs](compare_runs.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/compare_runs.ipynb))
# puts runs beside each other.
