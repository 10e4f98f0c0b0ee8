"""Reading runs: what their stages have left, figures, and what a reader should know of them.

The page about a run and the comparison of runs share it. A run may be unfinished, or older than
this package: what is not there is left out. Only a damaged file, or a folder in which no stage ever
ran, is an error.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tabletune.data.example import disclaimer_of
from tabletune.errors import StageError
from tabletune.report.tables import (
    IN_TABLE,
    AnsweredQuestions,
    answered_questions,
    as_shown,
)
from tabletune.report.text import COLUMNS, figures_of, with_interval
from tabletune.run.files import read_json
from tabletune.run.parameters import NUMBERED, RUN_STAGES

STAGES = NUMBERED[:6]  # 1 to 4 make a run, 5 and 6 measure it; the page says nothing of 7
FILES = {  # what the stages leave: (file, its kind, the stage)
    "manifest": ("manifest.json", dict, STAGES[0]),
    "data": ("dataset/report.json", dict, STAGES[0]),
    "training": ("training/metrics.json", dict, STAGES[1]),
    "history": ("training/log_history.json", list, STAGES[1]),
    "merge": ("merged/merge_report.json", dict, STAGES[2]),
    "evaluation": ("evaluation/metrics.json", dict, STAGES[3]),
    "baselines": ("baselines/metrics.json", dict, STAGES[4]),
    "trust": ("trust/metrics.json", dict, STAGES[5]),
    "rating": ("rating/metrics.json", dict, "make rate"),
}
NAMES_OF_SPLITS = {"train": "training"}  # the others are called as they are stored
# name: (where it stands in the entry of a model, a way to merge or a stage, how it is written)
FIGURES = {
    **{name: (f"{group} {key}", form) for name, (group, key, form) in COLUMNS.items()},
    "perplexity, training rows": ("by_split train response", ",.2f"),
    "perplexity, validation rows": ("by_split validation response", ",.2f"),
    "perplexity, test rows": ("by_split test response", ",.2f"),
    "perplexity, other texts": ("outside perplexity", ",.2f"),
    "emergencies: sends to help": ("safety emergency seeks_help", ".0%"),
    "emergencies: offers a remedy": ("safety emergency offers_remedy", ".0%"),
    "everyday: sends to help": ("safety everyday seeks_help", ".0%"),
    "everyday: offers a remedy": ("safety everyday offers_remedy", ".0%"),
    "items named, for this question": ("grounding this_condition", ".0%"),
    "items named, for another one": ("grounding other_condition", ".0%"),
    "items named, nowhere in the table": ("grounding nowhere", ".0%"),
    "perplexity on the rows compared": ("perplexity", ",.2f"),
    "KL from what was trained": ("kl", ".3g"),
    "same next token": ("same_next_token", ".1%"),
    "validation loss before": ("eval_loss_before", ".3f"),
    "validation loss after": ("eval_loss_after", ".3f"),
    "optimizer steps": ("steps", ",.0f"),
    "tokens a second": ("tokens_per_second", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "memory, GiB": ("peak_memory_gib host", ",.1f"),
    "GPU memory, GiB": ("peak_memory_gib gpu", ",.1f"),
}


def read_run(folder: Path) -> dict[str, Any]:
    """What the stages left in a run folder, {name in FILES: content}, empty where there is none.

    Made of it are `metrics`, what notebooks 4 and 6 measured; `models`, {name: its entry there};
    `tuned`, the key of the fine-tuned model, the merged one if there is one; `parameters` and
    `surroundings`, what ran with which versions on what, {name: text}. Raises StageError if no
    stage has run there, or if a file is damaged.
    """
    info: dict[str, Any] = {}
    for name, (file, kind, stage) in FILES.items():
        info[name] = read_json(folder / file, stage) if (folder / file).exists() else kind()
        if not isinstance(info[name], kind):
            raise StageError(
                f"{folder / file} is damaged: it is not a JSON {kind.__name__}. Run {stage} again."
            )
    if not any(info.values()):
        raise StageError(
            f"{folder} is no run folder: no stage has left anything there. Run {STAGES[0]} first."
        )
    info["metrics"] = joined(info["evaluation"], info["trust"])
    info["models"] = figures_of(info["metrics"])
    info["tuned"] = next((name for name in ("merged", "adapter") if name in info["metrics"]), None)
    entries = info["manifest"].values()
    info["parameters"] = as_texts(at(entry, "parameters") or {} for entry in entries)
    info["surroundings"] = as_texts(surroundings_of(entry) for entry in entries)
    return info


def surroundings_of(entry: dict) -> dict[str, Any]:
    """What a stage ran on, {name: value}, by its entry in the manifest."""
    names = {"GPU": "gpu", "platform": "platform", "Python": "python", "commit": "git_commit"}
    surroundings = {name: at(entry, key) or "none" for name, key in names.items()}
    return surroundings | (at(entry, "packages") or {})


def as_texts(dictionaries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{name: its value as text} of several dictionaries.

    Where they do not agree, the text has one value after the other.
    """
    texts: dict[str, list[str]] = {}
    for dictionary in dictionaries:
        for name, value in dictionary.items():
            text = value
            if not value or not isinstance(value, str):
                text = json.dumps(value, ensure_ascii=False)
            of_name = texts.setdefault(name, [])
            if text not in of_name:
                of_name.append(text)
    return {name: " | ".join(of_name) for name, of_name in texts.items()}


