"""Losses of masks against references that go pixel by pixel, and what must not break them."""

import math

import pytest
import torch
from torch import Tensor

from visadapt.losses.masks import class_loss, dice_loss, focal_and_dice, focal_dice, nearest


def sample(classes=1, side=6, batch=3, seed=0):
    """Logits in float64 and label maps with ignored pixels; the last image has no foreground."""
    torch.manual_seed(seed)
    logits = torch.randn(batch, classes, side, side, dtype=torch.float64) * 3
    labels = torch.randint(0, max(classes, 2), (batch, side, side))
    labels[-1] = 0
    labels[:, 1, 2:4] = 255
    return logits.requires_grad_(), labels


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def reference_focal_dice(logits, labels, focal, dice, alpha):
    spread, overlaps = 0.0, []
    for image, truth in zip(logits[:, 0].tolist(), labels.tolist(), strict=True):
        focals, both, sizes, shows = [], 0.0, 0.0, False
        for z, t in ((z, t) for row in zip(image, truth, strict=True) for z, t in zip(*row, strict=True)):
            if t == 255:
                continue
            p, weight = (sigmoid(z), alpha) if t else (1 - sigmoid(z), 1 - alpha)
            focals.append(-weight * (1 - p) ** 2 * math.log(p))
            both += sigmoid(z) * (t > 0)
            sizes += sigmoid(z) + (t > 0)
            shows |= t > 0
        spread += sum(focals) / len(focals) / len(logits)
        overlaps += [1 - (2 * both + 1) / (sizes + 1)] if shows else []
    return focal * spread + dice * sum(overlaps) / max(1, len(overlaps))


def reference_class_loss(logits, labels, weights, entropy, dice):
    batch, classes, height, width = logits.shape
    shares = logits.detach().softmax(1)
    error = mass = 0.0
    overlap = [0.0] * classes
    for b in range(batch):
        both, sizes = [0.0] * classes, [0.0] * classes
        for y in range(height):
            for x in range(width):
                t = int(labels[b, y, x])
                if t == 255:
                    continue
                error -= weights[t] * math.log(float(shares[b, t, y, x]))
                mass += weights[t]
                for c in range(classes):
                    p = float(shares[b, c, y, x])
                    both[c] += p * (t == c)
                    sizes[c] += p + (t == c)
        for c in range(classes):
            overlap[c] += (1 - (2 * both[c] + 1) / (sizes[c] + 1)) / batch
    mean = sum(w * o for w, o in zip(weights, overlap, strict=True)) / sum(weights)
    return entropy * error / mass + dice * mean


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_focal_and_dice_are_the_sums_over_pixels(alpha):
    logits, labels = sample()
    found = focal_dice(logits, labels, 0.3, 0.6, alpha)
    assert found.item() == pytest.approx(reference_focal_dice(logits, labels, 0.3, 0.6, alpha), rel=1e-12)


def test_mapsams_weights_are_the_default():
    logits, labels = sample()
    assert focal_dice(logits, labels).item() == pytest.approx(reference_focal_dice(logits, labels, 0.2, 0.8, 0.25))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_loss_is_the_sum_over_pixels_and_classes(classes, weighted):
    logits, labels = sample(classes)
    weights = torch.arange(1, classes + 1, dtype=torch.float64) if weighted else None
    values = [1.0] * classes if weights is None else weights.tolist()
    expected = reference_class_loss(logits, labels, values, 0.2, 0.8)
    assert class_loss(logits, labels, weights).item() == pytest.approx(expected, rel=1e-9)
    only_dice = reference_class_loss(logits, labels, values, 0.0, 1.0)
    assert class_loss(logits, labels, weights, 0.0, 1.0).item() == pytest.approx(only_dice, rel=1e-9)


def test_a_class_of_weight_zero_does_not_count():
    logits, labels = sample(3)
    weights = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    swapped = labels.clone()
    swapped[labels == 2] = 255  # its Dice term has no weight, and its pixels none in the cross-entropy
    entropy = class_loss(logits, labels, weights, 1.0, 0.0)
    assert entropy.item() == pytest.approx(class_loss(logits, swapped, None, 1.0, 0.0).item())


