"""A whole table as a data set: cleaned, without copies, encoded, split by question, and saved with a report.

A table may be larger than memory. So its rows go through all steps a thousand at a time, to a file from which the
splits are dealt out.
"""

import hashlib
import json
import sys
import tempfile
from array import array
from collections import Counter
from importlib import resources
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm

from tabletune.chat.encoding import decode_all, encode_all
from tabletune.chat.markers import break_markers
from tabletune.chat.templates import takes_system, takes_tools
from tabletune.data.arrow import batches, features_of, in_arrow, read_rows, write_arrow
from tabletune.data.cleaning import Cleaning, Dropped
from tabletune.data.duplicates import Copies
from tabletune.data.shapes import (
    NO_PLACE,
    conversation,
    emptier,
    fields_of,
    fill,
    shows_tool_turns,
    turn_of_calls,
)
from tabletune.data.splits import assign_splits, place, question_key
from tabletune.errors import StageError
from tabletune.run.files import set_aside, whole
from tabletune.stats import FEWEST_GROUPS

datasets.disable_progress_bars()
ADVICE = {
    "no question": "a column that may be empty gets a line of its own in question_template",
    "no answer": "answer_column names what every row needs",
    "near duplicate": "near_duplicate_threshold: 1.01 keeps what differs in capitals or punctuation",
}
SPLITS = ("train", "validation", "test")


