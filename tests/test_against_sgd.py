"""With every rate equal, RMSGD is SGD: 200 steps on the same gradients, all flags, every backend."""

import itertools

import pytest
import torch
from torch import nn

import rmsgd

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
FLAGS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": decay,
        "maximize": up,
    }
    for momentum, dampening, nesterov, decay, up in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.02), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening != 0))
]


def parameters(dtype):
    """Contiguous, channels_last and transposed weights, a bias, a scalar and an empty one."""
    torch.manual_seed(3)
    conv = torch.randn(6, 5, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    tensors = [conv, torch.randn(7, 4, dtype=dtype), torch.randn(4, 9, dtype=dtype).T]
    tensors += [torch.randn(11, dtype=dtype), torch.randn((), dtype=dtype), torch.randn(0, 3, dtype=dtype)]
    return [nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors]


def run(make, dtype, steps):
    params = parameters(dtype)
    optimizer = make(params)
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, dtype=dtype, generator=generator)
            # Now and then a gradient is missing; one parameter gets its first one late.
            missing = step < 5 if i == 3 else (step + i) % 17 == 0
            p.grad = None if missing else grad.clone()
        before = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step()
        for p, grad in zip(params, before, strict=True):
            assert (p.grad is None) == (grad is None)
            assert grad is None or torch.equal(p.grad, grad), "step must leave p.grad as it was"
    return params


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("rule", ["paper", "release", "published"])
def test_200_steps_equal_sgd_for_all_flags(backend, rule, dtype):
    # The fallbacks are slow and share their element rule: fewer steps, every third set of flags.
    steps, flag_sets = (200, FLAGS) if backend == "native" else (20, FLAGS[::3])
    for flags in flag_sets:
        ours = run(lambda p, f=flags: rmsgd.RMSGD(p, lr=0.01, rule=rule, **f), dtype, steps)
        theirs = run(lambda p, f=flags: torch.optim.SGD(p, lr=0.01, **f), dtype, steps)
        for a, b in zip(ours, theirs, strict=True):
            if a.numel():
                error = float((a - b).detach().abs().max() / b.detach().abs().max())
                assert error <= BOUND[dtype], (flags, tuple(a.shape), error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_parameters_keep_fp32_memory_and_round_once(backend, dtype):
    params = parameters(dtype)
    optimizer = rmsgd.RMSGD(params, lr=0.01, momentum=0.9)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    expected = [p.double() - 0.01 * p.grad.double() for p in params]
    optimizer.step()
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p.detach(), e.float().to(dtype))
        assert optimizer.state[p]["velocity"].dtype == torch.float32


def test_same_seed_same_result_whatever_the_number_of_threads(backend):
    def weights(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = run(lambda p: rmsgd.RMSGD(p, lr=0.01, nesterov=True), torch.float32, 5)
            optimizer = rmsgd.RMSGD(params, lr=0.01)
            optimizer.epoch_step()
            return [p.detach().clone() for p in params], optimizer.learning_rates()
        finally:
            torch.set_num_threads(before)

    (one, rates_one), (three, rates_three) = weights(1), weights(3)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert rates_one == rates_three