def test_masks_of_several_kinds_are_scored_one_by_one():
    logits, labels = sample(3)
    truth, valid = (labels == 1).double()[:, None], (labels != 255).double()[:, None]
    focal, dice = focal_and_dice(logits, truth, valid)
    assert focal.shape == dice.shape == (3, 3)
    for k in range(3):
        alone = focal_and_dice(logits[:, k : k + 1], truth, valid)
        assert torch.allclose(focal[:, k], alone[0][:, 0])
        assert torch.allclose(dice[:, k], alone[1][:, 0])


@pytest.mark.parametrize("kind", ["empty", "full", "ignored", "mixed"])
@pytest.mark.parametrize("scale", [1.0, 90.0])
def test_losses_and_gradients_are_finite(kind, scale):
    labels = torch.full((2, 8, 8), {"empty": 0, "full": 1, "ignored": 255, "mixed": 0}[kind])
    if kind == "mixed":
        labels[1] = 255
    for loss, classes in ((focal_dice, 1), (class_loss, 3)):
        logits = (torch.randn(2, classes, 8, 8) * scale).requires_grad_()
        value = loss(logits, labels)
        value.backward()
        assert torch.isfinite(value), loss
        assert torch.isfinite(logits.grad).all(), loss
        if kind == "ignored":
            assert value.item() == 0
            assert not logits.grad.any()


@pytest.mark.parametrize(("loss", "classes"), [(focal_dice, 1), (class_loss, 3)])
def test_ignored_pixels_change_nothing(loss, classes):
    logits, labels = sample(classes)
    hidden = (labels == 255)[:, None]
    before = loss(logits, labels)
    before.backward()
    assert not logits.grad[hidden.expand_as(logits)].any()
    assert logits.grad[~hidden.expand_as(logits)].all()
    assert loss(logits.detach() + 5 * hidden, labels).item() == pytest.approx(before.item(), rel=1e-12)


@pytest.mark.parametrize(("loss", "classes"), [(focal_dice, 1), (class_loss, 3)])
def test_a_right_prediction_costs_nothing_and_a_wrong_one_much(loss, classes):
    labels = torch.randint(0, 2, (2, 8, 8))
    right = torch.stack([(labels == c) * 60.0 - 30 for c in range(classes)], 1) if classes > 1 else None
    right = (labels * 60.0 - 30)[:, None] if right is None else right
    assert loss(right, labels).item() < 1e-6
    assert loss(-right, labels).item() > 0.7


def test_an_empty_truth_teaches_to_predict_nothing():
    """With a smoothing near 0 the Dice loss of an empty mask is constant, and focal loss alone is left."""
    logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
    dice_loss(logits.sigmoid(), torch.zeros_like(logits), torch.ones_like(logits)).sum().backward()
    assert (logits.grad > 1e-5).all()


def test_an_image_without_foreground_trains_by_the_focal_loss_alone():
    """Dice would make predicting nothing free there, and runs with many such images end in predicting nothing."""
    logits, labels = sample()
    focal_dice(logits[-1:], labels[-1:], focal=0.0).backward()
    assert not logits.grad.any()
    both = focal_dice(logits[:2], labels[:2], focal=0.0)
    assert focal_dice(logits, labels, focal=0.0).item() == pytest.approx(both.item(), rel=1e-12)


@pytest.mark.parametrize("factor", [2, 4])
def test_labels_are_reduced_by_the_pixel_at_the_centre(factor):
    labels = torch.randint(0, 12, (2, 16, 16))
    labels[0, :8] = 255
    small = nearest(labels, torch.zeros(2, 1, 16 // factor, 16 // factor))
    assert small.dtype == torch.long
    assert torch.equal(small, labels[:, factor // 2 :: factor, factor // 2 :: factor])
    assert nearest(labels, torch.zeros(2, 3, 16, 16)) is labels
    logits: Tensor = torch.randn(2, 1, 16 // factor, 16 // factor)
    assert focal_dice(logits, labels).item() == focal_dice(logits, small).item()
    several = torch.randn(2, 12, 16 // factor, 16 // factor)
    assert class_loss(several, labels).item() == class_loss(several, small).item()
