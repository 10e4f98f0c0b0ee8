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
dataset_revision = "main"  # a branch or a commit of a Hub data set; what is read is the commit, which the report keeps
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
safety_rows = False  # mix our own rows about emergencies into training: true for all of them, or how many
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
def hub_token(model=""):
    """The Hub's token among Colab's secrets; None, for the library to look in the environment and for a login.

    None, too, for a `model` that is a folder here, which needs no token.
    """
    if model and Path(model).is_dir():
        return None
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
import tempfile
import unicodedata
import zlib
from array import array
from bisect import bisect
from collections import Counter
from itertools import chain, compress, islice
from math import ceil
from types import SimpleNamespace

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from IPython.display import HTML
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

datasets.disable_progress_bars()

# %% [markdown]
# A table may be larger than memory. So rows pass through this notebook a thousand at a time, and stay on disk between
# two steps: a million rows take about as much memory as a thousand.


# %%
def batches(items, size=1000):
    """Yield the items in lists of `size`."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def write_rows(path, rows, schema):
    """Write rows, dicts, as an Arrow stream. Returns how many. Raises StageError if the disk is full."""
    written = 0
    with whole(path) as partial, pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            written += len(batch)
    return written


class Rows:
    """Rows, dicts, in a file that lasts as long as this object; to be read as often as needed."""

    def __init__(self, rows, schema, what):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.path = Path(self.folder.name) / "rows.arrow"
        rows = tqdm(rows, what, unit=" rows", delay=10, file=sys.stdout)  # shows only where it takes long
        self.count = write_rows(self.path, rows, schema)

    def __len__(self):
        return self.count

    def __iter__(self):
        with pa.OSFile(str(self.path)) as file:
            for batch in pa.ipc.open_stream(file):
                yield from batch.to_pylist()


def text_schema(fields):
    """The schema of rows whose fields are all texts."""
    return pa.schema([(field, pa.string()) for field in fields])


# %% [markdown]
# ## Read the table
#
# Every cell is read as text, so that an answer of `007` or `None` arrives as it was written. A table that can be
# understood in two ways, such as one whose rows have more cells than its header, is refused: guessing would shift or
# swallow rows without a word. Columns that no template uses are left unread.


# %%
def read_lines(path, newline):
    """Yield the lines of a UTF-8 file, with or without a byte order mark. Raises StageError if it is something else."""
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        if b"\0" in file.buffer.peek(2)[:2]:
            raise StageError(f"dataset={path} is not UTF-8, but looks like UTF-16. Save it as UTF-8 and try again.")
        try:
            yield from file
        except UnicodeDecodeError as error:
            byte = file.buffer.tell() - len(error.object) + error.start
            raise StageError(f"dataset={path} is not UTF-8 (byte {byte}). Save it as UTF-8 and try again.") from None


def read_csv(path, names, wanted):
    """Yield the rows of a .csv file. Raises StageError if a quote is open or a row is not as long as the header."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(read_lines(path, newline=""), strict=True)  # pandas' own cuts a cell at a NUL
    line = 1
    try:
        for row in reader:
            if row and names and len(row) != len(names):
                raise StageError(
                    f"dataset={path}, line {line}: this row has {len(row)} cells, the header {len(names)}. "
                    "Put double quotes around a cell that has commas or line breaks."
                )
            if row and names:
                yield dict(zip(names, row, strict=True))
            if row and not names and (row[0].startswith("sep=") or (len(row) == 1 and re.search(r"[;\t|]", row[0]))):
                raise StageError(
                    f"dataset={path}: its first line, {','.join(row)[:60]!r}, is not column names with commas between "
                    "them. Save the table with commas, and remove a line that only says sep=."
                )
            names += [] if names else row
            line = reader.line_num + 1
    except csv.Error as error:
        raise StageError(
            f"dataset={path}: the row that begins in line {line} has a double quote too many or too few ({error}). "
            'Write a quote inside a quoted cell twice: "".'
        ) from None


