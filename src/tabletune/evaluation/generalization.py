"""What fine-tuning did besides its task.

What the model memorizes, what it forgot, and which merged model to ship. Scores here are those of
`scoring.score` beside each text's `part` and `group`, its question: intervals resample questions,
since rows of one question are not independent. `draws` is how often, with a `seed`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from tabletune.chat.encoding import encode_all
from tabletune.data.context import TableContext
from tabletune.errors import StageError
from tabletune.evaluation.safety import DATA, safety_differences, summarize_safety
from tabletune.evaluation.scoring import perplexity
from tabletune.evaluation.trained_run import TrainedRun
from tabletune.report.text import with_interval
from tabletune.stats import (
    difference,
    interval,
    mean_difference,
    mean_interval,
    perplexity_interval,
    resampled,
)

PAIRS = (("adapter", "base"), ("merged", "adapter"))


def texts_to_read(
    trained: TrainedRun,
    context: TableContext | None,
    split_rows: int,
    seed: int,
    outside_text: str,
) -> list[dict]:
    """Rows to score, with their `part` and `group`.

    The test split, `split_rows` of each other one, and a text outside. With a `context` the rows of
    the table are in the prompts. Raises StageError if the text outside cannot be read.
    """
    texts = []
    for part in ("train", "validation", "test"):
        split = trained.splits[part]
        if part != "test":
            # the test split is read as a whole; of the others a sample is enough for a comparison
            split = split.shuffle(seed=seed).select(range(min(split_rows, len(split))))
        rows = list(split)
        if context is not None:
            rows = [{**row, "prompt": context.prompt(row["prompt"]).messages} for row in rows]
        encoded = encode_all(rows, trained.tokenizer, trained.stop_token_ids)
        for row, ids in zip(rows, encoded, strict=True):
            texts.append({"part": part, "group": row["group"], **ids})
    return texts + outside_rows(outside_text, trained.tokenizer)


def outside_rows(outside_text: str, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The paragraphs of a text file as rows to score; "bundled" is ours, "" none.

    Raises StageError.
    """
    if not outside_text:
        return []
    path = DATA / "outside_text.txt" if outside_text == "bundled" else Path(outside_text)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            f"outside_text={outside_text}: this text file cannot be read: {error}."
        ) from None
    # as in training: a text begins with BOS where the tokenizer has one
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        # line breaks of a file's layout are no part of its text
        one_line = " ".join(paragraph.split())
        ids = bos + tokenizer(one_line, add_special_tokens=False)["input_ids"]
        mask = [1] * len(ids)
        rows.append(
            {"part": "outside", "group": paragraph, "input_ids": ids, "completion_mask": mask}
        )
    return rows


def summarize_trust(
    scores: pd.DataFrame, judged: pd.DataFrame, grounded: dict | None, draws: int, seed: int
) -> dict:
    """The entry of a model in the metrics.

    `by_split`, `outside`, `grounding`, `safety`, as far as measured.
    """
    entry: dict = {"by_split": {}, "grounding": grounded}
    for part, rows in scores.groupby("part", sort=False):
        value = perplexity(rows, "response")
        ci95 = perplexity_interval(rows, "response", rows["group"], draws, seed)
        if part == "outside":
            entry["outside"] = {"perplexity": value, "ci95": ci95}
        else:
            figures = {"response": value, "response_ci95": ci95, "rows": len(rows)}
            entry["by_split"][part] = figures
    if len(judged):
        entry["safety"] = summarize_safety(judged)
    return entry


def trust_differences(
    scores: Mapping[str, pd.DataFrame], judged: Mapping[str, pd.DataFrame], draws: int, seed: int
) -> dict[str, dict]:
    """The `differences` in the metrics, what one model does more than another.

    Returns {pair: {figure: entry}}.
    """
    # the adapter against the base says what training did, merged against adapter what merging did
    entries = {}
    for one, other in PAIRS:
        a, b = (scores[name][scores[name]["part"] == "outside"] for name in (one, other))
        outside = {}
        if len(a):
            outside["outside_log_perplexity"] = mean_difference(
                a["response_nll"], b["response_nll"], a["response_tokens"], a["group"], draws, seed
            )
        entries[f"{one} - {other}"] = outside | safety_differences(judged[one], judged[other])
    return entries


def forgetting(entry: dict) -> str:
    """A sentence on what the model forgot.

    It compares how likely model and base find other text.
    """
    sentence = by_difference(
        entry,
        higher="It has forgotten",
        lower="It has not forgotten",
        neither="It is not clear whether it has forgotten",
    )
    ratio = as_ratio(entry, ".2f")
    return f"{sentence}: on other text its perplexity is {ratio} times that of the base model."


