"""The compiled momentum step follows its element rule, whatever the dtype, size, layout or thread count."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from rmsgd import reference

_cpu = pytest.importorskip("rmsgd._cpu", reason="the compiled core was not built")

# The number of the step's own threads is an argument.
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (0, 1, 3, 17, 64, 100_000)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
# momentum, dampening, nesterov
MOMENTA = ((0.0, 0.3, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True), (0.9, 0.3, True))
# multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity
PLAIN = (1.0, 0.9, 0.0, 0.0, False, False, True)


def unaligned(values: Tensor) -> Tensor:
    """The values in memory that begins one element after an allocation's start."""
    return torch.cat([values.new_zeros(1), values.flatten()])[1:]


@dataclass
class Problem:
    """Parameters with all the memory that a plan points to."""

    weights: list[Tensor]
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    groups: list[int]
    eta: np.ndarray
    fresh: np.ndarray
    plan: _cpu.StepPlan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = _cpu.StepPlan(
            [w.data_ptr() for w in self.weights],
            [b.data_ptr() for b in self.buffers],
            [str(w.dtype).removeprefix("torch.") for w in self.weights],
            [w.numel() for w in self.weights],
            self.groups,
            list(range(len(self.weights))),
            self.eta,
            self.fresh,
        )

    def step(self, *groups, grad_scale=1.0, threads=1) -> None:
        pointers = [0 if g is None else g.data_ptr() for g in self.gradients]
        self.plan.step(pointers, groups, grad_scale, threads)

    def state(self) -> list[Tensor]:
        return [t.clone() for t in (*self.weights, *self.buffers)] + [torch.from_numpy(self.fresh.copy())]


def problem(dtype=torch.float32, sizes=SIZES, fresh=True, groups=1, seed=0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def random(n):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    memory = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        weights=[unaligned(random(n).to(dtype)) for n in sizes],
        gradients=[unaligned(random(n).to(dtype)) for n in sizes],
        buffers=[unaligned((random(n) * (torch.nan if fresh else 0.1)).to(memory)) for n in sizes],
        groups=[k % groups for k in range(len(sizes))],
        eta=np.linspace(0.02, 0.2, len(sizes)),
        fresh=np.full(len(sizes), fresh),
    )


def expected(p: Problem, k: int, group, grad_scale=1.0) -> tuple[np.ndarray, np.ndarray]:
    """Weight and buffer of parameter k after one step, in float64."""
    multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity = group
    return reference.momentum_update(
        p.weights[k].double().numpy(),
        p.gradients[k].double().numpy() / grad_scale,
        p.buffers[k].double().numpy(),
        p.eta[k] * multiplier,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        bool(p.fresh[k]),
        velocity,
    )