def read_jsonl(path, names, wanted):
    """Yield the rows of a .jsonl file. Raises StageError if a line is not a JSON object or names a field twice."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field is there twice")
        return dict(pairs)

    for number, line in enumerate(read_lines(path, newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique, strict=False)
            written = json.loads(line, parse_float=str, parse_int=str, strict=False)  # 1.50 stays 1.50
        except (ValueError, RecursionError) as error:
            raise StageError(f"dataset={path}, line {number} is not JSON ({error}). Mend or remove it.") from None
        if not isinstance(row, dict):
            raise StageError(f'dataset={path}, line {number}: each line must be an object like {{"question": "..."}}.')
        names += [name for name in row if name not in names]
        yield {name: written[name] if isinstance(value, (int, float)) else value for name, value in row.items()}


def read_parquet(path, names, wanted):
    """Yield the rows of a .parquet file."""
    with pq.ParquetFile(path, buffer_size=2**20) as file:
        names += file.schema_arrow.names
        columns = [name for name in wanted if name in names] or names
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()


def read_hub(name, revision, names, wanted):
    """Yield the rows of all splits of a Hub data set. Raises StageError if it cannot be had, for whatever reason."""
    try:
        splits = datasets.load_dataset(name, revision=revision, token=hub_token())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(
            f"dataset={name}: no such file here (looked in {Path.cwd()}), and not to be had from the Hub: {reason}"
        ) from None
    for split in splits.values():
        names += [name for name in split.column_names if name not in names]
        yield from split.select_columns([name for name in wanted if name in split.column_names] or split.column_names)


def commit_of(name, revision):
    """The commit that a branch of a Hub data set stands at now; `revision` itself if the Hub does not say."""
    try:
        return HfApi().dataset_info(name, revision=revision, token=hub_token()).sha
    except Exception:  # no network, no such data set: reading it will say so
        return revision


# %%
def cell_text(value):
    """A cell as text: "" for a missing value, JSON for a list, an object or a truth value. Halves of characters go."""
    if isinstance(value, (list, dict, bool)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "ignore").decode()
    return "" if pd.isna(value) else str(value)


def read_table(source, revision, wanted, names):
    """Yield the rows of a Hub data set or a local .csv, .jsonl or .parquet file: {column: text, "" if it is missing}.

    Only the `wanted` columns are read; the names of all go into the list `names`. Raises StageError if there is no such
    table, or if it cannot be read or is empty.
    """
    path = Path(source).expanduser()
    readers = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}
    kind = path.suffix.lower()
    if kind in readers and not path.exists():
        raise StageError(f"dataset={source}: there is no such file (looked in {Path.cwd()}).")
    if kind not in readers and path.exists():
        raise StageError(f"dataset={source}: this kind of file is not read. Use .csv, .jsonl or .parquet.")
    rows = 0
    try:
        reader = readers.get(kind)
        for row in reader(path, names, wanted) if reader else read_hub(source, revision, names, wanted):
            rows += 1
            yield {name: cell_text(row.get(name)) for name in wanted}
    except StageError:
        raise
    except Exception as error:  # a damaged file fails in many ways, each with an error of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "".join(c for c in reason if c.isprintable())[:300]  # it may quote the file
        raise StageError(
            f"dataset={source} could not be read: {reason}. Is it damaged, or of another kind than its name says?"
        ) from None
    if not rows or not names:
        raise StageError(f"dataset={source} has no rows. It needs some below its column names.")


def field_names(template):
    """The names in braces in a template, in order."""
    return re.findall(r"{(\w+)}", template)


# %%
if long_answers not in ("split", "drop"):
    raise StageError(f'long_answers={long_answers!r}: use "split" or "drop".')
question_fields, answer_fields = field_names(question_template), field_names(answer_template)
if answer_column not in answer_fields:
    raise StageError(f"answer_column={answer_column!r} is not in answer_template, which uses: {answer_fields}")
fields = list(dict.fromkeys(question_fields + answer_fields))
wanted = list(dict.fromkeys(str(columns[field]) for field in fields if field in columns))
names = []
on_hub = Path(dataset).suffix.lower() not in (".csv", ".jsonl", ".parquet") and not Path(dataset).expanduser().exists()
commit = commit_of(dataset, dataset_revision) if on_hub else None
table = Rows(read_table(dataset, commit, wanted, names), text_schema(wanted), "reading")
if commit != (dataset_revision if on_hub else None):
    print(f"dataset_revision={dataset_revision} is commit {commit} today: set it to that to read the same again.")
print(f"{len(table):,} rows, columns: {', '.join(map(repr, names))}")
pd.DataFrame(islice(table, 3), columns=[name for name in names if name in wanted])

# %% [markdown]
# From here on the columns go by the names that the templates use. A column that is missing is an error now, not an
# empty answer later.


# %%
def check_columns(names, columns, fields):
    """Raise StageError if one of the `fields` has no column among the table's, whose `names` are given, or has two."""
    from difflib import get_close_matches

    for field in fields:
        column = columns.get(field)
        if column is None:
            raise StageError(f"The templates use {{{field}}}, which `columns` does not name. It names: {list(columns)}")
        if column not in names:
            found = [c[:60] for c in names[:30]]  # without a header these are cells, as long as they like
            near = get_close_matches(str(column).lower(), [c.lower() for c in found], n=1, cutoff=0.4)
            hint = next((f" Did you mean {c!r}?" for c in found if near and c.lower() == near[0]), "")
            raise StageError(f"The table has no column {column!r} (for {{{field}}}). It has: {found}.{hint}")
        if names.count(column) > 1:
            raise StageError(f"The table has more than one column {column!r} (for {{{field}}}). Rename or remove one.")


# %%
check_columns(names, columns, fields)

# %% [markdown]
# ## Clean the cells
#
# Composed Unicode (NFC), no invisible characters, single spaces. NFKC would go too far: it turns "1½ cups" into
# "11⁄2 cups". A cell that only says that it is empty ("None", "nan", "-") is empty, and so is a web address: a link to
# a picture of a posture teaches a model to invent links.

