# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
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

# %% [markdown]
# # 1 · From a table to chat examples
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/01_format_dataset.ipynb)
#
# | **1 · format** | 2 · fine-tune | 3 · merge | 4 · evaluate | 5 · trust | 6 · export |
# |---|---|---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples | is it safe? | GGUF, cards |
#
# - **In:** a table: a `.csv`, `.tsv`, `.xlsx`, `.json`, `.jsonl` or `.parquet` file, a folder of them, or a Hub data set.
# - **Out:** `dataset/` in the run folder, with train, validation and test splits, and `dataset/report.json`.
# - **Time:** under a minute anywhere, and seven for a million rows; no GPU is used.
#
# The worked example is a small table of traditional home remedies. It is **educational**: nothing in it, and nothing
# that a model trained on it says, is medical advice.

# %% [markdown]
# On Colab, this cell installs what the runtime lacks, and nothing the second time. Elsewhere it does nothing.

# %%
import sys
from importlib.util import find_spec

from IPython import get_ipython

if "google.colab" in sys.modules and not all(map(find_spec, ["trl", "bitsandbytes", "liger_kernel"])):
    get_ipython().run_line_magic("pip", "install -q trl==0.29.1 bitsandbytes==0.50.2 liger-kernel==0.8.5")

# %% [markdown]
# ## Parameters
#
# For your own table, `dataset` may be all that you change: how its rows become conversations is recognized and said
# below. First what few change, as the cell after it has the last word.

# %%
# rarely changed
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
thinking = False  # true: the answers in the table begin with <think>…</think>, for a model that thinks aloud
template_date = "2026-01-01"  # what a chat template that writes a date is to write
dataset_revision = "main"  # of a Hub data set: a branch or a commit; what is read is a commit, which the report keeps
encoding = "auto"  # of a text file: "utf-8", "cp1252", "shift_jis", …
delimiter = "auto"  # between the cells of a .csv: ",", ";", "tab", …
header = True  # false: the first line is a row, and the columns are called 1, 2, …
drop_values = []  # cells that only say that they are empty, such as "n/a"; [] or for one column {yoga: ["n/a"]}
drop_patterns = []  # the same as regular expressions
strip_addresses = False  # take web addresses out of all texts
collapse_spaces = False  # single spaces, no invisible characters; not for code
html_to_text = False
max_dropped = 0.1  # losing a larger share of the rows stops the notebook
near_duplicate_threshold = 1.0  # above 1 keeps answers to one question that differ in capitals and punctuation alone
safety_rows = 0  # mix our own rows about emergencies into training: true for all of them, or how many
push_dataset_to = ""  # a Hub id to publish the result under; only this needs a token

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # where all goes that the series writes; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"  # its tokenizer and chat template render the rows
dataset = "medss19/home_remedies_dataset"  # a file, a folder, a pattern such as "data/*.csv", or a Hub id
dataset_config = ""  # of a data set that has several; or a sheet of a workbook
splits = {}  # the source's own, or what is to be what: {"train": "train.csv", "test": "test.csv"}
shape = "auto"  # or columns, prompt_completion, instruction, messages, conversations, text
columns = {}  # names for the templates, and the table's columns: {"question": "Frage", "answer": "Antwort"}
question_template = ""  # for a table of columns: "I have {issue}. What helps?"
answer_template = ""  # a line of it all of whose columns are empty in a row is left out there
answer_column = ""  # the answer proper: a row without it is dropped
system_prompt = ""  # for all rows that have none
max_length = 512  # tokens in one example, question and answer together; a longer row is dropped, never cut
validation_fraction = 0.1  # of the questions
test_fraction = 0.15

# %%
from tabletune.run import begin

stage = begin("01_format_dataset", globals())
run = stage.folder

# %% [markdown]
# ## The model's format
#
# Every chat model was trained on conversations in a format of its own. Its tokenizer knows it; nothing is invented here.

# %%
from tabletune.bases import base_config, context_length
from tabletune.chat_format import load_tokenizer
from tabletune.chat_templates import describe_template

config = base_config(base_model, base_model_revision)
tokenizer, stops = load_tokenizer(base_model, base_model_revision, thinking, template_date)
describe_template(tokenizer, stops)

# %% [markdown]
# ## The table
#
# Every cell is read as the text that was written: `007`, `1.50`, `None`. What can be understood in two ways, such as a
# row with more cells than the header, is refused: guessing would shift or swallow rows without a word.

# %%
from tabletune.tables import open_table

table = open_table(dataset, dataset_revision, dataset_config, splits, encoding, delimiter, header)
print(*table.said, sep="\n")

# %% [markdown]
# How its rows become conversations is recognized by its columns, or set by `shape`, `columns` and the templates.

# %%
from tabletune.shapes import recognize, with_example

settings, example = with_example(table, stage.settings)
shape_of_table = recognize(table, settings, example)
print(f"shape: {shape_of_table.name}" + (f", settings of the example {example}" if example else ""))
shape_of_table.columns

# %% [markdown]
# ## One row, by hand
#
# As it came:

# %%
_, cells = next(table.rows(shape_of_table.columns.values()))
row = dict(zip(shape_of_table.columns, cells, strict=True))
row

