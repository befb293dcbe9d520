"""State dicts damaged at random are loaded, or refused by name in one line, with nothing changed."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import rmsgd
from rmsgd.rules import RULES

Path = tuple[Any, ...]
NAMED = [
    ("conv.weight", (4, 3, 3, 3), torch.float32),
    ("conv.bias", (4,), torch.float32),
    ("head.weight", (6, 5), torch.bfloat16),
    ("head.bias", (6,), torch.float64),
]


def optimizer_of(kind: str, named: bool, seed: int) -> torch.optim.Optimizer:
    """An optimizer of two groups that has taken steps: torch's SGD, or RMSGD under this rule."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _, shape, dtype in NAMED
    ]
    items = [(name, p) for (name, _, _), p in zip(NAMED, parameters, strict=True)] if named else parameters
    groups: Any = [{"params": items[:2], "lr": 0.1}, {"params": items[2:], "weight_decay": 1e-3}]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.03, momentum=0.9)
    else:
        optimizer = rmsgd.RMSGD(groups, rule=kind, step_size=1, gamma=0.9, initial_rank="measure")
    train(optimizer, generator)
    return optimizer


def train(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Take two steps and an epoch end."""
    for _ in range(2):
        for p in parameters_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    if isinstance(optimizer, rmsgd.RMSGD):
        optimizer.epoch_step()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@cache
def sound(kind: str, named: bool) -> dict[str, Any]:
    return optimizer_of(kind, named, 1).state_dict()


# -- damage --------------------------------------------------------------------------------------


def places(node: Any, path: Path = ()) -> list[Path]:
    """The paths to all values in a state dict, itself included."""
    found = [path]
    if isinstance(node, dict):
        found += [place for key, child in node.items() for place in places(child, (*path, key))]
    elif isinstance(node, list):
        found += [place for i, child in enumerate(node) for place in places(child, (*path, i))]
    return found


def garbage(rng: np.random.Generator) -> Any:
    """A random value, which may belong there or not."""
    things: list[Callable[[], Any]] = [
        *(lambda x=x: x for x in (None, True, False, 0, 1, -1, 2**70, 10**400, 0.0, -0.5, 0.5, 1e30, 1j)),
        *(lambda x=x: x for x in (float("nan"), float("inf"), "", "paper", "x\ny", b"", (), int, len)),
        lambda: [],
        lambda: {},
        lambda: [0, 1],
        lambda: {"params": [0]},
        lambda: np.ones(3),
        lambda: np.float32(0.5),
        lambda: torch.tensor(0.5),
        lambda: torch.tensor([1, 2]),
        lambda: torch.empty(6, 5, device="meta"),
        lambda: torch.zeros(0),
    ]
    return things[int(rng.integers(len(things)))]()


def changed_tensor(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A tensor made from another, with another shape, dtype, layout or content."""
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t.to(torch.float16),
        lambda t: t.to(torch.int64),
        lambda t: t.to(torch.complex64),
        lambda t: t > 0,
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: t.mT if t.dim() > 1 else t.flip(0),
        lambda t: t.flip(0)[1:],
        lambda t: t[:1].expand(t.shape),
        lambda t: t[None],
        lambda t: t * float("nan"),
        lambda t: t.clone().requires_grad_(t.is_floating_point()),
        lambda t: nn.Parameter(t.double()),
    ]
    return changes[int(rng.integers(len(changes)))](tensor)


def mangle(state_dict: Any, rng: np.random.Generator) -> tuple[Any, list[Path]]:
    """A state dict that is changed at one or two places, and the paths to them."""
    found = places(state_dict)
    path = found[int(rng.integers(len(found)))]
    if not path:
        return garbage(rng), [path]
    parent = state_dict
    for key in path[:-1]:
        parent = parent[key]
    key, action = path[-1], int(rng.integers(5))
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.insert(key, deepcopy(parent[int(rng.integers(len(parent)))]))
    elif action == 1:
        parent[["new", 17, "velocity", "lr", "rate", "lr_vector"][int(rng.integers(6))]] = garbage(rng)
    elif action == 2:  # a value beside it
        beside = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        other = beside[int(rng.integers(len(beside)))]
        parent[key], parent[other] = parent[other], parent[key]
        return state_dict, [path, (*path[:-1], other)]
    elif action == 3 and isinstance(parent[key], torch.Tensor) and parent[key].layout == torch.strided:
        parent[key] = changed_tensor(parent[key], rng)
    else:
        parent[key] = garbage(rng)
    return state_dict, [path]


class Case(NamedTuple):
    """A state dict for an optimizer of one kind, and the paths to its changed values."""

    kind: str
    named: bool
    state_dict: Any
    paths: list[Path]


def draw(seed: int) -> Case:
    """The case with this number."""
    rng = np.random.default_rng(seed)
    kind, named = list(RULES)[int(rng.integers(len(RULES)))], rng.random() < 0.5
    source = "sgd" if rng.random() < 0.3 else list(RULES)[int(rng.integers(len(RULES)))]
    state_dict: Any = deepcopy(sound(source, rng.random() < 0.5))
    paths: list[Path] = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        if isinstance(state_dict, dict | list) and state_dict:
            state_dict, changed = mangle(state_dict, rng)
            paths += changed
    return Case(kind, named, state_dict, paths)


# -- loading -------------------------------------------------------------------------------------


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    return deepcopy((optimizer.state_dict(), [p.detach() for p in parameters_of(optimizer)]))


def same(a: Any, b: Any) -> bool:
    """Whether two trees of dicts, lists, tensors and numbers hold the same bits."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def named_in(message: str, path: Path) -> bool:
    """Whether a message names the place of a change: a key on the path to it, or a parameter."""
    keys = [key.removeprefix("param_").removesuffix("s") for key in path if isinstance(key, str)]
    names = [name for name, _, _ in NAMED] + [f"{g}.{i}" for g in (0, 1) for i in (0, 1)]
    return any(word in message for word in [*(keys or ["optimizer"]), *names])


def check(case: Case) -> str:
    """Load it, and return "loaded" or "refused"; else it raises."""
    optimizer = optimizer_of(case.kind, case.named, 2)
    assert isinstance(optimizer, rmsgd.RMSGD)
    generator = torch.Generator().manual_seed(3)
    before = snapshot(optimizer)
    try:
        optimizer.load_state_dict(case.state_dict)
    except ValueError as error:
        message, outcome = str(error), "refused"
        assert "\n" not in message, message
        assert len(message) < 500, message
        assert any(named_in(message, path) for path in case.paths), message
        assert same(snapshot(optimizer), before), f"changed by what was refused: {message}"
    else:
        outcome = "loaded"
        again = optimizer_of(case.kind, case.named, 4)
        again.load_state_dict(optimizer.state_dict())
        assert again.learning_rates() == optimizer.learning_rates()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weights that a wild velocity made NaN
        train(optimizer, generator)
    rates = optimizer.learning_rates()
    assert all(rate >= -1e-8 for rate in rates.values()), rates  # a schedule's last lr may round below 0
    optimizer.report()
    return outcome
