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
# # 5 · Baselines
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/05_baselines.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | **5 · baselines** | 6 · trust | 7 · export |
# |---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away |
#
# Was training worth it? The result stands under [What to ship](#What-to-ship), and the cells before
# it measure it.
#
# A model need not be fine-tuned to answer from a table. The base model can be shown some rows in
# its prompt, or the rows that are most similar to the question. And the answer of the most similar
# row can be copied, without any model. These simpler ways are the *baselines*. Here they answer the
# same questions as the fine-tuned model, and the notebook says which way to ship, that is, to give
# to users.
#
# - **In:** `dataset/` and `adapter/` in the run folder, from notebooks 1 and 2.
# - **Out:** `baselines/metrics.json`, `answers.jsonl` and `results.png`.
# - **Time:** some minutes on a T4. On two CPU cores with nothing else to do: four to six minutes
#   with the small model of the `cpu` profile.

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
# Rarely changed settings are folded away and come first; the next cell can override them. When
# `make` runs a notebook, it adds one more cell, with the settings of its profile. These override
# all others.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed parameters
attn_implementation = "auto"  # "sdpa" where the model has it, PyTorch's fast attention
item_field = ""  # {name} of the item in answer_template; "none": no item; "": the worked example's
bootstrap_samples = 2000  # draws behind each 95% interval
disclaimer = ""  # above every answer; "" for the example's, or a neutral one

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 4; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
eval_batch_size = 64  # rows to score, or questions to answer, at once, where memory allows
window = 1024  # tokens of a prompt and its answer; rows that do not fit are left out
baseline_samples = 16  # questions of each kind: new, the table's own, the table's own reworded
few_rows = 3  # rows in the base model's prompt; a run with context_rows takes that number
least_right = 0.5  # the share of right answers below which nothing is worth shipping
max_new_tokens = 256  # an answer is cut after so many tokens
unknown_threshold = "auto"  # with context_rows: below this score, 0 to 1, the answer is "nothing"

# %%
from tabletune.data.context import answer_with_context, load_context
from tabletune.data.retrieval import RowIndex, table_rows
from tabletune.evaluation import baselines
from tabletune.evaluation.answers import generate
from tabletune.evaluation.content import content_rules
from tabletune.evaluation.questions import question_sets
from tabletune.evaluation.recommendation import recommend
from tabletune.evaluation.scoring import score
from tabletune.evaluation.trained_run import open_trained_run
from tabletune.report import baselines as report
from tabletune.report.reading import read_lines
from tabletune.run.stage import start_stage

stage = start_stage("05_baselines", globals())
run = stage.folder

# %% [markdown]
# ## The questions
#
# They are chosen as in notebook 4. *New questions* are those of the test split, which training
# never saw. *The table's own questions* were in training. They are asked word for word, as they
# stand in the table, and once more *reworded*, as people might type them.

# %%
# checks that data set and adapter belong together; the merged model is not asked here
trained = open_trained_run(run, run_dir, base_model, with_merged=False, indexes=["evaluation"])
# True if the same was measured before: then nothing is computed again
done = stage.is_done(trained.inputs, ["baselines/metrics.json"])

# %%
sets = question_sets(trained.splits, baseline_samples)
questions = baselines.all_questions(sets)
report.questions_table(questions)

# %% [markdown]
# What is a right answer? That depends on the table:

# %%
rules = content_rules(trained.splits, trained.report, item_field)
print(rules.reasons["right"])

# %% [markdown]
# ## The nearest row
#
# The *nearest row* is the one whose question is most similar to the question that is asked. To
# compare two questions, we cut both into short pieces and count the pieces that they share. Here is
# a simple version by hand, with pieces of three letters:

# %%
def pieces(text):
    """The pieces of three letters that a text has."""
    return {text[start : start + 3] for start in range(len(text) - 2)}


rows = table_rows(trained.splits["train"])
question = sets["reworded"][0]["asked"].lower()
shared = [len(pieces(question) & pieces(row.question.lower())) for row in rows]
print(question, "→", rows[shared.index(max(shared))].question)

