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
# # Compare runs
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/home-remedies-qlora/home-remedies-qlora/blob/main/notebooks/compare_runs.ipynb)
#
# - **In:** the folders of two or more runs of notebooks 1 to 4.
# - **Out:** this page. `make compare RUNS="a b"` renders it, code hidden, as one file that opens without a network.
# - **Time:** seconds; no GPU is used, no model is loaded, and nothing needs to be installed.

# %% [markdown] tags=["not-in-report"]
# ## Parameters

# %% tags=["parameters"]
runs = ["runs/home_remedies"]  # run folders, as a list or with spaces between; in Colab "drive:NAME" if they live there

# %% [markdown] tags=["not-in-report"]
# ## Tools
#
# What the notebooks of the series share stands in each of them, word for word: an error that shows as one line, and
# the way to a run that lives in Google Drive or on the Hugging Face Hub.

# %%
import hashlib
import json
import math
import os
import shutil
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm looks for widgets, and does without

import matplotlib.pyplot as plt
import pandas as pd
import pyarrow as pa
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from IPython.display import display

pd.set_option("styler.html.mathjax", False)  # a $ in a text is a dollar
plt.rcParams.update({"figure.dpi": 200, "font.size": 12, "text.parse_math": False, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


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
# ### Reading the runs
#
# A run may be unfinished, or older than this notebook: what is not there is left out. Only a file that is damaged, or a
# folder in which no stage ever ran, is an error.


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
def test_set(folder):
    """SHA-256 of the questions and answers of a run's test split; None if the split is not there."""
    digest, files = hashlib.sha256(), sorted((folder / "dataset" / "test").glob("*.arrow"))
    for file in files:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for row in batch.select(["prompt", "completion"]).to_pylist():
                    digest.update(json.dumps(row).encode())
    return digest.hexdigest() if files else None


def short_names(folders):
    """A name for each folder: its path below the folder that all of them are in."""
    paths = [os.path.abspath(folder) for folder in folders]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


# %%
places = runs.split() if isinstance(runs, str) else runs
if not places:
    raise StageError('No runs were named: make compare RUNS="runs/a runs/b"')
folders = list({os.path.abspath(folder): folder for folder in map(open_run, places)}.values())
named_runs = {name: read_run(folder) for name, folder in zip(short_names(folders), folders, strict=True)}
for r, folder in zip(named_runs.values(), folders, strict=True):
    r["test set"] = test_set(folder)


def choices_of(manifest):
    """Every parameter of a run as JSON, that of the latest stage that had it; not where the run stands."""
    found = {name: value for entry in manifest.values() for name, value in (at(entry, "parameters") or {}).items()}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items() if name != "run_dir"}


def tuned(metrics):
    """The entry of the fine-tuned model: the merged one, or the adapter's if nothing was merged."""
    return metrics.get("merged") or metrics.get("adapter")


# %% [markdown]
# # Runs beside each other
#
# Intervals are 95% intervals, written in brackets. The models are **educational**.


# %%
def tall(columns):
    """{name: texts} as a table, its longer side down the page."""
    frame = pd.DataFrame(columns).fillna("–")
    return show_table(frame if len(frame) >= len(columns) else frame.T)


def hindrances(runs):
    """What stands against comparing these runs: a list of sentences."""
    found = [f"{name} was not evaluated: 04_evaluate has not finished." for name, r in runs.items() if not r["metrics"]]
    for name, r in runs.items():
        evaluated = at(r["manifest"], "04_evaluate", "dataset_fingerprint")
        if evaluated and evaluated != r["data"].get("fingerprint"):
            found.append(f"WARNING: {name} was evaluated on another data set than it has now. Run 04_evaluate again.")
    fingerprints = {r["data"].get("fingerprint") for r in runs.values()}
    tests = {r["test set"] for r in runs.values()}
    if len(tests) > 1 or (tests == {None} and len(fingerprints) > 1):
        found.append("WARNING: these runs have different test sets. Their figures are not comparable.")
    elif len(fingerprints) > 1:
        found.append("The test set is the same in all runs; the rows for training, or how they are written, differ.")
    if len({at(choices_of(r["manifest"]), "base_model") for r in runs.values()}) > 1:
        found.append("WARNING: the base models differ. Perplexity counts tokens, and each tokenizer cuts its own.")
    return found


print("\n".join(hindrances(named_runs)) or "All runs were evaluated, on the same test set.")

# %%
overview = {
    name: {
        "base model": (at(choices_of(r["manifest"]), "base_model") or "–").strip('"'),
        "rows for training": written(at(r["data"], "splits", "train"), None, "{:,}"),
        "rows for the test": written(at(r["data"], "splits", "test"), None, "{:,}"),
        "data set (fingerprint)": r["data"].get("fingerprint") or "–",
        "finished": max((str(at(entry, "finished")) for entry in r["manifest"].values()), default="–"),
    }
    for name, r in named_runs.items()
}
tall(overview)

# %% [markdown]
# ## Parameters that differ

# %%
chosen = pd.DataFrame({name: choices_of(r["manifest"]) for name, r in named_runs.items()}).fillna("–")
chosen = chosen[chosen.nunique(axis="columns") > 1]
tall(chosen) if chosen.size else print("None: all runs had the same parameters.")

# %% [markdown]
# ### What else differs
#
# The same parameters on another machine, or with other versions, may give other figures.


# %%
def surroundings(manifest):
    """What a run ran on: versions, hardware, commit; the last stage's, if stages differ."""
    found = {}
    for entry in manifest.values():
        found |= {"GPU": at(entry, "gpu"), "platform": at(entry, "platform"), "Python": at(entry, "python")}
        found |= {"commit": at(entry, "git_commit"), **(at(entry, "packages") or {})}
    return found


around = pd.DataFrame({name: surroundings(r["manifest"]) for name, r in named_runs.items()}).fillna("–")
around = around[around.nunique(axis="columns") > 1]
tall(around) if around.size else print("Nothing: the same versions, on the same hardware.")

# %% [markdown]
# ## Figures
#
# Of the fine-tuned models, the merged one where there is one. Where two intervals meet, the runs are not told apart by
# this test set.

# %%
figures = {
    name: {
        figure: written(*figure_of(tuned(r["metrics"]), figure), form)
        for figure, (_, form) in FIGURES.items()
        if any(figure_of(tuned(other["metrics"]), figure)[0] is not None for other in named_runs.values())
    }
    for name, r in named_runs.items()
}
for name, r in named_runs.items():
    before = figure_of(r["metrics"].get("base"), "response perplexity")
    figures[name] = {"base: response perplexity": written(*before)} | figures[name]
tall(figures)

# %%
measured = {name: figure_of(tuned(r["metrics"]), "response perplexity") for name, r in named_runs.items()}
measured = {name: found for name, found in measured.items() if found[0] is not None}
if measured:
    best = min(measured, key=lambda name: measured[name][0])
    limit = (measured[best][1] or [measured[best][0]] * 2)[1]
    as_good = [name for name, (value, ci95) in measured.items() if name != best and (ci95 or [value])[0] <= limit]
    print(f"The lowest response perplexity: {best}, {written(*measured[best])}.")
    print("Not told apart from it: " + (", ".join(as_good) or "none of the others") + ".")

# %%
if measured:
    figure, axes = plt.subplots(figsize=(5.6, 1.2 + 0.42 * len(measured)), layout="constrained")
    for place, (value, ci95) in enumerate(measured.values()):
        axes.plot(ci95 or [value, value], [place, place], "|-", color="black", markersize=10)
        axes.plot(value, place, "o", color="0.6", markeredgecolor="black", markersize=8)
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set(xlabel="response perplexity, 95% interval")
    show(figure, "Dot chart of response perplexity: " + ", ".join(f"{n} {written(*f)}" for n, f in measured.items()))

# %% [markdown]
# ## Training

# %%
TRAINING = {
    "steps": "{:,}",
    "examples": "{:,}",
    "seconds": "{:,.0f}",
    "tokens_per_second": "{:,.0f}",
    "peak_memory_gib": "{:.2f}",
    "trainable_parameters": "{:,}",
    "eval_loss_before": "{:.3f}",
    "eval_loss_after": "{:.3f}",
}
trained = {
    name: {key.replace("_", " "): written(r["training"].get(key), None, form) for key, form in TRAINING.items()}
    for name, r in named_runs.items()
}
tall(trained)

# %%
curves = {}
for name, r in named_runs.items():
    history = pd.DataFrame(r["history"]).reindex(columns=["step", "eval_loss"]).dropna()
    if is_number(r["training"].get("eval_loss_before")):
        history = pd.concat([pd.DataFrame({"step": [0], "eval_loss": [r["training"]["eval_loss_before"]]}), history])
    if len(history):
        curves[name] = history.groupby("step")["eval_loss"].first()
if curves:
    figure, axes = plt.subplots(figsize=(5.6, 3.4 + 0.24 * len(curves)), layout="constrained")
    for place, (name, losses) in enumerate(curves.items()):
        shade = plt.cm.viridis(0.9 * place / max(1, len(curves) - 1))
        axes.plot(losses, "os^Dv*P"[place % 7], linestyle=["-", "--", ":", "-."][place % 4], color=shade, label=name)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats a token)")
    figure.legend(loc="outside lower center", ncols=1)
    show(figure, "Line chart: validation loss of each run over the optimizer steps")

# %% [markdown] tags=["not-in-report"]
# ## What we have now
#
# The runs beside each other, with what differs between them. `make sweep GRID=...` makes such runs from a grid.
