"""Losses of clips against the formulas as MotionDirector states them, in float64."""

import math

import pytest
import torch

from visadapt.losses import diffusion as dm
from visadapt.losses import video as vd


def clips(count=2, frames=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, frames, 3, 4, 4, generator=generator, dtype=torch.float64)


def phi(x, anchor, beta):
    """As the paper has it, clip by clip."""
    return torch.stack([math.sqrt(beta**2 + 1) * clip - beta * clip[a] for clip, a in zip(x, anchor.tolist())])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_temporal_loss_is_that_of_the_paper(beta):
    noise, found = clips()
    anchor = torch.tensor([3, 0])
    plain = (noise - found).square().flatten(1).mean(1)
    apart = (phi(noise, anchor, beta) - phi(found, anchor, beta)).square().flatten(1).mean(1)
    losses = vd.temporal(found - noise, anchor, beta)
    assert losses.shape == (2,)
    assert torch.allclose(losses, plain + apart, rtol=1e-12)


def test_beta_of_zero_doubles_the_plain_loss():
    error = clips()[0]
    assert torch.allclose(vd.temporal(error, torch.tensor([1, 2]), 0.0), 2 * dm.per_sample(error**2), rtol=1e-12)


def test_variance_of_phi_is_not_kept():
    noise = torch.randn(1, 16, 1, 300, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    variances = vd.debiased(noise, torch.tensor([4]))[0].var((1, 2, 3))
    others = torch.cat([variances[:4], variances[5:]])
    assert torch.allclose(others, torch.full_like(others, 3), rtol=0.03)
    assert variances[4].item() == pytest.approx((math.sqrt(2) - 1) ** 2, rel=0.03)
    assert variances.mean().item() == pytest.approx(2.82, rel=0.01)


def test_what_all_frames_share_is_reduced_not_removed():
    error = clips()[0]
    anchor = torch.tensor([0, 4])
    moved = vd.debiased(error + 0.7, anchor) - vd.debiased(error, anchor)
    assert torch.allclose(moved, torch.full_like(moved, 0.7 * (math.sqrt(2) - 1)), rtol=1e-10)


def test_robust_losses_and_gradients_go_through():
    error = clips()[0][:, :2, :1, :2, :2].requires_grad_(True)
    anchor = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda e: vd.temporal(e, anchor), error)
    width = torch.tensor([0.1, 0.1], dtype=torch.float64)
    robust = vd.temporal(error, anchor, 1.0, lambda e: dm.pointwise("huber", e, width))
    wanted = dm.pointwise("huber", error, width) + dm.pointwise("huber", phi(error, anchor, 1.0), width)
    assert torch.allclose(robust, wanted.flatten(1).mean(1), rtol=1e-12)


def test_one_frame_of_each_clip():
    x = clips()[0]
    found = vd.frames_of(x, torch.tensor([3, 1]))
    assert found.shape == (2, 1, 3, 4, 4)
    assert torch.equal(found[:, 0], torch.stack([x[0, 3], x[1, 1]]))
    with pytest.raises(ValueError, match="debias"):
        vd.debiased(x, torch.tensor([0, 0]), -1.0)
