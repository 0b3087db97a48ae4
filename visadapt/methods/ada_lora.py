"""AdaLoRA: singular values share a budget of ranks over all layers of a set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Moments, normal, zeros
from visadapt.core.gated import Gated
from visadapt.core.site import Site


class AdaLoRA(Gated):
    """ΔW = s · P diag(λ) Q,  s = alpha / rank: of all λ of the set only the b(t) most important stay, the others are 0.

    P (out, rank), Q (rank, in, *kernel) ~ N(0, 0.02²) and λ (rank,) zero at start. Loss + orthogonality · (‖PᵀP − I‖² +
    ‖Q Qᵀ − I‖²). Importance of an entry w is Ī Ū: means over steps of I = |w ∂L/∂w| and of |I − Ī|; of a component,
    that of its λ plus the mean over its column of P and over its row of Q. The budget b(t) stays at the sum of `rank`
    during `warmup`, falls with the cube of what is left of the way, and is at the share `keep` of it once `cooldown`
    begins; then importances stay as they are. A λ at zero may come back as long as the budget moves.

    Zhang et al. 2023, arXiv 2303.10512, code: github.com/QingruZhang/AdaLoRA (19e47de). The code takes the mean over
    matrices of norms that are not squared, and multiplies gradients with the weights after the step.

    Args:
        rank: components of each layer to start from.
        alpha: numerator of the scale; None means `rank`.
        keep: share of the components of all layers that stay in the end; the paper halves them or takes 12 to 8.
        orthogonality: weight of the penalty, summed over the layers.
        warmup: share of the steps in which all components stay.
        cooldown: share of the steps at the end with the final budget.
        interval: steps between two decisions while the budget falls.
        smoothing: β₁ = β₂ of the two means.
    """

    no_decay = ("gain",)
    training_state = ("mean_down", "mean_up", "mean_gain", "spread_down", "spread_up", "spread_gain")

    rank: int = 12
    keep: float = 2 / 3
    orthogonality: float = 0.1
    warmup: float = 0.1
    cooldown: float = 0.5
    interval: int = 10
    smoothing: float = 0.85

    def build(self, layer: Site) -> None:
        """Create P, Q and λ, and room for the importances."""
        self.down = normal(layer, self.rank, *layer.in_shape, std=0.02)
        self.up = normal(layer, layer.width, self.rank, std=0.02)
        self.gain: nn.Parameter = zeros(layer, self.rank)
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"mean_{name}", torch.zeros_like(parameter.data))
            self.register_buffer(f"spread_{name}", torch.zeros_like(parameter.data))
        self.budget: tuple[float, bool] | None = None

    def refuse(self, layer: Site) -> str | None:
        """A budget that leaves nothing, or that grows."""
        return None if 0 < self.keep <= 1 else f"keep={self.keep}: a share above 0, up to 1"

    def gates(self) -> Tensor:
        """The values λ."""
        return self.gain

    def penalty(self) -> Tensor | None:
        """Orthogonality · (‖PᵀP − I‖² + ‖Q Qᵀ − I‖²), from products of the size rank × rank."""
        if self.orthogonality == 0:
            return None
        grams = (self.up.t() @ self.up, self.down.flatten(1) @ self.down.flatten(1).t())
        eye = torch.eye(self.rank, dtype=self.up.dtype, device=self.up.device)
        return self.orthogonality * torch.stack([(gram - eye).square().sum() for gram in grams]).sum()

    def before_step(self, step: int, total: int | None) -> None:
        """Where the budget stands after this step: the share of the way that is left, and whether to cut.

        Raises:
            ValueError: the number of steps is not known.
        """
        if total is None:
            raise ValueError("AdaLoRA: its budget needs an end; set trainer.max_epochs or trainer.max_steps")
        begin, end, done = round(self.warmup * total), total - round(self.cooldown * total), step + 1
        left = 1 - (done - begin) / max(1, end - begin)
        self.learning = done < end
        self.budget = (min(1.0, max(0.0, left)) ** 3, done > begin and (done % self.interval == 0 or done >= end))

    @torch.no_grad()
    def after_backward(self) -> None:
        """Means of the sensitivities and of their deviations."""
        if self.budget is None or not self.learning:
            return
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                now = (parameter * parameter.grad).abs().nan_to_num(0.0, posinf=0.0)  # a step that AMP skips
                mean = self.get_buffer(f"mean_{name}")
                mean.lerp_(now, 1 - self.smoothing)
                self.get_buffer(f"spread_{name}").lerp_((now - mean).abs(), 1 - self.smoothing)

    def importance(self) -> Tensor:
        """One number for each component."""
        p, q, gain = (self.get_buffer(f"mean_{n}") * self.get_buffer(f"spread_{n}") for n in ("up", "down", "gain"))
        return gain + p.mean(0) + q.flatten(1).mean(1)

    @classmethod
    @torch.no_grad()
    def after_step_together(cls, members: Sequence[Any], moments: Moments) -> None:
        """Set to zero what is not among the most important components of all layers."""
        if members[0].budget is None or not members[0].budget[1]:
            return
        full, aim = sum(m.rank for m in members), sum(m.rank * m.keep for m in members)
        kept = round(aim + (full - aim) * members[0].budget[0])
        order = torch.cat([m.importance() for m in members]).argsort(descending=True, stable=True)
        stays = torch.zeros(full, dtype=torch.bool, device=order.device)
        stays[order[:kept]] = True
        for member, mask in zip(members, stays.split([m.rank for m in members])):
            member.gain.mul_(mask)
