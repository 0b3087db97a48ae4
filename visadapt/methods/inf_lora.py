"""InfLoRA: each task learns in the input directions that earlier tasks do not use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.site import Site
from visadapt.core.stack import TaskStack
from visadapt.maths.directions import NOISE, beside, missing


class InfLoRA(TaskStack):
    """ΔW = Σ_k<t B_k A_k + B A,  A Aᵀ = I/3 frozen, its rows the main inputs of the task off those of the earlier ones.

    Before a task, A becomes the first `rank` eigenvectors of P H Hᵀ P (over √3, as in the released code), with H the
    task's inputs to the layer and P = I − M Mᵀ; only B trains. After it, M gains the fewest eigenvectors of P H Hᵀ P,
    with H as it is now, that make it hold a share of ‖H‖² (gradient projection memory). So an update does not change
    what the layer does with inputs that M spans. Rows of A are zero where P H has no energy left. Without a sequence
    that tells it inputs, A stays random.

    Liang & Li 2024 (CVPR), arXiv 2404.00228, code: github.com/liangyanshuo/InfLoRA. Its DualGPM stores M or its
    complement, whichever is smaller; here it is always M Mᵀ. Its shares are of the sum of the squared eigenvalues of
    H Hᵀ, here of the eigenvalues, which keeps more directions; before task t of T they have gone the part t / T of the
    way from `first` to `last`, here t / (T − 1).

    Args:
        rank: inner dimension of each task's update.
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
        first: share of the inputs' energy that is kept free after the first task.
        last: after the last one; in between it rises evenly.
    """

    training_state = ("memory",)

    first: float = 0.95
    last: float = 1.0

    def refuse(self, layer: Site) -> str | None:
        """Inputs are vectors."""
        if not isinstance(layer.layer, nn.Linear):
            return "its directions are those of input vectors, which convolutions do not have; use Linear layers"
        return None

    def build(self, layer: Site) -> None:
        """Create B, A and the memory."""
        super().build(layer)
        frozen = self.down.data
        del self.down
        self.register_buffer("down", frozen)
        self.memory: Tensor
        self.register_buffer("memory", frozen.new_zeros(frozen.shape[1], frozen.shape[1]))

    def begin_task(self, gram: Tensor) -> None:
        """The directions of the task."""
        values, vectors = (found.flip(-1)[..., : self.rank] for found in torch.linalg.eigh(beside(gram, self.memory)))
        found = vectors * (values > NOISE * gram.trace())  # others are arbitrary, and may lie in the memory
        self.down.zero_()
        self.down[: found.shape[1]] = found.t() / 3**0.5

    def end_task(self, gram: Tensor) -> None:
        """Keep what the task uses free of later ones."""
        share = self.first + (self.last - self.first) * self.done / max(1, self.tasks - 1)
        kept = missing(gram, self.memory, share)
        self.memory += (kept @ kept.t()).to(self.memory)
