"""Jobs of several processes: one factorisation per matrix, the same rates everywhere, no surprises.

Every function called through ``job.run`` runs on all ranks.
"""

import gc
import os
import weakref
from copy import deepcopy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import SHARDS_ON_CPU, Counting, Job
from matrices import planted
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import rmsgd
from bench.epoch_end import spectra
from rmsgd.inspection import measuring
from rmsgd.layers import unfoldings
from rmsgd.optim.distributed import Ranks, split

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module", params=[2, 4])
def job(request):
    job = Job(request.param)
    yield job
    job.close()


def network():
    """A network that 2 or 4 ranks cannot share evenly; its last layer leaves one of 4 without a part."""
    torch.manual_seed(0)
    return planted(
        nn.Sequential(
            nn.Conv2d(2, 7, 3),
            nn.BatchNorm2d(7),
            nn.Conv2d(7, 6, 1),
            nn.Flatten(),
            nn.Linear(24, 9),
            nn.Linear(9, 3),
        )
    )


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    x = torch.randn(8, 2, 4, 4, generator=generator)
    (0.01 * model(x).square().mean()).backward()  # rates grow by stable ranks
    optimizer.step()


def alone(options):
    """Rates and weights of a run that shares nothing."""
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), **options)
    for t in range(6):
        step(model, optimizer, t)
        if t % 3 == 2:
            optimizer.epoch_step()
    assert sum(layer.stable_rank > 0.0 for layer in optimizer.report().layers) >= 3
    return optimizer.learning_rates(), [p.detach().clone() for p in model.parameters()]


MATRICES = len(spectra(network()))


# -- DDP -----------------------------------------------------------------------------------------


def train_ddp(options):
    model = DistributedDataParallel(network())
    optimizer = rmsgd.RMSGD(model.module.named_parameters(), process_group=dist.group.WORLD, **options)
    with Counting() as counting:
        for t in range(6):
            step(model, optimizer, t)
            if t % 3 == 2:
                optimizer.epoch_step()
    weights = [p.detach().clone() for p in model.parameters()]
    return optimizer.learning_rates(), weights, counting.count, optimizer.report().to_dict()


@pytest.mark.parametrize("options", [{"rule": "paper"}, {"rule": "release"}, {}], ids=str)
def test_replicas_share_the_epoch_end_and_reproduce_one_process(job, options):
    expected, weights = job.run(alone, options)[0]
    results = job.run(train_ddp, options)
    ends = 2 if options else 3  # by default the first step measures too
    assert sum(count for *_, count, _ in results) == ends * MATRICES
    assert min(count for *_, count, _ in results) > 0
    for rates, theirs, _, report in results:
        assert rates == expected
        assert all(map(torch.equal, theirs, weights))
        assert report == results[0][-1]


def epoch_end_on_one_rank(wrapped):
    model = network()
    model = DistributedDataParallel(model).module if wrapped else model
    optimizer = rmsgd.RMSGD(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if dist.get_rank() == 0:
        optimizer.step()
        optimizer.epoch_step()
        optimizer.state_dict()
    return True


@pytest.mark.parametrize("wrapped", [False, True])
def test_without_a_process_group_no_rank_waits_for_another(job, wrapped):
    assert all(job.run(epoch_end_on_one_rank, wrapped))


def disagree(what):
    model = network()
    if what == "shape" and dist.get_rank() == 1:
        model[5] = nn.Linear(9, 4)
    if what == "layers" and dist.get_rank() == 1:
        model = model[:5]
    optimizer = rmsgd.RMSGD(
        model.named_parameters(),
        lr=0.1 if what == "lr" and dist.get_rank() == 1 else 0.03,
        process_group=dist.group.WORLD,
    )
    if what == "checkpoint":
        with torch.no_grad():
            state_dict = deepcopy(optimizer.state_dict())
        for state in state_dict["state"].values():
            state["rate"] = 0.5
        if dist.get_rank() == 1:
            optimizer.load_state_dict(state_dict)
    before = optimizer.learning_rates()
    try:
        optimizer.epoch_step()
    except RuntimeError as error:
        assert optimizer.learning_rates() == before
        return str(error)
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", "rank 0 has 5.weight (3, 9)"),
        ("shape", "rank 1 has 5.weight (4, 9)"),
        ("layers", "rank 1 has nothing"),
        ("lr", "rate 0.1"),
        ("checkpoint", "rate 0.5"),
    ],
)
def test_ranks_that_disagree_all_say_what_differs(job, what, message):
    errors = job.run(disagree, what)
    assert all(error is not None and error.startswith("the ranks disagree") for error in errors)
    assert all(message in error for error in errors)


