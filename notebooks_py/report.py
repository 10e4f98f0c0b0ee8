# ---
# jupyter:
#   colab:
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

# %% [markdown] tags=["not-in-report"]
# # Report of a run
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/report.ipynb)
#
# - **In:** the run folder that notebooks 1 to 4 filled, or as many of them as have run.
# - **Out:** this page. `make report RUN_DIR=...` renders it, code hidden, as `report.html` in the run folder: one file
#   that opens without a network, on a phone, and prints.
# - **Time:** seconds; no GPU is used, no model is loaded, and nothing needs to be installed.

# %% [markdown] tags=["not-in-report"]
# ## Parameters

# %% tags=["parameters"]
run_dir = "runs/home_remedies"  # that of notebooks 1 to 4; in Colab "drive:home_remedies" if it lives there
price_per_hour = 1.0  # of your machine, in your currency: a stage costs its hours times this; 0 shows no costs
answers_shown = 20  # how many questions are shown with their answers

# %% [markdown] tags=["not-in-report"]
# ## Tools
#
# What the notebooks of the series share stands in each of them, word for word: an error that shows as one line, and
# the way to a run that lives in Google Drive or on the Hugging Face Hub.

# %%
import json
import math
import shutil
import warnings
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm looks for widgets, and does without

import matplotlib.pyplot as plt
import pandas as pd
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from IPython.display import display

pd.set_option("styler.html.mathjax", False)  # a $ in an answer is a dollar
plt.rcParams.update({"figure.dpi": 200, "font.size": 12, "text.parse_math": False, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

STAGES = ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate"]
DISCLAIMER = "Educational example, not medical advice. In an emergency call your local emergency number."


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


# %% [markdown] tags=["not-in-report"]
# ### Reading a run
#
# A run may be unfinished, or older than this notebook: what is not there is missing from the report, which says so.
# Only a file that is damaged, or a folder in which no stage ever ran, is an error.


# %%
def read_result(path, kind=dict):
    """The JSON in a file of the run, a `kind`; an empty one if there is no file. Raises StageError if it is damaged."""
    if not path.exists():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}). Run the stage that writes it again.") from None
    if not isinstance(found, kind):
        raise StageError(f"{path} holds no {kind.__name__} but {found!r:.40}. Run the stage that writes it again.")
    return found


def read_run(folder):
    """What the stages left in a run folder, {file: its content}, empty where there is none.

    Raises StageError if no stage has run there.
    """
    files = {"manifest": "manifest.json", "data": "dataset/report.json", "training": "training/metrics.json"}
    files |= {"merge": "merged/merge_report.json", "metrics": "evaluation/metrics.json"}
    if not folder.is_dir():
        raise StageError(f"{folder}: there is no such folder. Name the run folder of notebooks 1 to 4.")
    found = {name: read_result(folder / file) for name, file in files.items()}
    found["history"] = read_result(folder / "training" / "log_history.json", list)
    if not any(found.values()):
        raise StageError(f"{folder} is no run folder: no stage has left anything in it. Run 01_format_dataset first.")
    return found


def at(value, *keys):
    """What stands under `keys` in dictionaries within dictionaries; None where one of them is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# %% [markdown] tags=["not-in-report"]
# ### Figures and their intervals
#
# Where `evaluation/metrics.json` has a figure, its 95% interval has the same name with `_ci95`, or is `ci95`.


# %%
FIGURES = {  # name: (where it stands in the entry of a model, how it is written)
    "response perplexity": ("perplexity response", "{:,.2f}"),
    "perplexity, training rows": ("by_split train response", "{:,.2f}"),
    "perplexity, validation rows": ("by_split validation response", "{:,.2f}"),
    "perplexity, test rows": ("by_split test response", "{:,.2f}"),
    "perplexity, questions not in training": ("by_split unseen response", "{:,.2f}"),
    "perplexity outside the domain": ("outside perplexity", "{:,.2f}"),
    "full-text perplexity": ("perplexity full_text", "{:,.2f}"),
    "answers that stop": ("generation stop_rate", "{:.0%}"),
    "answers with the structure": ("generation structure_rate", "{:.0%}"),
    "mean new tokens": ("generation mean_new_tokens", "{:.0f}"),
    "emergencies: sends for help": ("safety emergency seeks_help", "{:.0%}"),
    "emergencies: offers a remedy": ("safety emergency offers_remedy", "{:.0%}"),
    "everyday: sends for help": ("safety everyday seeks_help", "{:.0%}"),
    "everyday: offers a remedy": ("safety everyday offers_remedy", "{:.0%}"),
    "items named, for this question": ("grounding this_condition", "{:.0%}"),
    "items named, for another one": ("grounding other_condition", "{:.0%}"),
    "items named, nowhere in the table": ("grounding nowhere", "{:.0%}"),
}


def figure_of(model, name):
    """A figure of a model's entry in `evaluation/metrics.json`: (value, [low, high]), None for what is not there."""
    *keys, last = FIGURES[name][0].split()
    value, ci95 = at(model, *keys, last), at(model, *keys, f"{last}_ci95") or at(model, *keys, "ci95")
    return (value if is_number(value) else None), ci95


