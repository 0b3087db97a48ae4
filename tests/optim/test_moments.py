"""What an optimiser keeps of a parameter can be read and written, flat or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visadapt.optim.flat import flatten
from visadapt.optim.moments import of


@pytest.mark.parametrize("flat", [False, True])
def test_views_of_the_state(flat):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, i + 1)) for i in range(6)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    optimizer = flatten(optimizer) if flat else optimizer
    moments = of(optimizer)
    assert moments(parameters[2]) == {}
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    for p in parameters:
        assert set(moments(p)) == {"exp_avg", "exp_avg_sq"}
        torch.testing.assert_close(moments(p)["exp_avg"], 0.1 * p.grad)
    moments(parameters[2])["exp_avg"].zero_()
    state = optimizer.state_dict()["state"]
    assert not state[2]["exp_avg"].any()
    assert state[1]["exp_avg"].any()
    assert moments(nn.Parameter(torch.zeros(2))) == {}
