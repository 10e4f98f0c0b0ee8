"""GGUF files for llama.cpp and Ollama that read the same tokens."""

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tabletune.chat.encoding import encode, prompt_and_completion
from tabletune.errors import StageError
from tabletune.export.finished_run import ExportRun
from tabletune.export.llama_cpp import InLlamaCpp, fetch_converter, load_llama_cpp
from tabletune.run.files import archive, atomic_write

# by this part of a name llama.cpp knows that special tokens swallow the white space after them
SWALLOWS_SPACE = " (Phi-3)"


def make_gguf(export_run: ExportRun, kind: str) -> Path:
    """The merged model as a GGUF file of the `kind`, "F16" or one quantized from it.

    A finished file stays. Raises StageError if llama.cpp does not know the model's architecture or
    its tokenizer.
    """
    file = export_run.folder / "gguf" / f"{export_run.name}-{kind}.gguf"
    if file.exists():
        return file
    with atomic_write(file) as unfinished:
        if kind == "F16":
            convert_to_f16(export_run, unfinished)
        else:
            quantize(make_gguf(export_run, "F16"), unfinished, kind)
    return file


def convert_to_f16(export_run: ExportRun, file: Path) -> None:
    """Write the merged model to `file` in 16 bits, with llama.cpp's converter.

    Raises StageError if it refuses.
    """
    tokenizer = export_run.tokenizer
    first_row = encode(export_run.splits["train"][0], tokenizer, export_run.stop_token_ids)
    begins_with_bos = first_row["input_ids"][0] == tokenizer.bos_token_id
    name = export_run.name
    if any(token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        name += SWALLOWS_SPACE
    with tempfile.TemporaryDirectory() as copy:
        prepare_for_converter(export_run.merged, Path(copy), begins_with_bos)
        command = [sys.executable, str(fetch_converter()), copy, "--outtype", "f16"]
        command += ["--outfile", str(file), "--model-name", name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise StageError(f"llama.cpp cannot convert {export_run.merged}: {lines[-1]}")


def quantize(source: Path, file: Path, kind: str) -> None:
    """Write the GGUF file `source` to `file`, quantized to `kind`.

    Raises StageError if llama.cpp refuses.
    """
    llama_cpp = load_llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    # llama.cpp's C API, through ctypes: the Python package has no function for it
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(bytes(source), bytes(file), ctypes.byref(params)):
        raise StageError(
            f"llama.cpp could not quantize {source} to {kind}. Leave {kind} out of gguf_types."
        )


def check_tokens(export_run: ExportRun, file: Path) -> int:
    """Check that llama.cpp splits the conversations of this run into the tokens of the training.

    Returns their number. If it does not, `file` moves to `earlier/`, and StageError is raised.
    Other files stay where they are.
    """
    model = InLlamaCpp(file)
    tokenizer = export_run.tokenizer
    number = 0
    for row in map(export_run.as_asked, export_run.conversations()):
        text = "".join(prompt_and_completion(row, tokenizer)) or row["completion"][0]["content"]
        # a rendered conversation brings its BOS along, a plain text does not
        expected = tokenizer(text, add_special_tokens=not row["prompt"])["input_ids"]
        if model.tokenize(text, tokenizer.bos_token) != expected:
            archive_refused(export_run, file)
            raise StageError(
                f"llama.cpp splits {text[:60]!r}… into other tokens than the training did, so "
                f"{file.name} would be another model. It is not used."
            )
        number += 1
    return number


def archive_refused(export_run: ExportRun, *files: Path) -> None:
    """Move files that did not pass a check to `earlier/`.

    Everything else in `export/gguf/` stays.
    """
    parent = export_run.folder.parent
    archive(parent, *(str(file.relative_to(parent)) for file in files))


def prepare_for_converter(model: Path, copy: Path, begins_with_bos: bool) -> None:
    """Fill the folder `copy` with what the converter reads correctly.

    That is links to a model's files, and another tokenizer. Tokens beyond the embedding matrix are
    left out. A SentencePiece vocabulary is also written as tokenizer.model: the converter reads the
    order of merges from there only, and without it words are split elsewhere. The converter
    recognizes that kind by the fallback to bytes, which a byte-level vocabulary may claim, too.
    """
    # links, not copies: the weights may be many GiB
    for path in model.iterdir():
        if "token" not in path.name:
            (copy / path.name).symlink_to(path.resolve())
    model_config = AutoConfig.from_pretrained(model)
    vocabulary_size = model_config.get_text_config().vocab_size
    tokenizer = read_json_text(model / "tokenizer.json")
    config = read_json_text(model / "tokenizer_config.json")
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}

    tokens = [token for token in tokenizer["added_tokens"] if token["id"] < vocabulary_size]
    tokenizer["added_tokens"] = tokens
    if "ByteLevel" in json.dumps(tokenizer["pre_tokenizer"]):
        tokenizer["model"]["byte_fallback"] = False
        if model_config.model_type == "phi3":
            # a Phi-4, which the converter tells from a Phi-3 by this name
            config["tokenizer_class"] = "GPT2Tokenizer"
    elif tokenizer["model"].get("byte_fallback"):
        sentencepiece = sentencepiece_model(tokenizer, vocabulary_size)
        (copy / "tokenizer.model").write_bytes(sentencepiece)
        ordinary = {token["content"]: token["id"] for token in tokens if not token["special"]}
        files["added_tokens.json"] = ordinary
        tokenizer["post_processor"] = None
        config["add_bos_token"] = begins_with_bos
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read_json_text(path: Path) -> dict[str, Any]:
    """The content of a JSON file of the model."""
    return json.loads(path.read_text(encoding="utf-8"))


def sentencepiece_model(tokenizer: dict[str, Any], vocabulary_size: int) -> bytes:
    """The vocabulary of a tokenizer.json as a SentencePiece model.

    `tokenizer` is the file's content; the model has `vocabulary_size` tokens.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    ranks = merge_ranks(tokenizer["model"]["merges"])
    ids = dict(tokenizer["model"]["vocab"])
    for token in tokenizer["added_tokens"]:
        ids[token["content"]] = token["id"]
    # rows of the embedding matrix that no token uses need a name as well
    names = {i: f"[PAD{i}]" for i in range(vocabulary_size)}
    names |= {i: token for token, i in ids.items()}

    kind = schema.ModelProto.SentencePiece
    kinds = dict.fromkeys(range(vocabulary_size), kind.UNUSED)
    kinds |= dict.fromkeys(ids.values(), kind.NORMAL)
    for value in range(256):
        byte = f"<0x{value:02X}>"
        if byte in ids:
            kinds[ids[byte]] = kind.BYTE
    for token in tokenizer["added_tokens"]:
        kinds[token["id"]] = kind.CONTROL if token["special"] else kind.USER_DEFINED
    kinds[ids[tokenizer["model"]["unk_token"] or "<unk>"]] = kind.UNKNOWN

    trainer = {"model_type": schema.TrainerSpec.BPE, "byte_fallback": True}
    model = schema.ModelProto(trainer_spec=trainer)
    for i in range(vocabulary_size):
        # the earlier a merge, the higher its score
        score = -ranks.get(names[i], len(ranks))
        model.pieces.add(piece=names[i], score=score, type=kinds[i])
    return model.SerializeToString()


def merge_ranks(merges: list[str | list[str]]) -> dict[str, int]:
    """The rank of each token that merges make, {token: rank}, by the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        parts = pair if isinstance(pair, list) else pair.split(" ")
        ranks.setdefault("".join(parts), rank)
    return ranks
