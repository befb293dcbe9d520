"""Layer-wise rates on the pretended GPU: measured beside other work, and followed by captured steps."""

import pytest
import rehearsal
import torch
from pretended_streams import ORDERS
from streams import weights
from torch.nn import Parameter

import rmsgd

LR = 0.03


def groups_of(parameters):
    return rmsgd.layer_groups([(str(i), p) for i, p in enumerate(parameters)], lr=LR)


def train(rule, device, lr=LR):
    """Parameters and rates after some epochs, none of which the host waits for by itself."""
    torch.manual_seed(1)
    parameters = [Parameter(w.to(device)) for w in weights()]
    optimizer = torch.optim.SGD(groups_of(parameters), lr=LR, momentum=0.9)
    rates = rmsgd.LayerRates(optimizer, rule=rule)
    for _ in range(2):
        for _ in range(2):
            for p in parameters:
                p.grad = torch.randn(p.shape).to(device)
            optimizer.step()
        rates.step()
    return [p.detach().cpu() for p in parameters], rates.learning_rates()


@pytest.mark.parametrize("rule", ["rank-momentum", "tempbalance"])
def test_rates_on_a_gpu_are_those_of_the_cpu_in_every_order_of_streams(gpu_folder, rule):
    expected, rates = train(rule, "cpu")
    for order in ORDERS:
        with rehearsal.rehearsed(gpu_folder, order):
            found, theirs = train(rule, "cuda")
        assert theirs == pytest.approx(rates, rel=1e-4)
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_captured_step_follows_rates_that_change_between_replays(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        weight = Parameter(torch.randn(64, 80).cuda())
        lr = torch.tensor(LR, device="cuda")
        optimizer = torch.optim.Adam([{"params": [weight], "lr": lr}], capturable=True, eps=0.0)
        rates = rmsgd.LayerRates(optimizer, rule=lambda report: {report.layers[0].name: next(ratios)})
        ratios = iter([0.5, 2.0, 1.0, 3.0])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for ratio in (0.5, 2.0, 1.0, 3.0):
            rates.step()
            before = weight.detach().clone()
            graph.replay()
            moved = (before - weight.detach()).flatten()
            assert moved.min().item() == pytest.approx(LR * ratio, rel=1e-3)
            assert moved.max().item() == pytest.approx(LR * ratio, rel=1e-3)
            assert lr.item() == pytest.approx(LR)


def test_replays_of_a_graph_take_new_rates_at_once_and_a_capture_on_the_way_is_refused(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        weight = Parameter(torch.randn(16, 20).cuda())
        lr = torch.tensor(LR, device="cuda")
        optimizer = torch.optim.Adam([{"params": [weight], "lr": lr}], capturable=True, eps=0.0)
        ratios = iter([3.0, 2.0])
        rates = rmsgd.LayerRates(optimizer, lambda report: {"0.0": next(ratios)}, transition=2)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        rates.step()
        with (
            pytest.raises(RuntimeError, match="rates are on their way to new ones"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()
        for _ in range(2):
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for ratio in (3.0, 2.0):
            before = weight.detach().clone()
            graph.replay()
            assert (before - weight.detach()).max().item() == pytest.approx(LR * ratio, rel=1e-3)
            if ratio == 3.0:
                rates.step()
