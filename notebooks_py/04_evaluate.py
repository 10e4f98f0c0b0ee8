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
# # 4 · Evaluate
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/04_evaluate.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | **4 · evaluate** | 5 · baselines | 6 · trust | 7 · export |
# |---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away |
#
# - **In:** `dataset/`, `adapter/` and `merged/` in the run folder, from notebooks 1 to 3.
# - **Out:** `evaluation/metrics.json`, `answers.jsonl`, `samples.jsonl`, `scores.parquet` and
#   `results.png`.
# - **Time:** some minutes on a T4; about a minute on two CPU cores with the small model of the
#   `cpu` profile, about four with `context_rows`.
#
# Are the model's answers right? And how probable are the table's own answers to it? Three models
# answer the same questions: the base model, the base model with the adapter, and the merged model.
# What else the training did, to safety for instance, is the subject of notebook 6.

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
run_dir = "runs/home_remedies"  # that of notebooks 1 to 3; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
attn_implementation = "auto"  # "sdpa" where the model has it
eval_batch_size = 32  # rows to score, or questions to answer, at once, where memory allows
window = 1024  # tokens that the model sees at once; a longer text is read in overlapping windows
stride = 512  # by which a window moves on
samples = 20  # questions to answer: so many new ones, of the table, and reworded
ask_all_models = True  # False saves time: all but the merged model answer the new questions only
max_new_tokens = 256
do_sample = False  # greedy answers can be reproduced; sampled ones vary with temperature and top_p
temperature = 0.7
top_p = 0.9
bootstrap_samples = 2000
item_field = ""  # the answer template's field of what is recommended, or "none"; "": the example's
unknown_threshold = "auto"  # with context_rows: below this score, 0 to 1, the answer is "nothing"
disclaimer = ""  # above every answer; "" for the example's, or a neutral one
your_question = ""  # one more, of your own; "": the example's, or the first of the test split

# %%
import pandas as pd

from tabletune.evaluation.examination import Examination, ExaminationSettings
from tabletune.evaluation.metrics import joined_perplexity
from tabletune.evaluation.questions import own_question
from tabletune.evaluation.refusals import show_refusals
from tabletune.evaluation.scoring import perplexity, score
from tabletune.evaluation.trained_run import open_trained_run
from tabletune.model.devices import compute_dtype
from tabletune.model.run_models import load_adapted, load_merged
from tabletune.report import tables
from tabletune.report.pages import say_verdict, show_table
from tabletune.report.plots import plot_results
from tabletune.report.text import stored, with_interval
from tabletune.run.files import archive, atomic_write, read_json, write_json
from tabletune.run.stage import start_stage
from tabletune.stats import resampled

stage = start_stage("04_evaluate", globals())
run = stage.folder

# %% [markdown]
# ## What is evaluated
#
# The data set, the adapter and the merged model must belong together: this adapter was trained on
# this data set, and this merged model was made from this adapter. If they were evaluated before
# with the same parameters, the results are only shown again.

# %%
trained = open_trained_run(run, run_dir, base_model)
done = stage.is_done(trained.inputs, ["evaluation/metrics.json"])

# %% [markdown]
# ## What is asked
#
# - **The table's own questions**: questions of the training split, as they stand there.
# - **Reworded questions**: the same ones in other words: in another phrase or with a greeting, in
#   lower case, with typing errors. Training with `context_rows` rewords, too, but with other
#   phrases and other errors.
# - **New questions**: those of the test split, which training did not see.
# - **Rows added after training**, with `context_rows` only: the new questions once more, now with
#   their rows in the index, among the rows that are searched. So this shows whether the model
#   answers from rows that it was not trained on.
#
# Each question is asked once, up to `samples` of each kind. With `ask_all_models = False` only the
# merged model is asked all of them; the base model and the adapter get the new ones alone. In a
# conversation the last question is asked, after all the turns before it.

# %%
settings = ExaminationSettings.from_parameters(stage.parameters)
examination = Examination(trained, settings)
examination.overview()

# %% [markdown]
# What counts as a right answer depends on the table. Labels and short answers are compared word for
# word. Where the answer template has a line for an item, the item must be right. Free text must
# have nearly the words of the table's answer, and the same numbers and names. For this table:

# %%
show_table(tables.reasons_table(examination.rules.reasons))

# %% [markdown]
# ## Base and adapter, in one
#
# The base model is loaded as it was for training (in 4 bits with `quantization = "nf4"`), and the
# adapter beside it. One model serves for both: with the adapter switched off it is the base.

# %% tags=["nbval-ignore-output"]
import torch
from accelerate import PartialState

# under `accelerate launch` one of several
processes = PartialState(cpu=not torch.cuda.is_available())
source = (base_model, base_model_revision, compute_dtype(precision), attn_implementation)
adapted = None if done else load_adapted(run / "adapter", *source)

