"""Epochs of RMSGD and of LayerRates end when those of a trainer do, once each, also after a resume."""

import copy
import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from trainers import (
    BATCH,
    EPOCHS,
    STEPS,
    HfModel,
    data,
    lit_model,
    lit_trainer,
    loader,
    network,
)

import rmsgd
from rmsgd.integrations import log_dict, rates_of, unwrap
from rmsgd.tail_rules import LLR

NEITHER = r"an rmsgd\.RMSGD optimizer or one with rmsgd\.LayerRates is needed, got "


@pytest.fixture
def epoch_ends(monkeypatch):
    """How many steps had been taken when ``epoch_step`` was called, for every call."""
    steps, ends = [0], []
    step, epoch_step = rmsgd.RMSGD.step, rmsgd.RMSGD.epoch_step

    def counted(self, *arguments, **options):
        steps[0] += 1
        return step(self, *arguments, **options)

    def noted(self):
        ends.append(steps[0])
        epoch_step(self)

    monkeypatch.setattr(rmsgd.RMSGD, "step", counted)
    monkeypatch.setattr(rmsgd.RMSGD, "epoch_step", noted)
    return ends


@pytest.fixture
def with_rates(monkeypatch):
    """A function that makes AdamW with LayerRates; its ``ends`` are as ``epoch_ends``.

    Rates move to new ones within three steps, so that a checkpoint may be on the way.
    """
    steps, ends = [0], []
    measure = rmsgd.LayerRates.step

    def noted(self):
        ends.append(steps[0])
        measure(self)

    def counted(*_):
        steps[0] += 1

    def make(parameters, lr):
        optimizer = torch.optim.AdamW(rmsgd.layer_groups(parameters), lr=lr)
        optimizer.register_step_post_hook(counted)
        rmsgd.LayerRates(optimizer, rule=replace(LLR, least_values=0), transition=3)
        return optimizer

    monkeypatch.setattr(rmsgd.LayerRates, "step", noted)
    make.ends = ends
    return make


def state_of(optimizer):
    """Everything that a bit-for-bit resume has to bring back."""
    return copy.deepcopy(unwrap(optimizer).state_dict()["state"])


def assert_same_runs(a, b):
    """Two optimizers with LayerRates, of which one was resumed, have come to the same."""
    assert rates_of(a).state_dict() == rates_of(b).state_dict()
    assert len({state["rate"] for state in rates_of(a).state_dict()["state"]}) > 1
    assert_same_states(a.state_dict()["state"], b.state_dict()["state"])


def assert_same_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        for name in a[key]:
            x, y = a[key][name], b[key][name]
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, name


# -- without a framework -------------------------------------------------------------------------


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_wrappers_are_looked_through_and_other_optimizers_named():
    model = network()
    optimizer = rmsgd.RMSGD(model.parameters())
    assert unwrap(Wrapper(Wrapper(optimizer))) is optimizer
    with pytest.raises(TypeError, match=r"an rmsgd\.RMSGD optimizer is needed, got Wrapper around SGD"):
        unwrap(Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(TypeError, match="got NoneType"):
        unwrap(None)


def test_what_moves_the_rates_is_found_by_the_optimizer_its_wrappers_and_itself():
    model = network()
    ours = rmsgd.RMSGD(model.parameters())
    other = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=0.1)
    with pytest.raises(TypeError, match=f"{NEITHER}Wrapper around SGD"):
        rates_of(Wrapper(other))
    with pytest.raises(TypeError, match=f"{NEITHER}NoneType"):
        log_dict(None)
    rates = rmsgd.LayerRates(other)
    assert rates_of(Wrapper(ours)) is ours
    assert rates_of(Wrapper(other)) is rates_of(other) is rates_of(rates) is rates
    later = rmsgd.LayerRates(other)
    assert rates_of(other) is later
    assert log_dict(Wrapper(other)) == log_dict(later)


