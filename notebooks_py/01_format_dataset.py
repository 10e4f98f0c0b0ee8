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
# # 1 · From a table to chat examples
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/01_format_dataset.ipynb)
#
# | **1 · format** | 2 · fine-tune | 3 · merge | 4 · evaluate | 5 · baselines | 6 · trust | 7 · export |
# |---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away |
#
# **What fine-tuning is.** A chat model has read a large part of the internet, and it answers any
# question in its own way. Fine-tuning shows it a few hundred of *your* questions and answers, and
# changes it a little, until it answers like them. The model before that is called the *base model*.
# People fine-tune to get a fixed format or a tone, to sort texts into classes, or so that a small
# model can use their data. This series does it with a table, and measures whether it was worth it.
#
# The worked example is a table of home remedies. There are two such tables, with the same columns.
# One is on the Hub (huggingface.co, where models and data sets are shared); `dataset` below names
# it. The other is `data/home_remedies.csv`, which comes with this series for runs without a GPU. It
# begins like this (*Yogasan* is a yoga posture; the web address in the first row is a slip, which
# this notebook removes):
#
# | Name of Item | Health Issue | Home Remedy | Yogasan |
# |---|---|---|---|
# | Ginger | Common Cold | Simmer a teaspoon of grated ginger in a cup of water for five minutes, strain it, and sip the tea warm twice a day. See a doctor if fever stays high. | https://images.example.org/yoga/cold-breathing.jpg |
# | Tulsi Leaves | COMMON COLD | Boil eight washed tulsi leaves with two crushed peppercorns in a glass of water until a little is left, then drink it warm each evening for three days. | Bhujangasana |
# | Chicken Soup | Common Cold | Make a light soup with chicken, garlic, carrot and a pinch of salt, and have a warm bowl at lunch and dinner while the cold lasts. | Shavasana |
#
# At the end of the series, a chat model answers questions like "I am suffering from Common Cold.
# Please suggest a home remedy."
#
# - **In:** a table: a `.csv`, `.tsv`, `.xlsx`, `.json`, `.jsonl` or `.parquet` file, a folder, or a
#   data set on the Hub.
# - **Out:** `dataset/` in the *run folder*, which is `run_dir` below. It holds conversations,
#   divided into training, validation and test rows, and a report, `report.json`.
# - **Time:** under a minute for a table of ten thousand rows; no GPU is used.
#
# In Colab each notebook runs on a machine of its own. To let notebook 2 find what this one writes,
# set `run_dir` below to `"drive:home_remedies"` in every notebook. The results are then kept in
# your Google Drive.
#
# The worked example is **educational**: nothing in the table, and nothing that a model trained on
# it says, is medical advice.

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
# For your own table, `dataset` is often all that you change: the notebook recognizes how its rows
# become conversations, and shows it below. Terms in the comments are explained further down, where
# they are used.
# [docs/parameters.md](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/parameters.md)
# says more about each parameter, and
# [docs/own-data.md](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/own-data.md)
# explains each `shape`.

# %% tags=["main-parameters"]
run_dir = "runs/home_remedies"  # where everything is written; in Colab better "drive:home_remedies"
seed = 42  # of all random choices but the splits
base_model = "NousResearch/Llama-2-7b-chat-hf"  # its Hub id; notebook 2 will train it
dataset = "medss19/home_remedies_dataset"  # a file, a folder, a pattern like "data/*.csv", a Hub id
dataset_config = ""  # a sheet of a workbook, or a configuration (one part) of a Hub data set
splits = {}  # files of each split, if you have them: {"train": "train.csv", "test": "test.csv"}
shape = "auto"  # or columns, prompt_completion, instruction, messages, conversations, text
columns = {}  # your names of columns: {"question": "Customer asks", "answer": "We reply"}
question_template = ""  # makes a question from columns: "I have {issue}. What helps?"
answer_template = ""  # the same for the answer; a line whose columns are all empty is skipped
answer_column = ""  # the column that an answer cannot do without: a row without it is dropped
system_prompt = ""  # how the model is to behave; for rows without a system message of their own
context_rows = 0  # how many rows of the table, the most similar ones, stand in every prompt
unknown_answer = ""  # what to answer if no row fits, such as "The table has nothing on that."
max_length = 512  # tokens (parts of words) in an example; a longer one is dropped, never cut
validation_fraction = 0.1  # of the questions
test_fraction = 0.15  # of the questions