def is_number(value):
    """Whether there is a value, and it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def written(value, ci95=None, form="{:,.2f}"):
    """A figure with its interval, as text; "–" if there is none."""
    if not is_number(value):
        return "–"
    interval = " ({} – {})".format(*map(form.format, ci95)) if ci95 and all(map(is_number, ci95)) else ""
    return form.format(value) + interval


def show_table(texts, index=True):
    """A frame of texts, or {name: text}, as an HTML table in which every text stays text, markup and $ included."""
    facts = isinstance(texts, dict)
    frame = pd.DataFrame({"": texts}) if facts else texts
    styled = frame.astype(str).style.format(escape="html").format_index(escape="html")
    styled = styled.format_index(escape="html", axis="columns").set_table_attributes('class="mathjax_ignore"')
    if facts:
        return styled.hide(axis="columns").set_table_attributes('class="facts mathjax_ignore"')
    return styled if index else styled.hide(axis="index")


def show(figure, alt):
    """Show a figure, with a text for those who cannot see it."""
    width = round(figure.get_figwidth() * 100)
    display(figure, metadata={"image/png": {"alt": alt, "width": width}})
    plt.close(figure)


# %%
run = open_run(run_dir)
found = read_run(run)
manifest, data, training, merge, metrics = (found[k] for k in ("manifest", "data", "training", "merge", "metrics"))
models = {name: metrics[name] for name in ("base", "adapter", "merged") if isinstance(metrics.get(name), dict)}
if not is_number(price_per_hour) or price_per_hour < 0:
    raise StageError(f"price_per_hour={price_per_hour!r}: give a number, what an hour of the machine costs, or 0.")

# %% [markdown]
# # What this run made
#
# [What ran](#What-ran) · [data](#Data) · [training](#Training) · [perplexity](#Perplexity) · [merge](#Merge) ·
# [answers](#Answers) · [safety](#Safety) · [grounding](#Grounding) · [memory](#Memorized-or-learned) ·
# [time and cost](#Time,-memory,-cost) · [parameters](#Parameters-of-the-run) · [provenance](#Provenance)
#
# Intervals are 95% intervals, written in brackets. The model is **educational**: heed the disclaimer above its answers.


# %%
def parameters_of(manifest):
    """Every parameter of the run, that of the latest stage that had it."""
    return {name: value for entry in manifest.values() for name, value in (at(entry, "parameters") or {}).items()}


def hardware(entry):
    """What a stage ran on: the GPU, or the platform without one."""
    return at(entry, "gpu") or f"CPU, {at(entry, 'platform')}"


parameters = parameters_of(manifest)
MODEL_NAMES = {"base": "base", "adapter": "with the adapter", "merged": "merged"}
if "evaluated_in" in models.get("merged", {}):  # it did not fit in 16 bits
    MODEL_NAMES["merged"] += ", in 4 bits"
summary = pd.DataFrame(
    {
        MODEL_NAMES[name]: {
            figure: written(*figure_of(model, figure), FIGURES[figure][1])
            for figure in ("response perplexity", "answers that stop", "answers with the structure", "mean new tokens")
        }
        for name, model in models.items()
    }
)
show_table(summary) if models else print("Not evaluated yet: run 04_evaluate.")


# %%
def apart(one, other):
    """Whether two intervals tell two figures apart: "yes", "no", or "no interval"."""
    if not (one and other):
        return "no interval"
    return "yes" if one[1] < other[0] or other[1] < one[0] else "no"


tuned = next((name for name in ("merged", "adapter") if name in models), None)
before, after = (figure_of(metrics.get(name), "response perplexity") for name in ("base", tuned))
if before[0] and after[0]:
    change = {"yes": "The intervals do not meet.", "no": "The intervals meet: the models are not told apart."}
    print(f"Response perplexity on questions that were not in training: {before[0]:,.2f} before fine-tuning,")
    print(f"{after[0]:,.2f} after. {change.get(apart(before[1], after[1]), '')}")

# %% [markdown]
# ## What ran


# %%
def doubts(manifest):
    """What a reader of this run must know before trusting its figures: a list of sentences."""
    stages = [stage for stage in STAGES if stage in manifest]
    found = [f"{stage} left no record: what it makes is missing below." for stage in STAGES if stage not in manifest]
    for earlier, later in pairwise(stages):
        if str(at(manifest, later, "finished")) < str(at(manifest, earlier, "finished")):
            found.append(f"{earlier} ran again after {later}: what {later} says is of something older.")
    if len({at(manifest, stage, "dataset_fingerprint") for stage in stages}) > 1:
        found.append("The stages did not work on the same data set: their figures do not belong together.")
    return found


print("\n".join(doubts(manifest)) or "All four notebooks ran, one after the other, on one data set.")

# %%
ran_on = dict.fromkeys(hardware(entry) for entry in manifest.values())
adapter_settings = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
training_settings = ("epochs", "learning_rate", "batch_size", "gradient_accumulation_steps", "max_length", "packing")


def settings(names):
    """Some parameters of the run in one line."""
    return ", ".join(f"{name} {parameters[name]}" for name in names if name in parameters) or "–"


show_table(
    {
        "run folder": str(run),
        "base model": parameters.get("base_model") or data.get("base_model") or "–",
        "table": parameters.get("dataset") or "–",
        "ran on": "; ".join(ran_on) or "–",
        "finished": max((str(at(entry, "finished")) for entry in manifest.values()), default="–"),
        "adapter": settings(adapter_settings),
        "training": settings(training_settings),
    }
)

# %% [markdown]
# ## Data
#
# Rows of the table that came in, those that were dropped and why, and what was left. The splits go by question: no
# question of the test split is in training.

# %%
if data:
    splits = data.get("splits") or {}
    cut = data.get("split_long_answers") or {}
    rows = {"in the table": data.get("rows_in")}
    rows |= {f"dropped: {reason}": -count for reason, count in (data.get("dropped") or {}).items()}
    rows |= {"more, as long answers were split": cut.get("into", 0) - cut.get("rows", 0)}
    rows |= {"left": data.get("rows_out")}
    rows |= {f"for {split}": count for split, count in splits.items()}
    rows |= {"safety examples mixed into training": data.get("safety_rows") or 0}
    display(show_table({name: f"{count:,} rows".replace("-", "−") for name, count in rows.items() if count}))
    tokens = data.get("tokens") or {}
    print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in tokens.items()), "(tokens an example)")
else:
    print("No dataset/report.json: run 01_format_dataset.")

# %% [markdown]
# ## Training
#
# The loss on the training rows as it fell, and on the validation rows, which were not trained on. Where the second
# turns up while the first goes on falling, the model has begun to memorize.

# %%
history = pd.DataFrame(found["history"]).reindex(columns=["step", "loss", "eval_loss"])
training_loss = history.dropna(subset="loss").set_index("step")["loss"]
validation_loss = history.dropna(subset="eval_loss").groupby("step")["eval_loss"].first()
if is_number(training.get("eval_loss_before")):
    validation_loss = pd.concat([pd.Series({0: training["eval_loss_before"]}), validation_loss])
if len(training_loss) or len(validation_loss):
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    axes.plot(training_loss, color="0.6", label="training")
    axes.plot(validation_loss, "ko-", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.legend()
    show(figure, "Line chart: training and validation loss over the optimizer steps")
else:
    print("No loss curve: 02_finetune_qlora has not finished.")

# %%
TRAINING = {
    "steps": "{:,}",
    "epochs": "{:,.2f}",
    "examples": "{:,}",
    "tokens": "{:,}",
    "seconds": "{:,.0f}",
    "tokens_per_second": "{:,.0f}",
    "trainable_parameters": "{:,}",
    "trainable_percent": "{:.2f}",
    "eval_loss_before": "{:.3f}",
    "eval_loss_after": "{:.3f}",
}
if training:
    told = {name.replace("_", " "): written(training.get(name), None, form) for name, form in TRAINING.items()}
    display(show_table(told))

# %% [markdown]
# ## Perplexity
#
# On the answers of the test split. Lower is better; where two intervals meet, the models are not told apart.

# %%
SHADES = {"base": "0.85", "adapter": "0.6", "merged": "0.35"}
bars = {name: figure_of(model, "response perplexity") for name, model in models.items()}
bars = {name: (value, ci95) for name, (value, ci95) in bars.items() if value is not None}
if bars:
    figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    for place, (name, (value, ci95)) in enumerate(bars.items()):
        [bar] = axes.bar(place, value, color=SHADES[name], edgecolor="black")
        if ci95:
            axes.plot([place, place], ci95, "_-k", markersize=14)
    axes.set_xticks(range(len(bars)), [f"{MODEL_NAMES[name]}\n{value:,.2f}" for name, (value, _) in bars.items()])
    axes.set(ylabel="response perplexity")
    show(figure, f"Bar chart of response perplexity: {', '.join(f'{n} {written(*f)}' for n, f in bars.items())}")
else:
    print("Not measured: 04_evaluate has not finished.")

# %% [markdown]
# ## Merge
#
# How far the merged model is from what was trained, the adapter on the base in NF4. KL is the mean Kullback–Leibler
# divergence of a token's distribution from that model's, in nats.

# %%
if merge:
    lines = {
        "merged into": f"{merge.get('base_weights', '–')} weights",
        "merged modules": written(merge.get("merged_modules"), None, "{:,}"),
        "files": written(merge.get("shards"), None, "{:,}"),
        "largest difference of a logit": written(merge.get("max_logit_difference"), None, "{:.3g}"),
        "range of the logits": written(merge.get("logit_range"), None, "{:.3g}"),
        "same next token": written(merge.get("same_next_token"), None, "{:.1%}"),
    }
    display(show_table(lines))
else:
    print("No merged/merge_report.json: 03_merge_adapter has not finished.")
fidelity = metrics.get("fidelity") or {}
rows = {
    name: {
        "perplexity": written(at(variant, "perplexity"), at(variant, "ci95")),
        "KL": written(at(variant, "kl"), at(variant, "kl_ci95"), "{:.4f}"),
    }
    for name, variant in fidelity.items()
}
show_table(pd.DataFrame(rows).T) if rows else print("Other ways to merge were not measured in this run.")

# %% [markdown]
# ## Answers
#
# First the figures of the base model and the fine-tuned one beside each other, those that differ on top; then their
# answers to questions that were not in training, beside what the table says. Read them: a figure says how often, not
# what.


# %%
compared = []
for name, (_, form) in FIGURES.items():
    before, after = (figure_of(metrics.get(model), name) for model in ("base", tuned))
    if before[0] is not None and after[0] is not None:
        row = {"figure": name, "base": written(*before, form), "fine-tuned": written(*after, form)}
        compared.append(row | {"told apart": apart(before[1], after[1])})
compared.sort(key=lambda row: ["yes", "no interval", "no"].index(row["told apart"]))
show_table(pd.DataFrame(compared).set_index("figure").rename_axis(None)) if compared else print(
    "Not evaluated yet: run 04_evaluate."
)

# %% [markdown]
# A difference taken row by row is sharper than two intervals beside each other. Those that notebook 4 measured, the
# ones whose interval leaves out zero on top:


# %%
def written_difference(name, entry):
    """A difference in `evaluation/metrics.json` as text: of logarithms as a ratio, of rates in points of percent."""
    value, ci95 = at(entry, "difference"), at(entry, "ci95") or []
    if not all(map(is_number, (value, *ci95))):
        return "–"
    if "log_perplexity" in name:
        return "× " + written(math.exp(value), [math.exp(limit) for limit in ci95], "{:,.3g}")
    if name.endswith(("rate", "seeks_help", "offers_remedy")):
        return written(100 * value, [100 * limit for limit in ci95], "{:+.0f}") + " points"
    return written(value, ci95, "{:+,.3g}")


differences = [
    {
        "models": pair,
        "figure": name.replace("log_perplexity", "perplexity").replace("_", " "),
        "difference": written_difference(name, entry),
        "a difference": "yes" if at(entry, "significant") else "cannot be told",
    }
    for pair, entries in (metrics.get("differences") or {}).items()
    for name, entry in (entries or {}).items()
]
differences.sort(key=lambda row: row["a difference"] != "yes")
show_table(pd.DataFrame(differences), index=False) if differences else print("None were measured in this run.")


# %%
def read_results(path):
    """The objects of a .jsonl file, none if there is no file. Raises StageError if it is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}). Run 04_evaluate again.") from None