# %% [markdown]
# Cleaned: by default only Unicode is composed (é in one character), and line ends and white space around a text are made
# the same. Indentation, addresses and tags are the reader's; what is to go is a parameter.

# %%
import unicodedata

from tabletune.formatting import Formatting

by_hand = {field: unicodedata.normalize("NFC", text).strip() for field, text in row.items()}
formatting = Formatting(table, shape_of_table, settings, tokenizer, stops)
by_hand == {field: formatting.clean(text) for field, text in row.items()}, list(formatting.clean.changed)

# %% [markdown]
# As a conversation: turns of `system`, `user` and `assistant`, which is TRL's `prompt` and `completion`.

# %%
first = next(formatting.cleaned())
messages = first["prompt"] + first["completion"]
messages

# %% [markdown]
# As the model's template renders it:

# %%
rendered = tokenizer.apply_chat_template(messages, tokenize=False) if first["prompt"] else messages[0]["content"]
print(rendered[:2000])

# %% [markdown]
# And as numbers. The loss will see the answer and the token that ends it, not the question. By hand that is the prompt
# with a mask of zeros, then the answer with a mask of ones; `encode` does the same for any template and any number of
# turns.

# %%
from tabletune.chat_format import encode, encode_prompt, show_tokens

encoded = encode(first, tokenizer, stops)
prompt = encode_prompt(first["prompt"], tokenizer)
whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
mask = [0] * len(prompt) + [1] * (len(whole) - len(prompt))
print(f"{len(encoded['input_ids'])} tokens, {sum(encoded['completion_mask'])} of them in the loss")
print("by hand the same:", encoded["input_ids"] == whole[: len(encoded["input_ids"])] and encoded["completion_mask"] == mask)

# %% [markdown]
# The same row, token by token. **Bold** tokens are special, grey ones are only read, and those on colour are in the
# loss, the stop among them.

# %%
show_tokens(encoded, tokenizer)

# %% [markdown]
# ## All rows
#
# Each row goes the same way. A row without a question or without an answer teaches nothing and is dropped; so is a copy
# of another one, which would teach it twice and, in the test split, make the test dishonest. A row that is too long is
# dropped whole: cut at `max_length` it would have no end, and a model that never sees one rambles on.
#
# All rows with one question go to the same split, by a hash of the question: a test question that was also a training
# question measures memory. Losing more than a tenth of the rows stops here.

# %%
from tabletune.formatting import format_table
from tabletune.run import hand_over, read_json, set_aside

inputs = {"table": table.digest, "commit": table.commit}
if not stage.is_done(inputs, ["dataset"]):
    set_aside(run, "dataset")
    report = format_table(table, shape_of_table, settings, tokenizer, stops, run / "dataset", context_length(config))
    hand_over(run_dir, run / "dataset")
    stage.record(report["fingerprint"], inputs)
report = read_json(run / "dataset" / "report.json", "01_format_dataset")

# %% [markdown]
# ## What became of the rows
#
# In, changed by a rule, dropped for a reason, out:

# %%
import pandas as pd

steps = [("in the table", report["rows_in"])]
steps += [(f"changed: {rule}", change["rows"]) for rule, change in report["changed"].items()]
steps += [(f"dropped: {reason}", -count) for reason, count in report["dropped"].items()]
pd.DataFrame([*steps, ("out", report["rows_out"])], columns=["", "rows"]).set_index("")

# %% [markdown]
# An example of each change, around the place where it happened:

# %%
pd.set_option("display.max_colwidth", 100)
pd.DataFrame(report["changed"]).T

# %% [markdown]
# And the first rows that were dropped, as they are in the table:

# %%
pd.DataFrame(report["dropped_rows"])

# %%
print("\n".join(report["notes"]) or "There is nothing else to say about this table.")

# %% [markdown]
# ## Look at it
#
# Left, how long the examples are; right, how many rows ask the same question.

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
left.stairs(*report["tokens"]["histogram"], fill=True, color="0.55")
left.axvline(max_length, color="black", linestyle="--", label=f"max_length = {max_length}")
left.set(xlabel="tokens in an example", ylabel="examples", title="Length")
left.legend()
right.bar(*report["rows_a_question"], color="0.55", edgecolor="black")
right.set(xlabel="rows with the same question", ylabel="questions", title="Rows a question")
plt.show()

# %% [markdown]
# ## What we have now

# %%
pd.DataFrame({"rows": report["splits"], "questions": report["questions"]})

# %%
if push_dataset_to:
    import datasets

    datasets.load_from_disk(run / "dataset").push_to_hub(push_dataset_to)

# %%
kept = report["rows_out"] / report["rows_in"]
print(f"{kept:.0%} of {report['rows_in']:,} rows became examples of {report['tokens']['p50']} tokens, half of them longer;")
print(f"the longest has {report['tokens']['max']}. {report['questions']['test']} questions are kept for the test.")

# %% [markdown]
# Two things to try: set `max_length` to the median above, and see what the notebook says; set `collapse_spaces` or
# `strip_addresses`, and look at the examples of what they change.
#
# Next: [2 · fine-tune](02_finetune_qlora.ipynb).