def group_of(key):
    """A short name for a question, the same for all rows that ask it."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


class Formatting:
    """A table on its way through all steps, which count what they read, change and drop.

    `settings` are the parameters of notebook 1; `dropped` becomes {reason: rows}, `clean.changed` what the rules did.
    """

    def __init__(self, table, shape, settings, tokenizer, stops):
        self.table, self.shape, self.settings, self.tokenizer, self.stops = (
            table,
            shape,
            settings,
            tokenizer,
            stops,
        )
        self.clean = Cleaning(
            *(settings[name] for name in ("html_to_text", "strip_addresses", "collapse_spaces"))
        )
        self.emptied = emptier(shape, settings["drop_values"], settings["drop_patterns"])
        self.rows_in, self.dropped, self.shown, self.systems = 0, Counter(), [], 0
        self.lengths, self.longer, self.places, self.official = (
            array("i"),
            array("i"),
            array("d"),
            [],
        )

    def drop(self, reason, row):
        """Count a dropped row, and keep the first of each reason as they are in the table."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= 5:
            self.shown.append(
                {"reason": reason, **{field: text[:200] for field, text in row.items()}}
            )

    def messages(self, row):
        """The texts of a row's question, and its messages as this model's template takes them. Raises Dropped."""
        asked, messages = conversation(row, self.shape, self.clean, self.emptied)
        answered = (
            max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
            + 1
        )
        self.clean.note("turns after the last answer", str(messages[answered:]), "[]")
        for turn in messages[:answered]:
            if turn["role"] == "tool" and not shows_tool_turns(self.tokenizer):
                raise StageError(f"The table has turns of tools, {NO_PLACE}")
            if "tool_calls" in turn:
                turn["content"] = turn_of_calls(turn, self.tokenizer)
                del turn["tool_calls"]
            else:
                before, turn["content"] = (
                    turn["content"],
                    break_markers(turn["content"], self.tokenizer),
                )
                self.clean.note("special tokens broken up", before, turn["content"])
        if not answered or not messages[answered - 1]["content"]:
            raise Dropped("no answer")
        if self.shape.name == "text":
            return asked, messages
        if not any(turn["role"] == "user" and turn["content"] for turn in messages[:answered]):
            raise Dropped("no question")
        return asked, self.with_system(messages[:answered])

    def with_system(self, messages):
        """The messages with the system prompt, in front of the first question if the template has no place for it."""
        if self.settings["system_prompt"] and messages[0]["role"] != "system":
            text = break_markers(self.settings["system_prompt"], self.tokenizer)
            messages = [{"role": "system", "content": text}, *messages]
        self.systems += messages[0]["role"] == "system"
        if messages[0]["role"] == "system" and not takes_system(self.tokenizer):
            system, *messages = messages
            first = next(turn for turn in messages if turn["role"] == "user")
            first["content"] = f"{system['content']}\n\n{first['content']}"
        return messages

    def cleaned(self):
        """Yield the rows as conversations: those that teach something, and are no copies of earlier ones."""
        copies = Copies(self.settings["near_duplicate_threshold"])
        for official, cells in self.table.rows(list(self.shape.columns.values())):
            row = dict(zip(self.shape.columns, cells, strict=True))
            self.clean.hit.clear()
            self.rows_in += 1
            try:
                asked, messages = self.messages(row)
                tools = break_markers(row.get("tools", ""), self.tokenizer)
                if tools and not takes_tools(self.tokenizer):
                    raise StageError(f"The table has tools, {NO_PLACE}")
                copies.check(official, messages, tools)
            except Dropped as reason:
                self.drop(str(reason), row)
                continue
            turns = {"prompt": messages[:-1], "completion": messages[-1:]}
            yield {
                **turns,
                "tools": tools,
                "key": question_key(asked),
                "split": official,
                "row": row,
            }

    def first(self):
        """The first row that is kept. Raises StageError if there is none."""
        row = next(self.cleaned(), None)
        return row or self.check_lost()

    def encoded(self, rows):
        """Yield the rows that fit into max_length as examples, with what their ids say as `text`."""
        for batch in batches(rows):
            encoded = self.ids_of(batch)
            for row, ids, text in zip(
                batch, encoded, decode_all(encoded, self.tokenizer), strict=True
            ):
                if not ids or len(ids) > self.settings["max_length"]:
                    self.drop("too long" if ids else "refused by the chat template", row["row"])
                    self.longer.extend([len(ids)] if ids else [])
                    continue
                self.lengths.append(len(ids))
                self.places.append(place(row["key"], self.settings["seed"]))
                self.official.append(row["split"])
                yield {**row, "text": text, "group": group_of(row["key"])}

    def ids_of(self, rows):
        """The ids of each row, [] where the chat template refuses it."""
        try:
            return [
                encoded["input_ids"] for encoded in encode_all(rows, self.tokenizer, self.stops)
            ]
        except StageError:
            return [[]] if len(rows) == 1 else [ids for row in rows for ids in self.ids_of([row])]

    def check_lost(self):
        """Raise StageError if more rows are lost than max_dropped allows, with the settings that keep them."""
        lost, allowed = (
            self.dropped.total() - self.dropped["duplicate"],
            self.settings["max_dropped"],
        )
        if self.lengths and lost <= allowed * self.rows_in:
            return
        lengths = np.sort([*self.lengths, *self.longer])
        keeps = (
            {"too long": f"max_length: {lengths[int(0.95 * (len(lengths) - 1))]} keeps 95%"}
            if len(lengths)
            else {}
        )
        advice = {**ADVICE, **keeps}
        parts = [
            f"{n:,} {reason} ({advice.get(reason, 'see the table')})"
            for reason, n in self.dropped.items()
        ]
        raise StageError(
            f"{lost:,} of {self.rows_in:,} rows would be lost, more than max_dropped={allowed}: {'; '.join(parts)}. "
            f"Change that, or go on without them: max_dropped: {np.ceil(100 * lost / self.rows_in) / 100}."
        )

    def safety_rows(self, held_out):
        """Our rows on emergencies as examples: as many as `safety_rows` says, of all kinds, none that is `held_out`.

        Each emergency is there in free words, and in those of the question's template, where that has one field. Raises
        StageError if there are not so many.
        """
        wanted, template, rows = self.settings["safety_rows"], self.shape.question_template, []
        fields = fields_of(template)
        for line in (
            resources.files("tabletune")
            .joinpath("resources/texts/safety_rows.txt")
            .read_text("utf-8")
            .splitlines()
        ):
            named, question, answer = map(str.strip, line.split("|"))
            worded = named and len(fields) == 1 and template.strip() != f"{{{fields[0]}}}"
            for asked in [question, *([fill(template, {fields[0]: named})] if worded else [])]:
                user, completion = (
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answer},
                )
                prompt = {
                    "prompt": self.with_system([user]),
                    "completion": [completion],
                    "tools": "",
                }
                rows.append(
                    {
                        **prompt,
                        "key": question_key([asked]),
                        "group": group_of(question_key([asked])),
                    }
                )
        usable = [
            {**row, "text": self.tokenizer.decode(ids)}
            for row, ids in zip(rows, self.ids_of(rows), strict=True)
            if row["key"] not in held_out and len(ids) <= self.settings["max_length"]
        ]
        number = len(usable) if wanted is True else wanted
        if not isinstance(number, int) or not 0 <= number <= len(usable):
            raise StageError(
                f"safety_rows={wanted!r}: use true, false, or a number up to {len(usable)}."
            )
        return [usable[i] for i in np.linspace(0, len(usable), number, endpoint=False, dtype=int)]


