"""llama.cpp from Python: the library, the converter, a model that can be scored."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub.constants import HF_ASSETS_CACHE

from tabletune.errors import StageError
from tabletune.run.files import whole

LLAMA_CPP = (
    "llama-cpp-python==0.3.36"  # its source package is llama.cpp: library, quantizer and converter
)
EXTRAS = f"{LLAMA_CPP} sentencepiece==0.2.2 gguf==0.19.0"


# --- GGUF


def usable_types(gguf_types):
    """The types of GGUF to make, F16 first, as the others are made from it; none where llama.cpp is missing.

    Raises StageError if llama.cpp does not know one of them.
    """
    if gguf_types and not all(map(find_spec, ("llama_cpp", "sentencepiece"))):
        print(
            f"Cards only: llama.cpp is missing here. `make export` brings it, or pip install {EXTRAS}."
        )
        return []
    for kind in gguf_types:
        if kind != "F16" and not hasattr(llama(), f"LLAMA_FTYPE_MOSTLY_{kind}"):
            raise StageError(
                f"gguf_types: llama.cpp does not know {kind!r}; common are F16, Q8_0, Q5_K_M, Q4_K_M."
            )
    return list(dict.fromkeys(["F16", *gguf_types])) if gguf_types else []


@lru_cache
def llama():
    """The package llama_cpp, silent, and keeping weights in the layout of the file, for which `Llama` has no argument.

    With the layout for AMX the library of llama-cpp-python 0.3.36 crashes on Xeons that have it.
    """
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # waiting threads leave the processor to others that work
    import llama_cpp

    llama_cpp.silent = llama_cpp.llama_log_callback(
        lambda *_: None
    )  # it is called as long as the library lives
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
                raise StageError(
                    f"pip could not download {LLAMA_CPP} with llama.cpp's converter. Is there a network?"
                )
            wanted = re.compile(
                r".*/vendor/llama\.cpp/(convert_hf_to_gguf\.py|conversion/|gguf-py/gguf/)"
            )
            with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
                archive.extractall(
                    unfinished, [file for file in archive if wanted.match(file.name)], filter="data"
                )
    return next(converter.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))


# --- in llama.cpp


class InLlamaCpp(torch.nn.Module):
    """A GGUF in llama.cpp, on the CPU: a model for `scoring.score` and `scoring.generate`, one text at a time."""

    device, generation_config = torch.device("cpu"), None

    def __init__(self, file, window=8):
        super().__init__()
        how = {
            "n_ctx": window,
            "n_batch": window,
            "n_threads": os.cpu_count(),
            "logits_all": True,
            "verbose": False,
        }
        try:
            self.model = llama().Llama(str(file), **how)
        except ValueError as error:
            raise StageError(f"llama.cpp cannot read {file}: {error}") from None
        self.adds_bos = bool(
            llama().llama_vocab_get_add_bos(llama().llama_model_get_vocab(self.model.model))
        )

    def forward(self, input_ids, **_):
        """The logits of one text, `input_ids` [1, tokens], as a model of transformers gives them."""
        self.model.reset()
        self.model.eval(input_ids[0].tolist())
        return SimpleNamespace(logits=torch.tensor(self.model.scores[None, : input_ids.shape[1]]))

    def generate(self, input_ids, generation_config, **_):
        """`input_ids` [1, tokens] with a greedy answer behind them."""
        ids = input_ids[0].tolist()
        for number, token in enumerate(
            self.model.generate(list(ids), temp=0.0, repeat_penalty=1.0), 1
        ):
            ids.append(token)
            if (
                token in generation_config.eos_token_id
                or number == generation_config.max_new_tokens
            ):
                return torch.tensor([ids])

    def cut(self, text, bos=""):
        """The ids of a rendered conversation. `bos`, the text of that token, comes once, whoever puts it there."""
        text = text.removeprefix(bos or "") if self.adds_bos else text
        return self.model.tokenize(text.encode(), add_bos=self.adds_bos, special=True)
