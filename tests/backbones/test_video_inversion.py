"""DDIM inversion against a network that is a matrix, and mixtures of noise."""

import pytest
import torch
from torch import Tensor, nn

from visadapt.backbones.sd_schedule import schedulers
from visadapt.backbones.video_inversion import invert, levels_of, mixed_noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
BETAS |= {"set_alpha_to_one": False, "steps_offset": 1}


class Linear(nn.Module):
    """Predicts a matrix of x, which grows with the time."""

    def __init__(self, prediction: str, strength: float = 0.2, **scheduler) -> None:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        super().__init__()
        given = (
            FlowMatchEulerDiscreteScheduler()
            if prediction == "flow"
            else DDIMScheduler(**(BETAS | scheduler), prediction_type=prediction)
        )
        self.scheduler, self.sampler, self.prediction = schedulers(given)
        self.matrix = strength * torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor, times: Tensor, text: dict[str, Tensor]) -> Tensor:
        return (x @ self.matrix + 0.3) * (1 + times.double() / 1000).view(-1, 1, 1, 1, 1)


def sampled(model, noise, steps):
    sampler, x = type(model.sampler).from_config(model.sampler.config), noise
    sampler.set_timesteps(steps)
    for time in sampler.timesteps:
        x = sampler.step(model(x, time.expand(len(x)), {}), time, x).prev_sample
    return x


def latents():
    return torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CASES = [("epsilon", {}), ("v_prediction", {}), ("v_prediction", {"timestep_spacing": "trailing"}), ("flow", {})]


@pytest.mark.parametrize(("prediction", "scheduler"), CASES)
def test_sampling_the_inverted_noise_gives_the_latents_back(prediction, scheduler):
    model = Linear(prediction, **scheduler)
    noise = invert(model, latents(), {}, steps=20, refine=40)
    assert noise.dtype == torch.float64
    accuracy = 1e-5 if prediction == "flow" else 1e-6  # the samplers' tables are in float32
    torch.testing.assert_close(sampled(model, noise, 20), latents(), rtol=0, atol=accuracy)


def test_ddims_steps_of_even_times_are_not_those_of_its_list():
    model = Linear("epsilon", timestep_spacing="linspace")
    noise = invert(model, latents(), {}, steps=20, refine=40)
    assert (sampled(model, noise, 20) - latents()).abs().max() > 0.1


@pytest.mark.parametrize(("prediction", "scheduler"), CASES)
def test_the_error_of_plain_inversion_falls_with_the_steps(prediction, scheduler):
    model = Linear(prediction, strength=0.05, **scheduler)
    errors = [(sampled(model, invert(model, latents(), {}, n), n) - latents()).abs().max() for n in (10, 100)]
    assert errors[1] < 0.25 * errors[0]
    assert errors[1] < 0.2
    coarse = (sampled(model, invert(model, latents(), {}, 10, refine=3), 10) - latents()).abs().max()
    assert coarse < 0.1 * errors[0]


def test_the_right_noise_of_one_point_is_found():
    """For data of a single point the prediction is known exactly, and inversion is exact at once."""
    model = Linear("epsilon", strength=0.0)
    noise = latents().flip(0)
    model.forward = lambda x, times, text: noise
    kept = levels_of(model, 20)[-1]
    clean = levels_of(model, 20)[0]
    start = clean[0] * latents() + clean[1] * noise
    torch.testing.assert_close(invert(model, start, {}, 20), kept[0] * latents() + kept[1] * noise)


def test_levels_are_the_samplers():
    model = Linear("epsilon")
    levels = levels_of(model, 10)
    sampler = model.sampler
    sampler.set_timesteps(10)
    assert [time for _, _, time in levels[:0:-1]] == sampler.timesteps.tolist()
    assert all(abs(a**2 + s**2 - 1) < 1e-12 for a, s, _ in levels)
    alphas = [alpha for alpha, _, _ in levels]
    assert alphas == sorted(alphas, reverse=True)
    flow = levels_of(Linear("flow"), 10)
    assert all(abs(a + s - 1) < 1e-6 for a, s, _ in flow)
    assert flow[0][:2] == (1.0, 0.0)
    assert flow[-1][1] == pytest.approx(1.0)


def test_mixtures_keep_the_variance():
    a, b = torch.randn(2, 400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 1.0):
        mixed = mixed_noise(a, b, share)
        assert mixed.var() == pytest.approx(1.0, abs=0.01)
        assert (mixed * a).mean() == pytest.approx(share**0.5, abs=0.01)
    with pytest.raises(ValueError, match="share 1.5"):
        mixed_noise(a, b, 1.5)


def test_the_network_is_told_its_own_times():
    told = []
    model = Linear("epsilon")
    model.forward = lambda x, times, text: told.append(times) or x * 0
    invert(model, latents(), {}, 4)
    assert [int(t[0]) for t in told] == [1, 251, 501, 751]
    assert all(t.dtype == torch.long and t.shape == (2,) for t in told)
