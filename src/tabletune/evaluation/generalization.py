"""What fine-tuning did besides its task: what the model memorizes, what it forgot, and which merged model to ship.

Scores here are those of `scoring.score` beside each text's `part` and `group`, its question: intervals resample
questions, since rows of one question are not independent. `sampling` is how often, and the seed.
"""

import math
import re
from itertools import islice
from pathlib import Path

import numpy as np

from tabletune.chat.encoding import encode
from tabletune.errors import StageError
from tabletune.evaluation.safety import DATA, safety_differences, summarize_safety
from tabletune.evaluation.scoring import perplexity
from tabletune.report.text import with_interval
from tabletune.stats import (
    difference,
    interval,
    mean_difference,
    mean_interval,
    perplexity_interval,
    resampled,
)


def texts_to_read(splits, tokenizer, stops, split_rows, seed, outside_text):
    """Rows to score, with their `part` and `group`: the test split, `split_rows` of each other one, and a text outside.

    Raises StageError if the text outside cannot be read.
    """
    texts = []
    for part in ("train", "validation", "test"):
        rows = (
            splits[part] if part == "test" else islice(splits[part].shuffle(seed=seed), split_rows)
        )
        texts += [
            {"part": part, "group": row["group"], **encode(row, tokenizer, stops)} for row in rows
        ]
    return texts + outside_rows(outside_text, tokenizer)


def outside_rows(outside_text, tokenizer):
    """The paragraphs of a text file as rows to score; "bundled" is ours, "" none. Raises StageError."""
    if not outside_text:
        return []
    path = DATA / "outside_text.txt" if outside_text == "bundled" else Path(outside_text)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            f"outside_text={outside_text}: this text file cannot be read: {error}."
        ) from None
    bos, rows = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        ids = bos + tokenizer(" ".join(paragraph.split()), add_special_tokens=False)["input_ids"]
        rows.append(
            {
                "part": "outside",
                "group": paragraph,
                "input_ids": ids,
                "completion_mask": [1] * len(ids),
            }
        )
    return rows


def summarize_trust(scores, judged, grounded, *sampling):
    """The entry of a model in the metrics: `by_split`, `outside`, `grounding`, `safety`, as far as measured."""
    entry = {"by_split": {}, "grounding": grounded}
    for part, rows in scores.groupby("part", sort=False):
        value, ci95 = (
            perplexity(rows, "response"),
            perplexity_interval(rows, "response", rows["group"], *sampling),
        )
        entry["by_split"][part] = {"response": value, "response_ci95": ci95, "rows": len(rows)}
    if outside := entry["by_split"].pop("outside", None):
        entry["outside"] = {"perplexity": outside["response"], "ci95": outside["response_ci95"]}
    return entry | ({"safety": summarize_safety(judged)} if len(judged) else {})


def trust_differences(scores, judged, *sampling):
    """The `differences` in the metrics, {pair: {figure: entry}}: what one model does more than another."""
    entries = {}
    for one, other in (("adapter", "base"), ("merged", "adapter")):
        a, b = (scores[name][scores[name]["part"] == "outside"] for name in (one, other))
        nll = a["response_nll"], b["response_nll"], a["response_tokens"], a["group"]
        outside = {"outside_log_perplexity": mean_difference(*nll, *sampling)} if len(a) else {}
        entries[f"{one} - {other}"] = outside | safety_differences(judged[one], judged[other])
    return entries


def forgetting(entry):
    """A sentence on what the model forgot, by how much more surprised by other text it is than the base."""
    said = verdict(
        entry, "It has forgotten", "It has not forgotten", "Whether it has forgotten cannot be told"
    )
    return f"{said}: on other text its perplexity is {as_ratio(entry, '.2f')} times that of the base model."


def memorization(base, adapter, draws, seed):
    """Sentences on whether the adapter memorizes its training rows, and whether it helps with new ones.

    Training rows may simply be easier than others. What they are to the base model is taken out: compared is by how
    much fine-tuning divides the perplexity here and there.
    """
    gains, drawn, groups = [], [], []
    for k, part in enumerate(("train", "test")):
        one, other = (scores[scores["part"] == part] for scores in (base, adapter))
        gain, tokens = one["response_nll"] - other["response_nll"], one["response_tokens"]
        groups.append(one["group"])
        drawn.append(resampled(gain, tokens, one["group"], draws, seed + k))
        gains.append(
            difference(gain.sum() / tokens.sum(), interval(drawn[k], one["group"]), one["group"])
        )
    (here, there), fewer = gains, min(groups, key=lambda group: group.nunique())
    more = difference(
        here["difference"] - there["difference"], interval(drawn[0] - drawn[1], fewer), fewer
    )
    generalizes = verdict(
        there, "It generalizes", "It harms", "Whether it generalizes cannot be told"
    )
    memorizes = verdict(more, "It memorizes", *["It does not measurably memorize"] * 2)
    return [
        f"{generalizes}: fine-tuning divides the perplexity of test rows by {as_ratio(there, '.2f')}, of training rows "
        f"by {as_ratio(here, '.2f')}.",
        f"{memorizes}: training rows gain {as_ratio(more, '.2f')} times as much as new ones.",
    ]


def verdict(entry, higher, lower, neither):
    """One of three texts, by what a difference says."""
    return neither if not entry["significant"] else higher if entry["difference"] > 0 else lower


def as_ratio(entry, form):
    """A difference of logarithms as a ratio with its interval, as text."""
    return with_interval(
        math.exp(entry["difference"]), entry["ci95"] and np.exp(entry["ci95"]), form
    )


def fidelity(table, *sampling):
    """The entry of a way to merge in the metrics' `fidelity`, by its `divergence`; `sampling` begins with groups."""
    kl = table["response_kl"], table["response_tokens"]
    entry = {
        "perplexity": perplexity(table, "response"),
        "ci95": perplexity_interval(table, "response", *sampling),
    }
    return entry | {"kl": kl[0].sum() / kl[1].sum(), "kl_ci95": mean_interval(*kl, *sampling)}


def what_to_ship(variants, *sampling):
    """Sentences that say which of the merged variants to ship, in 16 bits and quantized again, and what that costs.

    The one with the lower perplexity, if there is a difference; else the one that is nearer to what was trained; else
    that of the published weights, as it is the simpler. `variants` are tables of `divergence`, the first that of what
    was trained; `sampling` begins with groups.
    """
    trained, lines = next(iter(variants.values()), None), []
    for what, suffix in (("in 16 bits", ""), ("in NF4", ", NF4 again")):
        there = [
            name
            for way in ("original", "dequantized")
            if (name := f"merged, {way}{suffix}") in variants
        ]
        if not there:
            continue
        a, b, tokens = variants[there[-1]], variants[there[0]], trained["response_tokens"]
        nll, kl = (
            mean_difference(a[c], b[c], tokens, *sampling) for c in ("response_nll", "response_kl")
        )
        reasons = {
            "its perplexity is lower": nll["significant"],
            "it is nearer to what was trained": kl["significant"],
        }
        reasons |= {
            "there is no other here": not there[1:],
            "it is simpler, and no worse measurably": True,
        }
        name = verdict(nll if nll["significant"] else kl, there[0], there[-1], there[0])
        cost = mean_difference(
            variants[name]["response_nll"], trained["response_nll"], tokens, *sampling
        )
        said = verdict(cost, "worse", "better", "no different, measurably")
        lines.append(
            f'Ship {what}: "{name}", as {next(why for why, holds in reasons.items() if holds)}.'
        )
        lines.append(
            f"Against what was trained it is {said}: perplexity ratio {as_ratio(cost, '.4f')}."
        )
    return lines
