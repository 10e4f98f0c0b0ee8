"""Training prompts with rows of the table in them: conversations that teach to answer from rows, or
to refuse.

One context serves several questions: the first turn has the rows, and the turns after it ask on.
That costs a third of the tokens of one prompt a question. For some questions the context has the
row, for others it has only the most similar rows of other questions, and the answer is
`unknown_answer`.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

from tabletune.data.context import TableContext
from tabletune.data.lookup import MOST_CONTEXT_ROWS, answer_without_thoughts, lookup_text
from tabletune.data.retrieval import TableRow
from tabletune.data.rewording import Rewording, same_answer

Message = dict[str, str]
MOST_HITS = 4  # questions of one context that it answers
OTHER_WORDING_SHARE = 0.5  # of the questions whose answer stands in the context under another one
PRACTICE_OTHER_SHARE = 0.75
PRACTICE_REWORDED_SHARE = 0.25
PRACTICE_QUESTIONS = 3  # of one context that it answers
PRACTICE_MISSING = 2  # and that it does not answer


@dataclass(frozen=True)
class PromptOptions:
    """How training prompts are made: the parameters of notebook 1 of the same names."""

    context_hit_rate: float = 0.75
    copies: float = 1.0
    reworded_share: float = 0.5
    practice_prompts: int = 0
    seed: int = 42


@dataclass
class Turn:
    """A question, its answer, and what it teaches: "own row", "other wording", "missing" or
    "practice".
    """

    question: str
    answer: str
    kind: str


@dataclass
class TrainingPrompt:
    """A conversation about one context: the messages before it, its rows in the order shown, and
    its turns.
    """

    history: list[Message]
    rows: list[TableRow]
    turns: list[Turn]
    question_id: str

    def messages(self, context: TableContext) -> list[Message]:
        """The conversation as messages; the rows stand in its first turn."""
        messages = list(self.history)
        for number, turn in enumerate(self.turns):
            text = turn.question
            if number == 0:
                text = context.message(self.rows, turn.question)
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages


@dataclass(frozen=True)
class TrainingRow:
    """A row to make prompts of: as it is looked up, its answer in full, and the messages before
    its question.
    """

    row: TableRow
    answer: str
    history: tuple[tuple[str, str], ...] = ()


def training_rows(rows: Iterable[dict[str, Any]]) -> list[TrainingRow]:
    """The rows of a data set of notebook 1, without texts that have no question."""
    result = []
    for row in rows:
        users = [place for place, turn in enumerate(row["prompt"]) if turn["role"] == "user"]
        if not users:
            continue
        answer = row["completion"][0]["content"]
        shown = answer_without_thoughts(answer)
        question = row["prompt"][users[-1]]["content"]
        history = tuple((turn["role"], turn["content"]) for turn in row["prompt"][: users[-1]])
        result.append(TrainingRow(TableRow(question, shown, row["group"]), answer, history))
    return result


@dataclass
class PromptMaker:
    """Makes training prompts of the rows of a context's index (evaluation: those of the train
    split).
    """

    context: TableContext
    rows: Sequence[TrainingRow]
    options: PromptOptions
    rewordings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # {question id: texts}

    def __post_init__(self) -> None:
        self.random = random.Random(self.options.seed)
        self.reword = Rewording([row.row.question for row in self.rows], "training")
        self.ids = np.array([row.row.question_id for row in self.rows])  # [rows]
        self.answers = np.array([lookup_text(row.row.answer) for row in self.rows])  # [rows]
        self.paraphrases = same_answer([row.row for row in self.rows])
        self.unknown = self.context.settings.unknown_answer

    def prompts(self) -> Iterator[TrainingPrompt]:
        """Yield the prompts of the table: each row is asked `copies` times."""
        times_asked: Counter[int] = Counter()
        for lap, place in self.order():
            if times_asked[place] <= lap:
                yield self.prompt(place, times_asked, lap)

    def order(self) -> Iterator[tuple[int, int]]:
        """Yield (lap, place of a row): all rows in a random order, again and again, `copies`
        times in all.
        """
        total = round(self.options.copies * len(self.rows))
        for lap in range(-(-total // max(1, len(self.rows)))):
            places = list(range(len(self.rows)))
            self.random.shuffle(places)
            for place in places[: total - lap * len(self.rows)]:
                yield lap, place

    def prompt(self, place: int, times_asked: Counter, lap: int) -> TrainingPrompt:
        """A conversation about a row and the rows most like it; counts in `times_asked`
        which rows it asks for.
        """
        first = self.rows[place]
        shown = self.context_of(place)
        hits = [place]
        if not self.has_turns_before(first):
            neighbours = [
                other
                for other in shown[1:]
                if times_asked[other] <= lap and not self.has_turns_before(self.rows[other])
            ]
            hits += self.random.sample(neighbours, min(MOST_HITS - 1, len(neighbours)))
        turns = []
        rate = self.options.context_hit_rate
        if rate == 0:
            hits = []
        for hit in hits:
            times_asked[hit] += 1
            turns.append(self.known_turn(self.rows[hit]))
        missing_wanted = (1 - rate) / rate * len(hits) if rate else 1
        missing_number = int(missing_wanted)
        missing_number += self.random.random() < missing_wanted - missing_number
        alone = self.has_turns_before(first)
        if alone and turns and self.random.random() >= rate:
            return self.missing_prompt(place)
        if not alone:
            missing = self.missing_rows(place, shown)
            self.random.shuffle(missing)
            turns += [self.missing_turn(self.rows[other]) for other in missing[:missing_number]]
        if not turns:
            return self.missing_prompt(place)
        self.random.shuffle(turns)
        rows = [self.rows[other].row for other in shown]
        self.random.shuffle(rows)
        history = [{"role": role, "content": text} for role, text in first.history]
        return TrainingPrompt(history, rows, turns, first.row.question_id)

    def missing_prompt(self, place: int) -> TrainingPrompt:
        """A conversation of one question whose rows are not in the context."""
        first = self.rows[place]
        rows = [
            hit.row for hit in self.context.choose(self.neighbours(first.row.question, [place]))
        ]
        self.random.shuffle(rows)
        history = [{"role": role, "content": text} for role, text in first.history]
        return TrainingPrompt(history, rows, [self.missing_turn(first)], first.row.question_id)

    def context_of(self, place: int) -> list[int]:
        """The places of the rows of a context: a row, and the most similar ones, each of another
        question.

        `lookup.choose_rows` chooses them in use, with the same limits. There, several rows of one
        question may stand together; here only one does, so that it is clear which answer is meant.
        """
        shown = [place]
        characters = self.length(place)
        settings = self.context.settings
        for other in self.most_similar(self.rows[place].row.question):
            if self.ids[other] in self.ids[shown] or self.answers[other] in self.answers[shown]:
                continue
            longer = characters + self.length(other) > settings.context_characters
            if len(shown) >= settings.context_rows and longer:
                break
            shown.append(other)
            characters += self.length(other)
        return shown

    def missing_rows(self, place: int, shown: list[int]) -> list[int]:
        """The places of similar rows whose questions a context does not answer, not even in
        other words.
        """
        missing: list[int] = []
        for other in self.most_similar(self.rows[place].row.question):
            if self.ids[other] in self.ids[shown] or self.answers[other] in self.answers[shown]:
                continue
            if self.ids[other] not in self.ids[missing] and not self.has_turns_before(
                self.rows[other]
            ):
                missing.append(other)
            if len(missing) == 2 * MOST_HITS:
                break
        return missing

    def most_similar(self, question: str) -> list[int]:
        """The places of the rows with the most similar questions, best first."""
        scores = self.context.index.scores(question)
        order = np.argsort(-np.round(scores, 6), kind="stable")
        return order[: 3 * MOST_CONTEXT_ROWS].tolist()

    def neighbours(self, question: str, places: list[int]) -> list[Any]:
        """Hits for a question, none of the questions, and none with the answers, of the rows at
        `places`.
        """
        excluded = np.isin(self.ids, self.ids[places])
        excluded |= np.isin(self.answers, self.answers[places])
        index = self.context.index
        return index.best(index.scores(question), MOST_CONTEXT_ROWS, excluded)

    def known_turn(self, training_row: TrainingRow) -> Turn:
        """A question that the context answers: the row's own, reworded or not, or another with
        the same answer.
        """
        row = training_row.row
        wordings = [
            other.question
            for other in self.paraphrases.get(lookup_text(row.answer), [])
            if other.question_id != row.question_id
        ]
        if wordings and self.random.random() < OTHER_WORDING_SHARE:
            return Turn(self.random.choice(wordings), training_row.answer, "other wording")
        return Turn(self.worded(row), training_row.answer, "own row")

    def missing_turn(self, training_row: TrainingRow) -> Turn:
        """A question that the context does not answer."""
        answer = self.unknown or training_row.answer
        return Turn(self.worded(training_row.row), answer, "missing")

    def worded(self, row: TableRow) -> str:
        """A row's question, as it stands or in other words."""
        if self.random.random() >= self.options.reworded_share:
            return row.question
        readers_wordings = self.rewordings.get(row.question_id)
        if readers_wordings:
            return self.random.choice(list(readers_wordings))
        return self.reword(row.question, self.random)

    def length(self, place: int) -> int:
        """The characters of a row in a prompt."""
        row = self.rows[place].row
        return len(row.question) + len(row.answer)

    @staticmethod
    def has_turns_before(row: TrainingRow) -> bool:
        """Whether a row's question is not the first of its conversation, so that it cannot share
        a context.
        """
        return any(role != "system" for role, _ in row.history)


