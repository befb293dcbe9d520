"""RMSGD and the optimizers that it is compared with, each in the settings of its authors.

Learning rates and weight decay are those of the paper's code (SGD .1, Adam .0003, AdamP .01, AdaBound .01,
weight decay 1e-4, every rate but RMSGD's halved after each tenth of the run). Where that code has none, they
are those of the optimizer's own authors. Peers come from torch, from pytorch_optimizer and from the RMSGD
authors' own package. Only SLS, which no maintained package has, is written here.
"""

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from bench.errors import UnavailableError, UsageError
from bench.names import look_up
from rmsgd.extras import install_command
from rmsgd.rules import DEFAULT, RULES

CACHE = Path(__file__).parents[1] / ".out" / "peers"
RELEASE_WHEEL = "rmsgd-1.0.2-py3-none-any.whl"
RELEASE_SHA256 = "54cdf95eeaf7ee299a879c0b58ce1440b63f7e48739a0830aa5e512dc0cc65bd"
RELEASE_MODULE = "rmsgd_1_0_2"
FETCH_S = 30

Named = list[tuple[str, Parameter]]
Create = Callable[..., Optimizer]


class PeerUnavailableError(UnavailableError):
    """A peer's package is not installed and could not be fetched."""


@dataclass(frozen=True)
class Peer:
    """An optimizer, how it is made, and what the caller has to do for it.

    Attributes:
        create: makes it from a list of (name, parameter) and the settings.
        settings: the keyword arguments that its authors use.
        note: what it is, and where the settings differ from the package's defaults.
        scheduled: whether the paper halves its learning rate after each tenth of the run.
        needs_closure: whether `step` takes a function that computes the loss and the gradients anew, or only
            the loss where gradients are disabled. The gradients at the current weights must have been
            computed.
        needs_loss: whether `step` also takes the loss at the current weights.

    """

    create: Create
    settings: Mapping[str, Any]
    note: str
    scheduled: bool = True
    needs_closure: bool = False
    needs_loss: bool = False

    def take_step(self, optimizer: Optimizer, compute: Callable[[], Tensor]) -> Tensor:
        """Takes a step of `optimizer` for the loss that `compute` returns, and returns that loss before it.

        An optimizer with several passes lets its step compute the loss again.
        """

        def gradients() -> Tensor:
            loss = compute()
            if torch.is_grad_enabled():  # a line search asks for the loss alone
                optimizer.zero_grad()
                loss.backward()
            return loss

        loss = gradients().detach()
        optimizer.step(*self.step_arguments(gradients, loss))
        return loss

    def step_arguments(self, closure: Callable[[], Tensor], loss: Tensor) -> tuple[Any, ...]:
        """The arguments for its `step`, some of `closure` (see `needs_closure`) and `loss`."""
        if self.needs_loss:
            return closure, loss.detach()
        return (closure,) if self.needs_closure else ()


def _torch(name: str) -> Create:
    def create(named: Named, **settings: Any) -> Optimizer:
        return getattr(torch.optim, name)(_tensors(named), **settings)

    return create


def _collection(name: str) -> Create:
    def create(named: Named, **settings: Any) -> Optimizer:
        return getattr(_pytorch_optimizer(name), name)(_tensors(named), **settings)

    return create


def _sgd_per_layer(named: Named, **settings: Any) -> Optimizer:
    return torch.optim.SGD([{"params": [parameter]} for _, parameter in named], **settings)


def _sam(named: Named, **settings: Any) -> Optimizer:
    return _pytorch_optimizer("SAM").SAM(_tensors(named), torch.optim.SGD, **settings)


def _sls(named: Named, **settings: Any) -> Optimizer:
    from bench.sls import SLS

    return SLS(_tensors(named), **settings)


def _rmsgd(named: Named, **settings: Any) -> Optimizer:
    import rmsgd

    return rmsgd.RMSGD(named, **settings)


class LayerwiseSGD(torch.optim.SGD):
    """Torch's SGD with `rmsgd.LayerRates`: a checkpoint and an epoch end serve both.

    Rules that go by the weights as they are measure them before the training, as their authors do.
    """

    def __init__(self, named: Named, rule: str, **settings: Any) -> None:
        import rmsgd
        from rmsgd.tail_rules import TAIL_RULES

        super().__init__(rmsgd.layer_groups(named), **settings)
        self.rates = rmsgd.LayerRates(self, rule=rule)
        if rule in TAIL_RULES:
            self.rates.step()

    def epoch_step(self) -> None:
        """Measures every layer and moves its rate."""
        self.rates.step()

    def learning_rates(self) -> dict[str, float]:
        """Every parameter's rate by its name."""
        return self.rates.learning_rates()

    def state_dict(self) -> dict[str, Any]:
        """SGD's, and that of the rates."""
        return super().state_dict() | {"rates": self.rates.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "rates"})
        self.rates.load_state_dict(state_dict["rates"])


