"""Tables as people keep them: any usual file, folder or Hub data set as rows of texts, each cell as it was written.

`datasets.load_dataset` does not read them: of a CSV's 007 it makes 7, of NA nothing, and a row with more cells than the
header it shifts without a word. What can be understood in two ways is refused here, in one line that says where.
"""

import hashlib
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from importlib import resources
from itertools import islice
from pathlib import Path

from tabletune.data.readers import READERS, cell_text, unpack
from tabletune.errors import StageError, hub_error, suggestion
from tabletune.run.parameters import from_yaml

DESCRIPTIONS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}  # beside tables, no tables
KNOWN = from_yaml(
    resources.files("tabletune").joinpath("resources/texts/shapes.yaml").read_text(encoding="utf-8")
)


@dataclass
class Table:
    """A table, to be read as often as needed.

    `parts` are its files: (official split, or "" if that is ours to choose, path, column names, a function that yields
    the rows). `said` has a line about each, `commit` is that of a Hub data set or None, `digest` is one of all bytes,
    and what was compressed lies `unpacked` as long as the table is there.
    """

    parts: list
    said: list
    commit: str | None
    digest: str
    unpacked: tempfile.TemporaryDirectory

    @property
    def columns(self):
        """The names of all columns."""
        return list(dict.fromkeys(name for _, _, names, _ in self.parts for name in names))

    def rows(self, wanted):
        """Yield (official split, texts of the `wanted` columns, "" where one is missing) for each row."""
        for split, path, _, rows in self.parts:
            with explained(path):
                for row in rows(wanted):
                    yield split, [cell_text(row.get(name)) for name in wanted]

    def sample(self, number=20):
        """The first rows of each file, dicts of all columns as the file's library reads them."""
        with explained(self.parts[0][1]):
            return [
                row
                for _, _, names, rows in self.parts[:number]
                for row in islice(rows(names), number)
            ]

    def looks_headless(self):
        """Whether the column names seem to be a row: sentences, numbers, or values that come again in their column."""
        odd = [
            name
            for name in self.columns
            if re.search(r"[.?!]$|^[-\d.,]+$|^.{60}", str(name).strip(), re.DOTALL)
        ]
        return bool(odd) or any(
            row.get(name) == name for row in self.sample(100) for name in self.columns
        )


def open_table(
    dataset, revision="main", config="", splits=None, encoding="auto", delimiter="auto", header=True
):
    """The Table in a file, a folder, the files of a pattern such as `data/*.csv`, or a Hub data set.

    `config` names one of several configurations, or a sheet of a workbook. `splits`, {"train": ..., "test": ...}, says
    which of the source's splits, or which files, are to be what; without it the source's own stay, if it has a held-out
    one. Raises StageError if there is no such table, if it is damaged or ambiguous, or if it has no rows.
    """
    root, files, commit = find_files(str(dataset), revision, config)
    unpacked = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    options = {"encoding": encoding, "delimiter": delimiter, "header": header, "sheet": config}
    parts, said, digest = [], [], hashlib.sha256()
    for split, path in choose_splits(dataset, files, splits or {}, root):
        with explained(path):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest() + split.encode())
            plain = unpack(path, Path(unpacked.name) / str(len(parts)))
            names, rows, what = READERS[kind_of(path)](plain, str(path), **options)
        parts.append((split, path, names, rows))
        said.append(", ".join(filter(None, [path.name, what, split and f"{split} split"])))
    said = said if len(said) <= 10 else [*said[:9], f"… and {len(said) - 9} more files"]
    table = Table(parts, said, commit, digest.hexdigest()[:16], unpacked)
    if not table.columns or not table.sample(1):
        raise StageError(f"dataset={dataset} has no rows. It needs some below its column names.")
    return table


@contextmanager
def explained(path):
    """Make a StageError of one line of whatever goes wrong in reading a file: damaged files fail in many ways."""
    try:
        yield
    except (StageError, GeneratorExit):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "".join(c for c in reason if c.isprintable())[:300]  # it may quote the file
        hint = "Is it damaged, or of another kind or `encoding` than it seems?"
        raise StageError(f"{path} could not be read: {reason}. {hint}") from None