# %% [markdown]
# The other parameters are folded away. Open a cell to change one. If you start the notebooks with
# the command `make`, it adds a cell with the settings of a *profile*, a file of parameters for one
# kind of hardware. They override those above. In Colab there is no such cell.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed: how a table is read
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"  # its version on the Hub
thinking = False  # True: the answers in the table begin with <think>…</think>
template_date = "2026-01-01"  # the date in prompts, for a chat template that writes one
dataset_revision = "main"  # the version of a Hub data set: a branch or a commit
encoding = "auto"  # of a text file: "utf-8", "cp1252", "shift_jis", …
delimiter = "auto"  # between the cells of a .csv: ",", ";", "tab", …
quotes = "auto"  # "letters": a double quote is text; "cells": it encloses a cell of several lines
header = True  # False: the first line is a row, and the columns are called 1, 2, …
header_row = 0  # the line with the column names; 0: the first line that is not a title
split_column = ""  # the column that names the split of a row; one called "split" is recognized
roles = {}  # who speaks in a conversation: {"Alice": "user", "Bob": "assistant"}
ignore_turn_keys = []  # keys of messages to leave out, such as ["reasoning_content"]
answer_lists = ""  # if a cell has a list of answers: "rows" makes a row of each; "first", …

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed: what becomes of its rows
drop_values = []  # texts that count as empty, such as "n/a"; for one column {"yoga": ["n/a"]}
drop_patterns = []  # the same as patterns (regular expressions), such as "^see page"
strip_addresses = False  # remove web addresses from all texts
collapse_spaces = False  # single spaces, no invisible characters; not for code
html_to_text = False  # keep the text of HTML without its tags
max_dropped = 0.1  # the notebook stops if a larger share of the rows is lost
near_duplicate_threshold = 1.0  # near duplicates (see below) are dropped; 1.01 keeps them
keep_duplicates = False  # True: rows that stand there twice on purpose are kept
split_by = "question"  # "row": for a table in which all rows have the same question
split_seed = 42  # decides which questions are test questions
train_rows = 1.0  # 0.5: half of the training questions; 50: fifty of them
loss_on_last_answer = False  # True: only the last answer of a conversation is learned
safety_rows = 0  # add rows about emergencies to the training: True for all, or how many
push_dataset_to = ""  # publish the result on the Hub as this (docs/colab.md: the token it needs)

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed: prompts with rows of the table in them, where context_rows is above 0
context_template = "Rows of the table:\n\n{rows}\n\nAnswer this, from the rows if they have it:\n{question}"
context_characters = 0  # above 0: adds more rows, up to this many characters for all rows together
context_hit_rate = 0.6  # share of the training questions with their own row in the prompt
copies = 1  # 2: each row is asked in two different prompts; 0.3: only 30% of the rows are asked
most_tokens = 0  # of all training prompts together; 0: no limit
reworded_share = 0.5  # share of the training questions that are asked in other words
rewordings = ""  # a column or file with other wordings of the questions; "": simple rules
practice_prompts = 0  # prompts about made-up tables: practice in recognizing reworded questions
out_of_scope = ""  # what not to answer: "emergencies", or a text file with a question a line
unknown_threshold = "auto"  # 0.3: if all rows are less similar than that, refuse to answer
certain_threshold = "auto"  # 0.9: if the model refuses, the answer of a row this similar is given

# %% tags=["parameters"]
# `make` adds its cell below this one

# %%
# tabletune is the Python package of this series
from tabletune.run.stage import start_stage

