"""A model for llama.cpp and Ollama: GGUF files that read the same tokens, and a Modelfile that asks as in training."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from functools import lru_cache, partial
from importlib import resources
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jinja2
import torch
from huggingface_hub.constants import HF_ASSETS_CACHE
from transformers import AutoConfig

from .chat_format import encode, encode_prompt, texts_of
from .chat_templates import render
from .run import StageError, whole

LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package is llama.cpp: library, quantizer and converter
EXTRAS = f"{LLAMA_CPP} sentencepiece==0.2.2 gguf==0.19.0"


# --- GGUF


def usable_types(gguf_types):
    """The types of GGUF to make, F16 first, as the others are made from it; none where llama.cpp is missing.

    Raises StageError if llama.cpp does not know one of them.
    """
    if gguf_types and not all(map(find_spec, ("llama_cpp", "sentencepiece"))):
        print(f"Cards only: llama.cpp is missing here. `make export` brings it, or pip install {EXTRAS}.")
        return []
    for kind in gguf_types:
        if kind != "F16" and not hasattr(llama(), f"LLAMA_FTYPE_MOSTLY_{kind}"):
            raise StageError(f"gguf_types: llama.cpp does not know {kind!r}; common are F16, Q8_0, Q5_K_M, Q4_K_M.")
    return list(dict.fromkeys(["F16", *gguf_types])) if gguf_types else []


@lru_cache
def llama():
    """The package llama_cpp, silent, and keeping weights in the layout of the file, for which `Llama` has no argument.

    With the layout for AMX the library of llama-cpp-python 0.3.36 crashes on Xeons that have it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the processor to others that work
    import llama_cpp

    llama_cpp.silent = llama_cpp.llama_log_callback(lambda *_: None)  # it is called as long as the library lives
    llama_cpp.llama_log_set(llama_cpp.silent, None)
    default = llama_cpp.llama_model_default_params

    def plain_layout():
        params = default()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain_layout
    return llama_cpp


