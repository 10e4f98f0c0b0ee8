"""tabletune: fine-tune a chat model on your own small table. The notebooks are the lesson; this is what they share."""

import logging
import os

# The same bits from the same sums, whatever the memory looks like. MKL reads it when torch is imported.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# bitsandbytes looks for an optional CPU kernel, Liger for kernels of other hardware, and both do without.
for library in ("bitsandbytes", "liger_kernel"):
    logging.getLogger(library).setLevel(logging.ERROR)
