"""Training prompts with rows of the table in them: they teach to answer from rows, or to refuse.

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
from tabletune.data.retrieval import Hit, TableRow
from tabletune.data.rewording import Rewording, same_answer

Message = dict[str, str]
MOST_HITS = 4  # questions of one context that it answers
OTHER_WORDING_SHARE = 0.5  # of the questions whose answer stands in the context under another one
# how many of the most similar rows are looked at: many of them share a question or an answer, and a
# context shows each of these once
CANDIDATES = 3 * MOST_CONTEXT_ROWS
PRACTICE_OTHER_SHARE = 0.75
PRACTICE_REWORDED_SHARE = 0.25
PRACTICE_QUESTIONS = 3  # of one context that it answers
PRACTICE_MISSING = 2  # and that it does not answer


@dataclass(frozen=True)
class PromptOptions:
    """How training prompts are made: parameters of notebook 1, with its names and defaults."""

    context_hit_rate: float = 0.6
    copies: float = 1.0
    reworded_share: float = 0.5
    practice_prompts: int = 0
    seed: int = 42


@dataclass
class Turn:
    """A question, its answer, and what it teaches.

    `kind` is "own row", "other wording", "missing" or "practice".
    """

    question: str
    answer: str
    kind: str


@dataclass
class TrainingPrompt:
    """A conversation about one context.

    The messages before it, its rows in the order shown, and its turns.
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
    """A row to make prompts of.

    `table_row` is the row as it is looked up, `answer` its answer in full, thoughts included, and
    `history` has the messages before its question, (role, text) each.
    """

    table_row: TableRow
    answer: str
    history: tuple[tuple[str, str], ...] = ()

    @property
    def has_earlier_turns(self) -> bool:
        """Whether the question is not the first of its conversation.

        Such a question cannot share a context with others.
        """
        return any(role != "system" for role, _ in self.history)

    def history_messages(self) -> list[Message]:
        """The history as messages."""
        return [{"role": role, "content": text} for role, text in self.history]


def training_rows(rows: Iterable[dict[str, Any]]) -> list[TrainingRow]:
    """The rows of a data set of notebook 1, without texts that have no question."""
    result = []
    for row in rows:
        users = [place for place, turn in enumerate(row["prompt"]) if turn["role"] == "user"]
        if not users:
            continue
        last = users[-1]
        answer = row["completion"][0]["content"]
        shown = answer_without_thoughts(answer)
        table_row = TableRow(row["prompt"][last]["content"], shown, row["group"])
        history = tuple((turn["role"], turn["content"]) for turn in row["prompt"][:last])
        result.append(TrainingRow(table_row, answer, history))
    return result