def format_table(table, shape, settings, tokenizer, stops, folder, context=None):
    """Put a table through all steps and save it as `folder`: a DatasetDict, and report.json, which is returned.

    An earlier one moves aside once the new one is whole. The fingerprint is a SHA-256 of the text of all splits: two
    data sets with the same one train the same. `context` is how many tokens the model reads at once. Raises StageError
    if too many rows are lost, or too few questions are left.
    """
    work, features = (
        Formatting(table, shape, settings, tokenizer, stops),
        features_of(*{"tools"} & {*shape.columns}),
    )
    waiting = features_of("key", "tools")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        rows = tqdm(
            work.encoded(work.cleaned()),
            "formatting",
            unit=" rows",
            delay=10,
            mininterval=10,
            file=sys.stdout,
        )
        path = Path(temporary) / "rows.arrow"
        write_arrow(path, in_arrow(rows, waiting), waiting)
        work.check_lost()
        fractions = settings["validation_fraction"], settings["test_fraction"]
        split = assign_splits(work.places, *fractions, work.official)
        held_out = read_rows(path, split != "train", ["key"]) if settings["safety_rows"] else []
        safety = work.safety_rows({key for batch in held_out for key in batch["key"].to_pylist()})
        sizes, digest = {}, hashlib.sha256()
        with whole(folder) as partial:
            empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
            datasets.DatasetDict(dict.fromkeys(SPLITS, empty)).save_to_disk(partial)
            for name in sorted(SPLITS):  # save_to_disk would map the whole table into memory
                (file,) = (partial / name).glob("*.arrow")
                there = chain(
                    read_rows(path, split == name, features),
                    in_arrow(safety if name == "train" else [], features),
                )
                sizes[name] = write_arrow(file, with_digest(there, name, digest), features)
            report = report_of(
                work, {name: sizes[name] for name in SPLITS}, split, context, len(safety)
            )
            report["fingerprint"] = digest.hexdigest()[:16]
            (partial / "report.json").write_text(
                json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8"
            )
            set_aside(folder.parent, folder.name)
    return report


def with_digest(arrow, split, digest):
    """Yield the batches of a split, the text of each row added to the digest on its way."""
    for batch in arrow:
        digest.update("".join(f"{split}\0{text}\0" for text in batch["text"].to_pylist()).encode())
        yield batch


def report_of(work, sizes, split, context, safety_rows):
    """What there is to know of a data set, for `report.json` and for what notebook 1 shows."""
    table, shape, settings = work.table, work.shape, work.settings
    lengths, places = np.array(work.lengths), np.array(work.places)
    asked = {name: np.unique(places[split == name]) for name in SPLITS}
    leaks = {name: int(np.isin(places[split == name], asked["train"]).sum()) for name in SPLITS[1:]}
    leaks = {name: count for name, count in leaks.items() if count}
    few = [name for name in SPLITS[1:] if len(asked[name]) < FEWEST_GROUPS]
    beyond, html = int((lengths > (context or lengths.max())).sum()), work.clean.html
    in_front = work.systems and not takes_system(work.tokenizer)
    notes = [
        html > 0.05 * work.rows_in
        and f"{html:,} texts look like HTML. html_to_text: true makes text of it.",
        beyond
        and f"{beyond:,} examples are longer than the {context} tokens that this model was made to read at once.",
        leaks
        and f"Asked in training, too: {leaks} rows. The splits of the source stay as they are.",
        few
        and f"Too few questions for an interval: {' and '.join(few)}. More rows would make more of them.",
        shape.name == "text" and "A lone text has no question: the loss is on all of it.",
        in_front
        and "The template has no system role: the system text goes in front of the first question.",
    ]
    questions = np.unique(np.unique(places, return_counts=True)[1], return_counts=True)
    texts = {
        "question": shape.question_template,
        "answer": shape.answer_template,
        "answer_column": shape.answer_column,
    }
    return {
        "source": {"dataset": settings["dataset"], "files": table.said, "digest": table.digest},
        "dataset_commit": table.commit,
        "shape": shape.name,
        "example": shape.example,
        "templates": texts,
        **{
            name: settings[name]
            for name in ("base_model", "max_length", "system_prompt", "thinking", "template_date")
        },
        "rows_in": work.rows_in,
        "rows_out": len(lengths),
        "changed": work.clean.changed,
        "dropped": dict(work.dropped),
        "dropped_rows": work.shown,
        "notes": [note for note in notes if note],
        "safety_rows": safety_rows,
        "splits": sizes,
        "questions": {name: len(there) for name, there in asked.items()},
        "rows_a_question": [part.tolist() for part in questions],
        "leaks": leaks,
        "tokens": {
            **{f"p{share}": int(np.quantile(lengths, share / 100)) for share in (50, 95)},
            "max": int(lengths.max()),
            "over_max_length": len(work.longer),
            "histogram": [part.tolist() for part in np.histogram(lengths, bins=30)],
        },
    }