# %% [markdown]
# The package's index does this better: rare pieces count more than common ones. The similarity is a
# number from 0 to 1. The same question can be found several times, if the table has several answers
# to it. Only rows of the training split are searched.
#
# A run with `context_rows` has such an index already: it belongs to the run's *context*, which
# finds the rows for each prompt. Other runs get their index here.

# %%
import pandas as pd

context = load_context(run, unknown_threshold=unknown_threshold)  # None without context_rows
index = context.index if context else RowIndex.build(rows)
hits = index.search(sets["reworded"][0]["asked"], 3)
similar = [(hit.row.question, f"{hit.score:.2f}") for hit in hits]
pd.DataFrame(similar, columns=["question", "similarity"])

# %% [markdown]
# ## The ways to answer
#
# Here they are, the cheapest to set up first: copying needs no model, and only the fine-tuned model,
# at the end, needs training. (What a single question costs is measured below, and can be in another
# order.) Rows in the base model's prompt look like earlier turns of the chat: a question, its
# answer, and so on. The fixed rows are drawn at random and are the same for every question.

# %%
tokenizer, stops = trained.tokenizer, trained.stop_token_ids
number = context.settings.context_rows if context else few_rows
# "group" is the number of a question: fixed rows should not be those of a question asked here
fixed = baselines.fixed_rows(rows, number, {question["group"] for question in questions}, seed)
# rows that would leave no room for the answer are left out
prompts = baselines.Prompts(tokenizer, index, fixed, number, window - max_new_tokens, context)
possible_ways = baselines.ways_for(rules, context)
baselines.ways_table(possible_ways)

# %% [markdown]
# This is what the base model reads for one question in the way *base, nearest rows*. The most
# similar row comes last:

# %%
for message in prompts.messages(baselines.BASE_NEAREST, sets["reworded"][0]["prompt"]):
    print(f"{message['role']}: {message['content']}\n")

# %% [markdown]
# ## Ask
#
# Base model and adapter are one model, loaded once: with its adapter switched off, it is the base
# model. Each way answers all questions ("answering"). The *reference* is the table's answer to a
# question, the first one if there are several. We also measure how likely the model finds it after
# the same prompt ("scoring"). So there are two progress bars for each way that asks a model, in the
# order of the table above.
#
# A model that was not fine-tuned often writes on and on, which takes most of the time. So an answer
# may have at most twice as many tokens as the longest one of the table, and never more than
# `max_new_tokens`.

# %% tags=["nbval-ignore-output"]
from contextlib import nullcontext

import torch
from accelerate import PartialState

from tabletune.model.devices import compute_dtype
from tabletune.model.run_models import load_adapted

processes = PartialState(cpu=not torch.cuda.is_available())
source = (base_model, base_model_revision, compute_dtype(precision), attn_implementation)
adapted = None if done else load_adapted(run / "adapter", *source)
longest_answer = baselines.answer_limit(trained.splits, tokenizer, max_new_tokens)


# %%
def answer_prompts(chats):
    """The answers to some prompts, and the seconds that they took."""
    return generate(adapted, tokenizer, stops, chats, eval_batch_size, longest_answer, seed)


def result_of_way(way):
    """The Result of a way that asks a model: answers, and how likely it finds the references."""
    chats = prompts.questions(way, questions)
    references = prompts.references(way, questions, stops)
    # the window, and how far it moves on: each reference fits into one window
    length = max(len(row["input_ids"]) for row in references)
    # nullcontext changes nothing: the adapter stays on
    model_of_way = nullcontext() if way.model == "adapter" else adapted.disable_adapter()
    with model_of_way:
        if way.rows == "context":
            # the lookup may refuse a question before the model is asked
            answers, seconds = answer_with_context(context, questions, answer_prompts)
        else:
            answers, seconds = answer_prompts(chats)
        scores = score(adapted, references, tokenizer.pad_token_id, eval_batch_size, length, length)
    return baselines.Result(way, answers, seconds, prompts.lengths(chats), scores)


