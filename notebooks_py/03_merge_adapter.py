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
# # 3 · Merge the adapter
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/03_merge_adapter.ipynb)
#
# | 1 · format | 2 · fine-tune | **3 · merge** | 4 · evaluate |
# |---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples |
#
# - **In:** `adapter/` in the run folder, from notebook 2, and the base model.
# - **Out:** `merged/`, a plain model that needs neither PEFT nor bitsandbytes, and `merged/merge_report.json`.
# - **Time:** about as long as copying the base model's files; then as long again to prove the result.
#
# The usual way, `merge_and_unload`, holds the whole base model in memory: 13 GB for a 7B model, more than free Colab
# has. Merging touches one weight matrix at a time, so this notebook reads, merges and writes one at a time, and needs
# about a gigabyte, whatever the size of the model.

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
# The adapter was trained on top of *quantized* weights. `base_weights = "original"` adds it to the weights as they were
# published; `"dequantized"` adds it to what the training really saw: the weights after a trip through NF4. Neither is
# better in principle; notebook 4 measures.

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 and 2; in Colab better "drive:home_remedies"
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
base_weights = "original"  # or "dequantized"
max_shard_gb = 1.0  # size of a file of the merged model, and about the memory that merging takes

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
import gc
import hashlib
import logging

# bitsandbytes looks for an optional CPU kernel, and does without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes as bnb
import datasets
import pandas as pd
import psutil
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from peft import PeftConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()

# %% [markdown]
# ## The adapter and its base
#
# An adapter holds differences to one particular model. Added to another it gives nonsense, so the names must agree.


# %%
def same_model(one, other):
    """Whether two names mean the same model: equal, or one local folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def load_adapter(folder, base_model):
    """The config, the provenance and the weights of the adapter in `folder`, trained on `base_model`.

    Raises StageError if it is missing, damaged, trained on another base, or of a kind that cannot be merged here.
    """
    if not (folder / "adapter_config.json").exists():
        raise StageError(
            f"{folder} is missing. Run 02_finetune_qlora first, with the same run_dir, in Colab one in Drive."
        )
    try:
        config = PeftConfig.from_pretrained(folder)
        provenance = json.loads((folder / "provenance.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise StageError(f"The adapter in {folder} is damaged ({error}). Run 02_finetune_qlora again.") from None
    trained_on = config.base_model_name_or_path
    if not same_model(trained_on, base_model):
        raise StageError(f"The adapter in {folder} was trained on {trained_on}, but base_model is {base_model}.")
    if config.use_dora or config.bias != "none" or config.modules_to_save or config.fan_in_fan_out:
        raise StageError(f"The adapter in {folder} is more than plain LoRA (DoRA, bias or whole modules).")
    return config, provenance, weights


# %%
if base_weights not in ("original", "dequantized"):
    raise StageError(f'base_weights={base_weights!r}: use "original" or "dequantized".')
config, provenance, adapter = load_adapter(run / "adapter", base_model)
print(f"{len(adapter) // 2} adapted matrices, r = {config.r}, alpha = {config.lora_alpha}")


# %%
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
base_folder = fetch(base_model, base_model_revision)
files = weight_files(base_folder)
stored_in_4_bits = {name for name in files if f"{name}.quant_state.bitsandbytes__nf4" in files}
if stored_in_4_bits and base_weights == "original":
    base_weights = "dequantized"
    print("The base model is stored in 4 bits: its original weights are not there, so base_weights is 'dequantized'.")
names = [name for name in files if not any(name.startswith(f"{weight}.") for weight in stored_in_4_bits)]
print(f"{len(names)} tensors in {len(set(files.values()))} files")

# %% [markdown]
# ## One matrix
#
# Merging one matrix is one line: $W' = W + s\,BA$, where $s$ is $\alpha / r$. The sum is taken in fp32 and rounded
# once. `read` fetches one tensor; of the file that holds it, only that part comes into memory.


# %%
def read(name):
    """One tensor of the base model, by name, on the CPU, dequantized to fp32 if it is stored in 4 bits."""
    with safe_open(files[name], framework="pt") as file:
        tensor = file.get_tensor(name)
    if name in stored_in_4_bits:
        parts = {part: None for part in files if part.startswith(f"{name}.")}
        for part in parts:
            with safe_open(files[part], framework="pt") as file:
                parts[part] = file.get_tensor(part)
        state = QuantState.from_dict(
            {part.removeprefix(f"{name}."): t for part, t in parts.items()}, torch.device("cpu")
        )
        tensor = dequantize_4bit(tensor, state).float()
    return tensor


def through_nf4(weight, dtype):
    """A weight as training saw it: cast to `dtype`, quantized to NF4 with double quantization, and back, in fp32."""
    weight = weight.to("cuda" if torch.cuda.is_available() else "cpu", dtype).float()
    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).cpu()


def add_lora(weight, adapter, config, module):
    """Add α / r · B A (rsLoRA: α / √r · B A) of a module to its `weight`, fp32 and [out, in], in place."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    scale = alpha / (r**0.5 if config.use_rslora else r)
    a, b = (adapter[f"base_model.model.{module}.lora_{matrix}.weight"].float() for matrix in "AB")
    return weight.addmm_(b, a, alpha=scale)


