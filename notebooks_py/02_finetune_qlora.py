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
# # 2 · Fine-tune with QLoRA
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/02_finetune_qlora.ipynb)
#
# | 1 · format | **2 · fine-tune** | 3 · merge | 4 · evaluate |
# |---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples |
#
# - **In:** `dataset/` in the run folder, from notebook 1.
# - **Out:** `adapter/`, a LoRA adapter of some hundred megabytes or less, `training/metrics.json` and the loss curves.
# - **Time:** minutes for a table of some hundred rows on a GPU; three minutes on a CPU with the small model of
#   `profiles/cpu.yaml`.
#
# QLoRA ([Dettmers et al., 2023](https://arxiv.org/abs/2305.14314)) keeps the base model frozen in 4 bits and trains a
# small [LoRA](https://arxiv.org/abs/2106.09685) adapter through it, so that a 7B model trains on a card of 15 GB.

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

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebook 1; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
published_dataset = ""  # a data set that notebook 1 published on the Hub, to take where the run has none
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
attn_implementation = "sdpa"
max_length = 512
lora_r = 64
lora_alpha = 16
lora_dropout = 0.0  # 0.1 costs a quarter more memory and gained nothing in one epoch
lora_target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"]  # or "all-linear"
epochs = 1
packing = True  # several examples in one row of max_length tokens, kept apart: no padding
batch_size = 16  # rows a step, on a table that is large enough
min_steps = 300  # a smaller table is dealt out in smaller batches, down to one row a step, to make so many steps
gradient_accumulation_steps = 1
learning_rate = 3e-4
lr_scheduler_type = "cosine"
warmup = 0.03  # of all steps; a whole number counts steps
max_grad_norm = 0.3
optim = "paged_adamw_32bit"
gradient_checkpointing = True  # recompute activations in the backward pass: less memory, a third more time
use_liger_kernel = True  # fused GPU kernels: faster, and the logits are never whole in memory; needs a GPU
evaluations = 4  # how often the validation loss is taken and a checkpoint kept during training
early_stopping_patience = 0  # stop after so many evaluations without improvement; 0 never stops early

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
import hashlib
import json
import os
import platform
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
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError, RepositoryNotFoundError

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
import logging
import math
from itertools import pairwise

# bitsandbytes looks for an optional CPU kernel, Liger for kernels of other hardware, and both do without
for library in ("bitsandbytes", "liger_kernel"):
    logging.getLogger(library).setLevel(logging.ERROR)

import bitsandbytes as bnb
import datasets
import matplotlib.pyplot as plt
import pandas as pd
import psutil
import transformers
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    GenerationConfig,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset

datasets.disable_progress_bars()
datasets.disable_caching()
transformers.utils.logging.set_verbosity_error()
os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "training" / "tensorboard")
set_seed(seed)
processes = PartialState(cpu=not torch.cuda.is_available())  # under `accelerate launch` one of several

# %% [markdown]
# ## The examples
#
# Notebook 1 left conversations. `load_tokenizer` and `encode` are the same as there: ids with one BOS and one EOS, and
# a mask of the response, which is all that the loss will see.


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
def load_dataset_of_run(run, otherwise=""):
    """The DatasetDict and the report that notebook 1 left. Raises StageError if they are not there or not whole."""
    try:
        report = json.loads((run / "dataset" / "report.json").read_text())
        return datasets.load_from_disk(run / "dataset"), report
    except (OSError, ValueError) as error:
        reason = "is missing" if not (run / "dataset").exists() else f"cannot be read ({error})"
        raise StageError(
            f"{run / 'dataset'} {reason}. Run 01_format_dataset first, with the same run_dir, in Colab one in Drive."
            + otherwise
        ) from None


# %% [markdown]
# Without notebook 1's folder, a data set that it published will do (`published_dataset`). Where there is neither, this
# notebook stops here: [notebook 1](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/01_format_dataset.ipynb)
# makes one in under a minute, and both notebooks find it if their `run_dir` is the same folder of your Google Drive.


