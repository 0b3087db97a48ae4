"""What diffusers and transformers print while they work for us, and our user has been told already or need not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_notices() -> Iterator[None]:
    """Only errors of the two libraries inside, by their own settings; afterwards these are as they were.

    For rendering: that a prompt is cut (``data.captions.warn_of_long`` says it once, with the prompt's name), that a
    tokenizer saw a long text, what a future version of a pipeline will do. Not for loading, where a missing tensor is
    a warning too.
    """
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
