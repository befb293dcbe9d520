"""LayerRates goes on from a checkpoint, and composes with AMP, torch.compile and several processes."""

import io
import pickle
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from jobs import SHARDS_ON_CPU, Counting, Job
from test_layer_rates import LR, gradients, moved, network, shift
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler as schedulers

import rmsgd


def make(**options):
    model = network()
    optimizer = torch.optim.AdamW(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    rates = rmsgd.LayerRates(optimizer, **options)
    return model, optimizer, schedulers.OneCycleLR(optimizer, 0.1, total_steps=20), rates


def run(job, begin, end):
    model, optimizer, scheduler, rates = job
    for t in range(begin, end):
        gradients(model, t)
        optimizer.step()
        scheduler.step()
        if t % 2:
            shift(model, 0.3)
            rates.step()


# -- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:learning rates have grown")  # under the letter
@pytest.mark.parametrize("rule", ["rank-momentum", "paper", "release"])
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(rule):
    whole, first, second = make(rule=rule), make(rule=rule), make(rule=rule)
    run(whole, 0, 12)
    run(first, 0, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert second[-1].learning_rates() == first[-1].learning_rates()
    run(second, 5, 12)
    assert all(map(torch.equal, second[0].parameters(), whole[0].parameters()))
    assert second[-1].learning_rates() == whole[-1].learning_rates()
    assert second[-1].state_dict() == whole[-1].state_dict()


def test_a_checkpoint_is_plain_and_its_options_count():
    *_, rates = make(beta=0.5, zeta=2.0)
    saved = rates.state_dict()
    assert saved["rule"] == "bounded"
    own = {"beta": 0.5, "zeta": 2.0, "linear": True, "initial_rank": "measure", "transition": None}
    assert saved["options"] == own
    assert saved["names"][:2] == ["0.weight", "0.bias"]
    assert all(type(value) in (int, float, bool) for state in saved["state"] for value in state.values())
    *_, other = make()
    other.load_state_dict(saved)
    assert other.state_dict()["options"] == saved["options"]


def test_a_checkpoint_from_before_there_were_transitions_loads():
    job = make()
    run(job, 0, 6)
    saved = job[-1].state_dict()
    older = {key: value for key, value in saved.items() if key != "transition"}
    older["options"] = {key: value for key, value in saved["options"].items() if key != "transition"}
    older["state"] = [{k: v for k, v in state.items() if k != "begin"} for state in saved["state"]]
    *_, other = make(transition=7)
    other.load_state_dict(older)
    assert other.state_dict()["options"] == saved["options"] | {"transition": 7}
    assert other.state_dict()["state"] == saved["state"]


def test_rates_find_their_parameters_by_name_in_other_groups():
    job = make()
    run(job, 0, 6)
    model, *_, rates = job
    backwards = [{"params": [(n, p)]} for n, p in reversed(list(model.named_parameters()))]
    other = rmsgd.LayerRates(torch.optim.SGD(backwards, lr=LR))
    other.load_state_dict(rates.state_dict())
    ratio = {name: rate / job[1].param_groups[0]["lr"] for name, rate in rates.learning_rates().items()}
    layers = ("0.weight", "3.weight")
    assert {n: other.learning_rates()[n] / LR for n in layers} == pytest.approx({n: ratio[n] for n in layers})


def test_other_names_are_matched_by_order():
    job = make()
    run(job, 0, 6)
    renamed = rmsgd.layer_groups((f"module.{n}", p) for n, p in network().named_parameters())
    other = rmsgd.LayerRates(torch.optim.AdamW(renamed, lr=job[1].param_groups[0]["lr"]))
    other.load_state_dict(job[-1].state_dict())
    assert list(other.learning_rates().values()) == list(job[-1].learning_rates().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "must be a dict with 'rule', 'options', 'names' and 'state'"),
        (lambda s: {"state": {}, "param_groups": []}, "must be a dict with 'rule'"),
        (lambda s: s | {"rule": "paper"}, "is of the rule 'paper', this LayerRates of 'bounded'"),
        (lambda s: s | {"options": {}}, "options of the checkpoint must be a dict of beta"),
        (lambda s: s | {"options": s["options"] | {"beta": 2.0}}, r"beta must be in \[0, 1\), got 2.0"),
        (lambda s: s | {"names": s["names"][:-1]}, "an entry for every parameter"),
        (
            lambda s: s | {"names": s["names"][:-1], "state": s["state"][:-1]},
            r"rates of 5 parameters, the optimizer has 6; missing in the checkpoint: 3\.bias; unexp",
        ),
        (
            lambda s: s | {"state": [3, *s["state"][1:]]},
            r"0\.weight in the checkpoint: its state must be a dict",
        ),
        (
            lambda s: s | {"state": [s["state"][0] | {"rate": float("inf")}, *s["state"][1:]]},
            r"0\.weight in the checkpoint: rate must be finite, got inf",
        ),
        (
            lambda s: s | {"state": [s["state"][0] | {"begin": -1.0}, *s["state"][1:]]},
            r"0\.weight in the checkpoint: begin must be 0 or more, got -1\.0",
        ),
        (
            lambda s: s | {"transition": {"steps": 3, "taken": -1}},
            "transition of the checkpoint: taken must be a number of steps, got -1",
        ),
        (lambda s: s | {"names": [[name] for name in s["names"]]}, "names and state .* must be lists"),
        (lambda s: s | {"transition": 3}, "transition of the checkpoint must be steps and taken, got 3"),
        (
            lambda s: s | {"options": s["options"] | {"transition": 1.5}},
            "options of the checkpoint: transition must be a whole number of steps .* got 1.5",
        ),
    ],
)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(change, message):
    job = make()
    run(job, 0, 4)
    rates = job[-1]
    before = rates.state_dict()
    with pytest.raises(ValueError, match=message):
        rates.load_state_dict(change(deepcopy(before)))
    assert rates.state_dict() == before


