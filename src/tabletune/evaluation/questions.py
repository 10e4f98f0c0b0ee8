"""Which questions are asked in an evaluation: new ones, the table's own, and those in other words.

A question is a dict with `prompt` (messages), `tools` (a JSON text or None), `references` (all that
the table answers), `group` (the id of the question), `asked` (the text of the last user turn) and
`part`, the set that it belongs to.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping

from tabletune.data.rewording import Rewording
from tabletune.evaluation.content import reference_of


def questions_of(split: Iterable[dict], samples: int | None = None) -> list[dict]:
    """The first `samples` questions of a split, each once.

    Each has all answers that the split has for it. Rows that are texts without a question are left
    out. Where an answer begins with the model's thinking, only what comes after it counts.
    """
    questions: dict[str, dict] = {}
    for row in split:
        if not row["prompt"]:
            continue
        if row["group"] not in questions:
            questions[row["group"]] = {
                "prompt": row["prompt"],
                "tools": row.get("tools"),
                "references": [],
                "group": row["group"],
                "asked": row["prompt"][-1].get("content") or "",
                "part": "new",
            }
        # every answer that the table has for a question is right
        questions[row["group"]]["references"].append(reference_of(row))
    return list(questions.values())[:samples]


def question_sets(splits: Mapping[str, Iterable[dict]], samples: int) -> dict[str, list[dict]]:
    """The questions to ask, {part: questions}.

    The parts are "new", "table" and "reworded", each of up to `samples` questions.

    The new ones are the first of the test split. The table's own are questions of the training
    split, picked by a hash of their id, so that runs with other seeds or another order of rows ask
    the same ones; "reworded" are these in other words, by rules that training does not use.
    """
    of_table = [{**question, "part": "table"} for question in questions_of(splits["train"])]
    # the order of a hash is as good as a random one, and does not change with the rows
    of_table.sort(key=lambda question: hashlib.sha256(question["group"].encode()).digest())
    reword = Rewording([question["asked"] for question in of_table], "evaluation")
    return {
        "new": questions_of(splits["test"], samples),
        "table": of_table[:samples],
        "reworded": reworded_questions(of_table[:samples], reword),
    }


def reworded_questions(questions: list[dict], reword: Rewording) -> list[dict]:
    """Questions in other words; those whose last turn is not a user's are left out."""
    reworded = []
    for question in questions:
        if question["prompt"][-1]["role"] != "user":
            continue
        # seeded by the question: its other words do not depend on which others are asked
        text = reword(question["asked"], random.Random(f"evaluation:{question['group']}"))
        prompt = [*question["prompt"][:-1], {"role": "user", "content": text}]
        reworded.append({**question, "prompt": prompt, "asked": text, "part": "reworded"})
    return reworded


def own_question(text: str, questions: list[dict]) -> tuple[list[dict], list[str]]:
    """The reader's own question as a prompt like those of `questions`, and as a text.

    Two lists of one. If `text` is empty, the first of `questions` is asked once more, with its
    earlier turns and tools. Else `text` is asked with the system message of the first, if it has
    one, and without other turns and tools. Both lists are empty if there are no questions.
    """
    if not questions:
        return [], []
    first = questions[0]
    if not text:
        return [{"prompt": first["prompt"], "tools": first["tools"]}], [first["asked"]]
    system = [message for message in first["prompt"][:1] if message["role"] == "system"]
    return [{"prompt": [*system, {"role": "user", "content": text}]}], [text]
