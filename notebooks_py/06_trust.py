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
# # 6 · Trust
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/06_trust.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | 4 · evaluate | 5 · baselines | **6 · trust** | 7 · export |
# |---|---|---|---|---|---|---|
# | rows → chat text | train an adapter | one plain model | right answers? | was it worth it? | what else it did | take it away |
#
# Notebook 4 says whether the model's answers are right. This one asks what else the training did:
#
# - Is it safe? What does it answer where a wrong answer does harm?
# - Does it answer from the table, or make things up?
# - Does it know its training rows by heart?
# - Did it forget what it could do before?
# - Which merged model should be shipped, that is, given to users?
#
# The results, in short, stand under [What we have now](#What-we-have-now). Not every question can
# be asked of every table. Where something is not measured, the notebook says so, and which
# parameter would measure it.
#
# - **In:** `dataset/`, `adapter/`, `merged/` and `evaluation/` in the run folder, from notebooks 1
#   to 4.
# - **Out:** `trust/metrics.json` and, with prompts on safety, `trust/safety.jsonl`.
# - **Time:** some minutes on a T4; four minutes on two CPU cores with the small model of the `cpu`
#   profile.

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
# Rarely changed settings are folded away and come first; the next cell can override them. When
# `make` runs a notebook, it adds one more cell, with the settings of its profile. These override
# all others.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Rarely changed parameters
attn_implementation = "auto"  # "sdpa" where the model has it, PyTorch's fast attention
window = 1024  # tokens that the model sees at once; a longer text is read in overlapping windows
stride = 512  # tokens by which the window moves on
bootstrap_samples = 2000  # draws behind each 95% interval
item_field = ""  # {name} of the item in answer_template; "none": no item; "": the worked example's
disclaimer = ""  # above every answer; "" for the example's, or a neutral one

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 4; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
eval_batch_size = 64  # rows to score, or prompts to answer, at once, where memory allows
split_rows = 100  # rows of training and of validation to score besides the test split; 0: none
fidelity_rows = 50  # test rows on which to compare the ways to merge; 0 leaves that out
outside_text = "bundled"  # or a text file of yours, on anything but the table's subject; "": none
safety_prompts = ""  # "": the example's; "bundled", "none", or a file (docs/parameters.md)
safety_samples = 40  # prompts of each kind
safety_tokens = 96  # the most that an answer to one of them may have

# %%
import torch
from accelerate import PartialState

from tabletune.evaluation import safety
from tabletune.evaluation.generalization import forgetting
from tabletune.evaluation.grounding import grounding_finding
from tabletune.evaluation.trained_run import open_trained_run
from tabletune.evaluation.trust import (
    TrustExamination,
    TrustSettings,
    base_weights_of,
    in_short,
    inputs_of_trust,
)
from tabletune.model.devices import compute_dtype
from tabletune.model.run_models import load_adapted, load_merged
from tabletune.report.reading import figures_table, read_lines
from tabletune.report.showing import say, show_table
from tabletune.report.tables import side_by_side
from tabletune.run.files import archive, atomic_write, read_json
from tabletune.run.stage import start_stage

stage = start_stage("06_trust", globals())
run = stage.folder

# %% [markdown]
# ## What is examined
#
# The notebook first checks that the folders belong together: the adapter was trained on this data
# set, and the merged model was made from this adapter. Otherwise it stops. This sentence will stand
# above all answers:

# %%
trained = open_trained_run(run, run_dir, base_model)
trust = TrustExamination(trained, TrustSettings.from_parameters(stage.parameters))
warning = trained.disclaimer(disclaimer)
print(warning)

# %% [markdown]
# The models read rows of all splits, because a model that learns by heart does well on its training
# rows only. They also read *other texts*, which come with the package and are about other subjects.
# With these we measure what the model forgot. This is how many of each are read:

# %%
trust.overview()

# %% [markdown]
# ## Where a wrong answer does harm
#
# Fine-tuning teaches a model to answer every question in the way of the table. On some subjects a
# wrong answer does harm; health is one. The worked example, which is on health, comes with
# *prompts on safety*: questions that are not in the table. All models answer them. For another
# table, `safety_prompts` can be a file of your own.
#
# If there are such prompts, here are two of each kind, and how the answers are judged:

# %%
two_of_each = trust.prompts.groupby("kind").head(2).reset_index(drop=True)
show_table(two_of_each, safety.NO_PROMPTS)
if len(trust.prompts):
    say(*safety.rules_in_words(trust.template, trust.item_field))

# %% [markdown]
# ## Ask the three models
#
# If this was done before with the same parameters and models, nothing is computed again: the stored
# results are shown.

# %%
# with several GPUs, each has a process of its own
processes = PartialState(cpu=not torch.cuda.is_available())
inputs = inputs_of_trust(trained, stage.entries())
done = stage.is_done(inputs, ["trust/metrics.json"])

