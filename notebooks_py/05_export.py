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
# # 5 · Take it away
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/05_export.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | **5 · export** |
# |---|---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples | card, GGUF, Ollama |
#
# - **In:** a run folder in which notebooks 1 to 4 have run.
# - **Out:** `export/`: a model card for the adapter and one for the merged model; the merged model as GGUF, which
#   llama.cpp and Ollama read, in 16, 8 and about 4 bits, with a `Modelfile`; `metrics.json`: what each file lost.
# - **Time:** about two minutes with the small model of the `cpu` profile; longer for a 7B model, which llama.cpp reads
#   on the CPU. Installing llama.cpp compiles it, once: 5 to 10 minutes on two cores.
#
# A model that leaves the machine it was made on needs three things: a card that says what it is and what it is not, a
# format that other programs read, and a proof that it is still the same model there.

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
# The run folder knows most of what a model card says. It cannot know how the base model is called on the Hub, if it was
# a local folder, nor what licence the base model has: yours has to allow for it.

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 4; in Colab better "drive:home_remedies"
seed = 42
license = ""  # of the model, as the Hub writes it, for example "llama2" or "apache-2.0"; it follows the base model's
language = "en"
tags = "qlora"  # with commas between; what fits any such model is added
base_model_on_hub = ""  # the base model's id there, for example "HuggingFaceTB/SmolLM2-135M-Instruct"; "" if it was one
push_to_hub = ""  # "owner/name": the merged model goes there, the adapter to "owner/name-adapter"; "" uploads nothing
private = True  # whether only you can see them there
gguf_types = ["F16", "Q8_0", "Q4_K_M"]  # [] makes none and needs no llama.cpp
proof_rows = 30  # rows of the test split that each file is scored on
proof_questions = 5  # questions that each file answers
max_new_tokens = 256
window = 1024  # tokens that the model sees at once; a longer text is read in overlapping windows
stride = 512  # by which a window moves on
bootstrap_samples = 2000
disclaimer = "Educational example, not medical advice. In an emergency call your local emergency number."

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
# The next cells stand in all the notebooks, word for word. They give an error that shows as one line, a way to write
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
import ctypes
import gc
import hashlib
import logging
import math
import re
import tarfile
import tempfile

# bitsandbytes looks for an optional CPU kernel, and does without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import datasets
import numpy as np
import pandas as pd
import transformers
from gguf import GGUFReader
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from IPython.display import Markdown
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

datasets.disable_progress_bars()
datasets.disable_caching()
transformers.utils.logging.set_verbosity_error()

DISCLAIMER = disclaimer
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package is llama.cpp: library, quantizer and converter

# %% [markdown]
# ## The run
#
# What is exported must belong together: this data set, this adapter, this merged model, these figures.


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


def same_model(one, other):
    """Whether two names mean the same model: equal, or one local folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def check_run(run, merged, report, base_model):
    """The adapter's SHA-256, once it is known that all belongs together; `merged` is None if it is elsewhere.

    Raises StageError if the adapter or the merged model is missing or does not belong to the rest of the run.
    """
    for folder, stage in ((run / "adapter", "02_finetune_qlora"), (merged, "03_merge_adapter")):
        if folder and not folder.exists():
            raise StageError(f"{folder} is missing. Run {stage} first, with the same run_dir, in Colab one in Drive.")
    provenance = json.loads((run / "adapter" / "provenance.json").read_text())
    digest = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    if not same_model(provenance["base_model"], base_model):
        raise StageError(f"The adapter was trained on {provenance['base_model']}, but base_model is {base_model}.")
    if provenance["dataset_fingerprint"] != report["fingerprint"]:
        raise StageError("The adapter was trained on another data set. Run 02_finetune_qlora again.")
    if merged and json.loads((merged / "merge_report.json").read_text())["adapter_sha256"] != digest:
        raise StageError("The merged model was made from another adapter. Run 03_merge_adapter again.")
    return digest


def read_json(path, stage):
    """What a stage left in a JSON file. Raises StageError if it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = "is missing" if not path.exists() else f"cannot be read ({error})"
        raise StageError(f"{path} {reason}. Run {stage} first, with the same run_dir, in Colab one in Drive.") from None


# %%
splits, report = load_dataset_of_run(run)
manifest = read_json(run / "manifest.json", "01_format_dataset")
merged_folder = run / "merged"
if run_dir.startswith(("drive:", "hub:")) and not merged_folder.exists():
    merged_folder = Path("runs") / run.name / "merged"
metrics = read_json(run / "evaluation" / "metrics.json", "04_evaluate")
adapter_config = read_json(run / "adapter" / "adapter_config.json", "02_finetune_qlora")
base_model = adapter_config["base_model_name_or_path"]
adapter_sha256 = check_run(run, merged_folder, report, base_model)
tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
config = AutoConfig.from_pretrained(merged_folder)
folder = merged_folder.parent / "export.partial"  # becomes export/ when all is there
remove(folder)
folder.mkdir()

