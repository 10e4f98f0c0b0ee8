"""Nothing that training runs on a T4 needs a newer GPU.

No T4 is needed: Triton compiles for its architecture, sm_75, on any machine. Triton is only on
Linux with CUDA, or after `pip install triton`; without it these tests are skipped.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_fused_lora import adapted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from tabletune.model.devices import compute_dtype
from tabletune.model.fused_lora import fuse_adapters
from tabletune.model.loading import attention_implementation
from tabletune.model.recompute import recompute_cheap_parts

HAS_TRITON = all(map(importlib.util.find_spec, ("triton", "liger_kernel")))
needs_triton = pytest.mark.skipif(
    not HAS_TRITON,
    reason="Triton or liger-kernel is not installed: pip install triton liger-kernel",
)
TURING = 75
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
POINTERS = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def signature_of(kernel, arguments):
    """The types of a kernel's arguments as Triton names them, and the values of its constants."""
    types, constants = {}, {}
    for parameter in kernel.params:
        value = arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = POINTERS[value.dtype]  # a KeyError: bf16, which a T4 lacks
        elif isinstance(value, int):
            types[parameter.name] = "i32"
        else:
            types[parameter.name] = "fp32"
    return types, constants


def compile_instead(kernel, compiled, *arguments, grid=None, warmup=False, **named):
    """Compile a kernel for sm_75 with the arguments it is launched with. Nothing is launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, arguments, strict=False))
    values |= {name: value for name, value in named.items() if name in names}
    options = {name: named[name] for name in ("num_warps", "num_stages") if name in named}
    types, constants = signature_of(kernel, values)
    target = GPUTarget("cuda", TURING, 32)
    result = triton.compile(ASTSource(kernel, types, constants), target=target, options=options)
    compiled[kernel.__name__] = result.asm["ptx"]


@pytest.fixture
def unpatched_models():
    """Liger replaces functions and classes in transformers' modules: put them back afterwards."""
    for kind in (LlamaConfig, Qwen3Config, Gemma3TextConfig):
        AutoModelForCausalLM.from_config(kind(**SHAPE))  # imports its module
    before = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            before[name] = dict(vars(module))
    yield
    for name, attributes in before.items():
        vars(sys.modules[name]).update(attributes)


@needs_triton
@pytest.mark.usefixtures("unpatched_models")
@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_all_kernels_of_a_training_step_compile_for_a_t4(config, monkeypatch):
    """Those of Liger, which are all that there are: forward and backward pass in fp16."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from triton.runtime.jit import JITFunction

    compiled = {}
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda kernel, *arguments, **named: compile_instead(kernel, compiled, *arguments, **named),
    )
    model = AutoModelForCausalLM.from_config(config(**SHAPE)).half()
    _apply_liger_kernel_to_instance(model=model)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    ids = torch.arange(32)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(compiled) >= 6
    assert all(f".target sm_{TURING}" in code for code in compiled.values())
    assert not any("bf16" in code for code in compiled.values())


def test_a_t4_computes_in_fp16_with_attention_that_it_has(monkeypatch):
    """bf16, flash attention and flex_attention need sm_80; PyTorch's SDPA has kernels for sm_75."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert compute_dtype("auto") == torch.float16
    for config in (LlamaConfig(**SHAPE), Qwen3Config(**SHAPE), Gemma3TextConfig(**SHAPE)):
        assert attention_implementation(config) in ("sdpa", "eager")


@needs_triton
def test_the_kernels_of_bitsandbytes_are_compiled_for_a_t4():
    """In its libraries for the releases of CUDA that Colab and Kaggle have. Triton brings cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    folder = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    libraries = [folder / f"libbitsandbytes_cuda{release}.so" for release in (124, 126, 128)]
    for library in libraries:
        command = [tool, "--list-elf", library]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f".sm_{TURING}." in listed, library.name


class Dtypes(TorchDispatchMode):
    """Notes the dtypes of all tensors that operations take and give."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        leaves = tree_leaves((arguments, options, result))
        self.seen |= {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


def test_no_tensor_of_a_training_step_in_fp16_is_bf16():
    """Forward and backward pass of fused adapters and recomputed parts, on any device."""
    model = adapted()
    fuse_adapters(model)
    recompute_cheap_parts(model, torch.float16)
    ids = torch.arange(32)[None]
    with Dtypes() as dtypes:
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert torch.float16 in dtypes.seen
    assert torch.bfloat16 not in dtypes.seen