@dataclass
class PromptMaker:
    """Makes training prompts of the rows of a context's index.

    For evaluation these are the rows of the train split. A *place* is the number of a row in
    `rows`, and a *lap* is one pass over all rows.
    """

    context: TableContext
    rows: Sequence[TrainingRow]
    options: PromptOptions
    rewordings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # {question id: texts}

    def __post_init__(self) -> None:
        self.random = random.Random(self.options.seed)
        table_rows = [row.table_row for row in self.rows]
        self.reword = Rewording([row.question for row in table_rows], "training")
        self.ids = np.array([row.question_id for row in table_rows])  # [rows]
        self.answers = np.array([lookup_text(row.answer) for row in table_rows])  # [rows]
        self.paraphrases = same_answer(table_rows)
        self.unknown = self.context.settings.unknown_answer

    def prompts(self) -> Iterator[TrainingPrompt]:
        """Yield the prompts of the table: each row is asked `copies` times.

        With a `context_hit_rate` of 0 no question has its row in the context: then each row makes
        `copies` contexts, and rows that are similar to it are asked.
        """
        times_asked: Counter[int] = Counter()  # {place: times}
        for lap, place in self.order():
            # a row that was asked in this lap beside another one has had its turn
            if times_asked[place] <= lap:
                yield self.prompt(place, times_asked, lap)

    def order(self) -> Iterator[tuple[int, int]]:
        """Yield (lap, place of a row): all rows in a random order, again and again.

        `copies` times in all, which may be a fraction.
        """
        total = round(self.options.copies * len(self.rows))
        laps = -(-total // max(1, len(self.rows)))  # rounded up
        for lap in range(laps):
            places = list(range(len(self.rows)))
            self.random.shuffle(places)
            for place in places[: total - lap * len(self.rows)]:
                yield lap, place

    # --- one prompt

    def prompt(self, place: int, times_asked: Counter[int], lap: int) -> TrainingPrompt:
        """A conversation about a row; counts in `times_asked` which rows it asks for."""
        if self.rows[place].has_earlier_turns:
            times_asked[place] += 1
            return self.prompt_with_history(place)
        return self.shared_prompt(place, times_asked, lap)

    def prompt_with_history(self, place: int) -> TrainingPrompt:
        """A conversation that ends with a row's own question.

        Its context has the row in `context_hit_rate` of all cases.
        """
        if self.random.random() >= self.options.context_hit_rate:
            return self.missing_prompt(place)
        return self.new_prompt(place, self.context_of(place), [self.known_turn(self.rows[place])])

    def shared_prompt(self, place: int, times_asked: Counter[int], lap: int) -> TrainingPrompt:
        """A conversation about a row and the rows most like it, several of which are asked for.

        Questions without their row are added, so that `context_hit_rate` of all have it.
        """
        shown = self.context_of(place)
        answered: list[int] = []
        if self.options.context_hit_rate > 0:
            answered = self.rows_to_ask(shown, times_asked, lap)
        turns = []
        for other in answered:
            times_asked[other] += 1
            turns.append(self.known_turn(self.rows[other]))
        unanswered = self.number_of_missing(len(answered))
        missing = self.missing_rows(place, shown)
        self.random.shuffle(missing)
        turns += [self.missing_turn(self.rows[other]) for other in missing[:unanswered]]
        if not turns:
            return self.missing_prompt(place)
        self.random.shuffle(turns)
        return self.new_prompt(place, shown, turns)

    def missing_prompt(self, place: int) -> TrainingPrompt:
        """A conversation of one question whose row is not in the context."""
        row = self.rows[place]
        hits = self.context.choose(self.hits_without(place))
        rows = [hit.row for hit in hits]
        self.random.shuffle(rows)
        turns = [self.missing_turn(row)]
        return TrainingPrompt(row.history_messages(), rows, turns, row.table_row.question_id)

    def new_prompt(self, place: int, shown: list[int], turns: list[Turn]) -> TrainingPrompt:
        """A conversation with the history of a row, and the rows at `shown` in a random order."""
        row = self.rows[place]
        rows = [self.rows[other].table_row for other in shown]
        self.random.shuffle(rows)
        return TrainingPrompt(row.history_messages(), rows, turns, row.table_row.question_id)

    # --- which rows

    def context_of(self, place: int) -> list[int]:
        """The places of the rows of a context: a row, and the most similar ones.

        At least `context_rows` rows, and more while they fit into `context_characters`, up to
        MOST_CONTEXT_ROWS: the limits of `lookup.choose_rows`, which chooses them in use. There,
        several rows of one question may stand together; here only one does, so that it is clear
        which answer is meant.
        """
        settings = self.context.settings
        shown = [place]
        characters = self.length(place)
        for other in self.most_similar(place):
            if len(shown) == MOST_CONTEXT_ROWS:
                break
            if self.is_like_one_of(other, shown):
                continue
            characters += self.length(other)
            if len(shown) >= settings.context_rows and characters > settings.context_characters:
                break
            shown.append(other)
        return shown

    def rows_to_ask(self, shown: list[int], times_asked: Counter[int], lap: int) -> list[int]:
        """The rows of a context that it is asked for: its first row, and some of the others.

        The others were not yet asked in this lap, and have no conversation of their own.
        """
        candidates = []
        for other in shown[1:]:
            if times_asked[other] <= lap and not self.rows[other].has_earlier_turns:
                candidates.append(other)
        number = min(MOST_HITS - 1, len(candidates))
        return [shown[0], *self.random.sample(candidates, number)]

    def number_of_missing(self, answered: int) -> int:
        """How many questions without their row go with `answered` questions that have it.

        On average so many that `context_hit_rate` of all questions have it; one if none has it.
        """
        rate = self.options.context_hit_rate
        if rate == 0:
            return 1
        expected = (1 - rate) / rate * answered
        number = int(expected)
        # the fraction is the probability of one more
        if self.random.random() < expected - number:
            number += 1
        return number

    def missing_rows(self, place: int, shown: list[int]) -> list[int]:
        """The places of similar rows whose questions a context does not answer.

        So none of its rows has the same question or the same answer.
        """
        missing: list[int] = []
        for other in self.most_similar(place):
            if len(missing) == 2 * MOST_HITS:
                break
            if self.is_like_one_of(other, shown) or self.ids[other] in self.ids[missing]:
                continue
            if not self.rows[other].has_earlier_turns:
                missing.append(other)
        return missing

    def is_like_one_of(self, place: int, places: list[int]) -> bool:
        """Whether a row has the question or the answer of one of the rows at `places`."""
        same_question = self.ids[place] in self.ids[places]
        return same_question or self.answers[place] in self.answers[places]

    def most_similar(self, place: int) -> list[int]:
        """The places of the rows whose questions are most similar to that of a row, best first."""
        scores = self.context.index.scores(self.rows[place].table_row.question)  # [rows]
        order = np.argsort(-np.round(scores, 6), kind="stable")
        return order[:CANDIDATES].tolist()

    def hits_without(self, place: int) -> list[Hit]:
        """The most similar rows to a row, without those of its question or with its answer."""
        excluded = (self.ids == self.ids[place]) | (self.answers == self.answers[place])  # [rows]
        index = self.context.index
        scores = index.scores(self.rows[place].table_row.question)
        return index.best(scores, MOST_CONTEXT_ROWS, excluded)

    def length(self, place: int) -> int:
        """The characters of a row in a prompt."""
        row = self.rows[place].table_row
        return len(row.question) + len(row.answer)

    # --- which words

    def known_turn(self, training_row: TrainingRow) -> Turn:
        """A question that the context answers.

        It is the row's own, reworded or not, or another question with the same answer.
        """
        row = training_row.table_row
        wordings = [
            other.question
            for other in self.paraphrases.get(lookup_text(row.answer), [])
            if other.question_id != row.question_id
        ]
        if wordings and self.random.random() < OTHER_WORDING_SHARE:
            return Turn(self.random.choice(wordings), training_row.answer, "other wording")
        return Turn(self.worded(row), training_row.answer, "own row")

    def missing_turn(self, training_row: TrainingRow) -> Turn:
        """A question that the context does not answer.

        Without an `unknown_answer` the model learns the row's own answer.
        """
        answer = self.unknown or training_row.answer
        return Turn(self.worded(training_row.table_row), answer, "missing")

    def worded(self, row: TableRow) -> str:
        """A row's question, as it stands or in other words."""
        if self.random.random() >= self.options.reworded_share:
            return row.question
        readers_wordings = self.rewordings.get(row.question_id)
        if readers_wordings:
            return self.random.choice(list(readers_wordings))
        return self.reword(row.question, self.random)


# --- practice: tables of other fields that the package brings


@dataclass
class PracticeTable:
    """A small made-up table.

    `facts` are (answer, wordings of its question); `unknown` are questions that it does not answer.
    """

    facts: list[tuple[str, list[str]]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read_practice() -> list[PracticeTable]:
    """The practice tables of the package.

    In practice.txt, a line with # begins a table, one with = is an answer, the lines below it are
    wordings of its question, and one with ? is a question that the table does not answer.
    """
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
    """Yield prompts about the practice tables.

    They have paraphrases to be answered from rows, and questions to refuse. They teach to match by
    meaning, which a table with one wording for each question cannot. Without `unknown_answer` there
    are only questions that the rows answer.
    """
    maker = PracticeMaker(context, options.seed)
    for _ in range(options.practice_prompts):
        yield maker.prompt([dict(turn) for turn in system])


class PracticeMaker:
    """Draws prompts about the practice tables."""

    def __init__(self, context: TableContext, seed: int) -> None:
        self.settings = context.settings
        self.random = random.Random(f"practice {seed}")
        self.tables = read_practice()
        questions: list[str] = []
        for table in self.tables:
            for _, wordings in table.facts:
                questions += wordings
        self.reword = Rewording(questions, "training")

    def prompt(self, history: list[Message]) -> TrainingPrompt:
        """A conversation about some facts of one table."""
        table = self.random.choice(self.tables)
        facts = self.random.sample(table.facts, len(table.facts))
        # at least one fact is not shown, so that there is something of the table to refuse
        size = min(max(1, self.settings.context_rows), len(facts) - 1)
        shown, hidden = facts[:size], facts[size:]
        rows = [TableRow(self.random.choice(wordings), text, "") for text, wordings in shown]
        turns = self.answered_turns(shown, rows)
        if self.settings.unknown_answer:
            turns += self.refused_turns(hidden, table.unknown)
        self.random.shuffle(turns)
        self.random.shuffle(rows)
        return TrainingPrompt(history, rows, turns, "practice")

    def answered_turns(
        self, facts: list[tuple[str, list[str]]], rows: list[TableRow]
    ) -> list[Turn]:
        """Questions that the rows answer, mostly in other words than the row has."""
        turns = []
        for (answer, wordings), row in zip(facts, rows, strict=True):
            other_wordings = [text for text in wordings if text != row.question]
            question = row.question
            if self.random.random() < PRACTICE_OTHER_SHARE:
                question = self.random.choice(other_wordings)
            if self.random.random() < PRACTICE_REWORDED_SHARE:
                question = self.reword(question, self.random)
            turns.append(Turn(question, answer, "practice"))
        return self.random.sample(turns, min(PRACTICE_QUESTIONS, len(turns)))

    def refused_turns(self, hidden: list[tuple[str, list[str]]], unknown: list[str]) -> list[Turn]:
        """Questions to refuse: of facts that are not shown, and of what the table never had."""
        questions = [self.random.choice(wordings) for _, wordings in hidden]
        questions += self.random.sample(unknown, PRACTICE_MISSING)
        picked = self.random.sample(questions, min(PRACTICE_MISSING, len(questions)))
        return [Turn(question, self.settings.unknown_answer, "practice") for question in picked]