def by_position(report):
    return {layer.name: 1.5 for layer in report.layers[:1]}


@pytest.mark.parametrize("copied", [deepcopy, lambda all_: pickle.loads(pickle.dumps(all_))])
@pytest.mark.parametrize("rule", ["rank-momentum", "llr", by_position])
def test_a_copy_of_a_run_goes_on_as_the_original(copied, rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=0.1, momentum=0.9)
    rates = rmsgd.LayerRates(optimizer, rule, linear=True, transition=3)
    x = torch.randn(8, 32)

    def go_on(model, optimizer, rates):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        rates.step()
        optimizer.step()
        return [p.detach() for p in model.parameters()], rates.learning_rates()

    go_on(model, optimizer, rates)
    twin = copied((model, optimizer, rates))
    assert twin[2].optimizer is twin[1]
    (weights, lrs), (twins_weights, twins_lrs) = go_on(model, optimizer, rates), go_on(*twin)
    assert lrs == twins_lrs
    assert all(map(torch.equal, weights, twins_weights))


def test_a_copy_of_the_optimizer_is_the_plain_optimizer():
    model, optimizer, _, rates = make()
    run((model, optimizer, _, rates), 0, 4)
    for copy in (deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copy) is torch.optim.AdamW
        assert "step" not in vars(copy)
        assert copy.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        copy.step()


def test_a_loaded_optimizer_keeps_its_rates():
    job = make()
    run(job, 0, 4)
    before = job[-1].learning_rates()
    job[1].load_state_dict(deepcopy(job[1].state_dict()))
    assert job[-1].learning_rates() == before
    gradients(job[0], 0)
    job[1].step()


def test_the_model_may_move_to_another_type_between_two_steps():
    job = make()
    run(job, 0, 4)
    job[0].double()
    job[-1].step()
    assert all(layer.skipped is None for layer in job[-1].report().layers)


# -- AMP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_run_equals_an_unscaled_one_and_an_overflow_is_skipped(fused):
    results = []
    for scale in (1.0, 1024.0):
        model = network()
        groups = rmsgd.layer_groups(model.named_parameters())
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, fused=fused)
        rates = moved(model, optimizer, rmsgd.LayerRates(optimizer))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for t in range(4):
            gradients(model, t)
            for p in model.parameters():
                p.grad *= scaler.scale(torch.ones(())) if t != 2 else torch.inf
            if t == 2 and not fused:
                before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            if t == 2 and not fused:
                assert all(map(torch.equal, model.parameters(), before))
            scaler.update(scale)
            assert {group["lr"] for group in optimizer.param_groups} == {LR}
        rates.step()
        results.append([p.detach().clone() for p in model.parameters()])
    if not fused:  # torch's fused SGD does not skip an overflow on every version
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q)


