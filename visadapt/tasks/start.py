"""Training that goes on from an adapter file, ``model.start``: further steps, or the second stage of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from visadapt.backbones.sd_tokens import load_adapter
from visadapt.core.adapter import Adapter, WeightMap
from visadapt.core.model import adapters, label, remove
from visadapt.core.site import Site
from visadapt.core.state import read
from visadapt.interop import load
from visadapt.interop.read import is_lora_file

KEY = "model.start"
Sets = dict[str, dict[str, Adapter]]  # name of a set -> target -> its adapter


def load_file(model: nn.Module, path: str | Path, name: str | None = None) -> nn.Module:
    """``visadapt.load`` of a file of any tool, with the new words that a file of ours may bring.

    Args:
        model: The base.
        path: Adapter file or folder.
        name: Name of the set, for files with one set.

    Raises:
        FileNotFoundError, ValueError: As ``visadapt.load``.
    """
    path = Path(path)
    if hasattr(model, "tokenizer") and path.is_file() and not is_lora_file(path):
        found: nn.Module = load_adapter(model, path, name)
        return found
    return load(model, path, name=name)


class Start:
    """What an adapter file holds for the sets of a configuration.

    Reading it leaves in the model, which is the bare base, what the file has trained besides adapters (a head, new
    words); ``fill`` copies the rest, once the adapters of the configuration are there.

    Args:
        model: The base, before adaptation.
        path: File of visadapt or of any tool that ``visadapt import`` reads.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not fit the model.
    """

    def __init__(self, model: nn.Module, path: str | Path) -> None:
        import visadapt.methods  # noqa: F401 - a file names methods, their classes must be imported

        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{KEY}: there is no file '{path}'")
        words = getattr(model, "new_tokens", None)
        load_file(model, self.path)
        self.sets = _sets(model)
        self.trained = _trained(self.path)
        remove(model)
        model.requires_grad_(False)
        if getattr(model, "new_tokens", None) != words:  # a resumed run would not know them
            names = ", ".join(f"'{token.name}'" for token in model.new_tokens)  # type: ignore[union-attr]
            raise ValueError(f"{KEY}: '{path}' brings the new word {names}; name it in model.tokens, too")

    def fill(self, model: nn.Module) -> None:
        """Copy the tensors of each set into the set of that name; where both have one set only, names may differ.

        Raises:
            ValueError: A set, method, target, shape or scale differs, or tensors of the file do not train here.
        """
        here, parameters = _sets(model), dict(model.named_parameters())
        if frozen := [n for n in self.trained if n in parameters and not parameters[n].requires_grad]:
            raise ValueError(
                f"{KEY}: '{self.path}' also holds what was trained of '{frozen[0]}', which is frozen here; train it, "
                "too (model.train)"
            )
        if len(here) == len(self.sets) == 1:
            here = dict(zip(self.sets, here.values()))
        for name, theirs in self.sets.items():
            if name not in here:
                raise ValueError(
                    f"{KEY}: '{self.path}' holds the set '{name}', here there is {_listed(here) or 'none'}; name a set "
                    "of model.adapters so"
                )
            self._check_targets(name, set(theirs), set(here[name]))
            for target, adapter in theirs.items():
                self._copy(target, adapter, here[name][target], model)

    def _check_targets(self, name: str, theirs: set[str], ours: set[str]) -> None:
        for few, which in ((theirs - ours, "of the file, not of this configuration"), (ours - theirs, "here alone")):
            if few:
                raise ValueError(
                    f"{KEY}: the targets of the set '{name}' in '{self.path}' are others: {_listed(few)} "
                    f"{'is' if len(few) == 1 else 'are'} {which}; use the targets of the run that wrote it"
                )

    @torch.no_grad()
    def _copy(self, target: str, theirs: Adapter, ours: Adapter, model: nn.Module) -> None:
        where = f"{KEY}: '{target}' in '{self.path}'"
        if type(theirs) is not type(ours):
            raise ValueError(
                f"{where} is a {type(theirs).__name__}, here a {type(ours).__name__}; take that method, or "
                "`visadapt merge` the file and adapt the result"
            )
        given, held = theirs.state_dict(), ours.state_dict()
        if {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in held.items()}:
            raise ValueError(f"{where} has other shapes: {_difference(theirs, ours)}; use the file's")
        for key, tensor in given.items():
            held[key].copy_(tensor)
        site = Site(model.get_submodule(target.partition(":")[0].removesuffix(f".{ours.param}")), ours.param, ours.rows)
        if not _act_alike(theirs, ours, site):
            raise ValueError(f"{where} acts differently: {_difference(theirs, ours)}; use the file's")


def _act_alike(theirs: Adapter, ours: Adapter, site: Site) -> bool:
    """Whether equal tensors are equal updates: hyper-parameters of training (dropout, what learns) may differ."""
    if theirs.hparams() == ours.hparams():
        return True
    if not (isinstance(theirs, WeightMap) and isinstance(ours, WeightMap)):
        return False
    weight = site.weight.to(site.dtype)
    a, b = theirs.to(weight.device).new_weight(weight), ours.new_weight(weight)
    return torch.allclose(a - weight, b - weight, rtol=1e-4, atol=1e-7)


def _difference(theirs: Adapter, ours: Adapter) -> str:
    a, b = theirs.hparams(), ours.hparams()
    told = [f"{key}={a[key]!r} in the file, {b[key]!r} here" for key in a if a[key] != b[key]]
    return "; ".join(told) or "the layers have other sizes"


def _sets(model: nn.Module) -> Sets:
    found: Sets = {}
    for path, adapter in adapters(model).items():
        found.setdefault(adapter.name, {})[label(path, adapter)] = adapter
    return found


def _trained(path: Path) -> list[str]:
    """Names of what a file of visadapt holds besides adapters."""
    if path.is_dir() or is_lora_file(path):
        return []
    return [key.removeprefix("trained.") for key in read(path)[1] if key.startswith("trained.")]


def _listed(names: Any) -> str:
    known = sorted(names)
    return ", ".join(f"'{name}'" for name in known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
