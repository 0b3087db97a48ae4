"""Stepping small tensors as one changes nothing but the time."""

import copy

import pytest
import torch
from torch import nn

from visadapt.optim.flat import ELEMENTWISE, flatten, sync_gradients

SHAPES = [(4, 3), (2, 4), (5,), (), (4, 3), (3, 1, 2), (600, 300), (2, 4)]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def backward(params, step, skip=()):
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator)
        if i not in skip:
            (p * gradient).sum().backward()


def groups(params):
    return [{"params": params[:6], "lr": 0.01}, {"params": params[6:], "lr": 0.03}]


def pair(cls, **kwargs):
    ours, theirs = parameters(), parameters()
    return ours, flatten(cls(groups(ours), **kwargs)), theirs, cls(groups(theirs), **kwargs)


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b))


@pytest.mark.parametrize("cls", sorted(ELEMENTWISE, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_same_steps_as_torch(cls):
    ours, optimizer, theirs, plain = pair(cls)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, plain)]
    assert isinstance(optimizer, cls)
    assert len(optimizer.param_groups[0]["params"]) == 1
    for step in range(5):
        for params, one in ((ours, optimizer), (theirs, plain)):
            backward(params, step)
            backward(params, 50 + step)  # accumulated
            sync_gradients(one)
            nn.utils.clip_grad_norm_([p for g in one.param_groups for p in g["params"]], 1.0)
            one.step()
            one.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert close(ours, theirs)


@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"foreach": True}, {"maximize": True}], ids=str)
def test_options_and_state_travel_both_ways(kwargs):
    """A flat optimiser loads the plain one's state and the other way round, and goes on alike."""
    ours, optimizer, theirs, plain = pair(torch.optim.AdamW, weight_decay=0.1, **kwargs)
    for step in range(3):
        for params, one in ((ours, optimizer), (theirs, plain)):
            backward(params, step)
            one.step()
            one.zero_grad()
    saved, expected = optimizer.state_dict(), plain.state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        assert state.keys() == saved["state"][i].keys()
        assert close(state.values(), saved["state"][i].values())
    assert [g["params"] for g in saved["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    optimizer.load_state_dict(copy.deepcopy(expected))
    plain.load_state_dict(copy.deepcopy(saved))
    for params, one in ((ours, optimizer), (theirs, plain)):
        backward(params, 9)
        one.step()
    assert close(ours, theirs)


def test_resume_is_exact():
    whole = parameters()
    optimizer = flatten(torch.optim.AdamW(groups(whole)))
    for step in range(3):
        backward(whole, step)
        optimizer.step()
        optimizer.zero_grad()
    state = copy.deepcopy(optimizer.state_dict())
    again = [nn.Parameter(p.detach().clone()) for p in whole]
    resumed = flatten(torch.optim.AdamW(groups(again)))
    resumed.load_state_dict(state)
    for params, one in ((whole, optimizer), (again, resumed)):
        backward(params, 7)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, again))


def test_a_tensor_without_gradient_is_left_alone():
    ours, optimizer, theirs, plain = pair(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
    for step, skip in enumerate([(2,), (1, 3), (), (0, 1, 2, 3, 4, 5), ()]):
        for params, one in ((ours, optimizer), (theirs, plain)):
            backward(params, step, skip)
            one.step()
            one.zero_grad()
        assert close(ours, theirs), step


def test_parameters_keep_identity_and_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    flatten(torch.optim.AdamW(model.parameters()))
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])


def test_gradients_replaced_between_backward_and_step_count():
    ours, optimizer, theirs, plain = pair(torch.optim.SGD)
    for params, one in ((ours, optimizer), (theirs, plain)):
        backward(params, 0)
        sync_gradients(one)
        params[0].grad = torch.full_like(params[0], 3.0)
        params[1].grad.mul_(2)
        one.step()
    assert close(ours, theirs)


def test_moved_parameters_are_refused():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    optimizer = flatten(torch.optim.SGD(model.parameters(), lr=0.1))
    model.double()
    with pytest.raises(RuntimeError, match=r"moved or cast .* make the optimiser"):
        optimizer.step()


def test_other_rules_stay_as_they_are():
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(6)]
    optimizer = torch.optim.Adafactor(params)
    assert flatten(optimizer) is optimizer
    assert type(optimizer) is torch.optim.Adafactor


def test_state_of_other_groups_is_refused():
    _, optimizer, *_ = pair(torch.optim.AdamW)
    with pytest.raises(ValueError, match="other adapters or targets"):
        optimizer.load_state_dict(torch.optim.AdamW(parameters()).state_dict())


def test_state_of_another_rank_is_refused():
    _, optimizer, theirs, plain = pair(torch.optim.AdamW)
    backward(theirs, 0)
    plain.step()
    state = copy.deepcopy(plain.state_dict())
    state["state"][1]["exp_avg"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="other rank"):
        optimizer.load_state_dict(state)


def test_a_group_added_later_is_flattened():
    params = parameters()
    optimizer = flatten(torch.optim.SGD(params, lr=0.1))
    more = [nn.Parameter(torch.randn(2, 2)) for _ in range(5)]
    optimizer.add_param_group({"params": more, "lr": 0.5})
    before = more[0].detach().clone()
    more[0].sum().backward()
    optimizer.step()
    assert torch.allclose(more[0], before - 0.5)
    assert len(optimizer.state_dict()["param_groups"][1]["params"]) == 5
