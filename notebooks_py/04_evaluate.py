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
# Are the model's answers right? The result stands under
# [Are the answers right?](#Are-the-answers-right?), and the cells before it measure it.
#
# Three models answer the same questions:
#
# - the *base* model, as it was before training,
# - the *adapter*: the base model with what notebook 2 trained,
# - the *merged* model of notebook 3, in which both are one.
#
# We also measure how probable each model finds the table's own answers (its *perplexity*, which is
# explained below). What else the training did, to safety for instance, is the subject of notebook
# 6.
#
# - **In:** `dataset/`, `adapter/` and `merged/` in the run folder, from notebooks 1 to 3.
# - **Out:** the folder `evaluation/`. The figures are in `metrics.json` and `results.png`. All
#   answers are in `answers.jsonl`, each with the table's answers to its question. For the new
#   questions, `samples.jsonl` has the answers of the three models side by side. `scores.parquet`
#   says how probable each row was.
# - **Time:** some minutes on a T4. On two CPU cores with nothing else to do: about a minute with
#   the small model of the `cpu` profile, about four with `context_rows`.

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
# The first cell has settings that are rarely changed. It is folded away; open it to change one. If
# you start the notebooks with the command `make`, it adds one more cell, with the settings of a
# profile (a file of parameters). These override all others. Terms in the comments are explained
# further down;
# [docs/parameters.md](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/parameters.md)
# says more about each.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed parameters
attn_implementation = "auto"  # "sdpa" where the model has it, PyTorch's fast attention
window = 1024  # tokens that the model sees at once; a longer text is read in overlapping windows
stride = 512  # tokens by which the window moves on
do_sample = False  # False takes the most likely token each time, so answers can be reproduced
temperature = 0.7  # with do_sample: higher values give more varied answers
top_p = 0.9  # with do_sample: only the likeliest tokens, which together have 90% probability
bootstrap_samples = 2000  # draws behind each 95% interval
item_field = ""  # {name} of the item in answer_template; "none": no item; "": the worked example's
disclaimer = ""  # a sentence above all answers; "": that of the worked example, or a neutral one

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 3; in Colab better "drive:home_remedies"
seed = 42  # of all random choices
base_model = "NousResearch/Llama-2-7b-chat-hf"  # as in notebook 2
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"  # its version on the Hub
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
eval_batch_size = 64  # rows to score, or questions to answer, at once, where memory allows
samples = 20  # at most this many questions of each kind; more make narrower intervals
ask_all_models = True  # False saves time: base and adapter answer the new questions only
max_new_tokens = 256  # an answer is cut after so many tokens
unknown_threshold = "auto"  # with context_rows: refuse below this similarity; "auto": notebook 1's
your_question = ""  # one question of your own; "": that of the worked example, or the first new one

# %%
import pandas as pd

from tabletune.evaluation.examination import Examination, ExaminationSettings
from tabletune.evaluation.perplexity_and_form import joined_perplexity
from tabletune.evaluation.questions import own_question
from tabletune.evaluation.refusals import show_refusals
from tabletune.evaluation.scoring import perplexity, score
from tabletune.evaluation.trained_run import open_trained_run
from tabletune.model.devices import compute_dtype
from tabletune.model.run_models import load_adapted, load_merged
from tabletune.report import tables
from tabletune.report.plots import plot_results
from tabletune.report.showing import say_verdict, show_table
from tabletune.report.text import stored, with_interval
from tabletune.run.files import archive, atomic_write, read_json, write_json
from tabletune.run.stage import start_stage
from tabletune.stats import resampled

stage = start_stage("04_evaluate", globals())
run = stage.folder

# %% [markdown]
# ## What is evaluated
#
# The notebook first checks that the three folders belong together: the adapter was trained on this
# data set, and the merged model was made from this adapter. Otherwise it stops. If the same models
# were evaluated before with the same parameters, nothing is computed again: the stored results are
# shown.

# %%
trained = open_trained_run(run, run_dir, base_model)
done = stage.is_done(trained.inputs, ["evaluation/metrics.json"])

