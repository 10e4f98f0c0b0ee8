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
# | **1 · format** | 2 · fine-tune | 3 · merge | 4 · evaluate |
# |---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples |
#
# - **In:** a table of questions and answers: a Hub data set, or a `.csv`, `.jsonl` or `.parquet` file.
# - **Out:** `dataset/` in the run folder, with train, validation and test splits, and `dataset/report.json`.
# - **Time:** under a minute anywhere; no GPU is used.
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
# Every choice that you may want to change is here. `columns` gives the names used in the templates to the columns of
# your table; a line of `answer_template` whose value is missing is left out of that row's answer.

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # where all goes that the series writes; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"  # its tokenizer and chat template render the rows
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
dataset = "medss19/home_remedies_dataset"  # a Hub id, or a local .csv, .jsonl or .parquet file
dataset_revision = "main"
columns = {
    "issue": "Health Issue",
    "item": "Name of Item",
    "remedy": "Home Remedy",
    "yoga": "Yogasan",
}
question_template = "I am suffering from {issue}. Please suggest a home remedy."
answer_template = "Here is a suggested remedy:\n\n**Item:** {item}\n**Remedy:** {remedy}\n**Recommended Yoga:** {yoga}"
answer_column = "remedy"  # the answer proper: a row without it is dropped, and it is what may be split
max_length = 512  # tokens in one example, question and answer together
long_answers = "split"  # an answer that is too long: "split" it at sentence ends, or "drop" it
near_duplicate_threshold = 0.9  # answers to one question that share this part of their words are the same
validation_fraction = 0.1
test_fraction = 0.15
push_dataset_to = ""  # a Hub id to publish the result under; only this needs a token

# %% [markdown]
# What was chosen, for `manifest.json`:

# %%
parameters = {
    name: value
    for name, value in globals().items()
    if isinstance(value, (str, int, float, list, dict)) and not name.startswith("_") and name not in ("In", "Out")
}

# %% [markdown]
# ## Tools
#
# The next cells stand in all four notebooks, word for word. They give an error that shows as one line, a way to write
# a file or folder that is either whole or absent, and the entry in `manifest.json` that says what ran on what.

# %%
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import time
import warnings
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same bits from the same sums, whatever the memory looks like

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm looks for widgets, and does without

import torch
from huggingface_hub import create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import RepositoryNotFoundError

started = time.perf_counter()


class StageError(Exception):
    """A problem that the reader can mend. It shows as one line, without a traceback."""

    def _render_traceback_(self):
        return [f"StageError: {self}"]


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# %%
@contextmanager
def whole(path):
    """Yield a temporary path that becomes `path` when the block ends without an error, and is deleted otherwise.

    Raises StageError if the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        yield partial
        remove(path)
        partial.rename(path)
    except Exception as error:
        remove(partial)
        if "No space left" in str(error):
            raise StageError(f"The disk is full, so {path} was not written. Free some space and run again.") from None
        raise


# %% [markdown]
# ### Where the run lives
#
# A notebook opened in Colab has a machine of its own, which is gone with the tab. What the next notebook needs must
# live elsewhere: with `run_dir = "drive:home_remedies"` the run is a folder of your Google Drive, checkpoints included;
# with `"hub:you/home-remedies"` the finished data set and adapter go to two private repositories on the Hugging Face
# Hub, under the token `HF_TOKEN` of Colab's secrets or of the environment, or that of `hf auth login`.


# %%
def hub_token():
    """The Hub's token among Colab's secrets; None, for the library to look in the environment and for a login."""
    try:
        from google.colab import userdata

        return userdata.get("HF_TOKEN")
    except Exception:  # not Colab; no such secret; no leave to read it
        return None


def open_run(run_dir):
    """The folder of the run. Mounts Google Drive for "drive:NAME", fetches what the Hub has for "hub:OWNER/NAME".

    Raises StageError if there is no Drive here.
    """
    place, _, name = run_dir.rpartition(":")
    if place == "drive":
        try:
            from google.colab import drive
        except ImportError:
            raise StageError(f"run_dir={run_dir}: only Colab can mount Google Drive. Use a folder here.") from None
        drive.mount(str(Path.cwd() / "drive"))
        return Path.cwd() / "drive" / "MyDrive" / name
    if place != "hub":
        return Path(run_dir)
    run = Path("runs") / name.replace("/", "--")
    for kind, part in (("dataset", "dataset"), ("model", "adapter")):
        if not (run / part).exists():
            with suppress(RepositoryNotFoundError), whole(run / part) as folder:
                snapshot_download(name, repo_type=kind, local_dir=folder, token=hub_token())
    return run


def hand_over(run_dir, folder):
    """Upload a finished folder of the run to its private repository, if the run lives on the Hub.

    Raises StageError if the Hub refuses.
    """
    place, _, name = run_dir.rpartition(":")
    kind = "dataset" if folder.name == "dataset" else "model"
    try:
        if place == "hub":
            create_repo(name, repo_type=kind, private=True, exist_ok=True, token=hub_token())
            upload_folder(repo_id=name, repo_type=kind, folder_path=folder, token=hub_token())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{folder} is here, but could not go to the Hub as {name}: {reason}") from None


# %%
run = open_run(run_dir)


# %%
def peak_memory_gib():
    """Peak memory of this process in GiB: resident, and reserved on the GPU if there is one."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return peak