def assert_close(actual: Tensor, exact: np.ndarray) -> None:
    """Within 1e-12 (float64) or 1e-6 (float32) of the largest element; half types also round once."""
    if exact.size == 0:
        return
    scale = np.abs(exact).max()
    allowed = (1e-12 if actual.dtype == torch.float64 else 1e-6) * scale
    if actual.dtype in HALF:
        info = torch.finfo(actual.dtype)
        spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), info.smallest_normal)))) * info.eps
        allowed = allowed + spacing / 2
    error = np.abs(actual.double().numpy() - exact)
    assert np.all(error <= allowed), f"error {error.max():.3g}, largest element {scale:.3g}"


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("velocity", [True, False], ids=["velocity", "buffer"])
@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), MOMENTA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_equals_the_float64_reference(dtype, momentum, dampening, nesterov, velocity):
    for (weight_decay, maximize), fresh in itertools.product(((0.0, False), (0.01, True)), (False, True)):
        group = (0.7, momentum, dampening, weight_decay, nesterov, maximize, velocity)
        p = problem(dtype, fresh=fresh)
        for _ in range(2):
            exact = [expected(p, k, group) for k in range(len(SIZES))]
            kept = [g.clone() for g in p.gradients]
            p.step(group)
            for k, (weight, buffer) in enumerate(exact):
                assert_close(p.weights[k], weight)
                if momentum:
                    assert_close(p.buffers[k], buffer)
            assert_same_bits(p.gradients, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_divided_by_the_scale(dtype):
    group = (1.0, 0.9, 0.1, 0.01, True, True, False)
    p = problem(dtype, fresh=False)
    p.gradients = [unaligned(g * 1024) for g in p.gradients]
    exact = [expected(p, k, group, 1024.0) for k in range(len(SIZES))]
    p.step(group, grad_scale=1024.0)
    for k, (weight, buffer) in enumerate(exact):
        assert_close(p.weights[k], weight)
        assert_close(p.buffers[k], buffer)


def test_every_group_has_its_hyper_parameters_and_every_parameter_its_rate():
    groups = [PLAIN, (0.5, 0.0, 0.0, 0.1, False, True, False), (2.0, 0.5, 0.2, 0.0, True, False, False)]
    p = problem(sizes=(5, 6, 7, 8, 9, 10), groups=3)
    for _ in range(2):
        exact = [expected(p, k, groups[p.groups[k]]) for k in range(6)]
        p.step(*groups)
        for k, (weight, _) in enumerate(exact):
            assert_close(p.weights[k], weight)
        p.eta[:] *= 3  # read anew at every step


def test_without_momentum_the_buffer_and_its_flag_stay_as_they_are():
    p = problem()
    buffers = [b.clone() for b in p.buffers]
    p.step((1.0, 0.0, 0.5, 0.0, False, False, True))
    assert_same_bits(p.buffers, buffers)
    assert p.fresh.all()
    p.step(PLAIN)
    assert not p.fresh[1:].any()


def test_a_parameter_without_a_gradient_stays_as_it_is_and_fresh():
    p = problem()
    p.gradients[2] = p.gradients[5] = None
    weights, buffers = [p.weights[k].clone() for k in (2, 5)], [p.buffers[k].clone() for k in (2, 5)]
    p.step(PLAIN)
    assert_same_bits([p.weights[2], p.weights[5]], weights)
    assert_same_bits([p.buffers[2], p.buffers[5]], buffers)
    assert p.fresh[[2, 5]].all()
    assert not p.fresh[[1, 3, 4]].any()


def test_a_step_in_which_no_parameter_has_a_gradient_changes_nothing():
    p = problem()
    p.gradients = [None] * len(SIZES)
    before = p.state()
    p.step(PLAIN)
    assert_same_bits(p.state(), before)
    Problem([], [], [], [], np.zeros(0), np.zeros(0, bool)).step()


def test_thousands_of_tiny_tensors_take_the_step():
    sizes = [1 + k % 70 for k in range(2000)]
    p = problem(sizes=sizes, groups=2)
    groups = [PLAIN, (1.0, 0.9, 0.0, 5e-4, True, False, False)]
    exact = [expected(p, k, groups[p.groups[k]]) for k in range(len(sizes))]
    p.step(*groups)
    for k, (weight, buffer) in enumerate(exact):
        assert_close(p.weights[k], weight)
        assert_close(p.buffers[k], buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_does_not_depend_on_the_number_of_threads(dtype):
    results = []
    for threads in (1, 2, 3):
        p = problem(dtype, sizes=(*SIZES, *[64] * 100, 70_001))
        for _ in range(2):
            p.step((1.0, 0.9, 0.1, 5e-4, True, False, True), threads=threads)
        results.append(p.state())
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_values_that_are_not_finite_stay_in_their_element():
    p = problem(sizes=(100,), fresh=False)
    p.gradients[0][3], p.gradients[0][40] = torch.nan, torch.inf
    clean = problem(sizes=(100,), fresh=False)
    p.step(PLAIN)
    clean.step(PLAIN)
    assert torch.isnan(p.weights[0][3])
    assert p.weights[0][40] == -torch.inf
    others = [k for k in range(100) if k not in (3, 40)]
    assert torch.equal(p.weights[0][others], clean.weights[0][others])


# -- half precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_precision_value_survives_a_step_of_rate_zero(dtype):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    before = weight.clone()
    zeros = torch.zeros_like(weight)
    p = Problem([weight], [zeros], [zeros.float()], [0], np.zeros(1), np.ones(1, bool))
    p.step((1.0, 0.0, 0.0, 0.0, False, False, True))
    finite = before.isfinite()
    assert torch.equal(weight[finite].view(torch.int16), before[finite].view(torch.int16))
    assert weight[before.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_weights_round_to_nearest_even(dtype):
    halves = torch.arange(2**15 - 1, dtype=torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    ties = (halves[:-1] + halves[1:]) / 2  # exact in float32
    near = [torch.nextafter(ties, torch.full_like(ties, limit)) for limit in (0.0, torch.inf)]
    top = torch.finfo(dtype).max * torch.tensor([1.0, 1.0001, 1.5])
    values = torch.cat([ties, *near, top, torch.tensor([torch.inf, torch.nan])])
    values = torch.cat([values, -values])
    buffer = -values
    p = Problem(  # w = 0 - 1 * (-value), rounded once
        [torch.zeros(len(values), dtype=dtype)],
        [torch.zeros(len(values), dtype=dtype)],
        [buffer],
        [0],
        np.ones(1),
        np.zeros(1, bool),
    )
    p.step((1.0, 1.0, 0.0, 0.0, False, False, False))
    assert torch.equal(p.weights[0].nan_to_num(7.0), values.to(dtype).nan_to_num(7.0))


# -- tensors ---------------------------------------------------------------------------------------


def tensor_problem(*weights: Tensor) -> tuple[Problem, list[Tensor]]:
    parameters = [torch.nn.Parameter(w) for w in weights]
    for p in parameters:
        p.grad = torch.randn_like(p)
    gradients = [p.grad for p in parameters]
    buffers = [
        torch.zeros_like(p, requires_grad=False, dtype=torch.float32)
        if p.dtype in HALF
        else torch.zeros_like(p, requires_grad=False)
        for p in parameters
    ]
    count = len(parameters)
    made = Problem(
        [p.data for p in parameters],
        gradients,
        buffers,
        [0] * count,
        np.full(count, 0.1),
        np.ones(count, bool),
    )
    return made, parameters


WEIGHTS = {
    "contiguous": lambda: torch.randn(6, 5, 3, 3),
    "channels_last": lambda: torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(7, 5).t(),
    "singleton": lambda: torch.randn(4, 1, 1, 6),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "offset": lambda: torch.randn(10)[1:],
}

needs_tensors = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange table"
)


@needs_tensors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", WEIGHTS)
def test_stepping_tensors_equals_stepping_pointers(layout, dtype):
    weight = WEIGHTS[layout]().to(dtype)
    by_pointer, _ = tensor_problem(weight.clone(), torch.ones(3))
    by_tensor, parameters = tensor_problem(weight.clone(), torch.ones(3))
    for p, gradient in zip(parameters, by_pointer.gradients, strict=True):
        p.grad.copy_(gradient)
    by_pointer.step(PLAIN)
    assert by_tensor.plan.step_tensors(torch.Tensor, parameters, [PLAIN], 1.0, 2) == []
    assert_same_bits(
        [t.contiguous().flatten() for t in by_tensor.weights + by_tensor.buffers],
        [t.contiguous().flatten() for t in by_pointer.weights + by_pointer.buffers],
    )


@needs_tensors
def test_stepping_tensors_names_the_parameters_without_a_gradient():
    p, parameters = tensor_problem(torch.ones(3), torch.ones(4), torch.ones(5))
    parameters[1].grad = None
    assert p.plan.step_tensors(torch.Tensor, parameters, [PLAIN]) == [1]
    assert torch.equal(parameters[1], torch.ones(4))
    assert p.fresh.tolist() == [False, True, False]


@needs_tensors
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_half_precision_parameter_may_have_a_float32_gradient(dtype):
    p, parameters = tensor_problem(torch.zeros(700, dtype=dtype))
    gradient = torch.randn(700)
    parameters[0].grad_dtype = None
    parameters[0].grad = gradient
    assert p.plan.step_tensors(torch.Tensor, parameters, [PLAIN]) == []
    assert torch.equal(p.buffers[0], -0.1 * gradient)
    assert torch.equal(parameters[0].data, (-0.1 * gradient).to(dtype))


def _moved(p):
    p.data = p.data.clone()


def _resized(p):
    p.data = p.data[:2]
    p.grad = torch.ones_like(p)


def _made_half(p):
    p.data = p.data.half()


def _given_a_sparse_gradient(p):
    p.grad = torch.ones(4, 3).to_sparse()


def _given_a_transposed_gradient(p):
    p.grad = torch.ones(3, 4).t()


def _given_an_expanded_gradient(p):
    p.grad = torch.ones(1, 3).expand(4, 3)


def _given_a_gradient_of_a_subclass(p):
    p.grad = torch.ones(4, 3).as_subclass(type("Special", (torch.Tensor,), {}))


@needs_tensors
@pytest.mark.parametrize(
    "change",
    [
        _moved,
        _resized,
        _made_half,
        _given_a_sparse_gradient,
        _given_a_transposed_gradient,
        _given_an_expanded_gradient,
        _given_a_gradient_of_a_subclass,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_stepping_tensors_declines_what_it_was_not_planned_for(change):
    p, parameters = tensor_problem(torch.ones(5), torch.ones(4, 3))
    change(parameters[1])
    before = p.state()
    assert p.plan.step_tensors(torch.Tensor, parameters, [PLAIN]) is None
    assert_same_bits(p.state(), before)


@needs_tensors
def test_stepping_tensors_declines_a_weight_with_gaps():
    weight = torch.ones(4, 6)[:, ::2]
    p, parameters = tensor_problem(weight)
    parameters[0].grad = torch.ones(4, 6)[:, ::2]
    assert p.plan.step_tensors(torch.Tensor, parameters, [PLAIN]) is None


@needs_tensors
def test_stepping_tensors_refuses_what_is_no_tensor():
    p, parameters = tensor_problem(torch.ones(3), torch.ones(4))
    with pytest.raises(TypeError, match="parameters: expected tensors"):
        p.plan.step_tensors(torch.Tensor, [parameters[0], object()], [PLAIN])
    with pytest.raises(ValueError, match=r"parameters: expected one for each of the 2 .* got 1"):
        p.plan.step_tensors(torch.Tensor, parameters[:1], [PLAIN])


# -- errors ----------------------------------------------------------------------------------------

ONE = torch.ones(4)
ARGUMENTS = {
    "parameters": [ONE.data_ptr()],
    "buffers": [0],
    "dtypes": ["float32"],
    "numels": [4],
    "groups": [0],
    "eta_indices": [0],
    "eta": np.ones(1),
    "fresh": np.ones(1, bool),
}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"buffers": []}, ValueError, "buffers: expected one for each of the 1 parameters, got 0"),
        ({"dtypes": ["int32"]}, ValueError, "float16, bfloat16, got int32"),
        ({"numels": [-1]}, ValueError, "numels: .* negative"),
        ({"parameters": [0]}, ValueError, "parameters: a pointer is null"),
        ({"groups": [-1]}, IndexError, "groups: an index is negative"),
        ({"eta_indices": [1]}, IndexError, "eta_indices: 1 is not an index of eta, which has 1 elements"),
        ({"eta_indices": [-1]}, IndexError, "eta_indices: -1"),
        ({"eta": np.ones((1, 1))}, ValueError, "eta: expected one dimension"),
        ({"eta": np.ones(1, np.float32)}, TypeError, "incompatible"),
        ({"fresh": np.ones(2, bool)}, ValueError, "fresh: expected one for each of the 1 parameters, got 2"),
        ({"fresh": np.ones(1, np.uint8)}, TypeError, "incompatible"),
        ({"parameters": ["one"]}, TypeError, "incompatible"),
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense_is_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        _cpu.StepPlan(**(ARGUMENTS | wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"gradients": []}, ValueError, "gradients: expected one for each of the 1 parameters, got 0"),
        ({"groups": []}, IndexError, "groups: a parameter has index 0, got 0 groups"),
        ({"groups": [(1.0, 0.9)]}, TypeError, "incompatible"),
        ({"groups": [PLAIN]}, ValueError, "parameter 0 has no buffer, but momentum is 0.9"),
        ({"grad_scale": 0.0}, ValueError, "grad_scale: expected a positive number"),
        ({"grad_scale": float("nan")}, ValueError, "grad_scale: expected a positive number, got nan"),
        ({"grad_scale": float("inf")}, ValueError, "grad_scale: expected a positive number"),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_a_step_that_makes_no_sense_is_refused_and_writes_nothing(wrong, error, message):
    weight = torch.ones(4)
    plan = _cpu.StepPlan(**(ARGUMENTS | {"parameters": [weight.data_ptr()]}))
    arguments = {"gradients": [ONE.data_ptr()], "groups": [(1.0, 0.0, 0.0, 0.0, False, False, True)]}
    with pytest.raises(error, match=message):
        plan.step(**(arguments | wrong))
    assert torch.equal(weight, torch.ones(4))


# -- instruction sets ------------------------------------------------------------------------------


@pytest.mark.skipif("RMSGD_ISA" in os.environ, reason="one instruction set is forced already")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_cpu_passes_these_tests(isa):
    environment = os.environ | {"RMSGD_ISA": isa}
    active = subprocess.run(
        [sys.executable, "-c", "from rmsgd import _cpu; print(_cpu.isa())"],
        env=environment,
        capture_output=True,
        text=True,
    )
    if active.returncode != 0:
        pytest.skip(f"this CPU does not have {isa}")
    assert active.stdout.strip() == isa
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not refuse", __file__],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
