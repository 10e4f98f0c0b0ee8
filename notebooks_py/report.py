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
# # Report of a run
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/report.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | 6 · trust | 7 · export | **report** |
# |---|---|---|---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples | is it safe? | GGUF, cards | one page |
#
# - **In:** the run folder that notebooks 1 to 5 filled, or as many of them as have run.
# - **Out:** this page. `make report RUN_DIR=...` renders it, code hidden, as `report.html` in the run folder: one file
#   that opens without a network, on a phone, and prints.
# - **Time:** seconds; no GPU is used and no model is loaded.

# %% [markdown] tags=["not-in-report"]
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

# %% [markdown] tags=["not-in-report"]
# ## Parameters

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 5; in Colab "drive:home_remedies" if it lives there
price_per_hour = (
    1.0  # of your machine, in your currency: a stage costs its hours times this; 0 shows no costs
)
answers_shown = 5  # how many questions are shown with their answers

# %% [markdown] tags=["not-in-report"]
# What the stages left is in JSON files, which are taken as they are: what is missing is empty, and the page says so.

# %%
import matplotlib.pyplot as plt
import pandas as pd

from tabletune.report.pages import (
    FIGURES,
    at,
    disclaimer_of,
    doubts,
    figure_of,
    figures_table,
    losses,
    read_lines,
    read_run,
    say,
    show,
    show_answers,
    show_table,
)
from tabletune.report.plots import plot_figures
from tabletune.report.tables import differences_table, results_table
from tabletune.run.stage import begin

run = begin("report", globals()).folder
found = read_run(run)
data, metrics, models, manifest = (
    found[name] for name in ("data", "metrics", "models", "manifest")
)

# %% [markdown]
# # What this run made
#
# [perplexity](#Perplexity) · [training](#Training) · [answers](#Answers) · [data](#Data) · [trust](#Trust) ·
# [differences](#Differences) · [merging](#Merging) · [time](#Time-and-memory) · [parameters](#Parameters-of-the-run) ·
# [provenance](#Provenance)

# %%
rows, parameters = at(data, "splits", "train") or 0, found["parameters"]
say(
    f"{parameters.get('base_model', '–')}, fine-tuned on {rows:,} rows of {parameters.get('dataset', '–')}."
)
before, after = (
    figure_of(metrics.get(name), "response perplexity")[0] for name in ("base", found["tuned"])
)
if before and after:
    say(
        f"Response perplexity {before:,.2f} before fine-tuning, {after:,.2f} after.",
        kind="headline",
    )
show_table(results_table(metrics), "Not evaluated yet.")

# %% [markdown]
# Measured on questions that were not in training, with 95% intervals in brackets: other questions would have given
# other figures, most likely within them. Perplexity is how many tokens the model wavers between, on average, at each
# token of the right answer: lower is better.
#
# ## Before you trust these figures

# %%
warnings = doubts(found)
calm = "Nothing known speaks against them: all stages ran in order, on one data set."
say(*(warnings or [calm]), kind="doubt" if warnings else "")

# %% [markdown]
# ## Perplexity

# %%
if models:
    figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained", dpi=200)
    bars = {name: figure_of(entry, "response perplexity") for name, entry in models.items()}
    plot_figures(axes, bars, "response perplexity")
    show(figure, "Bar chart of response perplexity, with the figures of the table above")

# %% [markdown]
# ## Training
#
# The loss on the rows it is trained on, and on the validation rows, which are not. Where the second turns up while the
# first goes on falling, the model has begun to memorize.

