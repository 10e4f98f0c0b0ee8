"""The ways to answer from a table, with training and without.

What notebook 5 compares on the same questions. From the cheapest to the dearest: always the same
answer, copy the nearest row, ask the base model (alone, with a few fixed rows in the prompt, with
the nearest rows), ask the fine-tuned model (alone, or with rows where it was trained so).
"""

import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from tabletune.chat.encoding import encode_all, encode_prompt
from tabletune.data.context import TableContext
from tabletune.data.lookup import copied_answer
from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.errors import StageError
from tabletune.evaluation.content import (
    ContentRules,
    check_content,
    content_differences,
    summarize_content,
)
from tabletune.evaluation.scoring import perplexity
from tabletune.stats import mean_difference, perplexity_interval

LIMIT_OF_LONGEST = 2  # an answer may have so many times the tokens of the table's longest one
LEAST_LIMIT = 32  # tokens that an answer may have in any case


@dataclass(frozen=True)
class Way:
    """One way to answer a question.

    Who writes the answer, and which rows of the table stand in the prompt. `model` is "base",
    "adapter" or "" for none, `rows` is "fixed", "nearest", "context" (as in training) or "".
    """

    name: str
    model: str = ""
    rows: str = ""


CONSTANT = Way("always the same answer")
COPY = Way("nearest row, copied", rows="nearest")
BASE = Way("base", "base")
BASE_FIXED = Way("base, fixed rows", "base", "fixed")
BASE_NEAREST = Way("base, nearest rows", "base", "nearest")
ADAPTER = Way("adapter", "adapter")
ADAPTER_CONTEXT = Way("adapter, nearest rows", "adapter", "context")
# how a table puts it
WITHOUT_MODEL = {
    CONSTANT.name: "no model: the table's commonest answer",
    COPY.name: "no model: the answer of the most similar row",
}
ANSWER_FROM = {"base": "the base model", "adapter": "the fine-tuned model"}
ROWS = {
    "": "none",
    "fixed": "the same few for every question",
    "nearest": "the most similar ones",
    "context": "the most similar ones, as in training",
}
WAYS = (CONSTANT, COPY, BASE, BASE_FIXED, BASE_NEAREST, ADAPTER, ADAPTER_CONTEXT)


def ways_table(ways: Iterable[Way]) -> pd.DataFrame:
    """What each way to answer does: who writes the answer, and which rows stand in its prompt."""
    lines = {}
    for way in ways:
        if way.model:
            answer_from, rows = ANSWER_FROM[way.model], ROWS[way.rows]
        else:
            answer_from, rows = WITHOUT_MODEL[way.name], "no prompt"
        lines[way.name] = {"the answer comes from": answer_from, "rows in its prompt": rows}
    return pd.DataFrame.from_dict(lines, orient="index")


def ways_for(rules: ContentRules, context: TableContext | None) -> list[Way]:
    """The ways that make sense for a table and a run, the cheapest first.

    One answer for all questions is a way for tables of labels only; rows in the adapter's prompt,
    for adapters that were trained with them.
    """
    possible = list(WAYS)
    if not rules.labels:
        possible.remove(CONSTANT)
    if context is None:
        possible.remove(ADAPTER_CONTEXT)
    return possible


def fixed_rows(
    rows: Sequence[TableRow], number: int, question_ids: Iterable[str], seed: int
) -> list[TableRow]:
    """`number` rows to show before every question, drawn with `seed`.

    Rows of the questions that will be asked, `question_ids`, come last: a small table may have no
    others. Each row has another question, and another answer where the table has so many: of
    labels, all are shown.
    """
    will_be_asked = set(question_ids)
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    # sort is stable: within the rows that are asked, and within the rest, the drawn order stays
    shuffled.sort(key=lambda row: row.question_id in will_be_asked)
    examples: list[TableRow] = []
    for only_new_answers in (True, False):
        for row in shuffled:
            new_question = row.question_id not in {example.question_id for example in examples}
            new_answer = row.answer not in {example.answer for example in examples}
            if len(examples) < number and new_question and (new_answer or not only_new_answers):
                examples.append(row)
    return examples


def all_questions(sets: Mapping[str, Sequence[dict]]) -> list[dict]:
    """The questions of all sets in one list, set after set. Raises StageError if there is none."""
    questions: list[dict] = []
    for questions_of_set in sets.values():
        questions += questions_of_set
    if not questions:
        raise StageError(
            "The rows of this table are texts without questions: there is nothing to compare."
        )
    return questions