# %% [markdown]
# bitsandbytes quantizes every linear layer but the output layer, so these are the weights that `"dequantized"` sends
# through NF4, whether or not they have an adapter.

# %%
model_config = AutoConfig.from_pretrained(base_folder)
if hasattr(model_config, "quantization_config"):
    del model_config.quantization_config
with torch.device("meta"):
    skeleton = AutoModelForCausalLM.from_config(model_config)
linear = {name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
quantized = {
    f"{name}.weight" for name in linear if skeleton.get_submodule(name) is not skeleton.get_output_embeddings()
}
adapted = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in adapter}
for module in sorted(adapted):
    shapes = [list(adapter[f"base_model.model.{module}.lora_{matrix}.weight"].shape) for matrix in "BA"]
    if module not in linear or list(skeleton.get_submodule(module).weight.shape) != [shapes[0][0], shapes[1][1]]:
        raise StageError(f"The adapter changes {module}, which {base_model} does not have in that shape.")
training_dtype = getattr(torch, provenance["dtype"])
half = training_dtype if training_dtype != torch.float32 else None
# a base stored in 4 bits has the dtype of whoever stored it: bf16 would round eight times as coarsely as a T4's fp16
merged_dtype = (stored_in_4_bits and half) or model_config.dtype or torch.float16


def merge(name):
    """One tensor of the merged model, contiguous, in its dtype."""
    weight, module = read(name), name.removesuffix(".weight")
    if base_weights == "dequantized" and name in quantized and name not in stored_in_4_bits:
        weight = through_nf4(weight, training_dtype)
    if module in adapted:
        weight = add_lora(weight.to(torch.float32, copy=True), adapter, config, module)
    return weight.to(merged_dtype).contiguous()


# %% [markdown]
# ## All of them
#
# The tensors are dealt out to files of at most `max_shard_gb` beforehand, so only one file's worth is ever in memory.
# Is there room for that, and on the disk for all of them?


# %%
def plan_shards(sizes, limit):
    """Deal out tensors, {name: bytes}, in order, to shards of at most `limit` bytes each; a larger one stands alone."""
    shards, room = [], 0
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def merging_gib(sizes, shards, changed, base_weights):
    """RAM in GiB that merging takes beside what is there: the largest file, and the largest of the `changed` matrices.

    `sizes` and `changed` map names to bytes in a file, and in fp32. On its way through NF4 a matrix is there three
    times (measured at 7B).
    """
    largest_file = max(sum(sizes[name] for name in shard) for shard in shards)
    return (largest_file + max(changed.values()) * (3 if base_weights == "dequantized" else 1)) / 2**30


# %%
parameters_of_base = dict(skeleton.named_parameters())
absent = sorted(parameters_of_base.keys() - set(names))
if absent:
    raise StageError(f"The files in {base_folder} lack {len(absent)} tensors of {base_model}, {absent[0]} for one.")
