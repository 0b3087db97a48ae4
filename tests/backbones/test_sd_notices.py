"""Rendering says nothing that is not for our user, and leaves the libraries' own settings alone."""

import logging

import pytest
import torch

from tests.diffusion_training import base
from visadapt.backbones.sd_notices import without_notices
from visadapt.backbones.sd_render import render
from visadapt.backbones.stable_diffusion import StableDiffusion, pipeline


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def said():
    """What the two libraries log."""
    handler = Kept()
    logs = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for log in logs:
        log.addHandler(handler)
    yield handler.texts
    for log in logs:
        log.removeHandler(handler)


def test_a_long_prompt_is_cut_without_notices(said):
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logs = (diffusers_log, transformers_log)
    verbosity = [log.get_verbosity() for log in logs]
    model = StableDiffusion(base()).build()
    said.clear()
    long = "far too long a prompt " * 3
    render(model, [long], [0], steps=1)
    assert said == []
    assert [log.get_verbosity() for log in logs] == verbosity
    pipeline(model)(long, num_inference_steps=1, output_type="latent")
    assert any("truncated" in text for text in said)  # which is what is kept back
    with pytest.raises(ZeroDivisionError), without_notices():
        _ = 1 / 0
    assert [log.get_verbosity() for log in logs] == verbosity
    torch.set_num_threads(before)