def _layerwise(rule: str) -> Create:
    return lambda named, **settings: LayerwiseSGD(named, rule, **settings)


def _release(named: Named, **settings: Any) -> Optimizer:
    return load_rmsgd_1_0_2().RMSGD(_tensors(named), **settings)


def _tensors(named: Named) -> list[Parameter]:
    return [parameter for _, parameter in named]


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
RMSGD = {"lr": 0.03, "beta": 0.98, "momentum": 0.9, "weight_decay": 1e-4}
PUBLISHED = RMSGD | {"linear": False, "gamma": 0.98, "step_size": 1}

PEERS: dict[str, Peer] = {
    "rmsgd": Peer(_rmsgd, RMSGD, f"the default: {RULES[DEFAULT].help}", scheduled=False),
    "rmsgd-paper": Peer(
        _rmsgd,
        RMSGD | {"rule": "paper", "initial_rank": "zero"},
        RULES["paper"].help,
        scheduled=False,
    ),
    "rmsgd-published": Peer(
        _rmsgd,
        PUBLISHED | {"rule": "published"},
        f"{RULES['published'].help}, in their configuration",
        scheduled=False,
    ),
    "rmsgd-release": Peer(
        _rmsgd,
        RMSGD | {"rule": "release", "linear": False},
        f"{RULES['release'].help}, by our code",
        scheduled=False,
    ),
    "rmsgd-1.0.2": Peer(
        _release,
        RMSGD | {"linear": False},
        "the authors' package itself; its default beta is .8 and its default momentum 0",
        scheduled=False,
    ),
    "sgd": Peer(_torch("SGD"), SGD, "torch's SGD with torch's choice of loop"),
    "sgd-single": Peer(_torch("SGD"), SGD | {"foreach": False}, "torch's SGD, one tensor after the other"),
    "sgd-foreach": Peer(_torch("SGD"), SGD | {"foreach": True}, "torch's SGD, lists of tensors at once"),
    "sgd-fused": Peer(_torch("SGD"), SGD | {"fused": True}, "torch's SGD, one kernel"),
    "sgd-per-layer": Peer(_sgd_per_layer, SGD, "torch's SGD with one parameter group per tensor"),
    **{
        f"sgd-{rule}": Peer(_layerwise(rule), SGD, f"torch's SGD with the rates of rmsgd.LayerRates, {rule}")
        for rule in ("rank-momentum", "tempbalance", "llr")
    },
    "sam": Peer(
        _sam,
        SGD | {"rho": 0.05},
        "sharpness-aware minimisation over torch's SGD: two passes per step",
        needs_closure=True,
    ),
    "sgdp": Peer(
        _collection("SGDP"), SGD | {"nesterov": True}, "projected SGD; the package's default momentum is 0"
    ),
    "adam": Peer(_torch("Adam"), {"lr": 3e-4, "weight_decay": 1e-4}, "torch's Adam"),
    "adamw": Peer(
        _torch("AdamW"), {"lr": 3e-3, "weight_decay": 1e-2}, "torch's AdamW; its default rate is 1e-3"
    ),
    "adamp": Peer(_collection("AdamP"), {"lr": 0.01, "weight_decay": 1e-4}, "projected Adam"),
    "adagrad": Peer(_torch("Adagrad"), {"lr": 0.01, "weight_decay": 1e-4}, "torch's AdaGrad"),
    "adabelief": Peer(
        _collection("AdaBelief"),
        {"lr": 1e-3, "eps": 1e-8, "weight_decay": 1e-4, "weight_decouple": False, "rectify": False},
        "as its authors train CIFAR: coupled weight decay, eps 1e-8, not rectified; "
        "their package rectifies by default",
    ),
    "sls": Peer(
        _sls,
        {"lr": 1.0, "c": 0.1, "backtrack": 0.9, "gamma": 2.0},
        "stochastic line search (Armijo) in the settings of its authors' code",
        scheduled=False,
        needs_closure=True,
        needs_loss=True,
    ),
    "adabound": Peer(
        _collection("AdaBound"),
        {"lr": 0.01, "final_lr": 0.1, "weight_decay": 1e-4, "weight_decouple": False},
        "weight decay coupled as in its authors' code; the package decouples it by default",
    ),
}


