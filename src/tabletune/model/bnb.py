"""bitsandbytes, imported without torch's compiler.

At its import bitsandbytes hands a path that nothing here takes to `torch.compile`, and that loads
the compiler: two seconds at the start of each notebook (`_try_torch_compile` in bitsandbytes 0.50).
TORCHDYNAMO_DISABLE is torch's own switch against it. It also warns of an optional CPU kernel that
is not needed. Both are switched off for the import alone: a reader's `torch_compile` works
afterwards.
"""

import logging
import os

logger = logging.getLogger("bitsandbytes")
level_before = logger.level
dynamo_before = os.environ.get("TORCHDYNAMO_DISABLE")
logger.setLevel(logging.ERROR)
os.environ["TORCHDYNAMO_DISABLE"] = "1"
try:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
finally:
    logger.setLevel(level_before)
    del os.environ["TORCHDYNAMO_DISABLE"]
    if dynamo_before is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = dynamo_before

__all__ = ["QuantState", "bnb", "dequantize_4bit", "quantize_4bit"]
