"""The folder `retrieval/` of a run: two indexes, settings of prompts, and training prompts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from tabletune.chat.encoding import decode_all, encode_all
from tabletune.data.arrow import features_of
from tabletune.data.calibration import Calibration, calibrate, share_below
from tabletune.data.context import FOLDER, ContextSettings, TableContext, load_context
from tabletune.data.csv_files import read_small_csv
from tabletune.data.lookup import answer_without_thoughts
from tabletune.data.out_of_scope import read_out_of_scope
from tabletune.data.retrieval import RowIndex, TableRow, all_rows, table_rows
from tabletune.data.splits import question_id, question_key
from tabletune.data.training_prompts import (
    PromptMaker,
    PromptOptions,
    TrainingPrompt,
    TrainingRow,
    Turn,
    practice_prompts,
    training_rows,
)
from tabletune.errors import StageError
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import archive, atomic_write, write_json

if TYPE_CHECKING:
    from tabletune.data.formatter import TableFormatter

PROMPTS = "prompts"
TABLE_SHARE = 0.8  # of most_tokens are for prompts about the table, the rest for practice
VALIDATION_SHARE = 0.1  # of the number of training prompts: so many validation prompts
FEWEST_VALIDATION = 8
MOST_VALIDATION = 200


def check_context_settings(settings: Mapping[str, Any], shape: str, tools: bool) -> None:
    """Raise StageError if `context_rows` does not go with the table or with other parameters."""
    if not settings["context_rows"]:
        return
    if shape == "text":
        raise StageError(
            "context_rows needs questions to look up, and this table has texts without questions. "
            "Set context_rows: 0."
        )
    if tools:
        raise StageError("context_rows cannot be used with tools. Set context_rows: 0.")
    template = settings["context_template"]
    for field in ("{rows}", "{question}"):
        if template.count(field) != 1:
            raise StageError(f"context_template needs {field} once: {template!r}")


def write_retrieval(
    run: Path, settings: Mapping[str, Any], formatter: "TableFormatter"
) -> dict[str, Any]:
    """Write `retrieval/` beside the data set of a run; return its report, with what was written.

    The report's `fingerprint` is that of the rows and the training prompts together. Without
    `context_rows` an earlier folder moves aside, and the report stays as it is.
    """
    splits, report = load_dataset_of_run(run)
    if not settings["context_rows"]:
        archive(run, FOLDER)
        return report
    tools = "tools" in splits["train"].column_names and any(splits["train"]["tools"])
    check_context_settings(settings, report["shape"], tools)
    train = list(splits["train"])
    template = formatter.shape.question_template
    out_of_scope = read_out_of_scope(settings["out_of_scope"], template)
    # rows of the train split alone, so that a test question does not find its own row
    index = RowIndex.build(table_rows(train), out_of_scope=out_of_scope)
    calibration = calibrate(index, settings["seed"])
    context = TableContext(index, context_settings(settings, calibration))
    prompts = PromptWriter(context, settings, formatter.tokenizer, formatter.stop_token_ids)
    rewordings = read_rewordings(settings["rewordings"], formatter)
    prompts.make(train, list(splits["validation"]), rewordings)
    with atomic_write(run / FOLDER) as partial:
        index.save(partial / "evaluation")
        RowIndex.build(all_rows(splits), index.analyzer, out_of_scope).save(partial / "use")
        prompts.save(partial / PROMPTS)
        write_json(partial / "settings.json", stored_settings(context, calibration, prompts))
        archive(run, FOLDER)
    report["context"] = prompts.report(context, calibration)
    # a training on other prompts of the same rows is another training
    digest = hashlib.sha256((report["fingerprint"] + prompts.digest()).encode()).hexdigest()
    report["fingerprint"] = digest[:16]
    write_json(run / "dataset" / "report.json", report)
    return report


def context_settings(settings: Mapping[str, Any], calibration: Calibration) -> ContextSettings:
    """The settings of prompts, with the calibrated thresholds where the reader has set none."""
    low, certain = settings["unknown_threshold"], settings["certain_threshold"]
    return ContextSettings(
        settings["context_rows"],
        settings["context_characters"],
        settings["context_template"],
        settings["unknown_answer"],
        calibration.unknown_threshold if low == "auto" else float(low),
        calibration.certain_threshold if certain == "auto" else float(certain),
    )


def stored_settings(
    context: TableContext, calibration: Calibration, prompts: "PromptWriter"
) -> dict[str, Any]:
    """The content of `settings.json`."""
    scores = {
        "answerable": [round(score, 3) for score in calibration.answerable_scores],
        "others": [round(score, 3) for score in calibration.other_scores],
    }
    return {
        **asdict(context.settings),
        "analyzer": context.index.analyzer,
        "calibration": scores,
        "prompts": prompts.digest(),
    }


class PromptWriter:
    """Makes the training and validation prompts of a run, encodes them, and counts them."""

    def __init__(
        self,
        context: TableContext,
        settings: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: list[int],
    ) -> None:
        self.context = context
        self.settings = settings
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self.kinds: Counter[str] = Counter()  # questions in training prompts
        self.shortened = 0  # prompts that lost rows or turns to fit into max_length
        self.dropped = 0
        self.lengths: list[int] = []  # of the training prompts, in tokens
        self.splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}

    def make(
        self,
        train: list[dict[str, Any]],
        validation: list[dict[str, Any]],
        rewordings: Mapping[str, Sequence[str]],
    ) -> None:
        """Make the prompts of both splits.

        Raises StageError if none of them fits into max_length.
        """
        options = PromptOptions(
            self.settings["context_hit_rate"],
            self.settings["copies"],
            self.settings["reworded_share"],
            self.settings["practice_prompts"],
            self.settings["seed"],
        )
        rows = training_rows(train)
        maker = PromptMaker(self.context, rows, options, rewordings)
        most = self.settings["most_tokens"]
        examples = self.examples(maker.prompts(), TABLE_SHARE * most)
        # practice prompts begin as those of the table do
        system = [turn for turn in train[0]["prompt"][:1] if turn["role"] == "system"]
        examples += self.examples(practice_prompts(self.context, options, system), most)
        self.splits["train"] = examples
        number = round(VALIDATION_SHARE * len(examples))
        number = min(MOST_VALIDATION, max(FEWEST_VALIDATION, number))
        new = self.validation_prompts(maker, validation, number)
        self.splits["validation"] = self.examples(new, count=False)
        if not self.splits["train"] or not self.splits["validation"]:
            raise StageError(
                f"max_length={self.settings['max_length']}: no prompt with rows of the table fits. "
                "Raise max_length, or lower context_rows."
            )

    def validation_prompts(
        self, maker: PromptMaker, validation: list[dict[str, Any]], number: int
    ) -> Iterable[TrainingPrompt]:
        """Yield prompts of one question each, with the rows that the lookup finds.

        `context_hit_rate` of them are reworded questions of the table, the others are new ones.
        """
        rate = self.settings["context_hit_rate"]
        hits = round(number * rate)
        order = list(range(len(maker.rows)))
        maker.random.shuffle(order)
        for place in order[:hits]:
            row = maker.rows[place]
            question = maker.reword(row.table_row.question, maker.random)
            yield self.validation_prompt(row, question, row.answer)
        new = training_rows(validation)
        maker.random.shuffle(new)
        for row in new[: number - hits]:
            answerable = self.context.has_answer([row.table_row.answer])
            answer = row.answer
            if not answerable:
                answer = self.context.settings.unknown_answer or row.answer
            yield self.validation_prompt(row, row.table_row.question, answer)

    def validation_prompt(self, row: TrainingRow, question: str, answer: str) -> TrainingPrompt:
        """A question as it is put to the model in use: its rows are what the lookup finds."""
        rows = [hit.row for hit in self.context.hits(question)]
        turns = [Turn(question, answer, "")]
        return TrainingPrompt(row.history_messages(), rows, turns, row.table_row.question_id)

    def examples(
        self, prompts: Iterable[TrainingPrompt], most_tokens: float = 0, count: bool = True
    ) -> list[dict[str, Any]]:
        """The prompts as examples that fit into max_length.

        One that does not fit loses turns, then rows. The examples end before all that was counted
        has more than `most_tokens`; 0 is no limit.
        """
        examples: list[dict[str, Any]] = []
        for prompt in prompts:
            example, length, shorter = self.fitting(prompt)
            # one prompt at least, however long it is
            if most_tokens and sum(self.lengths) + length > most_tokens and self.lengths:
                break
            if count:
                self.shortened += shorter and example is not None
                self.dropped += example is None
            if example is None:
                continue
            if count:
                self.kinds.update(turn.kind for turn in prompt.turns)
                self.lengths.append(length)
            examples.append(example)
        return examples

    def fitting(self, prompt: TrainingPrompt) -> tuple[dict[str, Any] | None, int, bool]:
        """A prompt as an example, its tokens, and whether it was made shorter.

        None instead of an example if it never fits.
        """
        shorter = False
        while True:
            messages = prompt.messages(self.context)
            row = {"prompt": messages[:-1], "completion": messages[-1:]}
            ids = encode_all([row], self.tokenizer, self.stop_token_ids)[0]["input_ids"]
            if len(ids) <= self.settings["max_length"]:
                text = decode_all([ids], self.tokenizer)[0]
                return {**row, "text": text, "group": prompt.question_id}, len(ids), shorter
            shorter = True
            if len(prompt.turns) > 1:
                prompt.turns.pop()
                continue
            answer = answer_without_thoughts(prompt.turns[0].answer)
            # the row with the answer stays; what goes is the last of the others
            spare = [row for row in prompt.rows if row.answer != answer]
            if not spare or len(prompt.rows) == 1:
                return None, len(ids), shorter
            prompt.rows.remove(spare[-1])

    def save(self, folder: Path) -> None:
        """Save the prompts as a DatasetDict."""
        features = features_of()
        splits = {
            name: datasets.Dataset.from_list(rows, features=features)
            for name, rows in self.splits.items()
        }
        datasets.DatasetDict(splits).save_to_disk(folder)

    def digest(self) -> str:
        """A SHA-256 of the texts of all prompts."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            for row in rows:
                digest.update(f"{name}\0{row['text']}\0".encode())
        return digest.hexdigest()

    def report(self, context: TableContext, calibration: Calibration) -> dict[str, Any]:
        """What notebook 1 shows of the prompts."""
        settings = context.settings
        return {
            **asdict(settings),
            "prompts": {name: len(rows) for name, rows in self.splits.items()},
            "questions": dict(self.kinds),
            "out_of_scope": len(context.index.out_of_scope),
            "shortened": self.shortened,
            "dropped": self.dropped,
            "tokens": {
                **{f"p{share}": int(np.quantile(self.lengths, share / 100)) for share in (50, 95)},
                "max": max(self.lengths),
                "sum": sum(self.lengths),
            },
            "false_nothing": share_below(calibration.answerable_scores, settings.unknown_threshold),
            "refused": share_below(calibration.other_scores, settings.unknown_threshold),
        }


