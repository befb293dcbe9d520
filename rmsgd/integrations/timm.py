"""RMSGD among timm's optimizers."""

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from rmsgd.optim.optimizer import RMSGD


def register() -> None:
    """Make ``timm.optim.create_optimizer_v2(model, "rmsgd", ...)`` return an RMSGD optimizer.

    You still call its ``epoch_step`` at epoch ends, since no scheduler of timm does.
    """
    default_registry.register(
        OptimInfo(
            name="rmsgd",
            opt_class=RMSGD,
            description="SGD with momentum whose learning rate follows each layer's stable rank",
            has_eps=False,
            has_momentum=True,
        )
    )
