"""What is measured: our methods, their peers and the literal forms, each as one `Case`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import visadapt as va
from benchmarks import literal
from benchmarks._hosts import Host, freeze, share

RANK = 8
METHODS = tuple(va.METHODS)
COMPARED = ("LoRA", "DoRA", "FLoRA", "WaRA", "LoHa", "LoKr", "SALT", "Hydra", "SSF")  # that have peers: the default
SALT_TOP = 0.75  # of the singular values are scaled and shifted, the rest get the low-rank block


class Unavailable(Exception):
    """This case cannot be run here; the message says why and becomes the row's note."""


@dataclass
class Case:
    """One model with adapters.

    Attributes:
        method: catalogue name, or ``frozen``.
        source: ``visadapt``, ``peft``, ``lycoris``, ``literal`` or ``frozen``.
        variant: what differs from the source's defaults: ``lean``, ``bypass``, ``compiled``, …
        model: what is called.
        trained: its adapter tensors.
        group: ours is compared with the peers of the same group (levels of a wavelet, compiled or not).
    """

    method: str
    source: str
    variant: str
    model: nn.Module
    trained: list[nn.Parameter] = field(default_factory=list)
    group: str = ""

    @property
    def label(self) -> str:
        """``LoRA/peft`` or ``LoRA/visadapt+lean``."""
        return f"{self.method}/{self.source}" + (f"+{self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Recipe:
    """How to build one case of a method, as a function of the host and a frozen model."""

    source: str
    variant: str
    build: Callable[[Host, nn.Module], nn.Module]
    group: str = ""


def wake(parameters: list[nn.Parameter], seed: int = 1) -> None:
    """Add a little noise, so that no factor is zero and the step is that of a run under way."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def make(method: str, recipe: Recipe, host: Host, base: nn.Module) -> Case:
    """Build one case on a copy of ``base`` that shares its frozen weights.

    Raises:
        Unavailable: the library is not installed, or has no such method for this host.
    """
    frozen = {id(p) for p in base.parameters()}
    model = recipe.build(host, freeze(share(base)))
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    wake(trained)
    return Case(method, recipe.source, recipe.variant, host.open(model), trained, recipe.group)


def ours(method: str, variant: str = "", lean: bool = False, group: str = "", **hparams: object) -> Recipe:
    """A method of ``visadapt.METHODS``."""

    def build(host: Host, model: nn.Module) -> nn.Module:
        arguments = {**our_hparams(method, host, model), **hparams}
        return va.adapt(model, va.METHODS[method](**arguments), list(host.targets), lean=lean)

    return Recipe("visadapt", variant, build, group)


def our_hparams(method: str, host: Host, model: nn.Module) -> dict[str, object]:
    """Hyper-parameters that give our method the peers' size (rank 8, scale 1); without peers its own."""
    if method == "SSF" or method not in COMPARED:
        return {}
    if method == "SALT":
        return {"rank": RANK, "top": salt_top(host, model)}
    if method == "FLoRA":
        return {"rank": RANK, "scale": 1.0}
    return {"rank": RANK}


def salt_top(host: Host, model: nn.Module) -> int:
    """Number of scaled singular values, the same for ours and the literal form."""
    widths = [min(m.weight.shape[0], math.prod(m.weight.shape[1:])) for m in host.layers(model).values()]
    return int(SALT_TOP * min(widths))


# Of these only PEFT's form is measured, at the size of our defaults; its coefficients and bases are drawn otherwise.
CATALOGUE: dict[str, tuple[str, dict[str, object]]] = {
    "MiSS": ("MissConfig", {"r": 64}),
    "VeRA": ("VeraConfig", {"r": 256}),
    "RandLoRA": ("RandLoraConfig", {"r": RANK}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 1000}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 2592}),
    "HRA": ("HRAConfig", {"r": RANK}),
    "OFT": ("OFTConfig", {"oft_block_size": 32}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 2}),
}


def peft(config: str, variant: str = "", cast: bool = True, **options: object) -> Recipe:
    """A PEFT configuration; ``cast`` is its default of fp32 adapters under a half-precision base."""

    def build(host: Host, model: nn.Module) -> nn.Module:
        if importlib.util.find_spec("peft") is None:
            raise Unavailable("peft is not installed (pip install visadapt[bench])")
        import peft as library

        dtype = next(model.parameters()).dtype
        configuration = getattr(library, config)(target_modules=host.pattern, **options)
        model = library.get_peft_model(model, configuration, autocast_adapter_dtype=cast).base_model.model
        if not cast:
            for name, parameter in model.named_parameters():
                if "default" in name:
                    parameter.data = parameter.data.to(dtype)
        return model

    return Recipe("peft", variant, build)


