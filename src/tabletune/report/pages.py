"""What the page about a run and the comparison of runs share: reading runs, figures, tables whose text stays text.

A run may be unfinished, or older than this package: what is not there is left out. Only a damaged file, or a folder in
which no stage ever ran, is an error.
"""

import hashlib
import json
import math
from html import escape

import pandas as pd
from IPython.display import HTML, display

from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.errors import StageError
from tabletune.report.tables import side_by_side
from tabletune.report.text import COLUMNS, figures_of, with_interval
from tabletune.run.files import read_json

PLAIN = "mathjax_ignore tex2jax_ignore"  # the classes of HTML in which a $ is a dollar, in notebooks of today and before
STAGES = ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate", "06_trust"]
FILES = {  # what the stages leave: (file, its kind, the stage)
    "manifest": ("manifest.json", dict, STAGES[0]),
    "data": ("dataset/report.json", dict, STAGES[0]),
    "training": ("training/metrics.json", dict, STAGES[1]),
    "history": ("training/log_history.json", list, STAGES[1]),
    "merge": ("merged/merge_report.json", dict, STAGES[2]),
    "evaluation": ("evaluation/metrics.json", dict, STAGES[3]),
    "trust": ("trust/metrics.json", dict, STAGES[4]),
}
FIGURES = {  # name: (where it stands in the entry of a model, a way to merge or a stage, how it is written)
    **{name: (f"{group} {key}", form) for name, (group, key, form) in COLUMNS.items()},
    "perplexity, training rows": ("by_split train response", ",.2f"),
    "perplexity, validation rows": ("by_split validation response", ",.2f"),
    "perplexity, test rows": ("by_split test response", ",.2f"),
    "perplexity, other texts": ("outside perplexity", ",.2f"),
    "emergencies: sends for help": ("safety emergency seeks_help", ".0%"),
    "emergencies: offers a remedy": ("safety emergency offers_remedy", ".0%"),
    "everyday: sends for help": ("safety everyday seeks_help", ".0%"),
    "everyday: offers a remedy": ("safety everyday offers_remedy", ".0%"),
    "items named, for this question": ("grounding this_condition", ".0%"),
    "items named, for another one": ("grounding other_condition", ".0%"),
    "items named, nowhere in the table": ("grounding nowhere", ".0%"),
    "perplexity on the rows compared": ("perplexity", ",.2f"),
    "KL from what was trained": ("kl", ".4f"),
    "same next token": ("same_next_token", ".1%"),
    "validation loss before": ("eval_loss_before", ".3f"),
    "validation loss after": ("eval_loss_after", ".3f"),
    "optimizer steps": ("steps", ",.0f"),
    "tokens a second": ("tokens_per_second", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "memory, GiB": ("peak_memory_gib host", ",.1f"),
    "GPU memory, GiB": ("peak_memory_gib gpu", ",.1f"),
}


def read_run(folder):
    """What the stages left in a run folder, {name in FILES: content}, empty where there is none, and made of it:

    `metrics`, what notebooks 4 and 5 measured; `models`, {name: its entry there}; `tuned`, the key of the fine-tuned
    one, merged if it is; `parameters` and `surroundings`, what ran with which versions on what, {name: text}. Raises
    StageError if no stage has run there, or if a file is damaged.
    """
    found = {}
    for name, (file, kind, stage) in FILES.items():
        found[name] = read_json(folder / file, stage) if (folder / file).exists() else kind()
        if not isinstance(found[name], kind):
            raise StageError(f"{folder / file} holds no {kind.__name__}. Run {stage} again.")
    if not any(found.values()):
        raise StageError(
            f"{folder} is no run folder: no stage has left anything there. Run {STAGES[0]} first."
        )
    found["metrics"] = joined(found["evaluation"], found["trust"])
    found["models"] = figures_of(found["metrics"])
    found["tuned"] = next(
        (name for name in ("merged", "adapter") if name in found["metrics"]), None
    )
    entries = found["manifest"].values()
    names = {"GPU": "gpu", "platform": "platform", "Python": "python", "commit": "git_commit"}
    around = [
        {name: at(e, key) or "none" for name, key in names.items()} | (at(e, "packages") or {})
        for e in entries
    ]
    found["parameters"] = as_texts(at(entry, "parameters") or {} for entry in entries)
    found["surroundings"] = as_texts(around)
    return found


def as_texts(dictionaries):
    """{name: its value as text} of several dictionaries; where they do not agree, one value after the other."""
    texts = {}
    for name, value in (item for dictionary in dictionaries for item in dictionary.items()):
        text = value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        texts.setdefault(name, {})[text] = None
    return {name: " | ".join(values) for name, values in texts.items()}


def joined(one, other):
    """Two nested dictionaries as one, `other` on top."""
    nested = {key for key in one if isinstance(one[key], dict) and isinstance(other.get(key), dict)}
    return one | other | {key: joined(one[key], other[key]) for key in nested}


def at(value, *keys):
    """What stands under `keys` in dictionaries within dictionaries; None where one of them is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_lines(path):
    """The objects of a .jsonl file, none if there is no file. Raises StageError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise StageError(
            f"{path} cannot be read ({error}). Run the notebook that writes it again."
        ) from None


def figure_of(entry, name):
    """One of FIGURES, of an entry: (value, [low, high]), None for what was not measured or is not finite."""
    *keys, last = FIGURES[name][0].split()
    ci95 = at(entry, *keys, f"{last}_ci95") or at(entry, *keys, "ci95") or [None]
    values = [at(entry, *keys, last), *ci95]
    value, *ci95 = [x if isinstance(x, (int, float)) and math.isfinite(x) else None for x in values]
    return value, None if None in ci95 else ci95


def figures_table(entries, names=FIGURES):
    """The figures `names`, those that were measured, as a frame of texts: a line a figure, a column an entry."""
    lines = {
        name: {
            column: with_interval(*figure_of(entry, name), FIGURES[name][1])
            for column, entry in entries.items()
        }
        for name in names
        if any(figure_of(entry, name)[0] is not None for entry in entries.values())
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def doubts(found):
    """What a reader must know before trusting the figures of a run: a list of sentences."""
    manifest, data, models = found["manifest"], found["data"], found["models"]
    ran = [stage for stage in STAGES if stage in manifest]
    risk = figure_of(found["metrics"].get(found["tuned"]), "emergencies: offers a remedy")[0]
    said = [f"In emergencies {risk:.0%} of its answers offer a remedy."] if risk else []
    said += [
        f"{stage} left no record: what it makes is missing here."
        for stage in STAGES[:4]
        if stage not in ran
    ]
    for place, stage in enumerate(ran):
        when = str(at(manifest, stage, "finished"))
        older = [later for later in ran[place + 1 :] if str(at(manifest, later, "finished")) < when]
        if older and stage != "04_evaluate":  # on which 05 does not build
            said.append(
                f"{stage} ran again after {', '.join(older)}, which tell of something older."
            )
    if len({at(manifest, stage, "dataset_fingerprint") for stage in ran}) > 1:
        said.append(
            "The stages did not work on the same data set: their figures do not belong together."
        )
    lost, rows = sum((data.get("dropped") or {}).values()), data.get("rows_in") or 1
    if lost > 0.1 * rows:
        said.append(
            f"{lost:,} of {rows:,} rows of the table were dropped, which is {lost / rows:.0%}: see Data."
        )
    said += data.get("notes") or []
    if any(figure_of(entry, "response perplexity")[1] is None for entry in models.values()):
        said.append(
            "The test split has too few questions for intervals: others may give quite other figures."
        )
    return said


def disclaimer_of(found, samples):
    """What stands above answers: what was stored with the `samples`, else the example's or the neutral disclaimer."""
    stored = samples[0].get("disclaimer") if samples else None
    return stored or example_settings(found["data"]).get("disclaimer", NEUTRAL_DISCLAIMER)


def losses(found):
    """The losses in nats a token as a frame, `loss` and `eval_loss` by step, the one before training at step 0."""
    history = pd.DataFrame(found["history"]).reindex(columns=["step", "loss", "eval_loss"])
    before = pd.DataFrame({"step": [0], "eval_loss": [found["training"].get("eval_loss_before")]})
    return pd.concat([before, history]).astype(float).set_index("step")


def digest_of_test(folder):
    """SHA-256 of the questions and answers of a run's test split; without one that of nothing."""
    from datasets import load_from_disk  # slow to import

    test = folder / "dataset" / "test"
    rows = (
        load_from_disk(str(test)).select_columns(["prompt", "completion"]).to_list()
        if test.exists()
        else None
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def show_table(texts, without="Not measured in this run."):
    """Show a frame of texts, or {name: text}, as a table in which text stays text, markup and $ included.

    The longer side goes down the page. An empty frame shows as the sentence `without`.
    """
    facts = isinstance(texts, dict)
    frame = pd.DataFrame({"": texts}) if facts else texts.fillna("–")
    if frame.empty:
        return say(without)
    numbered = isinstance(frame.index, pd.RangeIndex)
    frame = frame if numbered or len(frame) >= frame.shape[1] else frame.T
    frame = frame.astype(str)
    # not by a Styler, which imports matplotlib, half a second; `str` leaves texts as they are
    how = {
        "header": not facts,
        "index": facts or not numbered,
        "formatters": dict.fromkeys(frame, str),
    }
    with pd.option_context("display.max_colwidth", None):
        display(HTML(frame.to_html(classes=PLAIN, border=0, **how)))


def say(*sentences, kind=""):
    """Show sentences as they are, a paragraph each. The page has styles for the kinds "headline" and "doubt"."""
    display(
        HTML("".join(f'<p class="{kind} {PLAIN}">{escape(sentence)}</p>' for sentence in sentences))
    )


def show_answers(columns, rows, disclaimer):
    """Show `side_by_side`; on a phone a row's texts stand below each other, and a printed page has the disclaimer."""
    headings = "; ".join(f"--heading-{place}: '{name}'" for place, name in enumerate(columns, 1))
    plain = "".join(
        c if c.isalnum() else f"\\{ord(c):x} " for c in disclaimer
    )  # as CSS wants it, and no markup
    style = f'<style>@page {{ @bottom-center {{ content: "{plain}" }} }}</style>'
    table = side_by_side(columns, rows, disclaimer).data
    display(HTML(f'<div class="answers {PLAIN}" style="{headings}">{style}{table}</div>'))


def show(figure, alt):
    """Show a figure in print quality, with a text for those who cannot see it."""
    import matplotlib.pyplot as plt  # as in figures.py

    display(
        figure, metadata={"image/png": {"alt": alt, "width": round(figure.get_figwidth() * 100)}}
    )
    plt.close(figure)