def test_a_log_is_flat_numbers_and_has_metrics_from_the_first_epoch_end_on():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.05)
    names = [name for name, _ in model.named_parameters()]
    assert log_dict(Wrapper(optimizer)) == {f"learning_rate/{name}": 0.05 for name in names}
    optimizer.epoch_step()
    values = log_dict(optimizer)
    assert all(type(value) is float for value in values.values())
    assert values["quality"] == optimizer.report().quality
    assert values["stable_rank/0.weight"] == optimizer.report().layers[0].stable_rank
    assert values["learning_rate/2.bias"] == optimizer.learning_rates()["2.bias"]
    metrics = ("stable_rank", "condition_number", "quality")
    layers = [f"{metric}/{name}" for metric in metrics for name in ("0.weight", "2.weight")]
    assert set(values) == {f"learning_rate/{name}" for name in names} | set(layers) | {"quality"}


def test_a_layer_that_was_not_measured_is_left_out_of_the_log():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    model[0].weight.data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"0\.weight"):
        optimizer.epoch_step()
    values = log_dict(optimizer)
    assert "stable_rank/0.weight" not in values
    assert "stable_rank/2.weight" in values
    assert "learning_rate/0.weight" in values


def test_tensorboard_takes_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    optimizer = rmsgd.RMSGD(network().named_parameters())
    logged = []
    with SummaryWriter(tmp_path) as writer:
        for epoch in range(2):
            optimizer.epoch_step()
            logged.append(log_dict(optimizer))
            for name, value in logged[-1].items():
                writer.add_scalar(name, value, epoch)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(logged[0])
    for name in logged[0]:
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [(epoch, pytest.approx(values[name])) for epoch, values in enumerate(logged)]


def test_importing_rmsgd_imports_no_framework():
    frameworks = ("lightning", "pytorch_lightning", "transformers", "accelerate", "timm", "tensorboard")
    code = f"import sys, rmsgd.integrations; print([m for m in {frameworks} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- Lightning -----------------------------------------------------------------------------------


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request):
    return pytest.importorskip(request.param)


@pytest.fixture
def lit_epoch_step(lightning):
    from rmsgd.integrations.lightning import EpochStep

    return EpochStep


pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|pytorch_lightning)"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [5, 10, 15]),
        ({"accumulate_grad_batches": 2}, [3, 6, 9]),
        ({"limit_train_batches": 3}, [3, 6, 9]),
        ({"max_epochs": -1, "max_steps": 7}, [5]),
        ({"check_val_every_n_epoch": 2}, [5, 10, 15]),
    ],
)
def test_lightning_ends_an_epoch_after_its_last_step(
    lightning, lit_epoch_step, epoch_ends, tmp_path, options, expected
):
    trainer = lit_trainer(lightning, tmp_path, [lit_epoch_step()], **options)
    trainer.fit(lit_model(lightning), loader())
    assert epoch_ends == expected


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [4, 8, 12]), (2, [4, 8])])
def test_lightning_ends_one_every_n_steps_however_many_batches_they_take(
    lightning, lit_epoch_step, epoch_ends, tmp_path, accumulate, expected
):
    trainer = lit_trainer(lightning, tmp_path, [lit_epoch_step(4)], accumulate_grad_batches=accumulate)
    trainer.fit(lit_model(lightning), loader())
    assert epoch_ends == expected


def test_lightning_validates_after_the_epoch_end(lightning, lit_epoch_step, tmp_path):
    model = lit_model(lightning)
    lit_trainer(lightning, tmp_path, [lit_epoch_step()]).fit(model, loader(), loader(BATCH))
    assert model.validated_after == [1, 2, 3]


@pytest.mark.parametrize(
    ("when", "every"),
    [
        ({"every_n_epochs": 1}, None),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, None),
        ({"every_n_train_steps": 5}, None),
        ({"every_n_train_steps": 8}, 4),
        ({"every_n_train_steps": 6}, 4),
    ],
)
def test_lightning_resumes_bit_for_bit(lightning, lit_epoch_step, epoch_ends, tmp_path, when, every):
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **when)
    model = lit_model(lightning)
    callbacks = [checkpoint, lit_epoch_step(every)]
    trainer = lit_trainer(lightning, tmp_path, callbacks, enable_checkpointing=True)
    trainer.fit(model, loader(), loader(BATCH))
    expected, ends = state_of(trainer.optimizers[0]), list(epoch_ends)
    first = when.get("every_n_train_steps", STEPS)
    resumed = lit_trainer(lightning, tmp_path, [lit_epoch_step(every)])
    resumed.fit(lit_model(lightning), loader(), loader(BATCH), ckpt_path=str(tmp_path / f"step={first}.ckpt"))
    assert resumed.global_step == EPOCHS * STEPS
    assert len(epoch_ends) - len(ends) == len([at for at in ends if at > first])
    assert_same_states(state_of(resumed.optimizers[0]), expected)


