"""Is an answer right? Content beside form: figures that compare answers with what the table says.

No rule here can read. They compare labels, items, numbers, names and letters with the references,
which are all answers that the table has for a question. They are strict on purpose: an answer in
quite other words counts as wrong.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import pandas as pd

from tabletune.data.example import example_settings
from tabletune.data.lookup import answer_without_thoughts
from tabletune.evaluation.grounding import PLACES, item_values, locate_items, table_of_items
from tabletune.evaluation.structure import fixed_text
from tabletune.stats import (
    DRAWS,
    SEED,
    mean_difference,
    mean_interval,
    rate_difference,
    rate_interval,
)

# the median answer of a table of labels or short answers has at most so many words
SHORT_ANSWER_WORDS = 5
MOST_LABELS = 20
ROWS_PER_LABEL = 3  # at least, on average: else equal answers are a coincidence
RIGHT_CHRF = 70.0  # free text is right from here on, if numbers, names and words are right, too
RIGHT_WORDS = 0.9  # the share of the reference's words that it must have
NEGATION = re.compile(r"\b(?:not|no|never|none|nothing|cannot|without)\b|n['’]t\b")
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
LONGEST_WORD = 12  # letters a word, on average: where there are more, the language writes no spaces


@dataclass(frozen=True)
class Metric:
    """A figure that compares an answer with the references of its question.

    `kind` is "rate" (true or false), "share" (0 to 1) or "score" (0 to 100). `reason` says what it
    is, `without` why a table does not have it; "" where every table does.
    """

    name: str
    kind: str
    reason: str
    without: str = ""


# The metrics of content, in the order in which they are shown. A new one takes four lines: here, in
# `compare_answer` (its value), in `content_rules` (`applies`: which tables have it), and in
# CONTENT_COLUMNS of report/text.py (its heading).
METRICS = (
    Metric("right", "rate", reason=""),  # REASONS_OF_RIGHT
    Metric(
        "exact_match",
        "rate",
        reason="The share of answers that equal the table's, word for word. Most answers of this "
        f"table have at most {SHORT_ANSWER_WORDS} words.",
        without="Not used: the answers are too long to be compared word for word.",
    ),
    Metric(
        "right_item",
        "rate",
        reason="The share of answers that name an item which the table has for the question, and "
        "no other item. Items are read from the template's line with {{{item_field}}}.",
        without="Not used: the answer template has no line that names an item (item_field).",
    ),
    Metric(
        "facts",
        "share",
        reason="The share of the numbers and names of the table's answer that the model's answer "
        "has, too.",
        without="Not used: the answers have no numbers and no names.",
    ),
    Metric(
        "chrf",
        "score",
        reason="How many short runs of letters an answer shares with the table's, from 0 to 100. "
        "The fixed text of the answer template counts as well.",
    ),
)
KINDS = {metric.name: metric.kind for metric in METRICS}
# what decides whether an answer is right, and how the reader is told
REASONS_OF_RIGHT = {
    "exact_match": "An answer is right if it is the expected one, letter case aside.",
    "right_item": "An answer is right if it names an item that the table has for the question, and "
    "no other item.",
    "same_text": "An answer is right if it says nearly the same words as an answer of the table, "
    f"with the same numbers and names (chrF of {RIGHT_CHRF:g} or more).",
}


@dataclass(frozen=True)
class ContentRules:
    """Which figures say whether an answer of this table is right, and why.

    `right` names the one that decides: "exact_match", "right_item" or "same_text". `metrics` are
    those of METRICS that apply, `reasons` has a sentence for each, applying or not. `labels` are
    the labels of a classification, the commonest first, else empty. `items` are the table's items,
    {question id: {item}}.
    """

    right: str
    metrics: tuple[str, ...]
    reasons: dict[str, str]
    labels: tuple[str, ...] = ()
    answer_template: str = ""
    item_field: str = ""
    items: dict[str, set[str]] = field(default_factory=dict)

    def as_json(self) -> dict:
        """What `evaluation/metrics.json` says of the rules."""
        return {
            "right": self.right,
            "metrics": list(self.metrics),
            "reasons": self.reasons,
            "labels": list(self.labels),
        }


def content_rules(
    splits: Mapping[str, Iterable[dict]], report: dict, item_field: str = ""
) -> ContentRules:
    """The rules for a data set, by all of its answers, and by the `report.json` of notebook 1.

    `item_field` is the field of the answer template that names what is recommended; "" takes the
    worked example's, "none" no field.
    """
    item_field = item_field or example_settings(report).get("item_field", "")
    template = (report.get("templates") or {}).get("answer") or ""
    rows_of_splits = {name: rows_with_questions(split) for name, split in splits.items()}
    rows: list[dict] = []
    for of_split in rows_of_splits.values():
        rows += of_split
    answers = [reference_of(row) for row in rows]
    # labels are those of training alone: a test row must not add one
    training = [reference_of(row) for row in rows_of_splits.get("train", [])]
    items = table_of_items(rows, template, item_field)
    short = bool(answers) and median(len(a.split()) for a in answers) <= SHORT_ANSWER_WORDS
    labels = classification_labels(training) if short else ()
    has_facts = any(numbers_and_names(answer, fixed_words(template)) for answer in answers)
    applies = {"exact_match": short, "right_item": bool(items), "facts": has_facts}
    reasons = {}
    for metric in METRICS:
        reasons[metric.name] = metric.without
        if applies.get(metric.name, True):
            reasons[metric.name] = metric.reason.format(item_field=item_field)
    right = "same_text"
    if short:
        right = "exact_match"
    elif items:
        right = "right_item"
    reasons["right"] = REASONS_OF_RIGHT[right]
    metrics = tuple(metric.name for metric in METRICS if applies.get(metric.name, True))
    return ContentRules(right, metrics, reasons, labels, template, item_field, items)


def rows_with_questions(split: Iterable[dict]) -> list[dict]:
    """The rows of a split that have a question: `prompt`, `completion` and `group`."""
    if hasattr(split, "select_columns"):  # the other columns are long, and not needed here
        split = split.select_columns(["prompt", "completion", "group"])
    return [row for row in split if row["prompt"]]


def reference_of(row: dict) -> str:
    """The answer of a row of the data set, without the model's thinking."""
    return answer_without_thoughts(row["completion"][0]["content"] or "")