def stages_of_a_pipeline():
    """Ranks 0 and 1 hold copies of one stage, 2 and 3 of another with other layers."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = network()[:2] if rank < 2 else network()[4:]
    optimizer = rmsgd.RMSGD(model.named_parameters(), process_group=groups[rank // 2], rule="paper")
    with Counting() as counting:
        optimizer.epoch_step()
    twin = rmsgd.RMSGD(model.named_parameters(), rule="paper")
    twin.epoch_step()
    return counting.count, len(spectra(model)), optimizer.learning_rates(), twin.learning_rates()


def test_the_stages_of_a_pipeline_share_within_their_own_groups(job):
    if job.size != 4:
        pytest.skip("needs two stages of two ranks")
    results = job.run(stages_of_a_pipeline)
    for first, second in (results[:2], results[2:]):
        assert first[0] + second[0] == first[1]
        assert first[2] == first[3] == second[2] == second[3]
    assert results[0][2].keys() != results[2][2].keys()


def epoch_end_beside_a_nan():
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, rule="paper", process_group=dist.group.WORLD)
    with pytest.warns(UserWarning, match=r"NaN or infinite weights in 4\.weight:"):
        optimizer.epoch_step()
    return optimizer.learning_rates()


def test_a_weight_that_is_not_finite_keeps_its_rate_on_every_rank_and_each_says_so(job):
    results = job.run(epoch_end_beside_a_nan)
    assert all(rates == results[0] for rates in results)
    assert results[0]["4.weight"] == 0.03
    assert results[0]["5.weight"] != 0.03


# -- FSDP2 ---------------------------------------------------------------------------------------


def sharded(mesh=None):
    model = network()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model):
    return [p.full_tensor().detach().clone() for p in model.parameters()]


def train_fsdp(mesh_shape, options):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    model = sharded(mesh)
    optimizer = rmsgd.RMSGD(model.named_parameters(), **options)
    empty = sum(p.to_local().numel() == 0 for p in model.parameters())
    with Counting() as counting:
        for t in range(6):
            step(model, optimizer, t)
            if t % 3 == 2:
                optimizer.epoch_step()
    return optimizer.learning_rates(), whole(model), counting.count, empty


def probe_shards(mesh_shape, form):
    """The metrics of a sharded network, and how many whole weights there were: in all, and at once."""
    names = ("replicate", "shard")[-len(mesh_shape) :]
    model = sharded(init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    source = {"module": model, "state": model.state_dict(), "checkpoint": {"model": model.state_dict()}}[form]
    gathered, at_once = [], []

    def full_tensor(self, **options):
        tensor = gather(self, **options)
        gathered.append(StorageWeakRef(tensor.untyped_storage()))
        at_once.append(sum(not storage.expired() for storage in gathered))
        return tensor

    gather = DTensor.full_tensor
    with (
        mock.patch.object(DTensor, "full_tensor", full_tensor),
        mock.patch.object(measuring, "BATCH_BYTES", 1),
    ):
        report = rmsgd.probe(source)
    return report.layers, len(gathered), max(at_once)


@SHARDS_ON_CPU
@pytest.mark.parametrize("form", ["module", "state", "checkpoint"])
def test_a_probe_gathers_sharded_weights_one_by_one_and_reproduces_one_process(job, form):
    shapes = [(2,), (1, 2)] if job.size == 2 else [(4,), (2, 2)]
    expected = [layer for layer in rmsgd.probe(network()).layers if layer.skipped is None]
    assert len(expected) == 4
    for shape in shapes:
        for layers, gathered, at_once in job.run(probe_shards, shape, form):
            assert list(layers) == expected
            assert gathered == len(expected)
            assert at_once <= 2  # one that is measured, and the next


def leave_sharded_parameters():
    os.environ["RMSGD_BACKEND"] = "torch"  # whose stepper holds nothing but the tensors themselves
    model = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    step(model, rmsgd.RMSGD(model.named_parameters()), 0)
    p = next(model.parameters())
    p.optimizer = rmsgd.RMSGD([p])
    p.optimizer.step()
    gone = weakref.ref(p.optimizer)
    del p, model
    gc.collect()
    return gone() is None


@SHARDS_ON_CPU
def test_an_optimizer_of_sharded_parameters_that_refer_to_it_is_collected(job):
    assert all(job.run(leave_sharded_parameters))


@SHARDS_ON_CPU
@pytest.mark.parametrize("options", [{"rule": "paper"}, {"rule": "release", "nesterov": True}, {}], ids=str)
def test_sharded_weights_are_measured_whole_and_reproduce_one_process(job, options):
    expected, weights = job.run(alone, options)[0]
    results = job.run(train_fsdp, (job.size,), options)
    assert sum(count for *_, count, _ in results) == (2 if options else 3) * MATRICES
    assert sum(empty for *_, empty in results) > (0 if job.size == 4 else -1)
    for rates, theirs, _, _ in results:
        assert rates == results[0][0]
        assert rates == pytest.approx(expected, rel=1e-6)
        for a, b in zip(theirs, weights, strict=True):
            torch.testing.assert_close(a, b)


@SHARDS_ON_CPU
def test_a_mesh_of_replicas_and_shards_shares_the_epoch_end(job):
    if job.size != 4:
        pytest.skip("needs 2 x 2 ranks")
    expected, _ = job.run(alone, {"rule": "paper"})[0]
    results = job.run(train_fsdp, (2, 2), {"rule": "paper"})
    assert sum(count for *_, count, _ in results) == 2 * MATRICES
    for rates, *_ in results:
        assert rates == results[0][0]
        assert rates == pytest.approx(expected, rel=1e-6)


def mesh_as_told():
    return Ranks.of_mesh(init_device_mesh("cpu", (2, 2))).gather(dist.get_rank())


@SHARDS_ON_CPU
def test_the_ranks_of_a_mesh_are_told_apart_in_its_order(job):
    if job.size != 4:
        pytest.skip("needs 2 x 2 ranks")
    assert job.run(mesh_as_told) == [[0, 1, 2, 3]] * 4


def checkpointed(folder, flat):
    """A run that is saved after 4 of 8 steps, and its second half from the checkpoint."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def make():
        model = sharded()
        return model, rmsgd.RMSGD(model.named_parameters(), lr=0.0301, step_size=1, gamma=0.9, rule="paper")

    def run(model, optimizer, begin, end):
        for t in range(begin, end):
            step(model, optimizer, t)
            if t % 2 == 1:
                optimizer.epoch_step()

    model, optimizer = make()
    run(model, optimizer, 0, 4)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    run(model, optimizer, 4, 8)

    other, fresh = make()
    weights, state = get_state_dict(other, fresh, options=options)
    holder = {"model": weights, "optimizer": state}
    dcp.load(holder, checkpoint_id=folder)
    set_state_dict(
        other,
        fresh,
        model_state_dict=holder["model"],
        optim_state_dict=holder["optimizer"],
        options=options,
    )
    run(other, fresh, 4, 8)
    same = all(map(torch.equal, whole(model), whole(other)))
    return same, optimizer.learning_rates(), fresh.learning_rates()