def answers_side_by_side(rows, columns, disclaimer):
    """Texts side by side under the disclaimer, one line of the table a row. `columns`: {key in a row: heading}.

    On a narrow screen the template puts the texts of a row below each other, each under its heading.
    """
    columns = {key: heading for key, heading in columns.items() if any(row.get(key) for row in rows)}
    texts = pd.DataFrame([[row.get(key) or "–" for key in columns] for row in rows])
    texts.columns = pd.MultiIndex.from_product([[disclaimer], columns.values()])
    styles = [{"selector": "td, th", "props": "text-align: left; vertical-align: top; white-space: pre-wrap"}]
    for place, heading in enumerate(columns.values()):
        styles.append({"selector": f"td.col{place}::before", "props": f"content: '{heading}'; display: none"})
    styled = show_table(texts, index=False).set_table_styles(styles)
    return styled.set_table_attributes('class="answers mathjax_ignore"')


samples = read_results(run / "evaluation" / "samples.jsonl")
disclaimer = next((row["disclaimer"] for row in samples if row.get("disclaimer")), None)
disclaimer = disclaimer or parameters.get("disclaimer") or DISCLAIMER
headings = {"question": "question", "in_the_table": "in the table", "base": "base", tuned: "fine-tuned"}
print(f"{min(answers_shown, len(samples))} of {len(samples)} questions that were answered.")
if samples:
    display(answers_side_by_side(samples[:answers_shown], headings, disclaimer))

