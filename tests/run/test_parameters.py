"""Parameters: YAML as people read it, values in the type of their defaults, profiles, misspelt
names.
"""

import pytest
from conftest import ROOT

from tabletune.errors import StageError
from tabletune.run.parameters import (
    DEFAULTS,
    PARAMETERS,
    as_yaml,
    check_names,
    coerce,
    from_yaml,
    injected_names,
    read_parameters,
    read_profile,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("0x1f", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("[1e-3, 2]", [0.001, 2]),
        ("{a: b}", {"a": "b"}),
        ("no", "no"),
        ("yes", "yes"),
        ("007", "007"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("351844e75ed0bcbbe3f10671b3c808d2b83894ee", "351844e75ed0bcbbe3f10671b3c808d2b83894ee"),
    ],
)
def test_from_yaml_reads_as_people_do(text, value):
    parsed = from_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_from_yaml_refuses_what_is_no_yaml_in_one_line():
    with pytest.raises(StageError, match="while parsing a flow node") as caught:
        from_yaml("{a: ]")
    assert "\n" not in str(caught.value)


# --- coerce


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-2", 0.01),
        ("max_length", "30", 30),
        ("max_length", 30.0, 30),
        ("epochs", 0.5, 0.5),
        ("gradient_checkpointing", "false", False),
        ("lora_target_modules", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("published_dataset", 2026, "2026"),
        ("drop_values", "N/A", ["N/A"]),
        ("drop_values", "[a, b]", ["a", "b"]),
        ("gguf_types", "", []),
        ("safety_rows", True, True),
        ("batch_size", "8", 8),
        ("batch_size", "", "auto"),
        ("encoding", 437, "437"),
    ],
)
def test_coerce_takes_the_type_of_the_default(name, value, expected):
    coerced = coerce(name, value, DEFAULTS[name])
    assert coerced == expected
    assert type(coerced) is type(expected)


@pytest.mark.parametrize("name", DEFAULTS)
def test_coerce_leaves_every_default_as_it_is(name):
    assert coerce(name, DEFAULTS[name], DEFAULTS[name]) == DEFAULTS[name]


@pytest.mark.parametrize("default", ["", "some text", [], {"a": 1}])
def test_coerce_of_nothing_is_empty(default):
    assert coerce("any", None, default) == type(default)()


def test_coerce_keeps_a_dictionary_for_a_list():
    assert coerce("drop_values", {"note": "N/A"}, []) == {"note": "N/A"}


@pytest.mark.parametrize(
    "text", ["What: this?", "- a dash", "*.csv", "[INST] {question} [/INST]", "a = b", "yes", "#5"]
)
def test_coerce_leaves_free_text_alone(text):
    """What is no YAML, or would be something else, is what the reader wrote."""
    assert coerce("question_template", text, "") == text


@pytest.mark.parametrize("value", [True, False, "true", ".inf", float("inf"), float("nan"), "many"])
@pytest.mark.parametrize("name", ["lora_r", "epochs", "learning_rate", "seed", "max_dropped"])
def test_coerce_refuses_what_is_no_number(name, value):
    with pytest.raises(StageError, match=rf"^{name}=.*: use a (whole )?number "):
        coerce(name, value, DEFAULTS[name])


@pytest.mark.parametrize("value", [True, "true", 0, -4, 2.5, ".inf", "many", [4]])
def test_coerce_refuses_a_batch_size_that_is_neither_auto_nor_a_number(value):
    with pytest.raises(StageError, match=r"^batch_size=.*use a whole number of 1 or more, or auto"):
        coerce("batch_size", value, "auto")


def test_coerce_refuses_true_for_a_choice():
    with pytest.raises(StageError, match=r"^precision=True: use auto, or one of the values"):
        coerce("precision", "true", "auto")


@pytest.mark.parametrize("value", [3, 1.5, 0, -1e-4])
def test_coerce_refuses_a_learning_rate_that_makes_no_sense(value):
    with pytest.raises(StageError, match="use a number above 0, up to 1"):
        coerce("learning_rate", value, 3e-4)


def test_coerce_takes_several_runs_from_one_text():
    assert coerce("runs", "runs/a runs/b", ["x"]) == ["runs/a", "runs/b"]


def test_coerce_takes_one_run_whose_name_has_a_space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my run").mkdir()
    assert coerce("runs", "my run", ["x"]) == ["my run"]


def test_coerce_takes_several_kinds_of_gguf_from_one_text():
    assert coerce("gguf_types", "F16, Q8_0", []) == ["F16", "Q8_0"]