def test_lightning_logs_to_its_loggers(lightning, lit_epoch_step, tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path, name="", version="")
    trainer = lit_trainer(lightning, tmp_path, [lit_epoch_step()], logger=logger)
    trainer.fit(lit_model(lightning), loader())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10", "15"]
    expected = log_dict(trainer.optimizers[0])
    assert {name: float(rows[-1][name]) for name in expected} == pytest.approx(expected)


def test_lightning_with_another_optimizer_is_an_error_when_training_starts(
    lightning, lit_epoch_step, tmp_path
):
    trainer = lit_trainer(lightning, tmp_path, [lit_epoch_step()])
    with pytest.raises(TypeError, match=f"{NEITHER}SGD"):
        trainer.fit(lit_model(lightning, torch.optim.SGD), loader())


@pytest.mark.parametrize(("every", "expected"), [(None, [5, 10, 15]), (4, [4, 8, 12])])
def test_lightning_finds_layer_rates_and_logs_them(
    lightning, lit_epoch_step, with_rates, tmp_path, every, expected
):
    logger = lightning.loggers.CSVLogger(tmp_path, name="", version="")
    trainer = lit_trainer(lightning, tmp_path, [lit_epoch_step(every)], logger=logger)
    trainer.fit(lit_model(lightning, with_rates), loader())
    assert with_rates.ends == expected
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == expected
    assert float(rows[-1]["alpha/0.weight"]) > 1.0


@pytest.mark.parametrize(("at", "every"), [(5, None), (6, 4)])
def test_lightning_resumes_layer_rates_bit_for_bit(
    lightning, lit_epoch_step, with_rates, tmp_path, at, every
):
    checkpoint = lightning.callbacks.ModelCheckpoint(
        tmp_path, save_top_k=-1, filename="{step}", every_n_train_steps=at
    )
    callbacks = [checkpoint, lit_epoch_step(every)]
    trainer = lit_trainer(lightning, tmp_path, callbacks, enable_checkpointing=True)
    trainer.fit(lit_model(lightning, with_rates), loader())
    ends = list(with_rates.ends)
    resumed = lit_trainer(lightning, tmp_path, [lit_epoch_step(every)])
    path = tmp_path / f"step={at}.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["EpochStep"]["rates"][0]
    assert saved["transition"] == {"steps": 3, "taken": 0 if at == 5 else 2}
    resumed.fit(lit_model(lightning, with_rates), loader(), ckpt_path=str(path))
    assert len(with_rates.ends) - len(ends) == len([end for end in ends if end > at])
    assert_same_runs(resumed.optimizers[0], trainer.optimizers[0])


def test_lightning_names_what_does_not_fit_in_the_state_of_layer_rates(
    lightning, lit_epoch_step, with_rates, tmp_path
):
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}")
    trainer = lit_trainer(lightning, tmp_path, [checkpoint, lit_epoch_step()], enable_checkpointing=True)
    trainer.fit(lit_model(lightning, with_rates), loader())

    def another_rule(parameters, lr):
        optimizer = with_rates(parameters, lr)
        rmsgd.LayerRates(optimizer)
        return optimizer

    resumed = lit_trainer(lightning, tmp_path, [lit_epoch_step()], max_epochs=4)
    with pytest.raises(ValueError, match="the checkpoint is of the rule 'llr'"):
        resumed.fit(
            lit_model(lightning, another_rule), loader(), ckpt_path=str(next(tmp_path.glob("*.ckpt")))
        )