# a stage is the work of one notebook; `globals()` hands it all parameters, and it checks them
stage = start_stage("01_format_dataset", globals())
run = stage.folder  # the run folder, as a path

# %% [markdown]
# ## The model's format
#
# A model does not read letters but *tokens*: words or parts of words, each with a number. The
# *tokenizer* turns text into tokens. Every chat model was trained on conversations in a text format
# of its own, its *chat template*. We use that template as it is, so that our rows look like the
# conversations that the model knows.
#
# The table shows the template of this model. Its first line is the end of a prompt in which the
# user has said *Hello*. After it, the model writes its answer. ⏎ is the end of a line. A *system
# message* comes before a conversation and says how the model is to behave. *Thinking* is what some
# models write before they answer. Some templates also write a date.

# %%
from tabletune.chat.templates import describe_template
from tabletune.chat.tokenizer import load_tokenizer
from tabletune.model.inspection import base_config, context_length
from tabletune.report.showing import show_table

# the most tokens that the model can read at once
context = context_length(base_config(base_model, base_model_revision))
# `stops` are the tokens that end an answer
tokenizer, stops = load_tokenizer(base_model, base_model_revision, thinking, template_date)
show_table(describe_template(tokenizer, stops))

# %% [markdown]
# ## The table
#
# Every cell is read as the text that was written: `007`, `1.50`, `None`. Where a file is ambiguous,
# such as a row with more cells than the header, the notebook stops with a message instead of
# guessing. How the file was read, and its first rows, with long texts cut:

# %%
from tabletune.data import report as data_report
from tabletune.data.tables import ReadOptions, open_table

options = ReadOptions(encoding, delimiter, quotes, header, header_row)
table = open_table(dataset, dataset_revision, dataset_config, splits, options)
print(*table.descriptions, sep="\n")
show_table(data_report.first_rows(table))

# %% [markdown]
# From the names of the columns, the notebook recognizes the *shape* of the table: how its rows
# become conversations. In the shape `columns`, two templates put question and answer together from
# several columns. A name in braces, such as `{issue}`, stands for the text of a column. The
# last lines of the list below say which column that is: `issue = column 'Health Issue'`. The worked
# example is recognized, too, and has settings of its own. Your own `shape`, `columns` and templates
# override what is recognized.

# %%
from tabletune.data.shapes import recognize, with_example

settings, example = with_example(table, stage.settings)
table_shape = recognize(table, settings, example)
print(*table_shape.describe(), sep="\n")

# %% [markdown]
# ## One row
#
# As it stands in the table. Each text has the name that the templates use:

# %%
from tabletune.data.formatter import TableFormatter

formatter = TableFormatter(table, table_shape, settings, tokenizer, stops)
first = formatter.first()
row = first["texts"]
show_table({field: text[:500] for field, text in row.items()})

# %% [markdown]
# **Cleaned.** By default little is changed. A letter such as é can be stored in two ways; one of
# them is used everywhere (Unicode's form NFC). Line ends are made the same, and white space around
# a text is removed. Everything else stays as you wrote it. The cell below does the same in
# one line of its own, and compares the result with the package's.

# %%
import unicodedata

from tabletune.data.cleaning import Cleaning

texts = [unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip() for text in row.values()]
print("equal to the package's result:", texts == [Cleaning()(text) for text in row.values()])

# %% [markdown]
# Other rules are parameters, off by default. The settings of the worked example remove web
# addresses, which can leave a text empty. The row with the rules of this run:

# %%
show_table({field: formatter.clean_cell(field, text)[:500] for field, text in row.items()})

# %% [markdown]
# **As a conversation.** A user asks, and the assistant, which is the model, answers. A system
# message may come first. TRL, the library that will train the model, calls the question `prompt`
# and the answer `completion`. Stars such as in `**Item:**` are Markdown for bold; the model learns
# to write them. A line of the answer whose columns are all empty is skipped.

# %%
messages = first["prompt"] + first["completion"]
print(*(f"{turn['role'].upper()}\n{turn['content'][:500]}" for turn in messages), sep="\n\n")

