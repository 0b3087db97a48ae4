"""LoKr against the Kronecker product, its thin steps, splits, factors, and LyCORIS itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place
from visadapt.core.site import Site
from visadapt.maths.kronecker import split


def lokr(p: dict[str, Tensor], shape: torch.Size, scale: float) -> Tensor:
    """Entry by entry: block (p, u) of the matrix of each kernel tap is L[p, u] · R."""
    left = p["left"] if "left" in p else p["left_up"] @ p["left_down"]
    if "right" in p:
        right = p["right"]
    elif "right_core" in p:
        right = torch.einsum("abhw,oa,bi->oihw", p["right_core"], p["right_up"], p["right_down"])
    else:
        right = torch.einsum("or,r...->o...", p["right_up"], p["right_down"])
    rows = [torch.cat([entry * right for entry in row], 1) for row in left]
    return scale * torch.cat(rows).view(shape)


CASES = {
    "thin": (va.LoKr(rank=1, alpha=2), 2.0),
    "whole": (va.LoKr(rank=8, alpha=16), 1.0),
    "both": (va.LoKr(rank=1, alpha=3, factor=[2, 1], decompose_both=True), 3.0),
    "full": (va.LoKr(rank=1, alpha=3, full=True), 1.0),
    "tucker": (va.LoKr(rank=1, alpha=3, tucker=True), 3.0),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_formula(case, host):
    method, scale = CASES[case]
    found = place(host, method.clone())[1].scale
    whole = {"left", "right"} <= set(dict(place(host, method.clone())[1].named_parameters()))
    assert found == (1.0 if whole else scale)
    compare(host, method.clone(), lambda w, b, p: (w + lokr(p, w.shape, found), b))


def test_what_is_factored():
    def names(layer, **options):
        model = va.adapt(nn.Sequential(layer), va.LoKr(**options), "0")
        (adapter,) = va.adapters(model).values()
        return {n: tuple(p.shape) for n, p in adapter.named_parameters()}

    assert names(nn.Linear(768, 320)) == {"left": (16, 24), "right_up": (20, 8), "right_down": (8, 32)}
    assert names(nn.Linear(768, 320), rank=16) == {"left": (16, 24), "right": (20, 32)}
    assert names(nn.Linear(768, 320), full=True) == {"left": (16, 24), "right": (20, 32)}
    assert names(nn.Linear(768, 320), rank=4, decompose_both=True)["left_down"] == (4, 24)
    assert names(nn.Linear(768, 320), factor=4)["left"] == (4, 4)
    assert names(nn.Linear(768, 320), factor=[320, 1])["right_up"] == (1, 8)
    assert names(nn.Conv2d(12, 40, 3), rank=2) == {"left": (5, 3), "right_up": (8, 2), "right_down": (2, 4, 3, 3)}
    assert names(nn.Conv2d(12, 40, 3), rank=2, tucker=True)["right_core"] == (2, 2, 3, 3)
    assert "right_core" not in names(nn.Conv2d(12, 40, 1), rank=2, tucker=True)


def test_parameter_count():
    assert count(place("linear", va.LoKr(rank=2))[1]) == 2 * 1 + 5 * 2 + 2 * 7  # 7 is prime: 1 × 7
    assert count(place("conv", va.LoKr(rank=8))[1]) == 2 * 1 + 4 * 5 * 3 * 2


@pytest.mark.parametrize(
    ("size", "factor", "found"),
    [(128, -1, (8, 16)), (128, 4, (4, 32)), (127, -1, (1, 127)), (250, 8, (5, 50)), (360, 16, (15, 24)), (6, 6, (1, 6)),
     (36, -1, (6, 6)), (512, 16, (16, 32)), (10, 3, (2, 5))],
)  # fmt: skip
def test_splits(size, factor, found):
    assert split(size, factor) == found


def test_splits_are_those_of_lycoris():
    theirs = pytest.importorskip("lycoris.functional.general").factorization
    for size in (*range(1, 130), 320, 640, 768, 1280, 2304, 3072):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 24, 100):
            assert split(size, factor) == theirs(size, factor), (size, factor)


@pytest.mark.parametrize("host", ["linear", "tall", "conv"])
@pytest.mark.parametrize("case", CASES)
def test_is_a_lora(case, host):
    _, adapter, _ = place(host, CASES[case][0].clone())
    down, up = adapter.factors()
    close(torch.einsum("or,r...->o...", up, down), adapter.delta())


def test_rank_as_a_lora():
    _, adapter, _ = place("linear", va.LoKr(rank=2))
    assert len(adapter.factors()[0]) == 1 * 2  # one input block: the left factor has rank 1
    model = va.adapt(nn.Sequential(nn.Linear(96, 96)), va.LoKr(rank=2, decompose_both=True), "0")
    (adapter,) = va.adapters(model).values()
    assert len(adapter.factors()[0]) == 2 * 2


def test_only_the_input_is_kept():
    """What lies between the two factors is made again in backward."""
    model = va.adapt(nn.Sequential(nn.Linear(64, 48)), va.LoKr(rank=2), "0")
    (adapter,) = va.adapters(model).values()
    sizes = []
    x = torch.randn(100, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        adapter.side(x, Site(model[0]))
        model(x)  # the Linear and the update in one operation
    assert sum(sizes) <= 2 * (x.numel() + 3 * sum(p.numel() for p in adapter.parameters())) + model[0].weight.numel()


def test_sizes_that_do_not_divide_are_refused():
    for factor in ([3, 2], [2], [0, 7], 0):
        with pytest.raises(ValueError, match="factor="):
            va.adapt(nn.Sequential(nn.Linear(7, 10)), va.LoKr(factor=factor), "0")


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(24, 40), lambda: nn.Conv2d(24, 40, 3, padding=1)], ids=["linear", "conv"]
)
@pytest.mark.parametrize("case", CASES)
def test_equals_lycoris_forward_and_gradients(case, make):
    """The same options give tensors of the same shapes; with the same values the same function."""
    module = pytest.importorskip("lycoris.modules.lokr").LokrModule
    method = CASES[case][0].clone(**({} if case == "both" else {"rank": 2}))
    method = method.clone(factor=4, rank=1) if case == "both" else method
    torch.manual_seed(0)
    layer = make().requires_grad_(False)
    theirs = module(
        "x", layer, lora_dim=method.rank, alpha=method.alpha, factor=method.factor, use_tucker=method.tucker,
        decompose_both=method.decompose_both, full_matrix=method.full,
    )  # fmt: skip
    base = make()
    base.load_state_dict(layer.state_dict())
    model = va.adapt(nn.Sequential(base), method, "0")
    (adapter,) = va.adapters(model).values()
    names = {"left": "w1", "left_up": "w1_a", "left_down": "w1_b", "right": "w2", "right_up": "w2_a",
             "right_down": "w2_b", "right_core": "t2"}  # fmt: skip
    ours = {names[n]: p for n, p in adapter.named_parameters()}
    given = {n.removeprefix("lokr_"): p for n, p in theirs.named_parameters() if n.startswith("lokr_")}
    assert set(ours) == set(given)
    with torch.no_grad():
        for name, p in ours.items():
            turned = name == "w2_a" and "t2" in ours
            given[name].normal_(0.1, 0.3)
            p.copy_((given[name].t() if turned else given[name]).reshape(p.shape))
    x = torch.randn(3, 5, 24) if isinstance(base, nn.Linear) else torch.randn(2, 24, 6, 5)
    theirs.apply_to()
    want, found = layer(x), model(x)
    close(found, want, 1e-4)
    probe = torch.randn_like(want)
    ours_grads = torch.autograd.grad(found, list(ours.values()), probe)
    their_grads = torch.autograd.grad(want, [given[n] for n in ours], probe)
    for name, a, b in zip(ours, ours_grads, their_grads):
        close(a, (b.t() if name == "w2_a" and "t2" in ours else b).reshape(a.shape), 2e-3)