def lycoris(module: str, variant: str = "", **options: object) -> Recipe:
    """A LyCORIS module on each layer, outside its network class, as it applies them itself."""

    def build(host: Host, model: nn.Module) -> nn.Module:
        if importlib.util.find_spec("lycoris") is None:
            raise Unavailable("lycoris is not installed (pip install visadapt[bench])")
        from lycoris import modules

        kind = getattr(modules, module)
        added = nn.ModuleList()
        for name, layer in host.layers(model).items():
            adapter = kind(name.replace(".", "_"), layer, lora_dim=RANK, alpha=RANK, **options)
            adapter.to(layer.weight)
            adapter.apply_to()
            added.append(adapter)
        model.add_module("lycoris_adapters", _Aside(added) if isinstance(model, nn.Sequential) else added)
        return model

    return Recipe("lycoris", variant, build)


class _Aside(nn.Module):
    """Keeps modules registered in an nn.Sequential without a place in its chain."""

    def __init__(self, modules: nn.ModuleList) -> None:
        super().__init__()
        self.kept = modules

    def forward(self, x: Tensor) -> Tensor:
        return x


def dense(method: str, variant: str = "", group: str = "", **options: object) -> Recipe:
    """The literal form of a method (`benchmarks.literal`)."""

    def build(host: Host, model: nn.Module) -> nn.Module:
        arguments = dict(options)
        if method == "SALT":
            arguments["top"] = salt_top(host, model)
        for name, layer in host.layers(model).items():
            parent, _, child = name.rpartition(".")
            form = literal.FORMS[method](layer, **arguments)
            form.layer.requires_grad_(False)
            setattr(model.get_submodule(parent), child, form)
        return model

    return Recipe("literal", variant, build, group)


def recipes(method: str, host: Host, dtype: torch.dtype, peers: tuple[str, ...]) -> list[Recipe]:
    """Everything that is measured for one method on one host, ours first."""
    half = dtype != torch.float32
    conv, whole = host.suite == "conv", host.suite == "vit"
    found = [ours(method)]
    if whole and method in ("LoRA", "FLoRA", "WaRA", "LoHa", "DoRA"):
        found.append(ours(method, "lean", lean=True))
    if method == "LoRA":
        found += [peft("LoraConfig", r=RANK, lora_alpha=RANK), lycoris("LoConModule")]
        found.append(lycoris("LoConModule", "bypass", bypass_mode=True))
        if half:
            found.append(peft("LoraConfig", "half adapters", cast=False, r=RANK, lora_alpha=RANK))
    elif method == "DoRA":
        found.append(peft("LoraConfig", r=RANK, lora_alpha=RANK, use_dora=True))
        found.append(lycoris("LoConModule", weight_decompose=True))
        if half:
            found.append(peft("LoraConfig", "half adapters", cast=False, r=RANK, lora_alpha=RANK, use_dora=True))
    elif method == "LoHa":
        found += [peft("LoHaConfig", r=RANK, alpha=RANK), lycoris("LohaModule")]
    elif method == "LoKr":
        found += [peft("LoKrConfig", r=RANK, alpha=RANK), lycoris("LokrModule")]
        found.append(lycoris("LokrModule", "bypass", bypass_mode=True))
    elif method == "FLoRA":
        found.append(dense("FLoRA"))
        if conv:
            found.append(lycoris("LoConModule", "tucker", use_tucker=True))
    elif method == "WaRA":
        found.append(dense("WaRA"))
        if not whole:
            deep = {"variant": "3 levels", "group": "3 levels", "levels": 3}
            found += [ours("WaRA", **deep), dense("WaRA", **deep)]
    elif method in CATALOGUE:
        config, options = CATALOGUE[method]
        found.append(peft(config, **options))  # type: ignore[arg-type]
    elif method in literal.FORMS:
        found.append(dense(method))
        if method == "SALT":
            full = {"variant": "full relu", "group": "full relu", "relu": "full"}
            found += [ours("SALT", **full), dense("SALT", **full)]
    return [r for r in found if r.source == "visadapt" or r.source in peers]