def classification_labels(answers: Sequence[str]) -> tuple[str, ...]:
    """The labels of a classification, the commonest first; () where the answers are no labels."""
    counts = Counter(answers)
    # few different answers, each many times; one answer for all is no classification
    are_labels = 2 <= len(counts) <= MOST_LABELS and len(answers) >= ROWS_PER_LABEL * len(counts)
    return tuple(label for label, _ in counts.most_common()) if are_labels else ()


# --- one answer


def check_content(
    answers: Sequence[str],
    questions: Sequence[dict],
    rules: ContentRules,
    unknown: Sequence[bool] | None = None,
    answerable: Sequence[bool] | None = None,
) -> pd.DataFrame:
    """How right each answer is.

    A line for each of `questions`, which have `references` and `group`. Columns: `right`, `outcome`
    ("right", "wrong" or "nothing"), `exact_match`, `chrf` (0 to 100), `right_item` (None where the
    table has no item for the question), `facts` (a share; NaN where the references have none),
    `unknown`, `answerable`. `unknown` says which answers were "the table has nothing on that",
    `answerable` for which questions the table has an answer. To a question that it has none for,
    "nothing" is right.
    """
    unknown = [False] * len(answers) if unknown is None else list(unknown)
    answerable = [True] * len(answers) if answerable is None else list(answerable)
    lines = []
    for answer, question, says_unknown, has_answer in zip(
        answers, questions, unknown, answerable, strict=True
    ):
        line = compare_answer(answer, question["references"], rules, question.get("group", ""))
        # "nothing" is compared with no text: it is right where the table has nothing
        if says_unknown:
            line["right"] = not has_answer
        outcome = "right" if line["right"] else "wrong"
        if says_unknown and has_answer:
            outcome = "nothing"
        lines.append(
            {**line, "outcome": outcome, "unknown": says_unknown, "answerable": has_answer}
        )
    table = pd.DataFrame(lines, columns=[*KINDS, "outcome", "unknown", "answerable"])
    types: dict[str, type] = {"right": bool, "exact_match": bool}  # right_item may be None
    types |= {name: float for name, kind in KINDS.items() if kind != "rate"}
    return table.astype(types)


def compare_answer(answer: str, references: list[str], rules: ContentRules, group: str) -> dict:
    """The figures METRICS of one answer to a question with these references."""
    # the template's own words are in every answer, right or wrong
    fixed = fixed_words(rules.answer_template)
    scores = [chrf(answer, reference) for reference in references] or [0.0]
    # the reference that comes nearest is the one that the answer may have meant
    best = references[int(np.argmax(scores))] if references else ""
    line = {
        "exact_match": answer in references,
        "chrf": max(scores),
        "right_item": names_right_item(answer, references, rules, group),
        "facts": best_share_of_facts(answer, references, fixed),
    }
    equal = any(normalized(answer) == normalized(reference) for reference in references)
    if rules.right == "exact_match":
        line["right"] = equal
    elif rules.right == "right_item" and line["right_item"] is not None:
        line["right"] = line["right_item"]
    else:
        line["right"] = equal or says_the_same(answer, best, max(scores), fixed)
    return line


