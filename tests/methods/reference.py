"""Dense float64 references, written from the formulas alone, and the comparison with an adapted layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visadapt as va

Dense = Callable[[Tensor, Tensor | None, dict[str, Tensor]], tuple[Tensor, Tensor | None]]

CONV = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 10),
    "tall": lambda: nn.Linear(9, 4, bias=False),
    "conv": lambda: nn.Conv2d(5, 8, (3, 2), **CONV),
}


def operate(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else F.conv2d(x, weight, bias, **CONV)


def place(host: str, method: va.Adapter, moved: bool = True) -> tuple[nn.Sequential, va.Adapter, Tensor]:
    """A float64 host with the method, its tensors drawn anew if `moved`, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(HOSTS[host]()).double()
    shape = (2, 3, model[0].in_features) if isinstance(model[0], nn.Linear) else (2, model[0].in_channels, 6, 7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    va.adapt(model, method, "0")
    (adapter,) = va.adapters(model).values()
    if moved:
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, mean=0.2, std=0.5)
    return model, adapter, x


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compare(host: str, method: va.Adapter, dense: Dense, autograd: bool = True) -> None:
    """Output, every gradient, and the merged weight and bias, against the dense formula."""
    model, adapter, x = place(host, method)
    layer, tensors = model[0], dict(adapter.named_parameters())
    weight, bias = dense(layer._parameters["weight"], layer._parameters["bias"], tensors)
    want, got = operate(layer, x, weight, bias), model(x)
    close(got, want)
    if autograd:
        probe = torch.randn_like(want)
        inputs = [x, *tensors.values()]
        grads = zip(torch.autograd.grad(got, inputs, probe), torch.autograd.grad(want, inputs, probe))
        for name, (a, b) in zip(["x", *tensors], grads):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), f"gradient of {name}"
    with va.merged(model):
        close(layer.weight, weight)
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            close(layer.bias, bias)


def count(adapter: va.Adapter) -> int:
    return sum(p.numel() for p in adapter.parameters())


# --- formulas --------------------------------------------------------------------------------
def product(up: Tensor, down: Tensor) -> Tensor:
    """B A for a down-projection with any number of dimensions."""
    return torch.einsum("or,r...->o...", up, down)


def dora(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor, scale: float, axis: str, detach: bool) -> Tensor:
    v = weight + scale * product(up, down)
    kept = 0 if axis == "out" else 1
    norm = v.square().sum([d for d in range(v.dim()) if d != kept], keepdim=True).sqrt()
    shape = [-1 if d == kept else 1 for d in range(v.dim())]
    return magnitude.view(shape) * v / (norm.detach() if detach else norm)


def flora(p: dict[str, Tensor], scale: float) -> Tensor:
    axes = [p[k] for k in sorted(p) if k.startswith("axes.")]
    if not axes:
        return scale * torch.einsum("ab,oa,ib->oi", p["core"], p["up"], p["inner"])
    return scale * torch.einsum("abcd,oa,ib,hc,wd->oihw", p["core"], p["up"], p["inner"], *axes)


def analysis(wavelet: str, n: int) -> Tensor:
    """The matrix of pywt.dwt in periodization mode, on n + 1 points for odd n (zero-padded)."""
    low, high = pywt.dwt(np.eye(n + n % 2), wavelet, mode="periodization", axis=0)
    return torch.tensor(np.concatenate([low, high]))


def synthesis2(blocks: Tensor, wavelet: str, out: int, in_: int) -> Tensor:
    """Tᵀ C T over the first two dimensions, cropped."""
    rows, columns = analysis(wavelet, out), analysis(wavelet, in_)
    return torch.einsum("po,pq...,qi->oi...", rows, blocks, columns)[:out, :in_]


def wara(p: dict[str, Tensor], shape: torch.Size, rank: int, wavelet: str, levels: int) -> Tensor:
    """The sub-band reading: blocks of coefficients from the deepest level outwards."""
    sizes = [tuple(shape[:2])]
    for _ in range(levels):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    deeper: Tensor | None = None
    for level in reversed(range(levels)):
        down, up = p[f"down.{level}"], p[f"up.{level}"]
        bands = [product(up[:, i : i + rank], down[i : i + rank]) for i in range(0, len(down), rank)]
        ll, lh, hl, hh = bands if deeper is None else (deeper, *bands)
        blocks = torch.cat([torch.cat([ll, lh], 1), torch.cat([hl, hh], 1)], 0)
        deeper = synthesis2(blocks, wavelet, *sizes[level])
    assert deeper is not None
    return deeper


def loha(p: dict[str, Tensor], scale: float) -> Tensor:
    return scale * product(p["up_a"], p["down_a"]) * product(p["up_b"], p["down_b"])


def salt(weight: Tensor, p: dict[str, Tensor], relu: str) -> Tensor:
    """U · Σ' · Vᵀ with Σ' written out, signs such that the largest entry of a column of U is positive."""
    u, sigma, vt = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    sign = torch.stack([column[column.abs().argmax()].sign() for column in u.t()])
    t, n = len(p["scale"]), len(sigma)
    top, rest = torch.diag(p["scale"] * sigma[:t] + p["shift"]), torch.diag(sigma[t:])
    if t < n:
        rest = rest + p["mix_left"] @ p["mix_right"]
    core = torch.block_diag(top.clamp_min(0), rest.clamp_min(0) if relu == "full" else rest)
    return ((u * sign) @ core @ (sign[:, None] * vt)).view_as(weight)


def hydra(weight: Tensor, bias: Tensor | None, p: dict[str, Tensor], s: float) -> tuple[Tensor, Tensor | None]:
    out = len(weight)
    zero = weight.new_zeros(out)
    new, b0 = weight, zero if bias is None else bias
    b = b0
    if "up" in p:
        new = new + s * product(p["up"], p["down"])
    if "seq_up" in p:
        lift = s * p["seq_up"] @ p["seq_down"]
        new, b = new + torch.einsum("po,o...->p...", lift, weight), b + lift @ b0
    for name in ("", "seq_"):
        if f"{name}up_bias" in p:
            b = b + s * (p[f"{name}up"] @ p[f"{name}down_bias"] + p[f"{name}up_bias"])
    return new, b if bias is not None or any("bias" in k for k in p) else None
