"""Figures with their intervals as text."""

COLUMNS = {  # of the table of figures: where each stands in the entry of a model, and its format
    "response perplexity": ("perplexity", "response", ",.1f"),
    "full-text perplexity": ("perplexity", "full_text", ",.1f"),
    "answers right word for word": ("generation", "exact_match_rate", ".0%"),
    "answers that stop": ("generation", "stop_rate", ".0%"),
    "answers with the structure": ("generation", "structure_rate", ".0%"),
    "mean new tokens": ("generation", "mean_new_tokens", ".0f"),
}


def with_interval(value, ci95, form):
    """A figure and its interval as text, such as `6.0 (5.2 – 6.9)`; for None a dash."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if ci95 is None else f" ({ci95[0]:{form}} – {ci95[1]:{form}})")


def figures_of(metrics):
    """The entries of the models among the metrics, {name: entry}, a model that was evaluated in 4 bits named so."""
    models = {name: metrics[name] for name in ("base", "adapter", "merged") if name in metrics}
    return {
        name + ", in 4 bits" * ("evaluated_in" in entry): entry for name, entry in models.items()
    }


def stored(entry, column):
    """A figure of COLUMNS in the entry of a model: (value, [low, high]), None for what was not measured."""
    group, name, _ = COLUMNS[column]
    return (entry.get(group) or {}).get(name), (entry.get(group) or {}).get(f"{name}_ci95")