# %% [markdown]
# ## What is asked
#
# There are up to four kinds of questions:
#
# - **The table's own questions** are those of the training split, word for word.
# - **Reworded questions** are the same ones as people might type them: in another phrase, with a
#   greeting, in lower case, or with typing errors. (Training with `context_rows` rewords questions,
#   too, but with other phrases and errors.)
# - **New questions** are those of the test split, which training did not see.
# - **Questions on rows added after training**, with `context_rows` only. The *index* is the set of
#   rows that are searched for each question. The new questions are asked a second time, after
#   their rows were added to the index. This shows whether the model can answer from rows that it
#   was not trained on.
#
# At most `samples` questions of each kind are asked. With `ask_all_models = False`, the base model
# and the adapter answer the new questions only, and the merged model answers all. In a table of
# conversations, the last question is asked, and the turns before it stand in the prompt.

# %%
settings = ExaminationSettings.from_parameters(stage.parameters)
examination = Examination(trained, settings)
examination.overview()

# %% [markdown]
# What counts as a right answer depends on the table. If the answers are short, such as the names of
# classes, they are compared word for word. Where the answer template has a line for an item, the
# item must be right. Free text must have nearly the same words as the table's answer, and the same
# numbers and names.
#
# The list below names what is measured for this table. Its first line says what makes an answer
# right. The others help to understand the result:

# %%
show_table(tables.reasons_table(examination.rules.reasons))

# %% [markdown]
# ## Load base model and adapter
#
# The base model is loaded as it was for training (in 4 bits with `quantization = "nf4"`), and the
# adapter is attached to it. This one model serves as both: with its adapter switched off, it is the
# base model.

# %% tags=["nbval-ignore-output"]
import torch
from accelerate import PartialState

# with several GPUs, each has a process of its own
processes = PartialState(cpu=not torch.cuda.is_available())
source = (base_model, base_model_revision, compute_dtype(precision), attn_implementation)
adapted = None if done else load_adapted(run / "adapter", *source)

# %% [markdown]
# ## Perplexity, by hand
#
# How probable does a model find the table's answers? After each token, the model gives every token
# of its vocabulary a probability `p` of being the next one. We look up the `p` of the token that
# really comes next. Perplexity is `exp(mean(-log(p)))` over all tokens. A perplexity of 50 means
# the model was as uncertain as if it chose among 50 equally likely tokens. 1 means that it was
# certain. Lower is better.
#
# Here is the perplexity of one row. Only its answer (the *response*) counts, because the words of
# the question are mostly the same in all rows. In the code, `log_p` is a table with a line for each
# place in the text and a column for each token of the vocabulary. `gather` picks from each line the
# entry of the token that really comes next. So `nll` is $-\log p$ of each token, its *negative
# log-likelihood*. At each place the model predicts the token that comes after it. So the first
# token is not predicted, and the prediction after the last one is not used.

# %% tags=["nbval-ignore-output"]
if not done:
    shortest = min(examination.rows, key=lambda row: len(row["input_ids"]))
    # a row that is too long: the end of it, where the response is
    row = {name: values[-window:] for name, values in shortest.items()}
    ids = torch.tensor([row["input_ids"]], device=adapted.device)
    with torch.no_grad():
        # [tokens - 1, vocabulary]: log p of each token as the next one
        log_p = adapted(ids).logits[0, :-1].float().log_softmax(-1)
    # [tokens - 1]: of the token that really comes next
    nll = -log_p.gather(-1, ids[0, 1:, None])[:, 0].cpu()
    by_hand = nll[torch.tensor(row["completion_mask"][1:]) == 1].mean().exp().item()
    scored = score(adapted, [row], trained.tokenizer.pad_token_id, 1, window, stride)
    assert abs(by_hand / perplexity(scored, "response") - 1) < 1e-4
    print(f"perplexity of the shortest row, with the adapter: {by_hand:,.2f}")