# %% [markdown]
# ## The model card
#
# A card on the Hub is a README with a few lines of YAML on top, by which people find the model. A name is given only if
# it can be one on the Hub: a path on your disk is nobody's business.


# %%
def hub_id(name):
    """`name` if it can be a repository on the Hub, None if it is a file or folder here or cannot be one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() or Path(name).suffix in (".csv", ".jsonl", ".parquet") else name


def metadata(part, base, dataset):
    """The YAML part of a card: `part` is "adapter" or "merged", `base` and `dataset` ids on the Hub or None."""
    general = ["text-generation", "conversational", "fine-tuned", "lora" if part == "adapter" else "merged"]
    results = None
    if dataset:  # the Hub wants a data set of its own beside a figure
        value = round(metrics[part]["perplexity"]["response"], 4)
        results = [
            EvalResult("text-generation", dataset, dataset, "perplexity", value, "Response perplexity, test split")
        ]
    return ModelCardData(
        license=license or None,
        language=[name.strip() for name in language.split(",")] if language else None,
        base_model=base,
        base_model_relation=("adapter" if part == "adapter" else "finetune") if base else None,
        datasets=[dataset] if dataset else None,
        tags=list(dict.fromkeys([*general, *(tag.strip() for tag in tags.split(",") if tag.strip())])),
        pipeline_tag="text-generation",
        library_name="peft" if part == "adapter" else "transformers",
        model_name=model_name if results else None,
        eval_results=results,
        ignore_metadata_errors=False,
    )


# %%
model_name = push_to_hub.rpartition("/")[2] or run.name
base_on_hub = base_model_on_hub or hub_id(base_model)
dataset_name = manifest["01_format_dataset"]["parameters"]["dataset"]
dataset_on_hub = hub_id(dataset_name)
for name, value in (("base_model_on_hub", base_model_on_hub), ("push_to_hub", push_to_hub)):
    if value and ("/" not in value or hub_id(value) is None):
        raise StageError(f'{name}="{value}": use owner/name, as on the Hub.')
if push_to_hub and not base_on_hub:
    raise StageError(f"The base model was the folder {base_model}: set base_model_on_hub, so that others can find it.")

# %% [markdown]
# The rest is for people, and comes from the run alone. Figures stand with their intervals, as one without says little.


# %%
def table(columns, rows):
    """A Markdown table; `rows` are lists of texts as long as `columns`."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def estimate(value, ci95=None, form="{:.2f}"):
    """A figure as text, with its interval if it has one; a dash if it is not known."""
    if value is None:
        return "–"
    return form.format(value) + (" ({} – {})".format(*map(form.format, ci95)) if ci95 else "")


def rate(entry, name):
    """A rate of a dictionary of figures as percent, with its interval if there is one."""
    return estimate(entry.get(name), entry.get(f"{name}_ci95"), "{:.0%}")


# %%
MODELS = {"base": "base model", "adapter": "with the adapter", "merged": "merged"}


def figures():
    """The figures of notebook 4 as Markdown tables: those that this run has, the test split's first."""
    known = {label: metrics[name] for name, label in MODELS.items() if name in metrics}
    columns = ["", "response perplexity", "full-text perplexity", "answers that stop", "answers with the structure"]
    rows = []
    for label, m in known.items():
        p, g = m["perplexity"], m["generation"]
        full = estimate(p["full_text"], p.get("full_text_ci95"))
        rows.append(
            [label, estimate(p["response"], p["response_ci95"]), full, rate(g, "stop_rate"), rate(g, "structure_rate")]
        )
    parts = [f"On the {report['splits']['test']} rows of the test split:", table(columns, rows)]
    by_split = {label: m["by_split"] for label, m in known.items() if m.get("by_split")}
    if by_split:
        names = list(next(iter(by_split.values())))
        rows = [
            [label, *(estimate(m[n]["response"], m[n].get("response_ci95")) for n in names)]
            for label, m in by_split.items()
        ]
        parts += [
            "Response perplexity by split (unseen: questions that do not occur in training):",
            table(["", *names], rows),
        ]
    outside = {label: m["outside"] for label, m in known.items() if m.get("outside")}
    if outside:
        rows = [[label, estimate(m["perplexity"], m.get("ci95"))] for label, m in outside.items()]
        parts += ["Forgetting, as perplexity on a text from outside the field:", table(["", "perplexity"], rows)]
    safety = {label: m["safety"] for label, m in known.items() if m.get("safety")}
    if safety:
        columns = ["", "questions", "how many", "tells to get medical help", "offers a remedy"]
        rows = [
            [label, kind, m["prompts"], rate(m, "seeks_help"), rate(m, "offers_remedy")]
            for label, kinds in safety.items()
            for kind, m in kinds.items()
        ]
        parts += ["Safety. An answer to an emergency that offers a remedy is dangerous:", table(columns, rows)]
    grounding = {label: m["grounding"] for label, m in known.items() if m.get("grounding")}
    if grounding:
        columns = ["", "named", "in the table for this question", "for another", "nowhere"]
        rows = [
            [label, m["named"], rate(m, "this_condition"), rate(m, "other_condition"), rate(m, "nowhere")]
            for label, m in grounding.items()
        ]
        parts += ["Grounding. Of what the answers name, how much stands in the training table:", table(columns, rows)]
    return "\n\n".join(parts)


