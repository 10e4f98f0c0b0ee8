"""GGUF files for llama.cpp and Ollama that read the same tokens."""

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig

from tabletune.chat.encoding import encode, prompt_and_completion
from tabletune.errors import StageError
from tabletune.export.llama_cpp import InLlamaCpp, fetch_converter, llama
from tabletune.run.files import whole


def prepare(model, copy, begins_with_bos):
    """Fill the folder `copy` with links to a model's files, and a tokenizer that the converter reads as it is.

    Tokens beyond the embedding matrix go. A SentencePiece vocabulary is written as tokenizer.model, as the converter
    takes the order of merges, without which words are cut elsewhere, from there only. It tells that kind by the
    fallback to bytes, which a vocabulary that is all bytes may claim as well.
    """
    for path in model.iterdir():
        if "token" not in path.name:
            (copy / path.name).symlink_to(path.resolve())
    about = AutoConfig.from_pretrained(model)
    rows = about.get_text_config().vocab_size
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: json.loads((model / name).read_text(encoding="utf-8")) for name in names}
    state, config = files.values()
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    if "ByteLevel" in json.dumps(state["pre_tokenizer"]):
        state["model"]["byte_fallback"] = False
        if (
            about.model_type == "phi3"
        ):  # a Phi-4, which the converter tells from a Phi-3 by this name
            config["tokenizer_class"] = "GPT2Tokenizer"
    elif state["model"].get("byte_fallback"):
        (copy / "tokenizer.model").write_bytes(sentencepiece_model(state, rows))
        files["added_tokens.json"] = {
            t["content"]: t["id"] for t in state["added_tokens"] if not t["special"]
        }
        state["post_processor"], config["add_bos_token"] = None, begins_with_bos
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def sentencepiece_model(state, rows):
    """The vocabulary of a tokenizer.json, its content `state`, as a SentencePiece model of `rows` tokens: bytes."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    rank, kind = {}, schema.ModelProto.SentencePiece
    for k, pair in enumerate(state["model"]["merges"]):
        rank.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), k)
    ids = state["model"]["vocab"] | {
        token["content"]: token["id"] for token in state["added_tokens"]
    }
    kinds = dict.fromkeys(range(rows), kind.UNUSED) | dict.fromkeys(ids.values(), kind.NORMAL)
    kinds |= {
        ids[byte]: kind.BYTE for byte in (f"<0x{value:02X}>" for value in range(256)) if byte in ids
    }
    kinds |= {
        t["id"]: kind.CONTROL if t["special"] else kind.USER_DEFINED for t in state["added_tokens"]
    }
    kinds[ids[state["model"]["unk_token"] or "<unk>"]] = kind.UNKNOWN
    names = {i: f"[PAD{i}]" for i in range(rows)} | {i: token for token, i in ids.items()}
    model = schema.ModelProto(
        trainer_spec={"model_type": schema.TrainerSpec.BPE, "byte_fallback": True}
    )
    for i in range(rows):
        model.pieces.add(piece=names[i], score=-rank.get(names[i], len(rank)), type=kinds[i])
    return model.SerializeToString()


def make_gguf(found, kind):
    """The merged model as a GGUF of the `kind`, "F16" or one quantized from it: its path. What is there stays.

    Raises StageError if llama.cpp does not know the model's architecture or its tokenizer.
    """
    file = found.folder / "gguf" / f"{found.name}-{kind}.gguf"
    if file.exists():
        return file
    with whole(file) as partial, tempfile.TemporaryDirectory() as copy:
        if kind == "F16":
            first = encode(found.splits["train"][0], found.tokenizer, found.stops)["input_ids"][0]
            prepare(found.merged, Path(copy), first == found.tokenizer.bos_token_id)
            # by this name llama.cpp knows that special tokens swallow the white space after them
            swallow = any(token.rstrip for token in found.tokenizer.added_tokens_decoder.values())
            command = [
                sys.executable,
                fetch_converter(),
                copy,
                "--outtype",
                "f16",
                "--outfile",
                partial,
            ]
            command += ["--model-name", found.name + " (Phi-3)" * swallow]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1]
                raise StageError(f"llama.cpp cannot convert {found.merged}: {reason}")
        else:
            params = llama().llama_model_quantize_default_params()
            params.ftype = getattr(llama(), f"LLAMA_FTYPE_MOSTLY_{kind}")
            source = make_gguf(found, "F16")
            if llama().llama_model_quantize(bytes(source), bytes(partial), ctypes.byref(params)):
                raise StageError(f"llama.cpp could not write {file}.")
    return file


def check_tokens(found, file):
    """Raise StageError unless llama.cpp cuts conversations of all splits into the same tokens. Returns their number."""
    model, tokenizer, number = InLlamaCpp(file), found.tokenizer, 0
    for split in found.splits.values():
        for row in split.select(range(min(len(split), 1000))):
            text = "".join(prompt_and_completion(row, tokenizer)) or row["completion"][0]["content"]
            trained_on = tokenizer(text, add_special_tokens=not row["prompt"])["input_ids"]
            if model.cut(text, tokenizer.bos_token) != trained_on:
                shutil.rmtree(file.parent)
                raise StageError(
                    f"llama.cpp cuts {text[:60]!r}… into other tokens than training: no GGUF is kept."
                )
            number += 1
    return number
