"""Checkpoints: incomplete ones are deleted by one process only, before the others look."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tabletune.training import checkpoints
from tabletune.training.checkpoints import checkpoint_to_resume, newest_checkpoint


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


@pytest.mark.parametrize(("ended", "epochs"), [(True, 0), (False, 1)])
def test_a_training_that_had_ended_is_only_read(tmp_path, ended, epochs):
    control = {"args": {"should_training_stop": ended}}
    state = json.dumps({"stateful_callbacks": {"TrainerControl": control}})
    make_checkpoint(tmp_path, 5, state)
    trainer = make_trainer(tmp_path, [])
    checkpoint_to_resume(trainer)
    assert trainer.args.num_train_epochs == epochs
