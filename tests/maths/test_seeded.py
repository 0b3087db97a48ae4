"""Seeded generators."""

from __future__ import annotations

import torch

from visadapt.maths.seeded import generator


def test_the_same_parts_give_the_same_numbers_and_others_do_not():
    def drawn(*parts):
        return torch.rand(4, generator=generator(*parts))

    assert torch.equal(drawn(0, "A", (2, 3)), drawn(0, "A", (2, 3)))
    others = [drawn(1, "A", (2, 3)), drawn(0, "B", (2, 3)), drawn(0, "A", (3, 2))]
    assert not any(torch.equal(drawn(0, "A", (2, 3)), o) for o in others)


def test_the_numbers_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = torch.rand(3, generator=generator(5))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(3, generator=generator(5)))