sizes = {name: p.numel() * merged_dtype.itemsize for name, p in parameters_of_base.items()}
total_size = sum(sizes.values())
shards = plan_shards(sizes, max_shard_gb * 1e9)
print(f"{total_size / 2**20:,.1f} MiB in {len(shards)} files")

# %% [markdown]
# They are written to `merged.partial`, which becomes `merged` at the very end. After an interruption the files that are
# already whole stay, unless the adapter or a parameter has changed.


# %%
def free_for_model(place):
    """The bytes that a merged model can take in a folder: those that are free, and those of an earlier one."""
    earlier = [*place.glob("merged/*.safetensors"), *place.glob("merged.partial/*.safetensors")]
    return shutil.disk_usage(place).free + sum(file.stat().st_size for file in earlier)


# %%
plan = {
    "adapter": hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    "base_model_revision": base_model_revision,
    "base_weights": base_weights,
    "shards": shards,
}
place = run
if run_dir.startswith("drive:") and total_size > free_for_model(run) / 2:
    place = Path("runs") / run.name
    print(f"{total_size / 2**30:.1f} GiB are too much for Google Drive: the merged model stays here, in {place}.")
    place.mkdir(parents=True, exist_ok=True)
    remove(run / "merged")  # of another adapter
folder = place / "merged.partial"
plan_file = folder / "plan.json"
if not plan_file.exists() or json.loads(plan_file.read_text()) != plan:
    remove(folder)
    with whole(plan_file) as partial:
        partial.write_text(json.dumps(plan))
remove(place / "merged")

# %% tags=["nbval-ignore-output"]
changed = quantized if base_weights == "dequantized" else {f"{module}.weight" for module in adapted}
changed = {name: 4 * skeleton.get_parameter(name).numel() for name in changed}
memory, room = merging_gib(sizes, shards, changed, base_weights), psutil.virtual_memory().available / 2**30
in_use = psutil.Process().memory_info().rss / 2**30
print(f"expected peak of RAM: {memory + in_use:.1f} GiB; there is room for {room + in_use:.1f} GiB")
disk, free = total_size / 2**30, free_for_model(place) / 2**30
print(f"expected on disk: {disk:.1f} of {free:.1f} GiB that are free")
if memory > room:
    raise StageError(f"Merging takes {memory:.1f} GiB of RAM, and {room:.1f} GiB are free. Lower max_shard_gb.")
if disk > free:
    raise StageError(
        f"The merged model needs {disk * 1024:,.1f} MiB; {place} has room for {free * 1024:,.1f} MiB. "
        "Free some space, or put run_dir on another disk."
    )

# %% tags=["nbval-ignore-output"]
merging_started = time.perf_counter()
weight_map = {}
for number, shard in enumerate(tqdm(shards, "merging", unit="file", file=sys.stdout), start=1):
    file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    weight_map |= dict.fromkeys(shard, file.name)
    if not file.exists():
        with whole(file) as partial:
            save_file({name: merge(name) for name in shard}, partial, metadata={"format": "pt"})
