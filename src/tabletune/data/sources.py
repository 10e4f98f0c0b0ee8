"""Which files a data set has, and which split each of them is.

Of a folder, a pattern, or a Hub data set.
"""

import os
import re
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from tabletune.data.readers import READERS
from tabletune.data.vocabulary import WORDS
from tabletune.errors import StageError, hub_error, suggestion

# beside tables, no tables
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
LOCK_FILE = "~$"  # how the name of the file begins that Office leaves beside an open one


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, with what the source calls its split, "" if it says nothing."""

    path: Path
    label: str


@dataclass(frozen=True)
class Source:
    """The files of a data set, the folder that they are in, and the commit of one from the Hub."""

    root: Path
    files: list[SourceFile]
    commit: str | None


def file_kind(path: Path) -> str:
    """The ending that says how a file is read, such as ".csv"; "" if it is no table."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind not in READERS or path.name in DESCRIPTIONS or path.name.startswith(LOCK_FILE):
        return ""
    return kind


def find_source(dataset: str, revision: str, config: str) -> Source:
    """The files of a data set. Raises StageError if there are none that are tables."""
    path = Path(dataset).expanduser()
    commit = None
    if not path.is_dir() and _is_local(path, dataset):
        paths = [path] if path.is_file() else _matches(str(path))
        if not paths:
            raise StageError(f"dataset={dataset}: there is no such file (looked in {Path.cwd()}).")
        root = Path(os.path.commonpath([file.parent for file in paths]))
        labels = dict.fromkeys(paths, "")
    else:
        if path.is_dir():
            root = path
        else:
            root = download(dataset, revision, config)
            commit = root.name
        labels = {}
        for label, pattern in patterns_of(root, config):
            labels |= dict.fromkeys(sorted(root.glob(pattern)), label)
    files = [
        SourceFile(file, label)
        for file, label in labels.items()
        if file_kind(file) and "/." not in f"/{file.relative_to(root)}"
    ]
    if not files:
        raise StageError(
            f"dataset={dataset}: there is no file that can be read. These kinds can: "
            f"{', '.join(READERS)}, each also as .gz."
        )
    return Source(root, files, commit)


def _is_local(path: Path, dataset: str) -> bool:
    """Whether a name can only be that of a file or a pattern, not that of a Hub data set."""
    return (
        path.is_file()
        or re.search(r"[*?\[]|^[./~]|/.*/", dataset) is not None
        or file_kind(path) != ""
    )


def _matches(pattern: str) -> list[Path]:
    return [Path(name) for name in sorted(glob(pattern, recursive=True)) if Path(name).is_file()]


def as_list(value: Any) -> list[Any]:
    """A list as it is; anything else as the one item of a list."""
    return value if isinstance(value, list) else [value]


# Configurations of a data set, as its README.md describes them


def read_card(folder: Path) -> dict[str, Any]:
    """The metadata at the head of a folder's README.md, {} if there is none."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    return (metadata_load(card) if card.is_file() else None) or {}


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations of the data set in a folder, {name: entry}."""
    entries = read_card(folder).get("configs") or []
    return {str(entry.get("config_name", "default")): entry for entry in entries}


def patterns_of(folder: Path, config: str) -> list[tuple[str, str]]:
    """The files of a configuration, [(split or "", pattern), ...].

    Raises StageError if `config` names none.
    """
    entries = configurations(folder)
    if not entries and (not config or (folder / config).is_dir()):
        return [("", f"{config or '.'}/**/*")]
    defaults = [
        name for name, entry in entries.items() if entry.get("default") or name == "default"
    ]
    usual = defaults or list(entries)
    if config not in entries and (config or len(usual) > 1):
        advice = f"{folder} has no such configuration or folder"
        if entries:
            advice = f"use one of {', '.join(entries)}"
        raise StageError(f"dataset_config={config!r}: {advice}.{suggestion(config, entries)}")
    entry = entries[config or usual[0]]
    patterns = []
    for item in as_list(entry.get("data_files", f"{entry.get('data_dir', '.')}/**/*")):
        if not isinstance(item, dict):
            item = {"path": item}
        patterns += [(item.get("split", ""), path) for path in as_list(item["path"])]
    return patterns


