"""GGUF files: the tokenizer that the converter gets, and (marked `export`) the same tokens in
llama.cpp.
"""

import json
import re
import shutil
import sys
from types import ModuleType

import base_models
import pytest
import torch
from export_runs import ANSWERED, ASKED, CONVERSATIONS, bare_run, read, run_dir  # noqa: F401
from test_encoding import sentencepiece as llama_vocabulary  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from tabletune.chat.encoding import encode, encode_prompt
from tabletune.chat.templates import render
from tabletune.chat.tokenizer import load_tokenizer, save_tokenizer
from tabletune.errors import StageError
from tabletune.evaluation import scoring
from tabletune.export import gguf, llama_cpp
from tabletune.model.loading import load_model


@pytest.fixture
def no_sentencepiece(monkeypatch):
    """A stand-in for the package of that name, with the little of it that is used, where it is
    not installed.
    """
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        from transformers.convert_slow_tokenizer import import_protobuf

        package = ModuleType("sentencepiece")
        package.sentencepiece_model_pb2 = import_protobuf()
        monkeypatch.setitem(sys.modules, "sentencepiece", package)


def test_a_sentencepiece_vocabulary_is_written_as_llama_cpp_reads_it(
    no_sentencepiece, run_dir, tmp_path
):
    """With the order of merges, what each token is, and none that the model has no embedding
    for.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    path = run_dir / "merged" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    beyond = {**state["added_tokens"][-1], "id": 2048, "content": "<pad>"}
    path.write_text(
        json.dumps({**state, "added_tokens": [*state["added_tokens"], beyond]}), encoding="utf-8"
    )
    gguf.prepare_for_converter(run_dir / "merged", tmp_path, True)
    model = import_protobuf().ModelProto()
    model.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    kind, pieces = model.SentencePiece, {piece.piece: piece for piece in model.pieces}
    assert len(model.pieces) == 2048
    assert "<pad>" not in pieces
    assert "<pad>" not in (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert [pieces[t].type for t in ("<unk>", "<s>", "<0x0A>")] == [
        kind.UNKNOWN,
        kind.CONTROL,
        kind.BYTE,
    ]
    order = ["".join(pair) for pair in state["model"]["merges"]]
    scores = [pieces[token].score for token in dict.fromkeys(order)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_a_vocabulary_of_bytes_is_not_taken_for_sentencepiece(run_dir, tmp_path):
    path = run_dir / "merged" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, "pre_tokenizer": {"type": "ByteLevel"}}), encoding="utf-8")
    gguf.prepare_for_converter(run_dir / "merged", tmp_path, False)
    assert not (tmp_path / "tokenizer.model").exists()
    assert (
        json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"][
            "byte_fallback"
        ]
        is False
    )


@pytest.mark.export
def test_without_the_order_of_merges_llama_cpp_would_read_other_tokens(run_dir, monkeypatch):
    """What `sentencepiece_model` is for, and that the comparison of tokens sees it."""
    whole = gguf.sentencepiece_model
    flat = lambda state, rows: whole({**state, "model": {**state["model"], "merges": []}}, rows)  # noqa: E731
    monkeypatch.setattr(gguf, "sentencepiece_model", flat)
    export_run = read(run_dir, gguf_types=["F16"])
    file = gguf.make_gguf(export_run, "F16")
    with pytest.raises(StageError, match="into other tokens than the training"):
        gguf.check_tokens(export_run, file)
    assert not file.exists()


@pytest.mark.export
def test_tokens_beyond_the_vocabulary_are_no_hindrance(run_dir):
    """A <pad> that the model has no embedding for, as the Hub's copy of Llama 2 has had."""
    path = run_dir / "merged" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["added_tokens"].append({**state["added_tokens"][-1], "id": 2048, "content": "<pad>"})
    path.write_text(json.dumps(state), encoding="utf-8")
    export_run = read(run_dir, gguf_types=["F16"])
    assert gguf.check_tokens(export_run, gguf.make_gguf(export_run, "F16")) > 100


