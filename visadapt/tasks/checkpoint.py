"""What a checkpoint of an adapted model holds: what was trained, and nothing of the frozen base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from visadapt.core.model import is_adapter_key


def trained_names(module: nn.Module) -> set[str]:
    """Keys of ``module.state_dict()`` that training changes or that the base file does not have.

    Trainable parameters; everything an adapter keeps (also its frozen tensors: they are random, the base does
    not hold them); and the buffers of layers with trainable parameters of their own, such as BatchNorm
    statistics.
    """
    trainable = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    names = set()
    for name in module.state_dict(keep_vars=True):
        if name in trainable or is_adapter_key(name):
            names.add(name)
        elif not _is_parameter(module, name):
            owner = module.get_submodule(name.rpartition(".")[0])
            if any(p.requires_grad for p in owner.parameters(recurse=False)):
                names.add(name)
    return names


def _is_parameter(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in module.get_submodule(owner)._parameters


def trained_state(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Any]:
    """The entries of ``names``; views are copied, or torch would save the whole storage behind them."""
    return {name: _own(state[name]) for name in sorted(names) if name in state}


def _own(value: Any) -> Any:
    if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
        value = value.detach()
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    return value


def check_names(expected: set[str], found: set[str], where: str) -> None:
    """Compare the tensors that the configuration trains with those of a checkpoint.

    Raises:
        ValueError: they differ; names the first few and what to do.
    """
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} trained tensors ({_few(missing)})")
    if unexpected:
        parts.append(f"it has {len(unexpected)} that this configuration does not train ({_few(unexpected)})")
    raise ValueError(
        f"{where} does not fit this configuration: {' and '.join(parts)}. "
        "Use the config.yaml of the run that wrote it, or the same adapters, targets and head."
    )


def check_shapes(module: nn.Module, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Compare shapes before torch does, with one message instead of one line per tensor.

    Raises:
        ValueError: a tensor has another shape here (another rank, another number of classes).
    """
    here = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    wrong = [
        f"{name}: {tuple(shape)} in the file, {here[name]} here"
        for name, shape in shapes.items()
        if name in here and here[name] != tuple(shape)
    ]
    if wrong:
        raise ValueError(f"{where} does not fit this configuration: {_few(wrong)}. Other rank or class count?")


def check_base(saved: Mapping[str, Any] | None, here: Mapping[str, Any], where: str) -> None:
    """Compare the identity of the frozen base that a checkpoint was trained on with the one at hand.

    Raises:
        ValueError: the base weights are others.
    """
    if saved is not None and saved.get("sha256") != here.get("sha256"):
        raise ValueError(
            f"{where} was trained on another base ({saved.get('name')}, {str(saved.get('sha256'))[:12]}; "
            f"here {here.get('name')}, {str(here.get('sha256'))[:12]}). Give the same backbone and weights."
        )


def _few(names: list[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f", … and {more} more" if more > 0 else "")
