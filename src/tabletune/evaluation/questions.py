"""Which questions are asked in an evaluation."""


def questions_of(split, samples):
    """The first questions of a split, each once: dicts with `prompt`, `tools`, and all that is answered, `references`.

    Rows that are texts without a question have none. Of an answer with thinking counts what comes after it.
    """
    found = {}
    for row in split:
        if row["prompt"]:
            question = {"prompt": row["prompt"], "tools": row.get("tools"), "references": []}
            answer = row["completion"][0]["content"].rpartition("</think>")[2].strip()
            found.setdefault(row["group"], question)["references"].append(answer)
    return list(found.values())[:samples]


def own_question(text, questions):
    """The reader's own question as a prompt like those of `questions`, and as a text; two lists, empty if these are.

    If `text` is empty it is the first of `questions` once more.
    """
    system = [
        message
        for question in questions[:1]
        for message in question["prompt"][:1]
        if message["role"] == "system"
    ]
    texts = [text or question["prompt"][-1]["content"] for question in questions[:1]]
    return [{"prompt": [*system, {"role": "user", "content": text}]} for text in texts], texts