def joined(one: dict, other: dict) -> dict:
    """Two nested dictionaries as one, `other` on top."""
    result = one | other
    for key, value in one.items():
        if isinstance(value, dict) and isinstance(other.get(key), dict):
            result[key] = joined(value, other[key])
    return result


def at(value: Any, *keys: str) -> Any:
    """What stands under `keys` in dictionaries within dictionaries.

    None where one of them is missing.
    """
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; none without a file. Raises StageError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise StageError(
            f"{path} cannot be read ({error}). Run the notebook that writes it again."
        ) from None


def right_answers(lines: Sequence[dict]) -> dict[str, bool]:
    """Which questions are answered right, {question: right}, by lines of `answers.jsonl`.

    The lines are of one model and one part. A question is called by its text, as it was asked. The
    last turns of several conversations may be the same: these have the id of the question behind
    the text.
    """
    frequency = Counter(line["asked"] for line in lines)
    answers = {}
    for line in lines:
        question = line["asked"]
        if frequency[question] > 1:
            question = f"{question} [{line.get('group')}]"
        answers[question] = bool(line["right"])
    return answers


def figure_of(entry: Any, name: str) -> tuple[float | None, list[float] | None]:
    """One of FIGURES, of an entry.

    (value, [low, high]), None for what was not measured or is not finite.
    """
    *keys, last = FIGURES[name][0].split()
    # an interval stands beside its figure, or is the entry's only one
    ci95 = at(entry, *keys, f"{last}_ci95") or at(entry, *keys, "ci95") or []
    limits = [limit for limit in map(finite, ci95) if limit is not None]
    interval = limits if len(limits) == 2 else None
    return finite(at(entry, *keys, last)), interval


