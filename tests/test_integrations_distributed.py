"""RMSGD in trainers of two processes: every rank ends its epochs, and all hold the same rates and weights.

Every function called through ``job.run`` runs on all ranks.
"""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from jobs import Counting, Job
from torch import nn
from trainers import EPOCHS, SAMPLES, HfModel, import_torchvision, lit_model, lit_trainer, network

import rmsgd
from bench.epoch_end import spectra
from rmsgd.integrations import unwrap

MATRICES = len(spectra(network()))


@pytest.fixture(scope="module")
def job():
    job = Job(2)
    yield job
    job.close()


def samples():
    """Samples that all differ, so that each rank has gradients of its own."""
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(SAMPLES)]


def batches(batch):
    return torch.utils.data.DataLoader(samples(), batch_size=batch)


def make_optimizer(parameters, lr, shared):
    return rmsgd.RMSGD(parameters, lr=lr, process_group=dist.group.WORLD if shared else None)


def under_lightning(shared, folder):
    lightning = importlib.import_module("lightning.pytorch")
    from rmsgd.integrations.lightning import EpochStep

    model = lit_model(lightning, lambda parameters, lr: make_optimizer(parameters, lr, shared))
    trainer = lit_trainer(lightning, folder, [EpochStep()], devices=2, strategy="ddp")
    trainer.fit(model, batches(2))
    return trainer.optimizers[0], model.net


def under_hugging_face(shared, folder):
    transformers = importlib.import_module("transformers")
    from rmsgd.integrations.transformers import EpochStep

    model = HfModel()
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        num_train_epochs=EPOCHS,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    optimizer = make_optimizer(model.named_parameters(), 0.03, shared)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples(), optimizers=(optimizer, None), callbacks=[EpochStep()]
    )
    trainer.train()
    return trainer.optimizer, model.net


def under_accelerate(shared, folder):
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    model = network()
    optimizer = make_optimizer(model.named_parameters(), 0.03, shared)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, batches(2))
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(wrapped(batch["x"]), batch["labels"]))
            optimizer.step()
        optimizer.optimizer.epoch_step()
    return optimizer, model


TRAINERS = {"lightning": under_lightning, "transformers": under_hugging_face, "accelerate": under_accelerate}


def train(name, shared, folder):
    import_torchvision()
    with Counting() as counting:
        optimizer, model = TRAINERS[name](shared, folder)
    inner = unwrap(optimizer)
    epochs = {state["epoch"] for state in inner.state.values()}
    return {
        "epochs": epochs,
        "matrices": counting.count,
        "rates": inner.learning_rates(),
        "weights": [p.detach().clone() for p in model.parameters()],
    }


@pytest.mark.parametrize("name", TRAINERS)
def test_every_rank_of_a_trainer_ends_the_epochs_and_all_hold_the_same_rates(job, tmp_path, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    rates = []
    for shared, copies in ((True, 1), (False, 2)):
        ours, theirs = job.run(train, name, shared, str(tmp_path))
        assert ours["epochs"] == theirs["epochs"] == {EPOCHS}
        # The weights are measured at the first step too.
        assert ours["matrices"] + theirs["matrices"] == (1 + EPOCHS) * copies * MATRICES
        assert ours["rates"] == theirs["rates"]
        assert all(map(torch.equal, ours["weights"], theirs["weights"]))
        rates.append(ours["rates"])
    assert rates[0] == rates[1]