# --- rewordings of the reader's


def named_file_digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """What identifies the files that `rewordings` and `out_of_scope` name: {parameter: digest}.

    They are inputs of notebook 1. A parameter that names no file is left out.
    """
    digests = {}
    for parameter in ("rewordings", "out_of_scope"):
        path = Path(settings.get(parameter) or "").expanduser()
        if settings.get(parameter) and path.is_file():
            with path.open("rb") as file:
                digests[parameter] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return digests


def read_rewordings(source: str, formatter: "TableFormatter") -> dict[str, list[str]]:
    """Other wordings of questions, {question id: texts}; {} without a `source`.

    `source` is a file with the columns `question` and `rewording` (.csv or .jsonl), or a column of
    the table, whose cells have a wording a line. `formatter` is the TableFormatter of the table.
    Raises StageError if it is neither.
    """
    if not source:
        return {}
    wordings: dict[str, list[str]] = {}
    for key, text in pairs_of(source, formatter):
        if text.strip():
            wordings.setdefault(question_id(key), []).append(text.strip())
    if not wordings:
        raise StageError(
            f'rewordings={source!r} contains no rewording. Fill it, or set rewordings to "".'
        )
    return wordings


def pairs_of(source: str, formatter: "TableFormatter") -> Iterable[tuple[str, str]]:
    """Yield (key of a question, another wording)."""
    path = Path(source).expanduser()
    if path.is_file():
        for line in lines_of(path):
            try:
                yield question_key([line["question"]]), line["rewording"]
            except KeyError:
                raise StageError(
                    f"rewordings={source!r}: the file needs the columns question and rewording."
                ) from None
        return
    if source not in formatter.table.columns:
        raise StageError(f"rewordings={source!r} is neither a file nor a column of the table.")
    from tabletune.data.cells import cell_text
    from tabletune.data.cleaning import Dropped

    fields = list(formatter.shape.columns)
    columns = [*formatter.shape.columns.values(), source]
    for _, values in formatter.table.records(columns):
        record = dict(zip(fields, values, strict=False))
        try:
            key = formatter.conversation(record)["key"]
        except Dropped:
            continue
        for text in cell_text(values[-1]).splitlines():
            yield key, text


