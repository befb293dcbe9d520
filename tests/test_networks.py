"""A checkpoint of several networks is one report of one of them, and says which."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rmsgd
from rmsgd import cli
from rmsgd.inspection.reading.networks import copies_in, find_network
from rmsgd.inspection.reading.stored import CheckpointError


def network(scale=1.0):
    return {"conv.weight": scale * torch.randn(8, 4, 3, 3), "fc.weight": scale * torch.randn(6, 8)}


def under(prefix, state):
    return {f"{prefix}.{name}": value for name, value in state.items()}


def names(report):
    return [layer.name for layer in report.layers]


LAYERS = list(network())

NETWORKS = {
    # From the content of a file to the network that is measured, and the others that are named
    "a wrapper and its average": (
        lambda: {"model": network(), "model_ema": network(), "epoch": 3},
        LAYERS,
        ["model_ema"],
    ),
    "an average inside a wrapper": (
        lambda: {"model": network(), "ema": {"module": network(), "updates": 7}},
        LAYERS,
        ["ema"],
    ),
    "timm's": (lambda: {"state_dict": network(), "state_dict_ema": network()}, LAYERS, ["state_dict_ema"]),
    "BasicSR's": (
        lambda: {"params": network(), "params_ema": network()},
        [f"params.{name}" for name in LAYERS],
        ["params_ema"],
    ),
    "student and teacher": (
        lambda: {"student": network(), "teacher": network()},
        [f"student.{name}" for name in LAYERS],
        ["teacher"],
    ),
    "student and teacher in one state dict": (
        lambda: {"model": {**under("student.backbone", network()), **under("teacher.backbone", network())}},
        [f"student.backbone.{name}" for name in LAYERS],
        ["model.teacher"],
    ),
    "an average without dots": (
        lambda: {
            "state_dict": {
                **under("model.diffusion", network()),
                **{f"model_ema.{n.replace('.', '')}": x for n, x in network().items()},
            }
        },
        [f"model.diffusion.{name}" for name in LAYERS],
        ["state_dict.model_ema"],
    ),
    "a target and its original": (
        lambda: {"encoder": network(), "predictor": {"w": torch.randn(3, 4)}, "target_encoder": network()},
        [*(f"encoder.{name}" for name in LAYERS), "predictor.w"],
        ["target_encoder"],
    ),
    "another network": (
        lambda: {
            "model": network(),
            "discriminator": {"w": torch.randn(4, 4)},
            "optimizer": {"w": torch.ones(3, 3)},
        },
        LAYERS,
        ["discriminator"],
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("stored", [True, False])
def test_networks_beside_each_other_are_not_pooled(tmp_path, kind, stored):
    make, expected, others = NETWORKS[kind]
    source = make()
    if stored:
        torch.save(source, tmp_path / "m.pt")
        source = tmp_path / "m.pt"
    report = rmsgd.probe(source)
    assert names(report) == expected
    [note] = report.notes
    assert re.search(r"is measured; --key .* chooses (.*)", note)[1].split(" or ") == others
    for other in others:
        assert len(names(rmsgd.probe(source, key=other))) >= 1


def test_a_note_names_what_is_measured_if_that_is_one_network():
    [alone] = rmsgd.probe({"student": network(), "teacher": network()}).notes
    [several] = rmsgd.probe({"g": network(), "d": {"w": torch.randn(3, 4)}, "g_ema": network()}).notes
    assert alone.startswith("student is measured")
    assert several.startswith("the rest is measured")


def test_a_key_chooses_the_average():
    average = network()
    chosen = rmsgd.probe({"model": network(), "ema": {"module": average}}, key="ema.module")
    assert chosen == rmsgd.probe(average)


def test_a_key_is_a_part_of_a_flat_state_dict_and_of_a_module_too(tmp_path):
    state = {**under("student", network()), **under("teacher", network())}
    save_file(state, tmp_path / "m.safetensors")
    expected = rmsgd.probe({name: state[f"teacher.{name}"] for name in LAYERS})
    assert rmsgd.probe(tmp_path / "m.safetensors", key="teacher").layers == expected.layers
    module = nn.ModuleDict({"student": nn.Linear(4, 4), "teacher": nn.Linear(4, 4)})
    assert names(rmsgd.probe(module, key="teacher")) == ["weight"]


def test_a_key_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    torch.save({"generator": network(), "critic": network()}, tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError, match=r"m\.pt: no weights under the key 'ema'; there are generator, critic"
    ):
        rmsgd.probe(tmp_path / "m.pt", key="ema")
    with pytest.raises(CheckpointError, match="no weights under the key 'ema'"):
        rmsgd.probe(nn.Linear(3, 3), key="ema")


def test_different_networks_that_belong_together_are_one_report():
    report = rmsgd.probe({"generator": network(), "critic": network()})
    assert len(report.layers) == 4
    assert report.notes == ()


@pytest.mark.parametrize(
    "state",
    [
        {"target_embed.weight": torch.randn(9, 4), "source_embed.weight": torch.randn(9, 4)},
        {
            f"layers.{i}.{part}.weight": torch.randn(6, 6)
            for i in range(3)
            for part in ("attn", "attn_avg_pool")
        },
        {f"layers.{i}.ema.alpha": torch.randn(6, 2) for i in range(3)}
        | {"layers.0.fc.weight": torch.randn(6, 6)},
        under("ema", network()),
    ],
    ids=["embeddings", "layers", "gates", "alone"],
)
def test_parts_whose_names_only_sound_like_copies_are_layers(state):
    found = find_network(state)
    assert list(found.tensors) == list(state)
    assert found.notes == ()


def test_very_many_parts_with_a_copys_name_are_looked_at_in_no_time():
    state = {f"{i}_ema.w": torch.zeros(2, 2) for i in range(20_000)}
    assert copies_in(find_network(state).tensors) == []


@pytest.mark.parametrize("wrap", [lambda parts: parts, lambda parts: {"models": parts}, tuple])
def test_a_list_of_state_dicts_is_one_network_in_parts(tmp_path, wrap):
    parts = [network(), network()]
    torch.save(wrap(parts), tmp_path / "m.pt")
    report = rmsgd.probe(tmp_path / "m.pt")
    assert names(report) == [f"{i}.{name}" for i in range(2) for name in LAYERS]
    assert report.notes == ()


def test_the_command_says_which_networks_there_are(capsys, tmp_path):
    path = str(tmp_path / "m.pt")
    torch.save({"model": network(), "model_ema": network()}, path)
    note = "model is measured; --key (in Python key=) chooses model_ema"
    assert cli.main(["probe", path]) == 0
    assert f"m.pt: {note}" in capsys.readouterr().out
    assert cli.main(["probe", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [note]
    assert cli.main(["probe", path, "--json", "--key", "model_ema"]) == 0
    assert "notes" not in json.loads(capsys.readouterr().out)
    assert cli.main(["probe", path, "--html", str(tmp_path / "m.html"), "--key", "model_ema"]) == 0
    assert cli.main(["probe", path, path, "--plot", str(tmp_path / "m.png"), "--key", "model_ema"]) == 0