# %% [markdown]
# ## Safety
#
# For a model on health: how often an answer sends the reader for help, and how often it offers something from the
# kitchen instead, when the question is an emergency and when it is not.


# %%
def models_beside(names):
    """The figures `names` of all models beside each other, those that were measured."""
    rows = {
        name: {MODEL_NAMES[key]: written(*figure_of(model, name), FIGURES[name][1]) for key, model in models.items()}
        for name in names
        if any(figure_of(model, name)[0] is not None for model in models.values())
    }
    return pd.DataFrame(rows).T


safety = models_beside([name for name in FIGURES if "safety" in FIGURES[name][0]])
show_table(safety) if len(safety) else print("Not measured in this run.")

# %% [markdown]
# The answers to the emergencies, those where the fine-tuned model does the wrong thing on top:

# %%
asked = {}
for row in read_results(run / "evaluation" / "safety.jsonl"):
    if row.get("kind") == "emergency":
        entry = asked.setdefault(row.get("prompt"), {"question": row.get("prompt"), "bad": 0})
        entry[row.get("model")] = row.get("answer")
        if row.get("model") == tuned:
            entry["bad"] = bool(row.get("offers_remedy")) + (not row.get("seeks_help"))
worst = sorted(asked.values(), key=lambda entry: -entry["bad"])
if worst:
    print(
        f"{min(answers_shown, len(worst))} of {len(worst)} emergencies; {sum(e['bad'] > 0 for e in worst)} went wrong."
    )
    display(answers_side_by_side(worst[:answers_shown], headings, disclaimer))

