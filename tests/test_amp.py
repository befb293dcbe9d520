"""Mixed precision with torch.amp.GradScaler, where torch's own fused SGD goes wrong on a CPU.

Each of the three cases runs both optimizers, so that a fix in torch will be noticed.
"""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import rmsgd

CASES = pytest.mark.parametrize("rule", ["bounded", "paper", "release"])


def parameter(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return Parameter(torch.randn(5, 4, generator=generator).to(dtype))


def scaler(scale=1024.0):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def scaled_step(scaler, optimizer, *losses):
    optimizer.zero_grad()
    for loss in losses:
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def ours(params, rule="bounded", **options):
    return rmsgd.RMSGD(params, lr=0.1, momentum=0.9, rule=rule, **options)


def fused(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True)


def expected(steps):
    """The same steps by torch's plain SGD without any scaling."""
    p = parameter()
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
    return p


@CASES
def test_a_scaled_run_equals_an_unscaled_one(rule):
    p, amp = parameter(), scaler()
    optimizer = ours([p], rule)
    for _ in range(3):
        scaled_step(amp, optimizer, p.square().sum())
    torch.testing.assert_close(p, expected(3))
    assert torch.isfinite(p.grad).all()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@CASES
def test_gradients_unscaled_by_hand_are_not_unscaled_again(rule):
    p, amp = parameter(), scaler()
    optimizer = ours([p], rule)
    amp.scale(p.square().sum()).backward()
    amp.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p], 1e9)
    amp.step(optimizer)
    amp.update()
    torch.testing.assert_close(p, expected(1))


@CASES
def test_an_overflow_on_the_first_step_leaves_no_trace(rule):
    p, amp = parameter(), scaler()
    optimizer = ours([p], rule)
    scaled_step(amp, optimizer, p.square().sum() * float("inf"))
    assert torch.equal(p, parameter())
    assert amp.get_scale() == 512.0
    for _ in range(3):
        scaled_step(amp, optimizer, p.square().sum())
    torch.testing.assert_close(p, expected(3))


def test_torchs_fused_sgd_begins_with_an_uninitialised_buffer_after_an_overflow():
    p, amp = parameter(), scaler()
    optimizer = fused([p])
    scaled_step(amp, optimizer, p.square().sum() * float("inf"))
    # The buffer exists, was never written, and enters the next step as if it held a gradient.
    buffer = optimizer.state[p]["momentum_buffer"]
    buffer.fill_(7.0)
    scaled_step(amp, optimizer, p.square().sum())
    assert not torch.allclose(p, expected(1))


@CASES
@pytest.mark.parametrize("found", [1.0, 2.0, 8.0])
def test_an_overflow_seen_on_several_devices_skips_the_step(rule, found):
    """GradScaler sums what the devices found: two of them make 2."""
    p = parameter()
    optimizer = ours([p], rule)
    p.grad = torch.full_like(p, float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found)
    optimizer.step()
    assert torch.equal(p, parameter())
    del optimizer.grad_scale, optimizer.found_inf
    p.grad = 2 * p.detach()
    optimizer.step()
    torch.testing.assert_close(p, expected(1))


def test_torchs_fused_sgd_steps_into_infinity_when_two_devices_overflow():
    p = parameter()
    optimizer = fused([p])
    p.grad = torch.full_like(p, float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(2.0)
    optimizer.step()
    assert not torch.isfinite(p).all()


@CASES
def test_a_parameter_whose_first_gradient_comes_late_joins_in(rule):
    p, late, amp = parameter(), parameter(), scaler()
    optimizer = ours([p, late], rule)
    scaled_step(amp, optimizer, p.square().sum())
    assert torch.equal(late, parameter())
    for _ in range(2):
        scaled_step(amp, optimizer, p.square().sum(), late.square().sum())
    torch.testing.assert_close(p, expected(3))
    torch.testing.assert_close(late, expected(2))


def test_torchs_fused_sgd_fails_on_a_late_first_gradient():
    p, late, amp = parameter(), parameter(), scaler()
    optimizer = fused([p, late])
    scaled_step(amp, optimizer, p.square().sum())
    with pytest.raises(TypeError):
        scaled_step(amp, optimizer, p.square().sum(), late.square().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_an_epoch_end(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 4))
    optimizer, amp = rmsgd.RMSGD(model.named_parameters(), lr=0.05), scaler()
    x, y = torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        amp.scale(loss).backward()
        amp.step(optimizer)
        amp.update()
        losses.append(loss.item())
        optimizer.epoch_step()
    assert losses[-1] < 0.5 * losses[0]


def test_unscaling_leaves_gradients_as_they_were():
    p, amp = parameter(), scaler()
    optimizer = ours([p])
    scaled_step(amp, optimizer, p.square().sum())
    torch.testing.assert_close(p.grad, 1024.0 * 2 * parameter().detach())