def chrf(answer: str, reference: str) -> float:
    """The chrF of an answer, 0 to 100 (Popović, 2015), by sacrebleu."""
    from sacrebleu.metrics import CHRF  # 0.2 s

    return CHRF().sentence_score(answer, [reference]).score


def normalized(text: str) -> str:
    """A short answer as it is compared: letter case, white space and a final full stop aside."""
    return " ".join(text.casefold().split()).rstrip(".!。।")


def names_right_item(
    answer: str, references: list[str], rules: ContentRules, group: str
) -> bool | None:
    """Whether an answer names items that the table has for the question, and no other.

    None if it has none there.
    """
    if not rules.items:
        return None
    values = [
        item_values(text, rules.answer_template, rules.item_field) or [] for text in references
    ]
    if not any(values):
        return None
    places = locate_items(group, answer, rules.items, rules.answer_template, rules.item_field)
    return bool(places) and set(places) == {PLACES[0]}


def says_the_same(answer: str, reference: str, score: float, fixed: frozenset[str]) -> bool:
    """Whether an answer in free text says what a reference says.

    It does if it has nearly the reference's words, and its numbers and names.
    """
    expected, in_answer = numbers_and_names(reference, fixed), numbers_and_names(answer, fixed)
    other_numbers = {fact for fact in in_answer - expected if NUMBER.fullmatch(fact)}
    # a number or name that is missing, or a number that is not the table's, makes it wrong
    if score < RIGHT_CHRF or expected - in_answer - words_of(answer) or other_numbers:
        return False
    # "is safe" and "is not safe" share nearly all letters
    if bool(NEGATION.search(answer.casefold())) != bool(NEGATION.search(reference.casefold())):
        return False
    words = words_of(reference) - fixed
    # a language without spaces: its "words" are whole sentences, and the letters decide alone
    if not words or sum(map(len, words)) > LONGEST_WORD * len(words):
        return True
    return len(words & words_of(answer)) >= RIGHT_WORDS * len(words)


def share_of_facts(answer: str, reference: str, fixed: frozenset[str]) -> float:
    """The share of a reference's numbers and names that an answer has; NaN if it has none."""
    expected = numbers_and_names(reference, fixed)
    if not expected:
        return float("nan")
    return len(expected & (numbers_and_names(answer, fixed) | words_of(answer))) / len(expected)


def best_share_of_facts(answer: str, references: list[str], fixed: frozenset[str]) -> float:
    """The largest `share_of_facts` of several references; NaN if none has numbers or names."""
    shares = [share_of_facts(answer, reference, fixed) for reference in references]
    return max((share for share in shares if not np.isnan(share)), default=float("nan"))


def words_of(text: str) -> frozenset[str]:
    """The words of a text, in lower case."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def fixed_words(template: str) -> frozenset[str]:
    """The words of a template's own text, outside of its fields, in lower case."""
    return words_of(fixed_text(template))


def numbers_and_names(text: str, fixed: frozenset[str] = frozenset()) -> set[str]:
    """The numbers of a text, and its names.

    Words with a capital letter that do not open a sentence or a line. In lower case, without the
    words `fixed`. A number's separators are made equal: 12,50 is 12.50, and 1,000 is 1000.
    """
    facts = set()
    for number in NUMBER.findall(text):
        # separators of thousands
        if re.fullmatch(r"\d{1,3}(?:[.,]\d{3})+", number):
            facts.add(re.sub(r"[.,]", "", number))
        else:
            facts.add(number.replace(",", "."))
    # the first word of a sentence has a capital letter, whatever it is
    for sentence in re.split(r"[.!?:;]\s|[\n*\"“”„«»()]", text):
        words = re.findall(r"[^\W\d_][\w'’-]*", sentence)
        facts |= {word.casefold() for word in words[1:] if word[0].isupper() and len(word) > 1}
    return facts - fixed


# --- figures of many answers