# %% [markdown]
# **Rendered** by the model's own template. If there is a system message that you did not write, the
# template has added it:

# %%
rendered = messages[0]["content"]  # if the row is a text without a question
if first["prompt"]:
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
print(rendered[:2000])

# %% [markdown]
# **As numbers.** The text becomes the numbers of its tokens. Beside them stands a *mask*, a list
# with a 1 for each token that the model is to learn, and a 0 for each other one. The tokens of
# the answer have a 1, and so does the one that ends it. Only they count in the *loss*, the error
# that training makes smaller.
#
# We check the package's `encode` by hand on this row: we encode the whole conversation, and encode
# the prompt alone. What follows the prompt is the answer.

# %%
from tabletune.chat.encoding import encode, encode_prompt, show_tokens

encoded = encode(first, tokenizer, stops)
prompt = encode_prompt(first["prompt"], tokenizer)
# the template has written the special tokens already
by_hand = tokenizer(rendered, add_special_tokens=False)["input_ids"]
# some templates write a line end after the token that ends the answer: it is left out
answer = by_hand[len(prompt) : len(encoded["input_ids"])]
print(f"{len(encoded['input_ids'])} tokens, {sum(encoded['completion_mask'])} of them in the loss")
print("the numbers of the first ten:", encoded["input_ids"][:10])
print("prompt and answer by hand equal the package's:", encoded["input_ids"] == prompt + answer)

# %% [markdown]
# The same, token by token. **Bold** tokens are special: they are marks and not text, such as the
# end of a message. Tokens on a coloured ground are in the loss; the model only reads the others. ⏎
# is the end of a line. Most spaces belong to the token of the word that follows; a space that is a
# token of its own is an empty box. A rare word has several tokens.

# %%
show_tokens({part: values[:400] for part, values in encoded.items()}, tokenizer)

# %% [markdown]
# ## All rows
#
# These rows are dropped:
#
# - rows without a question or an answer: they teach nothing. (In the worked example, the remedy is
#   what an answer cannot do without; the yoga may be missing.)
# - copies of other rows, also if they differ in capitals and punctuation (near duplicates): they
#   would be learned twice, and a copy among the test rows would make the test too easy.
# - rows that are too long. They are not cut: from an answer without its end, the model would learn
#   not to stop.
#
# If more than a tenth of the rows is lost, the notebook stops and says how to keep them.
#
# The remaining rows are divided into three *splits*. The model learns from the training rows. On
# the validation rows we watch how well it does during training. The test rows are for the end. All
# rows with the same question go to the same split: if a test question had also been asked in
# training, the test would measure memory. Questions that differ only in capitals and punctuation
# count as the same one: *COMMON COLD* asks the same as *Common Cold*. (Notebook 4 also asks
# training questions, but counts them separately.)
#
# If all this was done before, with the same table and settings, the cell below skips it.

# %% tags=["nbval-ignore-output"]
from tabletune.data.pipeline import format_table
from tabletune.data.retrieval_folder import named_file_digests, write_retrieval
from tabletune.run.hub import upload_result

# What the result depends on: a digest is a short number that changes if a file changes, and a
# commit is the version of a table on the Hub. The report's fingerprint is a digest of the result.
inputs = {"table": table.digest, "commit": table.commit} | named_file_digests(settings)
outputs = ["dataset", "retrieval"] if context_rows else ["dataset"]
if not stage.is_done(inputs, outputs):
    format_table(table, table_shape, settings, tokenizer, stops, run / "dataset", context)
    report = write_retrieval(run, settings, formatter)
    for name in outputs:
        upload_result(run_dir, run / name)  # only if run_dir is on the Hub
    stage.record(report["fingerprint"], inputs)  # what this was made from, for the next time
report = data_report.read_report(run)

# %% [markdown]
# What happened to the rows. First a sum: the rows in the table, less those that were dropped. Then
# how many rows were changed, and by which rule:

# %%
data_report.rows_table(report)