def record(stage, dataset_fingerprint):
    """Write this stage's entry in `manifest.json`: what ran, with which parameters, on what, for how long."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True)
    packages = ["torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "safetensors"]
    manifest[stage] = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gib": peak_memory_gib(),
        "dataset_fingerprint": dataset_fingerprint,
        "parameters": parameters,
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": commit.stdout.strip() or None,
    }
    with whole(path) as partial:
        partial.write_text(json.dumps(manifest, indent=2))


# %%
import csv
import hashlib
import io
import unicodedata
from collections import Counter

import datasets
import matplotlib.pyplot as plt
import pandas as pd
import pyarrow.parquet as pq
from IPython.display import HTML
from transformers import AutoConfig, AutoTokenizer

datasets.disable_progress_bars()

# %% [markdown]
# ## Read the table
#
# Every cell is read as text, so that an answer of `007` or `None` arrives as it was written. A table that can be
# understood in two ways, such as one whose rows have more cells than its header, is refused: guessing would shift or
# swallow rows without a word.


# %%
def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark. Raises StageError if it is something else."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StageError(f"dataset={path} is not UTF-8 (byte {error.start}). Save it as UTF-8 and try again.") from None
    if "\0" in text[:2]:
        raise StageError(f"dataset={path} is not UTF-8, but looks like UTF-16. Save it as UTF-8 and try again.")
    return text


def read_csv(path):
    """Read a .csv file as a DataFrame. Raises StageError if a quote is open or a row is not as long as the header."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)  # pandas' own cuts a cell at a NUL
    rows, line = [], 1
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                raise StageError(
                    f"dataset={path}, line {line}: this row has {len(row)} cells, the header {len(rows[0])}. "
                    "Put double quotes around a cell that has commas or line breaks."
                )
            rows += [row] if row else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise StageError(
            f"dataset={path}: the row that begins in line {line} has a double quote too many or too few ({error}). "
            'Write a quote inside a quoted cell twice: "".'
        ) from None
    return pd.DataFrame(rows[1:], columns=rows[0] if rows else [], dtype=object)


def read_jsonl(path):
    """Read a .jsonl file as a DataFrame. Raises StageError if a line is not a JSON object or names a field twice."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field is there twice")
        return dict(pairs)

    rows = []
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique, strict=False)
            written = json.loads(line, parse_float=str, parse_int=str, strict=False)  # 1.50 stays 1.50
        except (ValueError, RecursionError) as error:
            raise StageError(f"dataset={path}, line {number} is not JSON ({error}). Mend or remove it.") from None
        if not isinstance(row, dict):
            raise StageError(f'dataset={path}, line {number}: each line must be an object like {{"question": "..."}}.')
        rows.append({name: written[name] if isinstance(value, (int, float)) else value for name, value in row.items()})
    return pd.DataFrame(rows, dtype=object)


def read_parquet(path):
    """Read a .parquet file as a DataFrame."""
    return pd.DataFrame(pq.read_table(path).to_pylist(), dtype=object)


def read_hub(name, revision):
    """Read all splits of a Hub data set as one DataFrame. Raises StageError if that fails, for whatever reason."""
    try:
        splits = datasets.load_dataset(name, revision=revision)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(
            f"dataset={name}: no such file here (looked in {Path.cwd()}), and not to be had from the Hub: {reason}"
        ) from None
    return pd.DataFrame([row for split in splits.values() for row in split.to_list()], dtype=object)


# %%
def cell_text(value):
    """A cell as text: "" for a missing value, JSON for a list, an object or a truth value."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if pd.isna(value) else str(value)


