"""A small network, its data, and the models that trainers need, for the tests of `rmsgd.integrations`."""

import importlib
import importlib.util

import torch
from matrices import planted
from torch import nn

import rmsgd
from rmsgd.integrations import unwrap

SAMPLES, BATCH, EPOCHS = 20, 4, 3
STEPS = SAMPLES // BATCH


def network():
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))


def data(samples=SAMPLES):
    """Data whose batches are all the same, since not every trainer finds its place again after a resume."""
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": x[i % BATCH], "labels": torch.tensor(i % BATCH % 3)} for i in range(samples)]


def loader(samples=SAMPLES):
    return torch.utils.data.DataLoader(data(samples), batch_size=BATCH)


def lit_model(lightning, optimizer=rmsgd.RMSGD):
    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.validated_after = []

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])

        def validation_step(self, batch, _):
            optimizer = self.optimizers()
            if isinstance(unwrap(optimizer), rmsgd.RMSGD):
                epochs = {state["epoch"] for state in unwrap(optimizer).state.values()}
                self.validated_after += epochs if not self.trainer.sanity_checking else []

        def configure_optimizers(self):
            return optimizer(self.net.named_parameters(), lr=0.03)

    return Lit()


def lit_trainer(lightning, folder, callbacks, **options):
    options = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False} | options
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


class HfModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def import_torchvision():
    """Make torchvision importable if its compiled half is for a torch with CUDA and this torch has none.

    timm imports it, and other packages do if they find it. No test calls its operators.
    """
    if importlib.util.find_spec("torchvision") is None or torch.version.cuda is not None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