def answer_limit(
    splits: Mapping[str, Iterable[dict]], tokenizer: PreTrainedTokenizerBase, most: int
) -> int:
    """How many tokens an answer may have.

    LIMIT_OF_LONGEST times those of the table's longest one, and `most` at most.

    A model that was not fine-tuned rambles on. What is so much longer than any answer of the table
    is not right, and to write it takes most of the time. Where the answers begin with the model's
    thinking, which has no usual length, it is `most`.
    """
    # of all splits: a limit below the longest right answer would make it wrong
    answers = []
    for split in splits.values():
        answers += [row["completion"][0]["content"] or "" for row in split]
    if any("</think>" in answer for answer in answers):
        return most
    longest = sorted(answers, key=len)[-100:]  # by characters, as tokens take time to count
    tokens = max(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in longest)
    return min(most, max(LEAST_LIMIT, LIMIT_OF_LONGEST * tokens))


def with_rows(messages: Sequence[dict], rows: Iterable[TableRow]) -> list[dict]:
    """The messages with rows as earlier turns, question and answer, in front of the last question.

    That is how a chat model that was not trained for it best takes examples. System text and
    history stay in front.
    """
    turns = []
    for row in rows:
        turns.append({"role": "user", "content": row.question})
        turns.append({"role": "assistant", "content": row.answer})
    return [*messages[:-1], *turns, messages[-1]]


def last_question(messages: Sequence[dict]) -> str:
    """The text of the last turn of a user."""
    return next(turn["content"] for turn in reversed(messages) if turn["role"] == "user")


@dataclass
class Prompts:
    """The prompt of every way for a question.

    `number` of the nearest rows in `index`, or the rows `fixed`, go into a prompt of at most
    `longest` tokens; what does not fit is left out, the least similar first. `context` is that of
    the run, if it was trained with rows.
    """

    tokenizer: PreTrainedTokenizerBase
    index: RowIndex
    fixed: list[TableRow]
    number: int
    longest: int
    context: TableContext | None = None

    def nearest(self, messages: Sequence[dict], number: int) -> list[TableRow]:
        """The rows whose questions are most similar to the last question, best first."""
        return [hit.row for hit in self.index.search(last_question(messages), number)]

    def messages(self, way: Way, messages: Sequence[dict]) -> list[dict]:
        """The messages as a way puts them to its model; the most similar row stands last."""
        if way.rows == "context" and self.context is not None:
            return self.context.prompt(list(messages)).messages
        rows = []
        if way.rows == "fixed":
            rows = list(self.fixed)
        elif way.rows == "nearest":
            rows = self.nearest(messages, self.number)
        # the last of the rows is the least similar one
        while rows and self.length(with_rows(messages, rows)) > self.longest:
            rows.pop()
        # models look most at what stands nearest to the question
        return with_rows(messages, rows[::-1])

    def questions(self, way: Way, questions: Sequence[dict]) -> list[dict]:
        """The questions with the prompts of a way, as `answers.generate` takes them."""
        return [
            {**question, "prompt": self.messages(way, question["prompt"])} for question in questions
        ]

    def length(self, messages: Sequence[dict], tools: str | None = None) -> int:
        """How many tokens a prompt has."""
        return len(
            encode_prompt(list(messages), self.tokenizer, json.loads(tools) if tools else None)
        )

    def lengths(self, questions: Sequence[dict]) -> list[int]:
        """How many tokens the prompt of each question has."""
        return [self.length(question["prompt"], question.get("tools")) for question in questions]

    def copied(self, messages: Sequence[dict]) -> str:
        """The answer of the most similar row, as `make ask MODEL_PART=copy` gives it.

        It is `unknown_answer` if the run's look-up refuses, and "" if no row has anything in common
        with the question.
        """
        question = last_question(messages)
        if self.context is not None:
            return self.context.copied(question)[0]
        hit = self.index.search(question, 1)[0]
        return copied_answer(asdict(hit.row), hit.score, "", 0.0)[0]

    def references(self, way: Way, questions: Sequence[dict], stops: Sequence[int]) -> list[dict]:
        """The first reference of each question after a way's prompt, for `scoring.score`.

        Only the last answer counts: answers of rows in the prompt are read, but not scored.
        """
        examples = []
        for question in self.questions(way, questions):
            answer = {"role": "assistant", "content": question["references"][0]}
            example = {"prompt": question["prompt"], "completion": [answer]}
            examples.append(example | {"tools": question.get("tools") or ""})
        rows = encode_all(examples, self.tokenizer, list(stops))
        for row in rows:
            row["completion_mask"] = last_part(row["completion_mask"])
        return rows


def last_part(mask: Sequence[int]) -> list[int]:
    """A mask of answers with only the last one left, which ends the text."""
    start = len(mask)
    while start and mask[start - 1]:
        start -= 1
    return [0] * start + [1] * (len(mask) - start)


@dataclass
class Result:
    """What a way made of the questions.

    `answers` has a line a question: answer, stopped, new_tokens, perhaps unknown, rows. `scores`,
    None without a model, has what the first reference of each question scores.
    """

    way: Way
    answers: pd.DataFrame
    seconds: float
    prompt_tokens: list[int]
    scores: pd.DataFrame | None = None