def download(name: str, revision: str, config: str) -> Path:
    """The folder of a Hub data set with the files of one configuration, named by its commit.

    Raises StageError.
    """
    from huggingface_hub import snapshot_download

    patterns = []
    for kind in READERS:
        patterns += [f"*{kind}", f"*{kind}.gz"]
    fetch = partial(snapshot_download, name, repo_type="dataset", revision=revision)
    try:
        # the card first, as it says which files belong to a configuration
        card = Path(fetch(allow_patterns=["README.md"]))
        if configurations(card):
            paths = [path for _, path in patterns_of(card, config)]
            # the Hub's **/ is one folder at least: without it for the files beside the card
            patterns = paths + [path.replace("**/", "") for path in paths]
        return Path(fetch(allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise hub_error(f"dataset={name} (no such file in {Path.cwd()})", error) from error


# Splits


def split_of(name: str) -> str:
    """The split that a name speaks of, "train", "validation" or "test"; "" if of none."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    for split, names in WORDS["splits"].items():
        if words & set(names):
            return split
    return ""


def choose_splits(dataset: str, source: Source, splits: dict[str, Any]) -> list[tuple[str, Path]]:
    """The files to read, [(official split, or "" if all rows are ours to split, path), ...].

    `splits` is the parameter: {"train": a name or a list of names, ...}; {} takes the source's own
    splits, if it has a held-out one. Raises StageError if it names what is not there.
    """
    own_split = {}
    for file in source.files:
        own_split[file.path] = split_of(file.label or str(file.path.relative_to(source.root)))
    if splits:
        split_of_file = _splits_of_setting(dataset, source, splits, own_split)
    else:
        split_of_file = {}
        has_held_out = bool({"test", "validation"} & set(own_split.values()))
        for file in source.files:
            # such as "unsupervised", which is no part of training
            other_split = file.label and has_held_out
            if own_split[file.path] or not other_split:
                split_of_file[file.path] = own_split[file.path] or "train"
    # one split alone is no split, and without training rows nothing could be learned: we deal them
    # out
    ours = len(set(split_of_file.values())) == 1 or "train" not in split_of_file.values()
    return [("" if ours else split, path) for path, split in split_of_file.items()]


def _splits_of_setting(
    dataset: str, source: Source, splits: dict[str, Any], own_split: dict[Path, str]
) -> dict[Path, str]:
    """The split of each file by the parameter `splits`.

    Raises StageError if it names what is not there.
    """
    by_name = _names_of_files(source, own_split)
    split_of_file: dict[Path, str] = {}
    for split, names in splits.items():
        if split not in WORDS["splits"]:
            raise StageError(
                f"splits: {split!r} is none of train, validation, "
                f"test.{suggestion(split, WORDS['splits'])}"
            )
        for name in as_list(names):
            paths = by_name.get(name) or _matching_files(source, str(name))
            if not paths:
                has = ", ".join(sorted(filter(None, by_name))[:20])
                raise StageError(
                    f"splits: {dataset} has no {name!r}. It has: {has}.{suggestion(name, by_name)}"
                )
            split_of_file |= dict.fromkeys(paths, split)
    if "train" not in splits:
        # what the reader did not mention, unless the source itself holds it out
        for path, split in own_split.items():
            if path not in split_of_file and split in ("", "train"):
                split_of_file[path] = "train"
    return split_of_file


def _matching_files(source: Source, pattern: str) -> list[Path]:
    """The tables that a path or a pattern names, in the source's folder and where we are."""
    paths: list[Path] = []
    for folder in (source.root, Path()):
        matches = map(Path, sorted(glob(str(folder / pattern))))
        paths += [file for file in matches if file_kind(file)]
    return paths


def _names_of_files(source: Source, own_split: dict[Path, str]) -> dict[str, list[Path]]:
    """The files by whatever `splits` may call them.

    That is the source's name of the split, a path, a folder or the name of a file.
    """
    by_name: dict[str, list[Path]] = {}
    for file in source.files:
        relative = file.path.relative_to(source.root)
        # train-00000-of-00003.parquet is called train
        shards = [re.sub(r"(-\d+-of-\d+)?\..*", "", part) for part in relative.parts]
        for name in {file.label, own_split[file.path], str(relative), *shards, file.path.name}:
            by_name.setdefault(name, []).append(file.path)
    return by_name
