"""data.sources."""

import shutil
from types import SimpleNamespace

import datasets
import pytest
from table_helpers import NAMES, opened, write

from tabletune.errors import StageError


def split_rows(table, wanted=NAMES):
    """{official split: first cells} of a table."""
    found = {}
    for split, cells in table.rows(wanted):
        found.setdefault(split, []).append(cells[0])
    return found


def write_each(folder, *names):
    """A file of one row for each name, whose question is the name."""
    for name in names:
        write(folder / name, NAMES, [(name, f"answer in {name}")])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["b.csv", "a.csv"], {"": ["a.csv", "b.csv"]}),
        (["train.csv", "test.csv"], {"train": ["train.csv"], "test": ["test.csv"]}),
        (["data.csv", "my-test.csv"], {"train": ["data.csv"], "test": ["my-test.csv"]}),
        (
            ["train/1.jsonl", "dev/1.jsonl"],
            {"train": ["train/1.jsonl"], "validation": ["dev/1.jsonl"]},
        ),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/eval-00000-of-00001.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "test": ["data/eval-00000-of-00001.parquet"],
            },
        ),
        (["test.csv"], {"": ["test.csv"]}),
        (["contest.csv", "latest.csv"], {"": ["contest.csv", "latest.csv"]}),
    ],
)
def test_splits_of_a_folder_are_found(tmp_path, names, found):
    """Its own, where it has a held-out one besides others; all of it is ours to split where it has
    not.
    """
    write_each(tmp_path / "t", *names)
    (tmp_path / "t" / "notes.txt").write_text("no table")
    (tmp_path / "t" / ".hidden").mkdir()
    write_each(tmp_path / "t" / ".hidden", "x.csv")
    assert split_rows(opened(tmp_path / "t")) == found
    kind = "*." + names[0].rpartition(".")[2]
    assert split_rows(opened(tmp_path / "t" / "**" / kind)) == found


def test_splits_setting_is_used_and_checked(tmp_path):
    write_each(tmp_path / "t", "a.csv", "b.csv", "c.csv", "test.csv")
    assert split_rows(opened(tmp_path / "t", splits={"train": "a.csv", "test": "b.csv"})) == {
        "train": ["a.csv"],
        "test": ["b.csv"],
    }
    assert split_rows(opened(tmp_path / "t", splits={"validation": "b"})) == {
        "train": ["a.csv", "c.csv"],
        "validation": ["b.csv"],
    }
    assert split_rows(opened(tmp_path / "t", splits={"train": ["a.csv", "test"]})) == {
        "": ["a.csv", "test.csv"]
    }
    other = {"test": str(tmp_path / "t" / "b.csv")}
    assert split_rows(opened(tmp_path / "t" / "a.csv", splits=other)) == {
        "train": ["a.csv"],
        "test": ["b.csv"],
    }
    with pytest.raises(
        StageError, match=r"splits: 'tets' is none of train, validation, test. Did you mean 'test'"
    ):
        opened(tmp_path / "t", splits={"tets": "a.csv"})
    with pytest.raises(StageError, match=r"has no 'bb.csv'. It has: .*Did you mean 'b.csv'"):
        opened(tmp_path / "t", splits={"test": "bb.csv"})


def test_folder_saved_by_datasets_is_read(tmp_path):
    train = datasets.Dataset.from_list([{"question": f"q{i}", "answer": "a"} for i in range(5)])
    train.save_to_disk(tmp_path / "one")
    assert split_rows(opened(tmp_path / "one")) == {"": [f"q{i}" for i in range(5)]}
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "two")
    assert split_rows(opened(tmp_path / "two")) == {
        "train": [f"q{i}" for i in range(5)],
        "test": ["q0"],
    }


def configurations(folder, head):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{head}---\n# A table\n")


