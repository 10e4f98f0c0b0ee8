"""What the figures of notebook 4 say in words, the content first: are the answers right?

They are stored in `evaluation/metrics.json`; the command line and the report print what is stored.
"""

import re

GOOD = 0.9  # from this share of right answers on, nothing is said about what would help
POOR = 0.5
NOT_MEASURED = (
    "Whether its answers are right was not measured: these rows are texts without questions."
)
NO_RULE_UNDERSTANDS = "This rule does not understand text, so read some answers, too."
OLDER = "Whether its answers are right was not measured: run 04_evaluate again."


def content_verdict(metrics: dict) -> list[str]:
    """Sentences on what `evaluation/metrics.json` says, the most important first.

    Are the answers right?
    """
    name = tuned_model(metrics)
    if name is None:
        return []
    content = metrics[name].get("content")
    if content is None:
        return [OLDER, *perplexity_sentence(metrics, name)]
    if not any(entry["questions"] for entry in content.values()):
        return [NOT_MEASURED, *perplexity_sentence(metrics, name)]
    rules = metrics.get("content_rules", {})
    sentences = []
    for part in parts_by_importance(content, rules):
        sentences += part_sentences(part, content[part], metrics, rules)
    # the first sentence names what the others call "it", and what the brackets are
    sentences[0] = named_and_explained(sentences[0])
    sentences += what_helps(content, metrics, rules)
    if rules.get("reasons"):
        reason = rules["reasons"]["right"]
        sentences.append(f"{reason} {NO_RULE_UNDERSTANDS}")
    return sentences + perplexity_sentence(metrics, name)


def tuned_model(metrics: dict) -> str | None:
    """The key of the fine-tuned model in the metrics, merged if it was evaluated.

    None if there is none.
    """
    return next((name for name in ("merged", "adapter") if name in metrics), None)


def parts_by_importance(content: dict, rules: dict) -> list[str]:
    """The sets of questions that were asked, the one that matters most first.

    Labels are learned in order to label what is new. Everything else is there to be asked again in
    other words.
    """
    # the first one also decides whether help is offered (`what_helps`)
    order = ["reworded", "table", "added", "new"]
    if rules.get("labels"):
        order = ["new", "reworded", "table", "added"]
    return [part for part in order if content.get(part, {}).get("questions")]


def named_and_explained(sentence: str) -> str:
    """A sentence about "it" that names the model, and says what its first interval is."""
    for short in ("It ", "it "):
        if short in sentence:
            long = "The fine-tuned model " if short[0] == "I" else "the fine-tuned model "
            sentence = sentence.replace(short, long, 1)
            break
    return re.sub(r"\((?=\d+–\d+\))", "(95% interval: ", sentence, count=1)


def count_with_interval(entry: dict, figure: str, cases: int | None = None) -> tuple[str, str]:
    """A rate of an entry as (count, "(low–high)"), of `cases`, or of all of its questions."""
    cases = entry["questions"] if cases is None else cases
    limits = entry.get(f"{figure}_ci95")
    interval = "(no interval)"
    if limits is not None:
        interval = f"({round(limits[0] * cases)}–{round(limits[1] * cases)})"
    return str(round((entry[figure] or 0) * cases)), interval