# -- torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", ["before", "after"])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_compiled_step_takes_each_layers_rate(tensor, compiled):
    torch.compiler.reset()
    results = []
    for compiles in (False, True):
        model = nn.Sequential(network()[3], nn.Linear(3, 5))
        groups = rmsgd.layer_groups(model.named_parameters(), lr=torch.tensor(LR) if tensor else LR)
        optimizer = torch.optim.AdamW(groups)
        step = torch.compile(optimizer.step, backend="eager") if compiles and compiled == "before" else None
        rates = rmsgd.LayerRates(optimizer)
        if step is None:
            step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for t in range(8):
            gradients(model, t)
            step()
            if t % 2:
                shift(model, 1.0)
                rates.step()
        assert {float(group["lr"]) for group in optimizer.param_groups} == {
            float(torch.tensor(LR)) if tensor else LR
        }
        assert len({round(rate, 4) for rate in rates.learning_rates().values()}) > 1
        results.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# -- jobs of several processes ----------------------------------------------------------------------

NEEDS_JOBS = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def job():
    job = Job(2)
    yield job
    job.close()


def train(kind):
    """Rates and weights of a run, and how many matrices this rank has measured."""
    model = network()
    plain = model
    if kind == "ddp":
        model = DistributedDataParallel(model)
    if kind == "fsdp":
        fully_shard(model)
    group = dist.group.WORLD if kind == "ddp" else None
    optimizer = torch.optim.SGD(rmsgd.layer_groups(plain.named_parameters()), lr=LR, momentum=0.9)
    rates = rmsgd.LayerRates(optimizer, process_group=group)
    with Counting() as counting:
        for t in range(4):
            generator = torch.Generator().manual_seed(t)
            optimizer.zero_grad()
            (0.1 * model(torch.randn(6, 2, 4, 4, generator=generator)).square().mean()).backward()
            optimizer.step()
            if t % 2:
                rates.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in plain.parameters()]
    return rates.learning_rates(), [p.detach().clone() for p in weights], counting.count


@NEEDS_JOBS
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=SHARDS_ON_CPU)])
def test_ranks_share_the_work_and_reproduce_one_process(job, kind):
    expected, weights, matrices = job.run(train, "alone")[0]
    assert len(set(expected.values())) > 1
    results = job.run(train, kind)
    assert sum(count for *_, count in results) == matrices
    assert min(count for *_, count in results) > 0
    for rates, theirs, _ in results:
        assert rates == pytest.approx(expected, rel=1e-6)
        assert rates == results[0][0]
        for p, q in zip(theirs, weights, strict=True):
            torch.testing.assert_close(p, q)


def tails(kind):
    """The tail exponents of a network, and the ratios that a rule of one's own makes of them."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 3)
    )
    if kind == "fsdp":
        fully_shard(model)
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    rates = rmsgd.LayerRates(optimizer, by_tail, process_group=dist.group.WORLD if kind == "ddp" else None)
    rates.step()
    return rates.learning_rates(), rates.report().to_dict()


def by_tail(report):
    return {layer.name: 1.0 / layer.alpha for layer in report.measured}


by_tail.measures = "tails"


@NEEDS_JOBS
def test_ranks_share_the_measuring_of_tails(job):
    alone = job.run(tails, "alone")
    assert len(set(alone[0][0].values())) == 4
    for kind in ("ddp", "fsdp"):
        assert job.run(tails, kind) == alone


def disagree():
    model = network()
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    rates = rmsgd.LayerRates(optimizer, process_group=dist.group.WORLD, beta=0.5 + 0.1 * dist.get_rank())
    try:
        rates.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


@NEEDS_JOBS
def test_ranks_that_differ_are_told_so(job):
    for message in job.run(disagree):
        assert "the ranks disagree: rank 0 has 0.weight" in message
