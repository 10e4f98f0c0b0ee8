"""Options: parameters from every source, profiles and models, the run folder, and errors that
say what to do.
"""

import os
from argparse import Namespace

import pytest
from conftest import ROOT

from tabletune.cli import options as options_module
from tabletune.cli.main import build_parser
from tabletune.cli.options import (
    RunChoice,
    choose_run_dir,
    detect_profile,
    read_run_choice,
    read_settings,
    split_args,
    write_settings,
)
from tabletune.errors import StageError


def parsed(*arguments):
    """The options of `tabletune run-all` with these arguments."""
    return build_parser().parse_args(split_args(["run-all", *map(str, arguments)]))


def chosen(*arguments):
    """The run that `tabletune run-all` with these arguments is to make, on the tiny profile."""
    return read_run_choice(parsed("--profile", "tiny", *arguments))


SOURCES = {
    "-f": lambda name, text, file: (file.write_text(f"{name}: {text}"), ["-f", file])[1],
    "-y": lambda name, text, file: ["-y", f"{name}: {text}"],
    "-p": lambda name, text, file: ["-p", name, text],
    "-r": lambda name, text, file: ["-r", name, text],
    "--args=": lambda name, text, file: [f"--args=-p {name} '{text}'"],
    "--args": lambda name, text, file: ["--args", f"-p {name} '{text}'"],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-2", 0.01),
        ("learning_rate", "1", 1),
        ("max_length", "1e3", 1000),
        ("lora_target_modules", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("columns", "{question: q, answer: a}", {"question": "q", "answer": "a"}),
        ("gradient_checkpointing", "false", False),
        ("published_dataset", "2026", "2026"),
        ("published_dataset", "1e3", "1e3"),
        ("published_dataset", "true", "true"),
        ("base_model_revision", "0012345", "0012345"),
    ],
)
def test_a_value_has_the_same_type_from_every_source(tmp_path, source, name, text, value):
    """A value takes the type of its parameter's default, so 2026 is a name where a name is
    expected.
    """
    choice = chosen(*SOURCES[source](name, text, tmp_path / "mine.yaml"))
    assert choice.values[name] == value
    assert type(choice.values[name]) is type(value)


def test_args_within_args_are_options_too():
    assert split_args(["--args", "--args='-p epochs 2' -p seed 1"]) == [
        *("-p", "epochs", "2"),
        *("-p", "seed", "1"),
    ]


def test_later_words_go_before_earlier_ones_and_all_before_files(tmp_path):
    for name, rate in (("one", 0.1), ("two", 0.2)):
        (tmp_path / f"{name}.yaml").write_text(f"learning_rate: {rate}\nseed: {rate * 10}")
    words = ["-p", "learning_rate", "0.3", "-y", "{learning_rate: 0.4, epochs: 2}"]
    values = chosen(*words, "-f", tmp_path / "one.yaml", "-f", tmp_path / "two.yaml").values
    assert (values["learning_rate"], values["seed"], values["epochs"]) == (0.4, 2, 2)


