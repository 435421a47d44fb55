"""Less noise from the libraries, for programs; importing dydit_scale changes nothing."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Errors only from diffusers and transformers, and no progress bars for loading files of kilobytes."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    # DeepSpeed calls collectives by names that torch renames; our blocks return views that nobody writes into.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*single")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    for name in ("DeepSpeed", "torchao", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.WARNING)
