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
# **What fine-tuning is.** A chat model has read a large part of the internet and answers any
# question in its own way. Fine-tuning shows it some hundred examples of *your* questions and
# answers, and changes the model a little, until it answers like them. People do this for a fixed
# format, a tone, labels, or to make a small model use their data. This series does it with a table,
# and measures whether it was worth it.
#
# The table of the worked example begins like this, and ends as a chat model that answers such
# questions:
#
# | Name of Item | Health Issue | Home Remedy | Yogasan |
# |---|---|---|---|
# | Ginger | Common Cold | Simmer a teaspoon of grated ginger in a cup of water for five minutes, strain it, and sip the tea warm twice a day. See a doctor if fever stays high. | https://images.example.org/yoga/cold-breathing.jpg |
# | Tulsi Leaves | COMMON COLD | Boil eight washed tulsi leaves with two crushed peppercorns in a glass of water until a little is left, then drink it warm each evening for three days. | Bhujangasana |
# | Chicken Soup | Common Cold | Make a light soup with chicken, garlic, carrot and a pinch of salt, and have a warm bowl at lunch and dinner while the cold lasts. | Shavasana |
#
# - **In:** a table: a `.csv`, `.tsv`, `.xlsx`, `.json`, `.jsonl` or `.parquet` file, a folder, or a
#   data set on the Hub (huggingface.co, where models and data sets are shared).
# - **Out:** `dataset/` in the *run folder*, which is `run_dir` below: conversations, divided into
#   training, validation and test rows, and `dataset/report.json`.
# - **Time:** under a minute anywhere for a table of some ten thousand rows; no GPU is used.
#
# In Colab each notebook gets a machine of its own. So that notebook 2 finds what this one writes,
# set `run_dir` below to `"drive:home_remedies"` in every notebook; it is then kept in your Google
# Drive.
#
# The worked example is **educational**: nothing in the table, and nothing that a model trained on
# it says, is medical advice.

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
#
# For your own table, `dataset` is often all that you change: the notebook recognizes how its rows
# become conversations, and shows it below. Rarely changed settings are folded away and come first;
# the cell after them can override them. When `make` runs a notebook, it adds one more cell, with
# the settings of its profile. These override all others.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed: how a table is read
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
thinking = False  # true: answers in the table begin with <think>…</think>, for a model that does
template_date = "2026-01-01"  # what a chat template that writes a date is to write
dataset_revision = "main"  # of a Hub data set: a branch or a commit; the report keeps the commit
encoding = "auto"  # of a text file: "utf-8", "cp1252", "shift_jis", …
delimiter = "auto"  # between the cells of a .csv: ",", ";", "tab", …
quotes = "auto"  # "letters": a .csv's " is no quote; "cells": its quoted cells may look like rows
header = True  # false: the first line is a row, and the columns are called 1, 2, …
header_row = 0  # the line of the column names in a .csv or workbook; 0: the first that is no title
split_column = ""  # a column that names the split of its row; one called "split" is found
roles = {}  # who speaks in a conversation: {"Alice": "user", "Bob": "assistant"}
ignore_turn_keys = []  # keys of turns to leave out, such as ["reasoning_content"]
answer_lists = ""  # what a list in an answer is: "rows", "first", "lines" or "json"

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed: what becomes of its rows
drop_values = []  # cells that mean empty, such as "n/a"; for one column {yoga: ["n/a"]}
drop_patterns = []  # the same as regular expressions: patterns such as "^see page"
strip_addresses = False  # remove web addresses from all texts
collapse_spaces = False  # single spaces, no invisible characters; not for code
html_to_text = False
max_dropped = 0.1  # losing a larger share of the rows stops the notebook
near_duplicate_threshold = 1.0  # above 1 keeps answers that differ in capitals and punctuation only
keep_duplicates = False  # true: rows that are there twice on purpose stay
split_by = "question"  # "row": for one prompt with many answers, which would all be in one split
split_seed = 42  # decides which questions are test questions
train_rows = 1.0  # a share of the training questions; above 1, how many: do more rows help?
loss_on_last_answer = False  # true: of the answers of a conversation only the last one is learned
safety_rows = 0  # mix our own rows about emergencies into training: true for all, or how many
push_dataset_to = ""  # a Hub id to publish the result under; only this needs a Hub access token

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed: prompts with rows of the table in them, where context_rows is above 0
context_template = "Rows of the table:\n\n{rows}\n\nAnswer this, from the rows if they have it:\n{question}"
context_characters = 0  # short rows: more than context_rows, up to so many characters together
context_hit_rate = 0.6  # of the training questions have their own row in the prompt
copies = 1  # how often each row is asked, each time in another prompt; 0.3: three rows of ten
most_tokens = 0  # of all training prompts together; 0: no limit
reworded_share = 0.5  # of the training questions are asked in other words
rewordings = ""  # a column with other wordings, or a file of question and rewording; "": rules
practice_prompts = 0  # prompts about made-up tables, which teach to match other words (English)
unknown_threshold = "auto"  # 0 to 1: a question with no row as similar gets unknown_answer
certain_threshold = "auto"  # where a row is as similar, its answer is given if the model refuses

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # where everything is written; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"  # its tokenizer and chat template render the rows
dataset = "medss19/home_remedies_dataset"  # a file, a folder, a pattern like "data/*.csv", a Hub id
dataset_config = ""  # of a data set that has several; or a sheet of a workbook
splits = {}  # the source's own, or set here: {"train": "train.csv", "test": "test.csv"}
shape = "auto"  # or columns, prompt_completion, instruction, messages, conversations, text
columns = {}  # the table's columns by what they are: {"question": "Frage", "answer": "Antwort"}
question_template = ""  # for a table of columns: "I have {issue}. What helps?"
answer_template = ""  # a line is skipped if all of its columns are empty in a row
answer_column = ""  # the answer itself: a row without it is dropped
system_prompt = ""  # for all rows that have none
context_rows = 0  # 3: the three most similar rows of the table stand in every prompt
unknown_answer = ""  # what to answer if no row fits, such as "The table has nothing on that."
max_length = 512  # tokens in an example; a longer one is dropped, never cut
validation_fraction = 0.1  # of the questions
test_fraction = 0.15