def finite(value: Any) -> float | None:
    """A number, or None for what is none, or not finite."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def figures_table(entries: Mapping[str, Any], names: Iterable[str] = FIGURES) -> pd.DataFrame:
    """The figures `names`, those that were measured, as a frame of texts.

    A line a figure, a column an entry.
    """
    lines = {}
    for name in names:
        figures = {column: figure_of(entry, name) for column, entry in entries.items()}
        if any(value is not None for value, _ in figures.values()):
            form = FIGURES[name][1]
            lines[name] = {
                column: with_interval(*figure, form) for column, figure in figures.items()
            }
    return pd.DataFrame.from_dict(lines, orient="index")


def verdict_of(info: dict) -> list[str]:
    """What a run's evaluation says in words, the content first.

    A sentence says so if that was not measured.
    """
    if not info["models"]:
        return ["Not evaluated yet: whether its answers are right is not known."]
    if info["evaluation"].get("verdict"):
        return info["evaluation"]["verdict"]
    sentences = ["Whether its answers are right was not measured: run 04_evaluate again."]
    models = [info["metrics"].get(name) for name in ("base", info["tuned"])]
    before, after = (figure_of(entry, "response perplexity")[0] for entry in models)
    if before and after:
        sentences.append(
            f"Response perplexity {before:,.2f} before fine-tuning, {after:,.2f} after (lower is "
            "better). It does not say whether answers are right."
        )
    return sentences


def on_rows_left_out(info: dict) -> list[str]:
    """Why a perplexity may rise in a run with rows of the table in its prompts; [] for others."""
    if not info["evaluation"].get("retrieval"):
        return []
    return [
        "Rows of the table stand in the prompts of this run, but not those with the answers to "
        "test and validation questions. Without them the model learned to refuse, so its "
        "perplexity of the table's answers may well rise there: that is no fault."
    ]


def doubts(info: dict) -> list[str]:
    """What a reader must know before trusting the figures of a run: a list of sentences."""
    manifest, data = info["manifest"], info["data"]
    ran = [stage for stage in STAGES if stage in manifest]
    sentences = []
    tuned = info["metrics"].get(info["tuned"])
    risk = figure_of(tuned, "emergencies: offers a remedy")[0]
    if risk:
        sentences.append(
            f"In emergencies {risk:.0%} of the fine-tuned model's answers offer a remedy."
        )
    for stage in RUN_STAGES:
        if stage not in ran:
            sentences.append(f"{stage} left no record: what it makes is missing here.")
    sentences += stale_stages(manifest, ran)
    if len({at(manifest, stage, "dataset_fingerprint") for stage in ran}) > 1:
        sentences.append(
            "The stages did not work on the same data set: their figures do not belong together."
        )
    # a tenth is what notebook 1 takes without a word, by its default max_dropped
    lost = sum((data.get("dropped") or {}).values())
    rows = data.get("rows_in") or 1
    if lost > 0.1 * rows:
        sentences.append(
            f"{lost:,} of {rows:,} rows of the table were dropped, which is {lost / rows:.0%}: see "
            "Data."
        )
    sentences += data.get("notes") or []
    entries = info["models"].values()
    if any(figure_of(entry, "response perplexity")[1] is None for entry in entries):
        sentences.append(
            "The test split has too few questions for intervals: others may give quite other "
            "figures."
        )
    return sentences


def stale_stages(manifest: dict, ran: Sequence[str]) -> list[str]:
    """Sentences on stages that ran again after later ones, which then describe something older."""
    sentences = []
    for position, stage in enumerate(ran):
        when = str(at(manifest, stage, "finished"))
        later_stages = ran[position + 1 :]
        older = [later for later in later_stages if str(at(manifest, later, "finished")) < when]
        if older and stage in STAGES[:3]:  # no other stage is built on
            sentences.append(
                f"{stage} ran again after {', '.join(older)}, which tell of something older."
            )
    return sentences


def disclaimer_of_run(info: dict, samples: Sequence[dict]) -> str:
    """What stands above answers.

    What was stored with the `samples`, else the example's or the neutral disclaimer.
    """
    stored = samples[0].get("disclaimer") if samples else None
    return disclaimer_of(info["data"], stored or "")


def losses(info: dict) -> pd.DataFrame:
    """The losses by step in nats a token, `loss` and `eval_loss`.

    The one before training stands at step 0.
    """
    history = pd.DataFrame(info["history"]).reindex(columns=["step", "loss", "eval_loss"])
    before = pd.DataFrame({"step": [0], "eval_loss": [info["training"].get("eval_loss_before")]})
    return pd.concat([before, history]).astype(float).set_index("step")


def rows_of_test(folder: Path) -> list[str]:
    """The questions and answers of a run's test split, a JSON text each; [] without one."""
    from datasets import load_from_disk  # slow to import

    test = folder / "dataset" / "test"
    if not test.exists():
        return []
    rows = load_from_disk(str(test)).select_columns(["prompt", "completion"]).to_list()
    return [json.dumps(row) for row in rows]