@SHARDS_ON_CPU
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_resumes_in_a_fresh_optimizer_bit_for_bit(job, flat, tmp_path):
    for same, expected, rates in job.run(checkpointed, str(tmp_path / "checkpoint"), flat):
        assert rates == expected
        assert same


def saved_by_all(folder):
    model = sharded()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    for t in range(4):
        step(model, optimizer, t)
    optimizer.epoch_step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    step(model, optimizer, 4)
    optimizer.epoch_step()
    return optimizer.learning_rates(), whole(model)


def loaded_by_fewer(folder):
    model = sharded()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    weights, state = get_state_dict(model, optimizer)
    holder = {"model": weights, "optimizer": state}
    dcp.load(holder, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=holder["model"], optim_state_dict=holder["optimizer"])
    step(model, optimizer, 4)
    optimizer.epoch_step()
    return optimizer.learning_rates(), whole(model)


@SHARDS_ON_CPU
def test_a_checkpoint_of_some_ranks_loads_on_another_number(job, tmp_path):
    expected, weights = job.run(saved_by_all, str(tmp_path))[0]
    other = Job(6 - job.size)
    try:
        results = other.run(loaded_by_fewer, str(tmp_path))
    finally:
        other.close()
    for rates, theirs in results:
        assert rates == pytest.approx(expected, rel=1e-6)
        for a, b in zip(theirs, weights, strict=True):
            torch.testing.assert_close(a, b)


