"""Steps of low-rank factors that do not depend on how the update is split between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank
from visadapt.core.model import adapters


@torch.no_grad()
def precondition(model: nn.Module, damping: float = 1e-6) -> int:
    """Precondition the gradients of all factor pairs, in place: between `backward` and the optimiser's step.

    With ΔW = up · down, up (out, r), down (r, in · kernel) and λ = `damping`:
        grad_up   ← grad_up · (down · downᵀ + λ I)⁻¹
        grad_down ← (upᵀ · up + λ I)⁻¹ · grad_down
    To first order a gradient step then changes ΔW by the same amount for (up R, R⁻¹ down) with any invertible R,
    exactly at λ = 0. Where parts of a factor are frozen (B4M) its whole is in the inverse, and the trained
    part of the gradient is preconditioned.

    Zhang & Pilanci 2024, arXiv 2402.02347, code: github.com/pilancilab/Riemannian_Preconditioned_LoRA, whose λ is
    the default; Break-for-Make (arXiv 2403.19456) trains its second stage so.

    Args:
        model: the adapted model, with gradients.
        damping: λ, for factors that do not have full rank (`up` is zero at start).

    Returns:
        The number of preconditioned gradients; adapters whose factors are not `down` and `up` themselves are
        left alone.
    """
    found: list[tuple[Tensor, Tensor, bool]] = []  # gradient, Gram matrix of the other factor, whether it is of `up`
    for adapter in adapters(model).values():
        trained = dict(adapter.named_parameters())
        if not isinstance(adapter, LowRank) or not trained or not trained.keys() <= {"up", "down"}:
            continue
        down, up = (t.detach().double() for t in adapter.factors())
        if any(p.shape[name == "up"] != len(down) for name, p in trained.items()):
            continue  # components of several tasks, or not all
        for name, gram in (("up", down.flatten(1) @ down.flatten(1).t()), ("down", up.t() @ up)):
            if name in trained and (gradient := trained[name].grad) is not None:
                found.append((gradient, gram, name == "up"))
    for size in {len(gram) for _, gram, _ in found}:
        same = [entry for entry in found if len(entry[1]) == size]
        grams = torch.stack([gram for _, gram, _ in same])
        inverses = torch.linalg.inv(grams + damping * torch.eye(size, dtype=grams.dtype, device=grams.device))
        for (gradient, _, of_up), inverse in zip(same, inverses):
            flat = gradient.double().flatten(1)
            gradient.copy_((flat @ inverse if of_up else inverse @ flat).view_as(gradient))
    return len(found)