# %%
from tabletune.run.stage import start_stage

stage = start_stage("01_format_dataset", globals())  # checks the parameters above
run = stage.folder  # the run folder, as a path

# %% [markdown]
# ## The model's format
#
# A model does not read letters but *tokens*: words or parts of words, each with a number. The
# *tokenizer* turns text into tokens. Every chat model was also trained on conversations in a text
# format of its own, its *chat template*. We use that template as it is, so that the rows look like
# the conversations that the model knows. The format of this model (*thinking* is what some models
# write before they answer):

# %%
from tabletune.chat.templates import describe_template
from tabletune.chat.tokenizer import load_tokenizer
from tabletune.model.inspection import base_config, context_length
from tabletune.report.pages import show_table

context = context_length(base_config(base_model, base_model_revision))
tokenizer, stops = load_tokenizer(base_model, base_model_revision, thinking, template_date)
show_table(describe_template(tokenizer, stops))

# %% [markdown]
# ## The table
#
# Every cell is read as the text that was written: `007`, `1.50`, `None`. Where a file is ambiguous,
# such as a row with more cells than the header, the notebook stops with a message instead of
# guessing.

# %%
from tabletune.data.table_file import ReadOptions
from tabletune.data.tables import open_table

options = ReadOptions(encoding, delimiter, quotes, header, header_row)
table = open_table(dataset, dataset_revision, dataset_config, splits, options)
print(*table.descriptions, sep="\n")

# %% [markdown]
# The notebook recognizes from the columns how rows become conversations. If question and answer are
# put together from several columns, two templates say how. `shape`, `columns` and the templates
# override what it recognizes.

# %%
from tabletune.data.shapes import recognize, with_example

settings, example = with_example(table, stage.settings)
table_shape = recognize(table, settings, example)
print(*table_shape.describe(), sep="\n")

# %% [markdown]
# ## One row
#
# As it stands in the table:

# %%
from tabletune.data.formatter import TableFormatter

formatter = TableFormatter(table, table_shape, settings, tokenizer, stops)
first = formatter.first()
row = first["texts"]
show_table({field: text[:500] for field, text in row.items()})

# %% [markdown]
# **Cleaned.** By default little is changed: where a letter such as é can be stored in two ways, one
# is chosen; line ends become the same; and white space around a text is removed. Everything inside
# a text stays as you wrote it.

# %%
import unicodedata

from tabletune.data.cleaning import Cleaning

texts = [unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip() for text in row.values()]
print("our own line and the package agree:", texts == [Cleaning()(text) for text in row.values()])

# %% [markdown]
# Other rules are parameters that are off by default. With the parameters of this table the row
# becomes:

# %%
show_table({field: formatter.clean_cell(field, text)[:500] for field, text in row.items()})

# %% [markdown]
# **As a conversation.** The turns of a user and of the assistant, sometimes with a system message
# before them. TRL, the library that will train the model, calls the question `prompt` and the
# answer `completion`.

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
# **As numbers.** The text becomes the numbers of its tokens, with a mask that is 1 for the tokens
# that the model is to learn: those of the answer, and the one that ends it. Only they count in the
# *loss*, the error that training makes smaller. By hand: the tokens of the prompt come first, and
# what follows them in the rendered text is the answer. `encode` does the same for any template, and
# for conversations with several answers.

# %%
from tabletune.chat.encoding import encode, encode_prompt, show_tokens

encoded = encode(first, tokenizer, stops)
prompt = encode_prompt(first["prompt"], tokenizer)
by_hand = tokenizer(rendered, add_special_tokens=False)["input_ids"]
answer = by_hand[len(prompt) : len(encoded["input_ids"])]
print(f"{len(encoded['input_ids'])} tokens, {sum(encoded['completion_mask'])} of them in the loss")
print("put together, they equal what the package returns:", encoded["input_ids"] == prompt + answer)