# %%
SNIPPETS = {
    "adapter": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", use_safetensors=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
}
ASK = """
question = [{"role": "user", "content": "QUESTION"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def use(part):
    """The code with which a reader asks the model a question of the test split."""
    name = (push_to_hub or model_name) + ("-adapter" if part == "adapter" else "")
    question = json.dumps(splits["test"][0]["prompt"][0]["content"], ensure_ascii=False)
    ask = ASK.replace('"QUESTION"', question).replace("MOST", str(max_new_tokens))
    return "```python\n" + SNIPPETS[part].format(name=name) + ask + "\n```"


# %%
def limits():
    """What the figures say about the model's limits, and what they do not, as a Markdown list."""
    merged, rows = metrics["merged"], report["splits"]["test"]
    low, high = merged["perplexity"]["response_ci95"]
    lines = [
        f"**{DISCLAIMER}**",
        f"It learned from {report['splits']['train']} rows of one table, and the figures above rest on {rows} others: "
        f"the true perplexity on such rows may well be anywhere from {low:.2f} to {high:.2f}.",
        f"{rate(merged['generation'], 'structure_rate')} of its answers look like the table's. That says nothing about "
        "whether they are right: such a model states wrong things in the same form, as surely.",
        "The test questions come from the same table as the training's. Nothing is known about questions of another "
        "kind, other languages, or conversations of more than one turn.",
    ]
    emergency = merged.get("safety", {}).get("emergency")
    if emergency:
        lines.append(
            f"To {emergency['prompts']} questions that were emergencies it offered a remedy in "
            f"{rate(emergency, 'offers_remedy')} and told the reader to get help in {rate(emergency, 'seeks_help')}."
        )
    else:
        lines.append(
            "How it answers when somebody's health or life is at stake was not measured. Do not assume that it helps."
        )
    lines.append("What the base model gets wrong, its biases among it, is still there.")
    return "\n".join(f"- {line}" for line in lines)


# %%
def provenance():
    """What ran, on what: one Markdown table row a notebook."""
    columns = ["notebook", "finished", "seconds", "peak memory, GiB", "GPU", "transformers", "git commit"]
    rows = []
    for stage, m in manifest.items():
        peak = ", ".join(f"{where} {gib}" for where, gib in m["peak_memory_gib"].items())
        commit = (m["git_commit"] or "–")[:10]
        rows.append(
            [stage, m["finished"][:10], m["seconds"], peak, m["gpu"] or "none", m["packages"]["transformers"], commit]
        )
    return table(columns, rows)


TRAINING = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "epochs", "batch_size"]
TRAINING += ["gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup", "max_grad_norm", "optim"]
TRAINING += ["max_length", "packing", "seed"]


def body(part):
    """A card below its YAML: `part` is "adapter" or "merged"."""
    base = f"[{base_on_hub}](https://huggingface.co/{base_on_hub})" if base_on_hub else f"`{Path(base_model).name}`"
    data = (
        f"[{dataset_on_hub}](https://huggingface.co/datasets/{dataset_on_hub})"
        if dataset_on_hub
        else f"`{Path(dataset_name).name}`"
    )
    what = f"A LoRA adapter for {base}" if part == "adapter" else f"{base} with a LoRA adapter merged into its weights"
    chosen = manifest["02_finetune_qlora"]["parameters"]
    training = read_json(run / "training" / "metrics.json", "02_finetune_qlora")
    merging = read_json(merged_folder / "merge_report.json", "03_merge_adapter")
    dropped = [[reason, rows] for reason, rows in report["dropped"].items()] or [["nothing", 0]]
    template = report["templates"]
    merge_line = f"Merged into the {merging['base_weights']} weights, stored as {merging['dtype']}."
    return f"""# {model_name}{" (adapter)" if part == "adapter" else ""}

> **{DISCLAIMER}**

{what}, trained with QLoRA (the base in 4-bit NF4) on {data}. {"" if part == "adapter" else merge_line}

## Use

{use(part)}

## Data

{report["rows_in"]} rows came in and {report["rows_out"]} stayed: {report["splits"]["train"]} for training,
{report["splits"]["validation"]} for validation, {report["splits"]["test"]} for testing, split by question.
Fingerprint: `{report["fingerprint"]}`.

{table(["dropped because of", "rows"], dropped)}

A row became a question and an answer:

```text
{template["question"]}

{template["answer"]}
```

## Training

{training["examples"]} examples, {training["steps"]} steps, {training["trainable_parameters"]:,} trainable parameters
({training["trainable_percent"]:.2f}%), {training["seconds"]:,.0f} s. The loss on the validation split went from
{training["eval_loss_before"]:.3f} to {training["eval_loss_after"]:.3f}.

{table(["parameter", "value"], [[name, chosen[name]] for name in TRAINING if name in chosen])}

## Evaluation

With 95% intervals in brackets. Perplexity counts the tokens of the answers, the end mark included.

{figures()}

## Limits

{limits()}

## Provenance

{provenance()}
"""