def read_table(source, revision):
    """Read a Hub data set or a local .csv, .jsonl or .parquet file as a DataFrame of strings, missing cells empty.

    Raises StageError if there is no such table, or if it cannot be read or is empty.
    """
    path = Path(source).expanduser()
    readers = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}
    if path.suffix in readers and not path.exists():
        raise StageError(f"dataset={source}: there is no such file (looked in {Path.cwd()}).")
    if path.suffix not in readers and path.exists():
        raise StageError(f"dataset={source}: this kind of file is not read. Use .csv, .jsonl or .parquet.")
    try:
        table = readers[path.suffix](path) if path.suffix in readers else read_hub(source, revision)
        table = table.map(cell_text)
    except StageError:
        raise
    except Exception as error:  # a damaged file fails in many ways, each with an error of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "".join(c for c in reason if c.isprintable())[:300]  # it may quote the file
        raise StageError(
            f"dataset={source} could not be read: {reason}. Is it damaged, or of another kind than its name says?"
        ) from None
    if table.empty:
        raise StageError(f"dataset={source} has no rows. It needs some below its column names.")
    return table


# %%
table = read_table(dataset, dataset_revision)
print(f"{len(table):,} rows, columns: {', '.join(map(repr, table.columns))}")
table.head(3)

# %% [markdown]
# From here on the columns go by the names that the templates use. A column that is missing is an error now, not an
# empty answer later.


# %%
def field_names(template):
    """The names in braces in a template, in order."""
    return re.findall(r"{(\w+)}", template)


def rename_columns(table, columns, needed):
    """Return the `needed` fields of the table under their own names. Raises StageError if one has no column."""
    from difflib import get_close_matches

    for field in needed:
        column = columns.get(field)
        if column is None:
            raise StageError(f"The templates use {{{field}}}, which `columns` does not name. It names: {list(columns)}")
        if column not in table.columns:
            found = [c[:60] for c in table.columns[:30]]  # without a header these are cells, as long as they like
            near = get_close_matches(str(column).lower(), [c.lower() for c in found], n=1, cutoff=0.4)
            hint = next((f" Did you mean {c!r}?" for c in found if near and c.lower() == near[0]), "")
            raise StageError(f"The table has no column {column!r} (for {{{field}}}). It has: {found}.{hint}")
        if list(table.columns).count(column) > 1:
            raise StageError(f"The table has more than one column {column!r} (for {{{field}}}). Rename or remove one.")
    return table[[columns[field] for field in needed]].set_axis(needed, axis=1)


# %%
if long_answers not in ("split", "drop"):
    raise StageError(f'long_answers={long_answers!r}: use "split" or "drop".')
question_fields, answer_fields = field_names(question_template), field_names(answer_template)
if answer_column not in answer_fields:
    raise StageError(f"answer_column={answer_column!r} is not in answer_template, which uses: {answer_fields}")
raw = rename_columns(table, columns, list(dict.fromkeys(question_fields + answer_fields)))

# %% [markdown]
# ## Clean the cells
#
# Composed Unicode (NFC), no invisible characters, single spaces. NFKC would go too far: it turns "1½ cups" into
# "11⁄2 cups". A cell that only says that it is empty ("None", "nan", "-") is empty, and so is a web address: a link to
# a picture of a posture teaches a model to invent links.