@pytest.mark.parametrize("every", [0, -1, 1.5, "2"])
def test_an_interval_that_is_no_positive_number_is_refused(lit_epoch_step, every):
    with pytest.raises(ValueError, match="every_n_steps must be a positive whole number or None"):
        lit_epoch_step(every)


# -- Hugging Face Trainer ------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """Data without a length."""

    def __iter__(self):
        return iter(data())


@pytest.fixture
def hf_trainer(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from rmsgd.integrations.transformers import EpochStep

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def make(every=None, optimizer=rmsgd.RMSGD, dataset=None, **options):
        model = HfModel()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{"save_strategy": "no", "logging_strategy": "no"} | options,
        )
        return transformers.Trainer(
            model,
            arguments,
            train_dataset=data() if dataset is None else dataset,
            optimizers=(optimizer(model.named_parameters(), lr=0.03), None),
            callbacks=[EpochStep(every)],
        )

    return make


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [5, 10, 15]),
        ({"gradient_accumulation_steps": 2}, [3, 6, 9]),
        ({"max_steps": 7}, [5]),
        ({"every": 4}, [4, 8, 12]),
        ({"every": 4, "gradient_accumulation_steps": 2}, [4, 8]),
        ({"dataset": Stream(), "max_steps": 12}, [5, 10]),
    ],
)
def test_the_hugging_face_trainer_ends_epochs(hf_trainer, epoch_ends, options, expected):
    hf_trainer(**options).train()
    assert epoch_ends == expected


@pytest.mark.parametrize(
    ("every", "options"),
    [
        (None, {"save_strategy": "epoch"}),
        (None, {"save_steps": 5}),
        (4, {"save_steps": 8}),
        (4, {"save_steps": 6}),
    ],
)
def test_the_hugging_face_trainer_resumes_bit_for_bit(hf_trainer, epoch_ends, tmp_path, every, options):
    options = {"save_strategy": "steps"} | options
    trainer = hf_trainer(every, **options)
    trainer.train()
    expected, ends = state_of(trainer.optimizer), list(epoch_ends)
    first = options.get("save_steps", STEPS)
    resumed = hf_trainer(every, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{first}"))
    assert len(epoch_ends) - len(ends) == len([at for at in ends if at > first])
    assert_same_states(state_of(resumed.optimizer), expected)


def test_the_hugging_face_trainer_takes_the_log(hf_trainer):
    trainer = hf_trainer()
    from rmsgd.integrations.transformers import EpochStep

    trainer.pop_callback(EpochStep)
    trainer.add_callback(EpochStep(log=trainer.log))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "quality" in row]
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert [row["epoch"] for row in rows] == [1.0, 2.0, 3.0]
    assert "stable_rank/net.0.weight" in rows[0]


def test_the_hugging_face_trainer_with_another_optimizer_is_an_error_when_training_starts(hf_trainer):
    with pytest.raises(TypeError, match=f"{NEITHER}AcceleratedOptimizer around SGD"):
        hf_trainer(optimizer=torch.optim.SGD).train()


