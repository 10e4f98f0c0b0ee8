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
# # 4 · Evaluate
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/04_evaluate.ipynb)
#
# | 1 · format | 2 · fine-tune | 3 · merge | **4 · evaluate** | 6 · trust | 7 · export |
# |---|---|---|---|---|---|
# | rows → chat text | NF4 base + LoRA | one plain model | perplexity, samples | is it safe? | GGUF, cards |
#
# - **In:** `dataset/`, `adapter/` and `merged/` in the run folder, from notebooks 1 to 3.
# - **Out:** `evaluation/metrics.json`, `samples.jsonl`, `scores.parquet` and `results.png`.
# - **Time:** some minutes on a T4; two minutes on two CPU cores with the small model of the `cpu` profile.
#
# How well does the model do what it was trained for? Three models read and answer the same test questions, none of
# which was in training: the base model, the base model with the adapter, and the merged model. What else the training
# did, to safety for instance, is the subject of notebook 6.

# %% [markdown]
# On Colab, this cell installs what the runtime lacks, and nothing the second time. Elsewhere it does nothing.

# %%
import os
import sys
from importlib.util import find_spec

from IPython import get_ipython

series = "git+https://github.com/home-remedies-qlora/home-remedies-qlora@main"
if "google.colab" in sys.modules and not all(map(find_spec, ["tabletune", "trl", "bitsandbytes", "liger_kernel"])):
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # a wrong address is an error, and no question for a password
    lacking = "trl==0.29.1 bitsandbytes==0.50.2 liger-kernel==0.8.5"
    get_ipython().run_line_magic("pip", f"install -qqq --no-deps {series} {lacking}")
    if find_spec("tabletune") is None:
        sys.exit(f'Nothing came from {series}: set `series` to the address, or upload the folder and set "./FOLDER".')

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 3; in Colab better "drive:home_remedies"
seed = 42
base_model = "NousResearch/Llama-2-7b-chat-hf"
base_model_revision = "351844e75ed0bcbbe3f10671b3c808d2b83894ee"
precision = "auto"  # "bf16", "fp16", "fp32", or "auto": what the hardware computes natively
attn_implementation = "auto"  # "sdpa" where the model has it
eval_batch_size = 32  # rows to score, or questions to answer, at once, where memory allows
window = 1024  # tokens that the model sees at once; a longer text is read in overlapping windows
stride = 512  # by which a window moves on
samples = 20  # questions of the test split to answer
max_new_tokens = 256
do_sample = False  # greedy answers can be reproduced; sampled ones vary with temperature and top_p
temperature = 0.7
top_p = 0.9
bootstrap_samples = 2000
disclaimer = ""  # above every answer; "" for the example's, or a neutral one
your_question = (
    ""  # one more question, of your own; "" for the example's, or the first of the test split
)

# %%
from tabletune.chat.encoding import encode_all
from tabletune.chat.tokenizer import load_tokenizer_of_run
from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.evaluation.answers import generate
from tabletune.evaluation.metrics import joined_perplexity, save_rows, summarize_all
from tabletune.evaluation.questions import own_question, questions_of
from tabletune.evaluation.scoring import perplexity, score
from tabletune.model.devices import compute_dtype
from tabletune.model.run_models import find_merged, load_adapted, load_merged
from tabletune.report.pages import read_lines
from tabletune.report.plots import plot_results
from tabletune.report.tables import differences_table, results_table, side_by_side
from tabletune.report.text import stored, with_interval
from tabletune.run.artifacts import check_run, load_dataset_of_run
from tabletune.run.files import read_json, set_aside, whole, write_json
from tabletune.run.stage import begin
from tabletune.stats import resampled

stage = begin("04_evaluate", globals())
run = stage.folder

# %% [markdown]
# ## What is evaluated
#
# The three folders must belong together: this adapter trained on this data set, this merged model made from this
# adapter. If they were evaluated before, with the same parameters, the results are only shown again.

# %%
splits, report = load_dataset_of_run(run)
merged_folder = find_merged(run, run_dir)
inputs = {
    "dataset": report["fingerprint"],
    "adapter": check_run(run, merged_folder, report, base_model),
}
done = stage.is_done(inputs, ["evaluation/metrics.json"])

# %% [markdown]
# The test split goes through the same `encode` as the training rows did: token ids, and a mask of the answers. Rows
# that ask the same question have the same `group`.

# %%
tokenizer, stops = load_tokenizer_of_run(run / "adapter")
test, groups = encode_all(list(splits["test"]), tokenizer, stops), splits["test"]["group"]
print(f"{len(test)} test rows with {len(set(groups))} questions")

# %% [markdown]
# ## Base and adapter, in one
#
# The base model is loaded as it was trained on, in 4 bits, and the adapter beside it. One model serves for both: with
# the adapter switched off it is the base.

