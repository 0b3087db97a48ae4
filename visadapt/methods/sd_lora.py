"""SD-LoRA: scalable decoupled low-rank adaptation, for sequences of tasks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import ones
from visadapt.core.site import Site
from visadapt.core.stack import TaskStack
from visadapt.maths.low_rank import inner, norm


class SDLoRA(TaskStack):
    """ΔW = Σ_k<t α_k D_k + α_t B A: directions D_k of finished tasks are frozen, the magnitudes α_1 … α_t train.

    B, A start as LoRA's in every task. When one ends, B A becomes D_t and α_t goes on, so that the function is the
    same before and after. The released code divides D_t by ‖B‖·‖A‖ and starts all α anew, so that the function jumps.

    Wu, Piao, Huang et al. 2025, arXiv 2501.13198, code: github.com/WuYichen-97/SD-Lora-CL. The paper's variants:
    `ranks` (SD-LoRA-RR), `threshold` (SD-LoRA-KD, which the code does not have).

    Args:
        rank: inner dimension of each direction.
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
        magnitudes: one α per task for all layers of the set, or for each layer its own (directions are then unit ones).
        directions: "exact", or as the released code does.
        start: α of a task that begins (the released code has 0.8).
        ranks: rank of each task, the last for all that follow; none above `rank`.
        threshold: residual up to which a new direction is expressed by the earlier ones and not kept.
        residual: what `threshold` bounds: ‖D_t − Σ c_k D_k‖² of unit directions, or its root mean square per element.
    """

    no_decay = ("magnitude",)

    magnitudes: Literal["shared", "layer"] = "shared"
    directions: Literal["exact", "released"] = "exact"
    start: float = 1.0
    ranks: list[int] | None = None
    threshold: float | None = None
    residual: Literal["relative", "rmse"] = "relative"

    def build(self, layer: Site) -> None:
        """Create B, A, the magnitudes, and what absorbed directions add to them in this layer."""
        if self.ranks is not None and not all(0 < r <= self.rank for r in self.ranks or [0]):
            raise ValueError(f"SDLoRA: ranks={self.ranks} must be numbers from 1 to rank={self.rank}")
        if self.threshold is not None and self.directions == "released":
            raise ValueError("SDLoRA: the released code has no `threshold`; use directions: exact")
        super().build(layer)

        def make() -> nn.Parameter:
            return nn.Parameter(self.start * ones(layer, self.tasks).data)

        self.magnitude: nn.Parameter = self.share("magnitude", make) if self.magnitudes == "shared" else make()
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros_like(self.magnitude))

    def rank_of(self, task: int) -> int:
        """Rank that a task trains."""
        return self.rank if self.ranks is None else self.ranks[min(task, len(self.ranks) - 1)]

    def direction(self, task: int) -> tuple[Tensor, Tensor]:
        """A (r, in, *kernel) and B (out, r) of a task, without its magnitude."""
        r = self.rank_of(task)
        down, up = super().pair(task)
        return down[:r], up[:, :r]

    def pair(self, task: int) -> tuple[Tensor, Tensor]:
        """A and (α + what this layer adds)·B."""
        down, up = self.direction(task)
        return down, up * (self.magnitude[task] + self.offset[task])

    def store(self, down: Tensor, up: Tensor) -> None:
        """Freeze the direction of the task that ends, or express it by the earlier ones."""
        down, up = self.direction(self.done)
        if self.threshold is not None and self.done and self._absorb(down, up):
            return
        gain = self.magnitude.data
        if self.directions == "released":
            up = up / (up.norm() * down.norm()).clamp_min(1e-12)
        elif self.magnitudes == "layer":
            size = norm(down, up).clamp_min(1e-12)
            up = up / size
            gain[self.done] *= size
        super().store(down, up)

    def next_task(self) -> None:
        """As every stack; the released code also starts all magnitudes anew."""
        super().next_task()
        if self.directions == "released":
            self.magnitude.data.fill_(self.start)

    def _absorb(self, down: Tensor, up: Tensor) -> bool:
        """Least squares by Gram matrices; where the residual is small, add the coefficients to this layer's gains."""
        past = [self.direction(k) for k in range(self.done)]
        size = torch.stack([norm(*pair) for pair in past] + [norm(down, up)])
        kept = [k for k in range(self.done) if size[k] > 0]
        if not kept or size[-1] == 0:
            return bool(size[-1] == 0)
        gram = torch.stack([torch.stack([inner(*past[i], *past[j]) / (size[i] * size[j]) for j in kept]) for i in kept])
        right = torch.stack([inner(*past[k], down, up) / (size[k] * size[-1]) for k in kept])
        found = torch.linalg.lstsq(gram.double(), right[:, None].double()).solution[:, 0]
        left = (1 - found @ right.double()).clamp_min(0)
        values = up.shape[0] * down[0].numel()
        if (left if self.residual == "relative" else (left / values).sqrt()) > self.threshold:
            return False
        self.offset[kept] += (self.magnitude.data[self.done] * size[-1] * found / size[kept]).to(self.offset.dtype)
        return True
