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
# - **In:** `dataset/` and `adapter/` in the run folder, from notebooks 1 and 2.
# - **Out:** `baselines/metrics.json`, `answers.jsonl` and `results.png`.
# - **Time:** some minutes on a T4; six minutes on two CPU cores with the small model of the `cpu`
#   profile.
#
# Was training worth it? A model need not be fine-tuned to answer from a table. It can be shown some
# rows in its prompt, or the rows that are most similar to the question. And the answer of the most
# similar row can be copied, without any model. Here all of these answer the same questions as the
# fine-tuned model, and the notebook says which one to ship: see [What to ship](#What-to-ship).

# %% [markdown]
# On Colab, the folded cell below installs the few libraries that are missing. Elsewhere it does
# nothing. Terms that are new to you are explained in the [glossary](../docs/glossary.md).

# %% cellView="form" jupyter={"source_hidden": true}
# @title Install what Colab lacks (elsewhere this does nothing)
import os
import sys
from importlib.util import find_spec

from IPython import get_ipython

series = "git+https://github.com/home-remedies-qlora/home-remedies-qlora@main"
needed = ["tabletune", "trl", "bitsandbytes", "liger_kernel", "sacrebleu"]
if "google.colab" in sys.modules and not all(map(find_spec, needed)):
    # a wrong address is an error, and no question for a password
    os.environ["GIT_TERMINAL_PROMPT"] = "0"
    lacking = "trl==0.29.1 bitsandbytes==0.50.2 liger-kernel==0.8.5 "
    lacking += "sacrebleu==2.6.0 portalocker==4.4.2 colorama==0.4.6"
    get_ipython().run_line_magic("pip", f"install -qqq --no-deps {series} {lacking}")
    if find_spec("tabletune") is None:
        sys.exit(f"Nothing came from {series}: set `series` to an address or an uploaded ./FOLDER.")

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 4; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
attn_implementation = "auto"  # "sdpa" where the model has it
eval_batch_size = 32  # rows to score, or questions to answer, at once, where memory allows
window = 1024  # tokens of a prompt and its answer; rows that do not fit are left out
baseline_samples = 16  # questions of each kind: new, of the table, and these reworded
few_rows = 3  # rows in a prompt, where the run has no context_rows
least_right = 0.5  # the share of right answers below which nothing is worth shipping
max_new_tokens = 256
item_field = ""  # the answer template's field of what is recommended, or "none"; "": the example's
unknown_threshold = "auto"  # with context_rows: below this score, 0 to 1, the answer is "nothing"
bootstrap_samples = 2000
disclaimer = ""  # above every answer; "" for the example's, or a neutral one

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
from tabletune.report.pages import read_lines
from tabletune.report.tables import side_by_side
from tabletune.run.stage import start_stage

stage = start_stage("05_baselines", globals())
run = stage.folder

# %% [markdown]
# ## The questions
#
# They are the questions of notebook 4. *New* ones are those of the test split, which training never
# saw. Those of *the table* were in training; they are asked as they stand there, and once more in
# other words, as people would ask.

# %%
trained = open_trained_run(run, run_dir, base_model, with_merged=False, indexes=["evaluation"])
done = stage.is_done(trained.inputs, ["baselines/metrics.json"])

# %%
import pandas as pd

sets = question_sets(trained.splits, baseline_samples)
questions = baselines.all_questions(sets)
pd.DataFrame(questions).groupby("part", sort=False)["asked"].agg(["count", "first"])

# %% [markdown]
# What is a right answer? That depends on the table:

# %%
rules = content_rules(trained.splits, trained.report, item_field)
print(rules.reasons["right"])

# %% [markdown]
# ## The nearest row
#
# How similar is a question to those of the table? Both are cut into short pieces of words, and the
# pieces that they share are counted, the rare ones most. By hand, with pieces of three letters, all
# of the same weight:

# %%
def pieces(text):
    """The pieces of three letters that a text has."""
    return {text[place : place + 3] for place in range(len(text) - 2)}


rows = table_rows(trained.splits["train"])
question = sets["reworded"][0]["asked"].lower()
shared = [len(pieces(question) & pieces(row.question.lower())) for row in rows]
print(question, "→", rows[shared.index(max(shared))].question)