index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
(folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
seconds, peak_rss_gib = round(time.perf_counter() - merging_started, 1), peak_memory_gib()["host"]

# %% [markdown]
# ## All that belongs to a model
#
# The tokenizer with its chat template and pad token, and a generation config that stops at EOS, so that
# `pipeline("text-generation", "merged")` answers and stops. Sampling settings that the base model brought along stay
# only if it samples; greedy decoding is what can be reproduced.

# %%
tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
model_config.dtype = merged_dtype
model_config.pad_token_id = tokenizer.pad_token_id
try:
    generation = GenerationConfig.from_pretrained(base_folder)
except OSError:
    generation = GenerationConfig()
stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
generation.eos_token_id = [tokenizer.eos_token_id, *(i for i in stops if i not in (None, tokenizer.eos_token_id))]
generation.bos_token_id, generation.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
if not generation.do_sample:
    generation.temperature = generation.top_p = generation.top_k = None
model_config.architectures = [type(skeleton).__name__]
for part in (model_config, generation, tokenizer):
    part.save_pretrained(folder)
pd.Series(
    {
        "stops at": tokenizer.convert_ids_to_tokens(generation.eos_token_id),
        "pads with": tokenizer.pad_token,
        "pads on the": tokenizer.padding_side,
    },
    name="merged model",
).to_frame()

# %% [markdown]
# ## Prove it
#
# The merged model must compute what the base model with the adapter computes. It is reloaded from its files and both
# read the same rows of the test split; the largest difference of a logit is stated, next to the range that the logits
# span. With `"dequantized"` the comparison is with the adapter on the quantized model. The difference is the rounding
# of the merged weights to their dtype, and of the arithmetic: well under 1% in fp16, some percent in bf16. A model that
# differs by more than rounding explains is not kept.


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
def room_gib():
    """Memory in GiB that models can take here: on the GPU, within this process's share of it, or RAM without one."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available / 2**30
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    share = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_allocated()
    return min(free + unused, share) / 2**30


# %%
def logits_of(model, rows):
    """The logits of `model` at every token of `rows`, lists of token ids, in fp32 on the CPU: [tokens, vocabulary]."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in rows])


# %% tags=["nbval-ignore-output"]
try:
    test_rows = datasets.load_from_disk(run / "dataset")["test"].select(range(2))
except (OSError, ValueError, KeyError):
    raise StageError(f"{run / 'dataset'} is missing or damaged. Run 01_format_dataset first.") from None
rows = [encode(row, tokenizer)["input_ids"] for row in test_rows]
gpu = torch.cuda.is_available()
room = room_gib() * 2**30
# fp32 where there is room for it, so that only the rounding of the weights is left
dtype = torch.float32 if not gpu and room > 3 * total_size * 4 / merged_dtype.itemsize else merged_dtype
provable = room > 1.05 * total_size
if not provable:
    print(f"UNPROVEN: comparing takes {total_size / 2**30:.1f} GiB of memory, and there are {room / 2**30:.1f} GiB.")

# %% tags=["nbval-ignore-output"]
difference = logit_range = agreement = None
if provable:
    if base_weights == "original":
        reference = load_model(base_folder, None, dtype, "sdpa")
    else:
        reference = load_base(base_folder, None, training_dtype, "sdpa")
    expected = logits_of(PeftModel.from_pretrained(reference, run / "adapter"), rows)
    del reference
    gc.collect()
    torch.cuda.empty_cache()
    actual = logits_of(load_model(folder, None, dtype, "sdpa"), rows)
    difference = (actual - expected).abs().max().item()
    logit_range = (expected.max() - expected.min()).item()
    agreement = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()

# %%
if provable:
    print(f"largest difference: at most {max(difference / logit_range, 1e-4):.2%} of the range of the logits")
    print(f"same most likely next token at {agreement:.0%} of the positions")
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.05
    if not difference < tolerance * logit_range:
        raise StageError(
            f"The merged model differs by {difference:.3g} in logits that span {logit_range:.3g}: not kept."
        )

# %% [markdown]
# ## Save
#
# Only now does the folder get its name.

# %%
report = {
    "base_model": base_model,
    "base_weights": base_weights,
    "merged_modules": len(adapted),
    "shards": len(shards),
    "dtype": str(merged_dtype).removeprefix("torch."),
    "seconds": seconds,
    "peak_rss_gib": peak_rss_gib,
    "max_logit_difference": difference,
    "logit_range": logit_range,
    "same_next_token": agreement,
    "adapter_sha256": plan["adapter"],
}
with whole(folder / "merge_report.json") as partial:
    partial.write_text(json.dumps(report, indent=2))
plan_file.unlink()
folder.rename(place / "merged")
record("03_merge_adapter", provenance["dataset_fingerprint"])

# %% tags=["nbval-ignore-output"]
report

# %% [markdown]
# ## What we have now
#
# One plain model in safetensors files, proven to compute what the adapter computes on its base.
#
# Next: [4 · evaluate](04_evaluate.ipynb).
