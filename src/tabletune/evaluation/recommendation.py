"""The recommendation of notebook 5: what to ship, in words that need no statistics."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from tabletune.evaluation.baselines import (
    ADAPTER,
    ADAPTER_CONTEXT,
    BASE,
    BASE_FIXED,
    BASE_NEAREST,
    CONSTANT,
    COPY,
)
from tabletune.evaluation.decision import (
    TRAINED,
    Decision,
    as_good_as_best,
    best_of,
    decide,
    enough,
    rights_of,
)
from tabletune.report.baselines import ORDER
from tabletune.report.text import PARTS, with_interval
from tabletune.stats import rate_interval

ADVICE = {
    COPY.name: "Do not fine-tune for this table: copy the answer of the most similar row.",
    BASE.name: "Do not fine-tune for this table: the base model answers these questions as it is.",
    BASE_FIXED.name: "Do not fine-tune for this table: "
    "put a few fixed rows into the base model's prompt.",
    BASE_NEAREST.name: "Do not fine-tune for this table: "
    "put the most similar rows into the base model's prompt.",
    ADAPTER.name: "Training was worth it: ship the fine-tuned model.",
    ADAPTER_CONTEXT.name: "Training was worth it: "
    "ship the fine-tuned model, with the most similar rows in its prompt.",
}
ASK = "make ask RUN_DIR=… QUESTIONS=my_questions.txt"
ROWS_BY_HAND = (
    "To ship it, put the rows in front of each question as earlier turns, as notebook 5 shows: "
    "no command does it."
)
EXPORT_MODEL = f"To ask it here: `{ASK}`. To ship it: `make export RUN_DIR=…`."
COMMANDS = {
    COPY.name: f"To ask it here: `{ASK} MODEL_PART=copy`. To ship it: `make export RUN_DIR=…`, "
    "then `python app.py --copy` in export/app.",
    BASE.name: f"To ask it here: `{ASK} MODEL_PART=base`. To ship it, serve the base model itself.",
    BASE_FIXED.name: ROWS_BY_HAND,
    BASE_NEAREST.name: ROWS_BY_HAND,
    ADAPTER.name: EXPORT_MODEL,
    ADAPTER_CONTEXT.name: EXPORT_MODEL,
}
WORTH_IT = "Training was worth it"
PROBABLY_WORTH_IT = "Training was probably worth it"
ONLY_OF_THE_TABLE = (
    "This holds for questions that the table has, in any words. "
    "Of new questions, no way answers enough right."
)
IN_WORDS = {
    CONSTANT.name: "always the same answer",
    COPY.name: "copying the most similar row",
    BASE.name: "the base model",
    BASE_FIXED.name: "the base model with fixed rows in its prompt",
    BASE_NEAREST.name: "the base model with the most similar rows in its prompt",
    ADAPTER.name: "the fine-tuned model",
    ADAPTER_CONTEXT.name: "the fine-tuned model with the most similar rows in its prompt",
}
NAMES = {"table": "questions of the table as they stand"}  # after a number
NOTHING = "Nothing works for this table yet: ship none of these."
MIXED = "No way answers both kinds of questions well enough"
TOO_FEW = (
    "There are too few questions to say what to ship. Ask more of them (`baseline_samples`), or "
    "keep more for the test in notebook 1 (`test_fraction`)."
)
MAY_HELP = "What may help: context_rows in notebook 1, more rows, more epochs, a larger base model."
MAY_HELP_LABELS = (
    "What may help: more rows, more epochs, a larger base model. Or the labels do not follow from "
    "the texts: let two people label the same fifty, and see how often they agree."
)
MORE_WOULD_TELL = (
    "More questions would tell (`baseline_samples`, or `test_fraction` in notebook 1). Of ways "
    "that are equally good, the cheapest is named."
)


def recommend(checked: Mapping[str, pd.DataFrame], ways: Mapping[str, dict], least_right: float):
    """The `verdict` of `baselines/metrics.json`.

    The choice, and sentences, the most important first. `ways` are the entries of the ways in the
    metrics, for what a question costs.
    """
    rights = rights_of(checked)
    decision = decide(rights, least_right)
    sentences = [what_to_do(decision)]
    if decision.choice is not None:
        sentences.append(COMMANDS[decision.choice])
    if decision.best is not None:
        for part in sorted(ORDER, key=lambda part: part not in decision.parts):
            if part in rights:
                line = evidence(decision, part, rights[part])
                if must_be_refused(checked, part):
                    line += " The table cannot answer most of these: to say so counts as right."
                sentences.append(line)
        sentences += comparisons(decision)
        sentences.append(costs(decision, ways))
        if decision.choice is None:
            sentences.append(MAY_HELP_LABELS if CONSTANT.name in ways else MAY_HELP)
    return {
        "choice": decision.choice,
        "best": decision.best,
        "parts": decision.parts,
        "least_right": least_right,
        "sentences": sentences,
    }


def must_be_refused(checked: Mapping[str, pd.DataFrame], part: str) -> bool:
    """Whether most questions of a part have no answer in the table, so that "nothing" is right."""
    lines = next(iter(checked.values()))
    lines = lines[lines["part"] == part]
    return "answerable" in lines and bool((~lines["answerable"].astype(bool)).mean() > 0.5)


def what_to_do(decision: Decision) -> str:
    """What to do, in one or two sentences."""
    if decision.best is None:
        return TOO_FEW
    if decision.choice is not None:
        advice = ADVICE[decision.choice]
        if decision.choice in TRAINED and not decision.is_sure:
            advice = advice.replace(WORTH_IT, PROBABLY_WORTH_IT)
        if "new" in decision.unanswered:
            advice += f" {ONLY_OF_THE_TABLE}"
        return advice
    if decision.best_of_parts:
        names = [
            f"for {PARTS[part]}, {IN_WORDS[name]}" for part, name in decision.best_of_parts.items()
        ]
        return f"{MIXED}. The best ones are, {'; '.join(names)}."
    return NOTHING


def evidence(decision: Decision, part: str, rights: Mapping[str, np.ndarray]) -> str:
    """How many questions of a part the choice answers right.

    Of a part that no way can answer, the best of all.
    """
    too_few = not enough(rights)
    hopeless = part in decision.unanswered
    name = decision.best_of_parts.get(part, decision.subject)
    if hopeless:
        name = best_of(rights)
    right = rights[name]
    share = with_interval(float(right.mean()), rate_interval(right), ".0%")
    kind = NAMES.get(part, PARTS[part])
    line = f"Of {len(right)} {kind}, {IN_WORDS[name]} gets {right.sum()} right: {share}."
    if too_few:
        line += " Too few to decide anything."
    elif hopeless and name == CONSTANT.name:
        line += " No way is clearly better."
    elif hopeless and CONSTANT.name in as_good_as_best(rights):
        same = rights[CONSTANT.name].sum()
        line += f" Always the same answer gets {same}, and no way is clearly better than that."
    elif hopeless:
        line += " No way gets more."
    return line


def comparisons(decision: Decision) -> list[str]:
    """How the subject compares with training, or if it was trained, with the best way without it.

    A sentence for each part of the questions.
    """
    if decision.best_of_parts:
        return []
    sentences = [comparison(decision, part) for part in decision.parts]
    if decision.choice is not None and not decision.is_sure:
        sentences.append(MORE_WOULD_TELL)
    return sentences


def comparison(decision: Decision, part: str) -> str:
    """How the subject compares with its best rival for a part of the questions."""
    rights = decision.rights[part]
    rival = best_of({name: rights[name] for name in decision.rivals})
    entry = decision.difference(part, rival)
    count = f"{rights[rival].sum()} of {len(rights[rival])}"
    line = f"For {PARTS[part]}, {IN_WORDS[rival]} gets {count} right"
    if decision.subject in TRAINED:
        line = f"For {PARTS[part]}, the best way without training is {IN_WORDS[rival]}, {count}"
    if entry["difference"] == 0:
        return f"{line}: that is as many."
    points = [100 * value for value in (entry["difference"], *entry["ci95"])]
    place = "ahead"
    if entry["difference"] < 0:
        place = "behind"
        # behind by so much: the sign turns, and with it which limit is the lower one
        points = [-points[0], -points[2], -points[1]]
    line += f": {IN_WORDS[decision.subject]} is {points[0]:.0f} percentage points {place} "
    line += f"({points[1]:.0f} – {points[2]:.0f})"
    return line + ("." if entry["significant"] else ", which may be chance.")


def costs(decision: Decision, ways: Mapping[str, dict]) -> str:
    """What a question costs with what is recommended, and with the trained model."""
    names = list(dict.fromkeys(decision.best_of_parts.values())) or [decision.subject]
    # the trained model's costs beside it, since that is what training would buy
    names += [name for name in TRAINED if name in ways and name not in names]
    parts = []
    for name in names:
        tokens, seconds = ways[name]["tokens_a_question"], ways[name]["seconds_a_question"]
        time = f"{seconds:.2g} seconds" if seconds >= 0.01 else "less than 0.01 seconds"
        parts.append(f"{IN_WORDS[name]}, {tokens:,.0f} tokens and {time}")
    return "What a question costs on this machine: " + "; ".join(parts) + "."
