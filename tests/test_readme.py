"""Every Python block of the README runs, and does what the lines around it say."""

import logging
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rmsgd
from bench.models.gpt import GPT

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

BLOCKS = {
    re.findall(r"^(?:## (.+)|\*\*(.+?):?\*\*.*)$", TEXT[: match.start()], re.M)[-1]: match[1]
    for match in re.finditer(r"^```python\n(.+?)^```$", TEXT, re.M | re.S)
}
BLOCKS = {section or paragraph: code for (section, paragraph), code in BLOCKS.items()}

EPOCHS = 3


def run(block, **names):
    """The names that a block of the README leaves behind, run with these given."""
    namespace = {"rmsgd": rmsgd, "torch": torch, "epochs": EPOCHS, "loss_function": cross_entropy} | names
    exec(compile(BLOCKS[block], f"README.md: {block}", "exec"), namespace)
    return namespace


def network():
    """A first layer with a low-rank part, whose rate goes up, and a last one without."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight += 0.5
    return model


def samples():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return list(zip(x, torch.arange(20) % 3, strict=True))


def batches():
    return torch.utils.data.DataLoader(samples(), batch_size=4)


def assert_ended(optimizer, epochs=EPOCHS):
    """So many epochs of RMSGD's were ended; a schedule may have taken the rates applied to 0 by now."""
    states = optimizer.state_dict()["state"].values()
    assert {state["epoch"] for state in states} == {epochs}
    etas = [state["rate"] for state in states]
    assert min(etas) < 0.03 < max(etas)


def test_no_block_is_left_out():
    tested = {"In your script", "Lightning", "Hugging Face Trainer", "Accelerate", "timm", "TensorBoard"}
    assert set(BLOCKS) == tested | {"Without epochs", "A speed gate for CI"}


def test_in_your_script(capsys):
    model = network()
    names = run("In your script", model=model, batches=batches())
    assert_ended(names["optimizer"])
    *rates, quality = capsys.readouterr().out.splitlines()
    assert len(rates) == EPOCHS
    assert float(quality) == names["optimizer"].report().quality


def test_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return cross_entropy(self.net(batch[0]), batch[1])

    names = run("Lightning", lightning=lightning, model=Lit(), batches=batches())
    assert_ended(names["trainer"].optimizers[0])


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            return {"loss": cross_entropy(self.net(x), labels)}

    names = run(
        "Hugging Face Trainer",
        transformers=transformers,
        model=Model(),
        dataset=[{"x": x, "labels": y} for x, y in samples()],
        arguments=transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=EPOCHS, use_cpu=True, report_to=[], disable_tqdm=True
        ),
    )
    assert_ended(names["optimizer"])
    assert sum("quality" in row for row in names["trainer"].state.log_history) == EPOCHS


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "list", False, None

        def store_init_configuration(self, values): ...

        def log(self, values, step=None, **_):
            logged.append((step, values["quality"]))

    model, logged = network(), []
    try:
        accelerator = accelerate.Accelerator(cpu=True, log_with=Tracker())
        accelerator.init_trackers("readme")
        names = run(
            "Accelerate",
            accelerator=accelerator,
            model=model,
            optimizer=rmsgd.RMSGD(model.named_parameters()),
            batches=batches(),
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert_ended(names["optimizer"].optimizer)
    assert [step for step, _ in logged] == list(range(EPOCHS))


def test_timm(timm):
    model = timm.create_model("resnet10t", num_classes=3)
    optimizer = run("timm", timm=timm, model=model)["optimizer"]
    assert type(optimizer) is rmsgd.RMSGD
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-4]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    optimizer = rmsgd.RMSGD(network().named_parameters())
    optimizer.epoch_step()
    with SummaryWriter(tmp_path) as writer:
        run("TensorBoard", writer=writer, optimizer=optimizer, epoch=0, log_dict=rmsgd.integrations.log_dict)
    assert list(tmp_path.glob("events*"))


def test_without_epochs_a_small_transformer_learns_and_its_rates_move():
    torch.manual_seed(0)
    text = torch.arange(1000) * 5 % 16  # to be continued by whoever has seen the one before
    model = GPT(classes=16, width=1 / 6)  # 6 layers of 64 channels
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.05)
    losses, rates = [], []

    def loss_of(logits, tokens):
        loss = cross_entropy(logits, tokens)
        losses.append(loss.item())
        return loss

    def random_batches():
        for step in range(101):
            if step % 50 == 0:
                rates.append(optimizer.learning_rates())
            yield text[torch.randint(len(text) - 16, (4, 1)) + torch.arange(16)]

    run("Without epochs", model=model, optimizer=optimizer, cross_entropy=loss_of, batches=random_batches())
    assert sum(losses[-10:]) < sum(losses[:10]) / 10
    for before, after in pairwise(rates):
        assert all(before[name] != after[name] for name in before)
    assert len(set(rates[-1].values())) > 10


def test_a_speed_gate_for_ci():
    from bench.gate.cases import sgd

    model, (x, y) = network(), next(iter(batches()))
    names = run("A speed gate for CI", model=model, x=x, y=y)
    for make_optimizer in (rmsgd.RMSGD, sgd):
        before = model[0].weight.detach().clone()
        names["training_step"](make_optimizer)()
        assert not torch.equal(before, model[0].weight)
