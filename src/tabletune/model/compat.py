"""bitsandbytes, imported without torch's compiler.

At its import it hands its plain path, which nothing here takes, to `torch.compile`, and that loads the compiler: two
seconds at the start of each notebook (`_try_torch_compile` in bitsandbytes 0.50). TORCHDYNAMO_DISABLE is torch's option
against it. It is asked only meanwhile: a reader's own `torch_compile` works.
"""

import os

asked = os.environ.get("TORCHDYNAMO_DISABLE")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
try:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
finally:
    os.environ.pop("TORCHDYNAMO_DISABLE")
    if asked is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = asked

__all__ = ["QuantState", "bnb", "dequantize_4bit", "quantize_4bit"]
