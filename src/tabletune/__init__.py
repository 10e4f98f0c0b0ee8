"""tabletune: fine-tune a chat model on your own small table.

The notebooks are the lesson; this package is what they share.
"""

import os

# The same bits from the same sums, whatever the memory looks like: MKL reads it when torch is
# imported. The package changes nothing else of the reader's process when it is imported.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
