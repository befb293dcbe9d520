"""The cases of `bench speed` for pytest-benchmark: `pytest bench/ --benchmark-autosave`.

Cases of one group answer one question and are listed together. pytest-benchmark finishes a case before it
begins the next. For ratios that hold on a busy machine use `bench speed` and `bench gate`, whose cases take
turns.
"""

import pytest
import torch

from bench import epoch_end, speed_step
from bench.networks import network
from bench.weights import make_trained_like
from rmsgd import backends, evbmf

MODELS = ("resnet18", "mobilenetv2", "resnet14-digits")
BACKENDS = [s.name for s in backends.statuses("cpu", "any") if s.available]
SIZES = (64, 256, 512)


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


@pytest.fixture
def trained(request):
    """The network that the test's parameter `model` names, with weights as training leaves them."""
    trained_like = network(request.getfixturevalue("model"))
    make_trained_like(trained_like)
    return trained_like


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", speed_step.PEERS)
def test_step(benchmark, model, optimizer):
    benchmark.group = f"step, {model}"
    benchmark(speed_step.case(optimizer, model))


@pytest.mark.parametrize("model", MODELS)
def test_step_floor(benchmark, model):
    """The plain loop over one array of the network's size, the lower bound of a step."""
    benchmark.group = f"step, {model}"
    parameters = network(model).parameters()
    benchmark(speed_step.plain_loop(sum(p.numel() for p in parameters)))


@pytest.mark.parametrize("model", MODELS)
def test_epoch_end(benchmark, model, trained):
    benchmark.group = f"epoch end, {model}"
    benchmark(epoch_end.epoch_end(trained))


@pytest.mark.parametrize("model", MODELS)
def test_gram_products(benchmark, model, trained):
    """The whole products of every unfolding with its transpose, with which the epoch end is compared."""
    benchmark.group = f"epoch end, {model}"
    benchmark(epoch_end.gram_products(trained))


@pytest.mark.parametrize("model", MODELS)
def test_torch_spectra(benchmark, model, trained):
    benchmark.group = f"epoch end, {model}"
    benchmark(epoch_end.torch_spectra(trained))


@pytest.mark.parametrize("model", ["resnet14-digits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_spectra(benchmark, model, backend, trained, monkeypatch):
    """All spectra of a network with their metrics, by each backend."""
    benchmark.group = f"spectra, {model}"
    monkeypatch.setenv("RMSGD_BACKEND", backend)
    measure = backends.backend_for(torch.device("cpu")).measure
    benchmark(measure, epoch_end.spectra(trained))


@pytest.mark.parametrize("size", SIZES)
def test_evbmf(benchmark, size):
    benchmark.group = f"evbmf, {size} x {2 * size}"
    benchmark(evbmf, torch.randn(size, 2 * size))


@pytest.mark.parametrize("size", SIZES)
def test_torch_singular_values(benchmark, size):
    benchmark.group = f"evbmf, {size} x {2 * size}"
    benchmark(torch.linalg.svdvals, torch.randn(size, 2 * size))
