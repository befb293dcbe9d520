"""A weight that a module makes of other tensors is measured as the module uses it."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import rmsgd
from rmsgd import cli
from rmsgd.inspection.probing import Probing
from rmsgd.inspection.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).t()


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.6)
    return layer


def sparse(layer):
    class FakeSparsity(nn.Module):  # as torch.ao.pruning has it
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight):
            return weight * self.mask

    parametrize.register_parametrization(
        layer, "weight", FakeSparsity((torch.rand_like(layer.weight) > 0.5) * 1.0)
    )
    return layer


def trained(layer, steps=30):
    """The layer after enough forward passes for the power iteration of spectral_norm to converge."""
    for _ in range(steps):
        layer(torch.randn(1, 12, *[9] * (layer.weight.ndim - 2)))
    return layer


MADE = {
    "pruning": lambda: pruned(nn.Linear(12, 20)),
    "pruning of a convolution": lambda: pruned(nn.Conv2d(12, 20, 3)),
    "a sparse parametrization": lambda: sparse(nn.Linear(12, 20)),
    "weight_norm, hooks": lambda: weight_norm(nn.Conv1d(12, 20, 5)),
    "weight_norm, hooks, other dimension": lambda: weight_norm(nn.ConvTranspose1d(12, 20, 5), dim=1),
    "weight_norm, hooks, of all": lambda: weight_norm(nn.Linear(12, 20), dim=None),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(12, 20, 3)),
    "weight_norm, other dimension": lambda: parametrizations.weight_norm(nn.Linear(12, 20), dim=1),
    "spectral_norm, hooks": lambda: trained(spectral_norm(nn.Conv2d(12, 20, 3))),
    "spectral_norm, hooks, transposed": lambda: trained(spectral_norm(nn.ConvTranspose2d(12, 20, 3))),
    "spectral_norm, hooks, square": lambda: trained(spectral_norm(nn.ConvTranspose2d(12, 12, 3))),
    "spectral_norm": lambda: trained(parametrizations.spectral_norm(nn.Linear(12, 20))),
    "spectral_norm, square": lambda: trained(parametrizations.spectral_norm(nn.Conv2d(12, 12, 3))),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_weight_in_parts_is_measured_as_it_is_used(tmp_path, kind):
    layer = MADE[kind]().eval()
    with torch.no_grad():
        for parameter in layer.parameters():  # magnitudes that are not those of the directions
            if parameter.ndim > 1 and "norm" in kind and "weight_norm" in kind:
                parameter.mul_(1 + torch.rand_like(parameter))
        layer(torch.randn(1, 12, *[9] * (layer.weight.ndim - 2)))
        used = layer.weight.detach().clone()
    network = nn.ModuleDict({"fc": layer})
    torch.save(network.state_dict(), tmp_path / "m.pt")
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    for source in (network, network.state_dict(), tmp_path / "m.pt", tmp_path / "m.safetensors"):
        probing = Probing(source)
        probing.run()
        assert [x.name for x in probing.layers if x.skipped is None] == ["fc.weight"]
        assert probing.layers[-1].shape == used.shape or "of fc.weight" in probing.layers[-1].skipped
        assert torch.allclose(probing.weight("fc.weight"), used, rtol=2e-5, atol=1e-6)


def test_the_other_parts_are_named_and_a_mask_does_not_count():
    layer = pruned(nn.Linear(12, 20))
    report = rmsgd.probe(layer.state_dict())
    assert {x.name: x.skipped for x in report.layers} == {"weight": None, "weight_mask": "mask of weight"}
    assert report.quality == rmsgd.probe({"weight": layer.weight.detach()}).quality


def test_a_parametrization_that_does_not_show_in_a_file_is_a_reason_and_in_a_module_it_is_applied():
    layer = nn.Linear(12, 12)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    [stored] = rmsgd.probe(layer.state_dict()).layers
    assert stored.name == "parametrizations.weight.original"
    assert "which one does not show" in stored.skipped
    assert torch.equal(Probing(layer).weight("weight"), layer.weight.detach())


@pytest.mark.parametrize(
    "make", [parametrizations.orthogonal, lambda x: parametrizations.spectral_norm(sparse(x))]
)
def test_other_parametrizations_are_a_reason_in_a_file(make):
    layer = make(nn.Linear(12, 20))
    assert all(x.skipped for x in rmsgd.probe(layer.state_dict()).layers)
    assert torch.allclose(Probing(layer.eval()).weight("weight"), layer.weight.detach())


def test_a_parametrization_that_fails_is_a_reason():
    class Failing(nn.Module):
        ready = False

        def forward(self, weight):
            if self.ready:
                raise RuntimeError("no such device")
            return weight

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Failing())
    Failing.ready = True
    failing, sound = rmsgd.probe(nn.Sequential(layer, nn.Linear(4, 4))).layers
    assert failing.skipped == "its parametrization fails: no such device"
    assert sound.skipped is None


def test_probing_takes_no_step_of_a_power_iteration():
    layer = parametrizations.spectral_norm(nn.Linear(12, 20)).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    rmsgd.probe(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(part.training for part in layer.modules())


def test_half_of_a_weight_is_no_layer():
    state = weight_norm(nn.Linear(12, 20)).state_dict()
    pruned_state = pruned(nn.Linear(12, 20)).state_dict()
    del pruned_state["weight_mask"]
    state["weight_g"] = torch.ones(3, 1)
    assert rmsgd.probe(pruned_state).layers[0].skipped == "a part of a weight, of which the rest is not here"
    assert [x.name for x in rmsgd.probe(state).layers] == ["weight_g", "weight_v"]


# -- LoRA ----------------------------------------------------------------------------------------

PAIRS = {
    "PEFT's": ("q.lora_A.weight", "q.lora_B.weight", "q.lora_B@lora_A.weight"),
    "PEFT's with an adapter": (
        "q.lora_A.default.weight",
        "q.lora_B.default.weight",
        "q.lora_B@lora_A.default.weight",
    ),
    "loralib's": ("q.lora_A", "q.lora_B", "q.lora_B@lora_A"),
    "kohya's": (
        "unet_down_1.lora_down.weight",
        "unet_down_1.lora_up.weight",
        "unet_down_1.lora_up@lora_down.weight",
    ),
    "diffusers'": ("q.lora.down.weight", "q.lora.up.weight", "q.lora.up@lora.down.weight"),
    "an embedding's": ("e.lora_embedding_A", "e.lora_embedding_B", "e.lora_embedding_B@lora_embedding_A"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_the_product_of_a_lora_pair_is_one_more_layer(kind):
    down, up, product = PAIRS[kind]
    state = {down: torch.randn(4, 30), up: torch.randn(20, 4), "other": torch.randn(5, 6)}
    assert [x.name for x in rmsgd.probe(state).layers] == list(state)
    report = rmsgd.probe(state, merge_lora=True)
    assert [x.name for x in report.layers] == [*state, product]
    merged = rmsgd.probe({product: state[up] @ state[down]}).layers[0]
    assert report.layers[-1] == merged


def test_a_convolutions_pair_has_the_product_of_its_channels():
    state = {"c.lora_A.weight": torch.randn(4, 6, 3, 3), "c.lora_B.weight": torch.randn(20, 4, 1, 1)}
    expected = torch.einsum("or,rihw->oihw", state["c.lora_B.weight"][:, :, 0, 0], state["c.lora_A.weight"])
    merged = Probing(state, Selection(merge_lora=True)).weight("c.lora_B@lora_A.weight")
    assert torch.allclose(merged, expected, atol=1e-5)


def test_what_is_no_pair_has_no_product():
    state = {
        "q.lora_A.weight": torch.randn(4, 30),
        "q.lora_B.weight": torch.randn(20, 5),
        "lora_A": torch.ones(2, 2),
    }
    assert len(rmsgd.probe(state, merge_lora=True).layers) == 3


def test_the_command_merges_a_pair(capsys, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file({"q.lora_A.weight": torch.randn(4, 30), "q.lora_B.weight": torch.randn(20, 4)}, path)
    page = str(tmp_path / "m.html")
    assert cli.main(["probe", str(path), "--csv", "--merge-lora", "--html", page]) == 0
    assert "q.lora_B@lora_A.weight,20x30," in capsys.readouterr().out