# %% [markdown]
# `ModelCard` puts the two together, reads the result back as the Hub would, and stops at YAML that is not valid. The
# adapter's config named the folder that the base model was in here; for others it names the base model on the Hub.

# %%
for part in ("adapter", "merged"):
    card = ModelCard(f"---\n{metadata(part, base_on_hub, dataset_on_hub)}\n---\n\n{body(part)}")
    (folder / part).mkdir()
    card.save(folder / part / "README.md")
    kept = ModelCard.load(folder / part / "README.md", ignore_metadata_errors=False)
    if kept.data.to_dict() != card.data.to_dict() or DISCLAIMER not in kept.text:
        raise StageError(f"The model card {folder / part / 'README.md'} cannot be read back.")
if base_on_hub:
    config_for_others = {**adapter_config, "base_model_name_or_path": base_on_hub}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config_for_others, indent=2))

# %%
print(str(card.data))
Markdown(card.text)

# %% [markdown]
# ## GGUF: llama.cpp and Ollama
#
# A GGUF is one file with weights, tokenizer and chat template, which llama.cpp reads without Python; Ollama, LM Studio
# and others are built on llama.cpp. The package llama-cpp-python is llama.cpp's library with Python bindings; as it has
# no wheel on PyPI, pip compiles it. `PIP_EXTRA_INDEX_URL=https://abetlen.github.io/llama-cpp-python/whl/cpu` in the
# environment lets pip take the authors' compiled one instead.

# %%
if gguf_types and "google.colab" in sys.modules and find_spec("llama_cpp") is None:
    get_ipython().run_line_magic("pip", f"install -q {LLAMA_CPP} sentencepiece==0.2.2")
if gguf_types and not all(map(find_spec, ["llama_cpp", "sentencepiece"])):
    raise StageError(
        f"llama.cpp is missing here. Run `make export`, or pip install {LLAMA_CPP} sentencepiece, or set gguf_types=[]."
    )


# %%
def fetch_converter():
    """The folder of llama.cpp's converter, which is in the source package only. It is kept beside the Hub's models.

    Raises StageError if pip cannot download it.
    """
    from huggingface_hub.constants import HF_HOME

    converter = Path(HF_HOME) / LLAMA_CPP.replace("==", "-")
    if not converter.exists():
        with tempfile.TemporaryDirectory() as place, whole(converter) as partial:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                "-d",
                place,
                LLAMA_CPP,
            ]
            if subprocess.run(pip, capture_output=True).returncode:
                raise StageError(
                    f"pip could not download {LLAMA_CPP}, which has llama.cpp's converter. Is there a network?"
                )
            with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
                inside = re.compile(r"[^/]+/vendor/llama\.cpp/(convert_hf_to_gguf\.py|conversion/|gguf-py/gguf/)")
                archive.extractall(place, [m for m in archive if inside.match(m.name)], filter="data")
            shutil.move(next(Path(place).glob("*/vendor/llama.cpp")), partial)
    return converter


# %% [markdown]
# ### 16 bits
#
# The converter knows most architectures. It tells the two kinds of tokenizers apart by the fallback to bytes, which a
# tokenizer that works on bytes throughout may claim as well, so that claim is dropped. And it writes no order of merges
# for a SentencePiece tokenizer that comes as `tokenizer.json`, so that llama.cpp would cut words elsewhere: the order
# is put in afterwards.


# %%
def prepare(model, copy):
    """Make a folder of links to a model's files, with a tokenizer that the converter does not mistake."""
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).symlink_to(path.resolve())
    state = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if "ByteLevel" in json.dumps(state["pre_tokenizer"]) and state["model"].get("byte_fallback"):
        state["model"]["byte_fallback"] = False
        (copy / "tokenizer.json").unlink()
        (copy / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def set_scores(file, tokenizer_json):
    """Give the tokens of a SentencePiece vocabulary the order of their merges, in place, if the GGUF has none."""
    reader = GGUFReader(file, "r+")
    scores, tokens = (reader.fields.get(f"tokenizer.ggml.{name}") for name in ("scores", "tokens"))
    if scores is None or len({float(scores.parts[i][0]) for i in scores.data}) > 1:
        return
    merges = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["merges"]
    order = {}
    for rank, pair in enumerate(merges):
        order.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), rank)
    for i, k in zip(scores.data, tokens.data, strict=True):
        scores.parts[i][0] = -order.get(bytes(tokens.parts[k]).decode("utf-8"), len(merges))
    reader.data.flush()


def convert(model, file, name):
    """Write the model in a folder as a GGUF in 16 bits. Raises StageError if llama.cpp does not know its kind."""
    with tempfile.TemporaryDirectory() as place:
        prepare(model, Path(place) / "model")
        command = [
            sys.executable,
            fetch_converter() / "convert_hf_to_gguf.py",
            Path(place) / "model",
            "--outtype",
            "f16",
        ]
        command += ["--outfile", file, "--model-name", name]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise StageError(f"llama.cpp cannot convert {model}: {reason}")
    set_scores(file, model / "tokenizer.json")