def whole_state_into_shards():
    model = sharded()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    single = rmsgd.RMSGD(network().named_parameters())
    with pytest.raises(ValueError, match=r"0\.weight.*DTensor.*set_optimizer_state_dict"):
        optimizer.load_state_dict(single.state_dict())
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return dist.get_rank() != 0 or full["state"]["0.weight"]["velocity"].shape == (7, 2, 3, 3)


@SHARDS_ON_CPU
def test_a_whole_state_is_not_loaded_into_shards_by_mistake(job):
    assert all(job.run(whole_state_into_shards))


def flattened():
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = rmsgd.RMSGD(model.named_parameters())
    with pytest.warns(UserWarning, match="no layer is measured.*use torch.distributed.fsdp.fully_shard"):
        optimizer.epoch_step()
    return True


@SHARDS_ON_CPU
def test_shards_of_the_first_fsdp_are_flat_and_a_warning_says_what_to_use(job):
    assert all(job.run(flattened))


# -- ZeroRedundancyOptimizer ---------------------------------------------------------------------


def train_zero():
    model = DistributedDataParallel(network())
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=rmsgd.RMSGD, lr=0.03)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(zero, 0.5)

    def run(model, zero, begin, end):
        for t in range(begin, end):
            step(model, zero, t)
            if t % 2 == 1:
                zero.optim.epoch_step()

    run(model, zero, 0, 4)
    scheduler.step()
    epochs = {state["epoch"] for state in zero.optim.state.values()}
    zero.consolidate_state_dict(to=0)
    saved = [deepcopy(zero.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0)

    twin = DistributedDataParallel(network())
    twin.load_state_dict(model.state_dict())
    other = ZeroRedundancyOptimizer(twin.parameters(), optimizer_class=rmsgd.RMSGD, lr=0.03)
    other.load_state_dict(saved[0])
    run(model, zero, 4, 8)
    run(twin, other, 4, 8)
    same = all(map(torch.equal, model.parameters(), twin.parameters()))
    return epochs, same, zero.optim.learning_rates(), other.optim.learning_rates(), model.module[0].weight


def test_zero_keeps_each_ranks_epochs_and_resumes(job):
    results = job.run(train_zero)
    for epochs, same, rates, resumed, weight in results:
        assert epochs <= {2}
        assert same
        assert rates == resumed
        assert torch.equal(weight, results[0][-1])


# -- the split -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_the_split_is_even_up_to_one_matrix(ranks):
    shapes = [(64, 64, 3, 3)] * 10 + [(256, 128, 3, 3)] * 5 + [(512, 512, 3, 3)] * 6 + [(10, 512)]
    costs = [unfolding.cost for shape in shapes for unfolding in unfoldings(shape)]
    owners = split(costs, ranks)
    load = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(ranks)]
    assert sum(load) == sum(costs)
    assert max(load) <= sum(costs) / ranks + max(costs)
    assert owners == split(costs, ranks)


@pytest.mark.parametrize("group", [dist.GroupMember.NON_GROUP_MEMBER, 3, "nccl"])
@pytest.mark.parametrize(
    "make", [rmsgd.RMSGD, lambda p, **of: rmsgd.LayerRates(torch.optim.SGD(p, lr=0.1), **of)]
)
def test_a_group_that_a_process_is_not_in_is_refused(make, group):
    p = nn.Parameter(torch.randn(8, 8))
    p.grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match=f"process_group must be .* this process belongs to.* got {group!r}"):
        make([p], process_group=group).step()