# --- files of parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_dropped: 2", "max_dropped=2: use a number from 0 to 1."),
        ("validation_fraction: -0.1", "validation_fraction=-0.1: use a number from 0 to 0.5."),
        ("test_fraction: 0.95", "test_fraction=0.95: use a number from 0 to 0.5."),
        ("window: 1", "window=1: use a whole number of 2 or more."),
        ("samples: 2.5", "samples=2.5: use a whole number of 0 or more."),
        ("max_length: 0", "max_length=0: use a whole number from 1 to 1000000000."),
        ("max_grad_norm: .nan", "max_grad_norm=nan: use a number of 0 or more."),
        ("seed: -1", "seed=-1: use a whole number from 0 to 4294967295."),
        ("epochs:", "epochs=None: use a number above 0, up to 10000."),
        ("packing: on", "packing='on': use true or false."),
        ("columns: a.csv", "columns='a.csv': use names and their values, {name: value}."),
        ("gpus: 0", "gpus=0: use a whole number of 1 or more."),
        ("- a", "parameters are expected, each as name: value."),
    ],
)
def test_read_parameters_refuses_what_makes_no_sense_in_one_line(text, message):
    with pytest.raises(StageError) as caught:
        read_parameters(text, "mine.yaml")
    assert str(caught.value) == f"mine.yaml: {message}"


def test_read_parameters_is_the_inverse_of_as_yaml():
    values = {"learning_rate": 0.001, "disclaimer": "é: #1", "splits": {"test": "a.csv"}}
    assert read_parameters(as_yaml(values, "a title"), "") == values


def write_profiles(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_read_profile_puts_a_profile_on_top_of_the_one_that_it_extends(tmp_path):
    write_profiles(
        tmp_path,
        base="seed: 1\nepochs: 2",
        middle="extends: base\nseed: 3",
        top="extends: middle.yaml\nlora_r: 4",
    )
    assert read_profile(tmp_path / "top.yaml") == {"seed": 3, "epochs": 2, "lora_r": 4}


def test_read_profile_refuses_a_circle(tmp_path):
    write_profiles(tmp_path, a="extends: b", b="extends: a")
    with pytest.raises(StageError, match="profiles extend each other in a circle"):
        read_profile(tmp_path / "a.yaml")


def test_read_profile_says_which_profile_is_missing(tmp_path):
    write_profiles(tmp_path, a="extends: cpuu", cpu="seed: 1")
    with pytest.raises(
        StageError, match=r"cpuu.yaml cannot be read: No such file.*there are a, cpu"
    ):
        read_profile(tmp_path / "a.yaml")


def test_read_profile_says_that_a_file_is_not_utf_8(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("disclaimer: Café".encode("latin-1"))
    with pytest.raises(StageError, match="it is not UTF-8"):
        read_profile(tmp_path / "mine.yaml")


def test_the_terminal_profile_is_the_cpu_profile_with_another_table():
    cpu = read_profile(ROOT / "profiles" / "cpu.yaml")
    terminal = read_profile(ROOT / "profiles" / "terminal.yaml")
    assert {name: terminal[name] for name in cpu if name != "dataset"} == {
        name: value for name, value in cpu.items() if name != "dataset"
    }
    assert terminal["dataset"] == "data/terminal.jsonl"


# --- names


def test_check_names_suggests_the_nearest_name():
    with pytest.raises(StageError) as caught:
        check_names(["max_lenght"], list(PARAMETERS))
    message = "No notebook has a parameter 'max_lenght'. Did you mean 'max_length'?"
    assert str(caught.value) == message


def test_check_names_names_the_notebook_if_it_is_one():
    with pytest.raises(StageError, match=r"^report has no parameter 'zzz'.$"):
        check_names(["zzz"], ["report"])


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("# Parameters\nseed = 1\nrun_dir = 'a'\n", {"seed", "run_dir"}),
        ("# Parameters\na, b = 1, 2", set()),
        ("# Parameters\n%pip install x", set()),
        ("# Parameters\nseed: int = 1", set()),
        ("# Parameters\nstate.value = 1", set()),
        ("# Parameters\nprint('mine')\nmine = 1", set()),
        ("# Parameters of mine\nmine = 1", set()),
    ],
)
def test_injected_names_are_those_of_papermills_cell_alone(cell, names):
    assert injected_names(["import os", cell, "start_stage()"]) == names


def test_parameters_that_stages_share_have_one_default():
    for notebook, parameters in PARAMETERS.items():
        for name, default in parameters.items():
            assert DEFAULTS[name] == default, f"{name} differs in {notebook}"


def test_a_wrong_capital_gets_a_suggestion():
    with pytest.raises(StageError, match=r"'MAX_LENGTH'\. Did you mean 'max_length'\?"):
        check_names(["MAX_LENGTH"], ["01_format_dataset"])


@pytest.mark.parametrize(("text", "name"), [("1: 2", "1"), ("true: x", "True"), ("1: [2, 3]", "1")])
@pytest.mark.parametrize("grid", [False, True])
def test_a_name_that_yaml_reads_as_no_text_is_refused(text, name, grid):
    with pytest.raises(StageError, match=f"profile: No notebook has a parameter {name}"):
        read_parameters(text, "profile", grid)