# %%
curves = losses(found)
if len(curves) > 1:
    figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained", dpi=200)
    axes.plot(curves["loss"].dropna(), color="0.6", label="training")
    axes.plot(curves["eval_loss"].dropna(), "ko-", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.legend(frameon=False)
    show(figure, "Line chart of training and validation loss")
show_table(figures_table({"fine-tuning": found["training"]}), "Not trained yet.")

# %% [markdown]
# ## Answers
#
# Figures say how often, reading says what: answers to questions that were not in training, beside what the table says.

# %%
samples = read_lines(run / "evaluation" / "samples.jsonl")
disclaimer, shown = disclaimer_of(found, samples), min(answers_shown, len(samples))
keys = {
    "question": "question",
    "in the table": "in_the_table",
    "base": "base",
    "fine-tuned": found["tuned"],
}
say(f"{shown} of {len(samples)} questions that were answered.")
if shown:
    show_answers(
        {name: [str(row.get(key) or "–") for row in samples] for name, key in keys.items()},
        shown,
        disclaimer,
    )

# %% [markdown]
# ## Data
#
# What came in, what was changed or dropped and why, and what was left.

# %%
rows = {"in the table": data.get("rows_in")}
rows |= {
    f"changed: {rule}": at(change, "rows") for rule, change in (data.get("changed") or {}).items()
}
rows |= {f"dropped: {reason}": -count for reason, count in (data.get("dropped") or {}).items()}
rows |= {"left": data.get("rows_out")} | {
    f"for {name}": count for name, count in (data.get("splits") or {}).items()
}
rows |= {"safety examples mixed into training": data.get("safety_rows")}
show_table({name: f"{count:,} rows".replace("-", "−") for name, count in rows.items() if count})

# %% [markdown]
# ## Trust
#
# What `make trust` measures besides. Perplexity on rows that it was trained on and on rows that it was not: a wide gap
# is memory, a fall of both is learning. On other texts it should not rise.

# %%
places = {name: place for name, (place, _) in FIGURES.items()}
show_table(
    figures_table(
        models, [name for name in places if places[name].startswith(("by_split", "outside"))]
    )
)
say(*(metrics.get("memorization") or []))

# %%
judged = figures_table(
    models, [name for name in places if places[name].startswith(("safety", "grounding"))]
)
if len(judged):
    say(
        "Right is to send for help in emergencies, and to name items that the table has for the question."
    )
    show_table(judged)

# %%
answers = [
    line for part in ("trust", "evaluation") for line in read_lines(run / part / "safety.jsonl")
]
urgent = pd.DataFrame([line for line in answers if line["kind"] == "emergency"])
if len(urgent):
    urgent["wrong"] = urgent["offers_remedy"].astype(int) - urgent["seeks_help"].astype(int)
    base, tuned = (urgent[urgent["model"] == name] for name in ("base", found["tuned"]))
    both = tuned.merge(base, on="prompt", suffixes=("", "_base")).sort_values(
        "wrong", ascending=False, kind="stable"
    )
    say(
        f"{min(answers_shown, len(both))} of {len(both)} emergencies, those where it does the wrong thing on top:"
    )
    columns = {"question": "prompt", "base": "answer_base", "fine-tuned": "answer"}
    columns = {name: both[column].tolist() for name, column in columns.items()}
    show_answers(columns, min(answers_shown, len(both)), disclaimer)

# %% [markdown]
# ## Differences
#
# Two models on the same rows, row by row, are told apart more sharply than by two intervals beside each other. Of
# twenty such lines one says *yes* by chance alone.

# %%
if metrics.get("differences"):
    differences = differences_table(metrics["differences"]).reset_index()
    show_table(
        differences.sort_values("is it one?", ascending=False, kind="stable", ignore_index=True)
    )

# %% [markdown]
# ## Merging
#
# The merged model beside what was trained: how often both predict the same next token, and, where `make trust` compared
# the ways to merge, how far apart their predictions are (KL, nats a token: 0 is the same model).

# %%
ways = {"merged/, in notebook 3": found["merge"]} | (metrics.get("fidelity") or {})
show_table(figures_table(ways))
say(*(metrics.get("shipping") or []))

# %% [markdown]
# ## Time and memory
#
# Of each notebook's last run; one that was interrupted and went on counts from there.

# %%
show_table(figures_table(manifest))
seconds = sum(at(entry, "seconds") or 0 for entry in manifest.values())
cost = (
    f", {seconds / 3600 * price_per_hour:,.3f} at {price_per_hour:g} an hour"
    if price_per_hour
    else ""
)
say(f"In all {seconds:,.0f} seconds{cost}.")

# %% [markdown]
# ## Parameters of the run
#
# Where notebooks ran with different values, one stands after the other.

# %%
show_table(found["parameters"])

# %% [markdown]
# ## Provenance
#
# What to state beside a figure from this run, and what to install to get it again.

# %%
show_table({"data set (fingerprint)": data.get("fingerprint"), **found["surroundings"]})

# %% [markdown] tags=["not-in-report"]
# ## Try
#
# - `make trust RUN_DIR=...`, and this page again: does what it says of memory and safety agree with the answers that
#   you read?
# - Set `answers_shown` to all of them, and look for one that is wrong in a way that no figure here shows.
#
# Next: [compare_runs](compare_runs.ipynb) puts runs beside each other.