def summarize_content(
    checked: pd.DataFrame, rules: ContentRules, draws: int = DRAWS, seed: int = SEED
) -> dict:
    """The figures of a model's answers to one set of questions, each with its 95% interval.

    None: does not apply. `right`, `wrong` and `nothing` are shares of all answers, `false_nothing`
    of those to questions that the table can answer. Each question stands once, so answers are
    independent.
    """
    is_answerable = checked["answerable"].astype(bool)
    entry: dict = {"questions": len(checked)}
    entry |= rate_entry("right", checked["right"])
    entry |= rate_entry("wrong", checked["outcome"] == "wrong")
    entry |= rate_entry("nothing", checked["unknown"])
    if "copied" in checked:  # by the lookup, without the model
        entry |= rate_entry("copied", checked["copied"])
    entry |= rate_entry("false_nothing", checked.loc[is_answerable, "unknown"])
    for metric in METRICS:
        if metric.name == "right":
            continue
        values = checked[metric.name].dropna()
        if metric.name not in rules.metrics:
            values = values[:0]
        if metric.kind == "rate":
            entry |= rate_entry(metric.name, values)
        else:
            entry |= mean_entry(metric, values, draws, seed)
    entry["answerable"] = int(is_answerable.sum())
    if not is_answerable.all():
        # to the questions that the table has no answer to, the only right one is "nothing"
        lacking = checked.loc[~is_answerable, "unknown"]
        has_row = checked.loc[is_answerable, "right"]
        entry["unanswerable"] = {"questions": len(lacking), **rate_entry("nothing", lacking)}
        entry["paraphrased"] = {"questions": len(has_row), **rate_entry("right", has_row)}
    return entry


def rate_entry(name: str, values: pd.Series) -> dict:
    """A share of true values with its interval, {name: rate, name_ci95: limits}.

    None without any values.
    """
    values = values.astype(bool)
    rate = values.mean().item() if len(values) else None
    return {name: rate, f"{name}_ci95": rate_interval(values)}


def mean_entry(metric: Metric, values: pd.Series, draws: int, seed: int) -> dict:
    """The mean of a metric's values with its interval, as `rate_entry` has it."""
    name = metric.name
    limits = mean_interval(values, np.ones(len(values)), None, draws, seed)
    if metric.kind == "share" and set(values) in ({0.0}, {1.0}):
        limits = rate_interval(values.astype(bool))  # the bootstrap sees no doubt where all agree
    return {name: values.mean().item() if len(values) else None, f"{name}_ci95": limits}


def content_differences(
    one: pd.DataFrame,
    other: pd.DataFrame,
    rules: ContentRules,
    draws: int = DRAWS,
    seed: int = SEED,
) -> dict[str, dict]:
    """How much higher each figure of `one` is than that of `other`, in pairs.

    Both are answers to the same questions.
    """
    entries = {}
    for name in rules.metrics:
        measured = one[name].notna().to_numpy() & other[name].notna().to_numpy()
        a, b = one[name].to_numpy()[measured], other[name].to_numpy()[measured]
        if not len(a):
            continue
        if KINDS[name] == "rate":
            entries[name] = rate_difference(a.astype(bool), b.astype(bool))
        else:
            entries[name] = mean_difference(
                a.astype(float), b.astype(float), np.ones(len(a)), None, draws, seed
            )
    return entries


# --- labels


def majority_baseline(questions: Sequence[dict], rules: ContentRules) -> dict | None:
    """How often the commonest label of the training rows is right, by always saying it.

    None without labels.
    """
    if not rules.labels or not questions:
        return None
    hits = [is_label(rules.labels[0], question) for question in questions]
    return {
        "label": rules.labels[0],
        "rate": float(np.mean(hits)),
        "rate_ci95": rate_interval(hits),
    }


def class_figures(
    answers: Sequence[str], questions: Sequence[dict], rules: ContentRules
) -> pd.DataFrame:
    """The figures of each label: a line a label, the commonest first.

    `rows` have it as their answer, `recall` is the share of them that got it, `precision` the share
    of the answers with this label that are right; None where there are none. Each with its 95%
    interval, `_ci95`.
    """
    lines = []
    for label in rules.labels:
        is_it = [is_label(label, question) for question in questions]
        says_it = [normalized(answer) == normalized(label) for answer in answers]
        pairs = list(zip(says_it, is_it, strict=True))
        recalled = [says for says, is_label_of in pairs if is_label_of]
        precise = [is_label_of for says, is_label_of in pairs if says]
        line = {"label": label, "rows": len(recalled)}
        for name, hits in (("recall", recalled), ("precision", precise)):
            line[name] = float(np.mean(hits)) if hits else None
            line[f"{name}_ci95"] = rate_interval(hits)
        lines.append(line)
    return pd.DataFrame(lines).set_index("label") if lines else pd.DataFrame()


def is_label(label: str, question: dict) -> bool:
    """Whether a label is an answer that the table has for a question."""
    return any(normalized(label) == normalized(reference) for reference in question["references"])
