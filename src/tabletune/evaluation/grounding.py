"""Grounding: does what an answer recommends stand in the table?

For tables whose answer template has a line for an item, such as "**Item:** {item}". Which words
name an item is taken from the table itself. Singular and plural are the same, longer names come
first ("coconut oil" is no "coconut"), and an item that an answer names twice counts once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from tabletune.evaluation.structure import fields_in, line_pattern
from tabletune.stats import rate_interval

PLURALS = (
    (r"leaves$", "leaf"),
    (r"(ie|ies)$", "y"),
    (r"(oes)$", "o"),
    (r"(ss|sh|ch|x)es$", r"\1"),
    (r"(?<![su])s$", ""),
)
PLACES = ("this_condition", "other_condition", "nowhere")


def item_values(answer: str, answer_template: str, item_field: str) -> list[str] | None:
    """What an answer's lines for `item_field` hold; None if the template has no such line."""
    # the template's line, such as "**Item:** {item}"
    lines = [line for line in answer_template.split("\n") if item_field in fields_in(line)]
    if not item_field or not lines:
        return None
    # the item's field is caught, other fields of that line may hold anything
    pattern = line_pattern(lines[0].strip(), {item_field: "(.*?)"}, otherwise=".*?")
    values = re.findall(rf"(?m)^[ \t]*{pattern}[ \t]*$", answer)
    return [value for value in values if value.strip()]


def table_of_items(
    rows: Iterable[dict], answer_template: str, item_field: str
) -> dict[str, set[str]]:
    """The items that the table has for each question, {group: {item}}.

    Empty if the table has none at all. `rows` have `group`, the key of the question, and
    `completion`.
    """
    items: dict[str, set[str]] = {}
    for row in rows:
        values = item_values(row["completion"][0]["content"], answer_template, item_field) or []
        items.setdefault(row["group"], set()).update(filter(None, map(singular_words, values)))
    return items if any(items.values()) else {}


def locate_items(
    group: str, answer: str, items: dict[str, set[str]], answer_template: str, item_field: str
) -> list[str]:
    """Where each item that an answer names stands in the table, a list of PLACES.

    For its question, another, nowhere. `items` is what `table_of_items` returns. If the answer has
    a filled item line, its value counts. Of any other answer every item of the table that it
    mentions counts, so free text names nothing that stands nowhere.
    """
    all_items = set().union(*items.values())
    values = item_values(answer, answer_template, item_field)
    items_named = set()
    for value in values or []:
        item = singular_words(value)
        if item in all_items:
            items_named.add(item)
            continue
        # "ginger and honey": a line with several items of the table
        parts = mentioned(value, all_items)
        if parts:
            items_named |= parts
        elif item:
            items_named.add(item)
    # free text, or an empty item line
    if not values:
        items_named = mentioned(answer, all_items)
    return [place_of_item(item, items.get(group, set()), all_items) for item in sorted(items_named)]


def place_of_item(item: str, of_question: set[str], all_items: set[str]) -> str:
    """The one of PLACES where an item stands in the table."""
    if item in of_question:
        return PLACES[0]
    return PLACES[1] if item in all_items else PLACES[2]


def mentioned(text: str, items: Iterable[str]) -> set[str]:
    """The items that a text mentions, as whole words.

    Where one is part of another, only the longer.
    """
    words = f" {singular_words(text)} "
    in_text = set()
    for item in sorted(items, key=len, reverse=True):
        if f" {item} " in words:
            in_text.add(item)
            # what a longer item has taken, a shorter one cannot take again
            words = words.replace(f" {item} ", " | | ")
    return in_text


def singular_words(text: str) -> str:
    """The words of a text in lower case, in a string with single spaces.

    English plurals are made singular.
    """
    words = re.findall(r"\w+", text.casefold().replace("'s", "").replace("’s", ""))
    return " ".join(map(singular, words))


def singular(word: str) -> str:
    """A word in lower case without its English plural's ending."""
    for ending, replacement in PLURALS:
        # short words such as gas keep their s
        if len(word) > 3 and re.search(ending, word):
            return re.sub(ending, replacement, word)
    return word


def summarize_grounding(places: Sequence[list[str]], groups: Sequence[str]) -> dict:
    """A model's `grounding` in the metrics.

    If no answer names anything, no more than `named` and `answers`. `places` has a list from
    `locate_items` for each answer, `groups` the answers' questions. Items of one answer are not
    independent: the intervals resample questions.
    """
    lines = []
    for group, places_of_answer in zip(groups, places, strict=True):
        lines += [(group, place) for place in places_of_answer]
    items_named = pd.DataFrame(lines, columns=["group", "place"])
    entry: dict = {"named": len(items_named), "answers": sum(map(bool, places))}
    if items_named.empty:
        return entry
    for place in PLACES:
        entry[place] = (items_named["place"] == place).mean().item()
        entry[f"{place}_ci95"] = rate_interval(items_named["place"] == place, items_named["group"])
    return entry


def ground_answers(
    samples: Sequence[dict], splits: Mapping, answer_template: str, item_field: str
) -> dict[str, dict]:
    """Each model's `grounding` in the metrics, {model: entry}.

    It is of the answers that notebook 4 left, rows of `samples`. {} if the table names no items, or
    if there are no answers.
    """
    rows = []
    for split in splits.values():
        rows += list(split.select_columns(["group", "completion"]))
    items = table_of_items(rows, answer_template, item_field)
    if not items or not samples:
        return {}
    group_of = {}
    for row in splits["test"]:
        if row["prompt"]:
            group_of[row["prompt"][-1]["content"]] = row["group"]
    groups = [group_of.get(sample["question"], "") for sample in samples]
    summary = {}
    for name in ("base", "adapter", "merged"):
        places = [
            locate_items(group, sample[name], items, answer_template, item_field)
            for group, sample in zip(groups, samples, strict=True)
        ]
        summary[name] = summarize_grounding(places, groups)
    return summary


def grounding_finding(entry: dict | None) -> str:
    """A sentence on the fine-tuned model's `grounding`; None is called not measured."""
    if entry is None:
        return (
            "Whether its answers name items of the table was not measured: the answer template has "
            "no line for an item (item_field), or there are no answers."
        )
    if not entry["named"]:
        return "The answers of the fine-tuned model name no items."
    share_here, elsewhere, nowhere = (f"{entry[place]:.0%}" for place in PLACES)
    return (
        f"The fine-tuned model names {entry['named']} items in {entry['answers']} answers. "
        f"Of these, {share_here} stand in the table for that very question, {elsewhere} only for "
        f"other questions, and {nowhere} nowhere."
    )
