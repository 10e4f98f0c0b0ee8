"""Grounding: does what an answer recommends stand in the table?

For tables whose answer template has a line for an item, such as "**Item:** {item}". Which words name an item is taken
from the table itself. Singular and plural are the same, longer names come first ("coconut oil" is no "coconut"), and an
item that an answer names twice counts once.
"""

import re

import pandas as pd

from tabletune.stats import rate_interval

PLURALS = (
    (r"leaves$", "leaf"),
    (r"(ie|ies)$", "y"),
    (r"(oes)$", "o"),
    (r"(ss|sh|ch|x)es$", r"\1"),
    (r"(?<![su])s$", ""),
)
PLACES = ("this_condition", "other_condition", "nowhere")


def item_values(answer, answer_template, item_field):
    """What an answer's lines for `item_field` hold, a list; None if the template has no such line."""
    line = next((line for line in answer_template.split("\n") if f"{{{item_field}}}" in line), None)
    if not item_field or line is None:
        return None
    # re.escape writes a backslash before the braces of a field, which may have any name
    fields = re.sub(
        r"\\{(.+?)\\}",
        lambda m: "(.*?)" if m[0] == re.escape(f"{{{item_field}}}") else ".*?",
        re.escape(line.strip()),
    )
    return [value for value in re.findall(rf"(?m)^[ \t]*{fields}[ \t]*$", answer) if value.strip()]


def table_of_items(rows, answer_template, item_field):
    """The items that the table has for each question, {group: {item}}; empty if the table has none at all.

    `rows` have `group`, the key of the question, and `completion`.
    """
    items = {}
    for row in rows:
        values = item_values(row["completion"][0]["content"], answer_template, item_field) or []
        items.setdefault(row["group"], set()).update(filter(None, map(singular_words, values)))
    return items if any(items.values()) else {}


def ground(group, answer, items, answer_template, item_field):
    """Where each item that an answer names stands in the table, a list of PLACES: for its question, another, nowhere.

    Of an answer with a filled item line, its value counts; of any other, every item of the table that it mentions, so
    that free text names nothing that stands nowhere.
    """
    everything = set().union(*items.values())
    values = item_values(answer, answer_template, item_field)
    named = set()
    for value in values or [answer]:
        known = {singular_words(value)} & everything or mentioned(value, everything)
        named |= known or ({singular_words(value)} - {""} if values else set())
    here = named & items.get(group, set())
    return [
        PLACES[0] if item in here else PLACES[1] if item in everything else PLACES[2]
        for item in sorted(named)
    ]


def mentioned(text, items):
    """The items that a text mentions, as whole words; where one is part of another, only the longer."""
    words, found = f" {singular_words(text)} ", set()
    for item in sorted(items, key=len, reverse=True):
        if f" {item} " in words:
            found.add(item)
            words = words.replace(f" {item} ", " | | ")
    return found


def singular_words(text):
    """The words of a text in lower case, English plurals made singular, as a string with single spaces."""
    words = re.findall(r"\w+", text.casefold().replace("'s", "").replace("’s", ""))
    return " ".join(
        next((re.sub(a, b, w) for a, b in PLURALS if len(w) > 3 and re.search(a, w)), w)
        for w in words
    )


def summarize_grounding(places, groups):
    """A model's `grounding` in the metrics; None if no answer names anything.

    `places` has a list from `ground` for each answer, `groups` the answers' questions. Items of one answer are not
    independent: the intervals resample questions.
    """
    named = pd.DataFrame(
        [(group, place) for group, answer in zip(groups, places, strict=True) for place in answer],
        columns=["group", "place"],
    )
    if named.empty:
        return None
    entry = {"named": len(named), "answers": sum(map(bool, places))}
    for place in PLACES:
        entry[place] = (named["place"] == place).mean().item()
        entry[f"{place}_ci95"] = rate_interval(named["place"] == place, named["group"])
    return entry


def ground_answers(samples, splits, answer_template, item_field):
    """Each model's `grounding` in the metrics, {model: entry}: of the answers that notebook 4 left, rows of `samples`.

    {} if the table names no items, or if there are no answers.
    """
    rows = [
        row for split in splits.values() for row in split.select_columns(["group", "completion"])
    ]
    items = table_of_items(rows, answer_template, item_field)
    group_of = {
        row["prompt"][-1]["content"]: row["group"] for row in splits["test"] if row["prompt"]
    }
    asked, summary = [(group_of.get(sample["question"]), sample) for sample in samples], {}
    for name in ("base", "adapter", "merged") if items and samples else ():
        places = [
            ground(group, sample[name], items, answer_template, item_field)
            for group, sample in asked
        ]
        summary[name] = summarize_grounding(places, [group for group, _ in asked])
    return summary


def grounding_finding(entry):
    """A sentence on what a model's `grounding` says."""
    if entry is None:
        return "Its answers name no items of the table."
    here, elsewhere, nowhere = (f"{entry[place]:.0%}" for place in PLACES)
    return (
        f"Of {entry['named']} items that it names in {entry['answers']} answers, {here} stand in the table for that "
        f"very question, {elsewhere} for another one, and {nowhere} nowhere."
    )
