"""The measuring itself: ratios, gates, counts. Wrong rulers make every figure wrong."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import _measure
from benchmarks._counts import Count, memory, saved_bytes, state_bytes

N, I, O, R = 24, 16, 12, 4  # noqa: E741


class FakeTime:
    """A clock that only moves when somebody works, at a speed that drifts as a busy machine's does."""

    def __init__(self, drift=1.0):
        self.now, self.drift, self.slow = 0.0, drift, 1.0

    def work(self, seconds):
        def run():
            self.now += seconds * self.slow
            self.slow *= self.drift

        return run

    def __call__(self):
        return self.now


@pytest.mark.parametrize("drift", [1.0, 1.01])
def test_interleaving_cancels_a_drift_that_plain_medians_would_show(drift):
    time = FakeTime(drift)
    blocks = [{"same": time.work(0.1)}, {"ours": time.work(0.11), "peer": time.work(0.2)}]
    times = _measure.interleave(time.work(0.1), blocks, 15, time)
    assert times.against_reference("same").median == pytest.approx(1.0, rel=1e-3)
    assert times.against_reference("ours").median == pytest.approx(1.1, rel=1e-3)
    assert times.against("ours", "peer").median == pytest.approx(0.55, rel=1e-3)
    assert times.against_reference("peer").iqr < 1e-3
    assert len(times.reference) == 15 * 4


def test_short_cases_are_repeated_within_a_sample():
    time = FakeTime()
    assert _measure.repeats_for(time.work(0.004), time, least=0.02) == 5
    assert _measure.repeats_for(time.work(1.0), time, least=0.02) == 1


def test_iqr_is_relative_and_one_round_has_none():
    assert _measure.Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0]) == _measure.Ratio(3.0, pytest.approx(2 / 3))
    assert math.isnan(_measure.Ratio.of([1.0]).iqr)


def test_gates_reject_what_is_not_quiet():
    calm = _measure.Ratio(1.001, 0.004)
    assert _measure.verdict(calm, [_measure.Ratio(1.2, 0.01)]) == "quiet"
    assert "A/A" in _measure.verdict(_measure.Ratio(1.02, 0.004), [])
    assert "IQR" in _measure.verdict(calm, [_measure.Ratio(1.2, 0.05)])
    assert "IQR" in _measure.verdict(calm, [_measure.Ratio(1.2, float("nan"))])


def test_garbage_collection_is_off_within_and_restored_after_an_error():
    def fail():
        with _measure.no_gc():
            raise ZeroDivisionError(f"collecting: {gc.isenabled()}")

    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError, match="collecting: False"):
        fail()
    assert gc.isenabled()


def test_clock_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="choose cpu or wall"):
        _measure.clock("sundial", "cpu")


def test_flops_of_every_kind_of_product():
    a, b, c = torch.randn(N, I), torch.randn(I, O), torch.randn(N, O)
    x, kernel = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    q = torch.randn(1, 2, N, 8)
    cases = {
        "mm": (lambda: a @ b, 2 * N * I * O),
        "addmm": (lambda: torch.addmm(c, a, b), 2 * N * I * O),
        "addmm_": (lambda: c.addmm_(a, b), 2 * N * I * O),
        "baddbmm_": (lambda: c[None].baddbmm_(a[None], b[None]), 2 * N * I * O),
        "mv": (lambda: a @ b[:, 0], 2 * N * I),
        "conv": (lambda: F.conv2d(x, kernel, padding=1), 2 * 2 * 64 * 3 * 5 * 9),
        "attention": (lambda: F.scaled_dot_product_attention(q, q, q), 2 * 2 * 2 * N * N * 8),
        "elementwise": (lambda: a * 2 + 1, 0),
    }
    for name, (run, flops) in cases.items():
        with torch.no_grad(), Count() as count:
            run()
        assert count.flops == flops, name


def test_traffic_counts_bytes_of_operators_and_not_of_views():
    a, b = torch.randn(N, I), torch.randn(I, O)
    with Count() as count:
        (a.view(I, N).t() @ b).view(-1)
    assert count.operators == 1
    assert count.traffic == 4 * (N * I + I * O + N * O)


def test_saved_bytes_of_a_frozen_and_of_a_trained_layer():
    layer = nn.Linear(I, O).requires_grad_(False)
    x = torch.randn(N, I, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer).seen == 0
    layer.weight.requires_grad_(True)
    saved = saved_bytes(lambda: layer(x), layer)
    assert saved.seen == saved.kept == 4 * N * I


def test_saved_bytes_count_a_storage_once_and_tell_what_was_freed():
    x = torch.randn(N, I, requires_grad=True)

    def forward():
        (x.detach() * 2).requires_grad_(True).exp()  # saves its result, and nobody keeps its node
        y = x.exp()
        return y * y  # saves y twice: one storage

    saved = saved_bytes(forward, nn.Module())
    assert saved.kept == 4 * N * I
    assert saved.seen == 2 * 4 * N * I


def test_memory_sees_a_tensor_that_hooks_cannot():
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x.new_zeros(1 << 18)  # 1 MiB outside save_for_backward
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 + ctx.hidden.sum()

    x = torch.randn(16, requires_grad=True)
    assert saved_bytes(lambda: Hiding.apply(x), nn.Module()).seen == 0
    used = memory(lambda: Hiding.apply(x), lambda y: y.sum().backward(), "cpu")
    assert 1 << 20 <= used.held < (1 << 20) + 4096
    assert used.peak >= used.held


def test_state_bytes_are_those_beside_the_frozen_model():
    base = nn.Linear(I, O)
    model = nn.Module()
    model.base, model.extra = base, nn.Parameter(torch.zeros(R, I))
    assert state_bytes(model, base.parameters()) == 4 * R * I