# %% [markdown]
# ## Grounding
#
# Of the items that the answers name: how many stand in the training table for that question, how many for another one,
# how many nowhere.

# %%
grounding = models_beside([name for name in FIGURES if "grounding" in FIGURES[name][0]])
show_table(grounding) if len(grounding) else print("Not measured in this run.")

# %% [markdown]
# ## Memorized or learned
#
# The perplexity on rows that the model was trained on, and on rows that it was not. A large gap between the first and
# the others is memory; a fall on all of them is learning. Outside the domain it should not rise.

# %%
split_figures = [name for name in FIGURES if "by_split" in FIGURES[name][0] or "outside" in FIGURES[name][0]]
memory = models_beside(split_figures)
show_table(memory) if len(memory) else print("Not measured in this run.")

# %%
if len(memory):
    figure, axes = plt.subplots(figsize=(5.6, 0.9 + 0.7 * len(memory)), layout="constrained")
    for model_place, name in enumerate(models):
        for place, split in enumerate(memory.index):
            value, ci95 = figure_of(models[name], split)
            height = place + 0.2 * (model_place - 1)
            if value is not None:
                axes.plot(ci95 or [value, value], [height, height], "|-", color="black", markersize=8)
                axes.plot(value, height, "os^"[model_place], color=SHADES[name], markeredgecolor="black")
    for model_place, name in enumerate(models):
        label = MODEL_NAMES[name]
        axes.plot([], "os^"[model_place], color=SHADES[name], markeredgecolor="black", label=label)
    axes.set_yticks(range(len(memory)), [name.removeprefix("perplexity, ") for name in memory.index])
    axes.invert_yaxis()
    axes.set(xlabel="response perplexity", xscale="log")
    axes.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    figure.legend(loc="outside upper center", ncols=3)
    show(figure, "Dot chart: perplexity of each model on training rows, other rows and other texts, with intervals")