def test_a_model_goes_on_top_of_a_profile():
    values = chosen("--model", "qwen3-4b").values
    assert values["base_model"] == "Qwen/Qwen3-4B"
    assert values["lora_r"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "max_lenght", "30"], "No notebook has a parameter 'max_lenght'. Did you mean"),
        (["-y", "max_lenght: 30"], "No notebook has a parameter 'max_lenght'. Did you mean"),
        (["-p", "learning_rate", "3"], "learning_rate=3: use a number above 0, up to 1."),
        (["-p", "lora_r", "true"], "lora_r=True: use a whole number from 1 to 100000."),
        (["-y", "seed: -1"], "-y 'seed: -1': seed=-1: use a whole number from 0 to"),
        (["-y", "{a: ]"], "-y '{a: ]': while parsing a flow node"),
        (["-f", "data"], "data cannot be read: Is a directory"),
        (["--profile", "t5"], "profiles/t5.yaml cannot be read: No such file or directory; there"),
        (["--model", "gpt5"], "models/gpt5.yaml cannot be read: No such file or directory; there"),
        (["--args=-p system_prompt 'You"], "ARGS=-p system_prompt 'You: No closing quotation. A"),
        (["--gpus", "0"], "gpus=0: use a whole number of 1 or more."),
    ],
)
def test_a_mistake_is_said_in_one_line(arguments, message):
    with pytest.raises(StageError) as caught:
        chosen(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--args=-p system_prompt You are kind"], "ARGS=\"-p system_prompt 'You are kind.'\""),
        (["-p", "epochs"], "with a space between: -p epochs 3"),
        (["--args=-p epochs=3"], "with a space between: -p epochs 3"),
        (["--args"], "argument --args: expected one argument"),
        (["run", "epochs=3"], "A parameter is set with -p NAME VALUE"),
    ],
)
def test_what_argparse_refuses_comes_with_what_to_do(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parsed(*arguments)
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


# --- several GPUs


def test_gpus_is_a_key_of_a_profile():
    assert read_run_choice(parsed("--profile", "a100x2")).gpus == 2


def test_gpus_on_the_command_line_go_before_those_of_a_profile():
    assert read_run_choice(parsed("--profile", "a100x2", "--gpus", "1")).gpus == 1


@pytest.mark.parametrize("name", ["a100x2", "kaggle_t4x2", "70b"])
def test_gpus_are_no_parameter_of_a_notebook(name):
    assert "gpus" not in read_run_choice(parsed("--profile", name)).values


# --- the profile of this machine


@pytest.mark.parametrize(
    ("output", "profile"),
    [
        ("7.5, 15360", "t4"),
        ("8.0, 40960", "a100"),
        ("8.9, 23034", "t4"),
        ("9.0, 81559\n9.0, 81559", "a100"),
        ("No devices were found", "cpu"),
        ("", "cpu"),
    ],
)
def test_detect_profile_goes_by_the_first_gpu(tmp_path, monkeypatch, output, profile):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{output}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert detect_profile() == profile


def test_detect_profile_without_nvidias_program_is_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_profile() == "cpu"


def test_the_hardware_is_looked_at_only_where_no_profile_is_named(monkeypatch):
    monkeypatch.setattr(options_module, "detect_profile", lambda: pytest.fail("looked"))
    chosen("runs/mine")
    choose_run_dir(Namespace(run_dir="runs/mine", profile=None, model=None))


# --- the run folder


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "runs/tiny"),
        (["--model", "qwen3-4b"], "runs/tiny_qwen3-4b"),
        (["runs/my run"], "runs/my run"),
    ],
)
def test_the_run_folder_is_named_by_profile_and_model(arguments, folder):
    assert str(chosen(*arguments).run_dir) == folder


def test_the_parameter_run_dir_names_the_folder():
    assert str(chosen("--args=-p run_dir runs/mine", "--profile", "tiny").run_dir) == "runs/mine"
    assert str(chosen("runs/mine", "-p", "run_dir", "runs/mine").run_dir) == "runs/mine"


def test_two_run_folders_are_refused():
    with pytest.raises(StageError, match="named twice: RUN_DIR=runs/a and run_dir=runs/b"):
        chosen("runs/a", "-p", "run_dir", "runs/b")


@pytest.mark.parametrize("place", ["drive:mine", "hub:me/mine"])
def test_a_place_that_is_no_folder_is_refused(place):
    with pytest.raises(StageError, match=f"RUN_DIR={place}: the command line needs a folder"):
        chosen(place)


def test_settings_are_written_and_read_again(tmp_path):
    choice = RunChoice(tmp_path, {"learning_rate": 0.001, "splits": {"test": "a"}}, 2, "tiny")
    write_settings(choice)
    assert read_settings(tmp_path) == {**choice.values, "gpus": 2}


def test_settings_are_written_only_when_they_change(tmp_path):
    choice = RunChoice(tmp_path, {"seed": 1}, 1, "tiny")
    write_settings(choice)
    before = (tmp_path / "settings").stat().st_mtime_ns
    write_settings(choice)
    assert (tmp_path / "settings").stat().st_mtime_ns == before
    write_settings(RunChoice(tmp_path, {"seed": 2}, 1, "tiny"))
    assert (tmp_path / "settings").stat().st_mtime_ns != before


# --- from any working directory


def test_a_profile_of_the_repository_works_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = chosen()
    assert choice.values["dataset"] == str(ROOT / "data" / "home_remedies.csv")
    assert choice.values["base_model"] == str(ROOT / ".cache" / "tiny-llama")
    assert str(choice.run_dir) == "runs/tiny"


def test_in_the_repository_paths_stay_as_they_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert chosen().values["dataset"] == "data/home_remedies.csv"


def test_a_profile_of_the_working_directory_goes_first(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text("dataset: t.csv\nseed: 5")
    monkeypatch.chdir(tmp_path)
    values = read_run_choice(parsed("--profile", "mine")).values
    assert values == {"dataset": "t.csv", "seed": 5}


@pytest.mark.parametrize("model", ["llama-3.1-8b-instruct", "models/llama-3.1-8b-instruct.yaml"])
def test_models_with_a_point_in_their_name_have_folders_of_their_own(model):
    options = Namespace(run_dir=None, profile="t4", model=model)
    assert str(choose_run_dir(options)) == "runs/t4_llama-3.1-8b-instruct"