@pytest.mark.parametrize(
    ("at", "every", "options"),
    [(5, None, {}), (6, 4, {}), (6, 4, {"restore_callback_states_from_checkpoint": True})],
)
def test_the_hugging_face_trainer_resumes_layer_rates_bit_for_bit(
    hf_trainer, with_rates, tmp_path, at, every, options
):
    options = {"save_strategy": "steps", "save_steps": at, "optimizer": with_rates} | options
    trainer = hf_trainer(every, **options)
    trainer.train()
    ends = list(with_rates.ends)
    assert ends == ([5, 10, 15] if every is None else [4, 8, 12])
    resumed = hf_trainer(every, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert len(with_rates.ends) - len(ends) == len([end for end in ends if end > at])
    assert_same_runs(resumed.optimizer.optimizer, trainer.optimizer.optimizer)


def test_the_hugging_face_trainer_saves_on_after_a_checkpoint_without_the_callback(hf_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    hf_trainer(**options).train()
    path = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["EpochStep"]
    path.write_text(json.dumps(state))
    resumed = hf_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.state.global_step == EPOCHS * STEPS


# -- Accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated(accelerator, epochs=range(EPOCHS), before=None):
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    if before is not None:
        accelerator.load_state(before)
    for _ in epochs:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        optimizer.optimizer.epoch_step()
    return optimizer


def test_accelerate_equals_a_plain_loop(accelerator, epoch_ends):
    wrapped = accelerated(accelerator())
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)
    for _ in range(EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
            optimizer.step()
        optimizer.epoch_step()
    assert epoch_ends == [5, 10, 15, 20, 25, 30]
    assert unwrap(wrapped).learning_rates() == optimizer.learning_rates()
    assert_same_states(state_of(wrapped), state_of(optimizer))


def test_accelerate_steps_once_for_all_batches_that_it_accumulates(accelerator, epoch_ends):
    accelerated(accelerator(gradient_accumulation_steps=2))
    assert epoch_ends == [3, 6, 9]


def test_accelerate_resumes_bit_for_bit(accelerator, tmp_path):
    ours = accelerator()
    accelerated(ours, range(2))
    ours.save_state(str(tmp_path))
    ours.free_memory()
    expected = accelerated(ours)
    ours.free_memory()
    resumed = accelerated(ours, range(2, EPOCHS), before=str(tmp_path))
    assert_same_states(state_of(resumed), state_of(expected))


def test_accelerate_resumes_layer_rates_bit_for_bit(accelerator, with_rates, tmp_path):
    def train(epochs, before=None, after=None):
        ours = accelerator()
        model = network()
        model, optimizer, batches = ours.prepare(model, with_rates(model.named_parameters(), 0.03), loader())
        rates = rates_of(optimizer)
        ours.register_for_checkpointing(rates)
        if before is not None:
            ours.load_state(before)
        for _ in epochs:
            for batch in batches:
                ours.backward(nn.functional.cross_entropy(model(batch["x"]), batch["labels"]))
                optimizer.step()
                optimizer.zero_grad()
            rates.step()
        if after is not None:
            ours.save_state(after)
        ours.free_memory()
        return optimizer.optimizer

    train(range(2), after=str(tmp_path))
    assert_same_runs(train(range(2, EPOCHS), before=str(tmp_path)), train(range(EPOCHS)))


# -- timm ----------------------------------------------------------------------------------------


def test_timm_makes_one_by_name_and_its_schedulers_multiply_the_rates(timm):
    model = timm.create_model("resnet10t", num_classes=3)
    optimizer = timm.optim.create_optimizer_v2(model, "rmsgd", lr=0.03, weight_decay=1e-4, beta=0.97)
    assert type(optimizer) is rmsgd.RMSGD
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-4]
    assert {group["beta"] for group in optimizer.param_groups} == {0.97}
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=0.003)
    assert list(optimizer.learning_rates().values()) == pytest.approx([0.003] * len(optimizer.state))
    optimizer.epoch_step()
    warming = list(optimizer.learning_rates().values())
    scheduler.step(1)
    lr = optimizer.param_groups[0]["lr"]
    assert list(optimizer.learning_rates().values()) == pytest.approx([rate * lr / 0.003 for rate in warming])


def test_timm_decays_rates_by_depth(timm):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, img_size=32)
    optimizer = timm.optim.create_optimizer_v2(model, "rmsgd", lr=0.04, layer_decay=0.5)
    timm.scheduler.CosineLRScheduler(optimizer, t_initial=4).step(0)
    assert set(optimizer.learning_rates().values()) == {0.04, 0.02, 0.01, 0.005}


def test_an_optimizer_of_timms_factory_takes_layer_rates(timm):
    model = timm.create_model("resnet10t", num_classes=3)
    groups = rmsgd.layer_groups(timm.optim.param_groups_weight_decay(model, 0.05))
    optimizer = timm.optim.create_optimizer_v2(groups, "adamw", lr=1e-3)
    rates = rmsgd.LayerRates(optimizer, rule="tempbalance")
    rates.step()
    assert len(set(rates.learning_rates().values())) > 1
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
