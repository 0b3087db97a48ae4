"""What diffusers and transformers print while they work for us, and our user has been told already or need not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_notices() -> Iterator[None]:
    """Only errors of the two libraries inside, and no bars; by their own settings, which are put back afterwards.

    For rendering: that a prompt is cut (``data.captions.warn_of_long`` says it once, with the prompt's name), that a
    tokenizer saw a long text, what a future version of a pipeline will do. For saving: bars of one short step. Not for
    loading, where a missing tensor is a warning too.
    """
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [log.get_verbosity() for log in logs]
    bars = transformers_log.is_progress_bar_enabled()
    for log in logs:
        log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
        if bars:
            transformers_log.enable_progress_bar()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Reading a local folder takes a second, and three bars for it bury what a run says."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in logs:
            log.enable_progress_bar()