# %% [markdown]
# The package's index does this well, with the rows of the training split only:

# %%
context = load_context(run, unknown_threshold=unknown_threshold)
index = context.index if context else RowIndex.build(rows)
hits = index.search(sets["reworded"][0]["asked"], 3)
pd.DataFrame([(hit.row.question, hit.score) for hit in hits], columns=["question", "similarity"])

# %% [markdown]
# ## The ways to answer
#
# From the cheapest to the dearest. Rows in a prompt stand there as earlier turns: the chat so far,
# as it were. The fixed ones are the same for every question, drawn by chance.

# %%
tokenizer, stops = trained.tokenizer, trained.stop_token_ids
number = context.settings.context_rows if context else few_rows
fixed = baselines.fixed_rows(rows, number, {question["group"] for question in questions}, seed)
prompts = baselines.Prompts(tokenizer, index, fixed, number, window - max_new_tokens, context)
possible_ways = baselines.ways_for(rules, context)
pd.DataFrame(possible_ways)

# %% [markdown]
# A question with the nearest rows, as the base model is asked:

# %%
prompts.messages(baselines.BASE_NEAREST, sets["reworded"][0]["prompt"])

# %% [markdown]
# ## Ask
#
# Base model and adapter are one model, loaded once: with the adapter switched off it is the base.
# Each way answers all questions, and reads the answer that the table has for each: how likely is it
# after this prompt? An untrained model rambles on, which takes most of the time. So an answer may
# have twice as many tokens as the longest one of the table, but not more than `max_new_tokens`.

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


def ask_model(way):
    """The Result of a way that asks a model: answers, and how likely it finds the references."""
    chats = prompts.questions(way, questions)
    references = prompts.references(way, questions, stops)
    length = max(len(row["input_ids"]) for row in references)
    with nullcontext() if way.model == "adapter" else adapted.disable_adapter():
        if way.rows == "context":
            answers, seconds = answer_with_context(context, questions, answer_prompts)
        else:
            answers, seconds = answer_prompts(chats)
        scores = score(adapted, references, tokenizer.pad_token_id, eval_batch_size, length, length)
    return baselines.Result(way, answers, seconds, prompts.lengths(chats), scores)


# %% tags=["nbval-ignore-output"]
if not done:
    results = baselines.results_without_model(possible_ways, prompts, questions)
    results += [ask_model(way) for way in possible_ways if way.model]
    adapted = None

# %% [markdown]
# ## Save

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
#
# Nobody asks quite as a table does, so the decision rests on the reworded questions and on the new
# ones, if any way can answer those. If the answers are labels it rests on new questions alone: a
# text of the table has its label already. The verdict names the cheapest way that is as good as the
# best one, within one standard error. So a dearer way must prove that it is better.

# %%
report.recommendation(metrics)

# %% [markdown]
# ## The figures behind it
#
# *Right* is what people care about. *chrF* says how much of the wording of the nearest reference an
# answer has, from 0 to 100. The perplexity of the references falls as soon as the form of an answer
# stands in the prompt, so it says least.

# %%
report.baselines_table(metrics)

# %% tags=["nbval-ignore-output"]
report.plot_baselines(metrics)

# %% [markdown]
# ### What training adds
#
# How many more answers of the fine-tuned model are right, in percentage points: against each of the
# others, in pairs, on the same questions. If the interval includes zero, the difference may be
# chance. `metrics.json` has the other figures, too.

# %%
report.training_table(metrics)

# %% [markdown]
# ### Read them
#
# Two of the reworded questions, and what each way answers. The last line has the table's answer.

# %%
answered = pd.DataFrame(read_lines(folder / "answers.jsonl")).query("part == 'reworded'")
some = answered.pivot_table("answer", "way", "question", "first", sort=False).iloc[:, :2]
some.loc["the table"] = answered.groupby("question")["references"].first().str[0]
side_by_side(some.reset_index().to_dict("list"), len(some), trained.disclaimer(disclaimer))

# %% [markdown]
# Two things to try: `baseline_samples = 50`, for narrower intervals; `context_rows = 3` in notebook
# 1, which trains the model to answer from rows in its prompt.
#
# Next: [6 · trust](06_trust.ipynb) asks what else the training did.
