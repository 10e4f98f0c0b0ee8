"""Checkpoints: incomplete ones are deleted by one process only, before the others look."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tabletune.run.stage import Stage
from tabletune.training import checkpoints
from tabletune.training.checkpoints import (
    check_done_or_archive,
    checkpoint_to_resume,
    newest_checkpoint,
)


def make_checkpoint(folder, step, state):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def make_trainer(folder, events):
    """A trainer whose arguments note when the main process has its turn."""

    @contextmanager
    def main_process_first(local=True):
        events.append(("first", local))
        yield
        events.append(("end", local))

    arguments = SimpleNamespace(
        output_dir=str(folder),
        main_process_first=main_process_first,
        num_train_epochs=1,
        max_steps=-1,
    )
    return SimpleNamespace(args=arguments)


def test_an_incomplete_checkpoint_is_deleted_while_the_others_wait(tmp_path, monkeypatch):
    good = make_checkpoint(tmp_path, 5, "{}")
    make_checkpoint(tmp_path, 10, '{"log_hist')
    events, remove = [], checkpoints.remove
    monkeypatch.setattr(
        checkpoints, "remove", lambda path: (events.append(("removed", path.name)), remove(path))
    )
    assert checkpoint_to_resume(make_trainer(tmp_path, events)) == str(good)
    assert events == [("first", False), ("removed", "checkpoint-10"), ("end", False)]


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    make_checkpoint(tmp_path, 5, "{}")
    newest = make_checkpoint(tmp_path, 12, "{}")
    assert newest_checkpoint(tmp_path) == str(newest)


# --- a training that is done


class OneProcess:
    """A PartialState of a single process."""

    @contextmanager
    def main_process_first(self):
        yield


ON_CPU = {"dataset": "abc", "dtype": "float32", "device": "cpu", "processes": 1, "sharded": False}
ON_GPU = ON_CPU | {"dtype": "float16", "device": "cuda"}


@pytest.fixture
def trained(tmp_path):
    """A stage that has trained on a CPU."""
    for folder in ("adapter", "training", "checkpoints"):
        (tmp_path / folder).mkdir()
    (tmp_path / "training" / "metrics.json").write_text("{}")
    stage = Stage("02_finetune_qlora", tmp_path, {"epochs": 1})
    (tmp_path / "checkpoints" / "settings.json").write_text(json.dumps(stage.settings | ON_CPU))
    stage.record("abc", ON_CPU, ["adapter", "training/metrics.json"])
    return stage


def test_a_finished_training_is_kept_on_other_hardware_and_that_is_said(trained, capsys):
    assert check_done_or_archive(trained, ON_GPU, OneProcess())
    assert (trained.folder / "adapter").exists()
    assert not (trained.folder / "earlier").exists()
    assert (
        "It was trained with device cpu, dtype float32; here it would be device cuda, dtype float16"
        in capsys.readouterr().out
    )


def test_on_the_same_hardware_nothing_is_said_of_it(trained, capsys):
    assert check_done_or_archive(trained, ON_CPU, OneProcess())
    assert "It was trained with" not in capsys.readouterr().out


def test_a_finished_training_of_other_data_moves_aside(trained):
    assert not check_done_or_archive(trained, ON_CPU | {"dataset": "def"}, OneProcess())
    assert not (trained.folder / "adapter").exists()
    assert list(trained.folder.glob("earlier/*/adapter"))


def test_checkpoints_of_other_hardware_are_not_gone_on_from(trained):
    """Another dtype gives other figures, so an unfinished training begins anew."""
    (trained.folder / "adapter").rmdir()
    assert not check_done_or_archive(trained, ON_GPU, OneProcess())
    assert list(trained.folder.glob("earlier/*/checkpoints/settings.json"))


def test_a_training_goes_on_from_another_folder(tmp_path, monkeypatch):
    """The base model's path is another text there, and the same folder."""
    (tmp_path / "base").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    relative = Stage("02_finetune_qlora", tmp_path / "run", {"base_model": "base"})
    check_done_or_archive(relative, ON_CPU, OneProcess())
    absolute = Stage("02_finetune_qlora", tmp_path / "run", {"base_model": str(tmp_path / "base")})
    monkeypatch.chdir("/")
    check_done_or_archive(absolute, ON_CPU, OneProcess())
    assert not (tmp_path / "run" / "earlier").exists()


@pytest.mark.parametrize(("ended", "epochs"), [(True, 0), (False, 1)])
def test_a_training_that_had_ended_is_only_read(tmp_path, ended, epochs):
    control = {"args": {"should_training_stop": ended}}
    state = json.dumps({"stateful_callbacks": {"TrainerControl": control}})
    make_checkpoint(tmp_path, 5, state)
    trainer = make_trainer(tmp_path, [])
    checkpoint_to_resume(trainer)
    assert trainer.args.num_train_epochs == epochs


def test_checkpoints_of_unknown_settings_are_not_gone_on_from(trained):
    """Their settings.json is missing, as in a copy without it."""
    make_checkpoint(trained.folder / "checkpoints", 5, "{}")
    (trained.folder / "checkpoints" / "settings.json").unlink()
    (trained.folder / "training" / "metrics.json").unlink()
    assert not check_done_or_archive(trained, ON_CPU, OneProcess())
    assert newest_checkpoint(trained.folder / "checkpoints") is None
    assert list(trained.folder.glob("earlier/*/checkpoints/checkpoint-5"))