def peer(name: str) -> Peer:
    """The peer called `name`; raises UsageError with a suggestion when there is none."""
    return look_up("optimizer", name, PEERS)


def make(
    name: str,
    named_parameters: Iterable[tuple[str, Parameter]],
    *,
    steps: int | None = None,
    **overrides: Any,
) -> Optimizer:
    """Makes the optimizer called `name` for `module.named_parameters()`.

    Args:
        name: a key of `PEERS`.
        named_parameters: (name, parameter) pairs; those that need no gradient are left out.
        steps: the number of steps in an epoch, over which SLS's step size recovers; None leaves the authors'
            number.
        overrides: settings that replace or extend the authors'.

    Raises:
        UsageError: the name is unknown, or the optimizer refuses a setting.
        PeerUnavailableError: its package is missing and cannot be fetched.

    """
    known = peer(name)
    trained = [(key, parameter) for key, parameter in named_parameters if parameter.requires_grad]
    by_epoch = {"batches_per_epoch": steps} if name == "sls" and steps is not None else {}
    try:
        return known.create(trained, **{**known.settings, **by_epoch, **overrides})
    except (TypeError, ValueError) as error:
        if not overrides:
            raise
        raise UsageError(f"{name} refuses its settings: {error}") from error


def schedule(name: str, optimizer: Optimizer, epochs: int) -> StepLR | None:
    """The schedule that halves the rate of the optimizer called `name`; None where the paper uses none.

    The paper's StepLR halves every 25 epochs of 250. In a run of `epochs` epochs it halves after each tenth,
    rounded up to whole epochs.
    """
    return StepLR(optimizer, math.ceil(epochs / 10), 0.5) if peer(name).scheduled else None


def reference(optimizers: Sequence[str]) -> str:
    """The optimizer whose epoch time counts as 1: SGD where it takes part, else the first."""
    return "sgd" if "sgd" in optimizers else optimizers[0]


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and the optimizer inside it (SAM's) whose state is not part of its own."""
    inner = getattr(optimizer, "base_optimizer", None)
    return [optimizer] if inner is None else [optimizer, inner]


def load_rmsgd_1_0_2() -> ModuleType:
    """The authors' package, imported as `rmsgd_1_0_2` so that it does not replace this one.

    It is fetched once, with pip and without its dependencies, checked against its known digest and
    unpacked into `.out/peers/` of the checkout. A process tries to fetch it once, for a short time.

    Raises:
        PeerUnavailableError: pip could not fetch it, or the file has another digest.

    """
    if RELEASE_MODULE in sys.modules:
        return sys.modules[RELEASE_MODULE]
    package = CACHE / "rmsgd-1.0.2" / "rmsgd"
    if not package.is_dir():
        reason = _fetch_release(package.parent)
        if reason is not None:
            raise PeerUnavailableError(reason)
    spec = importlib.util.spec_from_file_location(RELEASE_MODULE, package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[RELEASE_MODULE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[RELEASE_MODULE]
        raise
    return module


@cache
def _fetch_release(target: Path) -> str | None:
    """Puts the authors' package into `target`. Returns the reason if that failed, else None."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        # Without a network pip would try again for minutes.
        command += ["--retries", "0", "--timeout", "5", "rmsgd==1.0.2", "--dest", folder]
        failed = "rmsgd 1.0.2, the authors' package, could not be fetched"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False)
        except subprocess.TimeoutExpired:
            return f"{failed}: pip took more than {FETCH_S} s"
        wheel = Path(folder) / RELEASE_WHEEL
        if not wheel.is_file():
            return f"{failed}: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1]}"
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != RELEASE_SHA256:
            return f"{RELEASE_WHEEL} is not the known file: its SHA-256 is {digest}"
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        try:
            os.replace(unpacked, target)
        except OSError:
            # Another process was quicker, and its files are the same.
            if not target.is_dir():
                raise
    return None


def _pytorch_optimizer(peer: str) -> ModuleType:
    try:
        import pytorch_optimizer
    except ImportError as error:
        message = f"{peer} needs pytorch_optimizer: {install_command('bench')}"
        raise PeerUnavailableError(message) from error
    return pytorch_optimizer