# --- practice: tables of other fields that the package brings


@dataclass
class PracticeTable:
    """A small made-up table: facts as (answer, wordings of its question), and questions that it
    does not answer.
    """

    facts: list[tuple[str, list[str]]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read_practice() -> list[PracticeTable]:
    """The practice tables of the package."""
    file = resources.files("tabletune") / "resources/texts/practice.txt"
    tables: list[PracticeTable] = []
    for line in file.read_text("utf-8").splitlines():
        mark, text = line[:1], line[2:]
        if mark == "#":
            tables.append(PracticeTable())
        elif mark == "=":
            tables[-1].facts.append((text, []))
        elif mark == "?":
            tables[-1].unknown.append(text)
        elif line:
            tables[-1].facts[-1][1].append(line)
    return tables


def practice_prompts(
    context: TableContext, options: PromptOptions, system: Sequence[Message] = ()
) -> Iterator[TrainingPrompt]:
    """Yield prompts about the practice tables: paraphrases to be answered from rows, and questions
    to refuse.

    They teach to match by meaning, which a table with one wording for each question cannot. Without
    `unknown_answer` there are only questions that the rows answer.
    """
    random_numbers = random.Random(f"practice {options.seed}")
    tables = read_practice()
    every = [text for table in tables for _, texts in table.facts for text in texts]
    reword = Rewording(every, "training")
    unknown = context.settings.unknown_answer
    for _ in range(options.practice_prompts):
        table = random_numbers.choice(tables)
        facts = random_numbers.sample(table.facts, len(table.facts))
        size = min(max(1, context.settings.context_rows), len(facts) - 1)
        rows = [TableRow(random_numbers.choice(texts), text, "") for text, texts in facts[:size]]
        answerable = []
        for (answer, texts), row in zip(facts, rows, strict=False):
            neighbours = [text for text in texts if text != row.question]
            question = row.question
            if random_numbers.random() < PRACTICE_OTHER_SHARE:
                question = random_numbers.choice(neighbours)
            if random_numbers.random() < PRACTICE_REWORDED_SHARE:
                question = reword(question, random_numbers)
            answerable.append(Turn(question, answer, "practice"))
        turns = random_numbers.sample(answerable, min(PRACTICE_QUESTIONS, len(answerable)))
        if unknown:
            missing = [random_numbers.choice(texts) for _, texts in facts[size:]]
            missing += random_numbers.sample(table.unknown, PRACTICE_MISSING)
            picked = random_numbers.sample(missing, min(PRACTICE_MISSING, len(missing)))
            turns += [Turn(question, unknown, "practice") for question in picked]
        random_numbers.shuffle(turns)
        random_numbers.shuffle(rows)
        yield TrainingPrompt([dict(turn) for turn in system], rows, turns, "practice")
