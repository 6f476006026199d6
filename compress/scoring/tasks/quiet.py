"""Other packages without their warnings and progress bars; what they report is in our own results."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "fsspec", "filelock")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, lm-eval and what it loads data with say nothing. Imports them."""
    import datasets.utils as bars
    import lm_eval.api.task as task_module

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels, bar, shown = [logger.level for logger in loggers], task_module.tqdm, not bars.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    task_module.tqdm = functools.partial(bar, disable=True)
    bars.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        task_module.tqdm = bar
        if shown:
            bars.enable_progress_bars()