# %%
gguf_folder = folder / "gguf"
names = {kind: f"{model_name}-{kind}.gguf" for kind in gguf_types}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the processor to others that work
if gguf_types:
    import llama_cpp

    default_params = llama_cpp.llama_model_default_params
    # it would print every tensor's name; kept where it lives as long as the library, which calls it to the end
    llama_cpp.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(llama_cpp.silent, None)
    unknown = [kind for kind in gguf_types if kind != "F16" and not hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")]
    if unknown:
        raise StageError(
            f"gguf_types: llama.cpp does not know {unknown[0]!r}; common ones are F16, Q8_0, Q5_K_M, Q4_K_M."
        )
    gguf_folder.mkdir()
    f16 = gguf_folder / f"{model_name}-F16.gguf"
    convert(merged_folder, f16, model_name)
    print(f"{f16.name}: {f16.stat().st_size / 2**20:,.1f} MiB")

# %% [markdown]
# ### 8 bits and 4 bits
#
# Q8_0 rounds each weight to 8 bits with a scale for every 32. Q4_K_M takes 4 bits for most and 6 for those that matter
# more; a matrix whose rows do not divide into blocks of 256 gets 5 or 8.
#
# Which merged weights are the ones to quantize? Notebook 4 compared both kinds after NF4, which is another way to 4
# bits, so its word is a hint; the table further down measures the very files.


# %%
def better_merged(merged_from, fidelity):
    """Which merged weights bear 4 bits better than those "original" or "dequantized" at hand: their name, or None.

    `fidelity` is what notebook 4 has in `metrics.json`: a variant's perplexity and its 95% interval. The intervals must
    not overlap, which is more than a difference in pairs would have to show.
    """
    other = {"original": "dequantized", "dequantized": "original"}[merged_from]
    here, there = (fidelity.get(f"merged, {name}, NF4 again") for name in (merged_from, other))
    return other if here and there and there["ci95"][1] < here["ci95"][0] else None


# %%
merged_from = read_json(merged_folder / "merge_report.json", "03_merge_adapter")["base_weights"]
better = better_merged(merged_from, metrics.get("fidelity", {}))
if gguf_types and better:
    print(
        f"WARNING: these weights were merged with base_weights={merged_from}, which 4 bits harmed in notebook 4. For "
        f"files in 4 bits, merge with base_weights={better} in notebook 3 first."
    )


# %%
def quantize(source, target, kind):
    """Write a 16-bit GGUF as another type. Raises StageError if llama.cpp fails."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise StageError(f"llama.cpp could not write {target} as {kind}.")


# %%
for kind in gguf_types:
    if kind != "F16":
        quantize(f16, gguf_folder / names[kind], kind)
        print(f"{names[kind]}: {(gguf_folder / names[kind]).stat().st_size / 2**20:,.1f} MiB")

# %% [markdown]
# ### The same tokens?
#
# A model that reads other tokens than it learned is another model. llama.cpp must cut the conversations of this run
# into exactly the tokens of the training; a file that does not is not kept.


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


def load_gguf(file):
    """A GGUF in llama.cpp, on the CPU, with the logits of all tokens. Raises StageError if it cannot be read.

    The weights stay in the layout of the file: with the layout for AMX, the library of llama-cpp-python 0.3.36
    crashes on Xeons that have it.
    """

    def plain_layout():
        params = default_params()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain_layout  # `Llama` has no argument for it
    try:
        return llama_cpp.Llama(
            str(file), n_ctx=window, n_batch=window, n_threads=os.cpu_count(), logits_all=True, verbose=False
        )
    except ValueError as error:
        raise StageError(f"llama.cpp cannot read {file}: {error}") from None


def ids_in_llama_cpp(model, text):
    """How llama.cpp cuts a rendered conversation; begins with BOS if the text does or the vocabulary wants one."""
    bos = tokenizer.bos_token
    adds = bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model)))
    ids = model.tokenize(text.removeprefix(bos or "").encode() if adds else text.encode(), add_bos=adds, special=True)
    return ids


# %%
if gguf_types:
    model = load_gguf(f16)
    known = [row for split in splits.values() for row in split.select(range(min(len(split), 1000)))]
    for row in known:
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        expected = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        if ids_in_llama_cpp(model, text) != expected:
            raise StageError(
                f"llama.cpp cuts {text[:60]!r}… into other tokens than the tokenizer: the GGUF is not kept."
            )
    adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model)))
    print(f"{len(known)} conversations, cut into the same tokens")

# %% [markdown]
# ### The same answers?
#
# In 16 bits the file must give the answers that transformers gives from the merged model, greedy, token by token; and
# each file gets a perplexity, defined as in notebook 4, over the same tokens. In how many answers a quantized file
# agrees shows how far rounding moves it.


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


def spans(length, window, stride):
    """Cut a text of `length` tokens into spans (start, end, first): in start…end, score the tokens from `first` on.

    Every token but the very first is scored exactly once, with at least `window - stride` tokens before it where the
    text has as many.
    """
    cut = [(0, min(window, length), 1)]
    while cut[-1][1] < length:
        end = min(cut[-1][1] + min(stride, window - 1), length)
        cut.append((max(0, end - window), end, cut[-1][1]))
    return cut


def perplexity(scores, part):
    """Token-weighted perplexity of a part, "response" or "full", of all rows together."""
    return math.exp(scores[f"{part}_nll"].sum() / scores[f"{part}_tokens"].sum())


# %%
def score_with(logits_of, rows):
    """Negative log-likelihoods in nats and numbers of tokens of each row's response and all of its text: a DataFrame.

    `logits_of` gives the logits, [tokens, vocabulary], at each of a list of token ids.
    """
    totals = np.zeros((len(rows), 4))
    for total, row in zip(totals, rows, strict=True):
        for start, end, first in spans(len(row["input_ids"]), window, stride):
            logits = torch.as_tensor(logits_of(row["input_ids"][start:end]))[first - start - 1 : -1].double()
            targets = torch.tensor(row["input_ids"][first:end])
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
            mask = np.array(row["completion_mask"][first:end])
            total += [nll @ mask, mask.sum(), nll.sum(), len(nll)]
    return pd.DataFrame(totals, columns=["response_nll", "response_tokens", "full_nll", "full_tokens"])


def resampled(totals, counts, bootstrap_samples, seed):
    """`sum(totals) / sum(counts)` for each of many draws of as many rows with replacement: [bootstrap_samples].

    The same number of rows and the same seed give the same draws, so that two models can be compared in pairs.
    """
    draws = np.random.default_rng(seed).integers(len(totals), size=(bootstrap_samples, len(totals)))
    return np.asarray(totals)[draws].sum(axis=1) / np.asarray(counts)[draws].sum(axis=1)


def interval(values):
    """The middle 95% of `values`, [low, high] (Efron's percentile interval)."""
    return np.percentile(values, [2.5, 97.5]).tolist()


# %%
def in_transformers(model):
    """Two functions of a model in transformers: logits at each of some tokens, and the greedy answer to a prompt."""

    @torch.no_grad()
    def logits_of(ids):
        return model(torch.tensor([ids], device=model.device)).logits[0].float().cpu()

    def answer(ids):
        stops = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id
        )
        inputs = torch.tensor([ids], device=model.device)
        return model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=stops)[
            0, len(ids) :
        ].tolist()

    return logits_of, answer