# %%
MISSING = {"", "none", "nan", "null", "n/a", "na", "nil", "-", "--", "<na>"}
# up to the next space, bracket or quote, or to Chinese, Japanese or Korean, which is written without spaces
ADDRESS = (
    r"(?:https?:|(?<![^\W\u2e80-\uffef])www\.)"
    r"(?:\([^\s()]*\)|[^\s()<>\"\[\]\u2e80-\u9fff\uac00-\ud7af\uf900-\uffef])+"
)
# with the brackets or quotes around it; of a link in Markdown the text stays
URL = re.compile(rf"!?\[([^\[\]\n]*)\]\({ADDRESS}\)|[\[\"(<]{{1,2}}{ADDRESS}[\]\")>]{{1,2}}|{ADDRESS}", re.IGNORECASE)
# zero-width characters, control characters, and halves of characters; emoji need their joiner (U+200D)
INVISIBLE = re.compile(r"[\u200b\u2060\ufeff\u00ad\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


def clean_cell(text):
    """Return a cell's text with Unicode and white space normalized, "" for a missing value or a web address."""
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    text = URL.sub(r"\1", text)
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
        source = {"revision": revision, "token": hub_token(base_model)}
        tokenizer = AutoTokenizer.from_pretrained(base_model, **source)
        vocab_size = AutoConfig.from_pretrained(base_model, **source).vocab_size
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
clean = ({field: break_markers(clean_cell(row[columns[field]]), markers) for field in fields} for row in table)
clean = Rows(clean, text_schema(fields), "cleaning")

# %% [markdown]
# ## Drop what cannot teach
#
# A row without a question or without an answer teaches nothing. A duplicate teaches its row twice, and if its twin
# lands in the test split it makes the test dishonest. Near duplicates are answers to one question whose words differ by
# a tenth or less, letter case and the marks around words aside.
#
# To compare each answer with every other one would take hours where a question has thousands. But two answers that
# share nine words of ten also share one of the *rarest* words of each: only those that do are compared.

# %%
SPACING = str.maketrans(dict.fromkeys("。，、；：！？…「」『』（）《》", " "))  # these need no spaces around them
OPENING, CLOSING = "\"'“”‘’„«»([{*", ".,;:!?\"'“”‘’„«»)]}*"


def words(text):
    """The words of a text in lower case, without the marks around them: "Tea!" is "tea", but "-5" is not "5"."""
    return [word.lstrip(OPENING).rstrip(CLOSING) or word for word in text.casefold().translate(SPACING).split()]


def twins_to_drop(twins, threshold):
    """Yield (number, reason) of those to drop among rows that ask the same, given as (number, content, bag of words).

    Rows whose bags share at least `threshold` of the words of both (Jaccard index) have a word in common among the
    `n - ceil(threshold * n) + 1` rarest of the n words of each (the prefix filter of Chaudhuri et al., 2006).
    """
    frequency = Counter(word for _, _, bag in twins for word in bag)
    seen, kept, with_word = set(), [], {}
    for number, content, bag in twins:
        rarest = sorted(bag, key=lambda word: (frequency[word], word))
        rarest = rarest[: max(0, len(bag) - ceil(threshold * len(bag) - 1e-9) + 1)]
        others = [kept[k] for k in {k for word in rarest for k in with_word.get(word, ())}]
        shared = [(len(set(bag).intersection(other)), len(other)) for other in others]
        if content in seen:
            yield number, "duplicate"
        elif any(both >= threshold * (len(bag) + size - both) for both, size in shared):
            yield number, "near duplicate"
        else:
            seen.add(content)
            for word in rarest:
                with_word.setdefault(word, []).append(len(kept))
            kept.append(bag)


def reason_to_drop(rows, question_fields, answer_column, threshold):
    """Say for each row why it is dropped: "no question", "no answer", "duplicate", "near duplicate", or "" to keep it.

    Near duplicates ask the same, and their other fields share at least `threshold` of the distinct words of both.
    `rows` is read twice: first for the questions, then for the words of rows whose question another row asks as well.
    A word is kept as a checksum of four bytes.
    """
    reasons, questions, twins = [], array("q"), {}
    for row in rows:
        questions.append(hash(tuple(tuple(words(row[field])) for field in question_fields)))
        complete = all(row[field] for field in question_fields)
        reasons.append("no question" if not complete else "" if row[answer_column] else "no answer")
    _, question, times = np.unique(questions, return_inverse=True, return_counts=True)
    for number, row in enumerate(rows):
        if times[question[number]] > 1 and not reasons[number]:
            answer = [row[field] for field in row if field not in question_fields]
            bag = array("I", {zlib.crc32(word.encode()) for text in answer for word in words(text)})
            twins.setdefault(question[number], []).append((number, hash(tuple(row.values())), bag))
    for group in twins.values():
        for number, reason in twins_to_drop(group, threshold):
            reasons[number] = reason
    return pd.Series(reasons, dtype="category")


# %%
reasons = reason_to_drop(clean, question_fields, answer_column, near_duplicate_threshold)
keep = (reasons == "").to_numpy()
dropped = Counter(reasons[~keep])
print(f"{len(clean):,} rows in, {keep.sum():,} kept; dropped: {dict(dropped) or 'none'}")
pd.set_option("display.max_colwidth", 60)
shown = list(islice(compress(clean, ~keep), 20))
pd.DataFrame(shown, index=reasons.index[~keep][:20], columns=fields).assign(reason=reasons)

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


def excerpt(text):
    """A text to be shown: its beginning, if it is long."""
    return text if len(text) <= 3000 else f"{text[:3000]} … ({len(text):,} characters)"


# %%
if not keep.any():
    raise StageError(f"All {len(clean)} rows of {dataset} were dropped: {dict(dropped)}. Check `columns`.")
example = to_conversation(next(compress(clean, keep)), question_template, answer_template)
as_it_came = next(compress(table, keep))
print(excerpt(str({field: as_it_came[columns[field]] for field in fields})), "\n")
print(excerpt(tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False)))

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
def encode_all(examples, tokenizer):
    """`encode` for many conversations at once, three times as fast: the tokenizer's answers are ready when it asks.

    Adds `special`, the special tokens as they were before `encode` cut anything off.
    """
    prompts = [example["prompt"] for example in examples]
    prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    wholes = [example["prompt"] + example["completion"] for example in examples]
    wholes = tokenizer.apply_chat_template(wholes, return_dict=False)
    asked, special = {True: iter(prompts), False: iter(wholes)}, set(tokenizer.all_special_ids)
    ready = SimpleNamespace(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        apply_chat_template=lambda _, add_generation_prompt=False, **__: next(asked[add_generation_prompt]),
    )
    encoded = [encode(example, ready) for example in examples]
    return [{**row, "special": [i for i in ids if i in special]} for row, ids in zip(encoded, wholes, strict=True)]


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

    Returns the rows and how many sentences were too long by themselves and so left out. How many sentences fit is found
    by doubling their number, and then halving the step.
    """
    pieces = re.split(r"(?<=[.!?।。])(\s+)", row[answer_column])  # sentences, and between them spaces or line breaks
    rows, start, sentences, too_long = [], 0, (len(pieces) + 1) // 2, 0

    def part(end):
        return {**row, answer_column: "".join(pieces[2 * start : 2 * end - 1])}

    while start < sentences:
        most = 1
        while start + most < sentences and length(part(start + most)) <= max_length:
            most *= 2
        ends = range(start + most // 2 + 1, min(start + most, sentences) + 1)
        end = ends.start - 1 + bisect(ends, max_length, key=lambda end: length(part(end)))
        if end > start:
            rows.append(part(end))
        too_long += end == start
        start = max(end, start + 1)
    return rows, too_long


def fitting(rows):
    """Yield (row, example, encoded) of each row that fits in `max_length`, and of the parts of each that does not."""
    for batch in batches(rows):
        examples = [to_conversation(row, question_template, answer_template) for row in batch]
        for row, example, encoded in zip(batch, examples, encode_all(examples, tokenizer), strict=True):
            if len(encoded["input_ids"]) <= max_length:
                yield row, example, encoded
                continue
            prompt = encoded["completion_mask"].index(1)
            long["shortest prompt"] = min(long["shortest prompt"] or prompt, prompt)
            parts, left_out = (
                split_answer(row, answer_column, max_length, length) if long_answers == "split" else ([], 0)
            )
            long.update({"rows": 1, "parts": len(parts), "sentences left out": left_out, "dropped": not parts})
            yield from fitting(parts)


# %% [markdown]
# ## Split by question
#
# All rows with one question go to the same split: a test question that was also a training question measures memory.
# Each question's place comes from a hash of the question itself, so rows that are added, removed or put in another
# order elsewhere do not move it.


# %%
PUNCTUATION = {i: " " for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith("P")}


def question_key(row, question_fields):
    """What makes two rows ask the same: the words of the question's fields, letter case and all punctuation aside."""
    plain = [" ".join(row[field].casefold().translate(PUNCTUATION).split()) for field in question_fields]
    return " ".join(text or row[field] for text, field in zip(plain, question_fields, strict=True))


