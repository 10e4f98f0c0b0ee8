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
# # Chat with it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/chat.ipynb)
#
# - **In:** `dataset/` and `adapter/` in the run folder, from notebooks 1 and 2, and the base model.
# - **Out:** a page on which you ask, and the base model and the fine-tuned one answer side by side. Nothing is written.
# - **Time:** as long as it takes to load the base model.
#
# One model answers twice: each question goes through it as a batch of two, one row with the adapter and one without. So
# the page needs no more memory than the training did, and fits a T4. `make chat` opens it on your machine.

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
run_dir = "runs/home_remedies"  # that of notebooks 1 and 2; in Colab better "drive:home_remedies"
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
attn_implementation = "sdpa"
window = 1024  # tokens of a question and its answer together
max_new_tokens = 256
wait = False  # true: the last cell runs until it is interrupted, which `make chat` wants
disclaimer = "Educational example, not medical advice. In an emergency call your local emergency number."

# %% [markdown]
# ## Tools
#
# The next cells stand in the other notebooks, too, word for word. They give an error that shows as one line, and find
# the run.

# %%
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same bits from the same sums, whatever the memory looks like
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page sends nothing anywhere

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm looks for widgets, and does without
# bitsandbytes looks for an optional CPU kernel, and does without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes as bnb
import datasets
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError, RepositoryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    GenerationConfig,
)

datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DISCLAIMER = disclaimer


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


# %%
run = open_run(run_dir)
if find_spec("gradio") is None:
    raise StageError("Gradio is missing here, which makes the page. Run `make chat`, or pip install gradio==6.20.0.")

# %% [markdown]
# ## The model
#
# The adapter must have been trained on this data set and this base model, as in notebook 4.


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


# %%
splits, report = load_dataset_of_run(run)
check_run(run, None, report, base_model)
tokenizer = AutoTokenizer.from_pretrained(run / "adapter")


# %%
def encode_prompt(prompt, tokenizer):
    """Token ids of a prompt, a list of messages, up to where the answer begins; they start with one BOS."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[0] == bos else [bos, *ids]


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
base = load_base(base_model, base_model_revision, compute_dtype(precision), attn_implementation)
adapted = PeftModel.from_pretrained(base, run / "adapter").eval()

# %% [markdown]
# ## Two answers at once
#
# PEFT can give each row of a batch an adapter of its own, or none (`"__base__"`). Each token that comes is shown at
# once; a row that has reached its end mark waits for the other. Greedy, as in notebook 4.


# %%
@torch.no_grad()
def two_answers(question):
    """Yield the answers of the base and of the fine-tuned model so far, two texts, after each token."""
    ids = torch.tensor([encode_prompt([{"role": "user", "content": question}], tokenizer)] * 2, device=adapted.device)
    cache, new, open_rows = DynamicCache(), [[], []], {0, 1}
    for _ in range(max_new_tokens):
        logits = adapted(ids, past_key_values=cache, adapter_names=["__base__", "default"], logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        for row in sorted(open_rows):
            token = ids[row].item()
            if token == tokenizer.eos_token_id:
                open_rows.remove(row)
            else:
                new[row].append(token)
        yield tokenizer.batch_decode(new, skip_special_tokens=True)
        if not open_rows:
            return


# %% [markdown]
# ## The page
#
# Each question is answered by itself, as in training: the models do not see the conversation before it. Two visitors at
# once wait for each other in a queue. The disclaimer stays in view, however far one scrolls.


# %%
import gradio as gr


def chat_page():
    """The page, ready to be launched."""
    most = window - max_new_tokens

    def ask(question, base_chat, tuned_chat):
        """Yield the text box and the two conversations while the answers grow."""
        question = question.strip()
        if not question:
            gr.Warning("Please type a question first.")
            yield question, base_chat, tuned_chat
            return
        length = len(encode_prompt([{"role": "user", "content": question}], tokenizer))
        if length > most:
            gr.Warning(f"This question is too long: it has {length:,} tokens, and there is room for {most:,}.")
            yield question, base_chat, tuned_chat
            return
        asked = {"role": "user", "content": question}
        for texts in two_answers(question):
            one, two = ([asked, {"role": "assistant", "content": text or "…"}] for text in texts)
            yield "", base_chat + one, tuned_chat + two

    with gr.Blocks(title="Base and fine-tuned side by side") as page:
        gr.HTML(f"<strong>{DISCLAIMER}</strong>", elem_id="disclaimer")
        with gr.Row():
            base_chat = gr.Chatbot(label="Base model", height="55vh", buttons=["copy"])
            tuned_chat = gr.Chatbot(label="Fine-tuned", height="55vh", buttons=["copy"])
        with gr.Row():
            box = gr.Textbox(placeholder="Your question", show_label=False, scale=4, max_lines=4, autofocus=True)
            send = gr.Button("Ask", variant="primary", scale=1, min_width=80)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
            gr.ClearButton([box, base_chat, tuned_chat], value="Clear", scale=1, min_width=80)
        questions = {row["prompt"][0]["content"]: None for row in splits["test"]}
        gr.Examples([[question] for question in list(questions)[:3]], box, label="Questions that were not in training")
        asking = gr.on(
            [box.submit, send.click],
            ask,
            [box, base_chat, tuned_chat],
            [box, base_chat, tuned_chat],
            concurrency_limit=1,
        )
        stop.click(None, cancels=[asking])
    return page.queue(max_size=20)


STYLE = """
#disclaimer { position: fixed; top: 0; left: 0; right: 0; z-index: 100; padding: 0.6em 1em; border-radius: 0;
              text-align: center; background: #fff3cd; }
#disclaimer * { color: #332701; }
.gradio-container { padding-top: 4.5em !important; }
footer { display: none !important; }
"""
FONTS = ["system-ui", "sans-serif"]  # of the machine: the default ones come over the network


def open_page(page, inline=True):
    """Serve a page to this machine alone, and show it in the notebook if `inline`. Returns its address.

    Left to itself, Gradio in Colab downloads a program that opens a tunnel, through which anybody could ask for a week.
    Colab's own proxy does as well, once Gradio knows that its address is another outside
    (https://github.com/gradio-app/gradio/issues/13629).
    """
    place = {}
    if "google.colab" in sys.modules:
        from google.colab.output import eval_js

        with socket.socket() as any_free:
            any_free.bind(("127.0.0.1", 0))
            port = any_free.getsockname()[1]
        place = {"server_port": port, "root_path": eval_js(f"google.colab.kernel.proxyPort({port})")}
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    page.launch(share=False, quiet=True, prevent_thread_lock=True, inline=inline, css=STYLE, theme=theme, **place)
    return place.get("root_path", page.local_url)


# %%
page = chat_page()
address = open_page(page, inline=not wait)
try:
    print(DISCLAIMER)
    print(f"The page is at {address}" + ("; Ctrl-C ends it." if wait else ""))
    while wait:
        time.sleep(1)
except KeyboardInterrupt:
    page.close()