# %%
def take_published(name, folder):
    """Save a data set of the Hub as notebook 1 would have: train, validation and test of conversations, and a report.

    Raises StageError if it cannot be had, or is not of that kind.
    """
    try:
        splits = datasets.load_dataset(name, token=hub_token())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"published_dataset={name}: not to be had from the Hub: {reason}") from None
    columns = {column for split in splits.values() for column in split.column_names}
    if not {"train", "validation", "test"} <= splits.keys() or not {"prompt", "completion"} <= columns:
        raise StageError(
            f"published_dataset={name} lacks the splits train, validation and test or the columns prompt and "
            "completion. Give it to notebook 1 as its dataset instead."
        )
    text = json.dumps(
        {split: rows.select_columns(["prompt", "completion"]).to_list() for split, rows in splits.items()}
    )
    report = {"published": name, "splits": {split: len(rows) for split, rows in splits.items()}}
    with whole(folder) as partial:
        splits.save_to_disk(partial)
        report["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
        (partial / "report.json").write_text(json.dumps(report, indent=2))


# %%
with processes.main_process_first():
    if published_dataset and not (run / "dataset").exists():
        take_published(published_dataset, run / "dataset")

# %%
splits, report = load_dataset_of_run(run, " Or set published_dataset to one that notebook 1 has published.")
tokenizer = load_tokenizer(base_model, base_model_revision)
encoded = splits.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=splits["train"].column_names)
longest = max(len(ids) for split in encoded.values() for ids in split["input_ids"])
if longest > max_length:
    raise StageError(
        f"max_length={max_length}, but the longest example has {longest} tokens and would lose its end. "
        "Raise max_length, or run 01_format_dataset again with this one."
    )
pd.DataFrame(
    {
        "examples": {name: len(split) for name, split in encoded.items()},
        "tokens": {name: sum(map(len, split["input_ids"])) for name, split in encoded.items()},
        "in the loss": {name: sum(map(sum, split["completion_mask"])) for name, split in encoded.items()},
    }
)

# %% [markdown]
# ## Rows without padding
#
# Examples differ in length. Padded to the longest of their batch, a third of what the GPU computes would be for
# nothing; *packed*, several share one row of `max_length` tokens. They must not see each other: the positions start at
# 0 with each example, and where they do, transformers builds a mask that keeps what is before out of sight. The mask
# stays small, `max_length` by `max_length` for each row, and all batches have one shape.
#
# Larger batches make fewer steps, and a small table would end before it has learned. So the number of rows a step
# follows the table: `batch_size` where that leaves `min_steps` steps, fewer on a smaller one.


# %%
def collate(examples):
    """A batch of rows: `input_ids`, `labels` (-100 outside of responses) and `position_ids`, all [rows, length].

    A packed row has `seq_lengths`, the lengths of its examples, and is padded to `max_length`, others to the longest.
    Padding has the position 0 throughout, so that it is seen by nothing.
    """
    packed = "seq_lengths" in examples[0]
    length = max_length if packed else max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), length)
    batch = {
        "input_ids": torch.full(shape, tokenizer.pad_token_id),
        "labels": torch.full(shape, -100),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for row, example in enumerate(examples):
        ids, in_loss = torch.tensor(example["input_ids"]), torch.tensor(example["completion_mask"], dtype=torch.bool)
        lengths = example["seq_lengths"] if packed else [len(ids)]
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, : len(ids)] = ids.where(in_loss, -100)
        batch["position_ids"][row, : len(ids)] = torch.cat([torch.arange(n) for n in lengths])
    return batch