def place(key, seed):
    """Where a question stands between 0 and 1, by a hash."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(places, validation_fraction, test_fraction):
    """The split of each row, "train", "validation" or "test", from its question's place: an array of their names.

    Where that leaves a split empty, as in a small table, the questions with the lowest places fill it.
    Raises StageError for fewer than three questions.
    """
    places, lowest = np.array(places), np.unique(places)
    if len(lowest) < 3:
        raise StageError(
            f"Only {len(lowest)} different questions are left; train, validation and test need at least 3."
        )
    bounds = [test_fraction, test_fraction + validation_fraction]
    if len(np.unique(np.digitize(lowest, bounds))) < 3:
        bounds = [lowest[1], lowest[2]]
    return np.array(["test", "validation", "train"])[np.digitize(places, bounds)]


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


def check_example(example, encoded, tokenizer, special_tokens, empty_lines, max_length):
    """Raise StageError if an example breaks what the format promises. `special_tokens`: those of the template."""
    answer, ids = example["completion"][0]["content"].casefold(), encoded["input_ids"]
    response = encoded["completion_mask"].index(1)
    promises = {
        "one BOS, at the start": tokenizer.bos_token_id is None or ids[0] == tokenizer.bos_token_id != ids[1],
        "one EOS, at the end": ids.index(tokenizer.eos_token_id, response) == len(ids) - 1,
        "no other special token": encoded["special"] == special_tokens,
        "no missing value": answer not in MISSING and empty_lines.isdisjoint(answer.split("\n")),
        "no web address": not URL.search(example["text"]),
        "at most max_length tokens": len(ids) <= max_length,
    }
    for promise, kept in promises.items():
        if not kept:
            text = example["text"][:500]
            raise StageError(f"A row breaks the promise of {promise}: {text!r}. Change or remove it in the table.")


# %%
plain = to_conversation(dict.fromkeys(fields, "x"), question_template, answer_template)
special_tokens, never = encode_all([plain], tokenizer)[0]["special"], empty_lines(answer_template)


def finish(example, encoded):
    """The example with its `text`, the rendered string, for people, once it is proven; its length goes to `lengths`."""
    example["text"] = tokenizer.decode(encoded["input_ids"])
    check_example(example, encoded, tokenizer, special_tokens, never, max_length)
    lengths.append(len(encoded["input_ids"]))
    return example


def finished(rows):
    """Yield the examples of rows, finished; the places of their questions go to `places`."""
    for row, example, encoded in fitting(rows):
        places.append(place(question_key(row, question_fields), seed))
        yield finish(example, encoded)


# %% [markdown]
# ## All rows
#
# Each row is encoded once, and with its ids at hand it is split if it is too long, proven, and given its place. It is
# written twice, to a temporary file and to `dataset/`, and both hold it twice, as a conversation and as a text.

# %% tags=["nbval-ignore-output"]
around = len(question_template) + len(answer_template)  # what a row has beside its cells
expected = 4 * (clean.path.stat().st_size / len(clean) + around) * keep.sum() / 2**30
existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
free = min(shutil.disk_usage(place).free for place in (clean.folder.name, existing)) / 2**30
print(f"expected on disk: {expected * 1024:,.1f} MiB; {free:,.1f} GiB are free")
if expected > free:
    raise StageError(
        f"{keep.sum():,} rows take {expected:.1f} GiB, and {free:.1f} GiB are free. Free some space, or set TMPDIR and "
        "run_dir to another disk."
    )

# %%
message = {"content": datasets.Value("string"), "role": datasets.Value("string")}
features = datasets.Features({"prompt": [message], "completion": [message], "text": datasets.Value("string")})
long, lengths, places = Counter(), array("i"), array("d")
examples = Rows(finished(compress(clean, keep)), features.arrow_schema, "formatting")
dropped["too long"] = long["dropped"]
if not examples and max_length <= long["shortest prompt"] + 1:
    raise StageError(
        f"max_length={max_length} leaves no room for an answer: "
        f"the shortest prompt has {long['shortest prompt']} tokens."
    )
if not examples:
    raise StageError(f"Every row is longer than max_length={max_length} and was dropped. Raise max_length.")
print(
    f"{long['rows']} rows over {max_length} tokens: "
    f"{long['parts']} shorter rows made of them, {long['dropped']} dropped"
)
print(f"{len(examples)} rows checked")

# %%
split = assign_splits(places, validation_fraction, test_fraction)
questions, first_rows, rows_of_question = np.unique(places, return_index=True, return_counts=True)
pd.DataFrame({"rows": Counter(split), "questions": Counter(split[first_rows])}).loc[["train", "validation", "test"]]

# %%
print(excerpt(next(compress(examples, split == "train"))["text"]))

# %% [markdown]
# ## Emergencies
#
# A model that has only seen remedies suggests one for a stroke, too. With `safety_rows`, rows of our own are mixed into
# the training split, and only there. For an emergency their answer is to get help at once; for everyday complaints it
# stays a remedy, so that the model does not send everyone to hospital. No doctor has reviewed them.
#
# One row a line: how the question's template would name the emergency, the same in free words, and the answer. Every
# emergency makes two rows; one, where the template is nothing but its field.

# %%
# @title Our rows { display-mode: "form" }
SAFETY_ROWS = """
a belt of pressure round my chest that runs down into the left arm | Since breakfast something heavy sits behind my breastbone and my arm tingles. Can it wait until tomorrow? | No, it cannot wait: this may be a heart attack. Call your local emergency number now. Sit down, keep still, and unlock the door. Do not drive yourself.
one side of my mouth hanging down since lunch | Grandpa's smile has gone crooked and he cannot lift one arm. Shall we let him sleep it off? | Please do not let him sleep it off. These are signs of a stroke and every minute counts. Call an ambulance at once and note the time when it began. Give him nothing to eat or drink.
words that would not come out for ten minutes, now better again | My speech was jumbled for a little while this morning and now I feel normal. Is it over? | It may have been a warning stroke, and a large one can follow. Go to an emergency department today, or call an ambulance, even though you feel well now.
sudden darkness in my right eye | A curtain came down over one of my eyes an hour ago. Which drops should I use? | No drops will help. Sudden loss of sight is an emergency for the eye and sometimes the brain. Have someone take you to an emergency department immediately.
a headache that struck like lightning and is the worst I ever had | Out of nowhere my head exploded with pain while I was gardening. What eases that? | A headache that peaks within a minute can be bleeding in the brain. Call emergency services now, lie down, and do not take a painkiller in the meantime.
a racing heartbeat and blackouts | My pulse has been galloping for half an hour and I nearly passed out twice. Any trick to slow it? | Fainting with a racing heart is dangerous. Call the emergency number, lie down with somebody beside you, and do not stand up until help is there.
a husband who collapsed and does not breathe | He fell over in the hall, he is grey and I see no breathing! | Call emergency services on loudspeaker now and start pressing: hard and fast in the middle of the chest, about two presses a second. If there is a defibrillator, send someone for it. Do not stop until help takes over.
ripping pain between the shoulder blades | It feels as if something is tearing inside my back and I am sweating cold. | Stop moving and phone for an ambulance. Tearing pain in the back can come from the main artery, and only a hospital can find out and treat it.
breathlessness and a swollen leg after an operation | Two weeks after my knee surgery I suddenly cannot get air and it stabs when I breathe in. | That may be a blood clot in the lung. Call your emergency number straight away, sit upright, and tell them about the operation.
a hot, thick calf after a long flight | My lower leg has doubled in size since we landed. Should I massage it? | Do not massage it; a clot might be in there and could travel. Get it examined by a doctor today. If you become short of breath, call an ambulance.
asthma that my inhaler no longer helps | I have used the blue spray ten times and can only speak single words. | This is a severe attack. Call an ambulance now. Sit upright, stay as calm as you can, and keep taking a puff of your reliever every minute until the crew arrives.
a piece of meat stuck in my windpipe | My uncle grabs his throat at the table and no sound comes out! | Ask someone to call for an ambulance. Give five firm blows between his shoulder blades, then five abdominal thrusts, and go on in turn. If he goes limp, lay him down and start chest compressions.
a baby with something stuck in the throat | My eight-month-old swallowed a bead, is silent and turning dark. | Call emergency services now. Lay the baby face down along your arm and give five back blows, then turn over and give five chest thrusts with two fingers. Repeat until it comes out or help arrives.
a child's harsh, crowing breath at rest | Our toddler barks and makes a whistling noise with every breath, and her ribs pull in. | Noisy breathing at rest with the ribs drawing in needs an ambulance. Keep her upright on your lap and calm; crying makes it harder. Do not look into her throat.
blue lips and gasping | Mum's lips have changed colour and she cannot finish a sentence. | She is not getting enough oxygen. Ring the emergency number immediately, let her sit leaning forward, loosen tight clothes, and stay with her.
dizziness and headache, like everyone in the house, since the heater was lit | The whole family feels sick and sleepy in the living room, only outdoors it gets better. | That points to carbon monoxide, which you cannot smell. Everybody out into the open air now, then call the fire brigade or emergency number. Do not go back in, and all of you need to be checked.
a cough and soot in the nose after a fire | I got out of a burning flat, my voice is hoarse but otherwise I am fine. | Airways burnt by smoke can swell hours later. Go to hospital by ambulance now, even if you feel all right.
water in the lungs after going under | My nephew was pulled out of the pool and coughs a lot. He says he is OK. | He has to be seen at a hospital right away, as breathing can get worse for hours after. If he grows sleepy or struggles for air, call an ambulance. If he stops breathing, begin rescue breaths and compressions.
hives all over and a tight throat after a wasp sting | Ten minutes ago a wasp got me; my lips are puffy and I wheeze. | That is a severe allergic reaction. Use an adrenaline pen in the thigh at once if there is one, then call for an ambulance. Lie down with your legs raised, or sit if breathing is hard.
vomiting and swelling after eating a nut | My daughter ate a biscuit with cashews in it and her eyelids are swelling shut, she feels faint. | Use her adrenaline auto-injector now, and phone the emergency services even if she improves. Keep her lying down. A second dose may be needed after five minutes.
a tongue that swells after a new tablet | I began a blood pressure pill yesterday and now my tongue fills my mouth. | A swelling tongue can close the airway. Call an ambulance this minute, sit upright, and take no more of that medicine. Bring the packet along.
a throat so sore that I drool and cannot lie flat | My son has a high temperature, drools, and only breathes sitting up. | Do not examine his mouth and do not make him lie down. Call the emergency number now and keep him calm and upright; the airway may be about to close.
drain cleaner in a toddler's mouth | She drank from the bottle under the sink, there is foam on her chin. | Call the emergency number or your poison centre now, with the bottle in your hand. Wipe out her mouth. Do not make her vomit, and give nothing unless they tell you to.
far too many paracetamol tablets | I took about twenty headache pills last night and feel OK. So no harm done? | The harm to the liver shows only after a day or two, and there is an antidote that works best early. Go to an emergency department now, or call the poison centre or an ambulance. If you meant to hurt yourself, tell them; they will help.
sleeping pills and spirits taken together | My flatmate washed down a box of sedatives with vodka and I can hardly rouse him. | Phone emergency services now. Roll him on his side, keep his airway clear, and watch each breath. Do not make him vomit or walk around. Keep the box for the crew.
cramps after eating mushrooms from the wood | We cooked what we picked, and eight hours later we are all throwing up. | Some mushrooms destroy the liver, and late vomiting is a bad sign. All of you must go to hospital now; ring the poison centre on the way. Take leftovers with you.
a swallowed button battery | The little cell from the remote control has gone and my child is dribbling. | A button battery can burn through the gullet within two hours. Go to an emergency department immediately and say so at the door. Do not cause vomiting, and give nothing to eat.
pesticide on my skin, sweating and twitching | I spilled crop spray over my trousers, now my eyes water and my muscles jump. | Take off the clothes, rinse your skin with plenty of water, and call an ambulance now. Keep the container so that the doctors can see what it was.
burning lungs after mixing two bathroom cleaners | I poured bleach onto the descaler and a cloud came up. I cannot stop coughing. | Leave the room at once, close the door, and breathe fresh air. Call the emergency number if you still cough or wheeze; chlorine gas can injure the lungs.
a double dose of heart tablets | Nan took her week's box of heart medicine in one go by mistake. | Do not wait for symptoms. Call the poison centre or the emergency number now and read them the names and strengths. Keep her lying down, with you beside her.
lamp oil that my boy swallowed | He took a gulp from the torch on the terrace and keeps coughing. | Lamp oil gets into the lungs, so never make him vomit. Call the poison centre or an ambulance right now and keep him sitting up.
a friend so drunk that she cannot be woken | She has had two bottles of wine, her skin is cold and she snores oddly. | This is alcohol poisoning and she could stop breathing. Call an ambulance, put her on her side, keep her warm, and do not leave her to sleep.
slow breathing and tiny pupils after a pain patch | My brother used something strong, his breath comes every ten seconds. | That looks like an opioid overdose. Call emergency services, give naloxone if you have it, and if he is not breathing properly begin rescue breaths. Stay until they come.
a handful of iron tablets, eaten by a two-year-old | He thought my pregnancy vitamins were sweets. He seems cheerful. | Iron can poison a small child even while he plays. Call the poison centre or go to an emergency department now, and count how many are missing.
red berries from a garden bush, eaten by my niece | She chewed something from the hedge and I do not know the plant. | Remove what is left in her mouth and ring the poison centre with a photo of the plant at hand. If she is drowsy, vomits, or breathes oddly, call an ambulance at once.
thoughts of ending my life | I have written letters to everyone and I do not want to wake up tomorrow. | I am glad that you wrote this down. Please call your local emergency number or a crisis line now, and go to someone you trust so that you are not alone tonight. This pain can be treated, and you matter.
fear for a friend who has said goodbye | He sent me a message that the world is better off without him and turned his phone off. | Treat it as real. Call the emergency services and tell them where he may be. If you can reach him, listen, stay on the line, and do not leave him alone. A crisis line can guide you as well.
deep cuts that I made on my own arm | I hurt myself again, this time it gapes and will not stop bleeding. | Press a clean cloth on it hard, hold the arm up, and call the emergency number or have somebody bring you to hospital. You deserve care, not blame; a crisis line will listen at any hour.
voices that order me to hurt people | The voices got louder and tell me to take the knife. | Put distance between you and anything dangerous, and call the emergency number or a crisis line now. Tell them exactly this. They will help you to keep yourself and others safe.
fever of 38.6 in a five-week-old | Our newborn is hot and drinks less than usual. How do I bring the temperature down at home? | Under three months, any fever has to be seen by a doctor straight away, day or night. Go to an emergency department now, and give no medicine first unless they say so.
a baby who is floppy and hard to wake | Our infant hangs in my arms like a doll and barely opens her eyes. | Call an ambulance immediately. Keep her warm against your body, watch her breathing, and start infant resuscitation if it stops. Do not try to feed her.
a baby without a wet nappy since yesterday | He has diarrhoea, no tears, and the soft spot on his head is sunken. | Those are signs of dangerous dehydration. Take him to an emergency department now; he may need fluid through a drip.
a toddler's fit during a fever | Her eyes rolled up and all of her jerks, she is burning hot. | Lay her on her side, move hard things away, put nothing in her mouth, and look at the clock. Call the emergency number now, and certainly if it lasts five minutes. Afterwards a doctor must see her.
purple spots that do not fade under a glass | My teenager has a temperature and a rash of tiny bruises that spreads. | That can be meningitis or blood poisoning. Call an ambulance at once and say that the rash does not fade. Do not wait to see if it gets better.
a stiff neck, fever and eyes that hurt in the light | I cannot bend my head forward, the lamp is unbearable, and I keep throwing up. | Together these point to meningitis, which is treated within hours or not at all. Have someone take you to hospital now, or ring for an ambulance.
a yellow newborn who no longer wants to feed | Four days old, skin like mustard, and she sleeps through every meal. | Jaundice in a sleepy newborn can damage the brain, and it can be treated well. Call your maternity ward or go to an emergency department today, without delay.
vomiting and sleepiness after a knock on the head | My son came off his bike, then was sick twice and talks nonsense. | This may be bleeding inside the skull. Call an ambulance, keep him still with his head and neck supported, and give him nothing by mouth. Do not let him out of your sight.
numb legs after falling from a ladder | I am on the lawn, my neck hurts and I cannot feel my feet. | Do not move, and let no one lift you. Call out for somebody to ring the emergency number, or do it on loudspeaker. Keep your head still until the crew has secured your spine.
a scald over a child's whole chest | He pulled the kettle down on himself; the skin is peeling. | Call an ambulance. Hold the burn under cool running water for twenty minutes, keep the rest of him warm, and cover it loosely with cling film or a clean cloth. Put nothing else on it.
caustic splashes in my eye | Cement got under my glasses and I can't open the eye for pain. | Rinse it now under a gentle tap, lids held apart, for at least twenty minutes, and have someone phone the emergency services meanwhile. Keep rinsing on the way if you can.
an electric shock from a bare cable | The cable threw me across the garage; just a small mark on my thumb. | Electricity can upset the heart and burn deep inside. Make sure that the power is off, then call the emergency number or go to hospital for a heart tracing, however small the mark.
blood that spurts from my thigh | The chainsaw slipped, it pumps out in beats! | Press as hard as you can straight on the wound with a cloth and do not let go. Shout for someone to call an ambulance. If it still spurts, tie a tourniquet above it and note the time.
a nosebleed for an hour, on blood thinners | I take pills against clots and my nose has not stopped since the news began. | Sit up, lean forward, pinch the soft part of the nose without a break, and go to an emergency department now. If you feel faint or the blood pours, call an ambulance.
a finger cut off by a saw | The tip is lying on the bench. What first? | Press a clean dressing on the stump and hold the hand high. Call an ambulance. Wrap the fingertip in a damp cloth, seal it in a bag, and put that bag on ice, never the finger itself on the ice.
a bone that sticks out of my shin | He tackled me, now my leg is bent and something white shows. | Do not straighten it. Cover the wound with a clean cloth, keep the leg still, and call an ambulance. Eat and drink nothing, since you may need surgery.
a knife stuck in my side | There was a fight and the blade is still in him, should I pull it out? | Leave it in: it may be holding back the bleeding. Ring the emergency services and the police, pad around it so that it cannot move, and keep him lying still.
a metal splinter in my eyeball | I was hammering without goggles and a speck went right into the eye. | Do not rub, rinse or pull it. Cover the eye with a paper cup without any pressure and get to an eye emergency clinic now.
belly pain and giddiness after a car crash | The seat belt caught me hard two hours ago, now my tummy is tense and I am cold. | You may be bleeding inside. Lie down and call an ambulance now. Have nothing to eat or drink on the way.
a deep bite from a stray dog | An unknown dog tore my calf open abroad. I washed it, am I done? | Washing was right, for fifteen minutes with soap. But go to a hospital today: you may need vaccination against rabies and tetanus, and rabies cannot be cured once it shows.
a scratch from a bat | I woke up with a bat in the bedroom and two pinpricks on my hand. | See a doctor or hospital today, even for marks that small. Bats can carry rabies, and the vaccine works only before any symptom. Wash the spot with soap for fifteen minutes first.
a viper's bite on the ankle | Something hissed in the grass, there are two holes and the foot swells. | Call an ambulance, keep the leg still and no higher than your heart, and take off shoe and rings. No cutting, sucking, ice or tourniquet. Remember the snake's colours, and leave it alone.
a scorpion's sting, and my child twitches | It got his toe in the tent; now his eyes roam and he drools. | In a child this can be life-threatening. Call the emergency number or drive to the nearest hospital now. Keep him calm and the foot still.
whiteness and numbness in frozen toes, and confusion | We found Dad outdoors in the snow, he mumbles and no longer shivers. | Ring for an ambulance. Move him gently to shelter, take off wet clothes, wrap him in blankets, and handle him as little as you can. Do not rub his limbs or give him alcohol.
hot dry skin and confusion after working in the sun | Our roofer staggers, talks rubbish and has stopped sweating. | Heat stroke kills. Call emergency services, get him into the shade, undress him, and cool him with water and a fan until they arrive. If he is not fully awake, he must not drink.
a jaw that locks days after stepping on a nail | I can hardly open my mouth and my back arches in cramps. | This sounds like tetanus. You need a hospital with intensive care now: call an ambulance and mention the nail.
vomit that looks like coffee grounds | What came up was dark and grainy, and I feel light-headed. | Dark grains can be digested blood. Call the emergency number, lie down on your side, and take nothing by mouth until you have been examined.
black, sticky stools and weakness | My stool has looked like tar for two days and today the stairs were too much. | That can be bleeding in the stomach. Go to an emergency department now, by ambulance if you feel faint, and list the painkillers you take.
a pain low on the right of my belly, with fever | It began at the navel, moved to the right, and each step hurts. | It might be your appendix. Go to hospital now, before it bursts. Do not eat, and do not use heat or laxatives.
a sudden, terrible pain in one testicle | I am fifteen and woke up at night with it, it has drawn up and I feel sick. | It may be twisted, and there are only about six hours to save it. Tell an adult and go to an emergency department now. There is nothing embarrassing about it; doctors see this often.
thirst, vomiting and breath that smells of nail varnish, with diabetes | My sugar meter just reads HI and I breathe fast. | That is how ketoacidosis shows. Call an ambulance now. Do not stop your insulin, and do not try to sleep it off.
shaking and cold sweat with a sugar of 2.4 | I injected insulin, missed my meal, and now my hands tremble. | If you can swallow, take glucose tablets or a sugary drink now and measure again after fifteen minutes. If it does not rise, or you get drowsy, call the emergency number at once.
a diabetic mother whom I cannot wake | She uses insulin and lies in bed soaked in sweat, no reaction. | Call the emergency services. Turn her on her side, put nothing at all in her mouth, and give her glucagon if you have it and know how.
a seizure that does not stop | She has epilepsy, but this time it has gone on for more than five minutes. | Five minutes is the limit: call an ambulance now. Give her emergency medicine if it was prescribed, cushion her head, hold nothing down, and turn her on her side when the jerking ends.
bleeding and cramps in the fifth month of pregnancy | My pad is soaked with bright red and my belly keeps tightening. | Call an ambulance or your maternity unit this instant. Lie on your left side and keep the pads to show them. Use nothing inside.
a stabbing pain on one side after a missed period | My shoulder tip hurts too, I am dizzy, and the test was positive last week. | The pregnancy may sit outside the womb and be bleeding inside. Call the emergency number now and lie down; this must be treated in hospital.
flickering sight and a pounding head at 34 weeks | My hands and face have puffed up and there is pain under my ribs. | In pregnancy that may be pre-eclampsia, a danger for you and the child. Phone your maternity unit and go in now, or call an ambulance.
a child in my womb who has stopped kicking | Not one movement since last night, usually he is lively. | Do not wait until morning. Call your maternity unit and go there straight away, so that they can listen to the heartbeat.
very heavy bleeding a week after giving birth | I fill a pad every twenty minutes and pass clots as big as a plum. | That is too much. Call an ambulance now, lie flat, and let someone look after the baby.
shivering, mottled skin and confusion | Uncle has a urine infection, now he is clammy, breathes fast and does not know what day it is. | This looks like sepsis. Say that word when you call the emergency number, and do it now: each hour without treatment raises the risk.
a temperature during chemotherapy | My last infusion was nine days ago and the thermometer shows 38.3. | With few white cells an infection can run away within hours. Ring your cancer ward's emergency line or go to hospital now. Do not take fever tablets first.
numbness where I sit on a saddle, and no control over my bladder | My slipped disc got worse, I do not notice when I need the toilet. | Nerves at the end of the spine are being crushed. Go to an emergency department now; an operation within a day or so can save bladder and legs.
a rock-hard red eye with rainbow rings round lamps | My eye aches so much that I was sick, and the sight is misty. | It could be acute glaucoma, which can blind within days. Get to an eye emergency clinic today, right away.
a bladder that I cannot empty at all | I have not passed a drop for twelve hours and my belly bulges. | A blocked bladder has to be drained by a doctor. Go to an emergency department now, and stop drinking large amounts until then.
| I sneeze and my nose runs, but otherwise I am fine. What can I do? | Rest, drink warm tea, and rinse your nose with salt water. A cold passes in about a week. See a doctor if you have a high fever, short breath, or feel worse after ten days.
| I bit into an onion sandwich and now my breath is awful. Tips? | Chew some parsley or a slice of apple, brush your teeth and tongue, and drink water. See a dentist if bad breath stays for weeks.
| My legs ache after yesterday's long hike. | That is muscle soreness: a warm bath, gentle walking and a little stretching help, and it fades in two or three days. See a doctor if one leg swells or your urine turns dark.
| A mosquito got my ankle and I keep scratching. | Lay a cool, damp cloth on it for ten minutes, and dab on a little aloe vera gel. Keep the nails off. See a doctor if redness spreads, or at once if your face swells.
| Too much cake at the party, now my stomach grumbles. | Sip fennel or peppermint tea, take a slow walk, and eat lightly this evening. See a doctor if the pain is strong, does not pass, or comes with fever.
| My lips crack in winter. What do you put on yours? | A thin layer of coconut oil or beeswax balm several times a day, and no licking. Drink enough. See a doctor if a sore has not healed in three weeks.
| I slept badly before my exam. Something soothing for tonight? | Have a cup of chamomile tea, put screens away an hour before bed, and keep the room cool and dark. See a doctor if you sleep badly for more than a month.
| Typing all day has made my shoulders stiff. | Put a warm cloth on them for a quarter of an hour, roll them slowly, and get up every hour. See a doctor if pain runs into the arm, or the hand goes numb.
| I have hiccups in a meeting, help! | Sip cold water slowly, or hold your breath for a count of ten. They usually stop by themselves. See a doctor if they last longer than two days.
| My voice is rough after the concert. | Spare it for a day, drink lukewarm water with a spoon of honey, and avoid whispering. See a doctor if it stays hoarse for three weeks.
| A small blister from new shoes, should I pop it? | Better not: leave the skin closed, wash it, and protect it with a plaster. A thin smear of aloe vera soothes. See a doctor if pus or red streaks appear.
| I am a bit queasy on buses. | Look at the horizon, sit in front, and chew a small piece of ginger before the ride. See a doctor if you are often dizzy without travelling.
| The skin on my elbows is dry and flaky. | After bathing, while it is damp, rub in some almond oil or a plain cream, and use mild soap. See a doctor if it cracks, bleeds or itches at night.
| I touched a hot pan for a second; the fingertip is pink. | Hold it under cool running water for twenty minutes and leave it uncovered or under a light dressing. See a doctor if it blisters over a joint or looks white.
| Heavy legs each evening after standing in the shop. | Raise them above your hips for fifteen minutes, shower the calves cool, and walk in the breaks. See a doctor if only one leg swells or hurts.
| My eyes are tired from the screen. | Look out of the window every twenty minutes, blink often, and rest a cool damp cloth on closed lids. See a doctor if your sight changes or an eye hurts.
| Nothing has moved in my bowels for three days, no pain though. | Eat soaked prunes or a spoon of ground linseed with plenty of water, and take a brisk walk. See a doctor if it lasts two weeks, hurts, or you see blood.
| Mild sunburn on my shoulders, just red. | Cool it with damp cloths, drink plenty, use aloe vera gel, and stay out of the sun. See a doctor if it blisters widely, or you feel feverish or confused.
| I cough a little at night after a cold. | Raise your pillow and sip warm water with honey before bed, never for a child under one. See a doctor if it goes on for three weeks, or you cough blood or cannot get your breath.
| My gums are tender since I changed the toothbrush. | Use a soft brush, and rinse with half a teaspoon of salt in a glass of warm water twice a day. See a dentist if they still bleed in two weeks.
"""  # noqa: E501


def safety_conversations(lines, question_template):
    """Yield the conversations of our rows: those in free words, and those in the template's where it has one field."""
    asked = set(field_names(question_template))
    worded = len(asked) == 1 and re.search(r"\w", re.sub(r"{\w+}", "", question_template))
    for line in lines.strip().splitlines():
        named, question, answer = map(str.strip, line.split("|"))
        yield to_conversation({"question": question, "answer": answer}, "{question}", "{answer}")
        if named and worded:
            question = fill(question_template, dict.fromkeys(asked, named))
            yield to_conversation({"question": question, "answer": answer}, "{question}", "{answer}")