# %% [markdown]
# The last lines check that `score`, the package's function, gives the same figure. It does this for
# all rows, in batches. It takes the mean over all tokens of all rows, so long answers count more
# than short ones. A text longer than `window` tokens is read in overlapping windows, and each token
# is scored once.
#
# With `context_rows` the figure is high: for this measurement, the rows of the test questions
# cannot be found, so the model cannot know the answer.
#
# ## Score the rows, answer the questions
#
# Each model now reads the test rows for their perplexity ("scoring"), and answers the questions
# ("answering"; the bar is missing if all questions are answered at once). Two things about an
# answer's form are noted:
#
# - It *stops* if the model ends it by itself, within `max_new_tokens`.
# - It *has the structure* if it is the answer template, filled in.
#
# Whether it is *right* is another matter. Your own question (`your_question`) is asked as well, but
# nobody has said what the right answer to it is.

# %% tags=["nbval-ignore-output"]
your_text = your_question or trained.example.get("your_question")
# two lists with one entry each: the question as a prompt, and its text
yours, your_questions = own_question(your_text, examination.questions)
if not done:
    with adapted.disable_adapter():
        examination.examine("base", adapted, yours)
    examination.examine("adapter", adapted, yours)
adapted = None  # room for the next

# %% [markdown]
# The merged model is loaded as anyone would load it, without an adapter and without 4 bits. If
# notebook 3 left it on another machine, it is merged again, in memory.

# %% tags=["nbval-ignore-output"]
if not done:
    # `evaluated_in`: None, or "NF4" if memory is short and the model had to be loaded in 4 bits
    merged, evaluated_in = load_merged(trained.merged, run / "adapter", *source)
    examination.examine("merged", merged, yours)
    # for "Against the joined training texts", below
    joined = joined_perplexity(merged, trained.tokenizer, trained.splits["train"]["text"][:10])
    merged = None

# %% [markdown]
# ## Save
#
# The figures and answers go into the folder `evaluation/`. It appears under this name only when it
# is complete, and results of an earlier run move to `earlier/`. If several processes run this
# notebook, one of them writes. Everything below is read from these files.

# %%
folder = run / "evaluation"
warning = trained.disclaimer(disclaimer)
if not done:
    metrics = examination.metrics()
    if evaluated_in:
        metrics["merged"]["evaluated_in"] = evaluated_in
    metrics["ten_joined_training_texts"] = {"perplexity": joined}
if not done and processes.is_main_process:
    archive(run, "evaluation")
    with atomic_write(folder) as partial:
        partial.mkdir()
        write_json(partial / "metrics.json", metrics)
        examination.save(partial, warning, your_questions)
        plot_results(metrics).savefig(partial / "results.png", dpi=150)
    # what this was made from, for the next time
    stage.record(trained.report["fingerprint"], trained.inputs)
processes.wait_for_everyone()
metrics = read_json(folder / "metrics.json", stage.name)

# %% [markdown]
# ## Are the answers right?
#
# In brackets are 95% intervals. Other questions would have given other figures, most likely within
# these limits. `0 of 20 (0–3)` means that 0 of 20 answers are right, and that among all questions
# like these it would most likely be 0 to 3 of every 20. The table further down has the same in
# percent.

# %%
say_verdict(metrics["verdict"])

# %% [markdown]
# The same in a table: a line for each kind of question, and for each model that was asked. A dash
# means that no answer could be counted. *Right item* counts only the questions for which the table
# names an item, so its share can differ from *right*. (In the worked example, answers on
# emergencies name none. They are compared as free text.) The plot below shows some of the figures.
# Its thin lines are the intervals; where a share is 0%, there is no bar.
#
# With `context_rows` there are two more things to know:
#
# - The rows of the new questions are left out of the index. So the right answer to these questions
#   is that the table has nothing, "nothing" for short. The lookup, which searches the rows, gives
#   this answer to many of them before any model is asked. That is why the base model is often
#   right here.
# - *Copied from a row* means that the model said "nothing", but a row has nearly the same question.
#   So the answer of that row was given.

