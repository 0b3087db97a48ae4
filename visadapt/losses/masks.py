"""Losses of masks; pixels with label 255 count nowhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
_SMOOTH = 1.0  # pixels added to both sides of Dice, so that it is finite where both are empty


def focal_dice(logits: Tensor, labels: Tensor, focal: float = 0.2, dice: float = 0.8, alpha: float = 0.25) -> Tensor:
    """L = focal · FL + dice · (1 − Dice), the loss of MapSAM (Xia et al. 2024, arXiv 2411.06971).

    FL = −α_t (1 − p_t)² log p_t, averaged over the pixels and the images (Lin et al. 2017, arXiv 1708.02002). Dice is a
    mean over the images that have foreground: an empty prediction for one without would be free, and where many are
    empty, training runs into predicting nothing anywhere, from which no gradient leads back. Such images train by FL
    alone, as they do in the released code, whose Dice (smoothed by 1e-6) is 1 for them and has no gradient.

    Args:
        logits: Of one mask per image (B, 1, H, W).
        labels: Label maps (B, H', W'); class 1 and above is foreground. They are reduced to H × W by the nearest
            pixel where sizes differ.
        focal: Weight of the focal loss.
        dice: Weight of the Dice loss.
        alpha: Weight of foreground in the focal loss, that of background is 1 − α.

    Returns:
        A 0-d tensor.
    """
    labels = nearest(labels, logits)[:, None]
    valid = (labels != IGNORE).to(logits.dtype)
    truth = (labels > 0).to(logits.dtype) * valid
    spread, overlap = focal_and_dice(logits, truth, valid, alpha)
    shows = (truth.sum((-2, -1)) > 0).to(overlap.dtype)
    return focal * spread.mean() + dice * (overlap * shows).sum() / shows.sum().clamp(min=1)


def focal_and_dice(logits: Tensor, truth: Tensor, valid: Tensor, alpha: float = 0.25) -> tuple[Tensor, Tensor]:
    """Focal loss, mean over the pixels, and Dice loss of each mask: two tensors (B, K).

    Args:
        logits: Masks (B, K, H, W).
        truth: Broadcasts to them, 0 or 1 or shares.
        valid: 1 where a pixel counts, else 0; broadcasts.
        alpha: Weight of foreground in the focal loss, that of background is 1 − α.
    """
    from torchvision.ops import sigmoid_focal_loss

    truth, valid = truth.expand_as(logits), valid.expand_as(logits)
    spread = sigmoid_focal_loss(logits, truth, alpha=alpha, gamma=2.0, reduction="none") * valid
    return spread.sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1), dice_loss(logits.sigmoid(), truth, valid)


def dice_loss(probabilities: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """1 − (2 Σ p t + 1) / (Σ p + Σ t + 1) of each mask (Milletari et al. 2016, arXiv 1606.04797).

    Args:
        probabilities: (…, H, W) in 0 … 1.
        truth: The same shape, 0 or 1 or shares.
        valid: 1 where a pixel counts, else 0; broadcasts.

    Returns:
        A tensor of the leading dimensions.
    """
    probabilities, truth = probabilities * valid, truth * valid
    both = (probabilities * truth).sum((-2, -1))
    either = probabilities.sum((-2, -1)) + truth.sum((-2, -1))
    return 1 - (2 * both + _SMOOTH) / (either + _SMOOTH)


def class_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, entropy: float = 0.2, dice: float = 0.8
) -> Tensor:
    """L = entropy · CE + dice · mean Dice loss over classes, as SAMed (Zhang & Liu 2023, arXiv 2304.13785).

    Args:
        logits: Of the classes (B, K, H, W).
        labels: Label maps (B, H', W'), reduced to H × W by the nearest pixel where sizes differ.
        weights: Of the classes (K,), in both terms.
        entropy: Weight of the cross-entropy.
        dice: Weight of the Dice loss.

    Returns:
        A 0-d tensor; 0 from a batch that is ignored as a whole.
    """
    labels = nearest(labels, logits)
    valid = (labels != IGNORE)[:, None].to(logits.dtype)
    each = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE, reduction="none")
    share = valid[:, 0] if weights is None else valid[:, 0] * weights[labels * (labels != IGNORE)]
    truth = F.one_hot(labels * (labels != IGNORE), logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)
    classes = dice_loss(logits.softmax(1), truth, valid).mean(0)
    overlap = classes.mean() if weights is None else (classes * weights).sum() / weights.sum()
    return entropy * each.sum() / share.sum().clamp(min=1e-6) + dice * overlap


def nearest(labels: Tensor, logits: Tensor) -> Tensor:
    """Label maps (B, H', W') at the resolution of logits (B, K, H, W): each cell takes the pixel at its centre."""
    if labels.shape[-2:] == logits.shape[-2:]:
        return labels
    small = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")
    return small[:, 0].to(labels.dtype)