def lines_of(path: Path) -> list[dict[str, str]]:
    """The lines of a .csv, .tsv or .jsonl file as dicts. Raises StageError if it cannot be read."""
    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            return read_small_csv(path, f"rewordings={path}")
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"rewordings={path} cannot be read: {reason}") from None


# --- rows that came later


def renew_index(run: Path, rows: Sequence[TableRow]) -> dict[str, int]:
    """Replace the index for use by one over these rows; the old one moves to earlier/.

    Returns how many rows it has, and how many questions came and went. Raises StageError if the run
    has no index.
    """
    context = load_context(run, "use")
    if context is None:
        raise StageError(
            f"{run} has no index of its table: notebook 1 makes one if context_rows is set. Run "
            "`make run-all` with context_rows: 3 first."
        )
    folder = run / FOLDER
    old = context.index
    before = {row.question_id for row in old.rows}
    after = {row.question_id for row in rows}
    with atomic_write(folder / "use") as partial:
        RowIndex.build(rows, old.analyzer, old.out_of_scope).save(partial)
        archive(run, f"{FOLDER}/use")
    return {"rows": len(rows), "came": len(after - before), "went": len(before - after)}


def renew_from_table(run: Path, values: Mapping[str, Any]) -> None:
    """`make index`: read the table that `values` name, and renew the index for use of a run."""
    from tabletune.chat.tokenizer import load_tokenizer
    from tabletune.data.formatter import TableFormatter
    from tabletune.data.shapes import recognize, with_example
    from tabletune.data.table_file import ReadOptions
    from tabletune.data.tables import open_table
    from tabletune.run.parameters import PARAMETERS

    settings = PARAMETERS["01_format_dataset"] | dict(values)
    options = ReadOptions(
        settings["encoding"],
        settings["delimiter"],
        settings["quotes"],
        settings["header"],
        settings["header_row"],
    )
    table = open_table(
        settings["dataset"],
        settings["dataset_revision"],
        settings["dataset_config"],
        settings["splits"],
        options,
    )
    settings, example = with_example(table, settings)
    shape = recognize(table, settings, example)
    tokenizer, stop_token_ids = load_tokenizer(
        settings["base_model"],
        settings["base_model_revision"],
        settings["thinking"],
        settings["template_date"],
    )
    formatter = TableFormatter(table, shape, settings, tokenizer, stop_token_ids)
    conversations = list(formatter.conversations())
    if not conversations:
        formatter.check_lost()
    if settings["safety_rows"] not in (0, False):
        # they were in the index before, as rows of the train split
        conversations += formatter.safety_rows(set())
    rows = [{**row, "group": question_id(row["key"])} for row in conversations]
    changes = renew_index(run, table_rows(rows))
    print(
        f"The index for use has {changes['rows']:,} rows now: {changes['came']:,} questions came, "
        f"{changes['went']:,} went. The model is the same: no training is needed."
    )
