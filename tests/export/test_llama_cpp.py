"""llama.cpp from Python: what to install, the workaround, a GGUF file as a model."""

import inspect
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import GenerationConfig

from tabletune.errors import StageError
from tabletune.export import llama_cpp


def test_without_llama_cpp_no_types_are_made_and_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert llama_cpp.usable_types(["F16"]) == []
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "llama.cpp is missing here" in printed
    assert "llama-cpp-python" in printed


def test_the_versions_are_those_of_the_project():
    """The extras of pyproject.toml; gguf is in the requirements, too."""
    packages = shlex.split(llama_cpp.packages_to_install())
    assert packages == ["llama-cpp-python[server]==0.3.36", "sentencepiece==0.2.2", "gguf==0.19.0"]
    assert f"{packages[-1]}\n" in (ROOT / "requirements.txt").read_text()


def test_no_types_need_no_llama_cpp(monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert llama_cpp.usable_types([]) == []
    assert capsys.readouterr().out == ""


def model_that_generates(tokens):
    """A model in llama.cpp that generates these tokens, and then ends by itself."""
    model = llama_cpp.InLlamaCpp.__new__(llama_cpp.InLlamaCpp)
    torch.nn.Module.__init__(model)
    model.model = SimpleNamespace(generate=lambda ids, **_: iter(tokens))
    return model


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([5, 6, 7, 8], 10, [1, 5, 6, 7]),  # 7 is the stop token
        ([5, 6, 8, 7], 2, [1, 5, 6]),
        ([5, 6], 10, [1, 5, 6]),  # llama.cpp ends by itself
        ([], 10, [1]),
    ],
    ids=["stop token", "max_new_tokens", "ended by llama.cpp", "nothing"],
)
def test_generate_returns_ids_however_it_ends(tokens, most, expected):
    settings = GenerationConfig(max_new_tokens=most, eos_token_id=[7])
    output = model_that_generates(tokens).generate(torch.tensor([[1]]), settings)
    assert output.tolist() == [expected]


@pytest.mark.export
def test_llama_still_lacks_an_argument_for_the_layout():
    """If it has one, hand it over in `InLlamaCpp` and delete the function that `load_llama_cpp`
    replaces.
    """
    package = llama_cpp.load_llama_cpp()
    assert not {"use_extra_bufts", "no_repack"} & set(inspect.signature(package.Llama).parameters)


@pytest.mark.export
def test_the_workaround_reaches_the_library():
    package = llama_cpp.load_llama_cpp()
    params = package.llama_cpp.llama_model_default_params()
    assert params.use_extra_bufts is False, "the field has another name now"


@pytest.mark.export
def test_a_type_that_llama_cpp_does_not_know():
    with pytest.raises(StageError, match="does not know 'Q9_9'"):
        llama_cpp.usable_types(["Q9_9"])


@pytest.mark.export
def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(StageError, match=r"llama\.cpp cannot read .*x\.gguf"):
        llama_cpp.InLlamaCpp(tmp_path / "x.gguf")


def test_private_parts_of_llama_cpp_are_used_in_one_place():
    """`low_level`, the inside of the package, stands in `load_llama_cpp` and nowhere else."""
    uses = {}
    for path in (ROOT / "src" / "tabletune").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(
            r"llama_cpp\.llama_cpp|from llama_cpp import llama_cpp|\.llama_model_default", text
        ):
            uses[path.name] = text
    assert list(uses) == ["llama_cpp.py"]