# %% [markdown]
# ## Perplexity, by hand
#
# How probable are the table's answers to the model? At each token it gives every token of its
# vocabulary a probability $p$ of being the next one. Perplexity looks at the token that really came
# next: it is $\exp$ of the mean of $-\log p$. A perplexity of 50 means that the model was as
# uncertain as in a choice among 50 equally likely tokens; 1 is certainty, and lower is better. Here
# it is for one row, and only for its answer (the *response*), since any model soon knows the fixed
# words of the question by heart. (With `context_rows` the row itself is kept out of the prompt, so
# the answer is a surprise.)

# %% tags=["nbval-ignore-output"]
if not done:
    shortest = min(examination.rows, key=lambda row: len(row["input_ids"]))
    # the response is at the end
    row = {name: values[-window:] for name, values in shortest.items()}
    ids = torch.tensor([row["input_ids"]], device=adapted.device)
    with torch.no_grad():
        # [tokens, vocabulary]: of the next token
        log_p = adapted(ids).logits[0, :-1].float().log_softmax(-1)
    nll = -log_p.gather(-1, ids[0, 1:, None])[:, 0].cpu()
    by_hand = nll[torch.tensor(row["completion_mask"][1:]) == 1].mean().exp().item()
    scored = score(adapted, [row], trained.tokenizer.pad_token_id, 1, window, stride)
    assert abs(by_hand / perplexity(scored, "response") - 1) < 1e-4
    print(f"perplexity of the shortest row: {by_hand:,.2f}, by hand and by the package")

# %% [markdown]
# `score` does this for all rows, in batches. It adds up all tokens of all rows and divides once, so
# long answers count by their length. A text longer than `window` tokens is read in windows that
# overlap, and each token is scored once.
#
# ## Read and answer
#
# Now each model reads the test rows, for the perplexity, and answers the questions. An answer
# *stops* if it ends with one of the stop tokens that were trained, within `max_new_tokens`. It *has
# the structure* if it is the answer template filled in. Both are form; whether it is *right* is
# content. Your own question (`your_question`) is asked as well; what would be right is not known
# for it.

# %% tags=["nbval-ignore-output"]
your_text = your_question or trained.example.get("your_question")
yours, your_questions = own_question(your_text, examination.questions)
if not done:
    with adapted.disable_adapter():
        examination.examine("base", adapted, yours)
    examination.examine("adapter", adapted, yours)
adapted = None  # room for the next

# %% [markdown]
# The merged model is loaded as anyone would load it, without an adapter and without 4 bits. Where
# notebook 3 left it on another machine, it is merged again, in memory.

# %% tags=["nbval-ignore-output"]
if not done:
    merged, evaluated_in = load_merged(trained.merged, run / "adapter", *source)
    examination.examine("merged", merged, yours)

# %% [markdown]
# ## How it is often done, and why not to
#
# Many notebooks, the one that this series grew out of among them, join ten *training* texts to one
# long text and take the perplexity of that. To compare, we do it once, too, and show it further
# down:

# %%
if not done:
    often_done = joined_perplexity(merged, trained.tokenizer, trained.splits["train"]["text"][:10])
    merged = None

# %% [markdown]
# ## Save
#
# All figures get a 95% interval. Everything below is read from these files.

# %%
folder, warning = run / "evaluation", trained.disclaimer(disclaimer)
if not done:
    metrics = examination.metrics()
    metrics["merged"] |= {"evaluated_in": evaluated_in} if evaluated_in else {}
    metrics["ten_joined_training_texts"] = {"perplexity": often_done}
if not done and processes.is_main_process:
    archive(run, "evaluation")
    with atomic_write(folder) as partial:
        partial.mkdir()
        write_json(partial / "metrics.json", metrics)
        examination.save(partial, warning, your_questions)
        plot_results(metrics).savefig(partial / "results.png", dpi=150)
    stage.record(trained.report["fingerprint"], trained.inputs)
processes.wait_for_everyone()
metrics = read_json(folder / "metrics.json", stage.name)

# %% [markdown]
# ## Are the answers right?

# %%
say_verdict(metrics["verdict"])

# %% [markdown]
# In brackets are 95% intervals: other questions would have given other figures, most likely within
# them. A line is one kind of question and one model that was asked. A dash stands where there is
# nothing to measure. With `context_rows` new questions have no row: to say that the table has
# nothing is right, and the lookup says so for many of them before a model is asked, for the base
# model, too.

# %%
tables.content_table(metrics)

# %% tags=["nbval-ignore-output"]
plot_results(metrics)

# %% [markdown]
# ### Side by side
#
# The numbers say how often; reading says what. An answer that does not stop ends at
# `max_new_tokens`, and says so. What an answer repeats again and again is shown twice.

# %%
tables.samples_table(folder, warning)

# %% [markdown]
# ### When it says that the table has nothing
#
# With `context_rows` and an `unknown_answer` there are two errors: to refuse a question that the
# table has an answer to (*wrongly "nothing"* above), and to answer one that it has none for.
# `unknown_threshold` trades one for the other. The lookup scores how similar the question of a row
# is, from 0 to 1. If even the best row is below the threshold, the model is not asked. If it is
# asked, but takes its answer from a row below the threshold, that answer is replaced by "nothing".
# And the model can refuse by itself. (*Copied from a row*: the model refused, but a row has nearly
# the same question, so its answer was given.)

