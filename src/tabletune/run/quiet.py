"""Less noise in a notebook: what libraries print there beside their results.

Importing the package changes nothing of this for the reader's process. A notebook asks for it when
its stage starts.
"""

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Switch off what libraries print or store without use for a notebook.

    These are progress bars, advice and caches. Liger looks for kernels of other hardware, and tqdm
    for widgets; both do without. transformers advises on arguments that the package sets on
    purpose. datasets would write what it computes into the run folder. Libraries that are not
    imported yet read the environment.
    """
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="IProgress not found")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
        datasets.disable_caching()
