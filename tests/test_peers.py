"""The optimizers that RMSGD is compared with can be made by name, and train a small problem."""

import subprocess
import sys

import pytest
import torch

from bench import peers

TORCH_PEERS = [name for name in peers.PEERS if not name.startswith("rmsgd")]


def problem():
    """A linear regression, and a function that computes its loss and gradients."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    inputs = torch.randn(64, 6, generator=generator)
    targets = inputs @ torch.randn(6, 1, generator=generator)

    def closure():
        loss = (network(inputs) - targets).square().mean()
        if torch.is_grad_enabled():
            network.zero_grad()
            loss.backward()
        return loss

    return network, closure


def train(name, steps, **overrides):
    network, closure = problem()
    optimizer = peers.make(name, network.named_parameters(), **overrides)
    losses = []
    for _ in range(steps):
        loss = closure()
        losses.append(loss.item())
        optimizer.step(*peers.peer(name).step_arguments(closure, loss))
    return network, losses


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_a_peer_lowers_the_loss(name):
    _, losses = train(name, 50)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", ["sgd-single", "sgd-foreach", "sgd-fused", "sgd-per-layer"])
def test_every_form_of_sgd_computes_the_same(variant):
    reference, _ = train("sgd", 20)
    network, _ = train(variant, 20)
    for expected, actual in zip(reference.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_one_group_per_layer_is_one_group_per_tensor():
    network, _ = problem()
    optimizer = peers.make("sgd-per-layer", network.named_parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, 1]


@pytest.mark.parametrize("rule", ["rank-momentum", "tempbalance", "llr"])
def test_sgd_with_layer_rates_goes_on_from_a_checkpoint(rule):
    def run(optimizer, closure, epochs):
        for _ in range(epochs):
            closure()
            optimizer.step()
            optimizer.epoch_step()

    wide = {"weight_decay": 0.0, "lr": 0.01}
    (whole, closure), (part, closure_of_part), (rest, closure_of_rest) = (problem() for _ in range(3))
    made = [peers.make(f"sgd-{rule}", n.named_parameters(), **wide) for n in (whole, part, rest)]
    run(made[0], closure, 5)
    run(made[1], closure_of_part, 2)
    rest.load_state_dict(part.state_dict())
    made[2].load_state_dict(made[1].state_dict())
    run(made[2], closure_of_rest, 3)
    assert made[2].learning_rates() == made[0].learning_rates()
    for expected, found in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_settings_are_the_authors_unless_overridden():
    network, _ = problem()
    assert peers.make("sgd", network.named_parameters()).defaults["lr"] == 0.1
    assert peers.make("sgdp", network.named_parameters()).defaults["momentum"] == 0.9
    assert peers.make("adabound", network.named_parameters()).defaults["weight_decouple"] is False
    assert peers.make("sgd", network.named_parameters(), lr=0.5).defaults["lr"] == 0.5
    assert peers.PEERS["sgd"].settings["lr"] == 0.1


def test_frozen_parameters_are_left_out():
    network, _ = problem()
    network[0].weight.requires_grad_(False)
    optimizer = peers.make("sgd", network.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(ValueError, match=r"unknown optimizer 'sdgp'\. Did you mean 'sgdp'") as caught:
        peers.make("sdgp", [])
    assert all(name in str(caught.value) for name in peers.PEERS)


@pytest.fixture(scope="module")
def release():
    try:
        return peers.load_rmsgd_1_0_2()
    except peers.PeerUnavailableError as error:
        pytest.skip(str(error))


def test_the_authors_package_loads_under_its_own_name(release):
    assert release.__name__ == release.RMSGD.__module__.split(".")[0] == "rmsgd_1_0_2"
    assert peers.load_rmsgd_1_0_2() is release
    import rmsgd

    assert rmsgd is not release


def test_the_authors_package_steps_and_moves_its_rates(release):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 2))
    optimizer = peers.make("rmsgd-1.0.2", network.named_parameters())
    before = network[0].weight.detach().clone()
    network(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    optimizer.epoch_step()
    assert not torch.equal(before, network[0].weight)
    assert optimizer.lr_vector[0] == pytest.approx(0.03 * 1.98)


def test_a_registry_out_of_reach_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CACHE", tmp_path)
    monkeypatch.delitem(sys.modules, peers.RELEASE_MODULE, raising=False)
    calls = []

    def fail(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: no route to the index")

    monkeypatch.setattr(subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(peers.PeerUnavailableError, match="not be fetched: ERROR: no route") as caught:
            peers.load_rmsgd_1_0_2()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert len(calls) == 1
    assert calls[0][calls[0].index("--retries") + 1] == "0"


def test_a_registry_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CACHE", tmp_path)
    monkeypatch.delitem(sys.modules, peers.RELEASE_MODULE, raising=False)

    def hang(command, *, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(peers.PeerUnavailableError, match=f"more than {peers.FETCH_S} s"):
        peers.load_rmsgd_1_0_2()


def test_a_package_that_is_not_the_known_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CACHE", tmp_path)
    monkeypatch.delitem(sys.modules, peers.RELEASE_MODULE, raising=False)

    def deliver(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{peers.RELEASE_WHEEL}", "wb") as file:
            file.write(b"something else")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", deliver)
    with pytest.raises(peers.PeerUnavailableError, match="not the known file"):
        peers.load_rmsgd_1_0_2()


def test_a_rate_is_halved_every_tenth_of_the_run_in_whole_epochs_and_rmsgds_never():
    def period(name, epochs):
        schedule = peers.schedule(name, peers.make(name, problem()[0].named_parameters()), epochs)
        return schedule and schedule.step_size

    assert [period("sgd", epochs) for epochs in (1, 10, 12, 250)] == [1, 1, 2, 25]
    assert period("rmsgd", 250) is None


def test_times_are_held_against_sgds_or_the_firsts():
    assert peers.reference(("rmsgd", "sgd")) == "sgd"
    assert peers.reference(("sam", "adam")) == "sam"