# %% [markdown]
# Base model and adapter are one model, loaded once: with its adapter switched off, it is the base
# model.

# %% tags=["nbval-ignore-output"]
source = (base_model, base_model_revision, compute_dtype(precision), attn_implementation)
provenance = read_json(run / "adapter" / "provenance.json", "02_finetune_qlora")
if not done:
    adapted = load_adapted(run / "adapter", *source)
    with adapted.disable_adapter():
        trust.examine("base", adapted)
    trust.examine("adapter", adapted)
    in_nf4 = provenance.get("quantization", "nf4") == "nf4"
    # what was trained: further down, the merged models are compared with it
    trust.set_trained("adapter on NF4" if in_nf4 else "adapter", adapted)
    adapted = None

# %% [markdown]
# ## The ways to merge
#
# With `quantization = "nf4"`, the adapter was trained on top of weights that were rounded to 4 bits
# (NF4). This model, *adapter on NF4*, is what was trained. Notebook 3 can add the adapter to the
# published weights (`base_weights = "original"`) or to these rounded weights (`"dequantized"`).
# Later, a merged model is often rounded to NF4 once more, to serve it in less memory ("NF4 again").
# So there are four merged models, such as *merged, original, NF4 again*, and each differs a little
# from what was trained.
#
# The *Kullback-Leibler divergence* (KL) measures how much their predictions differ. Let `p` be
# the probability that the trained model gives to a token, and `q` that of the merged model. KL is
# the mean of `log(p / q)`, each token weighted by its `p`. It is 0 if both models predict the
# same. Its unit is the nat, that of the natural logarithm. For one prediction among three tokens,
# by hand, and compared with the package's function:

# %%
from tabletune.evaluation.scoring import divergence
from tabletune.merging.in_memory import merge_in_memory, nf4_round_trip_model
from tabletune.model.inspection import base_config
from tabletune.model.loading import load_model

p = torch.tensor([[0.7, 0.2, 0.1]])  # what the trained model gives to each of three tokens
q = torch.tensor([[0.5, 0.4, 0.1]])  # what the merged model gives to them
by_hand = (p * (p / q).log()).sum().item()
# `divergence` takes a whole row. This one has two tokens, of which the second is the answer.
row = {"input_ids": [0, 1], "completion_mask": [0, 1]}
assert abs(by_hand - divergence([p.log()], [q.log()], [row])["response_kl"][0]) < 1e-6
print(f"{by_hand:.4f} nats")

# %% [markdown]
# The merged model is loaded as anyone would load it, without an adapter and without 4 bits. Then
# each of its matrices is rounded to NF4 and unpacked again, in place. The results are the same as
# if it stayed in 4 bits. (If the merged model is too large for this machine, it is loaded in 4
# bits at once. Then `evaluated_in` is "NF4", and it can be compared only in this form.)

# %% tags=["nbval-ignore-output"]
made_from = base_weights_of(trained)
if not done:
    merged, evaluated_in = load_merged(trained.merged, run / "adapter", *source)
    trust.examine("merged", merged)
    if not evaluated_in:
        trust.compare_way(f"merged, {made_from}", merged)
        nf4_round_trip_model(merged)
    trust.compare_way(f"merged, {made_from}, NF4 again", merged)
    merged = None

# %% [markdown]
# Notebook 3 merged in one of the two ways. The other one is tried here, in memory, with one more
# copy of the base model. The cell does this only if the ways are compared at all (`fidelity_rows`),
# if the merged model fitted in 16 or 32 bits, and if the base model was not published in a
# quantized form. The adapter is added in the number format of the training; then the model computes
# in that of this notebook.

# %% tags=["nbval-ignore-output"]
stored = base_config(base_model, base_model_revision)
if not done and trust.compared and not evaluated_in and not hasattr(stored, "quantization_config"):
    other = "dequantized" if made_from == "original" else "original"
    stored_dtype = stored.dtype or torch.float16
    remade = load_model(base_model, base_model_revision, stored_dtype, attn_implementation)
    trained_in = getattr(torch, provenance["dtype"])
    remade = merge_in_memory(remade, run / "adapter", other, trained_in).to(source[2])
    trust.compare_way(f"merged, {other}", remade)
    trust.compare_way(f"merged, {other}, NF4 again", nf4_round_trip_model(remade))
    remade = None

# %% [markdown]
# ## Save
#
# The figures get 95% intervals as in notebook 4, and models are compared on the same rows. Whether
# answers name items of the table is looked up in the answers of notebook 4. The folder `trust/`
# appears under this name only when it is complete, and results of an earlier run move to
# `earlier/`.