def in_llama_cpp(model):
    """The same two functions of a model in llama.cpp."""

    def logits_of(ids):
        model.reset()
        model.eval(ids)
        return model.scores[: len(ids)]

    def answer(ids):
        new = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            new.append(token)
            if token in stop_ids or len(new) == max_new_tokens:
                return new

    return logits_of, answer


# %%
generation = GenerationConfig.from_pretrained(merged_folder)
stop_ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
test = splits["test"]
rows = [encode(row, tokenizer) for row in test.select(range(min(proof_rows, len(test))))]
asked = list({row["prompt"][0]["content"]: row["prompt"] for row in test}.values())[:proof_questions]
prompts = [encode_prompt(prompt, tokenizer) for prompt in asked]
if max_new_tokens + max(map(len, prompts)) > window:
    raise StageError(f"window={window} has no room for the longest question and max_new_tokens={max_new_tokens}.")
print(
    f"{len(rows)} rows, {sum(sum(row['completion_mask']) for row in rows):,} response tokens; {len(prompts)} questions"
)

# %%
scores, answers = {}, {}
if gguf_types:
    # in the arithmetic that is next to llama.cpp's: the weights have 16 bits, sums on a CPU have 32
    merged = load_model(
        merged_folder, None, torch.float16 if torch.cuda.is_available() else torch.float32, "sdpa"
    ).eval()
    logits_of, answer = in_transformers(merged)
    scores["merged"], answers["merged"] = score_with(logits_of, rows), [answer(prompt) for prompt in prompts]
    del merged, logits_of, answer
    gc.collect()
    torch.cuda.empty_cache()

# %%
for kind in gguf_types:
    model = load_gguf(gguf_folder / names[kind])
    logits_of, answer = in_llama_cpp(model)
    begun = time.perf_counter()
    scores[kind], answers[kind] = score_with(logits_of, rows), [answer(prompt) for prompt in prompts]
    print(f"{kind}: {time.perf_counter() - begun:.0f} s")
model = None


# %%
def summarize_file(kind):
    """The entry of the merged model or of a GGUF in `export/metrics.json`."""
    s, reference = scores[kind], scores["merged"]
    files = [gguf_folder / names[kind]] if kind in names else merged_folder.glob("*.safetensors")
    nll = s["response_nll"] - reference["response_nll"]
    return {
        "mib": round(sum(file.stat().st_size for file in files) / 2**20, 1),
        "perplexity": {
            "response": perplexity(s, "response"),
            "full_text": perplexity(s, "full"),
            "response_ci95": np.exp(
                interval(resampled(s["response_nll"], s["response_tokens"], bootstrap_samples, seed))
            ).tolist(),
        },
        "ratio_to_merged": perplexity(s, "response") / perplexity(reference, "response"),
        "ratio_to_merged_ci95": np.exp(
            interval(resampled(nll, s["response_tokens"], bootstrap_samples, seed))
        ).tolist(),
        "same_answers": sum(one == other for one, other in zip(answers[kind], answers["merged"], strict=True)),
        "questions": len(prompts),
    }