# %% [markdown]
# The same, token by token. **Bold** tokens are special: they are no text but marks, such as the end
# of a turn. Grey tokens are only read. Those on colour are in the loss. ⏎ is the end of a line.

# %%
show_tokens({part: values[:400] for part, values in encoded.items()}, tokenizer)

# %% [markdown]
# ## All rows
#
# Three kinds of rows are dropped:
#
# - rows without a question or an answer: they teach nothing;
# - copies of other rows, also those that differ only in capitals and punctuation (near duplicates):
#   they would be learned twice, and a copy among the test rows would make the test too easy;
# - rows that are too long. They are not cut: an answer without its end teaches the model to ramble
#   on.
#
# If more than a tenth of the rows is lost, the notebook stops and says how to keep them.
#
# The others are divided into three *splits*: training rows, validation rows, by which the training
# is watched, and test rows for the end. All rows with the same question go to the same split. If a
# test question had also been asked in training, the test would measure memory. (Notebook 4 asks
# training questions, too, but counts them apart.) If all this was done before, with the same table
# and settings, it is not done again.

# %% tags=["nbval-ignore-output"]
from tabletune.data.pipeline import format_table
from tabletune.data.retrieval_folder import rewordings_digest, write_retrieval
from tabletune.run.files import read_json
from tabletune.run.hub import upload_result

inputs = {"table": table.digest, "commit": table.commit} | rewordings_digest(settings)
outputs = ["dataset", "retrieval"] if context_rows else ["dataset"]
if not stage.is_done(inputs, outputs):
    format_table(table, table_shape, settings, tokenizer, stops, run / "dataset", context)
    report = write_retrieval(run, settings, formatter)
    for name in outputs:
        upload_result(run_dir, run / name)
    stage.record(report["fingerprint"], inputs)
report = read_json(run / "dataset" / "report.json", "01_format_dataset")

# %% [markdown]
# What happened to the rows:

# %%
import pandas as pd

from tabletune.data.report import changes_table, dropped_table, rows_table, sentences_on_data_set

rows_table(report)

# %% [markdown]
# One example of each change, with the text around it. Characters that cannot be seen are written as
# codes, such as `\xa0`:

# %%
show_table(changes_table(report), "Nothing was changed.")

# %% [markdown]
# The first rows that were dropped, as they are in the table:

# %%
show_table(dropped_table(report), "No row was dropped.")

# %% [markdown]
# Remarks about this table:

# %%
print(*report["notes"] or ["None: nothing about it stands out."], sep="\n")

# %% [markdown]
# ## Rows of the table in the prompt
#
# A small model that is fine-tuned on a table learns how answers look, but hardly what they say.
# With `context_rows = 3`, each question is first looked up: both in training and later, when you
# ask it, the prompt contains the three rows whose questions are most similar. The model learns to
# answer from them. It also learns to say that they do not have the answer: in training some
# questions get only rows of *other* questions, and their answer is `unknown_answer`.
# [docs/right-answers.md](../docs/right-answers.md) has the measurements.
#
# A training prompt has some rows and asks several questions about them, half of them in other words
# than the table's. `practice_prompts` are about made-up tables; they teach to recognize a question
# in other words. `unknown_threshold` is for use: if no row is as similar (0 to 1), the lookup
# refuses the question, and the model is not even asked.

# %%
from tabletune.data.context import load_context
from tabletune.data.retrieval_report import OFF, example_prompt, prompts_table

show_table(prompts_table(report), OFF)

# %% [markdown]
# What the model is asked, and what is right: for a question of the training split, and for one of
# the validation split. Only training rows are searched. So a validation or test question never
# finds its own row here, and to say that the table has nothing is right.

# %%
print(example_prompt(run, load_context(run)))

# %% [markdown]
# ## Look at it
#
# How long the examples are, in tokens, and how many rows ask the same question. A bar that stands
# alone on the right is a row that is much longer than the others:

# %% tags=["nbval-ignore-output"]
from tabletune.report.plots import plot_data_set

plot_data_set(report, max_length)

# %% [markdown]
# The splits:

# %%
pd.DataFrame({"rows": report["splits"], "questions": report["questions"]})

# %% [markdown]
# With `push_dataset_to`, the data set goes to the Hub, too:

# %%
if push_dataset_to:
    import datasets

    datasets.load_from_disk(run / "dataset").push_to_hub(push_dataset_to)

# %% [markdown]
# ## What we have now

# %%
print(*sentences_on_data_set(report), sep="\n")

# %% [markdown]
# Two things to try:
#
# - Set `max_length` to the number of tokens that half of the rows exceed (see above). What does the
#   notebook say?
# - Set `system_prompt` to a sentence of your own, and find it among the tokens above.
#
# Next: [2 · fine-tune](02_finetune_qlora.ipynb).