# %%
tables.content_table(metrics)

# %% tags=["nbval-ignore-output"]
plot_results(metrics)

# %% [markdown]
# ### Side by side
#
# The figures say how many answers are right. Now read some of them, to see what is wrong with the
# others. An answer that did not stop by itself is marked as cut. What an answer repeats again and
# again is shown only twice. Of several right answers only the first is shown here; `answers.jsonl`
# has all (`references`).
#
# With `context_rows`, the column *in the table* says if the rows of a question are left out. Then
# "nothing" is right. An answer of the table would count as right, too, but the model has no row to
# take it from.
#
# Adapter and merged model can answer differently, although notebook 3 found next to no difference.
# Here the adapter works beside weights of 4 bits, as in training, and the merged model was usually
# made from the weights as they were published. Such a difference can change one token, and after it
# the answers go on differently. (With `quantization = "none"` in notebook 2, or `base_weights =
# "dequantized"` in notebook 3, they should differ much less.)

# %%
tables.samples_table(folder, warning)

# %% [markdown]
# ### When it says that the table has nothing
#
# This section is about runs with `context_rows` and an `unknown_answer`. Without them, go on with
# [Form and perplexity](#Form-and-perplexity). Such a run can go wrong in two ways: refuse a
# question that the table has an answer to, or answer one that it has no answer to.
#
# The lookup gives each row a score from 0 to 1 for how similar its question is. A question is
# refused, which means that the answer is `unknown_answer`, in three cases:
#
# - No row reaches `unknown_threshold`. Then the model is not asked.
# - The model takes its answer from a row below the threshold. Then that answer is replaced.
# - The model itself says that the rows do not help.
#
# A higher threshold means more errors of the first kind (wrongly refused) and fewer of the second
# (wrongly answered). The table says for each threshold which share of the questions would be in
# error:

# %%
show_refusals(run, examination.context)

# %% [markdown]
# ## Form and perplexity
#
# All of this is measured on the test split, the new questions:
#
# - *Response perplexity* counts the tokens of the table's answers only. *Full-text perplexity*
#   counts those of the questions, too. Lower is better.
# - *Bits per byte* also say how uncertain the model is, but for each byte of the answer instead of
#   each token. So they can be compared between models with different tokenizers. Lower is better.
# - *New tokens* are the length of the model's own answers.
#
# With `context_rows`, look only at *perplexity, own rows in the index*. It says how probable the
# right answers are when their rows can be found. For the other figures the rows of these questions
# are left out. The model was trained to refuse without them, so the perplexity of the table's
# answers may rise. And most of its own answers are "nothing": they do not have the structure, and
# have few tokens. If the lookup refuses a question, the model writes no token at all.

# %%
if metrics["base"]["too_small"]:
    questions = metrics["base"]["questions"]
    print(f"The test split has {questions} questions: too few to say how sure these figures are.")
tables.form_table(metrics)

# %% [markdown]
# ### How sure is a number?
#
# Other test questions would have given other figures. The *bootstrap* imitates that. From the test
# questions it draws as many as there are, so that some are drawn twice and others not at all, and
# computes the perplexity. It does this again and again. The interval is where the middle 95% of
# these perplexities lie. A question is drawn with all of its rows, since they resemble each other.
# In the code, `group` is the number of the question. By hand, for the adapter:

# %%
import numpy as np

table = pd.read_parquet(folder / "scores.parquet").query("model == 'adapter'")
# [questions, 2]: the sum of -log p over a question's answers, and how many tokens these have
totals = table.groupby("group")[["response_nll", "response_tokens"]].sum().to_numpy()
random = np.random.default_rng(seed)
size = len(totals)
drawn = [totals[random.integers(size, size=size)].sum(axis=0) for _ in range(bootstrap_samples)]
by_hand = np.exp([nll / tokens for nll, tokens in drawn])
low, high = np.percentile(by_hand, [2.5, 97.5])
caution = "" if size >= 6 else f", but with {size} questions that means nothing"
print(f"the middle 95%: {low:.2f} – {high:.2f}{caution}")