# %%
exported = {"merged" if kind == "merged" else kind: summarize_file(kind) for kind in scores}
results = pd.DataFrame(
    {
        ("merged, in transformers" if kind == "merged" else names[kind]): {
            "MiB": f"{m['mib']:,.1f}",
            "response perplexity": estimate(m["perplexity"]["response"], m["perplexity"]["response_ci95"], "{:,.3f}"),
            "full-text perplexity": f"{m['perplexity']['full_text']:,.3f}",
            "of the merged model's": estimate(m["ratio_to_merged"], m["ratio_to_merged_ci95"], "{:.2%}"),
            "same greedy answers": f"{m['same_answers']} of {m['questions']}",
        }
        for kind, m in exported.items()
    }
).T
results

# %% [markdown]
# An interval of the ratio that holds 100% means that no loss was seen. In 16 bits more than a per mille would be a
# mistake in the file, not rounding.

# %%
if "F16" in exported:
    f16_ratio = exported["F16"]["ratio_to_merged"]
    if not abs(f16_ratio - 1) < 0.005:
        raise StageError(f"The perplexity of {names['F16']} is {f16_ratio:.2%} of the merged model's: not kept.")
    for prompt, one, other in zip(asked, answers["F16"], answers["merged"], strict=True):
        if one != other:
            place = next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
            print(f"{prompt[0]['content']!r}: the answers part at token {place + 1}")
if gguf_types and "F16" not in gguf_types:
    f16.unlink()

# %% [markdown]
# ## Ollama
#
# Ollama does not read the chat template in the GGUF; it wants one in Go's template language. So that nothing is
# guessed, the tokenizer's template is asked: from what it makes of a few conversations follow the texts before, between
# and after the messages. The texts are put together again for other conversations; if that is not exactly what the
# tokenizer renders, there is no `Modelfile`.


# %%
def take_template_apart(render):
    """The fixed texts of a chat template; `system_first` and `user_after_system` are None if it has no system message.

    `render` takes messages and gives what the template makes of them, up to where the next answer begins. Raises
    ValueError if the template is more than texts around the messages.
    """
    system, first = {"role": "system", "content": "«a»"}, {"role": "user", "content": "«b»"}
    reply, second = {"role": "assistant", "content": "«c»"}, {"role": "user", "content": "«d»"}
    one, two = render([first]), render([first, reply, second])
    try:
        user_first, user_end = one.split("«b»")
        between, user_next = re.fullmatch(".*«b»(.*)«c»(.*)«d».*", two, re.DOTALL).groups()
    except (ValueError, AttributeError):
        raise ValueError("it leaves out messages or repeats them") from None
    texts = {"user_first": user_first, "answer": between, "user_next": user_next, "end": user_end}
    texts |= {"system_first": None, "user_after_system": None}
    try:
        found = re.fullmatch("(.*)«a»(.*)«b»(.*)", render([system, first]), re.DOTALL)
    except TemplateError:
        found = None  # it refuses system messages
    if found:
        texts["system_first"], texts["user_after_system"] = found[1], found[2]
    conversations = [[first], [first, reply, second], [first, reply, second, reply, first]]
    if found:
        conversations += [[system, *conversation] for conversation in conversations]
    if any(put_together(texts, messages) != render(messages) for messages in conversations):
        raise ValueError("it does more than put texts around the messages")
    return texts


def put_together(texts, messages):
    """What the Ollama template of `texts` makes of messages."""
    text, last = "", ""
    for message in messages:
        role = message["role"]
        if role == "user":
            name = {"": "user_first", "system": "user_after_system"}.get(last, "user_next")
        else:
            name = {"system": "system_first", "assistant": "answer"}[role]
        text, last = text + texts[name] + message["content"], role
    return text + (texts["end"] if last == "user" else "")


# %%
def ollama_template(texts):
    """The texts of a chat template as a template of Ollama, which is Go's text/template. Texts stand in Go's quotes."""
    quoted = {name: "{{ " + json.dumps(text, ensure_ascii=False) + " }}" for name, text in texts.items() if text}
    q = {name: quoted.get(name, "") for name in texts}
    lines = [
        '{{- $last := "" }}{{ range .Messages }}{{ if eq .Role "user" }}',
        f'{{{{- if eq $last "" }}}}{q["user_first"]}{{{{ else if eq $last "system" }}}}{q["user_after_system"]}'
        f"{{{{ else }}}}{q['user_next']}{{{{ end }}}}{{{{ .Content }}}}{{{{ $last = .Role }}}}",
        f'{{{{- else if eq .Role "assistant" }}}}{q["answer"]}{{{{ .Content }}}}{{{{ $last = .Role }}}}',
    ]
    if texts["system_first"] is not None:
        lines.append(
            f'{{{{- else if eq .Role "system" }}}}{q["system_first"]}{{{{ .Content }}}}{{{{ $last = .Role }}}}'
        )
    return "\n".join([*lines, f'{{{{- end }}}}{{{{ end }}}}{{{{ if eq $last "user" }}}}{q["end"]}{{{{ end }}}}'])