def memorization(base: pd.DataFrame, adapter: pd.DataFrame, draws: int, seed: int) -> list[str]:
    """Sentences on whether the adapter memorizes its training rows.

    And on whether it helps with new ones. Training rows may simply be easier than others. So the
    improvement over the base model on training rows is compared with that on test rows: by how much
    fine-tuning divides the perplexity here and there.
    """
    gains = []
    drawn = []
    groups = []
    for position, part in enumerate(("train", "test")):
        before, after = (scores[scores["part"] == part] for scores in (base, adapter))
        gain, tokens = before["response_nll"] - after["response_nll"], before["response_tokens"]
        group = before["group"]
        # another seed for each part: their draws are independent
        ratios = resampled(gain, tokens, group, draws, seed + position)
        gains.append(difference(gain.sum() / tokens.sum(), interval(ratios, group), group))
        drawn.append(ratios)
        groups.append(group)
    on_train, on_test = gains
    # the part with fewer questions decides how wide the interval must be
    fewer = min(groups, key=lambda group: group.nunique())
    more = difference(
        on_train["difference"] - on_test["difference"], interval(drawn[0] - drawn[1], fewer), fewer
    )
    generalizes = by_difference(
        on_test,
        higher="It generalizes",
        lower="It harms",
        neither="It is not clear whether it generalizes",
    )
    no_memory = "It does not memorize, as far as can be measured"
    memorizes = by_difference(more, higher="It memorizes", lower=no_memory, neither=no_memory)
    return [
        f"{generalizes}: fine-tuning divides the perplexity of test rows by "
        f"{as_ratio(on_test, '.2f')}, and that of training rows by {as_ratio(on_train, '.2f')}.",
        f"{memorizes}: the improvement on training rows is {as_ratio(more, '.2f')} times that on "
        "test rows.",
    ]


def by_difference(entry: dict, higher: str, lower: str, neither: str) -> str:
    """One of three texts, by what a difference says."""
    if not entry["significant"]:
        return neither
    return higher if entry["difference"] > 0 else lower


def as_ratio(entry: dict, form: str) -> str:
    """A difference of logarithms as a ratio with its interval, as text."""
    ci95 = None if entry["ci95"] is None else list(np.exp(entry["ci95"]))
    return with_interval(math.exp(entry["difference"]), ci95, form)


def fidelity(table: pd.DataFrame, groups: Sequence[str], draws: int, seed: int) -> dict:
    """The entry of a way to merge in the metrics' `fidelity`.

    `table` is its `divergence` from what was trained.
    """
    kl, tokens = table["response_kl"], table["response_tokens"]
    return {
        "perplexity": perplexity(table, "response"),
        "ci95": perplexity_interval(table, "response", groups, draws, seed),
        "kl": kl.sum() / tokens.sum(),
        "kl_ci95": mean_interval(kl, tokens, groups, draws, seed),
    }


def what_to_ship(
    variants: Mapping[str, pd.DataFrame],
    groups: Sequence[str],
    draws: int,
    seed: int,
    rows_left_out: bool = False,
) -> list[str]:
    """Sentences that say which of the merged variants to ship, and what that costs.

    In 16 bits, and quantized again. The one with the lower perplexity, if there is a difference;
    else the one that is nearer to what was trained; else that of the published weights, as it is
    the simpler. `variants` are tables of `divergence`, the first that of what was trained.

    With `rows_left_out` the prompts have rows of the table, but not those with the answer. There
    the model learned to refuse, and one that has lost this has the lower perplexity. So it does
    not count.
    """
    sentences = []
    sampling = (groups, draws, seed)
    for what, suffix in (("in 16 bits", ""), ("in NF4", ", NF4 again")):
        names = [f"merged, {way}{suffix}" for way in ("original", "dequantized")]
        names = [name for name in names if name in variants]
        if not names:
            continue
        trained = next(iter(variants.values()))
        tokens = trained["response_tokens"]
        columns = ["response_kl"] if rows_left_out else ["response_nll", "response_kl"]
        name, reason = choose_variant(names, variants, tokens, sampling, columns)
        sentences.append(f'Ship {what}: "{name}", as {reason}.')
        if rows_left_out:
            kl = variants[name]["response_kl"].sum() / tokens.sum()
            sentences.append(
                f"Its predictions differ from what was trained by {kl:.3g} nats a token (KL)."
            )
            continue
        cost = mean_difference(
            variants[name]["response_nll"], trained["response_nll"], tokens, *sampling
        )
        change = by_difference(
            cost, higher="worse", lower="better", neither="not measurably different"
        )
        sentences.append(
            f"Compared with what was trained, it is {change}: its perplexity is "
            f"{as_ratio(cost, '.4f')} times that of what was trained."
        )
    return sentences


def choose_variant(
    names: Sequence[str],
    variants: Mapping[str, pd.DataFrame],
    tokens: pd.Series,
    sampling: tuple[Sequence[str], int, int],
    columns: Sequence[str],
) -> tuple[str, str]:
    """Which of one or two variants to ship, the simpler one first, and why.

    The first of the `columns` in which they differ decides.
    """
    if len(names) == 1:
        return names[0], "there is no other here"
    simple, other = variants[names[0]], variants[names[1]]
    reasons = {
        "response_nll": "its perplexity is lower",
        "response_kl": "it is nearer to what was trained",
    }
    for column in columns:
        entry = mean_difference(other[column], simple[column], tokens, *sampling)
        if entry["significant"]:
            better = names[0] if entry["difference"] > 0 else names[1]
            return better, reasons[column]
    return names[0], "it is simpler, and no worse measurably"
