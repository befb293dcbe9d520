"""The cost of LayerRates: more parameter groups in every step, and a measurement from time to time."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import rmsgd
from bench import measure
from bench.networks import network
from bench.weights import make_trained_like
from rmsgd.tails import TailReport

RULES = ("rank-momentum", "tempbalance")


def _adamw(model: nn.Module, split: bool) -> torch.optim.Optimizer:
    groups: Any = rmsgd.layer_groups(model.named_parameters()) if split else model.parameters()
    return torch.optim.AdamW(groups, lr=1e-9, fused=True)


def step(name: str, rounds: int) -> dict[str, Any]:
    """A step of fused AdamW: all parameters in one group, a group per layer, and with rates of their own."""
    torch.manual_seed(0)
    model = network(name)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    one, many, rated = _adamw(model, False), _adamw(model, True), _adamw(model, True)
    rates = rmsgd.LayerRates(rated, rule=_spread)
    rates.step()
    cases = {"one group": one.step, "a group per layer": many.step, "with LayerRates": rated.step}
    seconds = measure.interleave(cases, rounds, min_seconds=0.02, warmup=2)
    return {
        "model": name,
        "tensors": sum(1 for _ in model.parameters()),
        "groups": len(many.param_groups),
        "seconds": measure.medians(seconds),
        "ratio": measure.ratios(seconds, "one group"),
    }


def _spread(report: rmsgd.Report) -> dict[str, float]:
    """A ratio of its own for every layer."""
    return {layer.name: 1.0 + 0.001 * i for i, layer in enumerate(report.measured)}


def svd_loop(model: nn.Module) -> dict[str, float]:
    """Tail exponents as the authors of TempBalance measure them: a full SVD of every layer, one by one.

    A kernel (o, i, k, k) is k^2 matrices of o x i, times the square root of one half.
    """
    exponents = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach().clone()
            if weight.ndim == 4:
                weight = (weight.flatten(2) * math.sqrt(0.5)).permute(2, 0, 1)
            eigenvalues = torch.linalg.svdvals(weight).flatten().square().sort().values
            logs, first = eigenvalues.log(), len(eigenvalues) // 2
            tail = logs[first:]
            exponents[name] = 1 + len(tail) / float(tail.sum() - len(tail) * tail[0])
    return exponents


def epoch_end(name: str, rounds: int) -> dict[str, Any]:
    """`LayerRates.step` under two rules, beside a loop of full SVDs, which the second rule would need."""
    torch.manual_seed(0)
    model = network(name)
    make_trained_like(model)
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=0.1)
    rates = {rule: rmsgd.LayerRates(optimizer, rule=rule) for rule in RULES}
    exponents: dict[str, float] = {}
    cases = {"SVD loop": lambda: exponents.update(svd_loop(model))} | {
        rule: rates[rule].step for rule in RULES
    }
    for rule in RULES:
        cases[rule]()
    # A loop of SVDs takes up to half a minute. A call to warm it up would change nothing and cost a round.
    seconds = measure.interleave(cases, rounds, warmup=0)
    report = rates["tempbalance"].report()
    assert isinstance(report, TailReport)
    ours = {layer.name: layer.alpha for layer in report.measured}
    theirs = {f"{layer}.weight": alpha for layer, alpha in exponents.items()}
    apart = [abs(ours[layer] / alpha - 1) for layer, alpha in theirs.items() if layer in ours]
    return {
        "model": name,
        "layers": len(ours),
        "compared": len(apart),
        "exponents_apart": max(apart),
        "seconds": measure.medians(seconds),
        "ratio": measure.ratios(seconds, "SVD loop"),
    }


def rows(kind: Any, models: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """One of the measurements above for every network."""
    return [kind(name, rounds) for name in models]