def part_sentences(part: str, entry: dict, metrics: dict, rules: dict) -> list[str]:
    """What to say about the answers to one set of questions."""
    n = entry["questions"]
    # how many of them the table has an answer to; evaluations of earlier versions do not say
    answerable = entry.get("answerable", n)
    if part == "new" and metrics.get("retrieval") and answerable < n:
        lacking = entry["unanswerable"]
        count, interval = count_with_interval(lacking, "nothing")
        sentences = [
            f"It rightly says that the table has nothing for {count} of {lacking['questions']} "
            f"new questions whose rows were left out {interval}."
        ]
        if answerable:
            count, interval = count_with_interval(entry["paraphrased"], "right")
            sentences.append(
                f"It gives the right answer to {count} of {answerable} new questions whose answer "
                f"its rows have under another question {interval}."
            )
        return sentences
    names = {
        "reworded": "reworded questions of your table",
        "table": "questions as they stand in your table",
        "added": "questions whose rows were added after training",
        "new": "new questions that training did not see",
    }
    count, interval = count_with_interval(entry, "right")
    sentence = f"It gives the right answer to {count} of {n} {names[part]} {interval}."
    if entry.get("false_nothing"):
        wrongly = count_with_interval(entry, "false_nothing", answerable)[0]
        sentence += f' It says "nothing" to {wrongly} of them, although the table has an answer.'
    majority = metrics.get("majority")
    if part == "new" and majority:
        always = round(majority["rate"] * n)
        sentence += f" Always saying {majority['label']!r} would be right for {always}."
    sentences = [sentence]
    leaks = metrics.get("answer_leaks")
    if part == "new" and leaks and not rules.get("labels"):
        sentences.append(
            f"The answers to {leaks} test rows stand in training, too, under other questions: "
            "these rows are not quite new."
        )
    return sentences


def what_helps(content: dict, metrics: dict, rules: dict) -> list[str]:
    """What helps where answers are wrong; nothing where they are right."""
    parts = parts_by_importance(content, rules)
    rate = content[parts[0]]["right"]
    if rate >= GOOD:
        return []
    if rules.get("labels"):
        return [
            "Too many labels are wrong. What helps: more rows, more epochs, a larger base model."
        ]
    how_many = "Most of its answers are wrong" if rate < POOR else "Some of its answers are wrong"
    if metrics.get("retrieval"):
        return [
            f"{how_many}, although the rows are in the prompt. What helps: more epochs, more "
            "`copies`, a larger base model."
        ]
    if rate < POOR and looks_right(metrics):
        how_many += ": it has learned how answers look, not what they say"
    return [
        f"{how_many}. What helps: rows of the table in the prompt (`context_rows = 3` in notebook "
        "1, or the profile `knowledge`), more epochs, a larger base model."
    ]


def looks_right(metrics: dict) -> bool:
    """Whether most answers have the form of the table's: the structure; without one, an end."""
    form = metrics[tuned_model(metrics)].get("generation") or {}
    rate = form.get("structure_rate")
    if rate is None:
        rate = form.get("stop_rate") or 0
    return rate > 0.5


def perplexity_sentence(metrics: dict, name: str) -> list[str]:
    """A sentence on the perplexity before and after, which says nothing about right answers.

    The list is empty without figures.
    """
    key, what = "response", "the table's answers to new questions"
    if metrics.get("retrieval"):
        key, what = "response_added", "the table's answers to test questions whose rows are found"
    before, after = (metrics.get(model, {}).get("perplexity", {}) for model in ("base", name))
    if after.get(key) is None:
        return []
    figures = f"{number_with_interval(after, key)} after training"
    meaning = ""
    if before.get(key) is not None:
        figures = f"{number_with_interval(before, key)} before, {figures}"
        meaning = "The model finds their form and wording more likely now. "
        if after[key] >= before[key]:
            meaning = "The model finds them less likely now. "
    change = metrics.get("differences", {}).get("adapter - base", {}).get("log_perplexity", {})
    if meaning and key == "response" and not change.get("significant"):
        meaning = "The difference may be chance. "
    return [
        f"Perplexity of {what}: {figures} (lower is better). {meaning}Perplexity does not say "
        "whether answers are right."
    ]


def number_with_interval(figures: dict, key: str) -> str:
    """A perplexity with its interval, such as `5.96 (5.21–6.89)`."""
    ci95 = figures.get(f"{key}_ci95")
    interval = "" if ci95 is None else f" ({ci95[0]:,.2f}–{ci95[1]:,.2f})"
    return f"{figures[key]:,.2f}{interval}"