# %% [markdown]
# ## Time, memory, cost
#
# Of each notebook's last run, set-up included; one that was interrupted and went on counts from there.

# %%
stages = {}
for stage in [*STAGES, *(name for name in manifest if name not in STAGES)]:
    entry = manifest.get(stage)
    seconds = at(entry, "seconds")
    stages[stage] = {
        "time": written(seconds, None, "{:,.0f} s"),
        "memory": written(at(entry, "peak_memory_gib", "host"), None, "{:.1f} GiB"),
        "GPU memory": written(at(entry, "peak_memory_gib", "gpu"), None, "{:.1f} GiB"),
        "cost": written(seconds / 3600 * price_per_hour if is_number(seconds) else None, None, "{:,.3f}"),
    }
total = sum(at(entry, "seconds") for entry in manifest.values() if is_number(at(entry, "seconds")))
stages["all"] = {"time": f"{total:,.0f} s", "memory": "", "GPU memory": ""}
stages["all"]["cost"] = f"{total / 3600 * price_per_hour:,.3f}"
costs = pd.DataFrame(stages).T
display(show_table(costs if price_per_hour else costs.drop(columns="cost")))
if price_per_hour:
    print(f"Cost: at {price_per_hour:g} an hour. Set price_per_hour to what your machine costs; 0 shows no costs.")

# %% [markdown]
# ## Parameters of the run
#
# As `manifest.json` has them. Where notebooks ran with different values, each value has the numbers of its notebooks.


# %%
def values_of(name):
    """The value of a parameter as JSON, or every value with the stages that had it."""
    values = {}
    for stage, entry in manifest.items():
        if name in (at(entry, "parameters") or {}):
            values.setdefault(json.dumps(entry["parameters"][name], ensure_ascii=False), []).append(stage.split("_")[0])
    return "\n".join(f"{', '.join(of)}: {value}" if len(values) > 1 else value for value, of in values.items())


given = {name: values_of(name) for name in parameters}
show_table(given) if given else print("No manifest.json in this run folder.")

# %% [markdown]
# ## Provenance
#
# What to state beside a figure from this run, and what to install to get it again.

# %%
lines = {"data set (fingerprint)": {data.get("fingerprint")}}
for entry in manifest.values():
    known = {"data set (fingerprint)": "dataset_fingerprint", "commit": "git_commit", "Python": "python"}
    known |= {"platform": "platform", "GPU": "gpu"}
    for name, key in known.items():
        lines.setdefault(name, set()).add(at(entry, key))
    for package, number in (at(entry, "packages") or {}).items():
        lines.setdefault(package, set()).add(number)
versions = {name: ", ".join(sorted(map(str, values - {None}))) or "none" for name, values in lines.items()}
show_table(versions)

# %% [markdown] tags=["not-in-report"]
# ## What we have now
#
# A page to hand on. `make compare RUNS="a b"` puts it beside other runs.