def test_configurations_are_chosen(tmp_path):
    write_each(tmp_path / "t", "a.csv", "b.csv", "c/x.csv", "c/y.csv")
    configurations(
        tmp_path / "t",
        "- config_name: main\n  data_files: a.csv\n"
        "- config_name: extra\n  data_files:\n  - split: train\n    path: [b.csv, 'c/*.csv']\n"
        "  - split: validation\n    path: a.csv\n"
        "- config_name: folder\n  data_dir: c\n",
    )
    with pytest.raises(StageError, match="dataset_config='': use one of main, extra, folder"):
        opened(tmp_path / "t")
    with pytest.raises(StageError, match=r"dataset_config='mian'.*Did you mean 'main'"):
        opened(tmp_path / "t", dataset_config="mian")
    assert split_rows(opened(tmp_path / "t", dataset_config="main")) == {"": ["a.csv"]}
    assert split_rows(opened(tmp_path / "t", dataset_config="folder")) == {
        "": ["c/x.csv", "c/y.csv"]
    }
    extra = {"train": ["b.csv", "c/x.csv", "c/y.csv"], "validation": ["a.csv"]}
    assert split_rows(opened(tmp_path / "t", dataset_config="extra")) == extra
    configurations(
        tmp_path / "t",
        "- config_name: default\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n",
    )
    assert split_rows(opened(tmp_path / "t")) == {"": ["a.csv"]}


def test_folder_counts_as_configuration(tmp_path):
    write_each(tmp_path / "t", "en/a.csv", "de/b.csv")
    assert split_rows(opened(tmp_path / "t", dataset_config="de")) == {"": ["de/b.csv"]}
    with pytest.raises(
        StageError, match=r"dataset_config='fr'.*has no such configuration or folder"
    ):
        opened(tmp_path / "t", dataset_config="fr")


def test_other_splits_are_not_mixed_into_training(tmp_path):
    write_each(tmp_path / "t", "a.csv", "b.csv", "c.csv")
    files = [("train_sft", "a"), ("unsupervised", "b"), ("test_sft", "c")]
    lines = "".join(f"  - split: {split}\n    path: {name}.csv\n" for split, name in files)
    configurations(tmp_path / "t", f"- config_name: default\n  data_files:\n{lines}")
    assert split_rows(opened(tmp_path / "t")) == {"train": ["a.csv"], "test": ["c.csv"]}
    chosen = {"train": "unsupervised", "test": "test_sft"}
    assert split_rows(opened(tmp_path / "t", splits=chosen)) == {
        "train": ["b.csv"],
        "test": ["c.csv"],
    }


class Hub:
    """A stand-in for the Hub with one data set, whose newest commit is ccc…"""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def snapshot_download(self, name, repo_type, revision, allow_patterns):
        self.asked.append(revision)
        if name != "someone/table":
            from huggingface_hub.errors import RepositoryNotFoundError

            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404", response=response)
        target = self.folder.parent / ("c" * 40 if revision == "main" else revision)
        for path in self.folder.rglob("*"):
            wanted = any(path.relative_to(self.folder).match(pattern) for pattern in allow_patterns)
            if path.is_file() and wanted:
                (target / path.relative_to(self.folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.relative_to(self.folder))
        return str(target)


def test_hub_data_set_is_read_at_a_commit(tmp_path, monkeypatch):
    """Its CSV as it was written, which `datasets.load_dataset` would not; its validation split
    stays one.
    """
    write(tmp_path / "hub" / "train.csv", NAMES, [("a", "007"), ("b", "NA")])
    write(tmp_path / "hub" / "validation.csv", NAMES, [("c", "1.50")])
    (tmp_path / "hub" / "model.bin").write_bytes(b"large")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    table = opened("someone/table")
    assert table.commit == "c" * 40
    assert list(table.rows(NAMES)) == [
        ("train", ["a", "007"]),
        ("train", ["b", "NA"]),
        ("validation", ["c", "1.50"]),
    ]
    assert opened("someone/table", dataset_revision="d" * 40).commit == "d" * 40
    assert not list(tmp_path.glob("c*/model.bin"))
    configurations(
        tmp_path / "hub",
        "- config_name: one\n  data_files: '**/train.csv'\n- config_name: two\n  data_files: v*\n",
    )
    assert split_rows(opened("someone/table", dataset_revision="e" * 40, dataset_config="one")) == {
        "": ["a", "b"]
    }
    with pytest.raises(StageError, match="dataset_config='': use one of one, two"):
        opened("someone/table", dataset_revision="f" * 40)
    with pytest.raises(
        StageError, match=r"someone/gone \(no such file in .*\): the Hub has no such repository"
    ):
        opened("someone/gone")


def test_hub_errors_are_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("Cannot send a request,\nas the client has been closed.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(StageError, match=r"no such file in.*the Hub cannot be reached"):
        opened("someone/table")


@pytest.mark.parametrize("name", ["gone.csv", "./gone", "a/b/c", "gone*.csv", "~/gone.xlsx"])
def test_missing_file_is_explained(name):
    with pytest.raises(StageError, match="no such file"):
        opened(name)