# %% [markdown]
# One example of each change, with some of the text around it. Invisible characters are written as
# codes, such as `\xa0` for a space at which no line may break:

# %%
show_table(data_report.changes_table(report), "Nothing was changed.")

# %% [markdown]
# The first rows that were dropped. Their texts are shown as they are in the table, before cleaning.
# So a row with "no answer" can have something there that cleaning takes away, such as a web address
# or `None`:

# %%
show_table(data_report.dropped_table(report), "No row was dropped.")

# %% [markdown]
# What else is worth knowing about this table:

# %%
print(*report["notes"] or ["Nothing stands out."], sep="\n")

# %% [markdown]
# ## Rows of the table in the prompt
#
# This section is about runs with `context_rows` above 0. With 0, the default, the prompts have no
# rows in them, and you can go on with [Look at it](#Look-at-it).
#
# A small model that is fine-tuned on a table learns how answers look, but hardly what they say. So
# the table itself can go into the prompt. With `context_rows = 3`, each question is first looked
# up, both in training and later, when you ask the model: the prompt contains the three rows whose
# questions are most similar. The model learns to answer from them.
#
# It also learns to say that the rows do not have the answer. In training, some questions get only
# rows of *other* questions, and the right answer to them is `unknown_answer`.
# [docs/right-answers.md](https://github.com/home-remedies-qlora/home-remedies-qlora/blob/main/docs/right-answers.md)
# has the measurements.
#
# To save time, a training prompt has several questions about the same rows. Half of the questions
# are *reworded*: they say the same in other words than the table. With `practice_prompts` there are
# also prompts about made-up tables. From them the model learns to recognize a reworded question.
# For the validation loss there are about a tenth as many prompts, up to 200, with one question
# each. They ask reworded questions of the training split, and questions of the validation split.
#
# The similarity of two questions is a number from 0 to 1. If no row reaches `unknown_threshold`,
# the lookup alone refuses: the model is not asked, and the answer is `unknown_answer`. With a good
# threshold, the lookup refuses many of the questions that the table has nothing on, but hardly any
# reworded question of the table. `out_of_scope` lists questions that are not to be answered. The
# lookup also refuses a question that is more similar to one of these than to any row. All other
# questions are put to the model.

# %%
from tabletune.data.context import load_context
from tabletune.data.retrieval_report import OFF, example_prompt, prompts_table

show_table(prompts_table(report), OFF)

# %% [markdown]
# Below are the prompt and the right answer for one training question and one validation question.
# (In training, several questions can share a prompt; here there is one in each.) If the lookup
# refuses the question, its heading says that the model is not asked. What follows is then the
# prompt that the model would have read.
#
# With `context_rows`, only training rows are searched here. A validation or test question therefore
# never finds its own row, and the right answer to it is `unknown_answer`. So we see whether the
# model has learned to refuse.

# %%
print(example_prompt(run, load_context(run)))

# %% [markdown]
# ## Look at it
#
# How long the examples are, in tokens, and how many rows ask the same question:

# %% tags=["nbval-ignore-output"]
from tabletune.report.plots import plot_data_set

plot_data_set(report, max_length)

# %% [markdown]
# The splits. `validation_fraction` and `test_fraction` are met only roughly in a small table: each
# question is given to a split at random, independently of the other questions. So questions that
# you add later do not move the earlier ones:

# %%
data_report.splits_table(report)

# %% [markdown]
# With `push_dataset_to`, the data set is also published on the Hub:

# %%
if push_dataset_to:
    import datasets

    datasets.load_from_disk(run / "dataset").push_to_hub(push_dataset_to)

# %% [markdown]
# ## What we have now

# %%
print(*data_report.sentences_on_data_set(report), sep="\n")

# %% [markdown]
# One thing to try: set `max_length` to the median length above, so that nearly half of the rows are
# too long. What does the notebook say?
#
# Next: [2 · fine-tune](02_finetune_qlora.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/02_finetune_qlora.ipynb)).