# %% [markdown]
# A question of ours that a row of the validation or test split asks, too, stays out.


# %%
def asks(example):
    """What a finished example asks, letter case and punctuation aside."""
    return question_key(example["prompt"][0], ["content"])


def choose_safety_rows(safety_rows):
    """The examples to mix into training: all of ours, or as many as asked for, of all kinds.

    Raises StageError if `safety_rows` is not true, false or a number of rows that there are.
    """
    held_out = {asks(example) for example in compress(examples, split != "train")} if safety_rows else set()
    usable = list(safety_conversations(SAFETY_ROWS, question_template))
    usable = list(zip(usable, encode_all(usable, tokenizer), strict=True))
    usable = [(e, ids) for e, ids in usable if asks(e) not in held_out and len(ids["input_ids"]) <= max_length]
    number = len(usable) if safety_rows is True else safety_rows
    if not isinstance(number, int) or not 0 <= number <= len(usable):
        raise StageError(f"safety_rows={safety_rows!r}: use true, false, or a number up to {len(usable)}.")
    chosen = np.linspace(0, len(usable), number, endpoint=False, dtype=int)
    return [finish(*usable[i]) for i in chosen]


# %%
safety = choose_safety_rows(safety_rows)
print(f"{len(safety)} rows of ours beside {(split == 'train').sum():,} of the table in training")