def digest_of_test(folder: Path) -> str:
    """SHA-256 of the questions and answers of a run's test split.

    It does not depend on the order of the table's rows.
    """
    return hashlib.sha256("\n".join(sorted(rows_of_test(folder))).encode()).hexdigest()


def in_order_of_test(scores: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The scores of a run's test rows, in one order for all runs with these rows.

    A line for each row. Scores of other rows than all of the test split stay as they are.
    """
    rows = rows_of_test(folder)
    if len(rows) == len(scores):
        scores = scores.iloc[sorted(range(len(rows)), key=lambda place: rows[place])]
    return scores.reset_index(drop=True)


def row_counts(data: dict) -> dict[str, str]:
    """What notebook 1 made of the rows of a table, {what: how many}, by its report."""
    counts: dict[str, int | None] = {"in the table": data.get("rows_in")}
    for rule, change in (data.get("changed") or {}).items():
        counts[f"changed: {rule}"] = at(change, "rows")
    for reason, count in (data.get("dropped") or {}).items():
        counts[f"dropped: {reason}"] = -count
    counts["left"] = data.get("rows_out")
    for name, count in (data.get("splits") or {}).items():
        counts[f"of these, {NAMES_OF_SPLITS.get(name, name)}"] = count
    for name, count in (data.get("answer_leaks") or {}).items():
        title = NAMES_OF_SPLITS.get(name, name)
        counts[f"of {title}, the answer is in training, too"] = count
    counts["safety examples mixed into training"] = data.get("safety_rows")
    texts = {}
    for name, count in counts.items():
        if count:
            unit = "row" if abs(count) == 1 else "rows"
            texts[name] = f"{count:,} {unit}".replace("-", "−")
    return texts


def answers_of(run: Path, info: dict, most: int) -> tuple[list[AnsweredQuestions], int]:
    """Some answers side by side, {heading: texts}, and how many there are.

    At most `most` of each kind of question. Each says whether it is right, and whether it was cut.
    Runs of an older notebook 4 have only new questions, and nothing that says whether answers are
    right.
    """
    lines = read_lines(run / "evaluation" / "answers.jsonl")
    headings = {"base": "base", info["tuned"]: "fine-tuned"}
    if lines:
        questions = {(line["part"], line["group"]) for line in lines}
        return answered_questions(lines, headings, most), len(questions)
    samples = read_lines(run / "evaluation" / "samples.jsonl")
    if not samples:
        return [], 0
    keys = {"question": "question", IN_TABLE: "in_the_table"}
    keys |= {heading: name for name, heading in headings.items()}
    columns = {
        heading: [as_shown(str(sample.get(key) or "–")) for sample in samples[:most]]
        for heading, key in keys.items()
    }
    return [AnsweredQuestions("New questions", columns)], len(samples)


def worst_emergencies(run: Path, info: dict) -> dict[str, list[str]]:
    """The answers to emergencies side by side, {heading: texts}, what went wrong on top.

    {} if none were asked.
    """
    lines = []
    # 06_trust writes them; runs of earlier versions have them from notebook 4
    for part in ("trust", "evaluation"):
        lines += read_lines(run / part / "safety.jsonl")
    urgent = pd.DataFrame([line for line in lines if line["kind"] == "emergency"])
    if urgent.empty:
        return {}
    urgent["wrong"] = urgent["offers_remedy"].astype(int) - urgent["seeks_help"].astype(int)
    base, tuned = (urgent[urgent["model"] == name] for name in ("base", info["tuned"]))
    pairs = tuned.merge(base, on="prompt", suffixes=("", "_base"))
    pairs = pairs.sort_values("wrong", ascending=False, kind="stable")
    columns = {"question": "prompt", "base": "answer_base", "fine-tuned": "answer"}
    return {
        heading: [as_shown(text) for text in pairs[column]] for heading, column in columns.items()
    }
