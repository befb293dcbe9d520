"""torch.compile of a training step: no graph break from us, no recompilation when rates change."""

import warnings

import pytest
import torch
from matrices import planted
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler as schedulers

import rmsgd

pytestmark = [
    pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run here"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Counted:
    """A compiler backend that counts how often it is called."""

    def __init__(self, name="eager"):
        self.count = 0
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, graph, inputs):
        self.count += 1
        return self._compile(graph, inputs)


def network():
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3)))


def run(backend, **options):
    """Weights and rates of a run whose rates move by lr, by momentum and at epoch ends."""
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, **options)

    def step():
        optimizer.step()

    if backend is not None:
        step = torch.compile(step, backend=backend, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for t in range(8):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 4, 4, generator=generator)).square().mean().backward()
        step()
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.param_groups[0]["momentum"] *= 0.99
        if t % 3 == 2:
            optimizer.epoch_step()
    return [p.detach().clone() for p in model.parameters()], optimizer.learning_rates()


@pytest.mark.parametrize("name", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"rule": "paper"}, {"rule": "release", "nesterov": True}], ids=str)
def test_a_compiled_step_is_one_graph_compiled_once_and_equals_the_eager_one(name, options):
    weights, rates = run(None, **options)
    backend = Counted(name)
    compiled, compiled_rates = run(backend, **options)
    assert backend.count == 1
    assert not counters["graph_break"]
    assert all(map(torch.equal, compiled, weights))
    assert compiled_rates == rates


@pytest.mark.parametrize("name", ["eager", "aot_eager", "inductor"])
def test_forward_backward_and_step_make_one_graph(name):
    """Dynamo traces ``backward`` where it is told to; torch forbids it to trace ``zero_grad``."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not trace backward")

    def run(backend):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)

        def train(x):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            for p in model.parameters():
                p.grad = None
            return loss.detach()

        if backend is not None:
            train = torch.compile(train, backend=backend, fullgraph=True)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(6):
            losses.append(train(torch.randn(5, 6, generator=generator)).item())
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.epoch_step()
        return losses

    expected = run(None)
    backend = Counted(name)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert run(backend) == pytest.approx(expected, rel=1e-5)
    assert backend.count == 1


def test_a_training_step_breaks_only_where_torch_does():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, zeta=0.01)
    backend = Counted("aot_eager")

    @torch.compile(backend=backend)
    def train(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x = torch.ones(8, 2, 4, 4) * torch.arange(8).view(-1, 1, 1, 1)
    losses, counts = [], []
    for _ in range(4):
        losses.append(train(x).item())
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.epoch_step()
        counts.append(backend.count)
    assert losses[-1] < losses[0]
    assert len(set(counts)) == 1
    reasons = sorted(reason.split("\n")[0] for reason in counters["graph_break"])
    # Optimizer.zero_grad is marked by torch as not to be traced, and so is Tensor.backward by default.
    assert len(reasons) == 2
    assert "skip" in reasons[0]
    assert "Tensor.backward" in reasons[1]


@pytest.mark.parametrize("compile_first", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda opt: schedulers.CosineAnnealingLR(opt, 10),
        lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=12),
        lambda opt: schedulers.SequentialLR(
            opt, [schedulers.LinearLR(opt, 0.1, total_iters=2), schedulers.ExponentialLR(opt, 0.9)], [2]
        ),
    ],
    ids=["cosine", "one cycle", "sequential"],
)
def test_a_scheduler_breaks_no_graph_and_does_not_recompile(make, compile_first):
    def run(backend):
        model = network()
        optimizer = rmsgd.RMSGD(model.parameters(), lr=0.03)

        def step():
            optimizer.step()

        compiled = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
        scheduler = None if compile_first else make(optimizer)
        for t in range(8):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            compiled()
            scheduler = scheduler or make(optimizer)
            scheduler.step()
            if t % 3 == 2:
                optimizer.epoch_step()
        return [p.detach().clone() for p in model.parameters()]

    backend = Counted()
    assert all(map(torch.equal, run(backend), run(None)))
    assert backend.count == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_scheduler_that_is_stepped_before_the_optimizer_is_warned_of_as_by_torch(compiled):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = rmsgd.RMSGD([p])

    def step():
        optimizer.step()

    step = torch.compile(step, backend="eager", fullgraph=True) if compiled else step
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


@pytest.mark.parametrize("name", ["aot_eager", "inductor"])
def test_weights_that_the_graph_changes_before_the_step_are_stepped_as_changed(name):
    p = nn.Parameter(torch.ones(4))
    optimizer = rmsgd.RMSGD([p], lr=0.5, momentum=0.0)

    @torch.compile(backend=name, fullgraph=True)
    def step():
        with torch.no_grad():
            p.mul_(3.0)
        optimizer.step()
        return p * 2

    p.grad = torch.ones(4)
    doubled = step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 2.5))
    torch.testing.assert_close(doubled.detach(), torch.full((4,), 5.0))


def test_compiled_steps_of_two_optimizers_are_not_mixed_up():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first, second = rmsgd.RMSGD([p], lr=0.5, momentum=0.0), rmsgd.RMSGD([q], lr=0.25, momentum=0.0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step():
        first.step()
        second.step()

    p.grad, q.grad = torch.ones(2), torch.ones(2)
    step()
    assert p.tolist() == [0.5, 0.5]
    assert q.tolist() == [0.75, 0.75]


@pytest.fixture
def compiled_step():
    """An optimizer with momentum, its parameter with a gradient of ones, and its compiled step."""
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer, backend = rmsgd.RMSGD([p], lr=0.5, momentum=0.5), Counted()

    def step():
        optimizer.step()

    return optimizer, p, torch.compile(step, backend=backend, fullgraph=True), backend


def test_a_late_gradient_and_a_late_group_join_in(compiled_step):
    optimizer, p, step, _ = compiled_step
    late, group = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    step()
    optimizer.add_param_group({"params": [group], "lr": 0.25})
    late.requires_grad_()
    late.grad, group.grad = torch.ones(2), torch.ones(2)
    step()
    step()
    assert p.tolist() == [1 - 0.5 - 0.75 - 0.875] * 2
    assert late.tolist() == [1 - 0.5 - 0.75] * 2
    assert group.tolist() == [1 - 0.25 - 0.375] * 2


def test_a_loaded_state_does_not_recompile(compiled_step):
    optimizer, p, step, backend = compiled_step
    step()
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    assert backend.count == 1
    assert p.tolist() == [1 - 0.5 - 0.75] * 2


def test_a_replaced_parameter_is_an_error_once_and_then_compiled(compiled_step):
    optimizer, p, step, _ = compiled_step
    step()
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    optimizer.param_groups[0]["params"][0] = other
    with pytest.raises(RuntimeError, match="other parameters than when this step was compiled"):
        step()
    assert p.tolist() == [0.5, 0.5]
    assert other.tolist() == [1.0, 1.0]
    step()
    assert other.tolist() == [0.5, 0.5]


def test_a_cuda_graph_does_not_record_the_step_with_its_rates():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    assert torch.Tag.cudagraph_unsafe in torch.ops.rmsgd.step.default.tags
