"""Files that are complete or absent, and finished results that are never deleted."""

import pytest

from tabletune.errors import StageError
from tabletune.run.files import archive, atomic_write, read_json, remove, write_json


def test_atomic_write_leaves_nothing_on_a_full_disk(tmp_path):
    with pytest.raises(StageError, match="The disk is full"), atomic_write(tmp_path / "new") as new:
        new.mkdir()
        (new / "file").write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_atomic_write_keeps_a_file_until_its_successor_is_complete(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file") as new:
        new.write_text("new")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_text() == "old"
    with atomic_write(tmp_path / "file") as new:
        new.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_atomic_write_never_replaces_a_folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("a night of training")
    match = "nothing finished is deleted"
    with pytest.raises(StageError, match=match), atomic_write(tmp_path / "adapter") as new:
        new.mkdir()
    assert (tmp_path / "adapter" / "weights").read_text() == "a night of training"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_archive_moves_what_exists_and_prints_where(tmp_path, capsys):
    for name in ("adapter", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    folder = archive(tmp_path, "adapter", "training", "missing")
    assert folder.parent == tmp_path / "earlier"
    assert (folder / "adapter" / "file").read_text() == "adapter"
    assert (folder / "training" / "file").read_text() == "training"
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    printed = capsys.readouterr().out
    assert printed.startswith("adapter, training of other settings or data: kept in ")
    assert str(folder) in printed
    assert printed.count("\n") == 1


def test_archive_of_nothing_is_none(tmp_path):
    assert archive(tmp_path, "adapter") is None


def test_remove_of_a_link_to_a_folder_keeps_the_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_write_json_can_be_read_again(tmp_path):
    write_json(tmp_path / "report.json", {"é": [1, None]})
    assert read_json(tmp_path / "report.json", "01_format_dataset") == {"é": [1, None]}


@pytest.mark.parametrize(("text", "reason"), [(None, "is missing"), ('{"half', "is damaged")])
def test_read_json_says_which_notebook_makes_the_file(tmp_path, text, reason):
    path = tmp_path / "report.json"
    if text:
        path.write_text(text)
    with pytest.raises(StageError) as caught:
        read_json(path, "01_format_dataset")
    assert f"{path} {reason}" in str(caught.value)
    assert "Run 01_format_dataset first" in str(caught.value)
    assert "\n" not in str(caught.value)