# %%
train = pack_dataset(encoded["train"], max_length) if packing else encoded["train"]
rows_for_min_steps = int(len(train) * epochs / gradient_accumulation_steps / min_steps)
rows_a_step = max(1, min(batch_size, rows_for_min_steps // processes.num_processes))  # on each GPU
filled = sum(map(len, train["input_ids"])) / (len(train) * max_length)
rows_of_all = rows_a_step * processes.num_processes * gradient_accumulation_steps
print(f"{len(encoded['train']):,} examples in {len(train):,} rows, {rows_of_all} a step")
print(f"{filled:.0%} of each row of {max_length} is filled" if packing else "not packed")

# %% [markdown]
# ## The base model, in 4 bits
#
# A T4 has no bf16 units. PyTorch emulates bf16 there and `torch.cuda.is_bf16_supported()` says yes, so ask for the
# compute capability instead: 8.0 and above (A100, L4, H100) compute bf16 natively.


# %%
def compute_dtype(precision):
    """The dtype to compute in. "auto": bf16 on a GPU that has it natively, fp16 on an older one, fp32 on a CPU."""
    if precision != "auto":
        try:
            return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
        except KeyError:
            raise StageError(f"precision={precision!r}: use auto, bf16, fp16 or fp32.") from None
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def fetch(model, revision):
    """The folder of a model: a folder here, or its files from the Hub, safetensors and JSON only.

    Raises StageError if it is not to be had, or if the disk has no room for it.
    """
    if Path(model).is_dir():
        return Path(model)
    wanted = {"revision": revision, "allow_patterns": ["*.safetensors", "*.json"], "token": hub_token()}
    try:
        with suppress(DryRunError):  # no network: all may be here already
            files = snapshot_download(model, dry_run=True, **wanted)
            size = sum(file.file_size for file in files if file.will_download)
            cache = Path(HF_HUB_CACHE)
            free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
            if size:
                print(f"to download: {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of {cache} are free")
            if size > free:
                raise StageError(f"There is no room for {model} in {cache}. Free some space, or set HF_HOME elsewhere.")
        return Path(snapshot_download(model, **wanted))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{model}: not a folder here, and not to be had from the Hub: {reason}") from None


def weight_files(folder):
    """Map each tensor of the model in a folder to its safetensors file.

    Raises StageError if a file is damaged, if one that the index names is missing, or if there is none.
    """
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise StageError(f"{path} is damaged ({error}). Delete it and run again.") from None
    index = folder / "model.safetensors.index.json"
    wanted = json.loads(index.read_text())["weight_map"] if index.exists() else files
    missing = sorted({file for name, file in wanted.items() if name not in files})
    if missing or not files:
        raise StageError(f"The model in {folder} lacks {', '.join(missing) or 'weights in safetensors format'}.")
    return files


# %%
class OnDisk:
    """A tensor in a safetensors file, read each time it is asked for with `[...]`."""

    def __init__(self, file, name, device):
        self.file, self.name, self.device = file, name, device

    def __getitem__(self, index):
        with safe_open(self.file, framework="pt", device=self.device) as file:
            return file.get_tensor(self.name)[index]


def load_model(model, revision, dtype, attn_implementation, quantization_config=None, device=None):
    """A causal language model, a folder or a name on the Hub, with its generation config.

    On `device`: where it is left out, on the GPU if there is one.

    It is read one tensor at a time. `from_pretrained` alone keeps all files mapped until the last tensor is read, so
    that a 7B model in fp16 takes 13.7 GiB of resident memory on its way to the GPU; this way it takes 1.3 GiB. A model
    stored in 4 bits is small enough, and needs the statistics beside its tensors.
    """
    device = device or (f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    options = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": attn_implementation}
    folder = fetch(model, revision)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    weights = {name: OnDisk(file, name, device) for name, file in weight_files(folder).items()}
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    loaded = kind.from_pretrained(
        None, config=config, state_dict=weights, quantization_config=quantization_config, **options
    )
    loaded.name_or_path = loaded.config.name_or_path = str(model)  # what an adapter will say it was trained on
    if (folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


# %%
def load_base(base_model, revision, dtype, attn_implementation, sharded=False):
    """The base model in NF4 with double quantization, computing in `dtype`, on the GPU if there is one.

    To be `sharded`, it waits in RAM, its 4-bit numbers stored as if they were float32: FSDP shards only floats, and of
    16-bit ones, those that read as NaN all become the same NaN where a GPU copies them
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945).

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights at its first forward pass in eval mode, into a
    layout that has no gradient: a model that was evaluated once would never learn again, without an error
    (`Linear4bit.forward` in bitsandbytes 0.50). The attribute that asks for the repacking is switched off here.
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.float32 if sharded else torch.uint8,
    )
    model = load_model(base_model, revision, dtype, attn_implementation, nf4, "cpu" if sharded else None)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype  # a base stored in 4 bits brings the dtype of whoever stored it
    return model


# %% [markdown]
# Is there room? The sum is taken from the model's config and the parameters, before anything large is downloaded. Of
# several GPUs each takes the whole model if it fits (DDP). If not, they share it out (FSDP): each keeps a part of every
# layer, and gathers a layer when it is the layer's turn.


# %%
def room_gib():
    """Memory in GiB that models can take here: on the GPU, within this process's share of it, or RAM without one."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available / 2**30
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    share = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_allocated()
    return min(free + unused, share) / 2**30


# %%
def expected_gib(config, dtype, tokens, gpu, shards=1):
    """What training on batches of `tokens` tokens takes at its peak, in GiB on each GPU, by part: a Series.

    NF4 with double quantization takes 4 bits a weight and 8.25 bits for each 64 of them, in all linear layers but the
    output layer. Activations: those of a Llama layer without the attention matrix, which SDPA does not keep, after
    Korthikanti et al., 2022 (https://arxiv.org/abs/2205.05198), and each adapter's input after dropout with its mask.
    With checkpointing, one hidden state a layer and one layer in full. Liger's kernels keep less of the MLP, and
    compute the logits in pieces. Over `shards` GPUs, each keeps its share of all weights, the statistics beside the
    4-bit ones and the output layer, and gathers the layer at work and the next; with what FSDP has in flight and what
    its streams do not give back at once, that was six layers on an H100.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    size, layers = dtype.itemsize, config.num_hidden_layers
    linear = [
        (name.split(".")[-1], module) for name, module in skeleton.named_modules() if hasattr(module, "in_features")
    ]
    linear = [(name, module) for name, module in linear if module is not skeleton.get_output_embeddings()]
    quantized = sum(module.weight.numel() for _, module in linear)
    adapted = [module for name, module in linear if lora_target_modules == "all-linear" or name in lora_target_modules]
    adapter = sum(lora_r * (module.in_features + module.out_features) for module in adapted)
    hidden, intermediate = (7, 2) if use_liger_kernel else (10, 4)
    layer = (hidden * config.hidden_size + intermediate * config.intermediate_size) * size
    layer += sum(module.in_features for module in adapted) / layers * (size + 1) if lora_dropout else 0
    activations = layers * config.hidden_size * size + layer if gradient_checkpointing else layers * layer
    logits = config.vocab_size * (size + 4 * 4)  # as computed; in fp32: shifted, softmax, gradient, entropy
    parts = {
        "base model": quantized * (0.5 / shards + 8.25 / 8 / 64)
        + (skeleton.num_parameters() - quantized) * size / shards,
        "adapter, gradients, optimizer": adapter * (4 + 4 + (2 if "8bit" in optim else 8)) / shards,
        "activations": tokens * activations,
        "logits": tokens * logits / (8 if use_liger_kernel else 1),
    }
    if shards > 1:
        output_layer = skeleton.get_output_embeddings().weight.numel() * size
        parts["gathered layers"] = 6 / layers * (quantized * 0.5 + adapter * 4) + output_layer * (1 - 1 / shards)
    if not gpu:  # freed memory is used again less than on a GPU: half as much more, measured at 256 and 512 tokens
        parts |= {name: 1.5 * parts[name] for name in ("activations", "logits")}
        parts["Python and its libraries"] = psutil.Process().memory_info().rss
    return pd.Series(parts, name="GiB") / 2**30


# %% tags=["nbval-ignore-output"]
dtype = compute_dtype(precision)
if dtype != torch.float32 and not torch.cuda.is_available():
    raise StageError(f"precision={precision}: training in half precision needs a GPU. Use auto or fp32.")
if use_liger_kernel and not (torch.cuda.is_available() and find_spec("liger_kernel")):
    raise StageError("use_liger_kernel needs a GPU and the package liger-kernel. Install it, or set it to false.")
config = AutoConfig.from_pretrained(base_model, revision=base_model_revision, token=hub_token(base_model))
tokens = rows_a_step * (max_length if packing else longest)
expected = expected_gib(config, dtype, tokens, torch.cuda.is_available())
room = min(gather_object([room_gib()]))
sharded = processes.distributed_type == DistributedType.MULTI_GPU and bool(expected.sum() > room)
unsharded = expected["base model"]
if sharded:
    print(f"on each GPU the whole model would take {expected.sum():.1f} GiB, and there is room for {room:.1f} GiB")
    print(f"so it is sharded over {processes.num_processes} GPUs (FSDP)")
    expected = expected_gib(config, dtype, tokens, gpu=True, shards=processes.num_processes)
elif processes.num_processes > 1:
    print(f"each of {processes.num_processes} processes has the whole model, and its share of the rows (DDP)")
print(f"expected peak memory: {expected.sum():.1f} GiB; there is room for {room:.1f} GiB")
if expected.sum() > room:
    raise StageError(
        f"Training is expected to take {expected.sum():.1f} GiB of memory, and there are {room:.1f} GiB. "
        "Lower batch_size or max_length, set gradient_checkpointing, or take a smaller base_model."
    )
expected.round(2).to_frame()

# %% [markdown]
# Sharding asks for more: 4-bit weights stored as floating-point numbers, an optimizer that knows shards, and enough RAM
# for all processes to quantize the model at once. One that is stored in 4 bits is only mapped into memory.

# %%
if sharded:
    stored = getattr(config, "quantization_config", {}).get("bnb_4bit_quant_storage")
    if stored not in (None, "float32"):
        raise StageError(
            f"{base_model} stores its 4-bit weights as {stored}, which FSDP cannot shard. Take one in 16 bits, or in "
            "4 bits stored as float32."
        )
    if any(name in optim for name in ("paged", "bit", "bnb")):
        raise StageError(f"optim={optim}: the optimizers of bitsandbytes know no shards. Use adamw_torch_fused.")
    read = 0 if stored else unsharded * int(os.environ["LOCAL_WORLD_SIZE"])
    if read > (free := psutil.virtual_memory().available / 2**30):
        raise StageError(
            f"Reading the model takes {read:.1f} GiB of RAM before it is sharded; {free:.1f} GiB are free."
        )
    # `accelerate launch` leaves each process one thread, and the CPU has billions of weights to quantize
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))

# %% tags=["nbval-ignore-output"]
model = load_base(base_model, base_model_revision, dtype, attn_implementation, sharded)
model.config.use_cache = False

# %%
print(f"computing in {str(dtype).removeprefix('torch.')} on {processes.device.type}")
print(f"{model.num_parameters() / 1e6:,.1f} million parameters in {model.get_memory_footprint() / 2**20:,.1f} MiB")

# %% [markdown]
# ## The adapter
#
# LoRA adds to a frozen weight $W$ the product of two thin matrices: $W + \frac{\alpha}{r} B A$. $B$ starts at zero, so
# before training the adapted model is the base model.

# %%
lora_config = LoraConfig(
    r=lora_r,
    lora_alpha=lora_alpha,
    lora_dropout=lora_dropout,
    target_modules=lora_target_modules,
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, lora_config)
if (use_liger_kernel or sharded) and hasattr(model.get_output_embeddings(), "base_layer"):
    raise StageError("An adapter on the output layer works neither with use_liger_kernel nor with a sharded model.")
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
trainable_percent = 100 * trainable / model.base_model.model.num_parameters()
print(f"{trainable:,} trainable parameters, {trainable_percent:.2f}% of the model")

# %% [markdown]
# ## Checkpoints that can be trusted
#
# Run this notebook again after an interruption and it goes on from the newest whole checkpoint, and ends where an
# undisturbed run would have ended. A checkpoint counts as whole when its `trainer_state.json`, which is written last,
# can be read. Checkpoints of other settings or other data are thrown away.


# %%
def newest_checkpoint(folder, settings):
    """The newest whole checkpoint that was made with `settings`, or None. Deletes checkpoints that are neither."""
    settings_file = folder / "settings.json"
    if not settings_file.exists() or json.loads(settings_file.read_text()) != settings:
        remove(folder)
        with whole(settings_file) as partial:
            partial.write_text(json.dumps(settings, indent=2))
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return checkpoint
        except (OSError, ValueError):
            remove(checkpoint)
    return None


# %%
settings = {name: value for name, value in parameters.items() if name != "run_dir"}
settings |= {"dataset_fingerprint": report["fingerprint"], "dtype": str(dtype), "device": processes.device.type}
settings |= {"processes": processes.num_processes, "sharded": sharded}
with processes.main_process_first():
    checkpoint = newest_checkpoint(run / "checkpoints", settings)
    if checkpoint is None:
        remove(run / "adapter")  # an adapter of other settings; it comes back when this training has ended
print(f"going on from {checkpoint.name}" if checkpoint else "starting from the beginning")

# %% [markdown]
# ## The trainer
#
# TRL's `SFTTrainer` does the work. What it lacks for a training that can be interrupted is in two callbacks and a
# function.


# %%
class Stopwatch(TrainerCallback):
    """Keep the seconds spent in training in the log history, also over interruptions."""

    start = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter() - next((e["seconds"] for e in state.log_history[::-1] if "seconds" in e), 0)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 2)


class ShardedTraining(TrainerCallback):
    """What a sharded model needs: layers gathered with less memory, and the folder of a checkpoint made in time.

    FSDP allocates what it gathers in streams of its own, and memory that one stream has freed serves no other. Gathered
    asynchronously, layers are allocated in the stream that computes, and each has to ask for the next ahead of time
    (`FSDPModule._set_unshard_async_op`, documented but not public in torch 2.13).

    Trainer notes a checkpoint as the best only if its folder is there, and of a sharded model that is decided before
    the first file (`Trainer._save_checkpoint` in transformers 5.13): an earlier checkpoint would be loaded at the end,
    or by one process only, and the others would wait for it for ever.
    """

    def on_train_begin(self, args, state, control, model, **kwargs):
        model._set_unshard_async_op(True)
        for unit, following in pairwise(module for module in model.modules() if isinstance(module, FSDPModule)):
            unit.set_modules_to_forward_prefetch([following])

    def on_evaluate(self, args, state, control, **kwargs):
        Path(args.output_dir, f"checkpoint-{state.global_step}").mkdir(parents=True, exist_ok=True)


def has_ended(checkpoint):
    """Whether the training had come to its end, early or not, at this checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return control.get("should_training_stop", False)


# %%
steps = math.ceil(len(train) / (rows_a_step * processes.num_processes))
steps = math.ceil(math.ceil(steps / gradient_accumulation_steps) * epochs)
evaluate_each = math.ceil(steps / evaluations)
training_arguments = SFTConfig(
    output_dir=str(run / "checkpoints"),
    use_cpu=not torch.cuda.is_available(),
    seed=seed,
    num_train_epochs=0 if has_ended(checkpoint) else epochs,
    restore_callback_states_from_checkpoint=early_stopping_patience > 0,
    per_device_train_batch_size=rows_a_step,
    per_device_eval_batch_size=batch_size,
    gradient_accumulation_steps=gradient_accumulation_steps,
    learning_rate=learning_rate,
    lr_scheduler_type=lr_scheduler_type,
    warmup_steps=warmup,
    max_grad_norm=max_grad_norm,
    optim=optim,
    bf16=dtype == torch.bfloat16,
    fp16=dtype == torch.float16,
    gradient_checkpointing=gradient_checkpointing,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    fsdp=sharded,
    fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"},
    ddp_find_unused_parameters=False,
    max_length=max_length,
    use_liger_kernel=use_liger_kernel,
    eval_strategy="steps",
    eval_steps=evaluate_each,
    save_strategy="steps",
    save_steps=evaluate_each,
    save_total_limit=2,
    load_best_model_at_end=True,
    logging_steps=0.05,
    logging_nan_inf_filter=False,  # it would hide a loss that is NaN, and wait for the GPU in every step
    disable_tqdm=False,
    dataloader_pin_memory=torch.cuda.is_available(),
    report_to="tensorboard",
)
training_arguments._n_gpu = 1  # of several GPUs Trainer takes all, and multiplies batch and loss by their number

# %%
stop_early = [EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else []
trainer = SFTTrainer(
    model=model,
    args=training_arguments,
    train_dataset=train,
    eval_dataset=encoded["validation"],
    data_collator=collate,
    processing_class=tokenizer,
    callbacks=[Stopwatch(), *([ShardedTraining()] if sharded else []), *stop_early],
)

# %% [markdown]
# TRL has cast the adapter of the 4-bit model to bf16. A T4's fp16 gradient scaler fails with that at the first step
# ([trl#4901](https://github.com/huggingface/trl/issues/4901)), and small updates are lost in bf16's eight bits anyway,
# so the adapter goes back to fp32.

# %%
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()

# %% [markdown]
# A sharded model is gathered as it is stored, since a cast would change its 4-bit numbers, and computes in `dtype` by
# autocast, like a whole one, but without keeping the casts of all layers. The output layer stays whole: Liger's loss
# takes its weights without calling it, and some models have them in common with the input layer.

# %%
if sharded:
    fsdp = trainer.accelerator.state.fsdp_plugin
    fsdp.mixed_precision_policy = None  # no casts
    fsdp.ignored_modules = [model.get_output_embeddings().to(processes.device)]
    autocast = torch.autocast(processes.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    model.forward = autocast(model.forward)

# %% [markdown]
# ## What is about to happen


# %%
tokens_an_epoch = sum(map(len, encoded["train"]["input_ids"]))
pd.Series(
    {
        "trainable parameters": f"{trainable:,} ({trainable_percent:.2f}%)",
        "examples": f"{len(encoded['train']):,}",
        "optimizer steps": f"{steps:,}",
        "tokens": f"{tokens_an_epoch * epochs:,.0f}",
    },
    name="plan",
).to_frame()

# %% tags=["nbval-ignore-output"]
disk = trainable * (4 + 3 * (4 + 8))  # the adapter; two checkpoints, and one more while it is written
free = shutil.disk_usage(run).free
print(f"expected on disk: {disk / 2**30:.1f} of {free / 2**30:.1f} GiB that are free")
if disk > free:
    raise StageError(f"Training writes {disk / 2**20:,.1f} MiB to {run}, which has room for {free / 2**20:,.1f} MiB.")

# %% [markdown]
# ## Train
#
# TensorBoard shows it live: `tensorboard --logdir runs`.

# %% tags=["nbval-ignore-output"]
trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

# %% [markdown]
# The validation loss now, and with the adapter switched off: the untouched model's, the one to beat. It is not taken
# beforehand, since a Trainer that has evaluated first does not average the gradients of several GPUs
# (`Trainer.evaluation_loop` in transformers 5.13 prepares the model without DDP, and `train` leaves it so).

# %% tags=["nbval-ignore-output"]
after = trainer.evaluate()["eval_loss"]
with trainer.model.disable_adapter():
    before = trainer.evaluate()["eval_loss"]
trainer.state.log_history.pop()  # not of the trained model

# %% [markdown]
# The best checkpoint, by validation loss, is loaded again at the end.

# %%
history = pd.DataFrame(trainer.state.log_history)
training_loss = history.dropna(subset="loss").set_index("step")["loss"]
validation_loss = history.dropna(subset="eval_loss").groupby("step")["eval_loss"].first()
print(f"training loss   {training_loss.iloc[0]:.2f} → {training_loss.iloc[-1]:.2f}")
print(f"validation loss {before:.2f} → {after:.2f}")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(training_loss, color="0.6", label="training")
axes.plot([0, *validation_loss.index], [before, *validation_loss], "ko-", label="validation")
axes.set(xlabel="optimizer step", ylabel="loss a response token (nats)", title="Loss")
axes.legend()
plt.show()

# %% [markdown]
# ## Save
#
# The adapter goes with its tokenizer, and with a note of what it was trained on: notebook 3 refuses to merge it into
# another base.

# %%
seconds = next(
    entry["seconds"] for entry in trainer.state.log_history[::-1] if "seconds" in entry and "eval_loss" not in entry
)
trained_tokens = round(tokens_an_epoch * trainer.state.epoch)
metrics = {
    "steps": trainer.state.global_step,
    "epochs": trainer.state.epoch,
    "examples": len(encoded["train"]),
    "tokens": trained_tokens,
    "seconds": seconds,
    "tokens_per_second": round(trained_tokens / seconds, 1),
    "peak_memory_gib": peak_memory_gib().get("gpu", peak_memory_gib()["host"]),
    "trainable_parameters": trainable,
    "trainable_percent": round(trainable_percent, 4),
    "loss_first": float(training_loss.iloc[0]),
    "loss_last": float(training_loss.iloc[-1]),
    "eval_loss_before": before,
    "eval_loss_after": after,
}

# %%
adapter = {  # gathered from the shards, which takes all processes
    name: parameter.full_tensor() if sharded else parameter
    for name, parameter in trainer.model.named_parameters()
    if parameter.requires_grad
}
if processes.is_main_process:
    with whole(run / "training" / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=2))
    with whole(run / "training" / "log_history.json") as partial:
        partial.write_text(json.dumps(trainer.state.log_history, indent=2))
    with whole(run / "adapter") as folder:
        trainer.model.save_pretrained(folder, state_dict=adapter)
        tokenizer.save_pretrained(folder)
        provenance = {"base_model": base_model, "base_model_revision": base_model_revision}
        provenance |= {"dataset_fingerprint": report["fingerprint"], "dtype": str(dtype).removeprefix("torch.")}
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2))
    hand_over(run_dir, run / "adapter")
    record("02_finetune_qlora", report["fingerprint"])
processes.wait_for_everyone()

# %% [markdown]
# ## What we have now
#
# An adapter that has learned the format and some of the content of the table: the validation loss, on questions that it
# was not trained on, says how far that carries over.
#
# Next: [3 · merge](03_merge_adapter.ipynb).