# %% tags=["nbval-ignore-output"]
import torch
from accelerate import PartialState

processes = PartialState(
    cpu=not torch.cuda.is_available()
)  # under `accelerate launch` one of several
source = (base_model, base_model_revision, compute_dtype(precision), attn_implementation)
adapted = None if done else load_adapted(run / "adapter", *source)

# %% [markdown]
# ## Perplexity, by hand
#
# At each token the model gives all tokens of its vocabulary a probability of being the next. What it gave the one that
# really came is what it is judged by: perplexity is $\exp$ of the mean of $-\log p$. Fifty means that it wavered as if
# between fifty equally likely tokens; 1 would be certainty. Here for one row, and only for its *response*, as the
# question is boilerplate that any model soon knows by heart.

# %% tags=["nbval-ignore-output"]
if not done:
    row = min(test, key=lambda row: len(row["input_ids"]))
    ids = torch.tensor([row["input_ids"]], device=adapted.device)
    with torch.no_grad():
        log_p = (
            adapted(ids).logits[0, :-1].float().log_softmax(-1)
        )  # [tokens, vocabulary]: of what comes next
    nll = -log_p.gather(-1, ids[0, 1:, None])[:, 0].cpu()
    by_hand = nll[torch.tensor(row["completion_mask"][1:]) == 1].mean().exp().item()
    scored = score(adapted, [row], tokenizer.pad_token_id, 1, window, stride)
    assert abs(by_hand / perplexity(scored, "response") - 1) < 1e-4
    print(f"perplexity of the shortest row: {by_hand:,.2f}, by hand and by the package")

# %% [markdown]
# `score` does this for all rows, in batches. The sum runs over all tokens of all rows and is divided once, so long
# answers count by their length. A text longer than `window` is read in windows that overlap, each token scored once.
#
# ## Questions to answer
#
# Each question of the test split is asked once, up to `samples` of them. In a conversation it is the last one, given
# all before it. Yours goes along.

# %%
example = example_settings(report)
warning = disclaimer or example.get("disclaimer", NEUTRAL_DISCLAIMER)
questions = questions_of(splits["test"], samples)
yours, asked = own_question(your_question or example.get("your_question"), questions)
print(
    f"{len(questions)} questions"
    if questions
    else "These rows are texts without questions: nothing is answered."
)

# %% [markdown]
# An answer *stops* if it ends with one of the stop tokens that were trained, within `max_new_tokens`. It *has the
# structure* if it is the answer template filled in. In a table of labels or short answers it is also compared word for
# word. As many are made at once as fit: a step of the model takes the same time for one or for ten.

# %%
sampling = (
    {"do_sample": True, "temperature": temperature, "top_p": top_p}
    if do_sample
    else {"do_sample": False}
)
results = {}


def ask(model, prompts):
    """The answers to some prompts, and the seconds that they took."""
    return generate(
        model, tokenizer, stops, prompts, eval_batch_size, max_new_tokens, seed, **sampling
    )


def examine(name, model):
    """Score the test rows and answer the questions, yours last, with one of the three models."""
    scores = score(model, test, tokenizer.pad_token_id, eval_batch_size, window, stride)
    results[name] = (scores, *ask(model, questions + yours))


# %% tags=["nbval-ignore-output"]
if not done:
    with adapted.disable_adapter():
        examine("base", adapted)
    examine("adapter", adapted)
adapted = None  # room for the next

# %% [markdown]
# ## Merged
#
# The merged model is loaded as anyone would load it, without PEFT and without 4 bits. Where notebook 3 left it on
# another machine, it is merged again, in memory.

# %% tags=["nbval-ignore-output"]
if not done:
    merged, evaluated_in = load_merged(merged_folder, run / "adapter", *source)
    examine("merged", merged)

# %% [markdown]
# ## How it is often done, and why not to
#
# Many notebooks, the one that this series grew out of among them, join ten *training* texts into one sequence and take
# the loss of that. To compare, it is computed once here, too:

# %%
if not done:
    often_done = joined_perplexity(merged, tokenizer, splits["train"]["text"][:10])
    merged = None

# %% [markdown]
# ## Save
#
# All figures get a 95% interval. What is shown further down is read from these files.

# %%
folder = run / "evaluation"
if not done:
    metrics = summarize_all(results, questions, groups, report, bootstrap_samples, seed)
    metrics["merged"] |= {"evaluated_in": evaluated_in} if evaluated_in else {}
    metrics["ten_joined_training_texts"] = {"perplexity": often_done}
if not done and processes.is_main_process:
    set_aside(run, "evaluation")
    with whole(folder) as partial:
        partial.mkdir()
        write_json(partial / "metrics.json", metrics)
        save_rows(partial, results, questions, groups, warning)
        own = {
            name: list(made["answer"][len(questions) :]) for name, (_, made, _) in results.items()
        }
        write_json(partial / "your_questions.json", {text: own for text in asked})
        plot_results(metrics).savefig(partial / "results.png", dpi=150)
    stage.record(report["fingerprint"], inputs)