# %%
show_refusals(run, examination.context)

# %% [markdown]
# ## Form and perplexity
#
# *Response perplexity* is that of the answers of the test split, *full-text* perplexity counts the
# words of the questions, too. *Bits per byte* says the same as a perplexity, in a form that can be
# compared between models with different tokens. For all three lower is better. *New tokens* are the
# length of an answer.
#
# With `context_rows` the rows of these questions are kept out of the prompt: the model was taught
# not to give their answers, so their perplexity may rise, and most answers are refusals, which have
# no structure and few tokens, or none if the lookup refused. The figure to look at is *own rows in
# the index*: how probable the right answers are when their rows can be found.

# %%
if metrics["base"]["too_small"]:
    questions = metrics["base"]["questions"]
    print(f"The test split has {questions} questions: too few to say how sure these figures are.")
tables.form_table(metrics)

# %% [markdown]
# ### How sure is a number?
#
# Other test questions would have given other numbers. The *bootstrap* imitates that: it draws as
# many questions as there are from the same questions, again and again; some come twice, others not
# at all. A question comes with all of its rows, since rows of one question resemble each other. The
# middle 95% of the perplexities that come out are the interval. By hand, for the adapter:

# %%
import numpy as np

table = pd.read_parquet(folder / "scores.parquet").query("model == 'adapter'")
totals = table.groupby("group")[["response_nll", "response_tokens"]].sum().to_numpy()
random = np.random.default_rng(seed)
size = len(totals)
drawn = [totals[random.integers(size, size=size)].sum(axis=0) for _ in range(bootstrap_samples)]
by_hand = np.exp([nll / tokens for nll, tokens in drawn])
low, high = np.percentile(by_hand, [2.5, 97.5])
caution = "" if size >= 6 else f", but with {size} questions that means nothing"
print(f"the middle 95%: {low:.2f} – {high:.2f}{caution}")

# %% [markdown]
# The package draws the same. It makes the interval a little wider, by the *t* distribution, since
# the bootstrap is too sure of itself when there are few questions:

# %%
columns = (table["response_nll"], table["response_tokens"], table["group"])
assert np.allclose(by_hand, np.exp(resampled(*columns, bootstrap_samples, seed)))
print("perplexity:", with_interval(*stored(metrics["adapter"], "response perplexity"), ".2f"))

# %% [markdown]
# Shares of answers, such as "right", get Wilson's interval: if 11 of 11 answers stop, the bootstrap
# would see no doubt, and Wilson says 74% to 100%. A perplexity of fewer than six questions gets no
# interval at all: that few may agree by chance.
#
# ### Which differences are real?
#
# Each line compares two models row by row: some questions are harder than others, but they are so
# for both. "points" are points of percent. Perplexities are compared by their ratio: 0.5 is half as
# uncertain. "yes" means that the interval excludes 0 (or 1 for a ratio). About 1 in 20 comparisons
# does so by chance alone: do not trust a single one at the edge.

# %%
tables.all_differences(metrics)

# %% [markdown]
# ### Against the joined training texts
#
# The perplexity of ten joined training texts is usually lower, for three reasons that have nothing
# to do with a better model: the model was trained on these texts, the fixed words of the questions
# count, and each text shows the form of the next.

# %%
figure = with_interval(*stored(metrics["merged"], "response perplexity"), ",.1f")
print(f"ten training texts joined:      {metrics['ten_joined_training_texts']['perplexity']:,.1f}")
print(f"responses of the test split:    {figure}")

# %% [markdown]
# ## Ask it yourself
#
# Your own question was asked with the others. To ask something else, set `your_question` above and
# run the notebook again: only the base model and the adapter are loaded, and all else stays as it
# is. `make ask` answers a whole file of questions.

# %% tags=["nbval-ignore-output"]
answers = read_json(folder / "your_questions.json", stage.name)
if set(your_questions) - set(answers):
    adapted = load_adapted(run / "adapter", *source)
    answers[your_questions[0]] = examination.answer_yours(adapted, yours)
    if processes.is_main_process:
        write_json(folder / "your_questions.json", answers)

# %%
tables.own_answers_table(answers, your_questions, warning)

# %% [markdown]
# ## What we have now
#
# Are its answers right, and what would help?

# %%
say_verdict(metrics["verdict"])

# %% [markdown]
# Two things to try:
#
# - `context_rows = 3` in notebook 1, if it was 0: rows of the table stand in the prompt then.
# - `samples = 50`: how much narrower do the intervals become?
#
# Next: [5 · baselines](05_baselines.ipynb) asks whether training was worth it, [6 ·
# trust](06_trust.ipynb) what else the training did; [chat](chat.ipynb) opens a page for more
# questions, and [report](report.ipynb) makes one page about the run.