@pytest.mark.export
def test_a_real_vocabulary_of_llamas_kind(llama_vocabulary, tmp_path):
    """Cut alike in llama.cpp, hard texts too, from a tokenizer.json alone."""
    folder = llama_vocabulary()
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).half().save_pretrained(folder)
    tokenizer, stop_token_ids = load_tokenizer(str(folder))
    save_tokenizer(folder, tokenizer, stop_token_ids)
    hard = [
        "\n \n\n\t x",
        "Hello,  y'all! 3 33 333 3.3",
        "🚀 👩‍🌾 កាន់តែ Ünï نص",
        "[INST] <<SYS>> def f(x):\n    return 'a'",
        "  a",
        "ą̂\u3000b",
    ]
    rows = [
        {"prompt": [ASKED], "completion": [{"role": "assistant", "content": text}]} for text in hard
    ]
    export_run = bare_run(tmp_path, folder, rows, tokenizer, stop_token_ids)
    file = gguf.make_gguf(export_run, "F16")
    assert gguf.check_tokens(export_run, file) == len(hard)
    ids = llama_cpp.InLlamaCpp(file).tokenize(render([ASKED], tokenizer), "<s>")
    assert ids == encode_prompt([ASKED], tokenizer)
    assert ids[:3] == [1, 733, 16289]


@pytest.mark.export
@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "r1", "phi3", "gemma3", "mistral3"])
def test_kinds_of_models(name, tmp_path):
    """Tied, experts, tokens that are not special, those that swallow white space, a multimodal
    one: the same there.
    """
    merged = shutil.copytree(base_models.cached(name), tmp_path / "merged")
    if name == "phi3":  # as Microsoft's
        state = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
        for token in state["added_tokens"]:
            token["rstrip"] = re.fullmatch(r"<\|(?!endoftext).*", token["content"]) is not None
        (merged / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    tokenizer, stop_token_ids = load_tokenizer(str(merged))
    save_tokenizer(merged, tokenizer, stop_token_ids)
    rows = [{"prompt": asked, "completion": [ANSWERED]} for asked in CONVERSATIONS[:2]]
    export_run = bare_run(tmp_path, merged, rows, tokenizer, stop_token_ids)
    file = gguf.make_gguf(export_run, "F16")
    assert gguf.check_tokens(export_run, file) == 2
    encoded = [encode(row, tokenizer, stop_token_ids) for row in rows]
    pair = load_model(merged, None, torch.float32), llama_cpp.InLlamaCpp(file, 256)
    scores = [scoring.score(model, encoded, tokenizer.pad_token_id, 1, 256, 128) for model in pair]
    one, other = (scoring.perplexity(table, "response") for table in scores)
    assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.export
def test_an_architecture_that_llama_cpp_does_not_know(run_dir):
    config = run_dir / "merged" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM"))
    export_run = read(run_dir, gguf_types=["F16"])
    with pytest.raises(
        StageError, match=r"llama\.cpp cannot convert .*NoSuchForCausalLM"
    ) as caught:
        gguf.make_gguf(export_run, "F16")
    assert "\n" not in str(caught.value)
    assert not list((export_run.folder / "gguf").iterdir())
    with pytest.raises(StageError, match="does not know 'Q9_9'"):
        llama_cpp.usable_types(["Q9_9"])


class OtherTokens:
    """A stand-in for a GGUF file that splits texts into other tokens."""

    def __init__(self, file, window=8):
        self.adds_bos = False

    def tokenize(self, text, bos=""):
        return []


def finished_files(export_run, *kinds):
    """Stand-ins for finished GGUF files."""
    folder = export_run.folder / "gguf"
    folder.mkdir(parents=True)
    for kind in kinds:
        (folder / f"{export_run.name}-{kind}.gguf").write_text(kind)
    (folder / "Modelfile").write_text("FROM x")
    return folder


def test_a_file_with_other_tokens_moves_away_and_the_finished_ones_stay(run_dir, monkeypatch):
    monkeypatch.setattr(gguf, "InLlamaCpp", OtherTokens)
    export_run = read(run_dir)
    folder = finished_files(export_run, "F16", "Q8_0")
    with pytest.raises(StageError, match="into other tokens than the training"):
        gguf.check_tokens(export_run, folder / "run-F16.gguf")
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "run-Q8_0.gguf"]
    archived = list(run_dir.glob("earlier/*/export/gguf/*"))
    assert [path.read_text() for path in archived] == ["F16"]


def test_a_converter_that_fails_leaves_the_finished_files(run_dir, monkeypatch, no_sentencepiece):
    monkeypatch.setattr(gguf, "fetch_converter", lambda: "/dev/null/no-such-converter.py")
    export_run = read(run_dir)
    folder = finished_files(export_run, "Q8_0")
    with pytest.raises(StageError, match=r"llama\.cpp cannot convert") as caught:
        gguf.make_gguf(export_run, "F16")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "run-Q8_0.gguf"]


def test_a_converter_that_fails_without_a_word(run_dir, monkeypatch, tmp_path, no_sentencepiece):
    script = tmp_path / "silent.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(gguf, "fetch_converter", lambda: script)
    with pytest.raises(StageError, match="exit status 3"):
        gguf.make_gguf(read(run_dir), "F16")