# %% [markdown]
# The package draws the same questions, as the next cell checks. With few questions, the bootstrap's
# interval is too narrow. So the package makes it a little wider, by a usual correction for small
# samples (Student's *t* distribution):

# %%
columns = (table["response_nll"], table["response_tokens"], table["group"])
assert np.allclose(by_hand, np.exp(resampled(*columns, bootstrap_samples, seed)))
print("perplexity:", with_interval(*stored(metrics["adapter"], "response perplexity"), ".2f"))

# %% [markdown]
# Shares of answers, such as "right", get Wilson's interval. If 11 of 11 answers stop, the bootstrap
# would say 100% to 100%, and Wilson says 74% to 100%. The perplexity of fewer than six questions
# gets no interval, since so few may agree by chance.
#
# ### Which differences are real?
#
# Each line compares two models on the same questions. That is more exact than comparing two
# intervals, because a hard question is hard for both models. `-9 (-29 – +13) points` means: 9
# percentage points less, and the interval goes from 29 less to 13 more. Perplexities are divided: a
# ratio of 0.5 means half as uncertain.
#
# Look at the lines with *right* first. *Better* and *worse* are about the first of the two models.
# So are words such as *shorter*, *higher* and *lower*: they stand where neither is better. *No
# difference shown* means that the interval contains 0 (or 1 for a ratio). That is what we hope for
# from *merged - adapter*, since merging should change next to nothing. A difference that is shown
# can still be too small to matter, such as a ratio of 0.9995. About 1 in 20 comparisons shows a
# difference by chance. Do not trust a single borderline one.

# %%
tables.all_differences(metrics)

# %% [markdown]
# ### Against the joined training texts
#
# Many notebooks report another perplexity, and so did the one that this series grew out of: they
# join ten *training* texts to one long text and take its perplexity. It is usually lower, for three
# reasons that do not make the model better. It was trained on these texts. The fixed words of the
# questions count. And each text shows the form of the next one.

# %%
figure = with_interval(*stored(metrics["merged"], "response perplexity"), ",.1f")
print(f"ten training texts joined:      {metrics['ten_joined_training_texts']['perplexity']:,.1f}")
print(f"responses of the test split:    {figure}")

# %% [markdown]
# ## Ask it yourself
#
# The answers to `your_question` are below, cut after `max_new_tokens`. To ask something else,
# change it and run the notebook again. Only the base model and the adapter are loaded and asked
# then, and nothing is measured again. On your own machine, `make ask` asks a whole file of
# questions, and says which answers are right if the file has the right ones
# ([docs/questions.md](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/questions.md#how-do-i-test-it-with-my-own-questions)).

# %% tags=["nbval-ignore-output"]
answers = read_json(folder / "your_questions.json", stage.name)
if set(your_questions) - set(answers):  # it has not been asked yet
    adapted = load_adapted(run / "adapter", *source)
    answers[your_questions[0]] = examination.answer_yours(adapted, yours)
    if processes.is_main_process:
        write_json(folder / "your_questions.json", answers)

# %%
tables.own_answers_table(answers, your_questions, warning)

# %% [markdown]
# ## What we have now

# %%
say_verdict(metrics["verdict"][:1])

# %% [markdown]
# The other figures, and what would help, stand under
# [Are the answers right?](#Are-the-answers-right?).
#
# Two things to try:
#
# - `context_rows = 3` in notebook 1, if it was 0, and then notebooks 1 to 4 again: the prompt now
#   contains the most similar rows. How many answers are right?
# - `samples = 50`: how much narrower do the intervals become?
#
# Next: [5 · baselines](05_baselines.ipynb) ([in
# Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/05_baselines.ipynb))
# asks whether training was worth it, and [6 · trust](06_trust.ipynb) ([in
# Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/06_trust.ipynb))
# what else the training did. [chat](chat.ipynb) opens a page for more questions, and
# [report](report.ipynb) makes one page about the run.
