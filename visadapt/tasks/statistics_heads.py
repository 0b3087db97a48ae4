"""Classifiers that are computed from sums over the features, one class after the other, without a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MeansHead(nn.Module):
    """The nearest class mean: scores cos(f, μ_c) of features f (B, d).

    Mensink et al. 2013, TPAMI; Zhou et al. 2023, arXiv:2303.07338, show how far it goes on pre-trained features.

    Args:
        features: Width d.
        classes: Number of classes.
    """

    total: Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(classes, features))

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add features (B, d) of classes (B,). A mean's length has no effect on the cosine, so sums do."""
        self.total.index_add_(0, target, features.to(self.total))

    def fit(self) -> None:
        """Nothing is left to compute."""

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, classes)."""
        return F.linear(F.normalize(features, dim=-1), F.normalize(self.total, dim=-1).to(features.dtype))


class RandomProjectionHead(nn.Module):
    """RanPAC: ridge regression of the classes on h = relu(f R), R (d, M) random and fixed.

    W = (G + λ I)⁻¹ C with G = Σ hᵀh and C = Σ hᵀy. λ is the power of ten that is best on every fifth sample, with W
    from the others; both errors follow from sums, so no sample is kept.

    McDonnell, Gong, Parvaneh, Abbasnejad & van den Hengel 2023, arXiv:2307.02251, code: github.com/RanPAC/RanPAC.

    Args:
        features: Width d.
        classes: Number of classes.
        width: M; the paper takes 10,000.
        seed: Source of R.
    """

    gram: Tensor
    cross: Tensor
    seen: Tensor
    weight: Tensor
    projection: Tensor

    def __init__(self, features: int, classes: int, width: int = 2000, seed: int = 0) -> None:
        super().__init__()
        fixed = torch.randn(features, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("projection", fixed, persistent=False)
        for name, shape in (("gram", (2, width, width)), ("cross", (2, width, classes)), ("seen", (2,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(classes, width))

    def _hidden(self, features: Tensor) -> Tensor:
        return (features.to(self.projection) @ self.projection).relu()

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add features (B, d) of classes (B,)."""
        hidden = self._hidden(features).double()
        wanted = F.one_hot(target, len(self.weight)).double()
        held = (torch.arange(len(target), device=target.device) + int(self.seen.sum())) % 5 == 4
        for part, mine in enumerate((~held, held)):
            self.gram[part] += hidden[mine].t() @ hidden[mine]
            self.cross[part] += hidden[mine].t() @ wanted[mine]
            self.seen[part] += mine.sum()

    def fit(self) -> None:
        """Choose λ and compute W."""
        rates = 10.0 ** torch.arange(-4.0, 9.0, dtype=torch.float64)
        errors = torch.stack([self._error(self._solve(self.gram[0], self.cross[0], rate)) for rate in rates])
        found = self._solve(self.gram.sum(0), self.cross.sum(0), rates[errors.argmin()])
        self.weight.copy_(found.t())

    def _solve(self, gram: Tensor, cross: Tensor, rate: Tensor) -> Tensor:
        return torch.linalg.solve(gram + rate * torch.eye(len(gram), device=gram.device, dtype=gram.dtype), cross)

    def _error(self, weight: Tensor) -> Tensor:
        """Σ‖h W − y‖² over the held samples, less what does not depend on W."""
        return (weight * (self.gram[1] @ weight)).sum() - 2 * (weight * self.cross[1]).sum()

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, classes)."""
        return F.linear(self._hidden(features), self.weight).to(features.dtype)
