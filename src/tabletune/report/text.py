"""Figures with their intervals as text."""

from collections.abc import Mapping

PARTS = {  # the sets of questions that notebook 4 asks, and how tables and plots call them
    "reworded": "reworded questions",
    "table": "the table's own questions",
    "added": "questions on rows added after training",
    "new": "new questions",
}
COLUMNS = {  # of the table of figures: where each stands in the entry of a model, and its format
    "reworded questions answered right": ("content reworded", "right", ".0%"),
    "table's own questions answered right": ("content table", "right", ".0%"),
    "new questions answered right": ("content new", "right", ".0%"),
    "added rows' questions answered right": ("content added", "right", ".0%"),
    "response perplexity": ("perplexity", "response", ",.1f"),
    "perplexity, own rows in the index": ("perplexity", "response_added", ",.2f"),
    "full-text perplexity": ("perplexity", "full_text", ",.1f"),
    "bits per byte of the answers": ("perplexity", "bits_per_byte", ",.3f"),
    "answers right word for word": ("generation", "exact_match_rate", ".0%"),
    "answers that stop": ("generation", "stop_rate", ".0%"),
    "answers with the structure": ("generation", "structure_rate", ".0%"),
    "mean new tokens": ("generation", "mean_new_tokens", ".0f"),
}
CONTENT_COLUMNS = {  # of the table of content: a figure of `content`, and its format
    "right": ("right", ".0%"),
    "wrong": ("wrong", ".0%"),
    'says "nothing"': ("nothing", ".0%"),
    'says "nothing", but the table has it': ("false_nothing", ".0%"),
    "copied from a row": ("copied", ".0%"),
    "word for word": ("exact_match", ".0%"),
    "right item": ("right_item", ".0%"),
    "numbers and names": ("facts", ".0%"),
    "chrF": ("chrf", ".0f"),
}
RUN_HERE = "RUN_DIR=…"  # in the commands of a verdict
LOWER_IS_BETTER = ("perplexity", "bits per byte")


def with_interval(value: float | None, ci95: list[float] | None, form: str) -> str:
    """A figure and its interval as text, such as `6.0 (5.2 – 6.9)`; for None a dash."""
    if value is None:
        return "–"
    if ci95 is None:
        return f"{value:{form}}"
    return f"{value:{form}} ({ci95[0]:{form}} – {ci95[1]:{form}})"


def figures_of(metrics: dict) -> dict[str, dict]:
    """The entries of the models among the metrics, {name: entry}.

    The name says so of a model that was evaluated in 4 bits.
    """
    models = {}
    for name in ("base", "adapter", "merged"):
        if name not in metrics:
            continue
        shown = f"{name}, in 4 bits" if "evaluated_in" in metrics[name] else name
        models[shown] = metrics[name]
    return models


def stored(entry: dict, column: str) -> tuple[float | None, list[float] | None]:
    """A figure of COLUMNS in the entry of a model.

    (value, [low, high]), None for what was not measured.
    """
    place, name, _ = COLUMNS[column]
    for key in place.split():
        entry = entry.get(key) or {}
    return entry.get(name), entry.get(f"{name}_ci95")


def questions_behind(models: Mapping[str, dict], column: str) -> int | None:
    """How many questions a figure of COLUMNS rests on, by the entries of the models.

    None where that was not stored, and for texts without questions.
    """
    group, *part = COLUMNS[column][0].split()
    for entry in models.values():
        if not entry.get("generation"):
            continue
        questions = entry.get("questions")  # of the test split, all of which is read
        if group != "perplexity":  # but only some of them are answered
            of_part = (entry.get("content") or {}).get(part[0] if part else "new") or {}
            questions = of_part.get("questions")
        if questions:
            return questions
    return None


def direction(label: str) -> str:
    """The name of a figure as the label of an axis, which says where lower is better."""
    lower = any(word in label for word in LOWER_IS_BETTER)
    return f"{label} (lower is better)" if lower else label