def fetch_converter():
    """llama.cpp's converter, which is in the source package only, kept beside the Hub's models. Raises StageError."""
    converter = Path(HF_ASSETS_CACHE) / "tabletune" / LLAMA_CPP.replace("==", "-")
    if not converter.exists():
        with tempfile.TemporaryDirectory() as place, whole(converter) as unfinished:
            how = ["--no-deps", "--no-binary=:all:", f"--dest={place}"]
            pip = [sys.executable, "-m", "pip", "download", *how, LLAMA_CPP]
            if subprocess.run(pip, capture_output=True).returncode:
                raise StageError(f"pip could not download {LLAMA_CPP} with llama.cpp's converter. Is there a network?")
            wanted = re.compile(r".*/vendor/llama\.cpp/(convert_hf_to_gguf\.py|conversion/|gguf-py/gguf/)")
            with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
                archive.extractall(unfinished, [file for file in archive if wanted.match(file.name)], filter="data")
    return next(converter.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))


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
        if about.model_type == "phi3":  # a Phi-4, which the converter tells from a Phi-3 by this name
            config["tokenizer_class"] = "GPT2Tokenizer"
    elif state["model"].get("byte_fallback"):
        (copy / "tokenizer.model").write_bytes(sentencepiece_model(state, rows))
        files["added_tokens.json"] = {t["content"]: t["id"] for t in state["added_tokens"] if not t["special"]}
        state["post_processor"], config["add_bos_token"] = None, begins_with_bos
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def sentencepiece_model(state, rows):
    """The vocabulary of a tokenizer.json, its content `state`, as a SentencePiece model of `rows` tokens: bytes."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    rank, kind = {}, schema.ModelProto.SentencePiece
    for k, pair in enumerate(state["model"]["merges"]):
        rank.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), k)
    ids = state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    kinds = dict.fromkeys(range(rows), kind.UNUSED) | dict.fromkeys(ids.values(), kind.NORMAL)
    kinds |= {ids[byte]: kind.BYTE for byte in (f"<0x{value:02X}>" for value in range(256)) if byte in ids}
    kinds |= {t["id"]: kind.CONTROL if t["special"] else kind.USER_DEFINED for t in state["added_tokens"]}
    kinds[ids[state["model"]["unk_token"] or "<unk>"]] = kind.UNKNOWN
    names = {i: f"[PAD{i}]" for i in range(rows)} | {i: token for token, i in ids.items()}
    model = schema.ModelProto(trainer_spec={"model_type": schema.TrainerSpec.BPE, "byte_fallback": True})
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
            command = [sys.executable, fetch_converter(), copy, "--outtype", "f16", "--outfile", partial]
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


# --- in llama.cpp


class InLlamaCpp(torch.nn.Module):
    """A GGUF in llama.cpp, on the CPU: a model for `scoring.score` and `scoring.generate`, one text at a time."""

    device, generation_config = torch.device("cpu"), None

    def __init__(self, file, window=8):
        super().__init__()
        how = {"n_ctx": window, "n_batch": window, "n_threads": os.cpu_count(), "logits_all": True, "verbose": False}
        try:
            self.model = llama().Llama(str(file), **how)
        except ValueError as error:
            raise StageError(f"llama.cpp cannot read {file}: {error}") from None
        self.adds_bos = bool(llama().llama_vocab_get_add_bos(llama().llama_model_get_vocab(self.model.model)))

    def forward(self, input_ids, **_):
        """The logits of one text, `input_ids` [1, tokens], as a model of transformers gives them."""
        self.model.reset()
        self.model.eval(input_ids[0].tolist())
        return SimpleNamespace(logits=torch.tensor(self.model.scores[None, : input_ids.shape[1]]))

    def generate(self, input_ids, generation_config, **_):
        """`input_ids` [1, tokens] with a greedy answer behind them."""
        ids = input_ids[0].tolist()
        for number, token in enumerate(self.model.generate(list(ids), temp=0.0, repeat_penalty=1.0), 1):
            ids.append(token)
            if token in generation_config.eos_token_id or number == generation_config.max_new_tokens:
                return torch.tensor([ids])

    def cut(self, text, bos=""):
        """The ids of a rendered conversation. `bos`, the text of that token, comes once, whoever puts it there."""
        text = text.removeprefix(bos or "") if self.adds_bos else text
        return self.model.tokenize(text.encode(), add_bos=self.adds_bos, special=True)


def check_tokens(found, file):
    """Raise StageError unless llama.cpp cuts conversations of all splits into the same tokens. Returns their number."""
    model, tokenizer, number = InLlamaCpp(file), found.tokenizer, 0
    for split in found.splits.values():
        for row in split.select(range(min(len(split), 1000))):
            text = "".join(texts_of(row, tokenizer)) or row["completion"][0]["content"]
            trained_on = tokenizer(text, add_special_tokens=not row["prompt"])["input_ids"]
            if model.cut(text, tokenizer.bos_token) != trained_on:
                shutil.rmtree(file.parent)
                raise StageError(f"llama.cpp cuts {text[:60]!r}… into other tokens than training: no GGUF is kept.")
            number += 1
    return number


# --- Ollama


def put_text(path, text):
    """Write a text file, unless it says just that already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def take_apart(render):
    """The texts that a chat template puts around messages: {(role before, this role): text}, "" at beginning and end.

    `render` takes messages and gives what the template makes of them, up to where the next answer begins. Raises
    ValueError if the template is more than texts around the messages.
    """

    def around(*roles):
        marks = [f"«{k}»" for k in range(len(roles))]
        text = render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        if re.findall("«.»", text) != marks:
            raise ValueError("it leaves out messages or repeats them")
        return dict(zip(pairwise(["", *roles, ""]), re.split("«.»", text), strict=True))

    texts = around("user", "assistant", "user")
    with suppress(jinja2.TemplateError, StageError, ValueError):  # it may have no place for a system message
        texts = around("system", "user") | texts
    for roles in (["user"], ["user", "assistant"] * 2 + ["user"], ["system", "user", "assistant", "user"]):
        messages = [{"role": role, "content": f'{k}. *Say* "{role}"'} for k, role in enumerate(roles)]
        if ("", roles[0]) in texts and put_together(texts, messages) != render(messages):
            raise ValueError("it does more than put texts around the messages")
    return texts


def put_together(texts, messages):
    """What the Ollama template of `texts` makes of messages."""
    roles = ["", *(message["role"] for message in messages)]
    parts = [texts[pair] + m["content"] for pair, m in zip(pairwise(roles), messages, strict=True)]
    return "".join(parts) + texts[roles[-1], ""]


def write_modelfile(found, file, prompts):
    """Write Ollama's `Modelfile` for a GGUF beside it: its text, or None, with a line why, if there can be none.

    Raises StageError if it would make another prompt of one of `prompts` than the training, token for token.
    """
    model, tokenizer = InLlamaCpp(file), found.tokenizer
    bos = tokenizer.bos_token or "" if model.adds_bos else ""
    try:
        texts = take_apart(lambda messages: render(messages, tokenizer))
        texts = {(a, b): text if a else text.removeprefix(bos) for (a, b), text in texts.items()}
        asked = [put_together(texts, prompt) for prompt in prompts]
    except (ValueError, KeyError, StageError) as error:
        print(f"No Modelfile: the chat template cannot be written in Ollama's language, as {error}.")
        return None
    for prompt, text in zip(prompts, asked, strict=True):
        if model.cut(text) != encode_prompt(prompt, tokenizer):
            raise StageError(f"Ollama's prompt for {prompt[-1]['content']!r} is not the training's: no Modelfile.")
    text = modelfile(found, file.name, texts)
    put_text(file.with_name("Modelfile"), text)
    return text


def modelfile(found, file, texts):
    """The text of a Modelfile for the GGUF named `file`, from the `texts` of the chat template."""
    source = (resources.files("tabletune") / "templates/Modelfile.j2").read_text(encoding="utf-8")
    template = jinja2.Template(source, keep_trailing_newline=True)
    quoted = partial(json.dumps, ensure_ascii=False)  # which is how Go quotes, too
    return template.render(**vars(found), file=file, texts=texts, quoted=quoted)