def stop_texts(texts, tokenizer, stop_ids):
    """What ends an answer: the tokens that the model stops at, and what the template puts before a next question."""
    stops = tokenizer.convert_ids_to_tokens(stop_ids)
    special = [token for token in tokenizer.all_special_tokens if token in texts["user_next"]]
    rest = texts["user_next"]
    for token in special:
        rest = rest.replace(token, "")
    marker = [rest.strip()] if re.search(r"\W", rest.strip()) else []  # a bare word like "user" may be in an answer
    return list(dict.fromkeys([*stops, *special, *marker]))


# %% [markdown]
# The system message stays what the template makes it: another one would be a prompt that the model was not trained
# with. The disclaimer is therefore in the licence, which `ollama show --license` prints, and at the top of the file.

# %%
modelfile = None
if gguf_types:
    ships = gguf_types[-1]
    bos = tokenizer.bos_token or ""
    try:
        texts = take_template_apart(
            lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        for name in ("user_first", "system_first"):
            if adds_bos and texts[name]:
                texts[name] = texts[name].removeprefix(bos)
    except ValueError as error:
        print(f"No Modelfile: the chat template cannot be written in Ollama's language, as {error}.")
    else:
        about = f"Base model: {base_on_hub or Path(base_model).name}. Licence: {license or 'that of the base model'}."
        lines = [
            f"# {DISCLAIMER}",
            f"# ollama create {model_name} -f Modelfile && ollama run {model_name}",
            f"FROM ./{names[ships]}",
            f'TEMPLATE """{ollama_template(texts)}"""',
            *(
                f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}"
                for stop in stop_texts(texts, tokenizer, stop_ids)
            ),
            "PARAMETER temperature 0",
            "PARAMETER repeat_penalty 1.0",
            f"PARAMETER num_ctx {window}",
            f"PARAMETER num_predict {max_new_tokens}",
            f'LICENSE """{DISCLAIMER}\n{about}"""',
        ]
        modelfile = "\n".join(lines) + "\n"

# %% [markdown]
# What Ollama hands to llama.cpp must be the prompt that the model was trained with, token for token.

# %%
if modelfile:
    model = load_gguf(f16 if f16.exists() else gguf_folder / names[ships])
    for prompt in asked:
        ids = model.tokenize(put_together(texts, prompt).encode(), add_bos=adds_bos, special=True)
        if ids != encode_prompt(prompt, tokenizer):
            raise StageError(f"Ollama's prompt for {prompt[0]['content']!r} is not the one of the training: not kept.")
    model = None
    (gguf_folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    print(modelfile)

# %% [markdown]
# ## Save

# %%
with whole(folder / "metrics.json") as partial:
    about = {"rows": len(rows), "adapter_sha256": adapter_sha256, "llama_cpp": LLAMA_CPP if gguf_types else None}
    partial.write_text(json.dumps({**about, **exported}, indent=2))
remove(folder.with_name("export"))
folder = folder.rename(folder.with_name("export"))
record("05_export", report["fingerprint"])
pd.Series(
    {str(path.relative_to(folder)): f"{path.stat().st_size / 2**20:,.1f} MiB" for path in sorted(folder.rglob("*.*"))}
).to_frame("size")

# %% [markdown]
# ## Upload
#
# With `push_to_hub`, the merged model and the adapter go to two repositories on the Hub, private unless you say
# otherwise, each with its card.


# %%
def upload(part, name):
    """Upload a part of the run, with its card and what else `export/` has for it, to a repository on the Hub.

    Raises StageError if the Hub refuses.
    """
    source = merged_folder if part == "merged" else run / part
    better = [path.name for path in (folder / part).iterdir()]
    try:
        create_repo(name, repo_type="model", private=private, exist_ok=True, token=hub_token())
        for path, ignored in ((source, better), (folder / part, None)):
            upload_folder(repo_id=name, repo_type="model", folder_path=path, ignore_patterns=ignored, token=hub_token())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{source} is here, but could not go to the Hub as {name}: {reason}") from None
    print(f"https://huggingface.co/{name}")


# %%
if push_to_hub:
    upload("merged", push_to_hub)
    upload("adapter", f"{push_to_hub}-adapter")
else:
    print("push_to_hub is empty: nothing was uploaded.")

# %% [markdown]
# ## What we have now
#
# A card that says what the model is and what it is not, and files that run without Python, each with what it lost:
#
# ```bash
# llama-server -m export/gguf/NAME-Q8_0.gguf -c 1024     # then http://localhost:8080
# ollama create NAME -f export/gguf/Modelfile && ollama run NAME
# ```
#
# Neither program shows the disclaimer beside an answer. If you let others ask the model, show it to them.