# %%
MISSING = {"", "none", "nan", "null", "n/a", "na", "nil", "-", "--", "<na>"}
URL = re.compile(r"(?:https?:|\bwww\.)\S+", re.IGNORECASE)
# zero-width characters, control characters, and halves of characters; emoji need their joiner (U+200D)
INVISIBLE = re.compile(r"[\u200b\u2060\ufeff\u00ad\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


def clean_cell(text):
    """Return a cell's text with Unicode and white space normalized, "" for a missing value or a web address."""
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    text = URL.sub("", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return "" if text.casefold() in MISSING else text


# %%
clean_cell("  1½\u00a0cups of\u200b  warm   water "), clean_cell("nan"), clean_cell("https://example.org/pose.jpg")

# %% [markdown]
# A chat template marks turns with strings such as `[INST]` or `</s>`. If a row happens to contain one, the tokenizer
# would take it for a real marker, so it is broken up with a space.


# %%
def load_tokenizer(base_model, revision):
    """The base model's tokenizer, with a chat template, right padding and a pad token that is not EOS.

    Where the pad token is EOS, a collator that masks padding masks every EOS too, and the model never learns to stop
    (https://github.com/huggingface/trl/issues/696). Raises StageError if the model cannot be found.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, revision=revision)
        vocab_size = AutoConfig.from_pretrained(base_model, revision=revision).vocab_size
    except (OSError, ValueError):
        raise StageError(
            f"base_model={base_model}: not a model folder here, and not to be had from the Hub "
            f"(looked in {Path.cwd()}). Check the name, the network, and `hf auth login` for a gated model."
        ) from None
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message['role'] == 'user' %}"
            "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) or tokenizer.pad_token_id >= vocab_size:
        spare = [
            token for token in tokenizer.all_special_tokens if token not in (tokenizer.bos_token, tokenizer.eos_token)
        ]
        usable = [token for token in spare if tokenizer.convert_tokens_to_ids(token) < vocab_size]
        tokenizer.pad_token = usable[0] if usable else tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of the text
    return tokenizer


def break_markers(text, markers):
    """Put a space into every marker that occurs in `text`, so that the tokenizer reads it as plain text."""
    for marker in markers:
        text = text.replace(marker, marker[0] + " " + marker[1:])
    return text


# %%
tokenizer = load_tokenizer(base_model, base_model_revision)
markers = sorted({*tokenizer.get_added_vocab(), "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}, key=len, reverse=True)
clean = raw.map(clean_cell).map(lambda text: break_markers(text, markers))

# %% [markdown]
# ## Drop what cannot teach
#
# A row without a question or without an answer teaches nothing. A duplicate teaches its row twice, and if its twin
# lands in the test split it makes the test dishonest. Near duplicates are answers to one question whose words differ by
# a tenth or less, letter case and punctuation aside.


# %%
def words(text):
    """The words of a text, in lower case, without punctuation; accents, vowel signs and symbols are part of a word."""
    return "".join(" " if unicodedata.category(c).startswith("P") else c for c in text.casefold()).split()


def question_key(row, question_fields):
    """What makes two rows ask the same: the words of the question's fields, letter case and punctuation aside."""
    return " ".join(" ".join(words(row[field])) or row[field] for field in question_fields)


def reason_to_drop(rows, question_fields, answer_column, threshold):
    """Say for each row why it is dropped: "no question", "no answer", "duplicate", "near duplicate", or "" to keep it.

    Near duplicates ask the same, and their other fields share at least `threshold` of the distinct words of both
    (Jaccard index).
    """
    reasons, kept = [], {}
    for row in rows.to_dict("records"):
        texts, bag = list(row.values()), {w for field in row for w in words(row[field]) if field not in question_fields}
        twins = kept.setdefault(question_key(row, question_fields), [])
        if not all(row[field] for field in question_fields):
            reasons.append("no question")
        elif not row[answer_column]:
            reasons.append("no answer")
        elif any(texts == other for other, _ in twins):
            reasons.append("duplicate")
        elif any(len(bag & other) >= threshold * len(bag | other) for _, other in twins):
            reasons.append("near duplicate")
        else:
            reasons.append("")
            twins.append((texts, bag))
    return pd.Series(reasons, index=rows.index)


# %%
reasons = reason_to_drop(clean, question_fields, answer_column, near_duplicate_threshold)
dropped = Counter(reasons[reasons != ""])
print(f"{len(clean):,} rows in, {(reasons == '').sum():,} kept; dropped: {dict(dropped) or 'none'}")
pd.set_option("display.max_colwidth", 60)
clean[reasons != ""].assign(reason=reasons).head(20)

# %% [markdown]
# ## Format
#
# A kept row becomes a conversation of two turns: TRL's standard `prompt` and `completion` columns. First as it came,
# then as the model will see it.


# %%
def fill(template, row):
    """Fill a template line by line; a line all of whose fields are missing is left out."""
    lines = []
    for line in template.split("\n"):
        fields = field_names(line)
        if not fields or any(row[field] for field in fields):
            lines.append(re.sub(r"{(\w+)}", lambda field: row[field[1]], line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def to_conversation(row, question_template, answer_template):
    """Turn a row, a dict of field to text, into TRL's conversational `prompt` and `completion`."""
    return {
        "prompt": [{"role": "user", "content": fill(question_template, row)}],
        "completion": [{"role": "assistant", "content": fill(answer_template, row)}],
    }


# %%
kept = clean[reasons == ""]
if kept.empty:
    raise StageError(f"All {len(clean)} rows of {dataset} were dropped: {dict(dropped)}. Check `columns`.")
example = to_conversation(kept.iloc[0].to_dict(), question_template, answer_template)
print(raw.loc[kept.index[0]].to_dict(), "\n")
print(tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False))

# %% [markdown]
# ### Token ids
#
# `encode` turns a conversation into what the model trains on: ids that begin with one BOS and end with one EOS, and a
# mask that is 1 on the response. Whatever a template adds or forgets around the conversation (a line break after the
# last marker, a missing BOS) is put right here, so that every base model is treated alike.


# %%
def encode_prompt(prompt, tokenizer):
    """Token ids of a prompt, a list of messages, up to where the answer begins; they start with one BOS."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[0] == bos else [bos, *ids]


def encode(example, tokenizer):
    """Token ids of a conversation and the mask of its response: `input_ids` and `completion_mask`, of one length.

    The ids begin with one BOS, if the tokenizer has one, and end with one EOS, which belongs to the response.
    Raises ValueError if the chat template renders the prompt differently once an answer follows it.
    """
    prompt = encode_prompt(example["prompt"], tokenizer)
    ids = tokenizer.apply_chat_template(example["prompt"] + example["completion"], return_dict=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = ids if bos is None or ids[0] == bos else [bos, *ids]
    response = ids[len(prompt) :]
    if ids[: len(prompt)] != prompt:
        raise ValueError("the chat template renders the prompt differently when an answer follows")
    response = response[: response.index(eos) + 1] if eos in response else [*response, eos]
    return {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}


# %%
encoded = encode(example, tokenizer)
print(f"{len(encoded['input_ids'])} tokens, {sum(encoded['completion_mask'])} of them in the loss")

# %% [markdown]
# The same row, token by token. **Bold** tokens are special, grey ones are the prompt, and only those on colour are in
# the loss, the last EOS among them.


# %%
def show_tokens(encoded, tokenizer):
    """HTML of an encoded row: prompt tokens grey, response tokens on colour, special tokens bold."""
    from html import escape

    spans = []
    for token_id, in_loss in zip(encoded["input_ids"], encoded["completion_mask"], strict=True):
        text = escape(tokenizer.decode([token_id])).replace("\n", "⏎")
        style = "background:#cfe8fc;color:#000" if in_loss else "color:#777"
        style += ";font-weight:bold;text-decoration:underline" if token_id in tokenizer.all_special_ids else ""
        spans.append(f'<span style="{style};border:1px solid #bbb;margin:1px;padding:0 2px">{text or "&nbsp;"}</span>')
    return HTML("<div style='line-height:1.9'>" + " ".join(spans) + "</div>")


# %%
show_tokens(encoded, tokenizer)

# %% [markdown]
# ## Answers that are too long
#
# Cutting a row at `max_length` would cut off its EOS, and a model trained on that learns to ramble on. So a long answer
# is split at sentence ends into several rows, or dropped; a single sentence that is still too long is dropped too.


# %%
def length(row):
    """Tokens in a row's example."""
    return len(encode(to_conversation(row, question_template, answer_template), tokenizer)["input_ids"])


def split_answer(row, answer_column, max_length, length):
    """Split a row's answer at sentence ends into as few rows as fit in `max_length` tokens each.

    Returns the rows and how many sentences were too long by themselves and so left out.
    """
    parts, too_long = [], 0
    pieces = re.split(r"(?<=[.!?।。])(\s+)", row[answer_column])  # sentences, and between them spaces or line breaks
    for space, sentence in zip(["", *pieces[1::2]], pieces[::2], strict=True):
        longer = {**row, answer_column: parts[-1] + space + sentence} if parts else None
        if longer and length(longer) <= max_length:
            parts[-1] = longer[answer_column]
        elif length({**row, answer_column: sentence}) <= max_length:
            parts.append(sentence)
        else:
            too_long += 1
    return [{**row, answer_column: part} for part in parts], too_long


# %%
shortest_prompt = min(
    len(encode_prompt(to_conversation(row, question_template, answer_template)["prompt"], tokenizer))
    for row in kept.to_dict("records")
)
if max_length <= shortest_prompt + 1:
    raise StageError(
        f"max_length={max_length} leaves no room for an answer: the shortest prompt has {shortest_prompt} tokens."
    )

# %%
rows, split_into, sentences_left_out, over_max_length = [], 0, 0, 0
for row in kept.to_dict("records"):
    if length(row) <= max_length:
        rows.append(row)
        continue
    over_max_length += 1
    parts, too_long = split_answer(row, answer_column, max_length, length) if long_answers == "split" else ([], 0)
    rows += parts
    split_into += len(parts)
    sentences_left_out += too_long
    dropped["too long"] += not parts

if not rows:
    raise StageError(f"Every row is longer than max_length={max_length} and was dropped. Raise max_length.")
print(
    f"{over_max_length} rows over {max_length} tokens: "
    f"{split_into} shorter rows made of them, {dropped['too long']} dropped"
)

# %% [markdown]
# ## Split by question
#
# All rows with one question go to the same split: a test question that was also a training question measures memory.
# Each question's place comes from a hash of the question itself, so rows that are added, removed or put in another
# order elsewhere do not move it.


# %%
def assign_splits(keys, seed, validation_fraction, test_fraction):
    """Map each distinct key to "train", "validation" or "test" by its hash: the same key, the same split.

    Where that leaves a split empty, as in a small table, the keys with the smallest hashes fill it.
    Raises StageError for fewer than three keys.
    """

    def place(key):
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    order = sorted(set(keys), key=place)
    if len(order) < 3:
        raise StageError(f"Only {len(order)} different questions are left; train, validation and test need at least 3.")
    split = {}
    for key in order:
        test, held_out = place(key) < test_fraction, place(key) < test_fraction + validation_fraction
        split[key] = "test" if test else "validation" if held_out else "train"
    if len(set(split.values())) < 3:
        split = {key: "train" for key in order} | {order[0]: "test", order[1]: "validation"}
    return split


# %%
keys = [question_key(row, question_fields) for row in rows]
split_of = assign_splits(keys, seed, validation_fraction, test_fraction)
pd.DataFrame({"rows": Counter(map(split_of.get, keys)), "questions": Counter(split_of.values())}).loc[
    ["train", "validation", "test"]
]


# %%
def build_split(name):
    """The rows of one split as a Dataset of `prompt`, `completion` and `text`, the rendered string, for people."""
    examples = []
    for row, key in zip(rows, keys, strict=True):
        if split_of[key] == name:
            example = to_conversation(row, question_template, answer_template)
            text = tokenizer.decode(encode(example, tokenizer)["input_ids"])
            examples.append({**example, "text": text})
    return datasets.Dataset.from_list(examples)


# %%
splits = datasets.DatasetDict({name: build_split(name) for name in ("train", "validation", "test")})
print(splits["train"]["text"][0])

# %% [markdown]
# ## Prove it
#
# On every row of every split: one BOS, and it comes first; one EOS in the response, and it comes last; no special token
# beyond those of the template; no line of the template that says "None" or "nan"; no web address; nothing over
# `max_length`.


# %%
def empty_lines(template):
    """The labelled lines of a template as they would be if their values were "none", "nan" or "null", in lower case."""
    labelled = [line for line in template.split("\n") if field_names(line) and re.sub(r"{\w+}", "", line).strip()]
    return {re.sub(r"{\w+}", word, line).casefold() for line in labelled for word in ("none", "nan", "null")}


def check_example(example, tokenizer, special_tokens, answer_template, max_length):
    """Raise StageError if an example breaks what the format promises. `special_tokens`: {id: count} of the template."""
    question, answer = example["prompt"][0]["content"], example["completion"][0]["content"]
    texts = tokenizer(question + "\n" + answer, add_special_tokens=False)["input_ids"]
    encoded = encode(example, tokenizer)
    ids = encoded["input_ids"]
    response = [i for i, in_loss in zip(ids, encoded["completion_mask"], strict=True) if in_loss]
    promises = {
        "one BOS, at the start": tokenizer.bos_token_id is None or ids[0] == tokenizer.bos_token_id != ids[1],
        "one EOS, at the end": response.index(tokenizer.eos_token_id) == len(response) - 1,
        "no other special token": Counter(i for i in ids if i in tokenizer.all_special_ids) == special_tokens
        and not set(texts) & set(tokenizer.all_special_ids),  # an EOS in the answer would have ended it
        "no missing value": answer.casefold() not in MISSING
        and not empty_lines(answer_template) & set(answer.casefold().split("\n")),
        "no web address": not URL.search(example["text"]),
        "at most max_length tokens": len(ids) <= max_length,
    }
    for promise, kept in promises.items():
        if not kept:
            text = example["text"][:500]
            raise StageError(f"A row breaks the promise of {promise}: {text!r}. Change or remove it in the table.")


# %%
plain = encode(to_conversation(dict.fromkeys(raw.columns, "x"), question_template, answer_template), tokenizer)
special_tokens = Counter(i for i in plain["input_ids"] if i in tokenizer.all_special_ids)
for split in splits.values():
    for example in split:
        check_example(example, tokenizer, special_tokens, answer_template, max_length)
print(f"{sum(map(len, splits.values()))} rows checked")

# %% [markdown]
# ## Look at it

# %%
lengths = pd.Series([len(encode(example, tokenizer)["input_ids"]) for split in splits.values() for example in split])
lengths.describe(percentiles=[0.5, 0.95]).round(1).to_frame("tokens")

# %% tags=["nbval-ignore-output"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
left.hist(lengths, bins=30, color="0.55", edgecolor="black")
left.axvline(max_length, color="black", linestyle="--", label=f"max_length = {max_length}")
left.set(xlabel="tokens in an example", ylabel="examples", title="Length")
left.legend()
per_question = Counter(Counter(keys).values())
right.bar(per_question.keys(), per_question.values(), color="0.55", edgecolor="black")
right.set(xlabel="rows with the same question", ylabel="questions", title="Rows a question")
plt.show()

# %% [markdown]
# ## Save
#
# The folder appears under its name only when it is whole.


# %%
def fingerprint(splits):
    """SHA-256 of the text of all splits: two data sets with the same fingerprint train the same."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        for text in split["text"]:
            digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


# %%
report = {
    "rows_in": len(table),
    "rows_out": len(rows),
    "dropped": {reason: count for reason, count in dropped.items() if count},
    "split_long_answers": {
        "rows": over_max_length - dropped["too long"],
        "into": split_into,
        "sentences_left_out": sentences_left_out,
    },
    "splits": {name: len(split) for name, split in splits.items()},
    "tokens": {
        "p50": int(lengths.quantile(0.5)),
        "p95": int(lengths.quantile(0.95)),
        "max": int(lengths.max()),
        "over_max_length": over_max_length,
    },
    "fingerprint": fingerprint(splits),
    "base_model": base_model,
    "max_length": max_length,
    "templates": {"question": question_template, "answer": answer_template, "answer_column": answer_column},
}
with whole(run / "dataset") as folder:
    splits.save_to_disk(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=2))
hand_over(run_dir, run / "dataset")
record("01_format_dataset", report["fingerprint"])
report

# %%
if push_dataset_to:
    splits.push_to_hub(push_dataset_to, token=hub_token())

# %% [markdown]
# ## What we have now
#
# A table has become chat examples: cleaned, without duplicates, split so that no question is in two splits, each with
# one BOS and one EOS. The numbers above say what was dropped and why.
#
# Next: [2 · fine-tune](02_finetune_qlora.ipynb).