# %%
if not done:
    metrics = trust.metrics()
    metrics["merged"] |= {"evaluated_in": evaluated_in} if evaluated_in else {}
if not done and processes.is_main_process:
    archive(run, "trust")
    with atomic_write(run / "trust") as folder:
        folder.mkdir()
        trust.save(folder, metrics, warning)
    stage.record(trained.report["fingerprint"], inputs)
processes.wait_for_everyone()
done = True  # if cells above run again, they do not compute again

# %% [markdown]
# ## What was found
#
# The first lines are perplexities, where lower is better: on rows that the model was trained on
# (*training rows*), on rows that were only used to choose the best checkpoint (*validation rows*),
# on questions that it never saw (*test rows*), and on *other texts*. In brackets are 95% intervals.
#
# Further lines are there only if they were measured. They are shares. With prompts on safety, there
# are lines for each kind of prompt: how many answers do what a rule above says? *Items named* are
# those in the answers to the test questions: how many stand in the table for this question, only
# for another one, or nowhere? A dash means that the answers of a model name no items.
#
# The sentences further down say *the fine-tuned model*. In this notebook, that is the adapter.

# %%
metrics = read_json(run / "trust" / "metrics.json", stage.name)
figures_table({name: metrics[name] for name in ("base", "adapter", "merged")})

# %% [markdown]
# ### Is it safe?
#
# One dangerous answer is too many. So the model is called unsafe as soon as one answer breaks the
# rules above.

# %%
from IPython.display import display

print(*safety.safety_finding(metrics) or [safety.NOT_ASKED], sep="\n")
answers = safety.safety_side_by_side(read_lines(run / "trust" / "safety.jsonl"), 4)
if answers:
    display(side_by_side(answers, len(answers["prompt"]), warning))

# %% [markdown]
# ### Does it answer from the table?
#
# This needs an answer template with a line for an item. We look up each item that the answers to
# the test questions name. Does the table have it for this question, only for other questions, or
# not at all?

# %%
print(grounding_finding(metrics["adapter"]["grounding"]))

# %% [markdown]
# ### Does it memorize, or generalize?
#
# A model that generalizes improves on new rows. One that memorizes improves more on its training
# rows than on new ones. It can do both at once. We compare the improvement over the base model on
# training rows with that on test rows. Improvement means by how much fine-tuning divides the
# perplexity. (A lower perplexity on training rows would prove nothing, since these rows may be
# easier.)

# %%
not_measured = ["Not measured: no training rows were read (split_rows)."]
print(*metrics["memorization"] or not_measured, sep="\n")

# %% [markdown]
# ### What did it forget?
#
# Fine-tuning can damage what a model could do before. Then it finds other texts less likely than
# the base model does: their perplexity rises.

# %%
forgot = metrics["differences"]["adapter - base"].get("outside_log_perplexity")
print(forgetting(forgot) if forgot else "Not measured: no other text was read (outside_text).")

# %% [markdown]
# ### Which merged model to ship?
#
# Two of the merged models are for serving in 16 bits, and two for serving in NF4. Of each pair, one
# is recommended:
#
# - the one with the lower perplexity, if the interval of the difference excludes zero;
# - otherwise the one whose predictions are nearer to what was trained (lower KL);
# - if that does not decide either, the one from the published weights, which is simpler.
#
# With `context_rows`, the first of these rules does not count. The rows of the test questions are
# left out here, and the model learned to refuse without them. A merged model that has lost this
# finds the table's answers more probable again, so its lower perplexity is no merit.
#
# Ship the one for 16 bits or the one for NF4, depending on how you will serve the model.
#
# A KL such as `1.23e-05` is 0.0000123 nats. For comparison: in the example by hand, where two of
# three probabilities clearly changed, it was 0.0969.
#
# Look at *dequantized, NF4 again*. Its weights had been rounded to sixteen values before the
# adapter was added. The adapter moves most of them by less than the distance between two of these
# values, so rounding again can undo what was learned.
#
# *Original, NF4 again* can be nearer to what was trained than *original* is, although it was
# rounded once more: the training, too, saw weights that were rounded to NF4.

# %%
not_measured = ["Not measured: the ways to merge were not compared (fidelity_rows)."]
print(*metrics["shipping"] or not_measured, sep="\n")
show_table(figures_table(metrics["fidelity"]))

# %% [markdown]
# ## What we have now
#
# What fine-tuning did besides its task, in short:

# %%
print(*in_short(metrics), sep="\n")

# %% [markdown]
# Two things to try:
#
# - `context_rows = 3` and an `unknown_answer` in notebook 1: what does it answer now where the
#   table has nothing?
# - `epochs = 3` in notebook 2: how much more does it memorize?
#
# Next: [7 · export](07_export.ipynb)
# ([in Colab](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/07_export.ipynb)).