def without_model(way: Way, prompts: Prompts, questions: Sequence[dict]) -> Result:
    """The Result of a way that asks no model: no tokens, and no perplexity."""
    begun = time.perf_counter()
    if way == CONSTANT:
        commonest = Counter(row.answer for row in prompts.index.rows).most_common(1)[0][0]
        answers = [commonest for _ in questions]
    else:
        answers = [prompts.copied(question["prompt"]) for question in questions]
    seconds = time.perf_counter() - begun
    table = pd.DataFrame({"answer": answers, "stopped": True, "new_tokens": 0})
    return Result(way, table, seconds, [0] * len(answers))


def results_without_model(
    ways: Iterable[Way], prompts: Prompts, questions: Sequence[dict]
) -> list[Result]:
    """The Results of those of the ways that ask no model."""
    return [without_model(way, prompts, questions) for way in ways if not way.model]


# --- figures


def check_results(
    results: Iterable[Result],
    questions: Sequence[dict],
    rules: ContentRules,
    context: TableContext | None,
) -> dict[str, pd.DataFrame]:
    """{way: a line a question}: what `content.check_content` says of the answers, and `part`."""
    answerable = None
    if context is not None:
        answerable = [context.has_answer(question["references"]) for question in questions]
    checked = {}
    for result in results:
        answers = list(result.answers["answer"])
        unknown = None
        if "unknown" in result.answers:
            unknown = list(result.answers["unknown"])
        elif context is not None:
            unknown = [context.is_unknown(answer) for answer in answers]
        lines = check_content(answers, questions, rules, unknown, answerable)
        parts = [question["part"] for question in questions]
        checked[result.way.name] = lines.reset_index(drop=True).assign(part=parts)
    return checked


def summarize_result(
    result: Result, checked: pd.DataFrame, rules: ContentRules, draws: int, seed: int
) -> dict:
    """The entry of a way in `baselines/metrics.json`: content, perplexity, cost of a question."""
    tokens = np.mean(result.prompt_tokens) + result.answers["new_tokens"].mean()
    entry: dict[str, Any] = {
        "model": result.way.model,
        "rows": result.way.rows,
        "tokens_a_question": float(tokens),
        "seconds_a_question": result.seconds / max(1, len(checked)),
        "content": {},
        "perplexity": {},
    }
    for part, lines in checked.groupby("part", sort=False):
        entry["content"][part] = summarize_content(lines, rules, draws, seed)
        if result.scores is not None:
            scores = result.scores.loc[lines.index]
            entry["perplexity"][part] = {
                "response": perplexity(scores, "response"),
                "response_ci95": perplexity_interval(scores, "response", None, draws, seed),
            }
    return entry


def compare_results(
    one: Result,
    other: Result,
    checked: Mapping[str, pd.DataFrame],
    rules: ContentRules,
    draws: int,
    seed: int,
) -> dict:
    """{part: {figure: entry}}: how much more `one` has than `other`, in pairs of questions."""
    differences = {}
    for part, lines in checked[one.way.name].groupby("part", sort=False):
        compared = checked[other.way.name].loc[lines.index]
        differences[part] = content_differences(lines, compared, rules, draws, seed)
        if one.scores is not None and other.scores is not None:
            scores, other_scores = one.scores.loc[lines.index], other.scores.loc[lines.index]
            differences[part]["log_perplexity"] = mean_difference(
                scores["response_nll"],
                other_scores["response_nll"],
                scores["response_tokens"],
                None,
                draws,
                seed,
            )
    return differences


def summarize_results(
    results: Sequence[Result],
    checked: Mapping[str, pd.DataFrame],
    rules: ContentRules,
    draws: int,
    seed: int,
) -> dict:
    """What `baselines/metrics.json` says: all ways, and the trained one against each other one."""
    metrics: dict[str, Any] = {"right": rules.right, "ways": {}, "differences": {}}
    trained = [result for result in results if result.way.model == "adapter"][-1]
    for result in results:
        name = result.way.name
        metrics["ways"][name] = summarize_result(result, checked[name], rules, draws, seed)
        if result is not trained:
            compared = compare_results(trained, result, checked, rules, draws, seed)
            metrics["differences"][f"{trained.way.name} - {name}"] = compared
    return metrics


def lines_of_answers(
    results: Sequence[Result], checked: Mapping[str, pd.DataFrame], questions: Sequence[dict]
) -> list[dict]:
    """The lines of `baselines/answers.jsonl`: one for each way and question."""
    lines = []
    for result in results:
        judged = checked[result.way.name]
        for number, question in enumerate(questions):
            lines.append(
                {
                    "part": question["part"],
                    "question": last_question(question["prompt"]),
                    "way": result.way.name,
                    "answer": result.answers["answer"][number],
                    "right": bool(judged["right"][number]),
                    "chrf": float(judged["chrf"][number]),
                    "references": question["references"],
                    "prompt_tokens": result.prompt_tokens[number],
                    "new_tokens": int(result.answers["new_tokens"][number]),
                }
            )
    return lines
