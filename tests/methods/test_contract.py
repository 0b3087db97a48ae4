"""The grid: every method of the catalogue on every layer kind, property by property."""

from __future__ import annotations

import pytest

import visadapt as va
from visadapt.core.check import HOSTS, PROPERTIES, check

# Hyper-parameters that change the mathematics get rows of their own.
PROTOTYPES = {
    **{name: cls() for name, cls in va.METHODS.items()},
    "LoRA rsLoRA": va.LoRA(rank=3, alpha=5, rslora=True),
    "LoRA-FA": va.LoRA(rank=3, freeze_down=True),
    "DoRA in": va.DoRA(axis="in"),
    "DoRA full gradient": va.DoRA(rank=3, alpha=6, detach_norm=False),
    "FLoRA rank 2": va.FLoRA(rank=2, kernel_rank=3, scale=0.5),
    "WaRA full": va.WaRA(mode="full"),
    "WaRA shared": va.WaRA(mode="shared"),
    "WaRA activation": va.WaRA(mode="activation"),
    "WaRA db3 2 levels": va.WaRA(wavelet="db3", levels=2),
    "LoHa rank 2": va.LoHa(rank=2, alpha=3),
    "LoKr rank 1": va.LoKr(rank=1, alpha=3),
    "LoKr both, Tucker": va.LoKr(rank=1, alpha=2, decompose_both=True, tucker=True),
    "LoKr full": va.LoKr(factor=2, full=True),
    "SALT half and penalty": va.SALT(top=0.5, rank=2, regularizer=0.001),
    "B4M 0.3": va.B4M(rank=3, split=0.3),
    "B4M content": va.B4M(rank=4, learns="content"),
    "B4M style": va.B4M(rank=3, learns="style"),
    "Hydra sequential": va.Hydra(rank=0, sequential_rank=2, bias=False),
    "GLoRA low rank": va.GLoRA(rank=2, gain="lora"),
    "GLoRA scalars": va.GLoRA(gain="scalar", update="vector", prompt="none", bias_gain="scalar", shift="scalar"),
    "LoCA phases": va.LoCA(count=8, moving=12, value_steps=2, place_steps=2),
    "Bottleneck parallel": va.Bottleneck(place="parallel", activation="gelu", scale=0.5),
    "Compacter inner": va.Compacter(rank=6, inner=2),
    "FourierFT 20": va.FourierFT(count=20),
    "WaveFT 20, db2": va.WaveFT(count=20, wavelet="db2"),
    "DVLoRA one phase": va.DVLoRA(rank=2, warmup=None, start="uniform"),
    "LoLDU rank 2": va.LoLDU(rank=2),
    "LoRASB scaled": va.LoRASB(rank=2, alpha=4, step=1e-3),
    "DyLoRA use 2": va.DyLoRA(rank=3, use=2, last_only=True),
    "ALLoRA step": va.ALLoRA(scales="step", eta=2.0),
    "PRILoRA at each step": va.PRILoRA(rank=3, interval=1),
    "PRILoRA, ranks alone": va.PRILoRA(rank=2, alpha=1, prune=0),
    "RACLoRA down": va.RACLoRA(alpha=3, sampled="down"),
    "IA3 in": va.IA3(axis="in"),
    "RandLoRA rank 2, sparse": va.RandLoRA(rank=2, bases="sparse"),
    "MiSS rank 2": va.MiSS(rank=2),
    "StructuredLoRA from the weight": va.StructuredLoRA(rank=2, start="weight"),
    "StructuredLoRA intermediate": va.StructuredLoRA(rank=2, start="intermediate"),
    "PiSSA scaled": va.PiSSA(rank=2, alpha=1),
    "PRoLoRA shared": va.PRoLoRA(unshared=0, chunks=2),
    "HRA orthogonal": va.HRA(rank=2, orthogonality=0.01),
}

# What cannot work, and the words by which the refusal explains itself.
REFUSED = {
    ("B4M style", "depthwise", "*"): "no effect here",
    **{("GLoRA", host, "*"): "changes outputs" for host in ("Linear weight view", "MultiheadAttention")},
    ("Bottleneck parallel", "groups", "*"): "grouped convolution",
    ("Bottleneck parallel", "depthwise", "*"): "grouped convolution",
    **{
        (method, host, "*"): "changes outputs"
        for method in ("Bottleneck", "Compacter", "NICE")
        for host in ("Linear weight view", "MultiheadAttention")
    },
    **{
        (method, "", prop): "not affine"  # every layer kind
        for method in ("Bottleneck", "Compacter", "NICE")
        for prop in ("merge", "several adapters")
    },
    ("IA3 in", "groups", "*"): "no common gain",
    ("IA3 in", "depthwise", "*"): "no common gain",
    ("DoRA in", "groups", "*"): "no meaning on a grouped convolution",
    ("DoRA in", "depthwise", "*"): "no meaning on a grouped convolution",
    **{
        ("Hydra", host, prop): "mixes channels across the groups"
        for host in ("groups", "depthwise")
        for prop in ("merge", "several adapters")  # the latter merges too
    },
    **{
        (method, host, "*"): "inputs are not seen"
        for method in ("PRILoRA at each step", "PRILoRA/")  # "/": the name alone
        for host in ("Linear weight view", "MultiheadAttention")
    },
    **{
        (method, host, "*"): "changes outputs"
        for method in ("Hydra", "SSF")
        for host in ("Linear weight view", "MultiheadAttention")
    },
    **{
        (method, host, "*"): "use Linear layers" for method in ("InfLoRA", "DualLoRA") for host in ("Conv", "Multihead")
    },
    ("DualLoRA", "Linear weight view", "*"): "changes outputs",
    **{("DualLoRA", "Linear", prop): "is not affine" for prop in ("merge", "several adapters")},
}


def expected_refusal(method: str, host: str, prop: str) -> str | None:
    for (m, h, p), words in REFUSED.items():
        if f"{method}/".startswith(m) and h in host and p in ("*", prop):
            return words
    return None


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", PROTOTYPES)
def test_contract(method: str, host: str) -> None:
    for prop in PROPERTIES:
        cell = check(PROTOTYPES[method], host, prop)
        words = expected_refusal(method, host, prop)
        if words is None:
            assert cell.status == "pass", f"{prop}: {cell.message}"
        else:
            assert cell.status == "refuse", f"{prop}: should refuse, but {cell.status}"
            assert words in cell.message


@pytest.mark.parametrize("prop", ["fast form", "merge", "gradients and groups", "base restored", "identity at start"])
def test_the_grid_catches_a_broken_method(prop: str) -> None:
    assert check(Broken(fault=prop), "Linear", prop).status == "fail"


class Broken(va.LoRA):
    """A LoRA with one fault at a time, to show that the grid can fail."""

    fault: str = ""

    def build(self, layer):
        super().build(layer)
        if self.fault == "identity at start":
            self.up.data.fill_(0.1)
        if self.fault == "gradients and groups":
            self.unused = va.core.adapter.zeros(layer, 2)
        if self.fault == "base restored":
            layer.layer._parameters["weight"].add_(1.0)

    def side(self, x, layer):
        return 2 * super().side(x, layer)

    @property
    def fusable(self):
        return self.fault not in ("fast form", "merge")