processes.wait_for_everyone()
metrics = read_json(folder / "metrics.json", stage.name)

# %% [markdown]
# ## How sure is a number?
#
# Other test questions would have given other numbers. The *bootstrap* draws as many questions as there are, with
# replacement, again and again, each with all of its rows, as those are no independent witnesses. The middle 95% of what
# comes out is the interval. By hand, for the adapter:

# %%
import numpy as np
import pandas as pd

table = pd.read_parquet(folder / "scores.parquet").query("model == 'adapter'")
totals = table.groupby("group")[["response_nll", "response_tokens"]].sum().to_numpy()
random = np.random.default_rng(seed)
drawn = [
    totals[random.integers(len(totals), size=len(totals))].sum(axis=0)
    for _ in range(bootstrap_samples)
]
by_hand = np.exp([nll / tokens for nll, tokens in drawn])
print("the middle 95%: {:.2f} – {:.2f}".format(*np.percentile(by_hand, [2.5, 97.5])))

# %% [markdown]
# The package draws the same, and its interval is a little wider, by what the *t* distribution says of so few questions:

# %%
columns = (table["response_nll"], table["response_tokens"], table["group"])
assert np.allclose(by_hand, np.exp(resampled(*columns, bootstrap_samples, seed)))
print("perplexity:", with_interval(*stored(metrics["adapter"], "response perplexity"), ".2f"))

# %% [markdown]
# Rates get Wilson's interval: if 11 of 11 answers stop, the bootstrap sees no doubt, and Wilson says 74% to 100%. With
# fewer than six questions there is no interval at all: even if all of them agree, chance alone does that too often.
#
# ## Results

# %%
if metrics["base"]["too_small"]:
    print(
        f"The test split has {metrics['base']['questions']} questions: too few to say how sure these figures are."
    )
results_table(metrics)

# %% tags=["nbval-ignore-output"]
plot_results(metrics)

# %% [markdown]
# ### Which differences are real?
#
# Each line compares two models on the same rows, in pairs, as most of the doubt is in the rows and cancels. A
# perplexity is compared as a ratio. A difference is called one only if its interval excludes zero (for a ratio: 1). Of
# twenty intervals one does by chance alone, so a lone *yes* that barely does so means little.

# %%
differences_table(metrics["differences"])

# %% [markdown]
# ### Against the joined training texts
#
# The number that is often given usually comes out lower, for three reasons that have nothing to do with a better model:
# the texts were trained on, the prompts' boilerplate is counted, and nine of the ten texts can be copied in form from
# the one before.

# %%
print(f"ten training texts joined:      {metrics['ten_joined_training_texts']['perplexity']:,.1f}")
print(f"responses of the test split:    {metrics['merged']['perplexity']['response']:,.1f}")

# %% [markdown]
# ### Side by side
#
# The numbers say how often; reading says what.

# %%
answered = pd.DataFrame(read_lines(folder / "samples.jsonl")).drop(
    columns="disclaimer", errors="ignore"
)
side_by_side(answered.to_dict("list"), min(4, len(answered)), warning)

# %% [markdown]
# ## Ask it yourself
#
# Your own question went along with the others. To ask something else, set `your_question` above and run the notebook
# again: only the base and the adapter are loaded, and all the rest stays as it is.

# %% tags=["nbval-ignore-output"]
answers = read_json(folder / "your_questions.json", stage.name)
if set(asked) - set(answers):
    adapted = load_adapted(run / "adapter", *source)
    with adapted.disable_adapter():
        before = list(ask(adapted, yours)[0]["answer"])
    answers[asked[0]] = {"base": before, "adapter": list(ask(adapted, yours)[0]["answer"])}
    if processes.is_main_process:
        write_json(folder / "your_questions.json", answers)

# %%
says = {name: texts for text in asked for name, texts in answers[text].items()}
side_by_side({"question": asked, **says}, len(asked), warning)

# %% [markdown]
# ## What we have now
#
# Numbers on questions that the model had not seen, each with its interval:

# %%
before, after = (stored(metrics[name], "response perplexity")[0] for name in ("base", "merged"))
real = metrics["differences"]["adapter - base"]["log_perplexity"]["significant"]
print(
    f"Perplexity of new questions from {before:,.2f} to {after:,.2f}:",
    "a gain." if real else "it may be chance.",
)

# %% [markdown]
# Two things to try: `samples = 50`, for narrower intervals of what is counted on answers; `epochs = 3` in notebook 2,
# and see whether new questions gain as well.
#
# Next: [6 · trust](06_trust.ipynb) asks what else the training did; [chat](chat.ipynb) opens a page for more questions,
# and [report](report.ipynb) makes one page about the run.