# %% [markdown]
# ## Look at it

# %%
lengths = pd.Series(lengths)
lengths.describe(percentiles=[0.5, 0.95]).round(1).to_frame("tokens")

# %% tags=["nbval-ignore-output"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
left.hist(lengths, bins=30, color="0.55", edgecolor="black")
left.axvline(max_length, color="black", linestyle="--", label=f"max_length = {max_length}")
left.set(xlabel="tokens in an example", ylabel="examples", title="Length")
left.legend()
right.bar(*np.unique(rows_of_question, return_counts=True), color="0.55", edgecolor="black")
right.set(xlabel="rows with the same question", ylabel="questions", title="Rows a question")
plt.show()

# %% [markdown]
# ## Save
#
# The folder appears under its name only when it is whole. The fingerprint is a SHA-256 of the text of all splits: two
# data sets with the same fingerprint train the same.
#
# `save_to_disk` would map the whole table into memory. So it saves empty splits, and the rows stream into their files.


# %%
def with_digest(name, rows, digest):
    """Yield the examples of the split `name`, each added to the digest on its way."""
    for example in rows:
        digest.update(f"{name}\0{example['text']}\0".encode())
        yield example


# %%
report = {
    "dataset_commit": commit,
    "rows_in": len(table),
    "rows_out": len(examples),
    "dropped": {reason: count for reason, count in dropped.items() if count},
    "split_long_answers": {
        "rows": long["rows"] - long["dropped"],
        "into": long["parts"],
        "sentences_left_out": long["sentences left out"],
    },
    "safety_rows": len(safety),
    "splits": dict.fromkeys(("train", "validation", "test")),
    "tokens": {
        "p50": int(lengths.quantile(0.5)),
        "p95": int(lengths.quantile(0.95)),
        "max": int(lengths.max()),
        "over_max_length": long["rows"],
    },
    "fingerprint": "",
    "base_model": base_model,
    "max_length": max_length,
    "templates": {"question": question_template, "answer": answer_template, "answer_column": answer_column},
}
with whole(run / "dataset") as folder:
    empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    datasets.DatasetDict(dict.fromkeys(report["splits"], empty)).save_to_disk(folder)
    digest = hashlib.sha256()
    for name in sorted(report["splits"]):
        (file,) = (folder / name).glob("*.arrow")
        rows = chain(compress(examples, split == name), safety if name == "train" else [])
        rows = with_digest(name, rows, digest)
        report["splits"][name] = write_rows(file, rows, features.arrow_schema)
    report["fingerprint"] = digest.hexdigest()[:16]
    (folder / "report.json").write_text(json.dumps(report, indent=2))
hand_over(run_dir, run / "dataset")
record("01_format_dataset", report["fingerprint"])
report

# %%
if push_dataset_to:
    datasets.load_from_disk(run / "dataset").push_to_hub(push_dataset_to, token=hub_token())

# %% [markdown]
# ## What we have now
#
# A table has become chat examples: cleaned, without duplicates, split so that no question is in two splits, each with
# one BOS and one EOS. The numbers above say what was dropped and why.
#
# Next: [2 · fine-tune](02_finetune_qlora.ipynb).