# %% tags=["nbval-ignore-output"]
if not done:
    results = baselines.results_without_model(possible_ways, prompts, questions)
    results += [result_of_way(way) for way in possible_ways if way.model]
    adapted = None

# %% [markdown]
# ## Save
#
# Each answer is checked, and the figures and the recommendation are worked out. As in notebook 4,
# the folder appears under its name only when it is complete, results of an earlier run move to
# `earlier/`, and if several processes run this notebook, one of them writes.

# %%
from tabletune.run.files import archive, atomic_write, read_json, write_json, write_lines

folder = run / "baselines"
if not done:
    checked = baselines.check_results(results, questions, rules, context)
    metrics = baselines.summarize_results(results, checked, rules, bootstrap_samples, seed)
    metrics["verdict"] = recommend(checked, metrics["ways"], least_right)
if not done and processes.is_main_process:
    archive(run, "baselines")
    with atomic_write(folder) as partial:
        partial.mkdir()
        write_json(partial / "metrics.json", metrics)
        lines = baselines.lines_of_answers(results, checked, questions)
        write_lines(partial / "answers.jsonl", lines)
        report.plot_baselines(metrics).savefig(partial / "results.png", dpi=150)
    stage.record(trained.report["fingerprint"], trained.inputs)
processes.wait_for_everyone()
metrics = read_json(folder / "metrics.json", stage.name)

# %% [markdown]
# ## What to ship

# %%
report.recommendation(metrics)

# %% [markdown]
# How this is decided:
#
# - People do not ask in the words of the table. So reworded questions decide. New questions
#   decide, too, if at least one way answers enough of them right (`least_right`). If the answers
#   are the names of classes, only new questions decide, because the table says already which
#   class each of its own texts has.
# - Of the ways that are about as good as the best one, the cheapest to set up wins: the one that
#   stands first in the table of ways. "About as good" means at most one *standard error* behind
#   the best. A standard error is how much such a difference typically varies by chance. So a more
#   expensive way must prove that it is better.
#
# In brackets are 95% intervals. Other questions would have given other figures, most likely within
# these limits.
#
# ## The figures behind it
#
# - *Right* is what matters: the share of right answers.
# - *chrF*, from 0 to 100, says how similar the wording of an answer is to the table's.
# - *Perplexity* says how uncertain the model was about the table's own answers. It is low as soon
#   as the model knows what answers look like, from training or from rows in its prompt. It is near
#   1 if the prompt contains the answer itself. So it matters least. A dash means that no model was
#   asked.
# - *Tokens a question* are those of the prompt and of the answer together. *Seconds a question* are
#   the time on this machine. Both are means over all questions, so they are the same in all parts
#   of the table.

# %%
report.baselines_table(metrics)

# %% [markdown]
# Black dots are the ways with the fine-tuned model, grey dots all others. Lines are the intervals.

# %% tags=["nbval-ignore-output"]
report.plot_baselines(metrics)

# %% [markdown]
# ### What training adds
#
# The fine-tuned model is compared with each other way on the same questions. +10 means that its
# share of right answers is 10 percentage points higher. If the interval contains 0, the difference
# may be chance. `metrics.json` has the other figures, too.

# %%
report.training_table(metrics)

# %% [markdown]
# ### Read some answers
#
# Here are two of the reworded questions, and what each way answers. The last line is the table's
# answer. If the table has several, it is the first one, but any of them is right.

# %%
lines = read_lines(folder / "answers.jsonl")
report.answers_of_ways(lines, trained.disclaimer(disclaimer))

# %% [markdown]
# Two things to try: `baseline_samples = 50`, for narrower intervals; `context_rows = 3` in notebook
# 1, which trains the model to answer from rows in its prompt.
#
# Next: [6 · trust](06_trust.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/06_trust.ipynb))
# asks what else the training did.
