"""Sweeps: every point is made, one that fails does not stop the rest, and they are compared."""

from argparse import Namespace

import pytest
from conftest import ROOT

from tabletune.cli import sweep as sweep_module
from tabletune.cli.main import build_parser
from tabletune.cli.notebooks import NotebookError
from tabletune.cli.sweep import point_name, read_grid, run_sweep, short_name
from tabletune.errors import StageError


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """A function that runs a sweep whose runs are only noted, and fail where the learning rate
    is 0.002.
    """
    made, compared = [], []

    def make_series(choice):
        made.append(choice)
        if choice.values["learning_rate"] == 0.002:
            raise NotebookError('02_finetune_qlora: no "room"', 'no "room"')

    monkeypatch.setattr(sweep_module, "make_series", make_series)
    monkeypatch.setattr(
        sweep_module, "compare_runs", lambda runs, out: compared.append((runs, out))
    )

    def run(grid, *arguments):
        (tmp_path / "grid.yaml").write_text(grid)
        words = ["sweep", "--profile", "tiny", "--grid", str(tmp_path / "grid.yaml")]
        words += ["--folder", str(tmp_path / "sweep"), *arguments]
        run_sweep(build_parser().parse_args(words))

    return Namespace(run=run, made=made, compared=compared, folder=tmp_path / "sweep")


GRID = "learning_rate: [1e-3, 2e-3]\nlora_target_modules: [all-linear, [q_proj, v_proj]]\nepochs: 2"


def test_a_sweep_makes_every_point_on_top_of_the_profile(swept):
    with pytest.raises(StageError):
        swept.run(GRID, "-p", "seed", "7")
    values = [choice.values for choice in swept.made]
    assert [value["learning_rate"] for value in values] == [0.001, 0.001, 0.002, 0.002]
    targets = ["all-linear", ["q_proj", "v_proj"]]
    assert [value["lora_target_modules"] for value in values] == targets * 2
    assert {(value["epochs"], value["seed"], value["lora_r"]) for value in values} == {(2, 7, 8)}
    assert len({choice.run_dir for choice in swept.made}) == 4


def test_a_sweep_says_which_points_failed(swept):
    with pytest.raises(StageError) as caught:
        swept.run(GRID)
    failed = [choice.run_dir for choice in swept.made[2:]]
    lines = ["2 of 4 points failed:", *(f'{run_dir}: no "room"' for run_dir in failed)]
    assert str(caught.value).splitlines() == lines


def test_a_sweep_ends_with_a_comparison_of_what_was_finished(swept):
    with pytest.raises(StageError):
        swept.run(GRID)
    finished = [choice.run_dir for choice in swept.made[:2]]
    assert swept.compared == [(finished, swept.folder / "compare.html")]


def test_a_sweep_in_which_all_fails_compares_nothing(swept):
    with pytest.raises(StageError, match="1 of 1 points failed"):
        swept.run("learning_rate: [2e-3]")
    assert not swept.compared


def test_the_folder_of_a_sweep_is_named_by_grid_and_profile():
    words = ["sweep", "--profile", "tiny", "--model", "qwen3-4b", "--grid", "grids/lora.yaml"]
    folder = sweep_module.sweep_folder(build_parser().parse_args(words))
    assert str(folder) == "runs/lora_tiny_qwen3-4b"


def test_a_point_is_part_of_the_name_of_a_model():
    words = ["sweep", "--profile", "t4", "--model", "llama-3.1-8b-instruct", "--grid", "a.b.yaml"]
    folder = sweep_module.sweep_folder(build_parser().parse_args(words))
    assert str(folder) == "runs/a.b_t4_llama-3.1-8b-instruct"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("learning_rate: []", "learning_rate is an empty list"),
        ("seed: [1, 2]", "seed is set in the grid and in ARGS"),
        ("seed: 1\nepochs: [1, 2]", "seed is set in the grid and in ARGS"),
        ("learning_rate: 1", "no parameter has a list of values"),
        ("learning_rate: [1]\nrun_dir: a", "a sweep sets run_dir itself."),
        ("learning_rte: [1, 2]", "No notebook has a parameter 'learning_rte'. Did you mean"),
        ("packing: [true, maybe]", "packing='maybe': use true or false."),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path, grid, message):
    (tmp_path / "grid.yaml").write_text(grid)
    with pytest.raises(StageError) as caught:
        read_grid(Namespace(grid=str(tmp_path / "grid.yaml"), overrides={"seed": 7}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_grid_of_the_repository_can_be_run():
    assert read_grid(Namespace(grid=str(ROOT / "grids" / "lora.yaml"), overrides={}))


def test_values_that_look_alike_have_folders_of_their_own():
    texts = ["a b", "a-b", "a/b", "x" * 60, "x" * 61]
    names = {short_name("question_template", text) for text in texts}
    assert len(names) == len(texts)
    assert all(len(name) < 60 and "/" not in name and " " not in name for name in names)
    assert short_name("lora_r", 16) == "lora_r-16"


def test_points_whose_names_are_too_long_have_folders_of_their_own():
    texts = [f"{'words ' * 20}{number}" for number in range(5)]
    point = {f"parameter_{number}": text for number, text in enumerate(texts)}
    other = point | {"parameter_4": "something else"}
    names = {point_name(point), point_name(other)}
    assert len(names) == 2
    assert all(len(name) <= 200 for name in names)


# --- the same number of steps for every number of rows


@pytest.mark.parametrize(
    ("sizes", "epochs"),
    [("[0.125, 0.5, 1.0]", [16, 4, 2]), ("[0.3, 0.6]", [4, 2]), ("[10, 25, 100]", [20, 8, 2])],
)
def test_equal_steps_give_fewer_rows_more_epochs(swept, sizes, epochs):
    swept.run(f"train_rows: {sizes}\nequal_steps: true\nlearning_rate: 0.1", "-p", "epochs", "2")
    assert [choice.values["epochs"] for choice in swept.made] == epochs


def test_equal_steps_is_no_parameter_of_a_run(swept):
    swept.run("train_rows: [0.5, 1.0]\nequal_steps: true\nlearning_rate: 0.1")
    assert all("equal_steps" not in choice.values for choice in swept.made)
    assert [choice.run_dir.name for choice in swept.made] == ["train_rows-0.5", "train_rows-1.0"]


def test_without_equal_steps_epochs_stay(swept):
    swept.run("train_rows: [0.5, 1.0]\nlearning_rate: 0.1", "-p", "epochs", "2")
    assert [choice.values["epochs"] for choice in swept.made] == [2, 2]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("seed: [1, 2]\nequal_steps: true", "needs a list of values of train_rows"),
        ("train_rows: [20, 1.0]\nequal_steps: true", "only shares up to 1, or only numbers above"),
        ("train_rows: [0.5, 1.0]\nequal_steps: 3", "equal_steps=3: use true or false"),
        ("train_rows: [0.5, 1.0]\nequal_steps: [true]", "use true or false"),
    ],
)
def test_equal_steps_that_make_no_sense_are_refused(tmp_path, grid, message):
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    with pytest.raises(StageError, match=message):
        read_grid(build_parser().parse_args(["sweep", "--grid", str(path)]))


def test_the_grid_for_rows_makes_equal_steps():
    words = ["sweep", "--grid", str(ROOT / "grids" / "rows.yaml")]
    assert read_grid(build_parser().parse_args(words))["equal_steps"] is True