# Which files, and which split each is
def kind_of(path):
    """The ending that says how a file is read, such as ".csv"; "" if it is no table."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    return kind if kind in READERS and path.name not in DESCRIPTIONS else ""


def find_files(dataset, revision, config):
    """The files of a source: (the folder they are in, [(the source's name for the split or "", path), ...], commit).

    Raises StageError if there are none that are tables.
    """
    path, commit = Path(dataset).expanduser(), None
    if not path.is_dir() and (
        path.is_file() or re.search(r"[*?\[]|^[./~]|/.*/", dataset) or kind_of(path)
    ):
        found = [
            Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()
        ]
        found = dict.fromkeys([path] if path.is_file() else found, "")
        if not found:
            raise StageError(f"dataset={dataset}: there is no such file (looked in {Path.cwd()}).")
        root = Path(os.path.commonpath([file.parent for file in found]))
    else:
        root = path if path.is_dir() else from_hub(dataset, revision, config)
        commit = None if path.is_dir() else root.name
        found = {
            file: label
            for label, form in patterns_of(root, config)
            for file in sorted(root.glob(form))
        }
    files = [
        (label, file)
        for file, label in found.items()
        if kind_of(file) and "/." not in f"/{file.relative_to(root)}"
    ]
    if not files:
        raise StageError(
            f"dataset={dataset}: no file of a kind that is read: {', '.join(READERS)}, each also .gz."
        )
    return root, files, commit


def listed(value):
    """A list, or the list of one that is none."""
    return value if isinstance(value, list) else [value]


def configurations(folder):
    """What a folder's README.md says of the configurations of its data set, {name: entry}."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    entries = ((metadata_load(card) if card.is_file() else None) or {}).get("configs") or []
    return {str(entry.get("config_name", "default")): entry for entry in entries}


def patterns_of(folder, config):
    """What belongs to a configuration: [(split or "", pattern), ...]. Raises StageError if `config` names none."""
    named = configurations(folder)
    if not named and (not config or (folder / config).is_dir()):
        return [("", f"{config or '.'}/**/*")]
    usual = [
        name for name, entry in named.items() if entry.get("default") or name == "default"
    ] or list(named)
    if config not in named and (config or len(usual) > 1):
        use = (
            f"use one of {', '.join(named)}"
            if named
            else f"{folder} has no such configuration or folder"
        )
        raise StageError(f"dataset_config={config!r}: {use}.{suggestion(config, named)}")
    entry = named[config or usual[0]]
    files = listed(entry.get("data_files", f"{entry.get('data_dir', '.')}/**/*"))
    items = [item if isinstance(item, dict) else {"path": item} for item in files]
    return [(item.get("split", ""), path) for item in items for path in listed(item["path"])]


def from_hub(name, revision, config):
    """The folder of a Hub data set with the files of one configuration, named by its commit. Raises StageError."""
    from huggingface_hub import snapshot_download

    kinds = [f"*{kind}{packed}" for kind in READERS for packed in ("", ".gz")]
    source = {"repo_type": "dataset", "revision": revision}
    try:
        card = Path(snapshot_download(name, **source, allow_patterns=["README.md"]))
        if configurations(card):
            kinds = [
                form
                for _, path in patterns_of(card, config)
                for form in (path, path.replace("**/", ""))
            ]
        return Path(snapshot_download(name, **source, allow_patterns=kinds))
    except (OSError, ValueError) as error:
        raise hub_error(f"dataset={name} (no such file in {Path.cwd()})", error) from None


def split_of(name):
    """The split that a name speaks of, "train", "validation" or "test"; "" if of none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in KNOWN["splits"].items() if set(words) & set(known)), "")


def choose_splits(dataset, files, splits, root):
    """The files to read, [(official split, or "" if all are ours to split, path), ...]. Raises StageError."""
    own, named, chosen = {}, {}, {}
    for label, path in files:
        relative = path.relative_to(root)
        own[path] = split_of(label or str(relative))
        shards = [re.sub(r"(-\d+-of-\d+)?\..*", "", part) for part in relative.parts]
        for name in {
            label,
            own[path],
            str(relative),
            *shards,
            path.name,
        }:  # what `splits` may call it
            named.setdefault(name, []).append(path)
    for split, source in (
        (split, source) for split, sources in splits.items() for source in listed(sources)
    ):
        if split not in KNOWN["splits"]:
            raise StageError(
                f"splits: {split!r} is none of train, validation, test.{suggestion(split, KNOWN['splits'])}"
            )
        other = [
            Path(file)
            for folder in (root, Path())
            for file in sorted(glob(str(folder / str(source))))
        ]
        found = named.get(source) or [file for file in other if kind_of(file)]
        if not found:
            has = ", ".join(sorted(filter(None, named))[:20])
            raise StageError(
                f"splits: {dataset} has no {source!r}. It has: {has}.{suggestion(source, named)}"
            )
        chosen |= dict.fromkeys(found, split)
    if not splits:
        held_out = {"test", "validation"} & set(own.values())
        chosen = {
            path: own[path] or "train"
            for label, path in files
            if own[path] or not (label and held_out)
        }
    elif "train" not in splits:
        chosen |= {
            path: "train" for path in own if path not in chosen and own[path] in ("", "train")
        }
    ours = len(set(chosen.values())) == 1 or "train" not in chosen.values()
    return [("" if ours else split, path) for path, split in chosen.items()]
